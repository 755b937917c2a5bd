"""Measure the doors: `python3 bench/doors.py [beside FOLDER | memory | polls]`.

By default each case is measured ROUNDS (5) times for SECONDS (5), in turn, so that the drift of
the machine hits all alike. Load, doors and broker share it: only the ratios mean something
elsewhere. `beside` measures the doors of another checkout in the same rounds, and prints how this
one's compare. `memory` sends 1,000,000 messages through both doors and watches what they take.
`polls` holds 1,000 and then 5,000 idle long polls.

The broker is a container of the bench's own, with the project's configuration, from the image
RABBITMQ_IMAGE, by default the one that `make bench` built. The events of requests go to a socket
that discards them.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PEERS = str(ROOT / "bench/peers.py")
ROUNDS, SECONDS = (int(os.environ.get(name, "5")) for name in ("ROUNDS", "SECONDS"))
CONTAINER, LABEL = "broker-bench-rabbitmq", "message-broker-stack=broker-bench"
# Bytes of the broker's write-ahead log.
LOG = 64 * 1024 * 1024
EMPTY = "No message available\n"
TEXT = "x" * 100
FORM = f"message={TEXT}"
LINE = f"{json.dumps(TEXT)}\n"
NDJSON = {"Content-Type": "application/x-ndjson"}
# A response is worth `per` messages, or for 0 as many as it has lines.
LUA = """
messages, empty, failed = 0, 0, 0
local threads = {}
function setup(thread) table.insert(threads, thread) end
function response(status, headers, body)
  if status == 204 or body == "No message available\\n" or body == "[]" then
    empty = empty + 1
  elseif status < 200 or status > 299 then
    failed = failed + 1
  elseif per > 0 then
    messages = messages + per
  else
    for _ in body:gmatch("\\n") do messages = messages + 1 end
  end
end
function done(summary, latency)
  local errors = summary.errors
  failed = errors.connect + errors.read + errors.write + errors.timeout
  for _, thread in ipairs(threads) do
    messages, empty = messages + thread:get("messages"), empty + thread:get("empty")
    failed = failed + thread:get("failed")
  end
  io.write(string.format('{"rate": %f, "messages": %d, "empty": %d, "failed": %d, '
    .. '"p50": %f, "p99": %f}\\n', messages * 1e6 / summary.duration, messages, empty, failed,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""
# The case whose messages go nowhere, and the one of a single client beside those of large batches.
NO_OP = "POST, Flask no-op, 64"
BESIDE = "POST /data, 1, beside batches of 10,000, 6"
# What is compared with what, the ratio that must be reached, and the one aimed at.
REACH = [
    ("POST /data, 64", "POST, original design, 64", 25, 35),
    ("POST /data, 64", NO_OP, 0.5, 0.6),
    ("POST /data, 64", "POST, management API, 64", 3, 4),
    ("GET /receive, 64", "GET, original design, 64", 25, 35),
    ("POST /batch of 1000, 1", "POST, raw pika, 1", 1.5, 2.5),
    ("POST /batch of 1000, 4", "POST, raw pika, 1", 1.5, 2.5),
    ("GET /receive?max=1000, 1", "POST /batch of 1000, 1", 0.5, 1),
    ("GET /receive?max=1000, 4", "POST /batch of 1000, 4", 0.5, 1),
]
# What one measurement saw: messages, rate (of them a second), p50 and p99 (ms), empty and failed
# answers, and how many messages are missing in the queue.
Run = dict[str, float]
# By name, the messages that a case may take in a second, and how it is measured once.
Cases = dict[str, tuple[int, Callable[[], Run]]]


class Client(http.client.HTTPConnection):
    """A connection that is kept."""

    def ask(self, method: str, path: str, body: str = "", kind: str = "") -> str:
        """Return the text of the answer; RuntimeError when it is not a 2xx."""
        headers = {"Content-Type": kind or "application/x-www-form-urlencoded"}
        self.request(method, path, body.encode(), headers)
        with self.getresponse() as answer:
            text = answer.read().decode()
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:200]}")
        return text


