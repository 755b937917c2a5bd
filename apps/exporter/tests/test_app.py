"""What the exporter promises while the broker is well, ill, slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Exporter, FakeBroker, Handler, Loop, Scraped

DEFAULT = ["overview", "exchange", "node", "queue"]
NAMED = {"cluster": "rabbit@broker1", "node": "rabbit@broker1"}
UNKNOWN = {"cluster": "", "node": ""}


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def trickle(request: web.Request) -> web.StreamResponse:
    """Never end, and never be silent either."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)
    return response


async def break_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b"[")
    assert request.transport
    request.transport.close()
    return response


def answer(body: bytes, status: int = 200) -> Handler:
    async def fault(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, content_type="application/json")

    return fault


def assert_only_failed(scraped: Scraped, *failed: str, labels: dict[str, str] = NAMED) -> None:
    assert scraped.modules() == {module: float(module not in failed) for module in DEFAULT}
    assert scraped.value("rabbitmq_up", **labels) == float(not failed)
    families = {
        "overview": "rabbitmq_(version_info|channels|channelsTotal|queue_messages_(global|total))",
        "node": "rabbitmq_(running|fd_total)",
        "exchange": "rabbitmq_exchange_messages_published_in_total",
        "queue": "rabbitmq_queue_(messages|state)",
    }
    for module, pattern in families.items():
        found = {name for name in scraped.types if re.fullmatch(pattern, name)}
        assert bool(found) == (module not in failed), (module, found)


def test_all_is_up_when_every_module_answers(export: Callable[..., Exporter]) -> None:
    scraped = export().scrape()
    assert_only_failed(scraped)
    durations = scraped.labels("rabbitmq_module_scrape_duration_seconds")
    assert durations == [NAMED | {"module": module} for module in DEFAULT]


def test_each_scrape_asks_afresh(broker: FakeBroker, export: Callable[..., Exporter]) -> None:
    exporter = export()
    for uptime in 1, 2:
        broker.pages["/api/nodes"][0]["uptime"] = uptime
        assert exporter.scrape().value("rabbitmq_uptime", **NAMED, **{"self": "1"}) == uptime


