"""One structured event for each request, sent to Fluentd's forward input in the background.

An event that cannot be sent is kept within a bound, else dropped and counted. What was written to
a collector that ends before it read it is lost uncounted: fluent-logger asks for no
acknowledgement. What was written only in part is written again as a whole.
"""

import atexit
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from secrets import token_hex
from typing import Protocol

from fluent.sender import EventTime, FluentSender
from msgpack import Packer
from prometheus_client import Counter

log = logging.getLogger(__name__)

# The header that carries a request's id over HTTP, and with its message over AMQP.
REQUEST_ID = "X-Request-Id"
GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Characters of a text in an event; more are cut off, as clients choose paths and message ids.
MAX_TEXT = 200

# Events kept while the collector is away, about 300 bytes each; then the oldest are dropped.
MAX_WAITING = 10_000
# Events in one send. If it fails, they are kept besides MAX_WAITING.
MAX_BATCH = 1000
# Seconds between two sends: what comes meanwhile shares the next one.
PAUSE = 0.1
# Seconds between two attempts while the collector is away: PAUSE, doubled up to this.
LAST_DELAY = 2.0
# Seconds that close() gives to the last events.
CLOSE_TIMEOUT = 2.0

DROPPED = Counter("events_dropped", "Events that were not sent to the collector")

Value = str | int | float | None


class Sink(Protocol):
    """Where events go, and what fluent-logger's senders offer."""

    def emit(self, label: str | None, data: Mapping[str, Value]) -> bool:
        """Take data now, without waiting for its way; whether it was taken."""


class Sender(FluentSender):  # type: ignore[misc]
    """fluent-logger's sender, with a thread that sends what has come since it last did.

    Its own asynchronous one sends each event alone, and takes twice as long to take one in. Of
    0.11.1, emit() and close() are replaced, and `_send_data` and `_close` used; no other module
    uses fluent-logger's private parts. `_batch` belongs to the thread.
    """

    _closed: bool

    def __init__(self, tag: str, host: str, port: int) -> None:
        """Start the thread, so make one per worker process, after the fork."""
        super().__init__(tag, host, port)
        self._pack = Packer(unicode_errors="replace").pack
        self._waiting: deque[bytes] = deque()
        self._batch: list[bytes] = []
        self._away = False
        # That there is an event, or that close() was called.
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_loop, name="events", daemon=True)
        self._thread.start()

    def emit(self, label: str | None, data: Mapping[str, Value]) -> bool:  # noqa: ARG002
        """Take data, and wake the thread; False after close()."""
        now = EventTime.from_unix_nano(time.time_ns())
        with self.lock:
            if self._closed:
                DROPPED.inc()
                return False
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                DROPPED.inc()
            self._waiting.append(self._pack((self.tag, now, data)))
        if not self._wanted.is_set():
            self._wanted.set()
        return True

    def close(self) -> None:
        """Send what waits, within CLOSE_TIMEOUT, and count the rest as dropped.

        What the thread is still sending then counts as dropped although it may arrive.
        """
        with self.lock:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        self._wanted.set()
        self._thread.join(CLOSE_TIMEOUT)
        left = len(self._batch) + len(self._waiting)
        if left:
            DROPPED.inc(left)
            log.warning("%d events were dropped at the end", left)

    # What follows runs in the thread.

    def _send_loop(self) -> None:
        delay = PAUSE
        while self._fill_batch():
            if self._send_batch():
                delay = PAUSE
            elif self._closing.is_set():
                break
            else:
                delay = min(2 * delay, LAST_DELAY)
            self._closing.wait(delay)
        self._close()

    def _fill_batch(self) -> bool:
        """Wait for events unless some are left; False when none is and close() was called."""
        while not self._batch:
            self._wanted.wait()
            # Before the look: what comes after it sets it again.
            self._wanted.clear()
            # Before it, too: once it is set, nothing comes after the look.
            closing = self._closing.is_set()
            with self.lock:
                count = min(MAX_BATCH, len(self._waiting))
                self._batch = [self._waiting.popleft() for _ in range(count)]
            if self._waiting or closing:
                self._wanted.set()
            if closing:
                break
        return bool(self._batch)

    def _send_batch(self) -> bool:
        """Send the batch by one call; whether it was sent. One line tells of each change."""
        try:
            self._send_data(b"".join(self._batch))
        except Exception as error:  # whatever it was, the answer is the next attempt
            self._close()
            if not self._away:
                log.warning("No events reach %s:%d: %s", self.host, self.port, error)
            self._away = True
            return False
        if self._away:
            log.info("Events reach %s:%d again", self.host, self.port)
        self._away = False
        self._batch = []
        return True


class Event:
    """What is told of one request, once; `fields` may be added to until then."""

    def __init__(self, sink: Sink | None, request_id: str | None) -> None:
        """Begin now; a request_id that is missing or not a GOOD_ID is replaced by a new one."""
        self.started = time.perf_counter()
        # Seconds since then for which the client had asked to wait.
        self.waited = 0.0
        self.request_id = good_id(request_id) or token_hex(16)
        self.fields: dict[str, Value] = {}
        # Whether it is told at the end of the response, not at its beginning.
        self.deferred = False
        self._sink = sink

    @property
    def busy(self) -> float:
        """Seconds since its start in which something was to be done."""
        return time.perf_counter() - self.started - self.waited

    def tell(self, status: int, level: str | None = None) -> None:
        """Send the event, with the time since its start; level follows from status, or is given.

        Fields that are None are left out, and texts are cut to MAX_TEXT characters.
        """
        if self._sink is None:
            return
        told: dict[str, Value] = {
            "level": level or _level(status),
            "request_id": self.request_id,
            **self.fields,
            "status": status,
            "duration_ms": round((time.perf_counter() - self.started) * 1000, 3),
        }
        for name, value in self.fields.items():
            if value is None:
                del told[name]
            elif isinstance(value, str) and len(value) > MAX_TEXT:
                told[name] = value[:MAX_TEXT]
        self._sink.emit(None, told)


def start(tag: str, host: str | None, port: int) -> Sender | None:
    """Return this process's sender to a collector, closed at its end; None without a host."""
    if host is None:
        return None
    sender = Sender(tag, host, port)
    atexit.register(sender.close)
    return sender


def good_id(value: object) -> str | None:
    """Return value when it is a request id as this project takes it."""
    return value if isinstance(value, str) and GOOD_ID.fullmatch(value) else None


def _level(status: int) -> str:
    if status < 400:
        return "info"
    return "warning" if status < 500 else "error"
