"""What the sender of events promises, against a collector that can leave, hang and return."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from common import events
from common.events import DROPPED, Event, Sender

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
    sender = events.start("publisher", "127.0.0.1", collector.port)
    assert sender is not None
    yield sender
    sender.close()


def dropped() -> float:
    return float(DROPPED._value.get())


def emit(sender: Sender, numbers: range) -> None:
    for number in numbers:
        assert sender.emit(None, {"n": number})


def test_an_event_has_its_fields_its_tag_its_time_and_what_it_took(
    sender: Sender, collector: Collector
) -> None:
    before = time.time()
    event = Event(sender, "a.B-9_")
    event.fields |= {"event": "publish", "path": "x" * 500, "nothing": None}
    event.tell(200)
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
        "request_id": "a.B-9_",
        "event": "publish",
        "path": "x" * 200,
        "status": 200,
    }


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
    caplog.set_level("INFO", "common.events")
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
    sender: Sender, collector: Collector, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 20)
    released = threading.Event()
    if trouble == "away":
        collector.end()
    else:  # as the DNS does for a container that is stopped, and a send to one that is stuck
        monkeypatch.setattr(sender, "_send_data", lambda _: released.wait(DEADLINE))
    before = dropped()
    Event(sender, None).tell(200)
    eventually(lambda: bool(sender._batch))
    slowest = 0.0
    for _ in range(50):
        started = time.monotonic()
        Event(sender, None).tell(200)
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 0.5
    assert dropped() == before + 30
    released.set()


def test_what_is_dropped_is_the_oldest_and_what_is_new_arrives(
    sender: Sender, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 20)
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
    assert not sender._thread.is_alive()


def test_an_event_that_comes_just_after_a_look_for_none_is_sent(
    sender: Sender, collector: Collector
) -> None:
    class Late:
        """The sender's lock; an event comes once it is given back."""

        def __init__(self) -> None:
            self.lock, self.due = sender.lock, True

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_error: object) -> None:
            self.lock.release()
            if self.due:
                self.due = False
                emit(sender, range(1))

    sender.lock = Late()
    # As after an event that was taken together with the one before.
    sender._wanted.set()
    eventually(lambda: collector.numbers == [0])
    assert sender._thread.is_alive()


def test_without_a_collector_requests_are_answered_and_nothing_is_sent() -> None:
    assert events.start("publisher", None, 24224) is None
