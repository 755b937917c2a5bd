"""What the exporter promises of Fluentd, and of the broker while Fluentd is ill or away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Exporter, FakeBroker, Loop, Scraped

FIELDS = {
    "fluentd_output_status_retry_count": "retry_count",
    "fluentd_output_status_buffer_total_bytes": "buffer_total_queued_size",
    "fluentd_output_status_buffer_queue_length": "buffer_queue_length",
    "fluentd_output_status_buffer_available_space_ratio": "buffer_available_buffer_space_ratios",
    "fluentd_output_status_emit_records": "emit_records",
    "fluentd_output_status_write_count": "write_count",
}
FILES = {"plugin_id": "files", "plugin_category": "output", "type": "file"}


def output(number: float = 0, **fields: Any) -> dict[str, Any]:
    """Return an output plugin as Fluentd tells of it, with another number in each field."""
    numbers = {field: number + index for index, field in enumerate(FIELDS.values())}
    more = {"output_plugin": True, "buffer_timekeys": [0], "emit_size": 0}
    return FILES | more | numbers | fields


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def plugins(*found: dict[str, Any]) -> bytes:
    return reply(json.dumps({"plugins": found}).encode())


class FakeFluentd:
    """Answers each request with the same bytes; without any it never does."""

    def __init__(self) -> None:
        self.answer = plugins(output(1))
        # What is sent over and over behind the answer.
        self.more = b""
        self.asked: list[bytes] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.asked.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(self.answer)
                while self.more:
                    writer.write(self.more)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if not self.answer.startswith(b"HTTP/1.1 200") and self.answer:
                    break
        writer.close()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()


@pytest.fixture
def fluentd(loop: Loop) -> Iterator[FakeFluentd]:
    fluentd = FakeFluentd()
    loop.run(fluentd.start())
    yield fluentd
    loop.run(fluentd.stop())


@pytest.fixture
def both(export: Callable[..., Exporter], fluentd: FakeFluentd) -> Callable[..., Exporter]:
    """Start an exporter for the broker and Fluentd with these variables."""

    def both(**variables: str) -> Exporter:
        return export(FLUENTD_URL=f"http://127.0.0.1:{fluentd.port}", **variables)

    return both


def told(scraped: Scraped) -> set[str]:
    return {name for name in scraped.types if name.startswith("fluentd_")}


def assert_down(scraped: Scraped) -> None:
    assert told(scraped) == {"fluentd_up"}
    assert scraped.value("fluentd_up") == 0
    assert set(scraped.modules().values()) == {1}


def test_each_output_with_a_buffer_is_told_as_the_plugin_for_prometheus_does(
    both: Callable[..., Exporter], fluentd: FakeFluentd
) -> None:
    fluentd.answer = plugins(output(1), output(11.5, plugin_id="other", type="copy"))
    scraped = both().scrape()
    assert scraped.value("fluentd_up") == 1
    assert told(scraped) == {"fluentd_up", *FIELDS}
    other = FILES | {"plugin_id": "other", "type": "copy"}
    for index, name in enumerate(FIELDS):
        assert scraped.types[name] == "gauge"
        assert scraped.labels(name) == [FILES, other]
        assert scraped.value(name, **FILES) == 1 + index
        assert scraped.value(name, **other) == 11.5 + index


def test_other_plugins_and_outputs_without_a_buffer_are_not_told(
    both: Callable[..., Exporter], fluentd: FakeFluentd
) -> None:
    source = {"plugin_id": "object:1", "plugin_category": "input", "type": "forward"}
    stdout = {**FILES, "plugin_id": "out", "type": "stdout", "retry_count": 0, "emit_records": 3}
    fluentd.answer = plugins(source, output(plugin_category="filter"), stdout)
    scraped = both().scrape()
    assert told(scraped) == {"fluentd_up"}
    assert scraped.value("fluentd_up") == 1


def test_a_number_that_is_missing_or_none_costs_its_own_sample(
    both: Callable[..., Exporter], fluentd: FakeFluentd
) -> None:
    fluentd.answer = plugins(output(retry_count=None, write_count="many"))
    assert told(both().scrape()) == {"fluentd_up", *FIELDS} - {
        "fluentd_output_status_retry_count",
        "fluentd_output_status_write_count",
    }


def test_two_plugins_of_one_name_are_one_sample(
    both: Callable[..., Exporter], fluentd: FakeFluentd
) -> None:
    fluentd.answer = plugins(output(1), output(2))
    assert both().scrape().value("fluentd_output_status_retry_count", **FILES) == 2


def test_without_its_url_nothing_of_fluentd_is_told(export: Callable[..., Exporter]) -> None:
    assert "fluentd" not in export().scrape().text


def test_the_question_is_fluentds_and_has_no_password(
    both: Callable[..., Exporter], fluentd: FakeFluentd
) -> None:
    exporter = both()
    exporter.scrape()
    exporter.scrape()
    assert len(fluentd.asked) == 2
    for head in fluentd.asked:
        assert head.startswith(b"GET /api/plugins.json HTTP/1.1\r\n")
        assert b"authorization" not in head.lower()


RUBBISH = {
    "server error": (reply(b"{}", "500 Oops"), "HTTP 500"),
    "not found": (reply(b"{}", "404 Not Found"), "HTTP 404"),
    "no HTTP": (b"\x93\xa8rabbit\r\n\r\n", ""),
    "round and round": (reply(b"", "302 Found\r\nLocation: /"), ""),
    "no gzip": (reply(b"rubbish", "200 OK\r\nContent-Encoding: gzip"), ""),
    "empty": (reply(b""), "the answer is no JSON"),
    "garbage": (reply(b"<html>\xff"), "the answer is no JSON"),
    "nested": (reply(b"[" * 100000), "the answer is no JSON"),
    "list": (reply(b"[]"), "the answer is JSON of an unexpected shape"),
    "null": (reply(b"null"), "the answer is JSON of an unexpected shape"),
    "object": (reply(b"{}"), "the answer is JSON of an unexpected shape"),
    "numbers": (reply(b'{"plugins": [1]}'), "the answer is JSON of an unexpected shape"),
    "nameless": (reply(b'{"plugins": [{}]}'), "the answer lacks a plugin_id"),
    "too much": (reply(b'{"plugins": []}' + b" " * (1 << 20)), "the answer has more than 1048576"),
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_an_answer_that_cannot_be_used_is_fluentd_down_and_nothing_else(
    both: Callable[..., Exporter],
    fluentd: FakeFluentd,
    caplog: pytest.LogCaptureFixture,
    rubbish: str,
) -> None:
    exporter = both()
    fluentd.answer, reason = RUBBISH[rubbish]
    scraped = exporter.scrape()
    assert_down(scraped)
    assert "rabbitmq_queue_messages" in scraped.types
    assert scraped.value("rabbitmq_up", cluster="rabbit@broker1", node="rabbit@broker1") == 1
    assert exporter.get("/health")[0] == 200
    (line,) = caplog.messages
    assert line.startswith(f"fluentd: {reason}")
    assert "\n" not in line


@pytest.mark.parametrize("more", [b"", b" "], ids=["hangs", "trickles"])
def test_a_slow_fluentd_costs_one_time_out(
    both: Callable[..., Exporter], fluentd: FakeFluentd, more: bytes
) -> None:
    exporter = both(RABBIT_TIMEOUT="1")
    exporter.scrape()
    fluentd.answer = b"HTTP/1.1 200 OK\r\n\r\n" if more else b""
    fluentd.more = more
    started = time.monotonic()
    assert_down(exporter.scrape())
    assert 0.9 < time.monotonic() - started < 1.9
    fluentd.more = b""


def test_an_endless_answer_is_not_read_to_its_end(
    both: Callable[..., Exporter], fluentd: FakeFluentd, caplog: pytest.LogCaptureFixture
) -> None:
    fluentd.answer, fluentd.more = b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536
    assert_down(both().scrape())
    assert caplog.messages == ["fluentd: the answer has more than 1048576 bytes"]
    fluentd.more = b""


def test_fluentd_is_asked_while_the_broker_hangs(
    both: Callable[..., Exporter], broker: FakeBroker
) -> None:
    hangs = True

    async def hang(_: web.Request) -> web.StreamResponse:
        while hangs:
            await asyncio.sleep(0.01)
        return web.Response()

    broker.faults = dict.fromkeys(broker.pages, hang)
    started = time.monotonic()
    scraped = both(RABBIT_TIMEOUT="1").scrape()
    assert time.monotonic() - started < 1.9
    hangs = False
    assert set(scraped.modules().values()) == {0}
    assert told(scraped) == {"fluentd_up", *FIELDS}


def test_the_log_has_a_line_when_fluentd_goes_and_one_when_it_is_back(
    loop: Loop,
    both: Callable[..., Exporter],
    fluentd: FakeFluentd,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "exporter")
    exporter = both()

    def lines() -> list[str]:
        caplog.clear()
        for _ in range(2):
            exporter.scrape()
        return caplog.messages

    assert lines() == []
    loop.run(fluentd.stop())
    (away,) = lines()
    assert away.startswith("fluentd: ")
    assert "Connect call failed" in away
    assert_down(exporter.scrape())
    loop.run(fluentd.start())
    assert lines() == ["fluentd: answered again"]
    assert exporter.scrape().value("fluentd_up") == 1
