"""Break a running stack while messages go through it, and check that it keeps its promises.

On the Docker host, as root or with sudo that asks for no password:

    python3 tests/chaos.py --messages 100000 --clients 16 --rounds 5
    python3 tests/chaos.py --to '/topics/events/messages?key=order.created=orders,audit'
    python3 tests/chaos.py --hangups 1000

The first kills containers, processes and a worker while clients send and receive. So does the
second, where the clients send to a topic, and every message must arrive in two queues. The third
has clients leave in mid-response. All take every message of the queues, which must be empty before.
What happened is printed, in the last line as JSON; the exit status is 1 when `problems` has any.
"""

import argparse
import json
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

# Seconds that nothing must have arrived before the broker's number of messages is believed: it
# counts the messages of a quorum queue, those unacknowledged included, every 5 seconds.
COUNTED = 7
# Seconds a blow may take to be over, and the queue to be drained.
RECOVERY = 120
DRAIN = 300
# Seconds after a failure that names none. A broker that is away refuses at once: without a pause
# the clients would use up their numbers in one outage.
PAUSE = 0.2
# Seconds a client waits for its answer. A receiver that gave up would itself change the order.
PATIENCE = 30

# How the receivers of a queue ask, one each.
RECEIVE = ("wait=1", "wait=1&max=100", "wait=1&max=100&ack=manual")

# Messages of --hangups, and characters of each. Of a response the subscriber's socket holds 64 KiB
# (the kernel doubles that, and takes one segment more), the client's WINDOW: who leaves with more
# than that unread has left in mid-response. What fits would count as read, and rightly so.
HANGUP_MESSAGES = 100
HANGUP_SIZE = 384 * 1024
WINDOW = 32 * 1024


class Broken(Exception):  # noqa: N818 - no error of this program
    """The stack did not do what the rest of the run needs."""


class Message(NamedTuple):
    """A client's message, as its body begins: `client:number`."""

    client: str
    number: int

    def __str__(self) -> str:
        """Return it as in the body."""
        return f"{self.client}:{self.number}"


class Way(NamedTuple):
    """Where clients send, and the queues in which what they send must arrive."""

    path: str
    queues: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Read `PATH=QUEUE,QUEUE`; the path may have a = in it."""
        path, _, queues = text.rpartition("=")
        return cls(path, tuple(queues.split(",")))


class Delivery(NamedTuple):
    """A message as a receiver got it."""

    message: Message
    redelivered: bool


def read(told: dict[str, Any]) -> Delivery:
    """Return the delivery that an object of GET /receive tells of."""
    client, _, number = told["body"].partition(" ")[0].rpartition(":")
    return Delivery(Message(client, int(number) if number.isdigit() else -1), told["redelivered"])


def check(confirmed: set[Message], tried: set[Message], seen: list[list[Delivery]]) -> list[str]:
    """Return what is wrong with what several receivers saw, each in its own order.

    confirmed are the messages with a 201, tried are all. Every confirmed one must have arrived,
    and at most one delivery of a message may lack the mark redelivered, by whomever it was seen.

    Order is checked within what one receiver saw, per client: the subscriber hands out in the
    queue's order, and a receiver asks again only after it read its last answer, so what it sees
    must rise. Of two answers to two receivers nobody outside knows which was handed out first.
    Left out are redeliveries, which go before all that was still to come, and messages without a
    201: the broker may find one in the socket of a worker that is gone after it took the client's
    next one from another worker.
    """
    everything = list(chain.from_iterable(seen))
    arrived = {delivery.message for delivery in everything}
    unmarked = Counter(each.message for each in everything if not each.redelivered)
    swapped = []
    for receiver, deliveries in enumerate(seen):
        last: dict[str, int] = {}
        for message, redelivered in deliveries:
            if redelivered or message not in confirmed:
                continue
            before = last.get(message.client, -1)
            if message.number < before:
                swapped.append(f"{message} after {before} (receiver {receiver})")
            last[message.client] = max(before, message.number)
    return [
        *named("lost", sorted(confirmed - arrived)),
        *named("out of order", swapped),
        *named("twice without redelivered", (m for m, times in unmarked.items() if times > 1)),
        *named("never sent", sorted(arrived - tried)),
    ]


def named(what: str, cases: Iterable[object]) -> list[str]:
    """Return one line with the number of cases and the first of them, or none."""
    found = [str(case) for case in cases]
    more = " …" if len(found) > 20 else ""
    return [f"{len(found)} {what}: {', '.join(found[:20])}{more}"] if found else []


def connect(url: str) -> HTTPConnection:
    """Return a connection to url's host that opens when used, and again after its close()."""
    parts = urlsplit(url)
    return HTTPConnection(str(parts.hostname), parts.port, timeout=PATIENCE)


