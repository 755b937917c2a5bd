"""What is refused of three hosts, what is told of them, and what strangers between them learn."""

import json
import re
import socket
import ssl
import struct
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from pathlib import Path

import pytest
from cluster import HOSTS, QUEUE, Cluster, of_hosts, outside
from conftest import Guarded, Stack, eventually
from refusals import port_5999

LAST, SUBSCRIBER = HOSTS[-1], "apps_subscriber_port"

# Gives a host's Python a clock that is half a minute ahead: there is one kernel for all hosts.
AHEAD = """
mkdir --parents /opt/ahead
echo 'import time; now = time.time; time.time = lambda: now() + 30' > /opt/ahead/sitecustomize.py
printf '#!/bin/sh\\nPYTHONPATH=/opt/ahead exec python3 "$@"\\n' > /opt/ahead/python3
chmod +x /opt/ahead/python3
"""

# Records what passes the host's network device until the last of marks does, and prints which of
# them it saw, and how many packets there were.
RECORD = """
import json, pathlib, socket, sys, time
marks, end = [mark.encode() for mark in json.loads(sys.argv[1])], time.monotonic() + 120
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 26) # SO_RCVBUFFORCE
wire.bind(("eth0", 0))
wire.settimeout(5)
pathlib.Path("/run/recording").touch()
seen, count = set(), 0
while marks[-1] not in seen and time.monotonic() < end:
    packet = wire.recv(65536)
    count += 1
    seen |= {mark for mark in marks if mark in packet}
dropped = int.from_bytes(wire.getsockopt(263, 6, 8)[4:], sys.byteorder) # PACKET_STATISTICS
print(json.dumps([sorted(mark.decode() for mark in seen), count, dropped]))
"""


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return of_hosts()


@pytest.fixture(autouse=True)
def _whole(cluster: Cluster) -> None:
    cluster.wait_until_whole()


def starts(cluster: Cluster) -> dict[str, dict[str, str]]:
    return {name: host.starts() for name, host in cluster.hosts.items()}


def refused(cluster: Cluster, *args: str) -> str:
    """Return what the playbook says when it refuses; nothing has changed on any host."""
    before = starts(cluster)
    done = cluster.first.playbook("site", *args)
    assert done.returncode != 0, done.stdout[-3000:]
    assert set(re.findall(r" changed=(\d+) ", done.stdout)) == {"0"}, done.stdout[-3000:]
    assert starts(cluster) == before
    return " ".join(done.stdout.split())


def of_last(tmp_path: Path, **own: str) -> tuple[str, str]:
    """Return what gives the last host variables of its own."""
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"brokers": {"hosts": {LAST: own}}}))
    return "--inventory", str(file)


def test_four_hosts_and_one_that_is_named_twice_or_left_out_are_refused(cluster: Cluster) -> None:
    own = json.dumps({"stack_nodes": [*HOSTS, LAST]})
    said = refused(cluster, "--limit", ",".join(HOSTS[:-1]), "--extra-vars", own)
    assert f"stack_nodes has 4 hosts, [{', '.join(HOSTS)}, {LAST}]; use 1, 3 or 5" in said
    assert f"stack_nodes has {LAST} twice; name each host once." in said
    assert f"{LAST} and {LAST} are in stack_nodes, and not part of this run" in said
    assert "Run without --limit" in said


def test_a_host_that_does_not_answer_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    said = refused(cluster, *of_last(tmp_path, ansible_host="nowhere"))
    assert f"[{LAST}]: UNREACHABLE!" in said


def test_versions_passwords_and_folders_of_secrets_that_differ_are_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    host, folder = cluster.hosts[LAST], str(tmp_path / "secrets")
    file = f"/var/lib/message-broker-stack/{host.name}/rabbitmq.version"
    # The cookie of the brokers lies in the folder of secrets.
    own = of_last(tmp_path, stack_secrets_dir=folder, stack_admin_password="x" * 20)
    recorded = host.run("cat %s", file)
    host.run("echo %s > %s", f"4.2.1 {recorded.partition(' ')[2].strip()}", file)
    try:
        said = refused(cluster, *own)
    finally:
        host.run("echo %s > %s", recorded.strip(), file)
    others = " and ".join(HOSTS[:-1])
    assert re.search(rf"The data of {others} are RabbitMQ 4\.0\.\S+, those of {LAST} 4\.2\.1", said)
    assert f"stack_secrets_dir is {host.secrets} on {others}, {folder} on {LAST};" in said
    assert f"stack_admin_password of {others} differs from that of {LAST};" in said


