"""What the stack survives, what it takes over, and, in the end, what is left of it."""

import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest
from conftest import INVENTORY, SERVICES, Stack, eventually

BEARER = "Authorization: Bearer token.secret"


@pytest.fixture
def three_messages(stack: Stack, empty_queue: None):  # noqa: ARG001 - a mark has no effect on it
    """Three messages that must still be there, in order, after the test."""
    # The run before may have left doors that ask for credentials; others do not mind them.
    for number in range(3):
        message = ("--header", BEARER, "--data", f"message=kept {number}")
        assert stack.http("apps_publisher_port", "/data", *message).status == 201
    yield
    stack.wait_until_ready(90)
    receive = ("apps_subscriber_port", "/receive", "--header", BEARER)
    assert [stack.http(*receive).text for _ in range(4)] == [
        "kept 0\n",
        "kept 1\n",
        "kept 2\n",
        "No message available\n",
    ]


@pytest.mark.usefixtures("three_messages")
def test_a_stopped_broker_is_503_within_5_seconds_and_back_within_30(stack: Stack) -> None:
    before = stack.starts()
    stack.docker("stop", stack.container("rabbitmq"))
    for ask in lambda: stack.send("unknown"), stack.receive:
        start = time.monotonic()
        answer = ask()
        assert time.monotonic() - start < 5
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json["message"]
    for port in "apps_publisher_port", "apps_subscriber_port":
        assert stack.http(port, "/healthz").json["broker"] == "down"
        assert stack.http(port, "/healthz?ready").status == 503
    stack.docker("start", stack.container("rabbitmq"))
    seconds = stack.wait_until_ready(30)
    print(f"ready {seconds:.1f} s after docker start")
    after = stack.starts()
    assert {name for name in before if before[name] != after[name]} == {stack.container("rabbitmq")}


@pytest.mark.usefixtures("three_messages")
@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_main_process_comes_back(stack: Stack, service: str) -> None:
    # From the host: docker kill counts as a manual stop, after which nothing restarts.
    pid = stack.inspect(service)["State"]["Pid"]
    stack.run("kill -9 %s", str(pid))
    eventually(
        lambda: stack.inspect(service)["State"]["Pid"] not in (0, pid), 30, f"{service} runs again"
    )
    print(f"{service}: ready {stack.wait_until_ready(60):.1f} s later")


@pytest.mark.usefixtures("three_messages")
def test_a_killed_worker_comes_back_alone(stack: Stack) -> None:
    before = stack.starts()
    pid = stack.inspect("publisher")["State"]["Pid"]

    def workers() -> set[str]:
        return set(stack.run("cat /proc/%s/task/%s/children", str(pid), str(pid)).split())

    def connections() -> int:
        logs = stack.run("docker logs %s 2>&1", stack.container("publisher"))
        return logs.count("Connected to the broker")

    old, known = workers(), connections()
    assert len(old) == stack.vars["apps_publisher_workers"]
    killed = old.pop()
    stack.run("kill -9 %s", killed)
    eventually(lambda: killed not in workers() and len(workers()) == 2, 20, "a new worker runs")
    eventually(lambda: connections() == known + 1, 30, "it is connected")
    assert old < workers()
    assert stack.starts() == before


@pytest.mark.usefixtures("three_messages")
def test_messages_survive_the_engines_restart(stack: Stack) -> None:
    before = stack.starts()
    stack.run("kill $(cat /run/docker.pid)")
    eventually(lambda: restarted(stack, before), 90, "the engine brought every container back")


@pytest.mark.usefixtures("three_messages")
def test_messages_survive_the_hosts_restart(stack: Stack) -> None:
    before = stack.starts()
    stack.host.backend.run_local("docker restart --time 20 %s", stack.vars["ansible_host"])
    eventually(lambda: restarted(stack, before), 90, "the host brought every container back")
    # /tmp was emptied: the folder of the logs was made anew before the engine could do it, as root.
    assert stack.run("stat --format %%u %s", stack.vars["fluentd_log_dir"]).strip() == "999"


def restarted(stack: Stack, before: dict[str, str]) -> bool:
    if stack.host.run("docker ps").rc != 0:
        return False
    after = stack.starts()
    running = stack.docker("ps", "--format", "{{.Names}}").split()
    return all(after[name] != before[name] and name in running for name in before)


@pytest.fixture
def own_files() -> Iterator[dict[str, object]]:
    """Rules, a target, a receiver and credentials of the user's own, as variables."""
    rule = {"alert": "MyOwn", "expr": "vector(1)", "labels": {"severity": "low"}}
    rules = {"groups": [{"name": "own", "rules": [rule]}]}
    target = {"job_name": "own", "static_configs": [{"targets": ["fluentd:9880"]}]}
    # Beside the inventory: Ansible takes every file in its folder for one.
    folder = INVENTORY.parent / "own"
    folder.mkdir(exist_ok=True)
    (folder / "rules.yml").write_text(json.dumps(rules))
    (folder / "scrape.yml").write_text(json.dumps({"scrape_configs": [target]}))
    url = "/etc/alertmanager/secrets/own_url"
    yield {
        "monitoring_prometheus_rules": ["../own/rules.yml"],
        "monitoring_prometheus_scrapes": ["../own/s*.yml"],
        "monitoring_alertmanager_receivers": [
            {"name": "own", "webhook_configs": [{"url_file": url}]}
        ],
        "monitoring_alertmanager_secrets": {"own_url": "http://fluentd:9880/own.secret"},
        "monitoring_alertmanager_route": {
            "receiver": "own",
            "group_by": ["alertname"],
            "group_wait": "1s",
        },
        "apps_http_user": "me",
        "apps_http_token": "token.secret",
    }
    shutil.rmtree(folder)


