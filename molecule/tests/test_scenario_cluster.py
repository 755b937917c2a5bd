"""Three hosts, one broker: what was confirmed is handed out, whichever host goes."""

import json
import re
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from itertools import pairwise
from typing import Any

import pytest
import testinfra
from conftest import CA, PROJECT, Guarded, eventually, variables

sys.path.append(str(PROJECT / "tests"))
from chaos import Delivery, Message, check, read  # type: ignore[import-not-found]

HOSTS = ("broker1", "broker2", "broker3")
QUEUE = variables()["stack_queue"]
PUBLISHER, SUBSCRIBER = "apps_publisher_port", "apps_subscriber_port"
# Seconds that a client waits for an answer, and after a failure.
PATIENCE, PAUSE = 10, 0.1
# What no chain of iptables has.
WRONG = {("INPUT", "-o"), ("OUTPUT", "-i")}


def outside(*command: str) -> str:
    """Run docker on the machine that carries the hosts."""
    done = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {command}: {done.stderr}"
    return done.stdout.strip()


@dataclass
class Cluster:
    """The hosts by name."""

    hosts: dict[str, Guarded]

    @property
    def first(self) -> Guarded:
        return self.hosts[HOSTS[0]]

    def address(self, host: str) -> str:
        """Return the host's address in the network of all hosts."""
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return outside("inspect", "--format", form, self.machine(host))

    def machine(self, host: str) -> str:
        """Return the container that stands for the host."""
        return str(self.hosts[host].vars["ansible_host"])

    def api(self, path: str) -> Any:
        """Return what the first broker that answers says; None where none does."""
        answers = (host.api(path) for host in self.hosts.values())
        return next((answer.json for answer in answers if answer.status == 200), None)

    def ready(self) -> bool:
        return all(host.ready() for host in self.hosts.values())

    def whole(self) -> bool:
        """Return whether every queue has a member on each host, and all of them run."""
        told = self.api("/queues?columns=name,online")
        return bool(told) and all(len(queue["online"]) == 3 for queue in told)

    def wait_until_whole(self, timeout: float = 120) -> float:
        return eventually(
            lambda: self.ready() and self.whole(), timeout, "all doors and members are there"
        )

    def leader(self) -> str:
        """Return the host whose node leads the queue."""
        told = self.api(f"/queues/%2F/{QUEUE}?columns=leader")
        return str(told["leader"]).removeprefix("rabbit@")


class Client(threading.Thread):
    """Goes from door to door until it is told to stop: to the next one after each failure."""

    def __init__(self, cluster: Cluster, port: str, place: int) -> None:
        """Begin at the door of the host at place."""
        super().__init__(daemon=True)
        number = int(cluster.first.vars[port])
        trust = ssl.create_default_context(
            cadata=(cluster.first.secrets / "tls_ca.pem").read_text()
        )
        self.doors = [
            HTTPSConnection(cluster.address(host), number, timeout=PATIENCE, context=trust)
            for host in HOSTS
        ]
        self.place = place
        self.headers = {
            "Authorization": f"Bearer {cluster.first.token}",
            "Accept": "application/json",
        }
        self.over = threading.Event()
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        while not self.over.is_set():
            door = self.doors[self.place % len(self.doors)]
            try:
                answer = self.ask(door)
            except (OSError, HTTPException, json.JSONDecodeError) as error:
                door.close()
                answer = type(error).__name__
            self.answers[answer] += 1
            if answer not in ("200", "201", "204"):
                self.place += 1
                time.sleep(PAUSE)
        for door in self.doors:
            door.close()

    def ask(self, door: HTTPSConnection) -> str:
        raise NotImplementedError