@dataclass
class App:
    """A program that serves HTTP."""

    port: int
    pid: int

    @property
    def address(self) -> str:
        """Return host and port."""
        return f"127.0.0.1:{self.port}"

    def client(self) -> Client:
        """Return a new connection."""
        return Client(self.address, timeout=30)

    def memory(self, what: str = "VmRSS") -> str:
        """Return what each of its processes has, in MiB."""
        pids, found = [self.pid], []
        for pid in pids:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            status = Path(f"/proc/{pid}/status").read_text()
            found.append(int(re.findall(rf"{what}:\s+(\d+)", status)[0]) / 1024)
        return " + ".join(f"{size:.1f}" for size in found)


def docker(*arguments: str) -> str:
    """Return what docker prints; SystemExit with its error."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"docker {arguments[0]}: {done.stderr}")
    return done.stdout.strip()


def find_image() -> str:
    """Return the broker's image."""
    listed = ROOT / ".venv/images.json"
    known = json.loads(listed.read_text()) if listed.exists() else {}
    # The newest is the first.
    built = re.findall(r"\S+/rabbitmq:\S+", docker("images", "--format={{.Repository}}:{{.Tag}}"))
    for image in os.environ.get("RABBITMQ_IMAGE"), known.get("rabbitmq"), *built:
        if image:
            return str(image)
    sys.exit("There is no image of the broker: run `make bench`, or set RABBITMQ_IMAGE.")


def remove_broker() -> None:
    """Remove the bench's container, and none that only has its name."""
    mine = [f"--filter=name=^/{CONTAINER}$", f"--filter=label={LABEL}"]
    for container in docker("ps", "--all", "--quiet", *mine).split():
        docker("rm", "--force", "--volumes", container)


