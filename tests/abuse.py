"""Send a running stack what once broke it, and look what others were answered meanwhile.

On the Docker host, as root or with sudo that asks for no password:

    python3 tests/abuse.py
    python3 tests/abuse.py --cases A2,A9 --short

Every case is bounded in number and time. While it lasts, somebody else sends and receives from
another process and, where this host has one, by another address. Afterwards every container must
be as it was, and every confirmed message must arrive once. The queue must be empty before. What
happened is printed, in the last line as JSON; the exit status is 1 when `problems` has any.
"""

import argparse
import json
import multiprocessing
import re
import resource
import secrets
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from chaos import COUNTED, Broken, Stack, children, docker, named, say, wait_until

# Seconds within which somebody else must be answered, waits for it, and rests between two requests.
ANSWERED = 1
PATIENCE = 10
INTERVAL = 0.15
# Seconds a case lasts, the short and the long way; until both doors are ready again afterwards;
# and until what is missing has arrived.
SHORT, LONG = 2, 12
# Seconds at most for what lasts until the queue is empty.
ENOUGH = 20
RECOVERY = 60
DRAIN = 120
# Seconds between two looks at the memory of the containers that are looked at.
LOOK = 0.05
# Marks for the messages of somebody else in one case, more than he can send.
MOST_NAMES = 2_000
LOOKED_AT = ("rabbitmq", "publisher", "subscriber", "fluentd")
# Connections of a crowd that are being opened at a time: more would fill the listener's queue.
OPENING = 500
# What who abuses a door may be told; nothing at all is right, too.
ALLOWED = {200, 201, 204, 400, 408, 413, 429, 431, 503}

MEGABYTE = 1_000_000
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
MARK = re.compile(rb"abuse-[\w-]+")

# Publishes by AMQP, in the publisher's container: the first arguments are the number of the byte
# that fills the bodies and their size, the others how each begins.
AMQP = """
import os, sys, pika
fill, size, *names = sys.argv[1:]
with open(os.environ["RABBITMQ_PASSWORD_FILE"]) as file:
    login = pika.PlainCredentials(os.environ["RABBITMQ_USER"], file.read().strip())
where = pika.ConnectionParameters(os.environ["RABBITMQ_HOST"], credentials=login)
with pika.BlockingConnection(where) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    for name in names:
        body = (name + " ").encode().ljust(int(size), bytes([int(fill)]))
        target = os.environ["RABBITMQ_EXCHANGE"], os.environ["RABBITMQ_QUEUE"]
        channel.basic_publish(*target, body, pika.BasicProperties(delivery_mode=2), mandatory=True)
"""


class Door(NamedTuple):
    """Where a container listens, by its own address, and from which of ours it is asked."""

    address: str
    port: int
    source: str = ""

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float = PATIENCE,
    ) -> "Answer":
        """Return the answer to one request on a connection of its own; status 0 for none."""
        source = (self.source, 0) if self.source else None
        connection = HTTPConnection(self.address, self.port, timeout, source)
        start = time.monotonic()
        try:
            # A door has no name that is its container's address.
            own = {"Host": "localhost", **(headers or {})}
            connection.request(method, path, body or None, own)
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, dict(response.headers), text, time.monotonic() - start)
        except (OSError, HTTPException):
            return Answer(0, {}, b"", time.monotonic() - start)
        finally:
            connection.close()


