# mypy: disable-error-code=no-untyped-call
"""Confirmed publishing: a message counts as sent once the broker confirmed it.

Requests put their messages into an outbox and wait. One flush a turn of the event loop sends some
of each, and a confirm settles one message or all up to it (https://www.rabbitmq.com/docs/confirms).
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from door import BrokerUnavailable
from door.access import CLIENT_HEADER
from door.amqp import PERSISTENT_DELIVERY_MODE, Basic, BasicProperties, Channel, Link, Method
from door.metrics import BROKER_UP
from gevent import get_hub
from gevent.event import Event

from publisher.settings import Settings

log = logging.getLogger(__name__)

# A flush sends at most MAX_FLUSH messages, so that a batch does not keep the others waiting; a
# request's turn in it sends at most MAX_TURN. After so many bytes it sends no further message.
MAX_FLUSH, MAX_FLUSH_BYTES = 500, 1024 * 1024
MAX_TURN, MAX_TURN_BYTES = 10, 64 * 1024
# Messages and bytes that may wait for their confirms at a time: a new one waits behind no more.
WINDOW, WINDOW_BYTES = 1000, 8 * 1024 * 1024
# While pika keeps more bytes than this, as the broker does not read them, nothing is sent.
MAX_UNWRITTEN = 1024 * 1024

UNSENT = "the message was not published"
UNKNOWN = "whether the message was published is unknown"


@dataclass(frozen=True, slots=True)
class Message:
    """What is published: body, id, content type and encoding (None: not told), and headers."""

    body: bytes
    id: str
    content_type: str | None = "text/plain"
    headers: dict[str, str] = field(default_factory=dict)
    content_encoding: str | None = None


class Target(NamedTuple):
    """Where the messages of a request go: an exchange, and their routing key there.

    Whoever sends to a topic does not know whether anybody subscribed: it may drop what matches no
    subscription. A queue may not.
    """

    exchange: str
    key: str
    topic: bool = False


class Unconfirmed(BrokerUnavailable):
    """Not every message of a request was confirmed; the first `certain` of them were."""

    def __init__(self, reason: str, certain: int = 0) -> None:
        """Fail for reason; the first certain messages are in the queue."""
        super().__init__(reason)
        self.certain = certain


class _Sending:
    """The messages of one request on their way to the broker."""

    __slots__ = ("confirmed", "done", "dropped", "error", "left", "messages", "sent", "target")

    def __init__(self, messages: Sequence[Message], target: Target) -> None:
        self.messages = messages
        self.target = target
        # How many a topic dropped.
        self.dropped = 0
        self.sent = 0
        self.left = len(messages)
        self.confirmed = bytearray(len(messages))
        self.error: str | None = None
        self.done = Event()

    def settle(self, index: int, error: str | None) -> None:
        """Note the broker's answer to one message; the last one lets the request go on."""
        if error is None:
            self.confirmed[index] = 1
        else:
            self.error = self.error or error
        self.left -= 1
        if not self.left:
            self.done.set()

    def fail(self, error: str) -> None:
        """Let the request go on at once, with what is confirmed by now."""
        if not self.done.is_set():
            self.error = self.error or error
            self.done.set()

    @property
    def certain(self) -> int:
        """How many messages from the first on are confirmed."""
        end = self.confirmed.find(0)
        return len(self.messages) if end < 0 else end


