"""What the preflight says of bad values, collected by one run."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import INVENTORY, Stack, eventually, host_variables

RECEIVER = {
    "name": "team",
    "webhook_configs": [{"url_file": "/etc/alertmanager/secrets/team_url"}],
}

CASES = [
    (
        {"rabbitmq_prot": 5673, "stack_bind_adress": "0.0.0.0"},
        ["rabbitmq_prot", "stack_bind_adress", "spelling"],
    ),
    ({"apps_publisher_port": "http"}, ["apps_publisher_port", "http", "int"]),
    (
        {"rabbitmq_amqp_port": 5999, "rabbitmq_metrics_port": 5001},
        ["Port 5999 (rabbitmq_amqp_port)", "Port 5001 (rabbitmq_metrics_port)", "in use"],
    ),
    (
        {"apps_publisher_port": 5998, "apps_subscriber_port": "5998"},
        ["5998", "published once", "apps_subscriber_port"],
    ),
    (
        {"apps_publisher_confirm_timeout": 10},
        ["apps_publisher_confirm_timeout", "10", "1 to 4"],
    ),
    (
        {"apps_max_batch_bytes": 67108864},
        ["apps_publisher_memory is 512M", "1120M", "apps_subscriber_memory is 384M", "592M"],
    ),
    (
        {"stack_bind_address": "0.0.0.0", "refused_by": ["apps"]},
        ["stack_bind_address is 0.0.0.0", "stack_clients"],
    ),
    (
        {"apps_cors_origins": ["https://app.example.com"]},
        ["apps_cors_origins is https://app.example.com", "stack_clients"],
    ),
    (
        {
            "apps_cors_origins": ["https://app.example.com/"],
            "stack_clients": [{"name": "page"}],
            "refused_by": ["apps"],
        },
        ["apps_cors_origins has https://app.example.com/;", "such as https://app.example.com"],
    ),
    (
        {
            "stack_clients": [
                {"name": "admin", "send": ["nowhere"]},
                {"name": "a/b", "receive": ["takeaway.dead"], "manage": ["nothing"]},
            ],
            "stack_queues": [{"name": "takeaway"}],
            "refused_by": ["rabbitmq"],
        },
        [
            "stack_clients has the name 'admin'",
            "stack_clients has the name 'a/b'",
            "admin: send has nowhere",
            "a/b: receive has takeaway.dead",
            "a/b: manage has nothing",
        ],
    ),
    (
        {"stack_clients": [{"name": "a", "recieve": []}], "refused_by": ["rabbitmq"]},
        ["stack_clients.recieve", "receive"],
    ),
    (
        {"apps_http_user": "me", "stack_http_password": "x"},
        ["apps_http_user is gone; write stack_clients", "stack_http_password is gone"],
    ),
    (
        {
            "stack_clients": [{"name": "short"}],
            "stack_secrets_dir": "{{ inventory_dir }}/../bad/tokens",
            "refused_by": ["apps"],
        },
        ["client_short has a token that is not of 20 ASCII characters or more"],
    ),
    (
        {"rabbitmq_host_name": "a.example", "rabbitmq_disk_free_limit": "two"},
        ["is a.example;", "without dots", "rabbitmq_disk_free_limit is two;", "2GB"],
    ),
    (
        {
            "rabbitmq_memory": "511M",
            "rabbitmq_memory_watermark": 0.41,
            "rabbitmq_open_files": 999,
        },
        [
            "rabbitmq_memory is 511M;",
            "from 512M",
            "rabbitmq_memory_watermark is 0.41;",
            "from 0.1 to 0.4",
            "rabbitmq_open_files is 999;",
        ],
    ),
    (
        {
            "stack_queues": [
                {"name": "takeaway", "message_ttl": "7", "max_bytes": "0M"},
                {"name": "a.dead", "max_deliveries": 0},
                {"name": "amq.a", "max_length": 0},
                {"name": "a b"},
                {"name": "takeaway"},
            ],
            "stack_queues_remove": ["a b"],
            "refused_by": ["rabbitmq"],
        },
        [
            "takeaway: message_ttl is 7;",
            "such as 45s",
            "takeaway: max_bytes is 0M;",
            "a.dead: max_deliveries is 0;",
            "amq.a: max_length is 0;",
            "only dead queues end in .dead",
            "amq. is for the broker's own",
            "the name 'a b'",
            "stack_queues has takeaway twice",
            "stack_queues_remove has a b",
        ],
    ),
    (
        {
            "stack_queue": "lunch",
            "stack_queues": [{"name": "takeaway"}],
            "stack_topics": [
                {"name": "takeaway-in"},
                {"name": "t", "subscriptions": [{"queue": "lunch", "pattern": ""}]},
                {"name": "t"},
            ],
            "refused_by": ["rabbitmq"],
        },
        [
            "stack_queue is lunch, which is not in stack_queues;",
            "stack_topics has takeaway-in, which is stack_exchange;",
            "t: the queue lunch is not in stack_queues;",
            "t: the pattern of lunch has 0 bytes;",
            "stack_topics has t twice",
        ],
    ),
    (
        {
            "stack_queues": [{"name": "takeaway"}, {"name": "orders", "max_length": 524000}],
            "refused_by": ["rabbitmq"],
        },
        ["room for 525000 messages", "524288", "raise rabbitmq_memory"],
    ),
    (
        {"stack_queues": [{"name": "takeaway", "max_lenght": 9}], "refused_by": ["rabbitmq"]},
        ["stack_queues.max_lenght", "max_length"],
    ),
    (
        {
            "stack_topics": [{"name": "t", "subscriptions": [{"queue": "takeaway"}]}],
            "refused_by": ["rabbitmq"],
        },
        ["stack_topics -> subscriptions", "pattern"],
    ),
    (
        {
            "stack_queues": [{"name": "takeaway"}, {"name": "lunch"}],
            "stack_topics": [{"name": "breakfast"}],
            "refused_by": ["rabbitmq"],
        },
        [
            "a queue lunch that somebody else made: its type is classic, it has x-max-length: 9.",
            "another name for lunch in stack_queues",
            "playbooks/move.yml -e queue=lunch -e to=",
            "an exchange breakfast that somebody else made: its type is fanout.",
            "another name in stack_topics",
        ],
    ),
    (
        {"rabbitmq_memory": "9999G", "rabbitmq_memory_watermark": 0.10},
        ["rabbitmq_memory is 9999G, but", "GB; set rabbitmq_memory to less"],
    ),
    (
        {"stack_name": "other", "refused_by": ["fluentd"]},
        ["other-fluentd", "container of", "volume at", "stack_name"],
    ),
    ({"stack_name": "third"}, ["network third", "stack_name"]),
    ({"stack_name": "No/Name"}, ["stack_name", "No/Name"]),
    ({"stack_name": "name\n"}, ["stack_name is name", "lower-case"]),
    (
        {"stack_bind_address": "localhost", "stack_queue": "a b"},
        ["stack_bind_address is localhost;", "IPv4", "stack_queue is a b;"],
    ),
    (
        {"monitoring_bind_address": "0.0.0.0", "rabbitmq_management_bind_address": "192.0.2.1"},
        [
            "monitoring_bind_address is 0.0.0.0: those of Prometheus",
            "rabbitmq_management_bind_address is 192.0.2.1: that of the management UI",
            "Set stack_tls to own",
            "stack_plain_text to accepted",
        ],
    ),
    ({"stack_bind_address": "127.evil"}, ["stack_bind_address is 127.evil;"]),
    ({"stack_bind_address": "::1"}, ["stack_bind_address is ::1;"]),
    (
        {"monitoring_exporter_env": {"A;touch /tmp/x": "1"}},
        ["monitoring_exporter_env", "A;touch /tmp/x", "letters, digits"],
    ),
    (
        {"refused_environment": {"DOCKER_HOST": "unix:///run/second.sock"}},
        ["asks unix:///run/second.sock", "unset DOCKER_HOST"],
    ),
    (
        {
            "refused_by": [],
            "refused_engine": {
                "DockerRootDir": "/var/lib/docker/1.1",
                "SecurityOptions": ["name=seccomp,profile=default", "name=userns"],
            },
        },
        ["maps users", "name=userns", "userns-remap"],
    ),
    (
        {
            "refused_by": [],
            "refused_engine": {
                "DockerRootDir": "/var/lib/containers/storage",
                "SecurityOptions": [],
            },
        },
        ["Podman"],
    ),
    (
        {"stack_secrets_dir": str(INVENTORY.parent / "bad/secrets")},
        ["bad/secrets/empty", "bad/secrets/half.lockfile", "bad/secrets/foreign", "chown"],
    ),
    # YAML reads a bare on as true.
    (
        {
            "stack_tls": True,
            "stack_tls_names": ["*.a"],
            "tls_certificate_days": 30,
            "refused_by": ["tls"],
        },
        [
            "stack_tls is True; write",
            "own or files",
            "stack_tls_names is ['*.a']; write names of hosts",
            "tls_certificate_days is 30; write days from 90",
        ],
    ),
    (
        {"stack_tls": "files", "stack_tls_key_file": "../bad/key.pem", "refused_by": ["tls"]},
        [
            "stack_tls_certificate_file is empty: name the file",
            "stack_tls_key_file is ../bad/key.pem: its mode 0644 lets others read the key",
            "stack_tls_ca_file is empty",
        ],
    ),
    ({"preflight_architectures": ["riscv64"]}, ["riscv64", "preflight_architectures"]),
    ({"preflight_min_free_gib": 99999}, ["99999 GiB", "preflight_min_free_gib"]),
    (
        {"fluentd_log_limit": "much", "fluentd_log_dir": "/tmp/../etc"},
        [
            "fluentd_log_limit is much;",
            "from 100M",
            "fluentd_log_dir is /tmp/../etc;",
            "whole path",
        ],
    ),
    ({"fluentd_log_dir": "/tmp/link"}, ["fluentd_log_dir", "/tmp/link", "a link"]),
    ({"fluentd_log_dir": "/tmp/full"}, ["fluentd_log_dir", "/tmp/full", "something in it"]),
    ({"fluentd_log_dir": "/tmp/used"}, ["fluentd_log_dir", "/tmp/used", "/other-fluentd"]),
    (
        {"monitoring_prometheus_rules": ["../bad/bad-rules.yml"]},
        ["rules/bad-rules.yml", "TooEarly", "parse error"],
    ),
    (
        {"monitoring_prometheus_scrapes": ["../bad/*-scrape.yml"]},
        ["scrape/bad-scrape.yml", "scrape_intervall"],
    ),
    (
        {
            "monitoring_prometheus_rules": ["missing/*.yml"],
            "monitoring_prometheus_scrapes": ["../ansible.cfg"],
        },
        ["monitoring_prometheus_rules", "missing/*.yml is no file", "is ansible.cfg; "],
    ),
    (
        {"monitoring_alertmanager_receivers": [RECEIVER]},
        ["/etc/alertmanager/secrets/team_url", "monitoring_alertmanager_secrets"],
    ),
    (
        {"monitoring_alertmanager_route": {"receiver": "nobody"}},
        ["configuration of alertmanager", "nobody"],
    ),
    (
        {"monitoring_exporter_env": {"INCLUDE_QUEUES": "takeaway("}},
        ["monitoring_exporter_env", "INCLUDE_QUEUES", "takeaway("],
    ),
    ({"monitoring_exporter_env": {"PUBLISH_PORT": 1}}, ["monitoring_exporter_env", "PUBLISH_PORT"]),
    (
        {"image_registry": "http://registry:5000"},
        ["image_registry", "http://registry:5000", "host:port"],
    ),
    # With this one, the image is compared with the data as well.
    (
        {
            "image_refs": {"rabbitmq": "other:4.3.6"},
            "rabbitmq_host_name": "broker1",
            "refused_by": [],
        },
        ["RabbitMQ 4.3.6", "4.0.5", "through 4.2"],
    ),
    (
        {
            "image_refs": {"rabbitmq": "kept:4.0.5"},
            "rabbitmq_host_name": "another",
            "refused_by": [],
        },
        ["rabbitmq_host_name", "another", "to broker1"],
    ),
    (
        {"monitoring_prometheus_alerts": {"RabbitMQDwon": {"for": "1m"}}},
        ["monitoring_prometheus_alerts", "RabbitMQDwon", "no alert has this name"],
    ),
    (
        {"monitoring_prometheus_alerts": {"RabbitMQBacklog": {"for": "soon", "over": 5}}},
        ["RabbitMQBacklog has over, soon;", "'above': 100"],
    ),
]


def collect(stack: Stack) -> dict[str, str]:
    """Return what is said of each of CASES, by case0, case1, …; nothing is changed by it.

    No container may be started or stopped meanwhile.
    """
    with foreign(stack), port_5999(stack), bad_files(), versions(stack):
        before = state(stack)
        folder = INVENTORY.parent / "refused"
        folder.mkdir()
        kept = {**host_variables(), "stack_secrets_dir": str(stack.secrets)}
        hosts = {
            f"case{number}": {**kept, **only(given)} for number, (given, _) in enumerate(CASES)
        }
        (folder / "hosts.json").write_text(json.dumps({"refused": {"hosts": hosts}}))
        inventory = ("--inventory", str(folder / "hosts.json"))
        run = stack.playbook("../molecule/shared/refusals", *inventory)
        texts = {file.stem: file.read_text() for file in folder.glob("case*.json")}
        shutil.rmtree(folder)
        assert run.returncode == 0, run.stdout[-3000:]
        assert state(stack) == before
    return texts


def only(variables: dict[str, object]) -> dict[str, object]:
    """Return variables and, where one role has them all, that its preflight suffices."""
    roles = {name.split("_")[0] for name in variables}
    suffices = len(roles) == 1 and roles <= {"apps", "fluentd", "image", "monitoring", "rabbitmq"}
    return {"refused_by": list(roles), **variables} if suffices else variables


def state(stack: Stack) -> tuple[dict[str, str], set[str]]:
    """Return when each container was started, and the password files of any stack."""
    files = {str(file) for file in stack.secrets.parent.rglob("*")}
    return stack.starts(), files


@contextmanager
def foreign(stack: Stack) -> Iterator[None]:
    """What is somebody else's: a container, a volume, a network, folders, a queue, an exchange."""
    stack.run(
        "ln -s %s /tmp/link && install --directory --owner 999 /tmp/full /tmp/full/x",
        stack.vars["fluentd_log_dir"],
    )
    stack.run("install --directory --owner 999 /tmp/used")
    image = stack.inspect("rabbitmq")["Config"]["Image"]
    create = ("create", "--name", "other-fluentd", "--volume", "/tmp/used:/logs")
    stack.docker(*create, image, "true")
    stack.docker("volume", "create", "other-fluentd")
    stack.docker("network", "create", "third")
    classic = {"durable": True, "arguments": {"x-queue-type": "classic", "x-max-length": 9}}
    made = {
        "/queues/%2F/lunch": classic,
        "/exchanges/%2F/breakfast": {"type": "fanout", "durable": True},
    }
    for path, body in made.items():
        put = ("--request", "PUT", "--json", json.dumps(body))
        assert stack.api(path, "admin", *put).status == 201
    yield
    for path in made:
        assert stack.api(path, "admin", "--request", "DELETE").status == 204
    stack.docker("network", "rm", "third")
    stack.run("rm -r /tmp/link /tmp/full /tmp/used")
    stack.docker("rm", "--volumes", "other-fluentd")
    stack.docker("volume", "rm", "other-fluentd")


