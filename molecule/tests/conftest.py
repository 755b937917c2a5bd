"""The disposable host as its users meet it: HTTP, AMQP, Docker, and the playbook that runs it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml

PROJECT = Path(__file__).parents[2]
INVENTORY = Path(os.environ.get("MOLECULE_INVENTORY_FILE", "none")).parent
CATALOGUE = yaml.safe_load((PROJECT / "roles/stack/vars/main.yml").read_text())["stack_catalogue"]
# The front is there only where the stack is guarded.
SERVICES = [name for name in CATALOGUE if name != "front"]

# Where the CA is on a host whose stack is guarded: not in /tmp, which a restart empties. And the
# doors, which ask for a token there.
CA = "/etc/ca.pem"
DOORS = ("apps_publisher_port", "apps_subscriber_port")

# What a run says when the engine that carries the hosts has lost the output of a command, as it
# does now and then on a busy machine. The next run takes up the rest.
LOST = "failed to resolve remote temporary directory"

# Does one thing as one user and prints how it ended.
ATTEMPT = """
import json, sys, pika
user, password, host, port, action, *names = sys.argv[1:]
def outcome():
    credentials = pika.PlainCredentials(user, password)
    parameters = pika.ConnectionParameters(host, int(port), credentials=credentials)
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        if action == "publish":
            channel.confirm_delivery()
            channel.basic_publish(*names, b"hello", mandatory=True)
        elif action == "get":
            channel.basic_get(*names, auto_ack=True)
        elif action == "declare":
            channel.queue_declare(*names, durable=True)
        elif action == "purge":
            channel.queue_purge(*names)
        elif action == "use up": # deliver and give back until the queue is empty
            for count in range(100):
                method, _, body = channel.basic_get(*names)
                if method is None:
                    return count
                channel.basic_reject(method.delivery_tag, requeue=True)
    return "ok"
try:
    print(json.dumps(outcome()))
except pika.exceptions.ChannelClosedByBroker as error:
    print(json.dumps(error.reply_code))
except pika.exceptions.AMQPError as error:
    print(json.dumps(type(error).__name__))
"""


def host_variables(host: str = "broker1") -> dict[str, Any]:
    """Return what the scenario sets for its host."""
    # Of the folder, which all scenarios share, only what is for the groups of this one's hosts.
    groups = ["brokers", "clustered"] if INVENTORY.parent.suffix == ".cluster" else ["brokers"]
    names = [*(f"group_vars/{group}.yml" for group in groups), f"host_vars/{host}.yml"]
    values = [yaml.safe_load((INVENTORY / name).read_text()) for name in names]
    told = {name: value for each in values for name, value in each.items()}
    return {**told, "ansible_host": told["ansible_host"].replace("{{ inventory_hostname }}", host)}


def variables(host: str = "broker1") -> dict[str, Any]:
    """Return every variable as the playbook has it, from the roles' defaults and the inventory."""
    files = PROJECT.glob("roles/*/defaults/**/*.yml")
    values = [yaml.safe_load(file.read_text()) or {} for file in files]
    values.append(host_variables(host))
    return {name: value for each in values for name, value in each.items()}