@pytest.mark.usefixtures("three_messages")
def test_a_run_takes_what_is_the_user_s_own_and_repairs_what_was_removed(
    stack: Stack, own_files: dict[str, object]
) -> None:
    before = stack.starts()
    old = stack.password("publisher")
    (stack.secrets / "rabbitmq_publisher").write_text("changed-by-hand\n")
    stack.docker("rm", "--force", stack.container("rabbitmq"))
    logs = stack.vars["fluentd_log_dir"]
    stack.run("rm --recursive %s", logs)
    # It ends once both doors are connected.
    said = stack.site("-v", "--diff", "--extra-vars", json.dumps(own_files))
    password = (stack.secrets / "http").read_text().strip()
    shown = said + "".join(str(stack.inspect(service)) for service in SERVICES)
    own = ("own.secret", "token.secret", password, "changed-by-hand")
    assert not [one for one in own if one in shown]
    after = stack.starts()
    assert [name for name in after if after[name] == before[name]] == [stack.container("exporter")]

    for port, path in ("apps_publisher_port", "/"), ("apps_subscriber_port", "/receive"):
        assert stack.http(port, path).status == 401
        assert stack.http(port, path, "--user", "me:wrong").status == 401
        assert stack.http(port, "/healthz?ready").status == 200
    for given in ("--user", f"me:{password}"), ("--header", BEARER):
        assert stack.http("apps_publisher_port", "/", *given).status == 200
        assert stack.http("apps_subscriber_port", "/", *given).status == 200
    publish = "publish", stack.vars["stack_exchange"], "nowhere"
    assert stack.amqp("publisher", *publish, password=old) == "ProbableAuthenticationError"
    eventually(lambda: "rabbitmq" in stack.run("ls %s", logs), 90, "logs are written again")
    eventually(lambda: "MyOwn" in stack.firing(), 60, "the own rule is evaluated")
    assert "own" in stack.targets()
    # By hand: Prometheus knew no Alertmanager when it started, and tells again only every minute.
    alert = json.dumps([{"labels": {"alertname": "ByHand"}}])
    post = ("--header", "Content-Type: application/json", "--data", alert)
    assert stack.http("monitoring_alertmanager_port", "/api/v2/alerts", *post).status == 200
    eventually(
        lambda: any("own.secret" in line and "ByHand" in line for line in stack.lines("other")),
        30,
        "the own receiver was told",
    )


@pytest.mark.usefixtures("three_messages")
def test_the_next_run_takes_back_what_it_is_given_no_more(stack: Stack) -> None:
    checked = json.dumps({"preflight_checked": ["monitoring"]})
    stack.site("--tags", "prometheus,alertmanager", "--extra-vars", checked)
    eventually(lambda: "Watchdog" in stack.firing(), 60, "rules are evaluated")
    assert "MyOwn" not in stack.firing()
    assert stack.targets().keys() & {"own", "exporter"} == {"exporter"}
    left = stack.run("find /etc/message-broker-stack -type f")
    assert "/prometheus/rules/broker.yml" in left
    assert not re.search("own_url|/rules.yml|/scrape.yml", left)


@pytest.mark.usefixtures("empty_queue")
def test_down_keeps_the_data_and_clean_leaves_only_what_is_others(stack: Stack) -> None:
    # One of them stands on an image of the stack's, whose labels it inherits.
    borrowed = stack.inspect("rabbitmq")["Config"]["Image"]
    stack.docker("run", "--detach", "--name", "foreign", "--entrypoint", "sleep", borrowed, "3600")
    stack.docker("volume", "create", "foreign")
    dockerfile = "FROM scratch\nCOPY daemon.json /\n"
    stack.run(f"printf '{dockerfile}' | docker build --tag foreign --file - /etc/docker")

    assert stack.playbook("down").returncode == 0
    assert stack.docker("ps", "--format", "{{.Names}}").split() == ["foreign"]
    assert stack.name not in stack.docker("network", "ls", "--format", "{{.Name}}").split()
    # That a message and a password survive it, the bare machine shows.
    stack.docker("volume", "inspect", stack.container("rabbitmq"))
    assert stack.secrets.exists()
    logs = stack.vars["fluentd_log_dir"]
    assert "subscriber" in stack.run("ls %s", logs)

    result = stack.playbook("clean")
    assert result.returncode == 0, result.stdout[-3000:]
    label = f"label=message-broker-stack={stack.name}"
    for kind in ["ps", "--all"], ["volume", "ls"], ["network", "ls"]:
        assert stack.docker(*kind, "--quiet", "--filter", label) == "", kind
    ours = f"label=message-broker-stack.image={stack.name}"
    assert stack.docker(
        "images", "--filter", ours, "--format", "{{.Repository}}:{{.Tag}}"
    ).split() == [borrowed]
    assert stack.docker("ps", "--format", "{{.Names}}").split() == ["foreign"]
    assert "foreign" in stack.docker("volume", "ls", "--quiet").split()
    assert "foreign" in stack.docker("images", "--format", "{{.Repository}}").split()
    assert not stack.secrets.exists()
    assert stack.host.run("ls -d %s /etc/tmpfiles.d/message-broker-stack*", logs).stdout == ""
    assert stack.run("ls /etc/message-broker-stack /var/lib/message-broker-stack").split() == [
        "/etc/message-broker-stack:",
        "/var/lib/message-broker-stack:",
    ]