class Sender(Client):
    """Sends its numbers in order, each once, whatever comes of it."""

    def __init__(self, cluster: Cluster, place: int, name: str) -> None:
        """Send as name."""
        super().__init__(cluster, PUBLISHER, place)
        self.named, self.tried, self.home = name, 0, HOSTS[place % len(HOSTS)]
        self.confirmed: list[Message] = []
        self.times = [time.monotonic()]

    def ask(self, door: HTTPSConnection) -> str:
        message = Message(self.named, self.tried)
        self.tried += 1
        door.request("POST", f"/queues/{QUEUE}/messages", str(message).encode(), self.headers)
        response = door.getresponse()
        response.read()
        if response.status == 201:
            self.confirmed.append(message)
            self.times.append(time.monotonic())
        return str(response.status)

    def run(self) -> None:
        super().run()
        self.times.append(time.monotonic())

    def stall(self) -> float:
        """Return the longest time between two confirmed messages."""
        return max(after - before for before, after in pairwise(self.times))


class Receiver(Client):
    """Receives in bulk, by leases: what a front has taken of an answer is gone with its host."""

    def __init__(self, cluster: Cluster, place: int) -> None:
        """Receive from the queue."""
        super().__init__(cluster, SUBSCRIBER, place)
        self.seen: list[Delivery] = []

    def ask(self, door: HTTPSConnection) -> str:
        ask = f"/queues/{QUEUE}/messages?wait=1&max=100&ack=manual"
        door.request("GET", ask, headers=self.headers)
        response = door.getresponse()
        told = [json.loads(line) for line in response] if response.status == 200 else []
        response.read()
        self.seen += map(read, told)
        if told:
            self.answers["200"] += 1
            receipts = json.dumps({"receipts": [one["receipt"] for one in told]})
            door.request("POST", f"/queues/{QUEUE}/ack", receipts.encode(), self.headers)
            response = door.getresponse()
            response.read()
        return str(response.status)


@dataclass
class Load:
    """Clients at every door, and what became of their messages."""

    senders: list[Sender]
    receivers: list[Receiver]

    @property
    def clients(self) -> list[Client]:
        return [*self.senders, *self.receivers]

    def stall(self, without: str = "") -> float:
        """Return the longest stall of those that began at the doors of other hosts."""
        return max(sender.stall() for sender in self.senders if sender.home != without)

    def told(self) -> str:
        """Return what happened, in a line."""
        stalls = ", ".join(f"{sender.home} {sender.stall():.1f} s" for sender in self.senders)
        answers = sum((client.answers for client in self.senders), Counter())
        received = sum((client.answers for client in self.receivers), Counter())
        return f"stalls: {stalls}; sent {dict(answers)}, received {dict(received)}"


@contextmanager
def load(cluster: Cluster, what: str) -> Iterator[Load]:
    """Send and receive at every door meanwhile; every confirmed message arrives, in order."""
    senders = [Sender(cluster, place, f"c{place}") for place in range(6)]
    clients = Load(senders, [Receiver(cluster, place) for place in range(3)])
    for client in clients.clients:
        client.start()
    time.sleep(3)
    try:
        yield clients
        time.sleep(3)
    finally:
        for sender in senders:
            sender.over.set()
        for sender in senders:
            sender.join(2 * PATIENCE)
        print(f"\n{what}: {clients.told()}")
        eventually(lambda: empty(cluster), 60, "all is received")
        for receiver in clients.receivers:
            receiver.over.set()
        for receiver in clients.receivers:
            receiver.join(2 * PATIENCE)
    confirmed = {message for sender in senders for message in sender.confirmed}
    tried = {Message(one.named, number) for one in senders for number in range(one.tried)}
    assert len(confirmed) > 100
    assert check(confirmed, tried, [receiver.seen for receiver in clients.receivers]) == []


def empty(cluster: Cluster) -> bool:
    """Return whether the broker counts no message; its count is up to ten seconds old."""
    for _ in range(2):
        told = cluster.api(f"/queues/%2F/{QUEUE}?columns=messages")
        if told is None or told.get("messages") != 0:
            return False
        time.sleep(6)
    return True


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    hosts = {}
    for name in HOSTS:
        told = variables(name)
        host = Guarded(testinfra.get_host(f"docker://{told['ansible_host']}"), told)
        host.run("echo %s > %s", (host.secrets / "tls_ca.pem").read_text(), CA)
        hosts[name] = host
    return Cluster(hosts)


