"""What the sender of events promises, against a collector that can leave, hang and return."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from door import BrokerUnavailable, events
from door.call import Answer, Call, json_answer
from door.events import DROPPED, Sender
from door.settings import Access, EventSettings
from door.web import equip
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.exceptions import abort

DEADLINE = 5  # seconds any promise may take


def eventually(condition: Callable[[], bool]) -> None:
    """Poll condition until it holds; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)


class Collector:
    """A port on which a collector listens or not; one that hangs accepts but does not read."""

    def __init__(self) -> None:
        self.packets: list[Any] = []
        self.hangs = False
        self.port = 0
        self._open: list[tuple[socket.socket, threading.Thread]] = []

    def begin(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._accepter = threading.Thread(target=self._accept, daemon=True)
        self._accepter.start()

    def end(self) -> None:
        self._stop(self._listener, self._accepter)
        while self._open:
            self._stop(*self._open.pop())

    def _stop(self, end: socket.socket, thread: threading.Thread) -> None:
        with suppress(OSError):  # it ended by itself
            end.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE)
        end.close()

    @property
    def records(self) -> list[Any]:
        return [record for _, _, record in self.packets]

    @property
    def numbers(self) -> list[int]:
        return [record["n"] for record in self.records]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._read, args=[connection], daemon=True)
            self._open.append((connection, thread))
            thread.start()

    def _read(self, connection: socket.socket) -> None:
        unpacker = msgpack.Unpacker()
        while not self.hangs:
            try:
                data = connection.recv(65536)
            except OSError:
                return
            if not data:
                return
            unpacker.feed(data)
            self.packets.extend(unpacker)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    collector.begin()
    yield collector
    collector.end()


