"""One connection to the broker, shared by every request of this process.

The way of a message, from the route to the acknowledgement:

    app.Subscriber.receive  calls Broker.get for what the request wants.
    Broker.get              takes what Line holds; if that is not all, it puts a Waiter into Line,
                            calls Fetch.soon, and waits for Waiter.done.
    Fetch._ask              sends a basic.get or starts a burst for all that Line wants.
    Fetch._on_message       or, in a burst, _on_burst makes a Delivery of what comes, holds memory
                            for it, and by _arrive calls Settler.add and Line.hand_out.
    Line.hand_out           gives it to the Waiter whose turn it is; when that has all it wants,
                            Waiter.done is set and Broker.get returns.
    app.Subscriber.receive  packs the deliveries into a Parcel (which leases them if the request
                            says ack=manual) and answers with a Handover as the body.
    Handover                is read and written piece by piece by the server. When all is written
                            it calls Parcel.settle(True), else Parcel.settle(False).
    Parcel.settle           if written, calls Broker.ack, or leaves the message to its lease; and
                            closes the Delivery, which gives its memory back. If not written, it
                            calls Broker.release: Line.hand_out, for the next request.
    Settler.settle          sends the basic.ack, at the end of the turn of the event loop in which
                            Broker.ack was called, or of the burst under way.

A lease ends by app.Subscriber.ack or reject, or by Leases._expire: Broker.ack or Broker.reject.
"""

import math
import time
from collections.abc import Iterable

import gevent
from door import BrokerUnavailable
from door.amqp import Channel, Link
from door.clients import CONNECTION, SHARE
from door.memory import Memory, OutOfMemory

from subscriber.delivery import Delivery, Handle
from subscriber.fetch import Fetch
from subscriber.line import Line, Waiter
from subscriber.settings import Settings
from subscriber.settle import Settler

# Bytes of the largest message that RabbitMQ takes by default. Room for one is no part of the
# Memory: a single get must be possible while that is nearly full, as small messages are then.
LARGEST_MESSAGE = 16 * 1024 * 1024
# Share of the connections that may be long polls: others must be answered, too.
POLLS = 0.75
# Seconds the connection stays open after the last acknowledgement. A quorum queue takes them
# behind the channel's back: closing at once left 267 of 300 acknowledged messages in the queue,
# a second left none. AMQP has no answer to an acknowledgement that could be waited for.
SETTLE = 1.0


class Broker(Link):
    """Messages of one queue, in the order of sending, for requests in turns.

    It joins Line, where requests wait, Fetch, which takes messages off the queue, and Settler,
    which acknowledges and rejects them.

    A message that its request could not write is held in Line and goes out before the queue's next
    one. It is not requeued, as the broker counts that towards the delivery limit.
    """

    def __init__(self, settings: Settings, memory: Memory) -> None:
        """Prepare for settings, to hold messages in memory; nothing connects before start()."""
        super().__init__(settings.broker, "subscriber")
        self._settings = settings
        self._most_polls = int(memory.size * SHARE * POLLS) // CONNECTION
        self._line = Line()
        self._settler = Settler(self)
        self._fetch = Fetch(self, settings, memory, self._line, self._settler)
        self._finishing = False

    def get(
        self, want: int = 1, room: float = math.inf, wait: float = 0, address: str = ""
    ) -> list[Delivery]:
        """Return at most want messages, together of at most room bytes as lines of JSON.

        Requests of several addresses get theirs in turns.

        An empty list means that the queue was empty, for wait seconds. The caller must ack(),
        release() or reject() every message returned, and close() it after ack() or reject(). Raises
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
        return self._settler.holds(one)

    def ack(self, some: Iterable[Delivery | Handle]) -> None:
        """Take some off the queue; nothing for those whose connection is gone."""
        self._settler.ack(some)

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
        self._settler.reject(some, requeue)

    def stop(self) -> None:
        """Close the connection once the broker had time to take the acknowledgements."""
        self._fetch.end_burst()
        with gevent.Timeout(SETTLE, False):
            while self._fetch.bursting:
                gevent.sleep(0.01)
        self._settler.settle()
        gevent.sleep(max(0.0, self._settler.told + SETTLE - time.monotonic()))
        super().stop()

    def opened(self, channel: Channel) -> None:
        """Use channel, which was just opened."""
        self._fetch.opened(channel)
        self.ready(channel)
        self._fetch.soon()

    def lost(self, reason: object) -> None:
        """Forget what the connection brought, as the broker requeues it; fail who waits."""
        super().lost(reason)
        self._settler.lost()
        self._line.fail(BrokerUnavailable(f"the broker was lost: {reason}"))
        self._fetch.lost()

    def finish(self) -> None:
        """Let nobody wait any longer for messages that are still to come."""
        self._finishing = True
        self._line.hurry_all(self._fetch.gets)
        self._fetch.soon()

    def _stand_in_line(self, waiter: Waiter, wait: float) -> None:
        if waiter.patient and self._line.patient >= self._most_polls:
            raise OutOfMemory
        self._line.enter(waiter, self._fetch.gets)
        self._fetch.soon()
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
            self._line.hurry(waiter, self._fetch.gets)
            self._fetch.soon()
        if not waiter.done.wait(timeout):
            self._drop_if_silent()
            late = BrokerUnavailable("the broker did not answer in time")
            waiter.error = OutOfMemory() if self._fetch.needs_memory else late

    def _drop_if_silent(self) -> None:
        """Renew the connection when an answer is overdue, not when the line is merely long."""
        if self._fetch.silent:
            self.drop(BrokerUnavailable("the broker did not answer in time"))