@pytest.fixture(autouse=True)
def _whole(cluster: Cluster) -> None:
    cluster.wait_until_whole()


def test_what_a_single_host_had_is_there(cluster: Cluster) -> None:
    bodies = []
    for place in range(20):
        door = cluster.hosts[HOSTS[place % 3]]
        got = door.http(SUBSCRIBER, "/queues/audit/messages?max=1000&wait=2")
        bodies += [json.loads(line)["body"] for line in got.text.splitlines()]
        if len(bodies) == 10000:
            break
    assert bodies == [str(number) for number in range(1, 10001)]


def test_a_message_that_came_in_at_one_host_goes_out_at_another(cluster: Cluster) -> None:
    for place, name in enumerate(HOSTS):
        sent = cluster.hosts[name].http(PUBLISHER, "/data", "--data", f"message=by {name}")
        assert sent.status == 201, sent.text
        other = cluster.hosts[HOSTS[(place + 1) % 3]].http(SUBSCRIBER, "/receive")
        assert (other.status, other.text) == (200, f"by {name}\n")


def leased(host: Guarded) -> str:
    """Return the receipt of a message that comes in and is leased at this host's doors."""
    assert host.http(PUBLISHER, "/data", "--data", "message=leased").status == 201
    got = host.http(SUBSCRIBER, "/receive?ack=manual&wait=5")
    assert (got.status, got.text) == (200, "leased\n")
    return got.headers["x-receipt"]


def settled(host: Guarded, receipt: str, how: str = "ack") -> int:
    """Return how a host's door answers to a receipt."""
    body = (
        "--header",
        "Content-Type: application/json",
        "--data",
        json.dumps({"receipt": receipt}),
    )
    return host.http(SUBSCRIBER, f"/{how}", *body).status


@pytest.mark.parametrize("owner", HOSTS)
def test_a_receipt_is_good_at_every_door(cluster: Cluster, owner: str) -> None:
    for other in set(HOSTS) - {owner}:
        receipt = leased(cluster.hosts[owner])
        assert settled(cluster.hosts[other], receipt, "extend") == 200
        assert settled(cluster.hosts[other], receipt) == 200
        assert settled(cluster.hosts[owner], receipt) == 410
    assert cluster.first.http(SUBSCRIBER, "/receive").text == "No message available\n"


def test_a_receipt_of_a_door_that_was_killed_is_gone_and_its_message_comes_again(
    cluster: Cluster,
) -> None:
    owner, other = cluster.hosts["broker2"], cluster.hosts["broker3"]
    receipt = leased(owner)
    pid = owner.docker("inspect", "--format", "{{.State.Pid}}", owner.container("subscriber"))
    owner.run("kill -9 %s", pid.strip())
    eventually(lambda: settled(other, receipt) == 410, 60, "the receipt is gone")
    assert other.http(SUBSCRIBER, "/receive?wait=10").text == "leased\n"


def test_a_request_is_found_in_the_logs_of_all_hosts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = f"order-{time.time_ns()}"
    more = ("--header", f"X-Request-Id: {order}", "--data", "message=find me")
    assert cluster.hosts["broker3"].http(PUBLISHER, "/data", *more).status == 201
    assert cluster.hosts["broker2"].http(SUBSCRIBER, "/receive?wait=5").text == "find me\n"
    monkeypatch.setenv("FIND", order)

    def way() -> list[tuple[str, str]]:
        """Return host and service of each line."""
        shown = cluster.first.playbook("logs").stdout
        return re.findall(rf"\S+ +(broker\d) +(\w+) .*{order}", shown)

    both = [("broker3", "publisher"), ("broker2", "subscriber")]
    eventually(lambda: way() == both, 60, "both doors' lines are found, in order of time")