def test_a_clock_that_is_half_a_minute_ahead_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hosts[LAST].run(AHEAD)
    said = refused(cluster, *of_last(tmp_path, ansible_python_interpreter="/opt/ahead/python3"))
    for other in HOSTS[:-1]:
        assert re.search(rf"The clock of {LAST} is [12]\d s or more ahead of {other}'s", said)
    assert not re.search(rf"The clock of (?!{LAST})", said)


def test_a_port_that_is_taken_on_one_host_is_refused(cluster: Cluster) -> None:
    with port_5999(cluster.hosts[LAST]):
        said = refused(cluster, "--extra-vars", json.dumps({"rabbitmq_amqps_port": 5999}))
    place = rf"failed: \[{LAST}\] \(item=rabbitmq_amqps_port\)"
    assert re.search(rf"{place}.*Port 5999 \(rabbitmq_amqps_port\) on \S+ is already in use", said)


def test_a_stranger_learns_the_node_and_its_port_at_4369_and_no_more(cluster: Cluster) -> None:
    for name in HOSTS:
        address = cluster.address(name)
        names = b"name rabbit at port 25672\n"
        assert epmd(address, b"n") == struct.pack(">I", 4369) + names
        assert epmd(address, b"zrabbit") == b"w\0" + node(25672, b"rabbit")
        # Dump what it knows, end, forget the node, and list a stranger's.
        for ask in (b"d", b"k", b"srabbit", b"x" + node(9999, b"forged")):
            assert epmd(address, ask) == b"", ask
        assert epmd(address, b"n") == struct.pack(">I", 4369) + names


def node(port: int, name: bytes) -> bytes:
    """Return a node as epmd is told of it: port, kind, TCP, versions of the protocol, name."""
    return struct.pack(f">HBBHHH{len(name)}sH", port, 77, 0, 6, 5, len(name), name, 0)


