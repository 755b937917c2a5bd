"""What the README promises, on a machine that has nothing but git, make and Python.

The machine is a container of Debian without an engine; PID 1 is not systemd. It is one of the less
usual ones: nobody may read what is made there (umask 077), the project lies in a folder with a
space that everybody may write to, and its engine logs to Fluentd unless it is told otherwise.
The steps build on each other, in the order of this file. KEEP=1 leaves the machine for a look.
"""

import json
import os
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from readme import commands, follow, walkthrough

ROOT = Path(__file__).parents[2]
PROJECT = "/root/a project"
UMASK = "umask 077"
DAEMON = {"log-driver": "fluentd"}
PLAYBOOK = "ANSIBLE_CONFIG=ansible.cfg LC_ALL=C.UTF-8 .venv/bin/ansible-playbook"
CHECK = f"{PLAYBOOK} --check --diff playbooks/site.yml"
PULLED = ("debian:", "rabbitmq:", "prom/", "fluent/")
SERVICES = yaml.safe_load((ROOT / "roles/stack/vars/main.yml").read_text())["stack_catalogue"]
# There only where the stack is guarded.
del SERVICES["front"]

# Where HTTPS leads through a private authority or a proxy, the machine is told as its host was.
NAMES = "PIP_CERT SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE http_proxy https_proxy no_proxy"
PASSED = [
    name
    for lower in NAMES.split()
    for name in {lower: None, lower.upper(): None}
    if name in os.environ
]