class Answer(NamedTuple):
    """A whole answer, and the seconds that it took."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    def messages(self) -> list[tuple[str, str]]:
        """Return mark and receipt of each message of a run that it brings."""
        if self.status != 200:
            return []
        if "json" not in self.headers.get("Content-Type", ""):
            told = [(self.body[:200], self.headers.get("X-Receipt", ""))]
        else:
            lines = [json.loads(line) for line in self.body.splitlines()]
            told = [(beginning(line), line.get("receipt", "")) for line in lines if "body" in line]
        marks = [(MARK.match(body), receipt) for body, receipt in told]
        return [(mark[0].decode(), receipt) for mark, receipt in marks if mark]

    def wrong(self) -> str | None:
        """Return what is wrong with this as an answer to who abuses; None if nothing is."""
        if self.status and self.status not in ALLOWED:
            return f"status {self.status}: {self.body[:80]!r}"
        if self.status == 503 and "Retry-After" not in self.headers:
            return "status 503 without Retry-After"
        return None


def beginning(line: dict[str, Any]) -> bytes:
    """Return how the body of a message begins that is told as JSON."""
    body = str(line["body"])[:200]
    return b64decode(body) if line.get("encoding") == "base64" else body.encode()


def parse(data: bytes) -> Answer:
    """Return the answer that data is; status 0 when it has no head, no body when it is cut."""
    head, end, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not end or not re.match(r"HTTP/1\.1 \d{3} ", first):
        return Answer(0, {}, b"")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    whole = headers.get("Content-Length") == str(len(body))
    return Answer(int(first[9:12]), headers, body if whole else b"")


class Ledger:
    """Which messages were sent, which were confirmed, and how often each arrived."""

    def __init__(self) -> None:
        """Begin a run."""
        self.run = f"abuse-{secrets.token_hex(3)}"
        self.count = 0
        self.confirmed: set[str] = set()
        self.seen: Counter[str] = Counter()

    def names(self, count: int) -> list[str]:
        """Return count new marks, with which bodies begin."""
        self.count += count
        return [f"{self.run}-{number}" for number in range(self.count - count, self.count)]

    @property
    def missing(self) -> set[str]:
        """What was confirmed and did not arrive yet."""
        return {mark for mark in self.confirmed if not self.seen[mark]}

    def problems(self) -> list[str]:
        """Return what is wrong with what arrived."""
        twice = [mark for mark, times in self.seen.items() if times > 1]
        return [
            *named("confirmed messages lost", sorted(self.missing)),
            *named("messages twice", sorted(twice)),
        ]


class Container(NamedTuple):
    """A container, with what must not change of it."""

    address: str
    pid: int
    started: str
    restarts: int
    out_of_memory: bool
    kills: int


def containers(name: str) -> dict[str, Container]:
    """Return the containers of the stack called name, by service."""
    label = f"label=message-broker-stack={name}"
    found = {}
    for each in json.loads(docker("inspect", *docker("ps", "-aq", "--filter", label).split())):
        state = each["State"]
        folder = cgroup(state["Pid"])
        found[each["Name"].removeprefix(f"/{name}-")] = Container(
            next(iter(each["NetworkSettings"]["Networks"].values()))["IPAddress"],
            state["Pid"],
            state["StartedAt"],
            each["RestartCount"],
            state["OOMKilled"],
            killed(folder) if folder else 0,
        )
    return found


def changed(before: Mapping[str, Container], after: Mapping[str, Container]) -> list[str]:
    """Return what happened to the containers between two looks."""
    told = []
    for service, old in before.items():
        new = after.get(service)
        if new is None:
            told.append(f"{service} is gone")
        elif new.pid != old.pid or new.started != old.started or new.restarts != old.restarts:
            why = ", killed for memory" if new.out_of_memory else ""
            told.append(f"{service} was restarted ({old.restarts} → {new.restarts}{why})")
        elif new.kills > old.kills:
            told.append(f"{service} had {new.kills - old.kills} processes killed for memory")
    return told


def cgroup(pid: int) -> Path | None:
    """Return the folder with the memory of a process, of cgroup 1 or 2; None if it is hidden."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = {"memory": "/sys/fs/cgroup/memory", "": "/sys/fs/cgroup"}.get(controllers)
            if root and Path(root + path, "memory.stat").exists():
                return Path(root + path)
    return None


def table(path: Path) -> dict[str, int]:
    """Return the numbers of one of a cgroup's files; none when it is not there."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) == 2}


def killed(folder: Path) -> int:
    """Return how many processes of a cgroup were killed for memory."""
    both = table(folder / "memory.oom_control") | table(folder / "memory.events")
    return both.get("oom_kill", 0)


def used(folder: Path) -> int:
    """Return the bytes that a cgroup uses, without files' contents that could be dropped."""
    for name in "memory.usage_in_bytes", "memory.current":
        with suppress(OSError):
            total = int((folder / name).read_text())
            stat = table(folder / "memory.stat")
            old = "total_inactive_file" in stat
            files = ("total_inactive_file", "total_active_file") if old else ()
            return total - sum(
                stat.get(file, 0) for file in files or ("inactive_file", "active_file")
            )
    return 0