def peer(*arguments: object) -> str:
    """Return what bench/peers.py prints; CalledProcessError when it fails."""
    command = [sys.executable, PEERS, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@contextmanager
def broker(**variables: object) -> Iterator[None]:
    """Run a broker that the environment then names, configured by the inventory and variables."""
    sys.path.append(str(ROOT))
    from tests.support import render

    os.environ["RABBITMQ_PASSWORD"] = password = secrets.token_hex(16)
    users = ("admin", "publisher", "subscriber", "monitor")
    remove_broker()
    try:
        create = ["create", f"--name={CONTAINER}", f"--label={LABEL}", "--hostname=bench"]
        create += ["--env=RABBITMQ_NODENAME=rabbit@bench", "--user=999:999"]
        create += [f"--memory={variables.get('rabbitmq_memory', '1G')}"]
        # As the role rabbitmq bounds its log; with RabbitMQ's own 512 MiB the alarm comes soon.
        log = f"-ra wal_max_size_bytes {LOG} -rabbit quorum_wal_max_size_bytes {LOG}"
        create += [f"--env=RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS={log}"]
        docker(*create, find_image())
        with tempfile.TemporaryDirectory() as folder:
            passwords = {f"stack_{user}_password": password for user in users}
            texts = render(Path(folder), **passwords, **variables)
            for name in "rabbitmq.conf", "enabled_plugins", "definitions.json":
                Path(folder, name).write_text(texts[f"rabbitmq/{name}"])
                docker("cp", f"{folder}/{name}", f"{CONTAINER}:/etc/rabbitmq/{name}")
        docker("start", CONTAINER)
        # As the doors' own containers reach it: a published port of the loopback leads through
        # Docker's proxy, which takes raw pika a third of its rate.
        found = docker("inspect", "--format={{json .NetworkSettings.Networks}}", CONTAINER)
        (network,) = json.loads(found).values()
        os.environ |= {"RABBITMQ_HOST": network["IPAddress"], "RABBITMQ_PORT": "5672"}
        yield
    finally:
        remove_broker()


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@contextmanager
def app(name: str, *command: str, root: Path = ROOT) -> Iterator[App]:
    """Run a Python program of root, from when it is ready; one with workers has 2 of them."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        environment = {
            "PYTHONPATH": os.pathsep.join(
                str(root / "apps" / part) for part in ("common", "door", name)
            ),
            "PORT": str(port),
            "WORKERS": "2",
            "RABBITMQ_USER": name,
            "PROMETHEUS_MULTIPROC_DIR": folder,
        }
        program = subprocess.Popen(
            [sys.executable, *command], env=os.environ | environment, stdout=log, stderr=log
        )
        running = App(port, program.pid)
        end = time.monotonic() + 300
        try:
            while True:
                try:
                    running.client().ask("GET", "/healthz?ready")
                    break
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    if time.monotonic() > end or program.poll() is not None:
                        log.seek(0)
                        sys.exit(f"{log.read().decode()[-2000:]}{name} is not ready: {error}")
                time.sleep(0.2)
            yield running
        finally:
            program.terminate()
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()


class Discard(socketserver.BaseRequestHandler):
    """A collector that forgets what it reads."""

    def handle(self) -> None:
        """Read until the end."""
        while self.request.recv(65536):
            pass


@contextmanager
def doors(**variables: object) -> Iterator[tuple[App, App]]:
    """Run broker, publisher and subscriber; the broker as variables say."""
    collector = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Discard)
    collector.daemon_threads = True
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    os.environ |= {"FLUENTD_HOST": "127.0.0.1", "FLUENTD_PORT": str(collector.server_address[1])}
    with (
        broker(**variables),
        app("publisher", "-m", "publisher") as publisher,
        app("subscriber", "-m", "subscriber") as subscriber,
    ):
        packages = [f"{name} {version(name)}" for name in ("Flask", "gevent", "pika")]
        environment = docker("inspect", "--format={{json .Config.Env}}", CONTAINER)
        found = re.findall(r"RABBITMQ_VERSION=([0-9.]+)", environment)
        packages += [f"RabbitMQ {found[0]}", f"Python {sys.version.split()[0]}"]
        print(f"{os.cpu_count()} cores, {', '.join(packages)}\n")
        yield publisher, subscriber


def wrk(
    connections: int,
    url: str,
    body: str = "",
    headers: dict[str, str] | None = None,
    per: int = 1,
    paths: Sequence[str] = (),
) -> Run:
    """Load http://url for SECONDS, by POST when there is a body; paths, if any, in turns."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
    # ASCII without control characters but the newline: JSON's literals are Lua's.
    lua = [LUA, f"per, wrk.method = {per}, '{'POST' if body else 'GET'}'"]
    lua += [f"wrk.body = {json.dumps(body)}"] if body else []
    if paths:
        lua += [f"local paths, turn = {{{json.dumps(paths)[1:-1]}}}, 0"]
        lua += [
            "function request() turn = turn % #paths + 1; return wrk.format(nil, paths[turn]) end"
        ]
    lua += [f"wrk.headers['{name}'] = {json.dumps(value)}" for name, value in headers.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write("\n".join(lua))
        script.flush()
        command = ["wrk", "--threads=1", f"--connections={connections}", "--timeout=10s"]
        command += [f"--duration={SECONDS}s", f"--script={script.name}"]
        done = subprocess.run([*command, f"http://{url}"], stdout=subprocess.PIPE, check=True)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def management() -> tuple[str, str, dict[str, str]]:
    """Return the path, body and headers by which RabbitMQ's management API publishes."""
    login = base64.b64encode(f"admin:{os.environ['RABBITMQ_PASSWORD']}".encode()).decode()
    message = {"routing_key": "takeaway", "payload": TEXT, "payload_encoding": "string"}
    put = json.dumps({**message, "properties": {"delivery_mode": 2}})
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    return "/api/exchanges/%2F/takeaway-in/publish", put, headers


def make_cases(publisher: App, subscriber: App, no_op: App, original: App) -> Cases:
    """Return the doors' cases, and those that they are compared with."""
    path, put, api = management()
    take = json.dumps({"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"})
    put_url = f"{os.environ['RABBITMQ_HOST']}:15672{path}"
    take_url = f"{os.environ['RABBITMQ_HOST']}:15672/api/queues/%2F/takeaway/get"
    return {
        NO_OP: (0, partial(wrk, 64, f"{no_op.address}/data", FORM)),
        "POST, original design, 64": (0, partial(wrk, 64, f"{original.address}/data", FORM)),
        "GET, original design, 64": (500, partial(wrk, 64, f"{original.address}/receive")),
        "POST, management API, 64": (0, partial(wrk, 64, put_url, put, api)),
        "GET, management API, 64": (2000, partial(wrk, 64, take_url, take, api)),
        "POST, raw pika, 1": (0, lambda: json.loads(peer("raw", SECONDS))),
        **door_cases(publisher, subscriber),
    }


def door_cases(publisher: App, subscriber: App) -> Cases:
    """Return the doors' cases; what takes comes after what publishes, so that less is filled."""
    cases: Cases = {}
    for count in 16, 64, 256:
        post = partial(wrk, count, f"{publisher.address}/data", FORM)
        get = partial(wrk, count, f"{subscriber.address}/receive")
        cases |= {f"POST /data, {count}": (0, post), f"GET /receive, {count}": (6000, get)}
    for count in 1, 4:
        post = partial(wrk, count, f"{publisher.address}/batch", LINE * 1000, NDJSON, per=1000)
        get = partial(wrk, count, f"{subscriber.address}/receive?max=1000", per=0)
        cases[f"POST /batch of 1000, {count}"] = (0, post)
        cases[f"GET /receive?max=1000, {count}"] = (30_000, get)
    return cases | {BESIDE: (0, partial(beside_batches, publisher))}


def beside_batches(publisher: App) -> Run:
    """Measure single messages, one after the other, while six clients send batches."""
    with ThreadPoolExecutor(1) as pool:
        url, lines = f"{publisher.address}/batch", LINE * 10_000
        batches = pool.submit(wrk, 6, url, lines, NDJSON, per=10_000)
        single = wrk(1, f"{publisher.address}/data", FORM)
    others = batches.result()
    if not single["messages"]:  # the first answer came too late
        single["p50"] = single["p99"] = 1e3 * SECONDS
    return single | {what: single[what] + others[what] for what in ("messages", "empty", "failed")}


def rounds() -> None:
    """Measure each case in each round, and print what came out."""
    with (
        doors() as (publisher, subscriber),
        app("no-op", PEERS, "no-op") as no_op,
        app("original", PEERS, "original") as original,
    ):
        runs = measure(make_cases(publisher, subscriber, no_op, original))
        print_figures(runs)
        print_reached(runs)
        print("\nMiB of each process, and the most that it had:")
        for name, door in ("publisher", publisher), ("subscriber", subscriber):
            print(f"{name} {door.memory()}, {door.memory('VmHWM')}")
    check(runs)


def beside(folder: str) -> None:
    """Measure the doors of this checkout and those of the one in folder, in turn."""
    root = Path(folder)
    with (
        doors() as (publisher, subscriber),
        app("publisher", "-m", "publisher", root=root) as publisher_2,
        app("subscriber", "-m", "subscriber", root=root) as subscriber_2,
    ):
        ones = door_cases(publisher, subscriber)
        others = door_cases(publisher_2, subscriber_2)
        runs = measure(
            {
                who + name: cases[name]
                for name in ones
                for who, cases in (("", ones), ("other ", others))
            }
        )
    print(f"\n| Case, connections | This one | {folder} | Ratio | Least | Most |")
    print("|---|---|---|---|---|---|")
    for name in ones:
        rates, rates_2 = figures(runs, name, "rate"), figures(runs, f"other {name}", "rate")
        single = [one / two for one, two in zip(rates, rates_2, strict=True)]
        print(
            f"| {name} | {median(rates):,.0f} | {median(rates_2):,.0f} | {median(single):.2f}"
            f" | {min(single):.2f} | {max(single):.2f} |"
        )
    check(runs)


def measure(cases: Cases) -> dict[str, list[Run]]:
    """Return by case what each round saw of it."""
    if not shutil.which("wrk"):
        sys.exit("wrk, which makes the load, is missing: apt install wrk")
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for number in range(ROUNDS):
        # What comes later in a round has another queue: the next round has it earlier.
        for name, (takes, once) in list(cases.items())[:: -1 if number % 2 else 1]:
            # A run that met an empty queue says nothing: more is filled in.
            for enough in 1, 3, 9:
                peer("fill", enough * takes * SECONDS)
                time.sleep(1)  # for what the last one left to do
                run = once()
                if not run.get("empty"):
                    break
            if not takes and name != NO_OP and "missing" not in run:
                run["missing"] = max(0, run["messages"] - int(peer("depth")))
            runs[name].append(run)
            print(f"{number + 1}/{ROUNDS} {name}: {run}", file=sys.stderr)
    return runs


def check(runs: dict[str, list[Run]]) -> None:
    """End with the names of the cases that were not as they should be."""
    bad = [name for name in runs if sum(figures(runs, name, "empty", "failed", "missing"))]
    if bad:
        sys.exit(f"There were empty answers, failures or losses: {'; '.join(bad)}")


def figures(runs: dict[str, list[Run]], name: str, *what: str) -> list[float]:
    """Return these figures of each round of a case, 0 where there is none."""
    return [run.get(one, 0) for one in what for run in runs[name]]


def print_figures(runs: dict[str, list[Run]]) -> None:
    """Print a Markdown table of what was measured."""
    print(f"{ROUNDS} rounds of {SECONDS} s; messages a second:\n")
    print("| Case, connections | Median | Least | Most | p50 / p99 ms | Times the original |")
    print("|---|---|---|---|---|---|")
    for name in runs:
        rates = figures(runs, name, "rate")
        base = median(figures(runs, f"{name.split()[0].strip(',')}, original design, 64", "rate"))
        p50, p99 = (median(figures(runs, name, what)) for what in ("p50", "p99"))
        times = f"{p50:.1f} / {p99:.1f}" if p50 else ""
        print(
            f"| {name} | {median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f}"
            f" | {times} | {median(rates) / base:.1f} |"
        )


def print_reached(runs: dict[str, list[Run]]) -> None:
    """Print a Markdown table of what must be reached: ratios of medians, and of single rounds."""
    print("\n| To reach | Ratio | Least | Most | Target | Aim | |\n|---|---|---|---|---|---|---|")
    rows = []
    for mine, other, target, aim in REACH:
        rates, others = figures(runs, mine, "rate"), figures(runs, other, "rate")
        ratio = median(rates) / median(others)
        rows.append(
            (f"{mine} to {other}", ratio, rates, others, f"≥ {target}", aim, ratio >= target)
        )
    for name in "POST /data, 256", "GET /receive, 256":
        p50, p99 = figures(runs, name, "p50"), figures(runs, name, "p99")
        ratio = median(p99) / median(p50)
        rows.append((f"p99 to p50 of {name}", ratio, p99, p50, "< 4", 3, ratio < 4))
    late = figures(runs, BESIDE, "p99")
    ones = [1.0] * len(late)
    rows.append((f"p99 of {BESIDE}, ms", median(late), late, ones, "< 100", 30, median(late) < 100))
    for what, ratio, ones, twos, bound, aim, reached in rows:
        single = [one / two for one, two in zip(ones, twos, strict=True)]
        print(
            f"| {what} | {ratio:.2f} | {min(single):.2f} | {max(single):.2f}"
            f" | {bound} | {aim} | {'ok' if reached else 'short'} |"
        )


def memory(thousands: int = 1000, limit: float = 1800) -> None:
    """Send messages through both doors for at most limit seconds, and print what these take."""
    clients = threading.local()

    def thousand(publisher: App, subscriber: App) -> None:
        if not hasattr(clients, "post"):
            clients.post, clients.get = publisher.client(), subscriber.client()
        clients.post.ask("POST", "/batch", LINE * 900, NDJSON["Content-Type"])
        for _ in range(100):
            clients.post.ask("POST", "/data", FORM)
        taken = 0
        while taken < 100:
            taken += clients.get.ask("GET", "/receive?wait=5") != EMPTY
        while taken < 1000:
            taken += clients.get.ask("GET", f"/receive?max={1000 - taken}&wait=5").count("\n")

    end = time.monotonic() + limit
    with doors() as (publisher, subscriber), ThreadPoolExecutor(4) as pool:
        print("| Messages | Publisher, MiB of each process | Subscriber |\n|---|---|---|")
        for done in range(0, thousands + 1, 100):
            print(f"| {done},000 | {publisher.memory()} | {subscriber.memory()} |", flush=True)
            if done == thousands or time.monotonic() > end:
                break
            list(pool.map(lambda _: thousand(publisher, subscriber), range(100)))
        print(f"\nMost: {publisher.memory('VmHWM')} and {subscriber.memory('VmHWM')}")
    if done < thousands:
        sys.exit(f"The time of {limit} s was over after {done},000 messages")


async def long_poll(
    port: int, gate: asyncio.Semaphore, held: set[object]
) -> tuple[str, float, float]:
    """Return the answer of a long poll, or an error, when it came, and after how many seconds."""
    start = time.monotonic()
    try:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = time.monotonic()
        writer.write(
            b"GET /receive?wait=20 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        held.add(writer)
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.findall(rb"(?i)\r\ncontent-length: *(\d+)", head)[0])
            answer = (head + await reader.readexactly(length)).decode()
        writer.close()
    except (OSError, EOFError, TimeoutError) as error:
        answer = repr(error)
    return answer, time.monotonic(), time.monotonic() - start


async def hold_polls(count: int, publisher: App, subscriber: App) -> None:
    """Hold count long polls, post messages meanwhile, which end some of them, and print both."""
    gate, held, start = asyncio.Semaphore(100), set[object](), time.monotonic()
    tasks = [asyncio.create_task(long_poll(subscriber.port, gate, held)) for _ in range(count)]
    while len(held) < count and time.monotonic() < start + 15:
        await asyncio.sleep(0.1)
    client, posted, confirmed = publisher.client(), [], []
    for number in range(50):
        await asyncio.sleep(0.05)
        posted.append(time.monotonic())
        await asyncio.to_thread(client.ask, "POST", "/data", f"message=number {number}")
        confirmed.append(time.monotonic())
    waiting, took = sum(not task.done() for task in tasks), subscriber.memory()
    answers = await asyncio.gather(*tasks)
    came, ends, wrong = {}, [], set()
    for text, when, seconds in answers:
        if text.startswith("HTTP/1.1 200 ") and "number " in text:
            came[int(text.partition("number ")[2])] = when
        elif text.startswith("HTTP/1.1 200 ") and text.endswith(EMPTY):
            ends.append(seconds)
        else:
            wrong.add(text[:200])
    print(
        f"\n{count:,} long polls, {len(held):,} opened; once the messages were posted, {waiting:,}"
        f" were waiting and the subscriber had {took} MiB.\nAnswered with a message: {len(came)} of"
        f" 50; told empty: {len(ends):,}, after {min(ends):.1f} to {max(ends):.1f} s."
    )
    for what, times in {
        "201": confirmed,
        "a poll": [came[number] for number in sorted(came)],
    }.items():
        ways = [1e3 * (then - at) for at, then in zip(posted, times, strict=True)]
        print(f"From POST to {what}: median {median(ways):.1f} ms, most {max(ways):.1f} ms.")
    if wrong:
        sys.exit(f"There were other answers: {wrong}")


def polls() -> None:
    """Hold 1,000 and then 5,000 polls."""
    # Before the doors start, which inherit it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with doors() as (publisher, subscriber):
        print(f"The subscriber before: {subscriber.memory()} MiB")
        for count in 1000, 5000:
            asyncio.run(hold_polls(count, publisher, subscriber))
        print(f"\nand after: {subscriber.memory()} MiB")


if __name__ == "__main__":
    # The broker is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    modes = {(): rounds, ("memory",): memory, ("polls",): polls}
    match sys.argv[1:]:
        case ["beside", other]:
            beside(other)
        case [*words] if tuple(words) in modes:
            modes[tuple(words)]()
        case _:
            sys.exit(__doc__)
