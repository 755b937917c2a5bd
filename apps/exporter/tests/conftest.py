"""A management API of our own and exporters that ask it, all of them over real HTTP."""

import asyncio
import base64
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from aiohttp import web
from exporter.app import create_app
from exporter.settings import Settings
from prometheus_client.parser import text_string_to_metric_families

T = TypeVar("T")
APPS = Path(__file__).parents[2]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PATHS = {
    "overview": "/api/overview",
    "node": "/api/nodes",
    "exchange": "/api/exchanges",
    "queue": "/api/queues",
    "connections": "/api/connections",
}
STATS = [
    *["ack", "confirm", "deliver", "deliver_get", "deliver_no_ack", "get", "get_empty"],
    *["get_no_ack", "publish", "publish_in", "publish_out", "redeliver", "return"],
    "return_unroutable",
]


class Numbers:
    """Another number each time, so that no family can pass for another one."""

    def __init__(self) -> None:
        self._last = 1000

    def next(self) -> int:
        self._last += 1
        return self._last


def stats(number: Callable[[], int]) -> dict[str, Any]:
    counts = {name: number() for name in STATS}
    return counts | {f"{name}_details": {"rate": number() / 8} for name in STATS}


def overview(number: Callable[[], int]) -> dict[str, Any]:
    totals = ["messages", "messages_ready", "messages_unacknowledged"]
    return {
        "management_version": "4.0.5",
        "rates_mode": "basic",
        "sample_retention_policies": {"global": [600, 3600], "basic": [600], "detailed": [600]},
        "exchange_types": [{"name": "direct", "enabled": True}],
        "rabbitmq_version": "4.0.5",
        "cluster_name": "rabbit@broker1",
        "erlang_version": "26.2.5",
        "message_stats": stats(number),
        "queue_totals": {name: number() for name in totals},
        "object_totals": {
            name: number()
            for name in ["channels", "connections", "consumers", "exchanges", "queues"]
        },
        "node": "rabbit@broker1",
        "listeners": [{"node": "rabbit@broker1", "protocol": "amqp", "port": 5672}],
    }


def node(number: Callable[[], int], name: str = "rabbit@broker1") -> dict[str, Any]:
    numbers = [
        *["uptime", "mem_used", "mem_limit", "disk_free", "disk_free_limit", "fd_used", "fd_total"],
        *["sockets_used", "sockets_total", "proc_used", "run_queue"],
    ]
    return {field: number() for field in numbers} | {
        "name": name,
        "running": True,
        "mem_alarm": False,
        "disk_free_alarm": True,
        "partitions": ["rabbit@broker2", "rabbit@broker3"],
        "type": "disc",
    }


def exchange(number: Callable[[], int], name: str = "takeaway-in") -> dict[str, Any]:
    return {
        "name": name,
        "vhost": "/",
        "type": "direct",
        "durable": True,
        "arguments": {},
        "message_stats": stats(number),
    }


def queue(number: Callable[[], int], name: str = "takeaway") -> dict[str, Any]:
    numbers = [
        *["messages_ready", "messages_unacknowledged", "messages", "messages_ready_ram"],
        *["messages_unacknowledged_ram", "messages_ram", "messages_persistent", "message_bytes"],
        *["message_bytes_ready", "message_bytes_unacknowledged", "message_bytes_ram"],
        *["message_bytes_persistent", "consumers", "consumer_utilisation", "consumer_capacity"],
        *["memory", "head_message_timestamp", "disk_reads", "disk_writes", "reductions"],
    ]
    members = ["rabbit@broker1", "rabbit@broker2", "rabbit@broker3"]
    collection = [
        "fullsweep_after",
        "min_heap_size",
        "min_bin_vheap_size",
        "minor_gcs",
        "max_heap_size",
    ]
    rated = ["messages", "messages_ready", "messages_unacknowledged", "reductions"]
    return {field: number() for field in numbers} | {
        **{f"{field}_details": {"rate": number() / 8} for field in rated},
        "name": name,
        "vhost": "/",
        "type": "quorum",
        "node": "rabbit@broker1",
        "leader": "rabbit@broker1",
        "members": members,
        "online": members[:2],
        "slave_nodes": members[:1],
        "synchronised_slave_nodes": [],
        "durable": True,
        "auto_delete": False,
        "exclusive": False,
        "state": "running",
        "idle_since": "2026-11-24T12:00:00.500+00:00",
        "policy": "takeaway",
        "operator_policy": None,
        "arguments": {"x-queue-type": "quorum", "x-max-length": 500, "x-max-length-bytes": 7000},
        "effective_policy_definition": {
            "dead-letter-strategy": "at-least-once",
            "delivery-limit": 20,
            "overflow": "reject-publish",
            "max-length": 400,
            "max-length-bytes": 8000,
        },
        "garbage_collection": {field: number() for field in collection},
        "message_stats": stats(number),
        "open_files": dict.fromkeys(members, 0),
        "recoverable_slaves": None,
        "single_active_consumer_tag": None,
    }