class Broker(Link):
    """A connection to RabbitMQ that publishes with confirms."""

    def __init__(self, settings: Settings) -> None:
        """Prepare for settings; nothing connects before start()."""
        super().__init__(settings.broker, "publisher")
        self._settings = settings
        self._user = settings.broker.user
        self._blocked = False
        # Requests without a turn yet, and requests that have had one and have messages left.
        self._fresh: deque[_Sending] = deque()
        self._begun: deque[_Sending] = deque()
        # Whether the next flush serves _begun alone, because the last one had no room for it.
        self._owed = False
        self._flush_due = False
        # Delivery tag → message, in the order of publishing, so that a multiple ack is a prefix.
        self._unconfirmed: dict[int, tuple[_Sending, int]] = {}
        self._unconfirmed_bytes = 0
        # Target and id → why it was returned, and the last tag published by then. basic.return has
        # no delivery tag: every message in flight with that id to that target counts as returned.
        self._returned: dict[tuple[str, str, str], tuple[str, int]] = {}
        self._tag = 0
        # Counts confirms and new channels. While it stays the same, the broker is silent.
        self._signs = 0

    @property
    def up(self) -> bool:
        """Whether a message can be published now: connected, confirms on, not blocked."""
        return self.channel is not None and not self._blocked

    def publish(self, messages: Sequence[Message], target: Target) -> int:
        """Publish messages to target, in order and persistent, and wait for all the confirms.

        Returns how many of them the topic dropped, as they match no subscription.

        Raises Unconfirmed at once when the broker is away, blocks or silent; when it nacks a
        message, or returns one that is for a queue; when the connection ends or blocks while
        waiting; and when a time-out passes without a confirm of these messages, which renews the
        connection if nothing else was confirmed meanwhile. What is not confirmed may still be in
        the queue.
        """
        if not self.up:
            state = "is not connected" if self.channel is None else "blocks publishers"
            raise Unconfirmed(f"The broker {state}; {UNSENT}.")
        sending = _Sending(messages, target)
        self._fresh.append(sending)
        self._flush_soon()
        signs, left = self._signs, sending.left
        while not sending.done.wait(self._settings.confirm_timeout):
            if sending.left == left:
                self._time_out(sending, silent=self._signs == signs)
            signs, left = self._signs, sending.left
        if sending.error is not None:
            raise Unconfirmed(sending.error, sending.certain)
        return sending.dropped

    def _time_out(self, sending: _Sending, silent: bool) -> None:
        """Give sending up, and the connection if it is silent.

        A silent connection is renewed rather than waited for: a confirm that got lost would keep
        it silent for ever.
        """
        reason = f"no confirm in {self._settings.confirm_timeout} s"
        sending.fail(f"The broker sent {reason}; {UNKNOWN if sending.sent else UNSENT}.")
        if silent:
            self.drop(BrokerUnavailable(reason))

    # What follows runs in the hub.

    def opened(self, channel: Channel) -> None:
        """Ask for confirms on channel."""
        connection = channel.connection
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._confirms_on(channel))

    def lost(self, reason: object) -> None:
        """Fail every waiting request."""
        super().lost(reason)
        self._blocked = False
        self._give_up_all("The connection to the broker was lost")
        self._unconfirmed.clear()
        self._unconfirmed_bytes = 0
        self._returned.clear()

    def _confirms_on(self, channel: Channel) -> None:
        self._tag = 0
        self._signs += 1
        self.ready(channel)

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            get_hub().loop.run_callback(self._flush)

    def _flush(self) -> None:
        """Send some of what waits: new requests first, but at most half while begun ones wait.

        What finds no room is sent after the next confirm. One will come: it is unconfirmed
        messages that take the room.
        """
        self._flush_due = False
        if not self.up:  # a failure has settled all that waited
            return
        count = min(MAX_FLUSH, WINDOW - len(self._unconfirmed))
        size = min(MAX_FLUSH_BYTES, WINDOW_BYTES - self._unconfirmed_bytes)
        connection = self.channel.connection  # type: ignore[union-attr]
        if count <= 0 or size <= 0 or connection.unwritten > MAX_UNWRITTEN:
            return
        waited = bool(self._begun)
        share = 2 if waited else 1
        try:
            with connection.joined():
                taken = sent = 0
                if not self._owed:
                    taken, sent = self._serve(self._fresh, -(-count // share), -(-size // share))
                served, _ = self._serve(self._begun, count - taken, size - sent)
                # A large new message may have used up the flush.
                self._owed = waited and not served
        except Exception as error:  # whatever it was, the tags need no longer be pika's
            self.drop(error)
        if self._fresh or self._begun:
            self._flush_soon()

    def _serve(self, waiting: deque[_Sending], most: int, size: int) -> tuple[int, int]:
        """Give turns to those waiting; return how many messages, and bytes, that sent.

        At most most messages are sent, and none after size bytes.
        """
        count = total = 0
        while waiting and count < most and total < size:
            sending = waiting.popleft()
            if sending.done.is_set():  # its request gave up
                continue
            turn = 0
            for _ in range(min(MAX_TURN, most - count)):
                turn += self._send(sending)
                count += 1
                if sending.sent == len(sending.messages) or turn >= MAX_TURN_BYTES:
                    break
            total += turn
            if sending.sent < len(sending.messages):
                self._begun.append(sending)
        return count, total

    def _send(self, sending: _Sending) -> int:
        """Send the next message of sending; return its bytes."""
        index = sending.sent
        message = sending.messages[index]
        sending.sent += 1
        self._tag += 1
        self._unconfirmed[self._tag] = sending, index
        self._unconfirmed_bytes += len(message.body)
        self.channel.basic_publish(  # type: ignore[union-attr]
            sending.target.exchange,
            sending.target.key,
            message.body,
            BasicProperties(
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                delivery_mode=PERSISTENT_DELIVERY_MODE,
                message_id=message.id,
                headers=message.headers,
                # The word of the publisher, which the broker checks, for the client's name.
                user_id=self._user if CLIENT_HEADER in message.headers else None,
            ),
            mandatory=True,
        )
        return len(message.body)

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        """Remember a message that no queue took; its ack comes after this."""
        reason = f"{method.reply_code} {method.reply_text}"
        # Removed first, so that it is inserted at the end: the oldest tag stands first.
        key = method.exchange, method.routing_key, properties.message_id
        self._returned.pop(key, None)
        self._returned[key] = reason, self._tag

    def _on_confirm(self, frame: Method[Any]) -> None:
        """Settle the message, or all up to it, that the broker acked or nacked."""
        self._signs += 1
        self.alive()
        last = frame.method.delivery_tag
        tags = [last]
        if frame.method.multiple:
            tags = list(takewhile(lambda tag: tag <= last, self._unconfirmed))
        error = None if isinstance(frame.method, Basic.Ack) else "The broker refused the message."
        for tag in tags:
            sending, index = self._unconfirmed.pop(tag, (None, 0))
            if sending is not None:
                message = sending.messages[index]
                self._unconfirmed_bytes -= len(message.body)
                returned = self._return_of(sending.target, message, tag)
                if returned and sending.target.topic:
                    sending.dropped += 1
                    returned = None
                sending.settle(index, error or returned)
        first = next(iter(self._unconfirmed), self._tag + 1)
        while self._returned and next(iter(self._returned.values()))[1] < first:
            del self._returned[next(iter(self._returned))]
        if self._fresh or self._begun:
            self._flush_soon()

    def _return_of(self, target: Target, message: Message, tag: int) -> str | None:
        """Why message, published as tag to target, was returned; None if it was not."""
        if not self._returned:
            return None
        key = target.exchange, target.key, message.id
        reason, last = self._returned.get(key, ("", 0))
        return f"The broker has no queue for the message ({reason})." if tag <= last else None

    def _on_blocked(self, _connection: object, frame: Method[Any]) -> None:
        log.warning("The broker blocks publishers: %s", frame.method.reason)
        self._blocked = True
        BROKER_UP.set(0)
        self._give_up_all("The broker blocks publishers")

    def _on_unblocked(self, _connection: object, _frame: Method[Any]) -> None:
        log.info("The broker no longer blocks publishers")
        self._blocked = False
        BROKER_UP.set(self.up)

    def _give_up_all(self, what: str) -> None:
        """Fail every waiting request; sent messages stay listed, as their confirms may follow."""
        for sending, _ in self._unconfirmed.values():
            sending.fail(f"{what}; {UNKNOWN}.")
        for waiting in self._fresh, self._begun:
            while waiting:
                waiting.popleft().fail(f"{what}; {UNSENT}.")