@pytest.fixture
def sender(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setattr(events, "LAST_DELAY", 0.1)
    sender = events.start("publisher", EventSettings("127.0.0.1", collector.port))
    assert sender is not None
    yield sender
    sender.close()


def data(call: Call) -> Answer:
    call.event.fields |= {"event": "publish", "queue": "takeaway", "message_id": "m"}
    match call.query("fault", "secret").get("fault"):
        case "caller":
            abort(400, "That was wrong." * 100)
        case "broker":
            raise BrokerUnavailable("The broker is away.")
        case "code":
            raise ZeroDivisionError("the code's secret")
    return json_answer(200, "done")


@pytest.fixture
def client(sender: Sender, tmp_path: Path) -> FlaskClient:
    (tmp_path / "openapi.json").write_text("{}")
    app = Flask("door", root_path=str(tmp_path))
    equip(app, SimpleNamespace(up=True), sender, Access(), {("POST", "/data"): data})
    return app.test_client()


def dropped() -> float:
    return float(DROPPED._value.get())


def emit(sender: Sender, numbers: range) -> None:
    for number in numbers:
        assert sender.emit(None, {"n": number})


def test_an_event_has_the_request_s_fields_its_tag_and_its_time(
    client: FlaskClient, collector: Collector
) -> None:
    before = time.time()
    client.post("/data?secret", data="secret", headers={"X-Request-Id": "a.B-9_"})
    eventually(lambda: len(collector.packets) == 1)
    tag, stamp, record = collector.packets[0]
    assert tag == "publisher"
    assert stamp.code == 0
    seconds, nanoseconds = (int.from_bytes(stamp.data[i : i + 4]) for i in (0, 4))
    assert before - 0.001 <= seconds + nanoseconds / 1e9 <= time.time()
    duration = record.pop("duration_ms")
    assert isinstance(duration, float)
    assert 0 < duration < 1000 * DEADLINE
    assert duration == round(duration, 3)
    assert record == {
        "level": "info",
        "event": "publish",
        "request_id": "a.B-9_",
        "message_id": "m",
        "queue": "takeaway",
        "status": 200,
    }


@pytest.mark.parametrize(
    ("fault", "status", "level", "reason"),
    [
        ("caller", 400, "warning", ("That was wrong." * 100)[:200]),
        ("broker", 503, "error", "The broker is away."),
        ("code", 500, "error", None),
    ],
)
def test_an_error_s_event_has_its_level_and_its_reason(
    client: FlaskClient,
    collector: Collector,
    fault: str,
    status: int,
    level: str,
    reason: str | None,
) -> None:
    answer = client.post(f"/data?fault={fault}", headers={"X-Request-Id": "mine"})
    assert answer.headers["X-Request-Id"] == "mine"
    eventually(lambda: len(collector.records) == 1)
    record = collector.records[0]
    assert (record["status"], record["level"], record["event"]) == (status, level, "publish")
    assert reason is None or record["reason"] == reason
    assert "secret" not in str(record)


def test_any_other_request_is_told_by_method_and_path_without_its_query(
    client: FlaskClient, collector: Collector
) -> None:
    client.post(f"/{'x' * 500}?secret")
    client.get("/%ff")
    eventually(lambda: len(collector.records) == 2)
    first, second = collector.records
    assert (first["event"], first["method"], first["status"]) == ("request", "POST", 404)
    assert first["path"] == "/" + "x" * 199
    assert second["path"] == "/\ufffd"
    assert "secret" not in str(first)


def test_health_and_metrics_have_no_event(client: FlaskClient, collector: Collector) -> None:
    for path in "/healthz", "/healthz?ready", "/metrics", "/last":
        client.get(path)
    eventually(lambda: bool(collector.records))
    assert [record["path"] for record in collector.records] == ["/last"]


@pytest.mark.parametrize("good", ["a", "0af7651916cd43dd", "A.b_c-1", "x" * 128])
def test_a_good_request_id_comes_back(client: FlaskClient, good: str) -> None:
    for path in "/data", "/nowhere", "/healthz":
        assert client.post(path, headers={"X-Request-Id": good}).headers["X-Request-Id"] == good


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", "a,b", "ä", "{}", None])
def test_a_bad_request_id_is_replaced_by_one_of_its_own(
    client: FlaskClient, collector: Collector, bad: str | None
) -> None:
    headers = {} if bad is None else {"X-Request-Id": bad}
    answers = [client.post("/data", headers=headers) for _ in range(2)]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert ids[0] != ids[1]
    assert all(len(id_) == 32 and events.good_id(id_) for id_ in ids)
    eventually(lambda: [record["request_id"] for record in collector.records] == ids)


def test_a_text_that_utf_8_cannot_carry_is_sent_with_a_question_mark(
    sender: Sender, collector: Collector
) -> None:
    sender.emit(None, {"path": "a\udcff"})
    eventually(lambda: collector.records == [{"path": "a?"}])


def test_events_that_come_together_go_together_and_in_order(
    sender: Sender, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    send = sender._send_data

    def count_and_send(data: bytes) -> None:
        calls.append(len(data))
        send(data)

    monkeypatch.setattr(sender, "_send_data", count_and_send)
    emit(sender, range(3000))
    eventually(lambda: collector.numbers == list(range(3000)))
    assert 3 <= len(calls) <= 10


def test_events_wait_for_a_collector_that_is_away_and_arrive_in_order(
    sender: Sender, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "door.events")
    before = dropped()
    emit(sender, range(1))
    eventually(lambda: collector.numbers == [0])
    collector.end()
    emit(sender, range(1, 100))
    eventually(lambda: "No events reach" in caplog.text)
    emit(sender, range(100, 200))
    collector.begin()
    eventually(lambda: collector.numbers == list(range(200)))
    eventually(lambda: "again" in caplog.text)
    assert dropped() == before
    assert len(caplog.records) == 2


@pytest.mark.parametrize("trouble", ["away", "hangs"])
def test_no_request_waits_or_fails_and_the_oldest_that_cannot_wait_are_counted(
    client: FlaskClient,
    sender: Sender,
    collector: Collector,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender._queue, "maxsize", 20)
    released = threading.Event()
    if trouble == "away":
        collector.end()
    else:  # as the DNS does for a container that is stopped, and a send to one that is stuck
        monkeypatch.setattr(sender, "_send_data", lambda _: released.wait(DEADLINE))
    before = dropped()
    client.post("/data")
    eventually(lambda: bool(sender._batch))
    slowest = 0.0
    for _ in range(50):
        started = time.monotonic()
        assert client.post("/data").status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 0.5
    assert dropped() == before + 30
    released.set()


def test_what_is_dropped_is_the_oldest_and_what_is_new_arrives(
    sender: Sender, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender._queue, "maxsize", 20)
    collector.end()
    emit(sender, range(1))
    eventually(lambda: bool(sender._batch))
    emit(sender, range(1, 51))
    collector.begin()
    eventually(lambda: collector.numbers == [0, *range(31, 51)])


def test_a_collector_that_hangs_with_an_open_connection_is_left_and_served_when_back(
    sender: Sender, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "timeout", 0.3)
    collector.hangs = True
    # More than the system's buffers take for a collector that does not read: what they take
    # whole is lost.
    sender.emit(None, {"n": 0, "text": "x" * 16_000_000})
    eventually(lambda: sender._away)
    emit(sender, range(1, 10))
    collector.hangs = False
    eventually(lambda: collector.numbers == list(range(10)))


def test_close_sends_what_waits_for_the_next_send(
    sender: Sender, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PAUSE", 60)
    emit(sender, range(1))
    eventually(lambda: collector.numbers == [0])
    emit(sender, range(1, 2500))
    sender.close()
    eventually(lambda: collector.numbers == list(range(2500)))


@pytest.mark.parametrize(("trouble", "seconds"), [("away", 1), ("hangs", 2.5)])
def test_close_ends_in_time_and_counts_what_it_could_not_send(
    sender: Sender,
    collector: Collector,
    trouble: str,
    seconds: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = dropped()
    release = threading.Event()
    if trouble == "away":
        collector.end()
    else:
        sender._send_data = lambda _: release.wait(DEADLINE)
    emit(sender, range(1))
    eventually(lambda: bool(sender._batch))
    emit(sender, range(1, 2000))
    started = time.monotonic()
    sender.close()
    assert time.monotonic() - started < seconds
    assert dropped() == before + 2000
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-1] == "2000 events were dropped at the end"
    assert len(lines) <= 2
    release.set()


def test_an_event_after_the_close_is_counted(sender: Sender) -> None:
    before = dropped()
    sender.close()
    sender.close()
    assert not sender.emit(None, {"n": 0})
    assert dropped() == before + 1


@pytest.mark.parametrize("sent", [0, 1])
def test_closing_an_idle_sender_is_quick(sender: Sender, collector: Collector, sent: int) -> None:
    emit(sender, range(sent))
    eventually(lambda: len(collector.numbers) == sent)
    started = time.monotonic()
    sender.close()
    assert time.monotonic() - started < 1
    assert not sender._send_thread.is_alive()


def test_without_a_collector_requests_are_answered_and_nothing_is_sent() -> None:
    assert events.start("publisher", EventSettings()) is None


def test_the_count_of_dropped_events_is_there_before_the_first(client: FlaskClient) -> None:
    assert "events_dropped_total" in client.get("/metrics").text