def other_address() -> str:
    """Return the address by which this host speaks to others; empty without one.

    From there a door's container sees somebody else than from the address of its own network.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("198.51.100.1", 9))  # sends nothing
        return str(probe.getsockname()[0])
    return ""


class Meanwhile(NamedTuple):
    """What somebody else was answered, and what the containers used."""

    posts: list[tuple[int, float]]
    gets: list[tuple[int, float]]
    confirmed: list[str]
    seen: list[str]
    memory: dict[str, int]
    workers: set[int]

    def problems(self, kills: int = 0, within: float = ANSWERED, alarms: int = 0) -> list[str]:
        """Return what is wrong with the answers, which must come within so many seconds.

        Each of kills may have cost one of them. While one of alarms lasts, a POST is 503.
        """
        told = []
        for name, answers in ("POST", self.posts), ("GET", self.gets):
            slowest = max((seconds for _, seconds in answers), default=0.0)
            if slowest > within:
                told.append(f"a {name} of somebody else took {slowest:.1f} s")
            bad = refused(answers)
            if bad["none"] <= kills:
                del bad["none"]
            if name == "POST" and alarms:
                del bad["503"]
            if bad:
                told.append(f"{name}s of somebody else that were refused: {json.dumps(bad)}")
        return told


def alarms(stack: Stack, since: float) -> int:
    """Return how often the broker raised its memory alarm since then, as its log says."""
    log = docker("logs", "--since", str(since), f"{stack.name}-rabbitmq")
    return log.count("memory resource limit alarm set")


def refused(answers: Iterable[tuple[int, float]]) -> Counter[str]:
    """Return the answers that are not 2xx, counted."""
    return Counter(str(status or "none") for status, _ in answers if not 200 <= status < 300)


class Watch:
    """Somebody else, who sends and receives until stop(), and an eye on the containers.

    In a process of its own, or what the abuse costs this one would count as the doors' slowness.
    """

    def __init__(self, attack: "Attack", case: "Case") -> None:
        """Begin."""
        self.case, self.names = case, attack.ledger.names(MOST_NAMES)
        source = other_address()
        self.publisher = attack.publisher._replace(source=source)
        self.subscriber = attack.subscriber._replace(source=source)
        self.pids = {service: attack.containers[service].pid for service in LOOKED_AT}
        self.result = Meanwhile([], [], [], [], {}, set())
        self.over = threading.Event()
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.run, args=(theirs,), daemon=True)
        self.process.start()

    def stop(self) -> Meanwhile:
        """End and return what was seen."""
        self.pipe.send("stop")
        result: Meanwhile = self.pipe.recv()
        self.process.join()
        return result

    def run(self, pipe: Connection) -> None:
        """Do all of it, in the new process, until the pipe has something."""
        threads = [threading.Thread(target=job) for job in (self.send, self.receive, self.look)]
        for thread in threads:
            thread.start()
        pipe.recv()
        self.over.set()
        for thread in threads:
            thread.join()
        pipe.send(self.result)

    def send(self) -> None:
        """Send a message again and again."""
        while not self.over.wait(INTERVAL):
            name = self.names.pop()
            body = urlencode({"message": f"{name} {'x' * self.case.size}"}).encode()
            answer = self.publisher.ask("POST", "/data", body, FORM)
            self.result.posts.append((answer.status, answer.seconds))
            if answer.status == 201:
                self.result.confirmed.append(name)

    def receive(self) -> None:
        """Receive, or ask for what the case says, again and again."""
        while not self.over.wait(INTERVAL):
            answer = self.subscriber.ask("GET", self.case.asks)
            self.result.gets.append((answer.status, answer.seconds))
            self.result.seen.extend(mark for mark, _ in answer.messages())

    def look(self) -> None:
        """Note the highest memory, and every worker of the publisher that there ever was."""
        folders = {service: cgroup(pid) for service, pid in self.pids.items()}
        memory = self.result.memory
        while not self.over.wait(LOOK):
            self.result.workers.update(children(self.pids["publisher"]))
            for service, folder in folders.items():
                memory[service] = max(memory.get(service, 0), used(folder) if folder else 0)


class Client:
    """One connection of a crowd."""

    def __init__(self, door: Door, first: bytes, window: int) -> None:
        """Begin to connect to door; first is to be sent, window bytes of the answer may wait."""
        self.left = memoryview(first)
        self.data = bytearray()
        # Whether it is connected and has sent all of first.
        self.begun = self.ended = False
        self.socket = socket.socket()
        self.socket.setblocking(False)
        # It ends by a reset: thousands of orderly ends would use up this host's ports.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if window:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.connect_ex((door.address, door.port))

    def send(self, data: bytes | memoryview) -> int:
        """Send what fits of data; how many bytes."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.ended = True
            return 0

    def read(self, most: int = 65536) -> None:
        """Read what is there, at most most bytes."""
        try:
            data = self.socket.recv(most)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.data += data
        self.ended = not data