def epmd(address: str, ask: bytes) -> bytes:
    """Return all that Erlang's port mapper answers (erts, distribution protocol)."""
    with socket.create_connection((address, 4369), 5) as line:
        line.sendall(struct.pack(">H", len(ask)) + ask)
        try:
            return b"".join(iter(lambda: line.recv(4096), b""))
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("port", [25672, 9094])
def test_a_stranger_without_a_certificate_is_refused_between_brokers_and_alertmanagers(
    cluster: Cluster, port: int
) -> None:
    # Erlang's own word for it, and that of all others.
    part, why = {
        25672: ("rabbitmq", "SSLV3_ALERT_HANDSHAKE_FAILURE"),
        9094: ("alertmanager", "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    }[port]
    for name in HOSTS:
        address = cluster.address(name)
        assert greeted(address, port) == why
        files = [cluster.first.secrets / f"tls_{name}_{part}{end}.pem" for end in ("", "_key")]
        assert greeted(address, port, *files) == "let in"


def greeted(address: str, port: int, *certificate: Path) -> str:
    """Return how a port ends a TLS connection: "let in" where it keeps it."""
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    if certificate:
        trust.load_cert_chain(*certificate)
    with socket.create_connection((address, port), 5) as line:
        try:
            with trust.wrap_socket(line) as secured:
                # With TLS 1.3, the client is done before its certificate is looked at.
                secured.settimeout(2)
                secured.recv(1)
        except TimeoutError:
            return "let in"
        except ssl.SSLError as error:
            return str(error.reason)
    return "closed"


@contextmanager
def recorded(cluster: Cluster, marks: list[str]) -> Iterator[dict[str, tuple[list[str], int, int]]]:
    """Record at every host until the last of marks is seen; give what RECORD printed, by host."""
    found: dict[str, tuple[list[str], int, int]] = {}
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        ended = {}
        for name, host in cluster.hosts.items():
            host.run("rm -f /run/recording")
            ended[name] = pool.submit(host.python, RECORD, json.dumps(marks))
            eventually(lambda at=host: at.host.file("/run/recording").exists, 10, "it records")
        yield found
        found.update({name: one.result() for name, one in ended.items()})


def secrets(host: Guarded) -> list[str]:
    """Return all that nobody on the way may read: passwords, and as HTTP sends them."""
    texts = {file.name: file.read_text().split()[0] for file in host.secrets.glob("[!t]*")}
    people = {"monitoring": "monitoring", "prometheus": "monitoring_scrape"}
    people |= {name: f"rabbitmq_{name}" for name in ("admin", "publisher", "subscriber", "monitor")}
    basic = [b64encode(f"{user}:{texts[file]}".encode()).decode() for user, file in people.items()]
    assert {"client_shop", "erlang_cookie", "rabbitmq_publisher"} <= texts.keys()
    return [*texts.values(), *basic]


def scraped(cluster: Cluster, since: float) -> bool:
    """Return whether every Prometheus has read all targets since then."""
    oldest = (host.query("min(timestamp(up))") for host in cluster.hosts.values())
    return all(min(one.values()) > since for one in oldest)


def test_nobody_between_the_hosts_reads_a_message_or_a_password(cluster: Cluster) -> None:
    first, second, third = cluster.hosts.values()
    own = first.container("rabbitmq")
    body, end = "words-for-one-reader", "words-for-everybody"
    marks = [body, "Watchdog", *secrets(first), end]
    with recorded(cluster, marks) as found:
        since = time.time()
        assert first.send(body).status == 201
        got = second.http(SUBSCRIBER, "/receive?ack=manual&wait=5")
        assert got.text == f"{body}\n"
        receipt = json.dumps({"receipt": got.headers["x-receipt"]})
        how = ("--header", "Content-Type: application/json", "--data", receipt)
        assert third.http(SUBSCRIBER, "/ack", *how).status == 200
        # Doors without their own broker use another one's, by AMQP.
        first.docker("stop", own)
        try:
            eventually(lambda: first.send(body).status == 201, 30, "another broker takes it")
            assert first.http(SUBSCRIBER, "/receive?wait=5").text == f"{body}\n"
        finally:
            first.docker("start", own)
        eventually(lambda: scraped(cluster, since), 60, "everything was scraped meanwhile")
        # What is not for one reader only is seen: the recorders work.
        for host, other in ((first, HOSTS[1]), (third, HOSTS[0])):
            to = cluster.address(other)
            host.host.run("curl --silent --header %s http://%s:25672/", f"X-End: {end}", to)
    for name, (seen, packets, dropped) in found.items():
        print(f"{name}: {packets} packets, {dropped} of them not looked at")
        assert (seen, dropped) == ([end], 0), name
        assert packets > 1000, name


def test_a_front_that_a_cut_off_run_left_without_its_doors_uses_them_again(
    cluster: Cluster,
) -> None:
    def front(words: str) -> str:
        ask = 'exec 3<>/dev/tcp/127.0.0.1/8406; echo "$0" >&3; cat <&3'
        return host.docker("exec", host.container("front"), "bash", "-c", ask, words)

    def left_out() -> bool:
        servers = front("show stat -1 4 -1")
        return bool(re.search("^any_publisher,own_ready,.*,MAINT,", servers, re.MULTILINE))

    host = cluster.hosts[LAST]
    front("set server any_publisher/own_ready state maint")
    assert left_out()
    done = cluster.first.playbook("site", "--tags", "front")
    assert done.returncode == 0, done.stdout[-3000:]
    assert not left_out()


# Alert, host and status of each alert that a message of Alertmanager tells.
Told = tuple[tuple[str, str, str], ...]


@dataclass
class Sent:
    """What the Alertmanagers of all hosts have sent; who is killed loses the files with it."""

    cluster: Cluster
    _lines: set[tuple[str, str]] = field(default_factory=set)
    _before: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin now."""
        self.look()
        self._before = set(self._lines)

    def look(self, without: str = "") -> list[tuple[str, str, Told]]:
        """Return time, host and alerts of each message since the beginning."""
        for name, host in self.cluster.hosts.items():
            if name != without:
                self._lines |= {(name, line) for line in host.lines("alerts")}
        return sorted(starmap(told_by, self._lines - self._before))

    def tells(self, *what: str, without: str = "") -> bool:
        """Return whether a message tells this alert, host and status."""
        return any(what in alerts for _, _, alerts in self.look(without))


def told_by(host: str, line: str) -> tuple[str, str, Told]:
    """Return time and alerts of a message, by the line that its host has of it."""
    when, _, record = line.split("\t", 2)
    alerts = (
        (alert["labels"]["alertname"], alert["labels"].get("host", ""), alert["status"])
        for alert in json.loads(record)["alerts"]
    )
    return when, host, tuple(sorted(alerts))


def seen_by_all(hosts: Iterable[Stack], alerts: set[str]) -> bool:
    """Return whether the Prometheus of each of hosts has all of alerts, pending or firing."""
    return all(alerts <= host.alerts() for host in hosts)


def test_each_host_that_is_killed_is_told_once_and_so_is_its_return(cluster: Cluster) -> None:
    sent = Sent(cluster)
    # Not sent, as they follow from the host.
    held = {"RabbitMQNodeMissing", "RabbitMQQuorumAtRisk"}
    for name in HOSTS:
        living = [host for other, host in cluster.hosts.items() if other != name]
        outside("kill", cluster.machine(name))
        try:
            down = ("HostDown", name, "firing")
            told = eventually(partial(sent.tells, *down, without=name), 90, "it is told")
            eventually(partial(seen_by_all, living, held), 90, "what is held back is there")
        finally:
            begin = time.monotonic()
            outside("start", cluster.machine(name))
        back = cluster.wait_until_whole()
        up = ("HostDown", name, "resolved")
        eventually(partial(sent.tells, *up), 120, "its return is told")
        ended = time.monotonic() - begin
        print(f"\n{name}: told after {told:.0f} s; back after {back:.0f} s, told at {ended:.0f} s")
    # An Alertmanager that did not know that another one has sent would send 15 s later, or 30.
    time.sleep(32)
    messages = sent.look()
    print(*messages, sep="\n")
    # The Alertmanager of a host that has just come back may tell of that host again.
    told = Counter(alerts for _, by, alerts in messages if by not in {at for _, at, _ in alerts})
    both = {(("HostDown", name, status),): 1 for name in HOSTS for status in ("firing", "resolved")}
    assert told == both


@dataclass
class Drill:
    """Something that goes wrong between hosts, and its cure."""

    alert: str
    cause: Callable[[Cluster], object]
    cure: Callable[[Cluster], object]


def queues(*args: str) -> Callable[[Cluster], object]:
    """Return what runs rabbitmq-queues with args."""
    return lambda cluster: cluster.first.docker(
        "exec", cluster.first.container("rabbitmq"), "rabbitmq-queues", "--quiet", *args
    )


def lead_all(cluster: Cluster) -> None:
    """Have the first host's broker lead all queues."""
    lead = "[rabbit_quorum_queue:transfer_leadership(Q, node()) || Q <- rabbit_amqqueue:list()]."
    broker = cluster.first.container("rabbitmq")
    cluster.first.docker("exec", broker, "rabbitmqctl", "--quiet", "eval", lead)


def gossip(action: str) -> Callable[[Cluster], object]:
    """Return what begins or ends that nothing of port 9094 gets into or out of the last host."""
    rules = (f"iptables {action} FORWARD --protocol tcp --dport 9094 --jump DROP",)
    return lambda cluster: cluster.hosts[LAST].run("; ".join(rules))


DRILLS = [
    Drill(
        "RabbitMQMembersMissing",
        queues("delete_member", QUEUE, f"rabbit@{LAST}"),
        queues("add_member", QUEUE, f"rabbit@{LAST}"),
    ),
    Drill("RabbitMQLeadersUneven", lead_all, queues("rebalance", "quorum")),
    Drill("AlertmanagersApart", gossip("--insert"), gossip("--delete")),
]


def test_what_goes_wrong_between_hosts_is_seen_by_every_prometheus(cluster: Cluster) -> None:
    # Not waited for is how long it must last: minutes.
    def seen_by_none() -> bool:
        return not any(names & host.alerts() for host in hosts)

    hosts, names = cluster.hosts.values(), {drill.alert for drill in DRILLS}
    eventually(seen_by_none, 60, "nothing is wrong yet")
    with ExitStack() as cures:
        for drill in DRILLS:
            drill.cause(cluster)
            cures.callback(drill.cure, cluster)
        eventually(lambda: seen_by_all(hosts, names), 90, "all of it is seen")
    eventually(seen_by_none, 90, "its end is seen")
