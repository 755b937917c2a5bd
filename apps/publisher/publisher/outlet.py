# mypy: disable-error-code=no-untyped-call
"""One exchange's channel, on which the broker confirms each message.

A confirm settles one message or all up to it (https://www.rabbitmq.com/docs/confirms).
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from door.access import CLIENT_HEADER
from door.amqp import AMQPError, Basic, BasicProperties, Channel, ChannelClosedByBroker, Method
from door.wire import Wire
from gevent.event import Event

from publisher.message import Message, Target

UNSENT = "the message was not published"
UNKNOWN = "whether the message was published is unknown"


@dataclass(slots=True)
class InFlight:
    """How many messages wait for their confirms, of all exchanges together, and their bytes."""

    messages: int = 0
    size: int = 0


class Outbox(Protocol):
    """Whose messages are sent by outlets."""

    @property
    def heard(self) -> float:
        """When the broker last confirmed a message, by time.monotonic()."""

    def confirmed(self) -> None:
        """Take note that the broker confirms messages; there may be room for more."""

    def outlet_ready(self, outlet: "Outlet") -> None:
        """Let the requests that wait for outlet have their turns."""

    def outlet_closed(self, outlet: "Outlet", reason: ChannelClosedByBroker) -> None:
        """Use outlet no more: the broker closed its channel for reason."""


class Sending:
    """The messages of one request on their way to the broker."""

    __slots__ = (
        "confirmed",
        "done",
        "dropped",
        "error",
        "left",
        "messages",
        "outlet",
        "sent",
        "target",
    )

    def __init__(self, messages: Sequence[Message], target: Target, outlet: "Outlet") -> None:
        """Send messages to target by outlet, which is of its exchange."""
        self.messages = messages
        self.target = target
        self.outlet = outlet
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


class Outlet:
    """A channel with confirms, for the messages of one exchange.

    It is used until its channel is closed. The next request makes another one.
    """

    def __init__(
        self, exchange: str, connection: Any, user: str, in_flight: InFlight, outbox: Outbox
    ) -> None:
        """Open a channel of connection, whose user it is; AMQPError when it gives none."""
        self.exchange = exchange
        # Whether messages can be sent, and the requests that came before.
        self.ready = False
        self.waiting: list[Sending] = []
        self._user = user
        self._in_flight = in_flight
        self._outbox = outbox
        # When the broker last confirmed a message, by time.monotonic(); first, when it was asked
        # for the channel.
        self._heard = time.monotonic()
        # Delivery tag → message, in the order of publishing, so that a multiple ack is a prefix.
        self._unconfirmed: dict[int, tuple[Sending, int]] = {}
        # Key and id → why it was returned, and the last tag published by then. basic.return has
        # no delivery tag: every message in flight with that id and key counts as returned.
        self._returned: dict[tuple[str, str], tuple[str, int]] = {}
        self._tag = 0
        self._connection = connection
        self._channel: Channel = connection.channel(on_open_callback=self._opened)
        self._channel.add_on_close_callback(self._closed)
        frame_max = connection.params.frame_max
        self._wire = Wire(self._channel.channel_number, exchange, frame_max)

    @property
    def proved(self) -> bool:
        """Whether the broker settled a message of it."""
        return self._tag > len(self._unconfirmed)

    def silent(self, since: float) -> bool:
        """Whether the broker owes an answer, and confirmed nothing since (time.monotonic())."""
        return self._heard < since and (not self.ready or bool(self._unconfirmed))

    def send(self, sending: Sending, most: int, size: int) -> tuple[int, int]:
        """Send the next messages of sending; return how many, and their bytes.

        They are at most most messages, and after size bytes there is no further one.
        """
        start, total, frames, in_flight = sending.sent, 0, [], self._in_flight
        for index in range(start, min(start + most, len(sending.messages))):
            if total >= size:
                break
            message = sending.messages[index]
            # The word of the publisher, which the broker checks, for the client's name.
            user = self._user if CLIENT_HEADER in message.headers else None
            sending.sent += 1
            self._tag += 1
            self._unconfirmed[self._tag] = sending, index
            in_flight.messages += 1
            in_flight.size += len(message.body)
            total += len(message.body)
            frames.append(self._wire.frames(sending.target.key, *message, user))
        self._connection.publish(self._channel, b"".join(frames))
        return len(frames), total

    def fail(self, what: str) -> None:
        """Fail whose messages are sent, and who waits; late confirms may still follow."""
        for sending, _ in self._unconfirmed.values():
            sending.fail(f"{what}; {UNKNOWN}.")
        for sending in self.waiting:
            sending.fail(f"{what}; {UNSENT}.")
        self.waiting.clear()

    def forget(self) -> None:
        """Wait for no confirms any more: they take no room."""
        self._in_flight.messages -= len(self._unconfirmed)
        for sending, index in self._unconfirmed.values():
            self._in_flight.size -= len(sending.messages[index].body)
        self._unconfirmed.clear()

    def close(self) -> None:
        """Close the channel, if it is not closed already."""
        with suppress(AMQPError):
            self._channel.close()

    # What follows runs in the hub.

    def _opened(self, channel: Channel) -> None:
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=self._confirms_on)

    def _confirms_on(self, _frame: object) -> None:
        self.ready = True
        self._outbox.outlet_ready(self)

    def _closed(self, _channel: Channel, reason: Exception) -> None:
        # If the connection itself has ended, Link knows.
        if isinstance(reason, ChannelClosedByBroker):
            self._outbox.outlet_closed(self, reason)

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        """Remember a message that no queue took; its ack comes after this."""
        reason = f"{method.reply_code} {method.reply_text}"
        # Removed first, so that it is inserted at the end: the oldest tag stands first.
        key = method.routing_key, properties.message_id
        self._returned.pop(key, None)
        self._returned[key] = reason, self._tag

    def _on_confirm(self, frame: Method[Any]) -> None:
        """Settle the message, or all up to it, that the broker acked or nacked."""
        last = frame.method.delivery_tag
        tags = [last]
        if frame.method.multiple:
            tags = list(takewhile(last.__ge__, self._unconfirmed))
        error = None if isinstance(frame.method, Basic.Ack) else "The broker refused the message."
        in_flight = self._in_flight
        for tag in tags:
            sending, index = self._unconfirmed.pop(tag, (None, 0))
            if sending is not None:
                message = sending.messages[index]
                in_flight.messages -= 1
                in_flight.size -= len(message.body)
                returned = self._return_of(sending.target, message, tag)
                if returned and sending.target.topic:
                    sending.dropped += 1
                    returned = None
                sending.settle(index, error or returned)
        first = next(iter(self._unconfirmed), self._tag + 1)
        while self._returned and next(iter(self._returned.values()))[1] < first:
            del self._returned[next(iter(self._returned))]
        self._outbox.confirmed()
        self._heard = self._outbox.heard

    def _return_of(self, target: Target, message: Message, tag: int) -> str | None:
        """Why message, published as tag to target, was returned; None if it was not."""
        if not self._returned:
            return None
        reason, last = self._returned.get((target.key, message.id), ("", 0))
        return f"The broker has no queue for the message ({reason})." if tag <= last else None
