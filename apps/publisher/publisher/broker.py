# mypy: disable-error-code=no-untyped-call
"""Confirmed publishing: a message counts as sent once the broker confirmed it.

Requests put their messages into an outbox and wait. One flush a turn of the event loop sends some
of each, by the outlets of their exchanges: what ends an exchange's channel fails no other's
requests.
"""

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import gevent
from door import BrokerUnavailable
from door.amqp import AMQPError, Channel, ChannelClosedByBroker, Link, Method
from door.metrics import BROKER_UP
from gevent.event import Event

from publisher.message import Message, Target
from publisher.outlet import UNKNOWN, UNSENT, InFlight, Outlet, Sending
from publisher.settings import Settings

log = logging.getLogger(__name__)

# A flush sends at most MAX_FLUSH messages, so that a batch does not keep the others waiting; a
# request's turn in it sends at most MAX_TURN. After so many bytes it sends no further message.
MAX_FLUSH, MAX_FLUSH_BYTES = 256, 1024 * 1024
MAX_TURN, MAX_TURN_BYTES = 10, 64 * 1024
# Messages and bytes that may wait for their confirms at a time: a new one waits behind no more.
WINDOW, WINDOW_BYTES = 512, 8 * 1024 * 1024
# While pika keeps more bytes than this, as the broker does not read them, nothing is sent.
MAX_UNWRITTEN = 1024 * 1024
# Seconds until the next look at that, where no confirm is to come.
PAUSE = 0.02


class Unconfirmed(BrokerUnavailable):
    """Not every message of a request was confirmed; the first `certain` of them were."""

    def __init__(self, reason: str, certain: int = 0) -> None:
        """Fail for reason; the first certain messages are in the queue."""
        super().__init__(reason)
        self.certain = certain