def say(text: str) -> None:
    """Print text at once."""
    print(text, flush=True)


def wait_until(true: Callable[[], object], timeout: float, promise: str) -> None:
    """Ask until it is true; Broken after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            raise Broken(f"not within {timeout} s: {promise}")
        time.sleep(0.1)


class Stack:
    """The containers of one stack on this host, and how each is broken.

    What breaks one returns a function that tells whether it runs again.
    """

    def __init__(self, name: str, publisher: str, subscriber: str, queues: set[str]) -> None:
        """Raise Broken unless the containers are the stack's own."""
        self.name, self.publisher, self.subscriber = name, publisher, subscriber
        self.queues = queues
        label = '{{index .Config.Labels "message-broker-stack"}}'
        for service in "rabbitmq", "publisher", "subscriber":
            if self.inspect(service, label) != name:
                raise Broken(f"The container {name}-{service} is not of the stack {name}.")

    def inspect(self, service: str, template: str) -> str:
        """Return what docker inspect says of a service's container."""
        return docker("inspect", "--format", template, f"{self.name}-{service}")

    def pid(self, service: str) -> int:
        """Return the host's number of the container's main process; 0 while it has none."""
        return int(self.inspect(service, "{{.State.Pid}}"))

    def workers(self) -> set[int]:
        """Return the publisher's worker processes; none when one ends just now."""
        return children(self.pid("publisher"))

    def ready(self) -> bool:
        """Return whether both doors reach the broker."""
        return all(
            self.ask(url, "/healthz?ready")[0] == 200 for url in (self.publisher, self.subscriber)
        )

    def ask(self, url: str, path: str) -> tuple[int, bytes]:
        """Return status (0: no answer) and body of one GET, by a connection of its own."""
        connection = connect(url)
        try:
            connection.request("GET", path, headers={"Accept": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    def depth(self) -> int:
        """Return how many messages the broker last counted, unacknowledged ones included."""
        ask = ("rabbitmqctl", "--quiet", "--formatter", "json", "list_queues", "name", "messages")
        queues = json.loads(docker("exec", f"{self.name}-rabbitmq", *ask))
        return sum(queue["messages"] for queue in queues if queue["name"] in self.queues)

    def dead(self) -> list[str]:
        """Return what is wrong with the dead queues, which must be empty.

        No blow returns a message as often as the delivery limit.
        """
        problems = []
        for queue in sorted(self.queues):
            status, body = self.ask(self.subscriber, f"/queues/{queue}/dead?max=10")
            if status == 200:
                bodies = [json.loads(line)["body"][:40] for line in body.splitlines()]
                problems += named(f"or more in {queue}.dead", bodies)
            elif status != 204:
                problems.append(f"GET /queues/{queue}/dead is {status}: {body[:200]!r}")
        return problems

    def restart_broker(self) -> Callable[[], bool]:
        """Restart the broker in good order."""
        docker("restart", f"{self.name}-rabbitmq")
        return lambda: True

    def kill(self, service: str) -> Callable[[], bool]:
        """Kill a container's main process.

        From the host: docker kill counts as a manual stop, after which nothing restarts.
        """
        killed = self.pid(service)
        kill(killed)
        return lambda: self.pid(service) not in (0, killed)

    def kill_worker(self) -> Callable[[], bool]:
        """Kill one of the publisher's workers."""
        wait_until(self.workers, RECOVERY, "the publisher has worker processes")
        before = self.workers()
        killed = random.choice(sorted(before))
        kill(killed)

        def over() -> bool:
            after = self.workers()
            return killed not in after and len(after) >= len(before)

        return over


BLOWS: dict[str, Callable[[Stack], Callable[[], bool]]] = {
    "broker restarted": Stack.restart_broker,
    "broker killed": lambda stack: stack.kill("rabbitmq"),
    "publisher killed": lambda stack: stack.kill("publisher"),
    "subscriber killed": lambda stack: stack.kill("subscriber"),
    "worker killed": Stack.kill_worker,
}


def docker(*args: str) -> str:
    """Return what a docker command printed; Broken with its error when it failed."""
    done = subprocess.run(["docker", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Broken(f"docker {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def children(pid: int) -> set[int]:
    """Return the processes that a process started; none when one ends just now."""
    try:
        files = [file.read_text() for file in Path("/proc", str(pid)).glob("task/*/children")]
    except OSError:
        return set()
    return {int(child) for child in chain.from_iterable(file.split() for file in files)}


def kill(pid: int) -> None:
    """Kill a process of a container, which belongs to another user."""
    if os.geteuid() == 0:
        os.kill(pid, signal.SIGKILL)
    else:
        subprocess.run(["sudo", "--non-interactive", "kill", "-9", str(pid)], check=True)


class Gate:
    """Numbers for the clients' messages, up to a limit that the blows move.

    So every blow meets the load: none is sent past the share of a blow that is not over.
    """

    def __init__(self, total: int) -> None:
        """Let nothing through before limit is set."""
        self.total, self.limit, self.taken = total, 0, 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Wait for one more; False: all are taken."""
        while True:
            with self._lock:
                if self.taken < self.limit:
                    self.taken += 1
                    return True
                if self.taken >= self.total:
                    return False
            time.sleep(0.02)


class Sender(threading.Thread):
    """A client that sends its numbers in order, each once, whatever comes of it."""

    def __init__(self, client: str, url: str, way: Way, gate: Gate) -> None:
        """Send to way, a form to /data and bytes to others, as many as gate gives."""
        super().__init__(daemon=True)
        self.client, self.way, self.gate = client, way, gate
        self.connection = connect(url)
        self.tried: list[Message] = []
        self.confirmed: list[Message] = []
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        """Send until the gate has no more."""
        while self.gate.take():
            message = Message(self.client, len(self.tried))
            self.tried.append(message)
            try:
                self.send(message)
            except (OSError, HTTPException):
                self.connection.close()
                self.answers["none"] += 1
                time.sleep(PAUSE)

    def send(self, message: Message) -> None:
        """Send message over the connection; one without a 201 is never sent again."""
        body = str(message)
        if self.way.path == "/data":
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            body = urlencode({"message": body})
        else:
            headers = {"Content-Type": "text/plain", "Message-Id": body}
        self.connection.request("POST", self.way.path, body.encode(), headers)
        response = self.connection.getresponse()
        response.read()
        self.answers[str(response.status)] += 1
        if response.status == 201:
            self.confirmed.append(message)
        else:
            time.sleep(float(response.headers.get("Retry-After", PAUSE)))


class Receiver(threading.Thread):
    """A client that receives until it is told to stop."""

    def __init__(self, url: str, queue: str, query: str) -> None:
        """Receive from queue as query says, and acknowledge where it says ack=manual."""
        super().__init__(daemon=True)
        self.queue, self.query, self.manual = queue, query, "ack=manual" in query
        self.connection = connect(url)
        self.seen: list[Delivery] = []
        self.answers: Counter[str] = Counter()
        self.last = time.monotonic()
        self.over = threading.Event()

    def run(self) -> None:
        """Receive; what arrived of a response that was cut counts, as it was seen."""
        while not self.over.is_set():
            try:
                self.receive()
            except (OSError, HTTPException, json.JSONDecodeError):
                self.connection.close()
                self.answers["cut"] += 1
                time.sleep(PAUSE)

    def receive(self) -> None:
        """Ask once."""
        path = f"/queues/{self.queue}/messages?{self.query}"
        self.connection.request("GET", path, headers={"Accept": "application/json"})
        response = self.connection.getresponse()
        self.answers[str(response.status)] += 1
        receipts = []
        if response.status == 200:
            for line in response:
                told = json.loads(line)
                self.seen.append(read(told))
                self.last = time.monotonic()
                receipts.append(told.get("receipt"))
        response.read()
        if self.manual and receipts:
            self.acknowledge(receipts)
        elif response.status not in (200, 204):
            time.sleep(float(response.headers.get("Retry-After", PAUSE)))

    def acknowledge(self, receipts: list[str]) -> None:
        """Acknowledge; what this fails for comes again, as redelivered."""
        body = json.dumps({"receipts": receipts}).encode()
        path = f"/queues/{self.queue}/ack"
        self.connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        response.read()
        self.answers[f"ack {response.status}"] += 1


def drain(stack: Stack, receivers: list[Receiver]) -> None:
    """Wait until the receivers have everything, and stop them; Broken when something stays."""

    def empty() -> bool:
        quiet = time.monotonic() - max(receiver.last for receiver in receivers)
        return quiet > COUNTED and stack.depth() == 0

    wait_until(empty, DRAIN, "the queues are drained and nothing is unacknowledged")
    for receiver in receivers:
        receiver.over.set()
        receiver.join()


def strike(stack: Stack, gate: Gate, point: int, name: str) -> float:
    """Do the blow called name once point numbers were taken; the seconds until all is well."""
    wait_until(lambda: gate.taken >= point, DRAIN, f"the clients came to message {point}")
    start = time.monotonic()
    over = BLOWS[name](stack)
    wait_until(lambda: over() and stack.ready(), RECOVERY, f"both doors are ready: {name}")
    return time.monotonic() - start


def blows(stack: Stack, gate: Gate, rounds: int) -> list[dict[str, Any]]:
    """Do each blow once a round, in any order, at a random message of its share."""
    plan = [(r + 1, name) for r in range(rounds) for name in random.sample([*BLOWS], len(BLOWS))]
    share = gate.total / max(1, len(plan))
    done = []
    for count, (number, name) in enumerate(plan):
        gate.limit = int((count + 1) * share)
        seconds = strike(stack, gate, int((count + random.uniform(0.1, 0.7)) * share), name)
        say(f"round {number}: {name}, ready {seconds:.1f} s later")
        done.append({"round": number, "blow": name, "seconds": round(seconds, 2)})
    gate.limit = gate.total
    return done


def check_queue(queue: str, senders: list[Sender], receivers: list[Receiver]) -> list[str]:
    """Return what is wrong with what arrived in queue."""
    those = [sender for sender in senders if queue in sender.way.queues]
    confirmed = {message for sender in those for message in sender.confirmed}
    tried = {message for sender in those for message in sender.tried}
    seen = [receiver.seen for receiver in receivers if receiver.queue == queue]
    return [f"{queue}: {problem}" for problem in check(confirmed, tried, seen)]


def chaos(
    stack: Stack, ways: list[Way], messages: int, clients: int, rounds: int
) -> dict[str, Any]:
    """Send messages by ways while blows fall; what came of it."""
    run = secrets.token_hex(3)
    gate = Gate(messages)
    senders = [
        Sender(f"{run}-{number}", stack.publisher, ways[number % len(ways)], gate)
        for number in range(clients)
    ]
    receivers = [
        Receiver(stack.subscriber, queue, query)
        for queue in sorted(stack.queues)
        for query in RECEIVE
    ]
    start = time.monotonic()
    for thread in [*senders, *receivers]:
        thread.start()
    recoveries = blows(stack, gate, rounds)
    for sender in senders:
        sender.join()
    seconds = time.monotonic() - start
    drain(stack, receivers)

    confirmed = {message for sender in senders for message in sender.confirmed}
    tried = {message for sender in senders for message in sender.tried}
    seen = [(receiver.queue, delivery) for receiver in receivers for delivery in receiver.seen]
    arrived = {delivery.message for _, delivery in seen}
    posts = sum((sender.answers for sender in senders), Counter())
    return {
        "sent": len(tried),
        "confirmed": len(confirmed),
        "uncertain": len(tried - confirmed),
        "uncertain_arrived": len(arrived & tried - confirmed),
        "arrived": len(arrived),
        "redelivered": sum(delivery.redelivered for _, delivery in seen),
        "duplicates": len(seen) - len({(queue, each.message) for queue, each in seen}),
        "seconds": round(seconds, 1),
        "confirmed_per_second": round(len(confirmed) / seconds),
        "recoveries": recoveries,
        "posts": posts,
        "receives": {f"{each.queue}?{each.query}": each.answers for each in receivers},
        "problems": [
            *chain.from_iterable(
                check_queue(queue, senders, receivers) for queue in sorted(stack.queues)
            ),
            *named("unexpected answers to POST", sorted(posts.keys() - {"201", "503", "none"})),
            *stack.dead(),
        ],
    }


def hang_up(address: tuple[str, int], chance: random.Random) -> tuple[str, set[int]]:
    """Ask for messages and leave in mid-response; how, and the numbers that were read whole."""
    path = chance.choice(["/receive", "/receive?max=5"])
    # A lone message must leave more unread than the sockets hold.
    wanted = chance.choice([0, 100, 32 * 1024, 512 * 1024 if "max" in path else 1024])
    reset = chance.random() < 0.5
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += chance.choice(["", "Accept: application/json\r\n"]) + "\r\n"
    data = bytearray()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
        client.settimeout(PATIENCE)
        try:
            client.connect(address)
            client.sendall(head.encode())
            while len(data) < wanted and (chunk := client.recv(wanted - len(data))):
                data += chunk
        except OSError as error:
            return repr(error), set()
        if reset:
            linger = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    status = data[9:12].decode() or "unread"
    return status, {int(number) for number in re.findall(rb"=end(\d+)\.", data)}


def hangups(stack: Stack, count: int, clients: int) -> dict[str, Any]:
    """Let count clients leave in mid-response, then receive what must still be there."""
    run = secrets.token_hex(3)
    put = [Message(run, number) for number in range(HANGUP_MESSAGES)]
    sender = connect(stack.publisher)
    for message in put:
        body = f"{message} {'x' * HANGUP_SIZE}=end{message.number}."
        sender.request("POST", "/messages", body.encode(), {"Content-Type": "text/plain"})
        response = sender.getresponse()
        if response.status != 201:
            raise Broken(f"POST /messages is {response.status}: {response.read()!r}")
        response.read()

    # Not by the published port: on this host that is a proxy of Docker's, which reads on behalf of
    # a client that does not, up to megabytes.
    networks = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
    address = stack.inspect("subscriber", networks).split()[0], 5001
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        chances = [random.Random(random.random()) for _ in range(count)]
        left = list(pool.map(lambda chance: hang_up(address, chance), chances))
    seconds = time.monotonic() - start
    # The last ones' messages are on their way back.
    wait_until(stack.ready, RECOVERY, "both doors are ready")
    time.sleep(3)

    receiver = Receiver(stack.subscriber, min(stack.queues), "wait=1&max=5")
    receiver.start()
    drain(stack, [receiver])
    # Nothing lost its connection to the broker, so order and number hold for all of them.
    seen = [delivery._replace(redelivered=False) for delivery in receiver.seen]
    whole = {Message(run, number) for _, numbers in left for number in numbers}
    received = whole - {delivery.message for delivery in seen}
    statuses = Counter(status for status, _ in left)
    return {
        "hangups": count,
        "answers": statuses,
        "seconds": round(seconds, 1),
        "put": len(put),
        "drained": len(seen),
        "read_whole_by_leavers": len(whole),
        "redelivered": sum(delivery.redelivered for delivery in receiver.seen),
        "problems": [
            *check(set(put) - received, set(put), [seen]),
            *named("unexpected answers", sorted(statuses.keys() - {"200", "204", "unread"})),
            *stack.dead(),
        ],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the options ask, on a stack whose queues are empty."""
    default = [Way(path, (options.queue,)) for path in ("/data", "/messages")]
    ways = options.to or default
    queues = {queue for way in ways for queue in way.queues}
    stack = Stack(options.stack, options.publisher, options.subscriber, queues)
    wait_until(stack.ready, RECOVERY, "both doors are ready")
    wait_until(
        lambda: stack.depth() == 0,
        2 * COUNTED,
        f"{', '.join(sorted(queues))}: empty; receive first what is there, as this would take it",
    )
    if problems := stack.dead():
        raise Broken(f"{problems[0]}; it must be empty before.")
    if options.hangups:
        return hangups(stack, options.hangups, options.clients)
    return chaos(stack, ways, options.messages, options.clients, options.rounds)


def crash(failure: threading.ExceptHookArgs) -> None:
    """End the program with a thread that has a mistake in it: the others would wait for it."""
    sys.__excepthook__(failure.exc_type, failure.exc_value or Exception(), failure.exc_traceback)
    os._exit(2)


def main() -> int:
    """Read the command line, run, and print what came of it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", default="broker")
    parser.add_argument("--publisher", default="http://127.0.0.1:5000")
    parser.add_argument("--subscriber", default="http://127.0.0.1:5001")
    parser.add_argument("--queue", default="takeaway", help="the default queue")
    parser.add_argument(
        "--to",
        type=Way.parse,
        action="append",
        metavar="PATH=QUEUE[,QUEUE]",
        help="where clients send in turn, and where that must arrive; by default to --queue",
    )
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hangups", type=int, metavar="N", help="instead: N clients that leave")
    threading.excepthook = crash
    try:
        result = run(parser.parse_args())
    except Broken as broken:
        result = {"problems": [str(broken)]}
    for name, value in result.items():
        if name not in ("recoveries", "problems"):
            say(f"{name.replace('_', ' ')}: {json.dumps(value)}")
    for problem in result["problems"]:
        say(f"PROBLEM {problem}")
    say(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