class Machine:
    """A container that stands for a machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken = ""
        self.as_made = self.differences()

    def run(self, command: str, timeout: int = 60) -> str:
        """Return the stdout of command; a failure, or timeout seconds, shows its last 60 lines."""
        done = self.attempt(command, timeout)
        if done.returncode != 0:
            self.broken = command
            lines = (done.stdout + done.stderr).splitlines()[-60:]
            why = (
                f"took more than {timeout} s"
                if done.returncode == 124
                else f"ended with {done.returncode}"
            )
            pytest.fail("\n".join([f"`{command}` {why}:", *lines]), pytrace=False)
        return done.stdout

    def attempt(self, command: str, timeout: int = 60) -> subprocess.CompletedProcess[str]:
        """Run command in the project's folder; the limit is inside, where it ends children too."""
        inside = ["timeout", "--kill-after=5", str(timeout), "bash", "-c"]
        return subprocess.run(
            ["docker", "exec", "--workdir", PROJECT, self.name, *inside, f"{UMASK}; {command}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout + 30,
        )

    def changes(self) -> set[str]:
        """Return what has changed outside the project's folder since the machine was made."""
        return self.differences() - self.as_made

    def differences(self) -> set[str]:
        """Return the paths that differ from the image, without the project's and temporary ones."""
        listed = host("docker", "diff", self.name).splitlines()
        ours = (PROJECT, "/root/.ansible", "/root/.cache", "/tmp/")
        return {line for line in listed if not line[2:].startswith(ours)}


def host(*command: str, stdin: bytes | None = None, timeout: int = 120) -> str:
    """Return the stdout of command on the machine's host; a failure shows its last 60 lines."""
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()[-60:]
        pytest.fail(
            "\n".join([f"`{' '.join(command)}` ended with {done.returncode}:", *lines]),
            pytrace=False,
        )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def machine(images: dict[str, str]) -> Iterator[Machine]:
    name = f"broker-bare-{secrets.token_hex(3)}"
    # fmt: off
    host(
        "docker", "run", "--detach", "--name", name, "--label", "message-broker-stack=broker-bare",
        "--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw",
        # All that --privileged gives and an engine needs; some hosts refuse --privileged itself.
        "--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE", "--device-cgroup-rule", "a *:* rwm",
        "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
        "--security-opt", "systempaths=unconfined",
        "--tmpfs", "/run", "--volume", "/var/lib/docker",
        "--volume", "/etc/ssl/certs:/etc/ssl/certs:ro",
        *(f"--env={variable}" for variable in PASSED),
        images["bare"],
        # The shell reaps what loses its parent, as an init does.
        "bash", "-c", "trap 'exit 0' TERM; while true; do sleep 3600 & wait $!; done",
    )
    # fmt: on
    try:
        listed = host("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(
            "\0"
        )
        names = "\0".join(path for path in listed if path and (ROOT / path).exists())
        tree = subprocess.run(
            ["tar", "--create", "--null", "--files-from=-"],
            input=names.encode(),
            capture_output=True,
            check=True,
            cwd=ROOT,
        )
        host("docker", "exec", name, "mkdir", PROJECT)
        unpack = ("tar", "--extract", "--no-same-owner", f"--directory={PROJECT}")
        host("docker", "exec", "--interactive", name, *unpack, stdin=tree.stdout)
        host("docker", "exec", name, "chmod", "--recursive", "go=", PROJECT)
        host("docker", "exec", name, "chmod", "o+w", PROJECT)
        daemon = shlex.quote(json.dumps(DAEMON))
        write = f"mkdir /etc/docker && echo {daemon} > /etc/docker/daemon.json"
        host("docker", "exec", name, "bash", "-c", write)
        yield Machine(name)
    finally:
        if os.environ.get("KEEP") != "1":
            host("docker", "rm", "--force", "--volumes", name)


@pytest.fixture(autouse=True)
def _earlier_steps(machine: Machine) -> None:
    if machine.broken:
        pytest.fail(f"builds on `{machine.broken}`, which failed", pytrace=False)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints at once, also when the test succeeds."""

    def print_now(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_now


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """Return how long each command took."""
    return {}


def timed(machine: Machine, seconds: dict[str, float], key: str, command: str, timeout: int) -> str:
    start = time.monotonic()
    output = machine.run(command, timeout)
    seconds[key] = time.monotonic() - start
    return output


def table(output: str) -> dict[str, str]:
    """Return the lines of the last task's table by the service they begin with."""
    shown = output.rpartition("TASK [")[2]
    lines = [line.split() for line in shown.splitlines()]
    return {line[0]: " ".join(line) for line in lines if len(line) > 2}


def recap(output: str) -> list[dict[str, int]]:
    """Return the counters that Ansible's last recap shows, one for each host."""
    lines = output.rpartition("PLAY RECAP")[2].splitlines()
    counted = [re.findall(r"(\w+)=(\d+)", line) for line in lines]
    return [{name: int(number) for name, number in line} for line in counted if line]


def test_the_machine_is_bare(machine: Machine) -> None:
    assert machine.attempt("command -v dockerd docker curl ansible pip").stdout == ""
    assert machine.run("cat /proc/1/comm").strip() == "bash"
    machine.run("command -v git && command -v make && python3 -m venv --help")


def test_the_tools_are_installed_into_the_project(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    timed(machine, seconds, "venv", "make .venv/.run", 360)
    version = machine.run(".venv/bin/ansible --version").splitlines()[0]
    say(f"make .venv/.run: {seconds['venv']:.0f} s, {version}")
    assert machine.changes() == set()


def test_check_mode_passes_on_an_empty_machine_and_changes_nothing(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    output = timed(machine, seconds, "check", CHECK, 120)
    say(f"--check --diff: {seconds['check']:.0f} s")
    assert [counted["failed"] for counted in recap(output)] == [0]
    assert machine.changes() == set()
    assert machine.attempt("command -v dockerd").stdout == ""


# Holds what locks the packages until an apt-get has waited for it; says so, and goes.
HOLD = """
import fcntl, pathlib, time
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
def waits(process):
    try:
        return b"apt-get\\0install" in (process / "cmdline").read_bytes()
    except OSError:
        return False
while not any(waits(process) for process in pathlib.Path("/proc").glob("[0-9]*")):
    time.sleep(0.1)
time.sleep(3)
"""


def test_make_up_brings_the_stack_up_from_nothing(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    hold = f"timeout 300 python3 -c {shlex.quote(HOLD)}"
    machine.run(f"({hold} > /root/locked 2>&1 &); until [ -s /root/locked ]; do sleep 0.1; done")
    output = timed(machine, seconds, "up", "make up", 600)
    assert re.search(
        r"Waiting for it, at most 600 s: .* held by process \d+ \(python3\)",
        " ".join(output.split()),
    )
    cold = seconds["venv"] + seconds["up"]
    say(f"cold make up: {cold:.0f} s, {seconds['venv']:.0f} of them for the tools")
    shown = table(output)
    for service in SERVICES:
        assert re.search(r" \w+://localhost:\d+ Up ", shown.get(service, "")), output[-2000:]
    assert cold <= 360


def test_the_readme_s_commands_print_what_the_readme_shows(
    machine: Machine, say: Callable[[str], None]
) -> None:
    # The README asks for curl for these commands alone: `make up` has come without it.
    machine.run("apt-get install --yes --no-install-recommends curl", 120)
    steps = [
        (command, expected)
        for command, expected in walkthrough((ROOT / "README.md").read_text())
        if not command.startswith("make")
    ]
    assert steps, "README.md shows no command to try"
    start = time.monotonic()
    for command, expected in steps:
        follow(command, expected, machine.run)
    say(f"{len(steps)} commands of the README: {time.monotonic() - start:.1f} s")


def test_make_up_again_changes_nothing(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    output = timed(machine, seconds, "again", "make up", 180)
    counted = recap(output)
    say(f"second make up: {seconds['again']:.0f} s, {counted}")
    assert [(one["changed"], one["failed"]) for one in counted] == [(0, 0)], output[-4000:]
    assert seconds["again"] <= 90


def test_check_mode_passes_on_the_running_stack(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    counted = recap(timed(machine, seconds, "check again", CHECK, 180))
    say(f"--check --diff beside the stack: {seconds['check again']:.0f} s")
    assert [(one["changed"], one["failed"]) for one in counted] == [(0, 0)]


INVENTORY = {
    "brokers": {
        "hosts": {
            "broker1": {
                "ansible_connection": "local",
                "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            }
        },
        "vars": {
            "stack_secrets_dir": f"{PROJECT}/inventory/.secrets/broker",
            "fluentd_log_dir": "/tmp/file",
            "fluentd_log_limit": "256M",
        },
    }
}


def test_the_collection_installed_elsewhere_finds_the_same_stack(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    galaxy = "LC_ALL=C.UTF-8 .venv/bin/ansible-galaxy collection"
    machine.run(f"{galaxy} build --output-path /root/built", 60)
    install = f"{galaxy} install --offline --no-deps --collections-path /root/installed"
    machine.run(f"{install} /root/built/*.tar.gz", 60)
    inventory = shlex.quote(json.dumps(INVENTORY))
    machine.run(f"mkdir /root/empty && echo {inventory} > /root/empty/inventory.yml")
    command = (
        "cd /root/empty && ANSIBLE_COLLECTIONS_PATH=/root/installed LC_ALL=C.UTF-8"
        f" '{PROJECT}/.venv/bin/ansible-playbook' -i inventory.yml message_broker.stack.site"
    )
    counted = recap(timed(machine, seconds, "collection", command, 180))
    say(f"message_broker.stack.site beside the stack: {seconds['collection']:.0f} s")
    assert [(one["changed"], one["failed"]) for one in counted] == [(0, 0)]


def test_make_status_shows_the_table(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    shown = table(timed(machine, seconds, "status", "make status", 60))
    say(f"make status: {seconds['status']:.0f} s")
    for service in SERVICES:
        assert re.search(r" \w+://localhost:\d+ Up ", shown.get(service, "")), shown


def test_the_stack_at_rest_needs_less_than_600_mib(
    machine: Machine, say: Callable[[str], None]
) -> None:
    used = machine.run("docker stats --no-stream --format '{{.Name}} {{.MemUsage}}'")
    found = re.findall(r"^broker-(\S+) ([\d.]+)([KMG])iB /", used, re.MULTILINE)
    assert {name for name, _, _ in found} == set(SERVICES)
    sizes = {"K": 1 / 1024, "M": 1, "G": 1024}
    total = sum(float(number) * sizes[unit] for _, number, unit in found)
    say(f"memory at rest: {total:.0f} MiB, {used.split()}")
    assert total < 600


def test_make_logs_follows_the_files(machine: Machine) -> None:
    followed = machine.attempt("timeout 2 make logs S=publisher").stdout
    assert "\tpublisher\t{" in followed
    assert "\trabbitmq\t{" not in followed
    assert "\trabbitmq\t{" in machine.attempt("timeout 2 make logs").stdout


OWN_RULE = {"alert": "MyOwn", "expr": "vector(1)", "labels": {"severity": "low"}}
OWN_TARGET = {"job_name": "own", "static_configs": [{"targets": ["fluentd:9880"]}]}
OWN_URL = "/etc/alertmanager/secrets/own_url"
OWN = {
    "rules.yml": {"groups": [{"name": "own", "rules": [OWN_RULE]}]},
    "scrape.yml": {"scrape_configs": [OWN_TARGET]},
    "vars.yml": {
        "monitoring_prometheus_rules": ["../own/rules.yml"],
        "monitoring_prometheus_scrapes": ["../own/s*.yml"],
        "monitoring_alertmanager_receivers": [
            {"name": "own", "webhook_configs": [{"url_file": OWN_URL}]}
        ],
        "monitoring_alertmanager_secrets": {"own_url": "http://fluentd:9880/own.secret"},
        "monitoring_alertmanager_route": {
            "receiver": "own",
            "group_by": ["alertname"],
            "group_wait": "1s",
        },
        "stack_clients": [{"name": "me", "receive": ["takeaway"]}],
    },
}


def starts(machine: Machine) -> dict[str, str]:
    """Return which container it is and when it was started, by service."""
    show = "docker inspect --format '{{.Name}} {{.Id}} {{.State.StartedAt}}' $(docker ps --quiet)"
    lines = [line.partition(" ") for line in machine.run(show).splitlines()]
    return {name.removeprefix("/broker-"): when for name, _, when in lines}


def test_make_down_keeps_all_for_the_next_make_up_which_starts_the_engine_and_takes_own_files(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    for number in range(3):
        machine.run(f"curl --fail --silent --data 'message=kept {number}' localhost:5000/data")
    timed(machine, seconds, "down", "make down", 120)
    assert machine.run("docker ps --all --quiet") == ""
    stop = "pid=$(cat /run/docker.pid) && kill $pid && while [ -d /proc/$pid ]; do sleep 0.1; done"
    machine.run(stop)

    changed = "inventory/.secrets/broker/rabbitmq_publisher"
    old = machine.run(f"cat {changed}").strip()
    machine.run(f"printf changed-by-hand > {changed} && rm -r /tmp/file && mkdir own")
    passwords = machine.run("head --verbose inventory/.secrets/broker/rabbitmq_*")
    for name, content in OWN.items():
        machine.run(f"echo {shlex.quote(json.dumps(content))} > own/{name}")
    # It ends once both doors are connected.
    output = timed(
        machine, seconds, "back", 'make up ARGS="-v --diff --extra-vars=@own/vars.yml"', 180
    )
    say(f"make down: {seconds['down']:.0f} s, make up after it: {seconds['back']:.0f} s")
    assert "Start the engine where no service manager runs" in output
    assert "Install docker.io" not in output
    # It sees what the engine has, although that did not run when it began.
    assert "Start the builds" not in output
    assert "RabbitMQ | Create the volume" not in output
    assert machine.run("head --verbose inventory/.secrets/broker/rabbitmq_*") == passwords
    token = machine.run("cat inventory/.secrets/broker/client_me").strip()
    shown = output + machine.run("docker inspect $(docker ps --quiet)")
    for secret in ("own.secret", "changed-by-hand", token):
        assert secret not in shown

    status = "curl --silent --output /dev/null --write-out '%{http_code}'"
    given = (f"--user me:{token}", f"--header 'Authorization: Bearer {token}'")
    for door, path in ("localhost:5000/", ""), ("localhost:5001/", "receive"):
        assert machine.run(f"{status} {door}{path}") == "401"
        assert machine.run(f"{status} --user me:wrong {door}{path}") == "401"
        assert [machine.run(f"{status} {one} {door}") for one in given] == ["200", "200"]
    log_in = "docker exec broker-rabbitmq rabbitmqctl authenticate_user publisher"
    machine.run(f"{log_in} changed-by-hand")
    assert machine.attempt(f"{log_in} {old}").returncode != 0

    prometheus = "curl --silent localhost:9090/api/v1"
    machine.run(f"until {prometheus}/alerts | grep MyOwn; do sleep 1; done", 60)
    machine.run(f'{prometheus}/targets | grep \'"job":"own"\'')
    machine.run("until ls /tmp/file/rabbitmq.*.log; do sleep 1; done", 60)
    # By hand: Prometheus knew no Alertmanager when it started, and tells again only every minute.
    alert = json.dumps([{"labels": {"alertname": "ByHand"}}])
    header = "--header 'Content-Type: application/json'"
    machine.run(f"curl --fail {header} --data '{alert}' localhost:9093/api/v2/alerts")
    told = "grep --no-messages 'own[.]secret.*ByHand' /tmp/file/other.*.log"
    machine.run(f"until {told}; do sleep 1; done", 60)


def test_the_next_make_up_repairs_what_was_removed_and_takes_back_what_it_is_given_no_more(
    machine: Machine,
) -> None:
    before = starts(machine)
    ctl = "docker exec broker-rabbitmq rabbitmqctl"
    admin = "curl --fail --silent --user admin:$(cat inventory/.secrets/broker/rabbitmq_admin)"
    binding = f"{admin} localhost:15672/api/bindings/%2F/e/takeaway-in/q/takeaway/takeaway"
    machine.run(f"{binding} --request DELETE && {ctl} delete_user subscriber")
    machine.run(f"{ctl} set_policy --priority 2000 foreign '.*' '{{\"max-length\": 9}}'")
    machine.run("docker rm --force broker-rabbitmq")
    run_it = commands((ROOT / "README.md").read_text(), "## Run it")
    assert "\nansible-playbook playbooks/site.yml\n" in run_it
    # Ansible itself passes by the configuration of a folder that others may write to.
    output = machine.run(f"set -e; chmod o-w .\n{run_it}\nchmod o+w .", 180)
    machine.run(f"{ctl} clear_policy foreign")
    assert "(item=users subscriber, permissions subscriber, bindings takeaway)" in output
    assert "takeaway: foreign, takeaway.dead: foreign" in " ".join(output.split())
    machine.run(binding)
    after = starts(machine)
    kept = {name for name in after if after[name] == before[name]}
    assert kept == {"fluentd", "exporter", "publisher", "subscriber"}
    received = [machine.run("curl --fail --silent localhost:5001/receive") for _ in range(4)]
    assert received == ["kept 0\n", "kept 1\n", "kept 2\n", "No message available\n"]
    prometheus = "curl --silent localhost:9090/api/v1"
    alerts = machine.run(f"until {prometheus}/alerts | grep Watchdog; do sleep 1; done", 60)
    assert "MyOwn" not in alerts
    assert '"job":"own"' not in machine.run(f"{prometheus}/targets")
    left = machine.run("find /etc/message-broker-stack -type f")
    assert "/prometheus/rules/broker.yml" in left
    assert not re.search("own_url|/rules.yml|/scrape.yml", left)


def test_make_backup_packs_all_and_lets_the_containers_go_on(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    send = "curl --fail --silent --data-binary @- http://localhost:5000/batch"
    assert json.loads(machine.run(f"seq --format='\"%.0f\"' 1000 | {send}")) == {"sent": 1000}
    containers = "docker ps --all --quiet --no-trunc"
    before = machine.run(containers)
    # What runs is packed when the rest does not.
    machine.run("docker stop broker-alertmanager")
    output = timed(machine, seconds, "backup", "make backup", 120)
    still = re.search(r"stood\s+still\s+for\s+(\d+)\s+s", output)
    assert still, output[-2000:]
    say(f"make backup: {seconds['backup']:.0f} s, the broker stood still for {still[1]} of them")
    assert machine.run(containers) == before
    healthy = machine.run("docker ps --quiet --filter health=healthy").split()
    assert len(healthy) == len(SERVICES) - 1
    for port in (5000, 5001):
        machine.run(f"curl --fail --silent 'http://localhost:{port}/healthz?ready'")
    modes = machine.run("stat --format=%a backups backups/*; ls --almost-all backups /var/tmp")
    assert re.fullmatch(r"700\n600\n/var/tmp:\n\nbackups:\nbroker-broker1-\S+Z[.]tar[.]gz\n", modes)


def test_what_a_killed_backup_leaves_is_nothing_frozen_and_goes_with_the_next(
    machine: Machine,
) -> None:
    # Much to copy, so that the broker stands still for a while.
    volume = machine.run("docker volume inspect --format '{{.Mountpoint}}' broker-prometheus")
    padding = f"{volume.strip()}/padding"
    machine.run(f"head --bytes=2G /dev/urandom > {padding}", 120)
    paused = "docker ps --quiet --filter status=paused"
    machine.run(
        f"(setsid make backup & echo $!) > /root/pid 2>&1;"
        f' until [ "$({paused})" ]; do sleep 0.2; done;'
        " kill -9 -- -$(head --lines=1 /root/pid)",
        90,
    )
    # The program that copies goes on without the run; without it, too, nothing stays frozen.
    copying = (
        "grep --files-with-matches 'copy[.]sh' /proc/[0-9]*/cmdline | cut --delimiter=/ --fields=3"
    )
    machine.run(f"kill -9 $({copying})")
    machine.run(f'until [ -z "$({paused})" ]; do sleep 0.2; done', 10)
    machine.run(f"rm {padding}")
    assert machine.run("ls /var/tmp").startswith("broker-backup.")
    machine.run("until curl --fail --silent 'localhost:5000/healthz?ready'; do sleep 1; done", 30)
    assert "changed" in machine.run("make backup", 120)
    assert machine.run("ls /var/tmp; find backups -type d") == "backups\n"
    machine.run("rm backups/$(ls backups | head --lines=1)")


def test_two_runs_do_not_change_one_stack(machine: Machine) -> None:
    lock = "/run/message-broker-stack-broker.lock"
    machine.run(f"ln --symbolic 'make up by process 1 on elsewhere' {lock}")
    for command in "make up", "make down", "make backup", "make clean":
        done = machine.attempt(command, 60)
        assert done.returncode != 0
        assert "make up by process 1 on elsewhere" in done.stdout + done.stderr
    machine.run(f"rm {lock}")


def test_make_restore_refuses_what_is_no_archive_and_changes_nothing(machine: Machine) -> None:
    # From here on it is a new host, but for the images: to build them again takes minutes.
    machine.run("docker ps --all --quiet | xargs docker rm --force")
    machine.run("docker volume ls --quiet | xargs docker volume rm; docker network rm broker")
    machine.run("mv inventory/.secrets/broker /root/passwords")
    machine.run("rm -r /etc/message-broker-stack /var/lib/message-broker-stack /tmp/file")
    look = (
        "docker ps --all; docker volume ls; docker network ls; "
        "ls --almost-all inventory/.secrets backups /etc /var/lib /var/tmp /tmp"
    )
    as_new = machine.run(look)
    machine.run("head --bytes=-1000 backups/*.gz > /root/cut.tar.gz")
    machine.run("tar --create --gzip --file=/root/foreign.tar.gz README.md")
    for name, said in {"cut": "is cut off", "foreign": "begins with 'README.md'"}.items():
        done = machine.attempt(f"make restore FILE=/root/{name}.tar.gz")
        assert done.returncode != 0
        assert f"/root/{name}.tar.gz" in done.stdout + done.stderr
        assert said in done.stdout + done.stderr
    assert machine.run(look) == as_new


def test_make_restore_brings_a_new_host_what_the_old_one_had(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    archive = machine.run("ls backups/*.tar.gz").strip()
    taken = int(machine.run(f"stat --format=%Y {archive}"))
    output = timed(machine, seconds, "restore", f"make restore FILE={archive}", 360)
    say(f"make restore: {seconds['restore']:.0f} s")
    shown = table(output)
    for service in SERVICES:
        assert re.search(r" \w+://localhost:\d+ Up ", shown.get(service, "")), output[-2000:]

    received = machine.run("curl --fail --silent 'http://localhost:5001/receive?max=1000'")
    bodies = [json.loads(line)["body"] for line in received.splitlines()]
    assert bodies == [str(number) for number in range(1, 1001)]

    machine.run("diff --recursive inventory/.secrets/broker /root/passwords")
    login = "--user admin:$(cat /root/passwords/rabbitmq_admin)"
    policies = machine.run(f"curl --fail --silent {login} http://localhost:15672/api/policies")
    own = {"stack:takeaway", "stack:takeaway.dead"}
    assert {policy["name"] for policy in json.loads(policies)} == own

    # The new host's own Prometheus began after that.
    query = f"query_range?query=up&start={taken - 900}&end={taken - 5}&step=5"
    graph = machine.run(f"curl --fail --silent 'http://localhost:9090/api/v1/{query}'")
    series = json.loads(graph)["data"]["result"]
    up = {one["metric"]["job"] for one in series if ["1"] in [value[1:] for value in one["values"]]}
    assert {"rabbitmq", "publisher"} <= up, up


def test_an_eighth_container_is_its_entry_and_its_files(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    machine.run("git apply tests/bare/echo.patch")
    output = timed(machine, seconds, "eighth", "make up", 240)
    say(f"make up with a container more: {seconds['eighth']:.0f} s")
    assert re.search(r" http://localhost:7000 Up ", table(output).get("echo", "")), output[-2000:]
    assert machine.run("curl --fail --silent --data hello localhost:7000") == "hello"
    machine.run("until grep 'POST / HTTP' /tmp/file/echo.*.log; do sleep 1; done", 30)
    assert "\techo\t{" in machine.attempt("timeout 2 make logs").stdout
    query = "curl --fail --silent localhost:9090/api/v1/query?query=echo_requests_total"
    machine.run(f"until {query} | grep 'echo:7000'; do sleep 1; done", 60)


def test_tls_is_one_variable(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    tls = 'ARGS="-e stack_tls=own"'
    output = timed(machine, seconds, "tls", f"make up {tls}", 300)
    say(f"make up with stack_tls=own: {seconds['tls']:.0f} s")
    shown = table(output)
    for service in ("publisher", "subscriber", "front", "prometheus", "rabbitmq"):
        assert re.search(r" https://localhost:\d+ Up ", shown.get(service, "")), output[-2000:]
    assert re.search(r"TLS +until 20\d\d-\d\d-\d\d", output)
    ask = "curl --fail --silent --cacert inventory/.secrets/broker/tls_ca.pem"
    machine.run(f"{ask} --data message=safe https://localhost:5000/data")
    assert machine.run(f"{ask} https://localhost:5001/receive") == "safe\n"
    people = "--user monitoring:$(cat inventory/.secrets/broker/monitoring)"
    up = f"{ask} {people} 'https://localhost:9090/api/v1/query?query=min(tls_handshake_up)'"
    machine.run(f"until {up} | grep '\"1\"]'; do sleep 1; done", 60)
    assert "BEGIN CERTIFICATE" in machine.run(f"make ca {tls}", 60)


def test_make_clean_removes_all_that_is_the_stack_s_and_nothing_else(
    machine: Machine, seconds: dict[str, float], say: Callable[[str], None]
) -> None:
    # An import carries no label; a mere tag of one of the stack's images would carry the stack's.
    # One of the two has a container, and one has nothing that could protect it.
    for image in ("foreign:used", "foreign:free"):
        machine.run(f"tar --create --files-from=/dev/null | docker import - {image}")
    machine.run("docker volume create foreign")
    machine.run("docker create --name foreign --volume foreign:/data foreign:used none")
    folders = (
        "inventory/.secrets/broker "
        "/etc/message-broker-stack/broker "
        "/var/lib/message-broker-stack/broker "
        "/etc/tmpfiles.d/message-broker-stack-broker.conf "
        "/tmp/file"
    )
    machine.run(f"ls -d {folders}")

    timed(machine, seconds, "clean", "make clean", 120)
    say(f"make clean: {seconds['clean']:.0f} s")

    everything = {
        "containers": ("docker ps --all --format '{{.Names}}'", "foreign"),
        "volumes": ("docker volume ls --format '{{.Name}}'", "foreign"),
        "images": (
            "docker images --format '{{.Repository}}:{{.Tag}}'",
            "foreign:free foreign:used",
        ),
        "networks": ("docker network ls --format '{{.Name}}'", "bridge host none"),
    }
    left = {kind: sorted(machine.run(command).split()) for kind, (command, _) in everything.items()}
    # Official images that were pulled may be somebody else's too: they stay.
    left["images"] = [image for image in left["images"] if not image.startswith(PULLED)]
    assert left == {kind: expected.split() for kind, (_, expected) in everything.items()}
    assert machine.attempt(f"ls -d {folders}").stdout == ""


def test_make_clean_leaves_a_folder_that_the_stack_never_had(machine: Machine) -> None:
    # 999 is the user of many images' data.
    machine.run("install --directory --owner 999 /srv/foreign/data")
    machine.run('make clean ARGS="--extra-vars fluentd_log_dir=/srv/foreign/data"', 120)
    machine.run("ls -d /srv/foreign/data")


def test_make_status_says_what_to_do_where_nothing_runs(machine: Machine) -> None:
    assert "make up" in machine.run("make status", 60).rpartition("TASK [")[2]