@dataclass
class Answer:
    """What came back for one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stack:
    """The stack on the disposable host of one scenario."""

    host: Any
    vars: dict[str, Any] = field(default_factory=variables)

    @property
    def name(self) -> str:
        return str(self.vars["stack_name"])

    @property
    def secrets(self) -> Path:
        return INVENTORY / ".secrets" / self.name

    def container(self, service: str) -> str:
        return f"{self.name}-{service}"

    def run(self, command: str, *args: str) -> str:
        """Run command on the host and return its output; it must end with 0."""
        result = self.host.run(command, *args)
        assert result.rc == 0, f"{result.command}\n{result.stdout}\n{result.stderr}"
        return str(result.stdout)

    def docker(self, *args: str) -> str:
        return self.run("docker" + " %s" * len(args), *args)

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", self.container(service)))
        return found[0]

    def python(self, script: str, *args: str) -> Any:
        """Run a Python script on the host and return what it printed as JSON."""
        return json.loads(self.run("python3 -c %s" + " %s" * len(args), script, *args))

    def http(self, port: str, path: str, *curl: str, top: str = "http://127.0.0.1") -> Answer:
        """Ask path of the port that the variable port sets, with more arguments of curl."""
        url = f"{top}:{self.vars[port]}{path}"
        args = ["--silent", "--show-error", "--include", "--max-time", "20", *curl, url]
        result = self.host.run("curl" + " %s" * len(args), *args)
        if result.rc != 0:
            return Answer(0, {}, result.stderr.encode())
        head, _, body = result.stdout_bytes.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return Answer(int(first.split()[1]), headers, body)

    def send(self, message: str) -> Answer:
        return self.http("apps_publisher_port", "/data", "--data-urlencode", f"message={message}")

    def receive(self) -> Answer:
        return self.http("apps_subscriber_port", "/receive")

    def api(self, path: str, user: str = "admin", *curl: str) -> Answer:
        """Ask RabbitMQ's management API as user."""
        password = self.password(user)
        return self.http(
            "rabbitmq_management_port", "/api" + path, "--user", f"{user}:{password}", *curl
        )

    def amqp(self, user: str, action: str, *names: str, password: str | None = None) -> Any:
        """Do one action of ATTEMPT as user; "ok", what it found, or how the broker refused."""
        password = password or self.password(user)
        port = str(self.vars["rabbitmq_amqp_port"])
        return self.python(ATTEMPT, user, password, "127.0.0.1", port, action, *names)

    def watermark(self) -> str:
        """Return the bytes at which the broker usually raises its memory alarm."""
        conf = self.docker("exec", self.container("rabbitmq"), "cat", "/etc/rabbitmq/rabbitmq.conf")
        settings = dict(line.split(" = ") for line in conf.splitlines() if " = " in line)
        return settings["vm_memory_high_watermark.absolute"]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Ask Prometheus for expression now; the values by their labels, as sorted pairs."""
        ask = ("--get", "--data-urlencode", f"query={expression}")
        answer = self.http("monitoring_prometheus_port", "/api/v1/query", *ask)
        assert answer.status == 200, answer.text
        return {
            tuple(sorted(one["metric"].items())): float(one["value"][1])
            for one in answer.json["data"]["result"]
        }

    def alerts(self, *states: str) -> set[str]:
        """Return the names of the alerts that are in one of states, or in any, in Prometheus.

        By its API: what one before a restart wrote is found by queries for five minutes more.
        """
        answer = self.http("monitoring_prometheus_port", "/api/v1/alerts").json
        return {
            alert["labels"]["alertname"]
            for alert in answer["data"]["alerts"]
            if not states or alert["state"] in states
        }

    def firing(self) -> set[str]:
        return self.alerts("firing")

    def targets(self) -> dict[str, dict[str, str]]:
        """Return what Prometheus scrapes, by job."""
        answer = self.http("monitoring_prometheus_port", "/api/v1/targets").json
        return {target["labels"]["job"]: target for target in answer["data"]["activeTargets"]}

    def lines(self, service: str) -> list[str]:
        """Return all lines of a service's log files, without those that wait in a chunk."""
        files = f"{self.vars['fluentd_log_dir']}/{service}.*.log"
        return self.run(f"cat {files} || true").splitlines()

    def password(self, user: str) -> str:
        return (self.secrets / f"rabbitmq_{user}").read_text().strip()

    def ready(self) -> bool:
        doors = ("apps_publisher_port", "apps_subscriber_port")
        return all(self.http(door, "/healthz?ready").status == 200 for door in doors)

    def wait_until_ready(self, timeout: float = 60) -> float:
        """Wait until both doors reach the broker; the seconds it took."""
        return eventually(self.ready, timeout, "both doors are connected to the broker")

    def starts(self) -> dict[str, str]:
        """Return when each container was started, which a container left alone keeps."""
        form = "{{.Name}} {{.Id}} {{.State.StartedAt}}"
        ids = self.docker("ps", "--all", "--quiet").split()
        lines = self.docker("inspect", "--format", form, *ids).splitlines() if ids else []
        told = (line.removeprefix("/").partition(" ") for line in lines)
        return {name: start for name, _, start in told}

    def playbook(
        self, name: str, *args: str, inventory: Path = INVENTORY
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook of the project against this scenario's hosts."""
        for _ in range(2):
            done = subprocess.run(
                ["ansible-playbook", "--inventory", inventory, *args, f"playbooks/{name}.yml"],
                cwd=PROJECT,
                # Molecule has errors shown apart, and colours where nobody sees them.
                env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=1200,
                check=False,
            )
            if LOST not in done.stdout:
                break
        return done


@dataclass
class Guarded(Stack):
    """The stack as others reach it: by TLS, and with credentials."""

    def http(self, port: str, path: str, *curl: str) -> Answer:
        """Ask path of the port that the variable port sets, as who may; curl says more."""
        login = ("--cacert", CA)
        if port in DOORS:
            login += ("--header", f"Authorization: Bearer {self.token}")
        elif port != "rabbitmq_management_port":
            login += ("--user", f"monitoring:{self.secret('monitoring')}")
        return self.ask(port, path, *login, *curl)

    def ask(self, port: str, path: str, *curl: str) -> Answer:
        """Ask by TLS without credentials."""
        return super().http(port, path, *curl, top="https://localhost")

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().split()[0]

    @property
    def token(self) -> str:
        return self.secret("client_shop")


def eventually(check: Callable[[], object], timeout: float, promise: str) -> float:
    """Ask check until it is true, at most timeout seconds; the seconds it took."""
    start = time.monotonic()
    while not check():
        assert time.monotonic() - start < timeout, f"not within {timeout} s: {promise}"
        time.sleep(0.2)
    return time.monotonic() - start


@pytest.fixture(scope="session")
def stack() -> Stack:
    container = variables()["ansible_host"]
    return Stack(testinfra.get_host(f"docker://{container}"))


@pytest.fixture(scope="session")
def refusals(stack: Stack) -> Iterator[Future[dict[str, str]]]:
    """What the preflight says of bad values, collected beside tests that mostly wait."""
    from refusals import collect

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(collect, stack)


@pytest.fixture
def empty_queue(stack: Stack) -> None:
    """Begin with no message, whatever the test before left."""
    stack.wait_until_ready()
    for queue in stack.vars["stack_queue"], stack.vars["stack_queue"] + ".dead":
        assert (
            stack.api(f"/queues/%2F/{queue}/contents", "admin", "--request", "DELETE").status == 204
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Give a failure its evidence: what runs, and each container's last lines."""
    report = yield
    if report.failed and "stack" in getattr(item, "funcargs", {}):
        host = item.funcargs["stack"].host
        report.sections.append(("docker ps", host.run("docker ps --all").stdout))
        for name in host.run("docker ps --all --format '{{.Names}}'").stdout.split():
            logs = host.run("docker logs --tail 15 %s 2>&1", name).stdout
            report.sections.append((f"docker logs {name}", logs))
    return report