class Broker(Link):
    """A connection to RabbitMQ that publishes with confirms, by a channel for each exchange.

    A channel is opened for the exchange's first request, and anew for the next one after it was
    closed. The main channel carries no message: that it is open says that the broker can be used.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepare for settings; nothing connects before start()."""
        super().__init__(settings.broker, "publisher")
        self._settings = settings
        self._blocked = False
        # Set unless requests have to wait before they begin.
        self._open_to_all = Event()
        self._open_to_all.set()
        # Exchange → its outlet, which may still be opening.
        self._outlets: dict[str, Outlet] = {}
        self._in_flight = InFlight()
        # Exchange → why its channel was given up, as it was last logged.
        self._reasons: dict[str, str] = {}
        # Requests without a turn yet, and requests that have had one and have messages left.
        self._fresh: deque[Sending] = deque()
        self._begun: deque[Sending] = deque()
        # Whether the next flush serves _begun alone, because the last one had no room for it.
        self._owed = False
        self._flush_due = False

    @property
    def up(self) -> bool:
        """Whether a message can be published now: connected and not blocked."""
        return self.channel is not None and not self._blocked

    @property
    def idle(self) -> bool:
        """Whether every message that was to be sent is confirmed."""
        waiting = self._fresh or self._begun or any(one.waiting for one in self._outlets.values())
        return super().idle and not (waiting or self._in_flight.messages)

    def pause(self) -> bool:
        """Let requests wait before they begin, until resume()."""
        self._open_to_all.clear()
        return True

    def resume(self) -> None:
        """Let requests begin."""
        self._open_to_all.set()

    def publish(self, messages: Sequence[Message], target: Target) -> int:
        """Publish messages to target, in order and persistent, and wait for all the confirms.

        Returns how many of them the topic dropped, as they match no subscription.

        Raises Unconfirmed at once when the broker is away, blocks or silent; when it nacks a
        message, or returns one that is for a queue; when the connection or the exchange's channel
        ends, or the connection blocks, while waiting; and when a time-out passes without a confirm
        of these messages, which renews the channel if nothing else was confirmed on it meanwhile,
        and the connection if nothing was at all. What is not confirmed may still be in the queue.
        """
        self._open_to_all.wait()
        if not self.up:
            state = "is not connected" if self.channel is None else "blocks publishers"
            raise Unconfirmed(f"The broker {state}; {UNSENT}.")
        outlet = self._outlets.get(target.exchange) or self._open(target.exchange)
        sending = Sending(messages, target, outlet)
        if outlet.ready:
            self._fresh.append(sending)
            self._flush_soon()
        else:
            outlet.waiting.append(sending)
        since, left = time.monotonic(), sending.left
        while not sending.done.wait(self._settings.confirm_timeout):
            if sending.left == left:
                self._time_out(sending, since)
            since, left = time.monotonic(), sending.left
        if sending.error is not None:
            raise Unconfirmed(sending.error, sending.certain)
        return sending.dropped

    def _open(self, exchange: str) -> Outlet:
        """Open a channel for exchange's messages."""
        connection = self.channel.connection  # type: ignore[union-attr]
        user = self._settings.broker.user
        try:
            outlet = Outlet(exchange, connection, user, self._in_flight, self)
        except AMQPError as error:
            raise Unconfirmed(f"The broker opens no channel ({error!r}); {UNSENT}.") from None
        self._outlets[exchange] = outlet
        return outlet

    def _time_out(self, sending: Sending, since: float) -> None:
        """Give sending up, and the connection or the channel if it is silent since then.

        What is silent is renewed rather than waited for: a confirm that got lost would keep it
        silent for ever.
        """
        reason = f"no confirm in {self._settings.confirm_timeout} s"
        sending.fail(f"The broker sent {reason}; {UNKNOWN if sending.sent else UNSENT}.")
        if self.heard < since:
            self.drop(BrokerUnavailable(reason))
        elif sending.outlet.silent(since):
            self._give_up(sending.outlet, f"The broker sent {reason}")

    # What follows runs in the hub.

    def opened(self, channel: Channel) -> None:
        """Let requests come, which open channels of their own."""
        connection = channel.connection
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self.ready(channel)

    def lost(self, reason: object) -> None:
        """Fail every waiting request."""
        super().lost(reason)
        self._blocked = False
        outlets = self._outlets.values()
        self._fail("The connection to the broker was lost", outlets)
        for outlet in outlets:
            outlet.forget()
        self._outlets.clear()

    def confirmed(self) -> None:
        """Take note that the broker confirms messages; there may be room for more."""
        self.alive()
        if self._fresh or self._begun:  # saves a call for most confirms
            self._flush_soon()

    def outlet_ready(self, outlet: Outlet) -> None:
        """Let the requests that wait for outlet have their turns."""
        self._fresh.extend(outlet.waiting)
        outlet.waiting.clear()
        self._flush_soon()

    def outlet_closed(self, outlet: Outlet, reason: ChannelClosedByBroker) -> None:
        """Fail the requests of outlet; the next one has another one."""
        why = f"{reason.reply_code} {reason.reply_text}"
        self._give_up(outlet, f"The broker closed the channel ({why})")

    def _give_up(self, outlet: Outlet, what: str) -> None:
        """Use outlet no more, and fail its requests for what; nothing when it was given up."""
        exchange = outlet.exchange
        if self._outlets.get(exchange) is not outlet:
            return
        # One line for each new reason: a missing exchange would have one for each request.
        if outlet.proved or what != self._reasons.get(exchange):
            self._reasons[exchange] = what
            log.warning("Requests to exchange %r failed: %s", exchange, what)
        self._fail(what, [outlet])
        outlet.forget()
        outlet.close()
        del self._outlets[exchange]
        self._flush_soon()

    def _fail(self, what: str, outlets: Collection[Outlet]) -> None:
        """Fail every waiting request of outlets; late confirms may still follow."""
        for outlet in outlets:
            outlet.fail(what)
        for waiting in self._fresh, self._begun:
            for _ in range(len(waiting)):
                sending = waiting.popleft()
                if sending.outlet in outlets:
                    sending.fail(f"{what}; {UNSENT}.")
                else:
                    waiting.append(sending)

    def _flush_soon(self) -> None:
        if not self._flush_due and (self._fresh or self._begun):
            self._flush_due = True
            gevent.get_hub().loop.run_callback(self._flush)

    def _flush(self) -> None:
        """Send some of what waits: new requests first, but at most half while begun ones wait.

        What finds no room is sent after the next confirm. One will come: it is unconfirmed
        messages that take the room.
        """
        self._flush_due = False
        if not self.up:  # a failure has settled all that waited
            return
        flying = self._in_flight
        count = min(MAX_FLUSH, WINDOW - flying.messages)
        size = min(MAX_FLUSH_BYTES, WINDOW_BYTES - flying.size)
        connection = self.channel.connection  # type: ignore[union-attr]
        if count <= 0 or size <= 0 or connection.unwritten > MAX_UNWRITTEN:
            if not flying.messages:
                # It was written for a channel that is closed now: no confirm will come.
                self._flush_due = True
                gevent.spawn_later(PAUSE, self._flush)
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
        except Exception as error:  # whatever it was, the tags need no longer be the channel's
            self.drop(error)
        self._flush_soon()

    def _serve(self, waiting: deque[Sending], most: int, size: int) -> tuple[int, int]:
        """Give turns to those waiting; return how many messages, and bytes, that sent.

        At most most messages are sent, and none after size bytes.
        """
        count = total = 0
        while waiting and count < most and total < size:
            sending = waiting.popleft()
            if sending.done.is_set():  # its request gave up
                continue
            turn = min(MAX_TURN, most - count)
            sent, sent_bytes = sending.outlet.send(sending, turn, MAX_TURN_BYTES)
            count += sent
            total += sent_bytes
            if sending.sent < len(sending.messages):
                self._begun.append(sending)
        return count, total

    def _on_blocked(self, connection: object, frame: Method[Any]) -> None:
        if self.channel is None or connection is not self.channel.connection:
            return  # it was moved away from
        log.warning("The broker blocks publishers: %s", frame.method.reason)
        self._blocked = True
        BROKER_UP.set(0)
        self._fail("The broker blocks publishers", self._outlets.values())

    def _on_unblocked(self, _connection: object, _frame: Method[Any]) -> None:
        log.info("The broker no longer blocks publishers")
        self._blocked = False
        BROKER_UP.set(self.up)
