# mypy: disable-error-code=no-untyped-call
"""How messages are taken off the queue: one by basic.get, or many in a burst of a consumer."""

import time
from contextlib import suppress
from dataclasses import dataclass

import gevent
from door.amqp import AMQPError, Basic, BasicProperties, Channel
from door.memory import Grant, Memory
from gevent.event import Event

from subscriber.delivery import Delivery
from subscriber.line import Line
from subscriber.pace import Pace
from subscriber.settle import Link, Settler
from subscriber.shared import Shared

# Seconds between two looks whether a burst goes on.
BURST_TIMEOUT = 0.5
# Seconds between two attempts to hold memory for a message that came.
HOLD = 0.02
# Share of the memory that is held when it is short: messages whose gets are on their way may take
# more than there is, if each is as large as it can be.
SHORT = 0.5


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


class Fetch:
    """Takes what the line wants off the queue, and hands it out there; one fetch at a time.

    One message is fetched by basic.get, whose empty answer is the only sign of an empty queue.
    Many come in a burst, at a fifth of the broker's work: a consumer with a prefetch of just so
    many, which is cancelled when it has brought them, so that none is taken off the queue unasked.

    A message holds memory from when it came until it was written. What a burst is expected to
    bring is held before; what comes beyond that goes back to the queue. Only a get may bring a
    message before memory is held for it, and the next get waits until it is. While memory is short,
    that holds for the gets of all queues together: one is on its way at a time, as there is room
    for one such message.
    """

    def __init__(
        self, link: Link, queue: str, timeout: float, shared: Shared, line: Line, settler: Settler
    ) -> None:
        """Fetch from queue by link's channel, which is opened(), for line.

        Messages are held in the shared memory; an answer is overdue after timeout seconds.
        """
        self._link = link
        self._queue = queue
        self._timeout = timeout
        self._memory = shared.memory
        self._spare = shared.spare
        self._line = line
        self._settler = settler
        self._polls = shared.polls
        self._pace = Pace()
        # How many gets were sent, and when the one on its way was.
        self.gets = 0
        self._asked = 0.0
        # The message for which there was no memory yet.
        self._unheld: Delivery | None = None
        self._burst: Burst | None = None
        # How many messages the queue should have left.
        self._ready = 0
        self._poll_due = self._ask_due = False
        # Whether nothing may be fetched.
        self._paused = False

    @property
    def under_way(self) -> bool:
        """Whether the broker may be about to bring a message."""
        return bool(self._asked) or self.bursting

    @property
    def bursting(self) -> bool:
        """Whether a consumer is on the queue."""
        return self._burst is not None

    @property
    def needs_memory(self) -> bool:
        """Whether no message is fetched until there is memory for the last one."""
        return self._unheld is not None or self._spare.waits(self)

    @property
    def silent(self) -> bool:
        """Whether an answer of the broker is overdue."""
        # A little less than the time-out, as the two clocks need not agree.
        overdue = time.monotonic() - 0.9 * self._timeout
        return 0 < self._asked < overdue or bool(self._burst and self._burst.sign < overdue)

    def opened(self, channel: Channel) -> None:
        """Hear on channel, which was just opened, that the queue is empty."""
        channel.add_callback(
            lambda _frame: self._on_empty(channel), [Basic.GetEmpty], one_shot=False
        )

    def lost(self) -> None:
        """Wait for nothing more of a channel that is gone."""
        if self._burst:
            self._burst.grant.close()
        self._burst, self._ready = None, 0
        self._answered()

    def soon(self) -> None:
        """Ask once for all that comes in this turn of the event loop."""
        if not self._ask_due:
            self._ask_due = True
            gevent.get_hub().loop.run_callback(self._ask)

    def pause(self) -> None:
        """Fetch nothing more until resume()."""
        self._paused = True

    def resume(self) -> None:
        """Fetch what is wanted by now."""
        if self._paused:
            self._paused = False
            self.soon()

    def emptied(self) -> None:
        """Take note that the queue has nothing left: no burst is worth it."""
        self._ready = 0

    def end_burst(self) -> None:
        """Let the burst under way, if any, bring no more."""
        if self._burst and self._burst.missing and self._link.channel is not None:
            self._end_burst(self._link.channel, self._burst)

    def _ask(self) -> None:
        """Fetch what is wanted, unless something is on its way or waits for memory."""
        self._ask_due = False
        if self._paused:
            return
        channel = self._link.channel
        wanted = self._line.wanted + (0 if self._poll_due else self._line.patient)
        if channel is None or not wanted or self._asked or self._burst or self._unheld:
            return
        count = self._pace.burst(min(wanted, self._ready))
        with self._link.giving_up():
            if count and self._memory.take_now(amount := count * self._pace.largest):
                self._start_burst(channel, count, Grant(self._memory, amount))
            elif not self._short or self._spare.take(self, self.soon):
                self._asked = time.monotonic()
                self.gets += 1
                channel.basic_get(self._queue, self._on_message)

    @property
    def _short(self) -> bool:
        return self._memory.held > self._memory.size * SHORT

    def _answered(self) -> None:
        """Wait for no get any more; what it brought may still have to wait for memory."""
        self._asked = 0.0
        if self._unheld is None:
            self._spare.give(self)

    def _arrive(self, delivery: Delivery) -> None:
        self._link.alive()
        self._settler.add(delivery.tag)
        self._line.hand_out(delivery)

    # One by one.

    def _on_message(
        self, channel: Channel, method: Basic.GetOk, properties: BasicProperties, body: bytes
    ) -> None:
        if channel is not self._link.channel:
            return
        self._ready = method.message_count
        delivery = Delivery(method.delivery_tag, body, properties, channel, method.redelivered)
        weight = delivery.weight
        self._pace.note(weight)
        delivery.grant = self._memory.grant()
        if self._memory.take_now(weight):
            delivery.grant.amount = weight
        else:
            self._unheld = delivery
            gevent.spawn(self._hold, delivery, weight)
        self._answered()
        self._arrive(delivery)
        self.soon()

    def _hold(self, delivery: Delivery, weight: int) -> None:
        """Hold memory for delivery as soon as there is some, unless nobody needs it any more."""
        while not delivery.closed:
            if self._memory.take_now(weight):
                delivery.grant = Grant(self._memory, weight)
                break
            self._memory.shed()
            gevent.sleep(HOLD)
        self._unheld = None
        self._spare.give(self)
        self.soon()

    def _on_empty(self, channel: Channel) -> None:
        if channel is not self._link.channel:
            return
        self._ready = 0
        self._answered()
        self._link.alive()
        self._line.found_empty(self.gets)
        if self._line.patient and not self._poll_due:
            self._poll_due = True
            gevent.spawn_later(self._polls.pause(), self._poll)
        self.soon()

    def _poll(self) -> None:
        self._poll_due = False
        self._ask()

    # Many at once.

    def _start_burst(self, channel: Channel, count: int, grant: Grant) -> None:
        burst = self._burst = Burst(count, grant, time.monotonic())
        # The consumer would get more messages for those that are settled.
        self._settler.pause()
        self._ready -= count

        def on_message(
            _channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
        ) -> None:
            if burst is self._burst:
                tag = method.delivery_tag
                delivery = Delivery(tag, body, properties, channel, method.redelivered)
                self._on_burst(channel, burst, delivery)

        channel.basic_qos(prefetch_count=count)
        burst.tag = channel.basic_consume(self._queue, on_message)
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
            with self._link.giving_up():
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
            answered = self._answer_to_a_question(channel).wait(self._timeout)
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
                self._settler.resume()
                self.soon()

        with self._link.giving_up():
            channel.basic_cancel(burst.tag, callback=cancelled)