def connection(number: Callable[[], int], name: str = "172.18.0.5:1 -> 172.18.0.2:5672") -> Any:
    numbers = ["channels", "recv_oct", "recv_cnt", "send_oct", "send_cnt", "send_pend"]
    return {field: number() for field in numbers} | {
        "name": name,
        "vhost": "/",
        "node": "rabbit@broker1",
        "peer_host": "172.18.0.5",
        "peer_port": 1,
        "user": "publisher",
        "state": "running",
        "client_properties": {"product": "Pika", "capabilities": {"basic.nack": True}},
    }


def full_pages() -> dict[str, Any]:
    """Return the answers of a broker that gives every field."""
    number = Numbers().next
    return {
        PATHS["overview"]: overview(number),
        PATHS["node"]: [node(number)],
        PATHS["exchange"]: [exchange(number)],
        PATHS["queue"]: [queue(number)],
        PATHS["connections"]: [connection(number)],
    }


class FakeBroker:
    """Answers with pages, by path; a fault in a path's place answers instead."""

    paths = PATHS
    modules = ",".join(PATHS)
    node, exchange, queue, connection = map(staticmethod, (node, exchange, queue, connection))

    def __init__(self) -> None:
        self.pages = full_pages()
        self.faults: dict[str, Handler] = {}
        self.password = "guest"
        self.asked: list[str] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        login = base64.b64encode(f"guest:{self.password}".encode()).decode()
        if request.headers["Authorization"] != f"Basic {login}":
            return web.json_response({"error": "not_authorized"}, status=401)
        if fault := self.faults.get(request.path):
            return await fault(request)
        return web.json_response(self.pages[request.path])

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()


class Scraped(NamedTuple):
    """An answer of /metrics."""

    text: str
    types: dict[str, str]
    # By name and labels.
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, /, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for found, labels in self.samples if found == name]

    def modules(self) -> dict[str, float]:
        return {
            dict(labels)["module"]: value
            for (name, labels), value in self.samples.items()
            if name == "rabbitmq_module_up"
        }

    def data(self) -> set[str]:
        """Return the names of the families that tell of the broker."""
        ours = "rabbitmq_(up|module_.*|exporter_build_info)|process_start_time_seconds"
        return {name for name in self.types if not re.fullmatch(ours, name)}


def parsed(text: str) -> Scraped:
    lines = [line.split(" ") for line in text.splitlines() if line.startswith("# TYPE ")]
    samples = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len({line[2] for line in lines}) == len(lines), "a family is there twice"
    assert len(dict(samples)) == len(samples), "a sample is there twice"
    return Scraped(text, {line[2]: line[3] for line in lines}, dict(samples))


class Exporter:
    """A running exporter."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Return status, content type and body."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.headers["Content-Type"], response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()

    def scrape(self) -> Scraped:
        status, content_type, body = self.get("/metrics")
        assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
        return parsed(body)


class Loop:
    """An event loop in a thread, with what runs in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._runners: list[web.AppRunner] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _start(self, settings: Settings) -> int:
        runner = web.AppRunner(await create_app(settings), access_log=None, shutdown_timeout=0.1)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port: int = runner.addresses[0][1]
        return port

    def start(self, variables: dict[str, str]) -> Exporter:
        return Exporter(self.run(self._start(Settings.read(variables))))

    def close(self) -> None:
        for runner in self._runners:
            self.run(runner.cleanup())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def broker(loop: Loop) -> Iterator[FakeBroker]:
    broker = FakeBroker()
    loop.run(broker.start())
    yield broker
    loop.run(broker.stop())


@pytest.fixture
def export(loop: Loop, broker: FakeBroker) -> Callable[..., Exporter]:
    """Start an exporter for the broker with these variables."""

    def export(**variables: str) -> Exporter:
        return loop.start({"RABBIT_URL": f"http://127.0.0.1:{broker.port}", **variables})

    return export


class Process:
    """An exporter as a process of its own; log is what it wrote so far."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self._log = folder / "log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{APPS / 'common'}:{APPS / 'exporter'}",
            "PUBLISH_ADDR": "127.0.0.1",
            "PUBLISH_PORT": str(self.port),
            **variables,
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "exporter"], env=self.environment, stdout=log, stderr=log
            )
        self.exporter = Exporter(self.port)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], T], seconds: float = 10) -> T:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.01)
        return result

    def answers(self) -> bool:
        try:
            return self.exporter.get("/health")[0] == 200
        except urllib.error.URLError:
            return False

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(5)

    def cpu(self) -> float:
        """Return the seconds that it has spent on processors, which others' load leaves alone."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        """Return the memory that it has now, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@pytest.fixture
def process(tmp_path: Path, broker: FakeBroker) -> Iterator[Callable[..., Process]]:
    """Start an exporter for the broker as a process, and wait until it listens."""
    started = []

    def process(**variables: str) -> Process:
        variables = {"RABBIT_URL": f"http://127.0.0.1:{broker.port}", **variables}
        process = Process(tmp_path, variables)
        started.append(process.process)
        process.wait_for(process.answers)
        return process

    yield process
    for one in started:
        one.kill()
        one.wait()
