# mypy: disable-error-code=no-untyped-call
"""One connection to the broker, shared by every request of this process."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import gevent
from door import BrokerUnavailable
from door.amqp import AMQPError, Basic, BasicProperties, Channel, Link
from door.clients import CONNECTION, SHARE
from door.memory import Grant, Memory, OutOfMemory
from gevent.event import Event

from subscriber.delivery import Delivery, Handle
from subscriber.line import Line, Waiter
from subscriber.pace import Pace
from subscriber.settings import Settings
from subscriber.settle import Unsettled

# Bytes of the largest message that RabbitMQ takes by default. Room for one is no part of the
# Memory: a single get must be possible while that is nearly full, as small messages are then.
LARGEST_MESSAGE = 16 * 1024 * 1024
# Share of the connections that may be long polls: others must be answered, too.
POLLS = 0.75
# Seconds the connection stays open after the last acknowledgement. A quorum queue takes them
# behind the channel's back: closing at once left 267 of 300 acknowledged messages in the queue,
# a second left none. AMQP has no answer to an acknowledgement that could be waited for.
SETTLE = 1.0
# Seconds between two looks whether a burst goes on.
BURST_TIMEOUT = 0.5
# Seconds between two looks into an empty queue while requests wait for a message, and between
# two attempts to hold memory for a message that came.
POLL, HOLD = 0.05, 0.02


@dataclass(eq=False)
class Burst:
    """A consumer that is to bring just so many messages."""

    missing: int
    # The memory that they are expected to take.
    grant: Grant
    # When it last brought one.
    sign: float
    tag: str = ""

    def cover(self, size: int, memory: Memory) -> Grant | None:
        """Return a grant for one of its messages, of size bytes; None when there is no room."""
        over = size - self.grant.amount
        if over > 0 and not memory.take_now(over):
            return None
        self.grant.amount = max(0, -over)
        return Grant(memory, size)


class Broker(Link):
    """Messages of one queue, in the order of sending, for requests in turns (Line).

    One is fetched by basic.get, whose empty answer is the only sign of an empty queue. Many come
    in a burst, at a fifth of the broker's work: a consumer with a prefetch of just so many, which
    is cancelled when it has brought them, so that none is taken off the queue unasked.

    A message holds memory from when it came until it was written. What a burst is expected to
    bring is held before; what comes beyond that goes back to the queue. A get brings the one
    message at a time that may come before memory is held for it.

    A message that its request could not write is held here and goes out before the queue's next
    one. It is not requeued, as the broker counts that towards the delivery limit.
    """

    def __init__(self, settings: Settings, memory: Memory) -> None:
        """Prepare for settings, to hold messages in memory; nothing connects before start()."""
        super().__init__(settings.broker, "subscriber")
        self._settings = settings
        self._memory = memory
        self._most_polls = int(memory.size * SHARE * POLLS) // CONNECTION
        self._line = Line()
        self._pace = Pace()
        self._unsettled = Unsettled()
        # When the get on its way was sent, and how many were sent.
        self._asked = 0.0
        self._gets = 0
        # The message for which there was no memory yet.
        self._unheld: Delivery | None = None
        self._burst: Burst | None = None
        # How many messages the queue should have left.
        self._ready = 0
        self._poll_due = self._ask_due = self._settle_due = False
        self._last_ack = 0.0
        self._finishing = False

    def get(
        self, want: int = 1, room: float = math.inf, wait: float = 0, address: str = ""
    ) -> list[Delivery]:
        """Return at most want messages, together of at most room bytes as lines of JSON.

        Requests of several addresses get theirs in turns.

        An empty list means that the queue was empty, for wait seconds. For each of them, ack(),
        release() or reject() must follow; after ack() and reject(), its close(). Raises
        BrokerUnavailable at once when not connected, when the connection is lost, and when no
        answer comes within receive_timeout seconds; OutOfMemory when there is no room for a
        message in that time, and at once when too many requests wait.
        """
        if self.channel is None:
            raise BrokerUnavailable("not connected to the broker")
        wait = 0 if self._finishing else wait
        waiter = Waiter(want, room, patient=wait > 0, address=address)
        self._line.serve(waiter)
        if not waiter.done.is_set():
            self._stand_in_line(waiter, wait)
        if waiter.error and not waiter.deliveries:
            raise waiter.error
        return waiter.deliveries

    def holds(self, one: Delivery | Handle) -> bool:
        """Whether one can still be settled; after a lost connection it comes again."""
        return one.channel is self.channel and self._unsettled.has(one.tag)

    def ack(self, some: Iterable[Delivery | Handle]) -> None:
        """Take some off the queue; nothing for those whose connection is gone."""
        self._unsettled.ack(one.tag for one in some if one.channel is self.channel)
        self._settle_soon()

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Hand deliveries to the next requests, in their order; they may have been seen before."""
        for delivery in sorted(deliveries, key=lambda one: one.tag):
            if self.holds(delivery):
                delivery.redelivered = True
                self._line.hand_out(delivery)
            else:
                delivery.close()

    def reject(self, some: Iterable[Delivery | Handle], requeue: bool) -> None:
        """Give some back to the queue, or to the dead ones; both are counted by the broker."""
        self._unsettled.reject((one.tag for one in some if one.channel is self.channel), requeue)
        self._settle_soon()

    def stop(self) -> None:
        """Close the connection once the broker had time to take the acknowledgements."""
        if self._burst and self._burst.missing and self.channel is not None:
            self._end_burst(self.channel, self._burst)
        with gevent.Timeout(SETTLE, False):
            while self._burst:
                gevent.sleep(0.01)
        self._settle()
        gevent.sleep(max(0.0, self._last_ack + SETTLE - time.monotonic()))
        super().stop()

    def opened(self, channel: Channel) -> None:
        """Use channel, which was just opened."""
        channel.add_callback(self._on_empty, [Basic.GetEmpty], one_shot=False)
        self.ready(channel)
        self._ask_soon()

    def lost(self, reason: object) -> None:
        """Forget what the connection brought, as the broker requeues it; fail who waits."""
        super().lost(reason)
        self._unsettled.clear()
        self._line.fail(BrokerUnavailable(f"the broker was lost: {reason}"))
        if self._burst:
            self._burst.grant.close()
        self._burst, self._ready, self._asked = None, 0, 0.0

    def finish(self) -> None:
        """Let nobody wait any longer for messages that are still to come."""
        self._finishing = True
        self._line.hurry_all(self._gets)
        self._ask_soon()

    def _stand_in_line(self, waiter: Waiter, wait: float) -> None:
        if waiter.patient and self._line.patient >= self._most_polls:
            raise OutOfMemory
        self._line.enter(waiter, self._gets)
        self._ask_soon()
        try:
            self._wait(waiter, wait)
        except BaseException:
            self._line.leave(waiter)
            self.release(waiter.deliveries)
            raise
        self._line.leave(waiter)

    def _wait(self, waiter: Waiter, wait: float) -> None:
        """Wait until waiter is done, or the broker is silent for too long."""
        timeout = self._settings.receive_timeout
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            if waiter.done.wait(min(left, timeout)):
                return
            self._drop_if_silent()
        if waiter.patient:
            self._line.hurry(waiter, self._gets)
            self._ask_soon()
        if not waiter.done.wait(timeout):
            self._drop_if_silent()
            late = BrokerUnavailable("the broker did not answer in time")
            waiter.error = OutOfMemory() if self._unheld else late

    def _ask_soon(self) -> None:
        """Ask once for all that comes in this turn of the event loop."""
        if not self._ask_due:
            self._ask_due = True
            gevent.get_hub().loop.run_callback(self._ask)

    def _ask(self) -> None:
        """Fetch what is wanted, unless something is on its way or waits for memory."""
        self._ask_due = False
        wanted = self._line.wanted + (0 if self._poll_due else self._line.patient)
        if self.channel is None or not wanted or self._asked or self._burst or self._unheld:
            return
        count = self._pace.burst(min(wanted, self._ready))
        with self._giving_up():
            if count and self._memory.take_now(amount := count * self._pace.largest):
                self._start_burst(self.channel, count, Grant(self._memory, amount))
            else:
                self._asked = time.monotonic()
                self._gets += 1
                self.channel.basic_get(self._settings.queue, self._on_message)

    def _on_message(
        self, channel: Channel, method: Basic.GetOk, properties: BasicProperties, body: bytes
    ) -> None:
        if channel is not self.channel:
            return
        self._asked, self._ready = 0.0, method.message_count
        delivery = Delivery(method.delivery_tag, body, properties, channel, method.redelivered)
        weight = delivery.weight
        self._pace.note(weight)
        delivery.grant = self._memory.grant()
        if self._memory.take_now(weight):
            delivery.grant.amount = weight
        else:
            self._unheld = delivery
            gevent.spawn(self._hold, delivery, weight)
        self._arrive(delivery)
        self._ask_soon()

    def _hold(self, delivery: Delivery, weight: int) -> None:
        """Hold memory for delivery as soon as there is some, unless nobody needs it any more."""
        while not delivery.closed:
            if self._memory.take_now(weight):
                delivery.grant = Grant(self._memory, weight)
                break
            self._memory.shed()
            gevent.sleep(HOLD)
        self._unheld = None
        self._ask_soon()

    def _on_empty(self, _frame: object) -> None:
        if self.channel is None:
            return
        self._asked, self._ready = 0.0, 0
        self.alive()
        self._line.found_empty(self._gets)
        if self._line.patient and not self._poll_due:
            self._poll_due = True
            gevent.spawn_later(POLL, self._poll)
        self._ask_soon()

    def _start_burst(self, channel: Channel, count: int, grant: Grant) -> None:
        burst = self._burst = Burst(count, grant, time.monotonic())
        self._ready -= count

        def on_message(
            _channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
        ) -> None:
            if burst is self._burst:
                tag = method.delivery_tag
                delivery = Delivery(tag, body, properties, channel, method.redelivered)
                self._on_burst(channel, burst, delivery)

        channel.basic_qos(prefetch_count=count)
        burst.tag = channel.basic_consume(self._settings.queue, on_message)
        gevent.spawn_later(BURST_TIMEOUT, self._watch_burst, channel, burst)

    def _on_burst(self, channel: Channel, burst: Burst, delivery: Delivery) -> None:
        """Take a message of a burst; one for which there is no memory goes back to the queue.

        So do those behind it, to keep their order: pika rejects what comes for a consumer that
        was cancelled. The cancellation goes first, or the consumer would get another message.
        """
        burst.missing -= 1
        burst.sign = time.monotonic()
        weight = delivery.weight
        self._pace.note(weight)
        delivery.grant = burst.cover(weight, self._memory)
        if delivery.grant is None:
            self._end_burst(channel, burst)
            with self._giving_up():
                channel.basic_reject(delivery.tag, requeue=True)
            return
        self._arrive(delivery)
        if not burst.missing:
            self._pace.grow()
            self._end_burst(channel, burst)

    def _watch_burst(self, channel: Channel, burst: Burst) -> None:
        """End burst when others took what it should have brought.

        Only the broker's answer to a later question tells that nothing is on its way: pika gives
        back to the queue what comes for a consumer that was cancelled.
        """
        while burst is self._burst and burst.missing:
            missing = burst.missing
            answered = self._answer_to_a_question(channel).wait(self._settings.receive_timeout)
            if answered and burst is self._burst and missing == burst.missing:
                self._end_burst(channel, burst)
            gevent.sleep(BURST_TIMEOUT)

    def _answer_to_a_question(self, channel: Channel) -> Event:
        answer = Event()
        with suppress(AMQPError):
            channel.basic_qos(prefetch_count=1, callback=lambda _: answer.set())
        return answer

    def _end_burst(self, channel: Channel, burst: Burst) -> None:
        """Cancel the consumer, then settle what waits for that, and go on."""
        if burst.missing:
            burst.missing = self._ready = 0
        burst.grant.close()

        def cancelled(_frame: object) -> None:
            if burst is self._burst:
                self._burst = None
                self._settle()
                self._ask_soon()

        with self._giving_up():
            channel.basic_cancel(burst.tag, callback=cancelled)

    def _arrive(self, delivery: Delivery) -> None:
        self.alive()
        self._unsettled.add(delivery.tag)
        self._line.hand_out(delivery)

    def _poll(self) -> None:
        self._poll_due = False
        self._ask()

    def _drop_if_silent(self) -> None:
        """Renew the connection when an answer is overdue, not when the line is merely long."""
        # A little less than the time-out, as the two clocks need not agree.
        overdue = time.monotonic() - 0.9 * self._settings.receive_timeout
        if 0 < self._asked < overdue or (self._burst and self._burst.sign < overdue):
            self.drop(BrokerUnavailable("the broker did not answer in time"))

    def _settle_soon(self) -> None:
        """Settle once all that is settled in this turn of the event loop."""
        if not self._settle_due:
            self._settle_due = True
            gevent.get_hub().loop.run_callback(self._settle)

    def _settle(self) -> None:
        """Tell the broker what is acknowledged and rejected.

        Not during a burst: its consumer would get more messages for those that are settled.
        """
        self._settle_due = False
        if self.channel is None or self._burst:
            return
        acks, rejections = self._unsettled.take()
        if not (acks or rejections):
            return
        with self._giving_up(), self.channel.connection.joined():
            for tag, multiple in acks:
                self.channel.basic_ack(tag, multiple)
            for tag, requeue in rejections:
                self.channel.basic_reject(tag, requeue)
        self._last_ack = time.monotonic()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Give the connection up when the block cannot use it."""
        try:
            yield
        except AMQPError as error:
            self.drop(error)