@contextmanager
def port_5999(stack: Stack) -> Iterator[None]:
    """A program of somebody else's on port 5999."""
    pid = stack.run(
        "nohup python3 -m http.server --bind 127.0.0.1 5999 >/dev/null 2>&1 & echo $!"
    ).strip()
    eventually(lambda: stack.host.run("curl -s 127.0.0.1:5999").rc == 0, 10, "port 5999 is taken")
    yield
    stack.run("kill %s", pid)


@contextmanager
def bad_files() -> Iterator[None]:
    """Rules and scrapes that Prometheus cannot read, and passwords that nobody can use."""
    rule = {"alert": "TooEarly", "expr": "time() <"}
    scrape = {"job_name": "bad", "scrape_intervall": "1s"}
    folder = INVENTORY.parent / "bad"
    folder.mkdir(exist_ok=True)
    (folder / "bad-rules.yml").write_text(json.dumps({"groups": [{"name": "b", "rules": [rule]}]}))
    (folder / "bad-scrape.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    passwords = {"empty": "", "half": "x", "half.lockfile": "x", "foreign": "x"}
    for name, text in passwords.items():
        (folder / "secrets").mkdir(exist_ok=True)
        (folder / "secrets" / name).write_text(text)
        (folder / "secrets" / name).chmod(0o600)
    os.chown(folder / "secrets/foreign", 1, 1)
    (folder / "key.pem").write_text("x")
    (folder / "key.pem").chmod(0o644)
    (folder / "tokens").mkdir(exist_ok=True)
    (folder / "tokens/client_short").write_text("short")
    (folder / "tokens/client_short").chmod(0o600)
    yield
    shutil.rmtree(folder)


@contextmanager
def versions(stack: Stack) -> Iterator[None]:
    """The broker's image, as it is and saying that it is 4.3.6."""
    image = stack.inspect("rabbitmq")["Config"]["Image"]
    dockerfile = f"FROM {image}\\nENV RABBITMQ_VERSION=4.3.6\\n"
    stack.run(f"printf '{dockerfile}' | docker build --tag other:4.3.6 -")
    stack.docker("tag", image, "kept:4.0.5")
    yield
    stack.docker("rmi", "other:4.3.6", "kept:4.0.5")