class Crowd:
    """Many clients that are slow, in one thread."""

    def __init__(
        self, door: Door, count: int, first: bytes, trickle: int = 0, window: int = 0
    ) -> None:
        """Let count clients connect to door and send first; what they are answered is read.

        With a window only that much of it waits unread, and nothing is read before the end. With
        a trickle each client sends, or with a window reads, so many bytes more each second.
        """
        self.door, self.first, self.trickle, self.window = door, first, trickle, window
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200
        if count > room:
            say(f"{room} connections instead of {count}: this process may have no more files")
        self.count = min(count, room)
        self.clients: list[Client] = []
        self.opening = 0
        self.selector = selectors.DefaultSelector()

    def hold(self, seconds: float) -> list[Answer]:
        """Open all, hold them for seconds, and end them; what each was answered.

        Those that cannot be opened or begun are waited for as long again.
        """
        start = dripped = time.monotonic()
        begun = 0.0
        while not begun or time.monotonic() < begun + seconds:
            self.open()
            for key, _ in self.selector.select(0.05):
                self.serve(key.data)
            now = time.monotonic()
            if not begun and (now > start + seconds or self.all_begun()):
                begun = now
            if self.trickle and now > dripped + 1:
                dripped = now
                self.drip()
        self.selector.close()
        for client in self.clients:
            if not client.ended:
                client.read()
            client.socket.close()
        return [parse(bytes(client.data)) for client in self.clients]

    def all_begun(self) -> bool:
        """Return whether every client has sent what it sends first."""
        return len(self.clients) == self.count and not self.opening

    def open(self) -> None:
        """Open some more."""
        while len(self.clients) < self.count and self.opening < OPENING:
            client = Client(self.door, self.first, self.window)
            self.clients.append(client)
            self.opening += 1
            self.selector.register(client.socket, selectors.EVENT_WRITE, client)

    def serve(self, client: Client) -> None:
        """Send or read what client can."""
        if client.begun:
            client.read()
        else:
            client.left = client.left[client.send(client.left) :]
            client.begun = client.ended or not client.left
            self.opening -= client.begun
        if client.ended or (client.begun and self.window):
            self.selector.unregister(client.socket)
        elif client.begun:
            self.selector.modify(client.socket, selectors.EVENT_READ, client)

    def drip(self) -> None:
        """Send or read a little by each."""
        for client in self.clients:
            if client.begun and not client.ended:
                if self.window:
                    client.read(self.trickle)
                elif not client.send(b"x" * self.trickle) and client.ended:
                    self.selector.unregister(client.socket)