def test_a_door_whose_broker_is_away_tells_of_the_queues(cluster: Cluster) -> None:
    host = cluster.hosts["broker2"]
    # With this header its front leaves a request to the host's own door.
    own = ("--header", "X-Stack-Hop: broker2")
    host.docker("stop", host.container("rabbitmq"))
    try:
        told = host.http(SUBSCRIBER, "/queues", *own)
        assert told.status == 200, told.text
        assert QUEUE in [queue["name"] for queue in told.json["queues"]]
        assert host.api("/queues").status == 0, "its broker is away"
    finally:
        host.docker("start", host.container("rabbitmq"))


def test_every_queue_has_a_member_on_each_host(cluster: Cluster) -> None:
    told = cluster.api("/queues?columns=name,type,members")
    assert {queue["type"] for queue in told} == {"quorum"}
    assert {len(queue["members"]) for queue in told} == {3}


def test_a_second_run_changes_nothing(cluster: Cluster) -> None:
    done = cluster.first.playbook("site")
    for name in HOSTS:
        assert re.search(rf"{name} +: ok=\d+ +changed=0 ", done.stdout), done.stdout[-3000:]


def test_the_host_of_the_leader_is_killed(cluster: Cluster) -> None:
    leader = cluster.leader()
    with load(cluster, f"{leader}, which leads, killed") as clients:
        outside("kill", cluster.machine(leader))
        time.sleep(15)
        outside("start", cluster.machine(leader))
        cluster.wait_until_whole()
    assert clients.stall(without=leader) <= 5


def test_the_broker_that_leads_is_frozen(cluster: Cluster) -> None:
    leader = cluster.leader()
    container = cluster.first.container("rabbitmq")
    with load(cluster, f"the broker of {leader}, which leads, frozen") as clients:
        cluster.hosts[leader].docker("pause", container)
        time.sleep(25)
        cluster.hosts[leader].docker("unpause", container)
        cluster.wait_until_whole()
    assert clients.stall() <= 15


def test_a_host_is_cut_off(cluster: Cluster) -> None:
    leader = cluster.leader()
    host = cluster.hosts[leader]
    way = [(chain, side) for chain in ("INPUT", "OUTPUT", "FORWARD") for side in ("-i", "-o")]
    rules = [f"{chain} {side} eth0 -j DROP" for chain, side in way if (chain, side) not in WRONG]
    with load(cluster, f"{leader}, which leads, cut off") as clients:
        host.run("; ".join(f"iptables -I {rule}" for rule in rules))
        time.sleep(20)
        sent = host.http(PUBLISHER, "/queues/audit/messages", "--data", "on the cut side")
        assert sent.status == 503, sent.text
        time.sleep(30)
        host.run("; ".join(f"iptables -D {rule}" for rule in rules))
        cluster.wait_until_whole()
    assert clients.stall(without=leader) <= 15


def test_two_hosts_are_killed(cluster: Cluster) -> None:
    with load(cluster, "two hosts killed") as clients:
        for name in HOSTS[1:]:
            outside("kill", cluster.machine(name))
        time.sleep(10)
        before = len([one for sender in clients.senders for one in sender.confirmed])
        time.sleep(10)
        assert before == len([one for sender in clients.senders for one in sender.confirmed])
        for name in HOSTS[1:]:
            outside("start", cluster.machine(name))
        cluster.wait_until_whole()


def test_every_broker_is_changed_in_turn(cluster: Cluster) -> None:
    with load(cluster, "every broker changed") as clients:
        more = json.dumps({"rabbitmq_disk_free_limit": "1GB"})
        done = cluster.first.playbook("site", "--extra-vars", more)
        assert done.returncode == 0, done.stdout[-3000:]
        cluster.wait_until_whole()
    assert clients.stall() <= 3
