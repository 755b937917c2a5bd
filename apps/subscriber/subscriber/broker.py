# mypy: disable-error-code=no-untyped-call
"""One connection to the broker, shared by every request of this process."""

import heapq
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile

import gevent
from door import BrokerUnavailable
from door.amqp import Link
from gevent.event import Event
from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.spec import Basic, BasicProperties

from subscriber.delivery import Delivery
from subscriber.settings import Settings

# Seconds the connection stays open after the last acknowledgement. A quorum queue takes them
# behind the channel's back: closing at once left 267 of 300 acknowledged messages in the queue,
# a second left none. AMQP has no answer to an acknowledgement that could be waited for.
SETTLE = 1.0
# Messages that a burst brings: as many as many must want and the queue must have, for two more
# commands to be worth it; and as many as fit into this process, each of them of 1 MiB.
LEAST_BURST, LARGEST_BURST = 4, 100
# Seconds between two looks whether a burst goes on.
BURST_TIMEOUT = 0.5
# Seconds between two looks into an empty queue while requests wait for a message.
POLL = 0.05


@dataclass(eq=False)
class Waiter:
    """A request that waits for want messages of room bytes, or less when the queue is empty."""

    want: int
    room: float
    # Whether it goes on waiting although the queue is empty, while it has nothing.
    patient: bool
    # Its place in the line, and how many basic.gets were sent when it wanted to know.
    number: int = 0
    since: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    done: Event = field(default_factory=Event)
    error: str = ""

    @property
    def missing(self) -> int:
        """How many messages it still wants."""
        return self.want - len(self.deliveries)

    def take(self, delivery: Delivery) -> bool:
        """Take delivery unless it does not fit; the last one ends the wait."""
        if self.room < math.inf:
            self.room -= delivery.size
        fits = self.room >= 0
        if fits:
            self.deliveries.append(delivery)
        if not fits or len(self.deliveries) == self.want:
            self.done.set()
        return fits