class Attack:
    """What the cases do to one stack, and what they are told for it."""

    def __init__(self, stack: Stack, ledger: Ledger, short: bool) -> None:
        """Attack by this host's address in the stack's own network."""
        self.stack, self.ledger, self.short = stack, ledger, short
        self.find()
        self.seconds = SHORT if short else LONG
        self.answers: Counter[str] = Counter()
        self.problems: list[str] = []
        self.receipts: list[str] = []

    def find(self) -> None:
        """Look where the doors are: by their own addresses, as Docker's proxy reads ahead."""
        self.containers = containers(self.stack.name)
        self.publisher = Door(self.containers["publisher"].address, 5000)
        self.subscriber = Door(self.containers["subscriber"].address, 5001)

    def ready(self) -> bool:
        """Return whether both doors reach the broker; a restart may have moved them."""
        self.find()
        doors = self.publisher, self.subscriber
        return all(door.ask("GET", "/healthz?ready").status == 200 for door in doors)

    def workers(self) -> set[int]:
        """Return the publisher's workers, as far as a look has found it."""
        return children(self.containers["publisher"].pid)

    def note(self, answer: Answer) -> Answer:
        """Count an answer, and the messages in it as arrived."""
        self.answers[str(answer.status or "none")] += 1
        if wrong := answer.wrong():
            self.problems.append(f"told to who abuses: {wrong}")
        messages = answer.messages()
        self.ledger.seen.update(mark for mark, _ in messages)
        self.receipts += [receipt for _, receipt in messages if receipt]
        return answer

    def crowd(self, door: Door, count: int, first: str, trickle: int = 0, window: int = 0) -> None:
        """Hold a crowd."""
        crowd = Crowd(door, count, first.encode(), trickle, window)
        for answer in crowd.hold(self.seconds):
            self.note(answer)

    def repeat(self, clients: int, seconds: float, ask: Callable[[], Answer]) -> None:
        """Have clients ask, each at least once, and again and again for seconds."""
        end = time.monotonic() + seconds

        def client(_number: int) -> list[Answer]:
            answers = [ask()]
            while time.monotonic() < end:
                answers.append(ask())
                if not 200 <= answers[-1].status < 300:
                    time.sleep(0.1)
            return answers

        with ThreadPoolExecutor(clients) as pool:
            for answer in [*pool.map(client, range(clients))]:
                for each in answer:
                    self.note(each)

    def put(self, count: int, fill: bytes, size: int = MEGABYTE) -> None:
        """Send count messages that are filled up to size, four at a time."""

        def one(name: str) -> Answer:
            body = f"{name} ".encode().ljust(size, fill)
            return self.publisher.ask("POST", "/messages", body)

        names = self.ledger.names(count)
        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(one, names)]
        confirmed = {
            name for name, answer in zip(names, answers, strict=True) if answer.status == 201
        }
        self.ledger.confirmed |= confirmed
        for answer in answers:
            self.note(answer)

    def publish(self, count: int, fill: bytes, size: int) -> None:
        """Publish count messages by AMQP; Broken when the broker does not confirm them."""
        names = self.ledger.names(count)
        command = [
            "docker",
            "exec",
            "--interactive",
            f"{self.stack.name}-publisher",
            "python3",
            "-",
        ]
        done = subprocess.run(
            [*command, str(fill[0]), str(size), *names],
            input=AMQP,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Broken(f"publishing by AMQP: {done.stderr[-300:]}")
        self.ledger.confirmed.update(names)

    def receive(self, path: str, accept: str = "*/*") -> Answer:
        """Receive, as who abuses."""
        return self.note(self.subscriber.ask("GET", path, headers={"Accept": accept}, timeout=30))

    def settle(self, verb: str, receipts: list[str], **more: Any) -> int:
        """POST to /ack, /extend or /reject; the status."""
        body = json.dumps({"receipts": receipts} | more).encode()
        return self.subscriber.ask("POST", f"/{verb}", body, JSON).status


class Case(NamedTuple):
    """Inputs of one kind."""

    name: str
    sends: str
    attack: Callable[[Attack], None]
    # What must be in the queue before.
    prepare: Callable[[Attack], None] | None = None
    # What is done once the stack was looked at.
    after: Callable[[Attack], None] | None = None
    # Characters of somebody else's messages, and what else he asks for: where the messages must all
    # be there for the case, he takes none.
    size: int = 0
    asks: str = "/receive"
    # Workers of the publisher that the case itself kills.
    kills: int = 0
    # How the queue is emptied afterwards.
    drain: str = "/receive"
    # Whether the short way leaves it out, unless it is asked for.
    long: bool = False

    @property
    def kind(self) -> str:
        """The name of all the cases of its kind."""
        return self.name.partition("-")[0]


def unfinished(path: str, size: int) -> str:
    """Return a request of size bytes whose headers do not end."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Long: ".ljust(size, "x")


def announced(path: str, length: int, sent: int) -> str:
    """Return a request with sent bytes of a body that shall have length."""
    return f"POST {path} HTTP/1.1\r\n{HEAD}Content-Length: {length}\r\n\r\n" + "x" * sent


def fill_and_kill_broker(attack: Attack) -> None:
    """Kill the broker, which has nothing but its log to recover from."""
    over = attack.stack.kill("rabbitmq")
    start, before = time.monotonic(), attack.containers["rabbitmq"].restarts
    wait_until(lambda: over() and attack.ready(), RECOVERY, "the killed broker is back")
    say(f"    the broker was ready {time.monotonic() - start:.1f} s after it was killed")
    if (restarts := attack.containers["rabbitmq"].restarts - before) > 1:
        attack.problems.append(f"the killed broker needed {restarts} starts")


def lease_many(attack: Attack) -> None:
    """Lease 16 messages at a time."""
    end = time.monotonic() + ENOUGH
    while time.monotonic() < end and attack.receive("/receive?max=16&ack=manual").status != 204:
        pass
    say(f"    {len(attack.receipts)} leases")


def receive_many(attack: Attack) -> None:
    """Receive 100 messages at a time."""
    end = time.monotonic() + ENOUGH
    while time.monotonic() < end and attack.receive("/receive?max=100").status != 204:
        pass


def unread_answers(accept: str, clients: int, trickle: int = 0) -> Callable[[Attack], None]:
    """Return a crowd that asks for messages and does not read them."""
    request = f"GET /receive HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
    return lambda attack: attack.crowd(attack.subscriber, clients, request, trickle, window=4096)


def largest_message(attack: Attack) -> None:
    """Ask for a message of NULs as JSON, and look at it in the dead queue."""

    def get(path: str, accept: str) -> Answer:
        attack.publish(1, b"\0", 16 * 1024 * 1024)
        while True:  # what somebody else sent comes before it
            answer = attack.receive(path, accept)
            if answer.status != 200 or len(answer.body) > MEGABYTE:
                return answer

    get("/receive", "application/json")
    leased = get("/receive?ack=manual", "*/*")
    for mark, receipt in leased.messages():
        attack.settle("reject", [receipt], requeue=False)
        attack.receipts.remove(receipt)
        # It is still to come, on its way back from the dead queue.
        del attack.ledger.seen[mark]
    dead = attack.note(attack.subscriber.ask("GET", "/dead", timeout=30))
    attack.ledger.seen.subtract(mark for mark, _ in dead.messages())


def costly_json(attack: Attack) -> None:
    """Send JSON whose objects take many times the memory of its text."""
    lists = b'{"message":[' + b"[0]," * 1_580_000 + b"[0]]}"
    keys = b"{" + b",".join(b'"k%d":0' % number for number in range(400_000)) + b"}"
    bodies = iter([keys, *[lists] * 10_000])
    attack.repeat(
        10, attack.seconds, lambda: attack.publisher.ask("POST", "/data", next(bodies), JSON)
    )


def many_lines(attack: Attack) -> None:
    """Send batches of 10,000 lines."""
    body = b'""\n' * 10_000
    seconds = 0 if attack.short else attack.seconds
    attack.repeat(6, seconds, lambda: attack.publisher.ask("POST", "/batch", body, timeout=30))


def full_tmp(attack: Attack) -> None:
    """Fill the publisher's /tmp, and kill a worker: its successor must live with what is left."""
    inside = "exec", f"{attack.stack.name}-publisher", "sh", "-c"
    docker(*inside, "head -c 100000000 /dev/zero > /tmp/fill || test -s /tmp/fill")
    try:
        over = attack.stack.kill_worker()
        wait_until(over, PATIENCE, "a killed worker is replaced while /tmp is full")
        end = time.monotonic() + attack.seconds
        while time.monotonic() < end:
            if (answer := attack.note(attack.publisher.ask("GET", "/metrics"))).status != 200:
                attack.problems.append(f"GET /metrics is {answer.status} while /tmp is full")
                break
            time.sleep(0.2)
    finally:
        docker(*inside, "rm -f /tmp/fill")


CASES = [
    Case(
        "A2-subscriber",
        "7,600 unfinished headers of 32,000 bytes",
        lambda attack: attack.crowd(attack.subscriber, 7_600, unfinished("/receive", 32_000)),
    ),
    Case(
        "A2-publisher",
        "12,000 unfinished headers of 32,000 bytes",
        lambda attack: attack.crowd(attack.publisher, 12_000, unfinished("/", 32_000)),
        long=True,
    ),
    Case(
        "A2-slow",
        "2,000 headers, one byte a second",
        lambda attack: attack.crowd(attack.subscriber, 2_000, unfinished("/receive", 60), 1),
        long=True,
    ),
    Case(
        "A3-subscriber",
        "5,000 x POST /ack, 65,535 of 65,536 bytes",
        lambda attack: attack.crowd(attack.subscriber, 5_000, announced("/ack", 65_536, 65_535)),
        long=True,
    ),
    Case(
        "A3-publisher",
        "7,000 x POST /messages, 65,535 of 65,536 bytes",
        lambda attack: attack.crowd(
            attack.publisher, 7_000, announced("/messages", 65_536, 65_535)
        ),
    ),
    Case(
        "A3-slow",
        "2,000 bodies, one byte a second",
        lambda attack: attack.crowd(attack.publisher, 2_000, announced("/messages", 65_536, 0), 1),
        long=True,
    ),
    Case(
        "A4",
        "240 messages of 1 MB, /receive?max=16&ack=manual until all are leased",
        lease_many,
        lambda attack: attack.put(240, b"x"),
        long=True,
    ),
    Case(
        "A4-control",
        "60 messages of 1 MB of \\x01, leased likewise",
        lease_many,
        lambda attack: attack.put(60, b"\1"),
        asks="/healthz",
    ),
    Case(
        "A5",
        "28 messages of 16,000,000 bytes, /receive?max=100",
        receive_many,
        lambda attack: attack.publish(28, b"x", 16 * MEGABYTE),
        asks="/healthz",
        long=True,
    ),
    Case(
        "A6",
        "300 x GET /receive of 1 MB, nothing read",
        unread_answers("*/*", 300),
        lambda attack: attack.put(340, b"x"),
        long=True,
    ),
    Case(
        "A6-json",
        "45 x GET /receive of 1 MB of NUL as JSON, nothing read",
        unread_answers("application/json", 45),
        lambda attack: attack.put(60, b"\0"),
    ),
    Case(
        "A6-slow",
        "300 x GET /receive of 1 MB, one byte a second read",
        unread_answers("*/*", 300, 1),
        lambda attack: attack.put(340, b"x"),
        long=True,
    ),
    Case("A7", "16 MiB of NUL, as JSON and from the dead queue", largest_message, asks="/healthz"),
    Case("A8", "10 x POST /data of 6.3 MB of lists, once 400,000 names", costly_json),
    Case(
        "A9-subscriber",
        "8,000 connections that send nothing",
        lambda attack: attack.crowd(attack.subscriber, 8_000, ""),
    ),
    Case(
        "A9-publisher",
        "16,000 connections that send nothing",
        lambda attack: attack.crowd(attack.publisher, 16_000, ""),
        long=True,
    ),
    Case("A10", "6 x POST /batch of 10,000 lines", many_lines, drain="/receive?max=10000"),
    Case(
        "A11",
        "10 x POST /batch that announce 16 MiB; others send 100 kB",
        lambda attack: attack.crowd(attack.publisher, 10, announced("/batch", 16 * 1024 * 1024, 0)),
        size=100_000,
    ),
    Case("A12", "the publisher's /tmp full, a worker killed", full_tmp, kills=1),
    # The last one: a broker that does not come back leaves nothing to try.
    Case(
        "A1",
        "1,500 x 1 MB (short: 100), nobody receives; the broker killed",
        lambda attack: attack.put(100 if attack.short else 1_500, b"x"),
        after=fill_and_kill_broker,
        asks="/healthz",
    ),
]


def lease(attack: Attack) -> list[str]:
    """Take a lease, of a message of our own."""
    attack.put(1, b"x", 100)
    answer = attack.receive("/receive?wait=5&ack=manual")
    if not attack.receipts:
        raise Broken(f"GET /receive?ack=manual is {answer.status}: {answer.body[:200]!r}")
    taken, attack.receipts = attack.receipts, []
    return taken


def drain(attack: Attack, path: str) -> None:
    """Receive until nothing is there and nothing is missing, for DRAIN seconds at most."""
    end = time.monotonic() + DRAIN
    attack.subscriber.ask("POST", "/dead/redrive", timeout=30)
    while time.monotonic() < end:
        answer = attack.subscriber.ask("GET", path, timeout=30)
        attack.ledger.seen.update(mark for mark, _ in answer.messages())
        if answer.status == 204 or answer.body == b"No message available\n":
            if not attack.ledger.missing:
                return
            time.sleep(0.2)


def play(stack: Stack, case: Case, ledger: Ledger, short: bool, within: float) -> dict[str, Any]:
    """Do one case; what came of it. A stack that does not come back is `broken`."""
    start, began = time.monotonic(), time.time()
    attack = Attack(stack, ledger, short)
    before, workers = attack.containers, attack.workers()
    leased = lease(attack)
    if case.prepare:
        case.prepare(attack)
        attack.settle("extend", leased)
    watch = Watch(attack, case)
    try:
        case.attack(attack)
    except Broken as error:
        attack.problems.append(str(error))
    finally:
        seen = watch.stop()
    ledger.confirmed.update(seen.confirmed)
    ledger.seen.update(seen.seen)
    raised = alarms(stack, began)
    problems, restarts, broken = seen.problems(case.kills, within, raised), [], ""
    try:
        wait_until(attack.ready, RECOVERY, "both doors are ready afterwards")
        restarts = changed(before, attack.containers)
        replaced = (seen.workers | attack.workers()) - workers
        if len(replaced) > case.kills:
            restarts.append(f"{len(replaced)} workers of the publisher are new")
        end_leases(attack, leased)
        if case.after:
            case.after(attack)
        drain(attack, case.drain)
        problems += ledger.problems()
        # An alarm of the broker must end with what raised it.
        wait_until(attack.ready, PATIENCE, "both doors are ready once the queue is empty")
    except Broken as error:
        broken = str(error)
        restarts = restarts or changed(before, containers(stack.name))
        problems.append(broken)
    ledger.confirmed.clear()
    ledger.seen.clear()
    return {
        "case": case.name,
        "sent": case.sends,
        "seconds": round(time.monotonic() - start, 1),
        "post_seconds": round(max((seconds for _, seconds in seen.posts), default=0.0), 2),
        "get_seconds": round(max((seconds for _, seconds in seen.gets), default=0.0), 2),
        "answers_to_others": len(seen.posts) + len(seen.gets),
        "refused": refused([*seen.posts, *seen.gets]),
        "alarms": raised,
        "answers": attack.answers,
        "restarts": restarts,
        "memory": {service: used // 2**20 for service, used in seen.memory.items()},
        "broken": broken,
        "problems": [*restarts, *dict.fromkeys(attack.problems), *problems],
    }


def end_leases(attack: Attack, leased: list[str]) -> None:
    """Acknowledge the leases that were taken before and by the case, which must still hold."""
    for receipts in leased, attack.receipts:
        if receipts and (status := attack.settle("extend", receipts)) != 200:
            attack.problems.append(f"{len(receipts)} leases are lost: /extend is {status}")
            for receipt in receipts:  # some of them may be left
                attack.settle("ack", [receipt])
        elif receipts:
            attack.settle("ack", receipts)


def line(result: Mapping[str, Any]) -> str:
    """Return a case's line of the table."""
    memory = " ".join(f"{result['memory'].get(service, 0):5}" for service in LOOKED_AT)
    refused = sum(result["refused"].values())
    return (
        f"{result['case']:14}{result['post_seconds']:7.2f}{result['get_seconds']:7.2f}"
        f"{refused:8}{len(result['restarts']):9}{result['seconds']:7.1f} {memory}  {result['sent']}"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the cases that the options name, on a stack whose queues are empty."""
    wanted = set(options.cases.split(",")) if options.cases else set()
    cases = [
        case
        for case in CASES
        if (wanted & {case.name, case.kind} if wanted else not (options.short and case.long))
    ]
    if unknown := wanted - {name for case in CASES for name in (case.name, case.kind)}:
        raise Broken(f"There is no case {', '.join(sorted(unknown))}.")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stack = Stack(options.stack, options.publisher, options.subscriber, {options.queue})
    wait_until(stack.ready, RECOVERY, "both doors are ready")

    def empty() -> bool:
        return stack.depth() == 0

    wait_until(empty, 2 * COUNTED, f"{options.queue} is empty; receive first what is in it")
    if problems := stack.dead():
        raise Broken(f"{problems[0]}; it must be empty before.")
    ledger = Ledger()
    results: list[dict[str, Any]] = []
    problems = []
    title = f"{'case':14}{'POST s':>7}{'GET s':>7}{'refused':>8}{'restarts':>9}{'s':>7}"
    say(f"{title} MiB of {', '.join(LOOKED_AT)}")
    try:
        for case in cases:
            results.append(play(stack, case, ledger, options.short, options.within))
            say(line(results[-1]))
            for problem in results[-1]["problems"]:
                say(f"    PROBLEM {problem}")
                problems.append(f"{case.name}: {problem}")
            if results[-1]["broken"]:
                raise Broken("what follows was not tried")
        wait_until(empty, 2 * COUNTED, "the queue is empty at the end")
        problems += stack.dead()
    except Broken as broken:
        problems.append(f"after {len(results)} of {len(cases)} cases: {broken}")
        say(f"PROBLEM {problems[-1]}")
    return {"cases": results, "problems": problems}


def main() -> int:
    """Read the command line, run, and print what came of it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", default="broker")
    parser.add_argument("--publisher", default="http://127.0.0.1:5000")
    parser.add_argument("--subscriber", default="http://127.0.0.1:5001")
    parser.add_argument("--queue", default="takeaway")
    parser.add_argument("--cases", default="", help="for example A2,A9-publisher; default: all")
    within = "seconds in which somebody else must be answered"
    parser.add_argument("--within", type=float, default=ANSWERED, help=within)
    parser.add_argument("--short", action="store_true", help="fewer cases, and less of each")
    try:
        result = run(parser.parse_args())
    except Broken as broken:
        result = {"problems": [str(broken)]}
        say(f"PROBLEM {broken}")
    say(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
