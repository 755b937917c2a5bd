"""Clients at the doors of several hosts, and what becomes of their messages."""

import json
import os
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from itertools import pairwise
from secrets import token_hex

from cluster import QUEUE, Cluster
from conftest import PROJECT, eventually, variables

sys.path.append(str(PROJECT / "tests"))
from chaos import Delivery, Message, check, read  # type: ignore[import-not-found]

PUBLISHER, SUBSCRIBER = "apps_publisher_port", "apps_subscriber_port"
# Seconds after which a message comes again whose answer no client has read.
LEASE = int(variables()["apps_subscriber_lease_seconds"])
# Seconds that a client waits for an answer, where a door needs at most 5; and after it: outages are
# measured, not speed. Beside the playbook, which needs the processor, it waits longer.
PATIENCE, PAUSE, LONG_PAUSE = 6, 0.1, 0.3
# How many send. Half as many receive.
SENDERS = int(os.environ.get("CLIENTS", "6"))


class Client(threading.Thread):
    """Goes from door to door until it is told to stop: to the next one after each failure."""

    pause = PAUSE

    def __init__(self, cluster: Cluster, port: str, place: int, queue: str) -> None:
        """Begin at the door of the host at place."""
        super().__init__(daemon=True)
        number = int(cluster.first.vars[port])
        trust = ssl.create_default_context(
            cadata=(cluster.first.secrets / "tls_ca.pem").read_text()
        )
        self.doors = [
            HTTPSConnection(cluster.address(host), number, timeout=PATIENCE, context=trust)
            for host in cluster.hosts
        ]
        self.place, self.queue = place, queue
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
            time.sleep(self.pause)
        for door in self.doors:
            door.close()

    def ask(self, door: HTTPSConnection) -> str:
        raise NotImplementedError


class Sender(Client):
    """Sends its numbers in order, each once, whatever comes of it."""

    def __init__(self, cluster: Cluster, place: int, queue: str) -> None:
        """Send by a name of its own: what an earlier load left in the queue has another one."""
        super().__init__(cluster, PUBLISHER, place, queue)
        self.named, self.tried = f"{token_hex(4)}-{place}", 0
        self.home = list(cluster.hosts)[place % len(cluster.hosts)]
        self.confirmed: list[Message] = []
        self.times = [time.monotonic()]

    def ask(self, door: HTTPSConnection) -> str:
        message = Message(self.named, self.tried)
        self.tried += 1
        door.request("POST", f"/queues/{self.queue}/messages", str(message).encode(), self.headers)
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

    def __init__(self, cluster: Cluster, place: int, queue: str) -> None:
        """Receive from the queue."""
        super().__init__(cluster, SUBSCRIBER, place, queue)
        self.seen: list[Delivery] = []

    def ask(self, door: HTTPSConnection) -> str:
        ask = f"/queues/{self.queue}/messages?wait=1&max=100&ack=manual"
        door.request("GET", ask, headers=self.headers)
        response = door.getresponse()
        told = [json.loads(line) for line in response] if response.status == 200 else []
        response.read()
        self.seen += map(read, told)
        if told:
            self.answers["200"] += 1
            receipts = json.dumps({"receipts": [one["receipt"] for one in told]})
            door.request("POST", f"/queues/{self.queue}/ack", receipts.encode(), self.headers)
            response = door.getresponse()
            response.read()
        return str(response.status)


class Batches(Client):
    """Sends batches of a thousand messages, as fast as it can."""

    pause = 0.0

    def ask(self, door: HTTPSConnection) -> str:
        body = "".join(f'"{number}"\n' for number in range(1000))
        door.request("POST", f"/queues/{self.queue}/batch", body.encode(), self.headers)
        response = door.getresponse()
        response.read()
        return str(response.status)


@dataclass
class Load:
    """Clients at every door, and what became of their messages."""

    senders: list[Sender]
    receivers: list[Receiver]

    def confirmed(self) -> int:
        """Return how many messages were confirmed so far."""
        return sum(len(sender.confirmed) for sender in self.senders)

    def stall(self, without: str = "") -> float:
        """Return the longest stall of those that began at the doors of other hosts."""
        return max(sender.stall() for sender in self.senders if sender.home != without)

    def stop(self, clients: list[Sender] | list[Receiver]) -> None:
        for client in clients:
            client.over.set()
        for client in clients:
            client.join(2 * PATIENCE)

    def all_received(self) -> bool:
        """Return whether every confirmed message was received."""
        seen = {one.message for receiver in self.receivers for one in receiver.seen}
        return all(seen.issuperset(sender.confirmed) for sender in self.senders)

    def problems(self) -> list[str]:
        """Return what is wrong with what was received, by the words of tests/chaos.py."""
        confirmed = {message for sender in self.senders for message in sender.confirmed}
        tried = {Message(one.named, number) for one in self.senders for number in range(one.tried)}
        named = {sender.named for sender in self.senders}
        seen = [
            [one for one in receiver.seen if one.message.client in named]
            for receiver in self.receivers
        ]
        return list(check(confirmed, tried, seen))

    def told(self) -> str:
        """Return what happened, in a line."""
        stalls = ", ".join(f"{sender.home} {sender.stall():.1f} s" for sender in self.senders)
        answers = sum((client.answers for client in self.senders), Counter())
        received = sum((client.answers for client in self.receivers), Counter())
        return f"stalls: {stalls}; sent {dict(answers)}, received {dict(received)}"


@contextmanager
def load(cluster: Cluster, what: str, queue: str = QUEUE, pause: float = PAUSE) -> Iterator[Load]:
    """Send and receive at every door meanwhile; every confirmed message arrives, in order."""
    senders = [Sender(cluster, place, queue) for place in range(SENDERS)]
    receivers = [Receiver(cluster, place, queue) for place in range(SENDERS // 2)]
    clients = Load(senders, receivers)
    for client in [*senders, *receivers]:
        client.pause = pause
        client.start()
    time.sleep(3)
    try:
        yield clients
        time.sleep(3)
    finally:
        clients.stop(senders)
        print(f"\n{what}: {clients.told()}")
        with suppress(AssertionError):  # problems() says what is missing
            waited = eventually(clients.all_received, LEASE + 30, "all is received")
            print(f"all was received {waited:.1f} s after the last was sent")
        clients.stop(receivers)
    assert clients.confirmed() > 100
    problems = clients.problems()
    assert not problems, problems[:20]


def rate(cluster: Cluster, queue: str = QUEUE, seconds: float = 10) -> float:
    """Return how many messages a second SENDERS clients send in batches of a thousand."""
    clients = [Batches(cluster, PUBLISHER, place, queue) for place in range(SENDERS)]
    for client in clients:
        client.start()
    time.sleep(seconds)
    for client in clients:
        client.over.set()
    for client in clients:
        client.join(2 * PATIENCE)
    answers = sum((client.answers for client in clients), Counter())
    assert answers.keys() == {"201"}, answers
    return answers["201"] * 1000 / seconds