def test_a_broker_that_never_was_there_has_no_name_and_no_data(
    loop: Loop, broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    loop.run(broker.stop())
    scraped = export().scrape()
    assert set(scraped.types) == {
        "rabbitmq_up",
        "rabbitmq_module_up",
        "rabbitmq_exporter_build_info",
        "process_start_time_seconds",
    }
    assert time.time() - 3600 < scraped.value("process_start_time_seconds") <= time.time()
    assert scraped.value("rabbitmq_up", **UNKNOWN) == 0
    assert scraped.modules() == dict.fromkeys(DEFAULT, 0)
    assert all(UNKNOWN.items() <= one.items() for one in scraped.labels("rabbitmq_module_up"))


def test_a_broker_without_overview_that_was_never_seen_gives_no_data(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    broker.faults["/api/overview"] = answer(b"", 500)
    scraped = export().scrape()
    assert scraped.modules() == {"overview": 0, "exchange": 1, "node": 1, "queue": 1}
    assert not scraped.data()


def test_a_broker_that_stopped_keeps_its_name_and_comes_back(
    loop: Loop, broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export()
    exporter.scrape()
    loop.run(broker.stop())
    scraped = exporter.scrape()
    assert_only_failed(scraped, *DEFAULT)
    assert not scraped.data()
    durations = scraped.labels("rabbitmq_module_scrape_duration_seconds")
    assert durations == [NAMED | {"module": module} for module in DEFAULT]
    loop.run(broker.start())
    assert_only_failed(exporter.scrape())


def test_without_overview_the_other_modules_keep_the_last_name(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export()
    exporter.scrape()
    broker.faults["/api/overview"] = answer(b"", 500)
    assert_only_failed(exporter.scrape(), "overview")


def test_the_name_is_the_one_of_this_scrape(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export()
    exporter.scrape()
    broker.pages["/api/overview"] |= {"cluster_name": "another", "node": "rabbit@broker2"}
    scraped = exporter.scrape()
    assert scraped.labels("rabbitmq_up") == [{"cluster": "another", "node": "rabbit@broker2"}]
    assert [one["self"] for one in scraped.labels("rabbitmq_running")] == ["0"]


@pytest.mark.parametrize("fault", [hang, trickle], ids=["hangs", "trickles"])
@pytest.mark.parametrize("modules", [["queue"], ["node", "exchange"], DEFAULT], ids=str)
def test_a_slow_broker_costs_one_time_out_and_only_its_own_modules(
    broker: FakeBroker, export: Callable[..., Exporter], fault: Handler, modules: list[str]
) -> None:
    exporter = export(RABBIT_TIMEOUT="1")
    exporter.scrape()
    broker.faults = {broker.paths[module]: fault for module in modules}
    started = time.monotonic()
    scraped = exporter.scrape()
    assert 0.9 < time.monotonic() - started < 1.9
    assert_only_failed(scraped, *modules)


def test_a_limit_of_queues_adds_no_time_out(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export(RABBIT_TIMEOUT="1", MAX_QUEUES="1000000")
    exporter.scrape()
    broker.faults = {broker.paths[module]: hang for module in ("overview", "queue")}
    started = time.monotonic()
    assert_only_failed(exporter.scrape(), "overview", "queue")
    assert time.monotonic() - started < 1.9


FAULTS = {
    "server error": (answer(b"{}", 500), "HTTP 500"),
    "not found": (answer(b"[]", 404), "HTTP 404"),
    "broken off": (break_off, "the answer broke off"),
    "empty": (answer(b""), "the answer is no JSON"),
    "garbage": (answer(b"<html>\xff"), "the answer is no JSON"),
    "cut": (answer(b'[{"name": "a"'), "the answer is no JSON"),
    "infinite": (answer(b'[{"name": "a", "x": Infinity}]'), "the answer is no JSON"),
    "nested": (answer(b"[" * 100000), "the answer is no JSON"),
    "deep": (answer(b'[{"name":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}]"), "the answer"),
    "text": (answer(b'"queues"'), "the answer is JSON of an unexpected shape"),
    "null": (answer(b"null"), "the answer is JSON of an unexpected shape"),
    "object": (answer(b'{"error": "x"}'), "the answer "),
    "list of numbers": (answer(b"[1, 2]"), "the answer is JSON of an unexpected shape"),
    "nameless": (answer(b"[{}]"), "the answer "),
}


@pytest.mark.parametrize("module", DEFAULT)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_cannot_be_used_fails_its_module_alone(
    broker: FakeBroker,
    export: Callable[..., Exporter],
    caplog: pytest.LogCaptureFixture,
    module: str,
    fault: str,
) -> None:
    exporter = export()
    exporter.scrape()
    broker.faults[broker.paths[module]], reason = FAULTS[fault]
    assert_only_failed(exporter.scrape(), module)
    assert [one for one in caplog.messages if one.startswith(f"{module}: {reason}")]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "many"},
        {"messages": 10**400},
        {"messages": None, "message_stats": [], "arguments": 3, "members": {}},
        {"durable": "yes", "policy": None, "state": [], "node": {}, "idle_since": 3},
    ],
)
def test_an_odd_field_costs_no_more_than_itself(
    broker: FakeBroker, export: Callable[..., Exporter], fields: dict[str, Any]
) -> None:
    broker.pages["/api/queues"].append(broker.queue(lambda: 1, "other") | fields)
    scraped = export().scrape()
    assert_only_failed(scraped)
    names = [one["queue"] for one in scraped.labels("rabbitmq_queue_memory")]
    assert names == ["takeaway", "other"]


def test_a_wrong_password_is_told_and_not_shown(
    broker: FakeBroker, export: Callable[..., Exporter], caplog: pytest.LogCaptureFixture
) -> None:
    broker.password = "päss:wörd"
    scraped = export(RABBIT_PASSWORD="s3cret").scrape()
    assert scraped.modules() == dict.fromkeys(DEFAULT, 0)
    assert caplog.messages == [f"{module}: HTTP 401" for module in DEFAULT]
    assert "s3cret" not in caplog.text + scraped.text
    assert_only_failed(export(RABBIT_PASSWORD="päss:wörd").scrape())


def test_the_log_has_a_line_for_each_change_and_none_for_each_scrape(
    loop: Loop,
    broker: FakeBroker,
    export: Callable[..., Exporter],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "exporter")
    exporter = export()

    def told() -> list[str]:
        caplog.clear()
        for _ in range(2):
            exporter.scrape()
        return caplog.messages

    assert told() == []
    broker.faults["/api/queues"] = answer(b"", 500)
    assert told() == ["queue: HTTP 500"]
    broker.faults["/api/queues"] = answer(b"", 503)
    assert told() == ["queue: HTTP 503"]
    broker.faults.clear()
    assert told() == ["queue: answered again"]
    loop.run(broker.stop())
    away = told()
    assert [line.split(": ")[0] for line in away] == DEFAULT
    assert all("Connect call failed" in line for line in away)
    loop.run(broker.start())
    assert told() == [f"{module}: answered again" for module in DEFAULT]


def test_all_modules_are_asked_at_the_same_time(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    arrived: list[str] = []

    async def wait_for_the_others(request: web.Request) -> web.StreamResponse:
        arrived.append(request.path)
        while len(arrived) < len(broker.paths):
            await asyncio.sleep(0.01)
        return web.json_response(broker.pages[request.path])

    broker.faults = dict.fromkeys(broker.pages, wait_for_the_others)
    scraped = export(RABBIT_EXPORTERS=broker.modules, RABBIT_TIMEOUT="3").scrape()
    assert set(scraped.modules().values()) == {1}
    assert sorted(arrived) == sorted(broker.pages)


def test_scrapes_at_once_do_not_touch_each_other(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export()
    with ThreadPoolExecutor(8) as pool:
        scrapes = list(pool.map(lambda _: exporter.scrape(), range(24)))
    for scraped in scrapes:
        assert_only_failed(scraped)
        assert scraped.samples.keys() == scrapes[0].samples.keys()
    assert len(broker.asked) == 24 * len(DEFAULT)


def test_a_scrape_during_a_slow_one_waits_for_nothing(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export(RABBIT_TIMEOUT="3")
    slow = True

    async def first_hangs(request: web.Request) -> web.StreamResponse:
        nonlocal slow
        if slow:
            slow = False
            await asyncio.sleep(3600)
        return web.json_response(broker.pages[request.path])

    exporter.scrape()
    broker.faults["/api/queues"] = first_hangs
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(exporter.scrape)
        while slow:
            time.sleep(0.01)
        started = time.monotonic()
        assert_only_failed(exporter.scrape())
        assert time.monotonic() - started < 2
        assert_only_failed(first.result(), "queue")


def test_health_follows_the_last_scrape(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    exporter = export()
    assert exporter.get("/health")[0] == 200
    broker.faults["/api/queues"] = answer(b"", 500)
    exporter.scrape()
    assert exporter.get("/health")[0] == 504
    broker.faults.clear()
    assert exporter.get("/health")[0] == 504
    exporter.scrape()
    assert exporter.get("/health")[0] == 200


def test_the_page_links_to_the_metrics_and_nothing_else_is_there(
    export: Callable[..., Exporter],
) -> None:
    exporter = export()
    status, content_type, body = exporter.get("/")
    assert (status, content_type) == (200, "text/html; charset=utf-8")
    assert 'href="/metrics"' in body
    assert [exporter.get(path)[0] for path in ("/metric", "/metrics/x", "/api")] == [404] * 3


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text; version=1.0.0", "text/plain; version=1.0.0; escaping=allow"],
)
def test_the_format_is_the_classic_one_whatever_is_asked_for(
    export: Callable[..., Exporter], accept: str
) -> None:
    status, content_type, body = export().get("/metrics", Accept=accept)
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "# EOF" not in body
    assert "\n# TYPE rabbitmq_queue_disk_reads_total counter\n" in body
