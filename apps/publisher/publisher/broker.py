"""Confirmed publishing over one long-lived connection, whose I/O has a thread of its own.

Request threads put messages into an outbox and wait; the I/O thread sends them and settles them
when the broker confirms (https://www.rabbitmq.com/docs/confirms). So heartbeats are served while
no request comes, and many requests share one connection, one wake-up and one confirm.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from door import BrokerUnavailable
from door.events import REQUEST_ID
from door.web import BROKER_UP
from pika.adapters.select_connection import SelectConnection
from pika.channel import Channel
from pika.frame import Method
from pika.spec import Basic, BasicProperties

from publisher.settings import Settings

log = logging.getLogger(__name__)

# Seconds between two attempts to connect: doubled up to the last, reset by a confirm.
FIRST_DELAY = 0.2
LAST_DELAY = 2.0

UNSENT = "the message was not published"
UNKNOWN = "whether the message was published is unknown"


class _Message:
    """One message on its way to the broker, and the request that waits for it."""

    __slots__ = ("_gate", "body", "error", "given_up", "id", "request_id", "settled", "signs")

    def __init__(self, body: bytes, message_id: str, request_id: str, signs: int) -> None:
        self.body = body
        self.id = message_id
        self.request_id = request_id
        self.signs = signs
        self.settled = False
        self.given_up = False
        self.error: str | None = None
        # A held lock: waiting for its release costs a fraction of a threading.Event.
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self, timeout: float) -> bool:
        """Wait up to timeout seconds; whether the message is settled."""
        return self._gate.acquire(timeout=timeout)

    def settle(self, error: str | None = None) -> None:
        """Let the request go on, once and for all; only the I/O thread may call this."""
        if not self.settled:
            self.error = error
            self.settled = True
            self._gate.release()


class Broker:
    """A connection to RabbitMQ that publishes with confirms and reconnects for ever.

    `_lock` guards what both sides touch: `_ready`, `_blocked`, `_wakeup_due` and the use of
    `_connection` from request threads. Everything else belongs to the I/O thread.
    """

    def __init__(
        self, settings: Settings, connect: Callable[..., SelectConnection] = SelectConnection
    ) -> None:
        """Start to connect; make one per worker process, after the fork."""
        self._settings = settings
        self._connect = connect
        self._lock = threading.Lock()
        self._connection: SelectConnection | None = None
        self._channel: Channel | None = None
        self._ready = False
        self._blocked = False
        self._outbox: deque[_Message] = deque()
        self._wakeup_due = False
        # Delivery tag → message, in the order of publishing, so that a multiple ack is a prefix.
        self._unconfirmed: dict[int, _Message] = {}
        self._returned: dict[str, str] = {}
        self._tag = 0
        # Counts confirms and new channels: unchanged over a whole time-out, the broker is silent.
        self._signs = 0
        self._delay = FIRST_DELAY
        self._failed = False
        self._complaint = ""
        self._update_gauge()
        threading.Thread(target=self._run, name="broker", daemon=True).start()

    @property
    def up(self) -> bool:
        """Whether a message can be published now: connected, confirms on, not blocked."""
        return self._ready and not self._blocked

    def publish(self, body: bytes, message_id: str, request_id: str) -> None:
        """Publish body once, persistent and mandatory, and wait for the broker's confirm.

        message_id must be unique; request_id travels with the message as its X-Request-Id.
        Raises BrokerUnavailable at once when the broker is away, blocks or silent; when it nacks
        or returns the message; when the connection ends or blocks while waiting; and when no
        confirm comes within the time-out, which renews the connection if nothing else was
        confirmed meanwhile. The message may then still be in the queue.
        """
        message = _Message(body, message_id, request_id, self._signs)
        with self._lock:
            if self._connection is None or not self.up:
                state = "blocks publishers" if self._blocked else "is not connected"
                raise BrokerUnavailable(f"The broker {state}; {UNSENT}.")
            self._outbox.append(message)
            if not self._wakeup_due:
                self._wakeup_due = True
                self._connection.ioloop.add_callback_threadsafe(self._flush)
        if not message.wait(self._settings.confirm_timeout):
            message.given_up = True
            self._time_out(message)
        if message.error is not None:
            raise BrokerUnavailable(message.error)

    def _time_out(self, message: _Message) -> None:
        """Give up message, unless it is settled just now, and the connection if it is silent.

        A silent connection is renewed rather than waited for: a confirm that got lost would keep
        it silent for ever, and requests that queue behind busy threads must fail at once.
        """
        seconds = self._settings.confirm_timeout
        with self._lock:
            if self._connection and self._ready and self._signs == message.signs:
                self._ready = False
                self._connection.ioloop.add_callback_threadsafe(
                    lambda: self._ended(None, f"no confirm in {seconds} s")
                )
        if not message.settled:
            raise BrokerUnavailable(f"The broker sent no confirm in {seconds} s; {UNKNOWN}.")

    # What follows runs in the I/O thread.

    def _run(self) -> None:
        while True:
            try:
                self._serve()
            except Exception:
                log.exception("The broker's I/O failed; a new connection follows")
            time.sleep(self._delay)
            self._delay = min(2 * self._delay, LAST_DELAY)

    def _serve(self) -> None:
        """Hold one connection from its first packet to its end."""
        connection = self._connect(
            self._settings.broker.parameters("publisher"),
            on_open_callback=self._opened,
            on_open_error_callback=self._ended,
            on_close_callback=self._ended,
        )
        self._connection = connection
        self._failed = False
        try:
            connection.ioloop.start()
        finally:
            self._fail("the I/O ended")
            with self._lock:
                self._connection = self._channel = None
            self._unconfirmed.clear()
            self._returned.clear()
            # pika can only close politely, which a silent broker would not answer.
            if connection._transport is not None:
                connection._transport._close_and_finalize()
            connection.ioloop.close()

    def _opened(self, connection: SelectConnection) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._channel_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=self._confirms_on)

    def _confirms_on(self, _frame: Method[Any]) -> None:
        self._tag = 0
        self._complaint = ""
        with self._lock:
            self._signs += 1
            self._ready, self._blocked = True, False
            # The last connection may have ended before its wake-up was served.
            self._wakeup_due = False
        self._update_gauge()
        broker = self._settings.broker
        log.info("Connected to the broker at %s:%s", broker.host, broker.port)

    def _flush(self) -> None:
        """Send what is in the outbox."""
        # Before the outbox is read: who adds a message from now on wakes this thread again.
        with self._lock:
            self._wakeup_due = False
        # Not up, the connection has a failure due that settles the outbox.
        while self.up and self._outbox:
            message = self._outbox.popleft()
            if not message.given_up:
                self._tag += 1
                self._unconfirmed[self._tag] = message
                self._send(message)

    def _send(self, message: _Message) -> None:
        assert self._channel is not None  # noqa: S101 - as up says
        self._channel.basic_publish(
            self._settings.exchange,
            self._settings.routing_key,
            message.body,
            BasicProperties(  # type: ignore[no-untyped-call]
                content_type="text/plain",
                delivery_mode=2,
                message_id=message.id,
                headers={REQUEST_ID: message.request_id},
            ),
            mandatory=True,
        )

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        """Remember a message that no queue took; its ack comes after this."""
        if properties.message_id:
            self._returned[properties.message_id] = f"{method.reply_code} {method.reply_text}"

    def _on_confirm(self, frame: Method[Any]) -> None:
        """Settle the message, or all up to it, that the broker acked or nacked."""
        self._signs += 1
        self._delay = FIRST_DELAY
        last = frame.method.delivery_tag
        tags = [last]
        if frame.method.multiple:
            tags = list(takewhile(lambda tag: tag <= last, self._unconfirmed))
        for tag in tags:
            message = self._unconfirmed.pop(tag, None)
            if message is None:
                continue
            if reason := self._returned.pop(message.id, None):
                message.settle(f"The broker has no queue for the message ({reason}).")
            elif isinstance(frame.method, Basic.Nack):
                message.settle("The broker refused the message.")
            else:
                message.settle()

    def _on_blocked(self, _connection: SelectConnection, frame: Method[Any]) -> None:
        log.warning("The broker blocks publishers: %s", frame.method.reason)
        with self._lock:
            self._blocked = True
        self._give_up_all("The broker blocks publishers")

    def _on_unblocked(self, _connection: SelectConnection, _frame: Method[Any]) -> None:
        log.info("The broker no longer blocks publishers")
        with self._lock:
            self._blocked = False
        self._update_gauge()

    def _channel_closed(self, channel: Channel, reason: BaseException) -> None:
        """Renew the connection with the channel: a missing exchange (404) may come back."""
        self._fail(repr(reason))
        if channel.connection.is_open:
            channel.connection.close()

    def _ended(self, _connection: SelectConnection | None, reason: BaseException | str) -> None:
        self._fail(reason if isinstance(reason, str) else repr(reason))
        if self._connection is not None:
            self._connection.ioloop.stop()

    def _fail(self, reason: str) -> None:
        """Take nothing more on this connection; the first of its reasons goes to the log."""
        if self._failed:
            return
        self._failed = True
        with self._lock:
            self._ready = self._blocked = False
        self._give_up_all("The connection to the broker was lost")
        # While the broker stays away, the same complaint every two seconds tells nothing new.
        if reason != self._complaint:
            self._complaint = reason
            log.warning("No connection to the broker: %s", reason)

    def _give_up_all(self, what: str) -> None:
        """Fail every waiting request; sent messages stay listed, as their confirms may follow."""
        while self._outbox:
            self._outbox.popleft().settle(f"{what}; {UNSENT}.")
        for message in self._unconfirmed.values():
            message.settle(f"{what}; {UNKNOWN}.")
        self._update_gauge()

    def _update_gauge(self) -> None:
        BROKER_UP.set(self.up)