class Broker(Link):
    """Messages of one queue, in the order of sending, for requests in the order of asking.

    One is fetched by basic.get, whose empty answer is the only sign of an empty queue. Many come
    in a burst, at a fifth of the broker's work: a consumer with a prefetch of just so many, which
    is cancelled when it has brought them, so that none is taken off the queue unasked.

    A message that its request could not write is held here and goes out before the queue's next
    one. It is not requeued, as the broker counts that towards the delivery limit.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepare for settings; nothing connects before start()."""
        super().__init__(settings.broker, "subscriber")
        self._settings = settings
        # A heap; while it holds anything nobody waits, because requests take from it first.
        self._held: list[Delivery] = []
        # By their numbers, in the order of asking.
        self._impatient: dict[int, Waiter] = {}
        self._patient: dict[int, Waiter] = {}
        self._arrived = 0
        # How many messages the impatient still miss.
        self._wanted = 0
        # When the basic.get on its way was sent, and how many were sent before.
        self._asked = 0.0
        self._questions = 0
        # How many messages a burst has still to bring, and how many the queue should have left.
        self._burst = self._ready = 0
        self._burst_tag = ""
        self._burst_sign = 0.0
        self._poll_due = self._ask_due = False
        # Tags in the order of delivery, and what the broker is to be told of them next.
        self._unsettled: dict[int, None] = {}
        self._acked: set[int] = set()
        self._rejected: dict[int, bool] = {}
        self._settle_due = False
        self._last_ack = 0.0
        self._finishing = False

    def get(self, want: int = 1, room: float = math.inf, wait: float = 0) -> list[Delivery]:
        """Return at most want messages, together of at most room bytes as lines of JSON.

        An empty list means that the queue was empty, for wait seconds. For each of them, ack(),
        release() or reject() must follow. Raises BrokerUnavailable at once when not connected,
        when the connection is lost, and when no answer comes within receive_timeout seconds.
        """
        if self.channel is None:
            raise BrokerUnavailable("not connected to the broker")
        wait = 0 if self._finishing else wait
        waiter = Waiter(want, room, patient=wait > 0)
        while self._held and not waiter.done.is_set():
            if waiter.take(self._held[0]):
                heapq.heappop(self._held)
        if not waiter.done.is_set():
            self._enter(waiter)
            try:
                self._wait(waiter, wait)
            finally:
                self._leave(waiter)
        if waiter.error and not waiter.deliveries:
            raise BrokerUnavailable(waiter.error)
        return waiter.deliveries

    def holds(self, delivery: Delivery) -> bool:
        """Whether delivery can still be settled; after a lost connection it comes again."""
        tag = delivery.tag
        settled = tag in self._acked or tag in self._rejected
        return delivery.channel is self.channel and tag in self._unsettled and not settled

    def ack(self, deliveries: Iterable[Delivery]) -> None:
        """Take deliveries off the queue; nothing for those whose connection is gone."""
        self._acked.update(one.tag for one in deliveries if self.holds(one))
        self._settle_soon()

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Hand deliveries to the next requests, in their order; they may have been seen before."""
        for delivery in sorted(filter(self.holds, deliveries)):
            self._hand_out(replace(delivery, redelivered=True))

    def reject(self, deliveries: Iterable[Delivery], requeue: bool) -> None:
        """Give deliveries back to the queue, or to the dead ones; both are counted by the broker.

        Each alone, as on 4.3 a nack of many does not count towards the delivery limit, and in
        their order, which the queue keeps.
        """
        self._rejected.update((one.tag, requeue) for one in deliveries if self.holds(one))
        self._settle_soon()

    def stop(self) -> None:
        """Close the connection once the broker had time to take the acknowledgements."""
        if self._burst_tag and self._burst and self.channel is not None:
            self._burst = 0
            self._end_burst(self.channel, self._burst_tag)
        with gevent.Timeout(SETTLE, False):
            while self._burst_tag:
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
        self._held.clear()
        self._unsettled.clear()
        self._acked.clear()
        self._rejected.clear()
        for waiter in [*self._impatient.values(), *self._patient.values()]:
            # What it has comes again, too.
            waiter.deliveries.clear()
            waiter.error = f"the broker was lost: {reason}"
            waiter.done.set()
        self._impatient.clear()
        self._patient.clear()
        self._wanted = self._burst = self._ready = 0
        self._burst_tag, self._asked = "", 0.0

    def finish(self) -> None:
        """Let nobody wait any longer for messages that are still to come."""
        self._finishing = True
        for waiter in list(self._patient.values()):
            self._hurry(waiter)

    def _enter(self, waiter: Waiter) -> None:
        self._arrived += 1
        waiter.number, waiter.since = self._arrived, self._questions
        if waiter.patient:
            self._patient[waiter.number] = waiter
        else:
            self._impatient[waiter.number] = waiter
            self._wanted += waiter.missing
        self._ask_soon()

    def _leave(self, waiter: Waiter) -> None:
        self._patient.pop(waiter.number, None)
        if self._impatient.pop(waiter.number, None):
            self._wanted -= waiter.missing

    def _hurry(self, waiter: Waiter) -> None:
        """Have waiter get what there is now; what came since the last look is not missed."""
        self._leave(waiter)
        waiter.patient = False
        self._enter(waiter)

    def _wait(self, waiter: Waiter, wait: float) -> None:
        """Wait until waiter is done, or the broker is silent for too long."""
        timeout = self._settings.receive_timeout
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            if waiter.done.wait(min(left, timeout)):
                return
            self._drop_if_silent()
        if waiter.patient:
            self._hurry(waiter)
        if not waiter.done.wait(timeout):
            self._drop_if_silent()
            waiter.error = "the broker did not answer in time"

    def _ask_soon(self) -> None:
        """Ask once for all that comes in this turn of the event loop."""
        if not self._ask_due:
            self._ask_due = True
            gevent.get_hub().loop.run_callback(self._ask)

    def _ask(self) -> None:
        """Fetch what is wanted, unless the answer to an earlier question is still to come."""
        self._ask_due = False
        wanted = self._wanted + (0 if self._poll_due else len(self._patient))
        if self.channel is None or not wanted or self._asked or self._burst_tag:
            return
        try:
            count = min(wanted, self._ready, LARGEST_BURST)
            if count >= LEAST_BURST:
                self._start_burst(self.channel, count)
            else:
                self._asked = time.monotonic()
                self._questions += 1
                self.channel.basic_get(self._settings.queue, self._on_message)
        except AMQPError as error:
            self.drop(error)

    def _on_message(
        self, channel: Channel, method: Basic.GetOk, properties: BasicProperties, body: bytes
    ) -> None:
        if channel is self.channel:
            self._asked, self._ready = 0.0, method.message_count
            redelivered = method.redelivered
            self._arrive(Delivery(method.delivery_tag, body, properties, channel, redelivered))
            self._ask_soon()

    def _on_empty(self, _frame: object) -> None:
        if self.channel is None:
            return
        self._asked, self._ready = 0.0, 0
        self.alive()
        # Who came after the question may have come after a new message, too: ask again for them.
        while (waiter := _first(self._impatient)) and waiter.since < self._questions:
            waiter.done.set()
            self._leave(waiter)
        if self._patient and not self._poll_due:
            self._poll_due = True
            gevent.spawn_later(POLL, self._poll)
        self._ask_soon()

    def _start_burst(self, channel: Channel, count: int) -> None:
        self._burst = count
        self._ready -= count

        def on_message(
            _channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
        ) -> None:
            if channel is self.channel:
                self._burst -= 1
                self._burst_sign = time.monotonic()
                redelivered = method.redelivered
                self._arrive(Delivery(method.delivery_tag, body, properties, channel, redelivered))
                if not self._burst:
                    self._end_burst(channel, method.consumer_tag)

        self._burst_sign = time.monotonic()
        channel.basic_qos(prefetch_count=count)
        self._burst_tag = channel.basic_consume(self._settings.queue, on_message)
        gevent.spawn_later(BURST_TIMEOUT, self._watch_burst, channel, self._burst_tag)

    def _watch_burst(self, channel: Channel, tag: str) -> None:
        """End the burst of tag when others took what it should have brought.

        Only the broker's answer to a later question tells that nothing is on its way: pika gives
        back to the queue what comes for a consumer that was cancelled.
        """
        while tag == self._burst_tag and self._burst:
            missing = self._burst
            answered = self._answer_to_a_question(channel).wait(self._settings.receive_timeout)
            if answered and tag == self._burst_tag and missing == self._burst:
                self._burst = self._ready = 0
                self._end_burst(channel, tag)
            gevent.sleep(BURST_TIMEOUT)

    def _answer_to_a_question(self, channel: Channel) -> Event:
        answer = Event()
        with suppress(AMQPError):
            channel.basic_qos(prefetch_count=1, callback=lambda _: answer.set())
        return answer

    def _end_burst(self, channel: Channel, tag: str) -> None:
        """Cancel the consumer, then settle what waits for that, and go on."""

        def cancelled(_frame: object) -> None:
            if channel is self.channel:
                self._burst_tag = ""
                self._settle()
                self._ask_soon()

        try:
            channel.basic_cancel(tag, callback=cancelled)
        except AMQPError as error:
            self.drop(error)

    def _arrive(self, delivery: Delivery) -> None:
        self.alive()
        self._unsettled[delivery.tag] = None
        self._hand_out(delivery)

    def _poll(self) -> None:
        self._poll_due = False
        self._ask()

    def _hand_out(self, delivery: Delivery) -> None:
        while waiters := [one for one in map(_first, (self._impatient, self._patient)) if one]:
            waiter = min(waiters, key=lambda one: one.number)
            missing = waiter.missing
            taken = waiter.take(delivery)
            if not waiter.patient:
                self._wanted -= missing - waiter.missing
            if waiter.done.is_set():
                self._leave(waiter)
            if taken:
                return
        heapq.heappush(self._held, delivery)

    def _drop_if_silent(self) -> None:
        """Renew the connection when an answer is overdue, not when the line is merely long."""
        # A little less than the time-out, as the two clocks need not agree.
        overdue = time.monotonic() - 0.9 * self._settings.receive_timeout
        if 0 < self._asked < overdue or (self._burst_tag and self._burst_sign < overdue):
            self.drop(BrokerUnavailable("the broker did not answer in time"))

    def _settle_soon(self) -> None:
        """Settle once all that is settled in this turn of the event loop."""
        if not self._settle_due:
            self._settle_due = True
            gevent.get_hub().loop.run_callback(self._settle)

    def _settle(self) -> None:
        """Tell the broker what is acknowledged and rejected, by as few methods as possible.

        Not during a burst: its consumer would get more messages for those that are settled.
        """
        self._settle_due = False
        acked, rejected = self._acked, self._rejected
        if self.channel is None or self._burst_tag or not (acked or rejected):
            return
        self._acked, self._rejected = set(), {}
        # `multiple` is for all up to a tag: where nothing else is below it.
        prefix = list(takewhile(acked.__contains__, self._unsettled))
        for tag in (*acked, *rejected):
            del self._unsettled[tag]
        try:
            with self.channel.connection.joined():
                if prefix:
                    self.channel.basic_ack(prefix[-1], multiple=True)
                for tag in sorted(acked.difference(prefix)):
                    self.channel.basic_ack(tag)
                for tag, requeue in sorted(rejected.items()):
                    self.channel.basic_reject(tag, requeue)
        except AMQPError as error:
            self.drop(error)
        self._last_ack = time.monotonic()


def _first(line: dict[int, Waiter]) -> Waiter | None:
    return next(iter(line.values()), None)
