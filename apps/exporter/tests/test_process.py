"""What the exporter promises as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import FakeBroker, Process


def test_the_first_line_names_version_address_and_broker(
    broker: FakeBroker, process: Callable[..., Process]
) -> None:
    running = process(RABBIT_USER="waiter", RABBIT_PASSWORD="s3cret")
    running.exporter.scrape()
    first = running.log.splitlines()[0]
    url = f"http://127.0.0.1:{broker.port}"
    assert first.endswith(f"exporter 0.1.0 listens on 127.0.0.1:{running.port} and asks {url}")
    assert "waiter" not in running.log
    assert "s3cret" not in running.log


def test_the_log_can_be_json(broker: FakeBroker, process: Callable[..., Process]) -> None:
    broker.password = "another"
    running = process(OUTPUT_FORMAT="JSON", RABBIT_EXPORTERS="overview")
    running.exporter.scrape()
    lines = [json.loads(line) for line in running.log.splitlines()]
    assert [set(line) for line in lines] == [{"level", "msg", "time"}] * 2
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert lines[1]["msg"] == "overview: HTTP 401"


def test_a_log_level_silences_what_is_below(
    broker: FakeBroker, process: Callable[..., Process]
) -> None:
    broker.password = "another"
    running = process(LOG_LEVEL="error")
    running.exporter.scrape()
    assert running.log == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(process: Callable[..., Process], number: int) -> None:
    running = process()
    running.exporter.scrape()
    started = time.monotonic()
    assert running.end(number) == 0
    assert time.monotonic() - started < 2
    assert "Traceback" not in running.log


def test_a_signal_ends_it_also_during_a_scrape(
    broker: FakeBroker, process: Callable[..., Process]
) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    broker.faults["/api/queues"] = hang
    running = process()
    with ThreadPoolExecutor(1) as pool:
        scrape = pool.submit(running.exporter.get, "/metrics")
        running.wait_for(lambda: "/api/queues" in broker.asked)
        started = time.monotonic()
        assert running.end() == 0
        assert time.monotonic() - started < 3
        assert scrape.exception()
    assert "Traceback" not in running.log


@pytest.mark.parametrize(
    ("name", "value"),
    [("INCLUDE_QUEUES", "("), ("CAFILE", "/nowhere"), ("PUBLISH_ADDR", "256.1.1.1")],
)
def test_a_bad_value_ends_the_start_with_one_line(
    process: Callable[..., Process], name: str, value: str
) -> None:
    environment = process().environment | {name: value}
    command = [sys.executable, "-m", "exporter"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=10
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"exporter: {name}")
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_ends_the_start_by_name(process: Callable[..., Process]) -> None:
    running = process()
    command = [sys.executable, "-m", "exporter"]
    done = subprocess.run(
        command, env=running.environment, capture_output=True, text=True, check=False, timeout=10
    )
    assert done.returncode == 1
    assert done.stderr.startswith("exporter: PUBLISH_ADDR:PUBLISH_PORT=127.0.0.1:")


def test_a_thousand_queues_take_half_a_second_of_a_processor_at_most(
    broker: FakeBroker, process: Callable[..., Process]
) -> None:
    queues = [broker.queue(lambda: 123456, f"orders.{number:04}") for number in range(1000)]
    body = json.dumps(queues).encode()

    async def at_once(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    broker.faults["/api/queues"] = at_once
    running = process()
    seconds = []
    for _ in range(5):
        before = running.cpu()
        status, _, text = running.exporter.get("/metrics")
        seconds.append(running.cpu() - before)
        assert status == 200
        assert text.count("\nrabbitmq_queue_state{") == 1000
    assert min(seconds) <= 0.5, seconds
    assert running.rss() < 256
