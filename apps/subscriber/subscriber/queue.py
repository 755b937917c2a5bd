# mypy: disable-error-code=no-untyped-call
"""One queue of the broker, by a channel of its own.

The way of a message, from the route to the acknowledgement:

    app.Subscriber.receive  finds the Queue that the path names, and calls its get.
    Queue.get               takes what Line holds; if that is not all, it puts a Waiter into Line,
                            opens the channel, calls Fetch.soon, and waits for Waiter.done.
    Fetch._ask              sends a basic.get or starts a burst for all that Line wants.
    Fetch._on_message       or, in a burst, _on_burst makes a Delivery of what comes, holds memory
                            for it, and by _arrive calls Settler.add and Line.hand_out.
    Line.hand_out           gives it to the Waiter whose turn it is; when that has all it wants,
                            Waiter.done is set and Queue.get returns.
    app.Subscriber.receive  packs the deliveries into a Parcel (which leases them if the request
                            says ack=manual) and answers with a Handover as the body.
    Handover                is read and written piece by piece by the server. When all is written
                            it calls Parcel.settle(True), else Parcel.settle(False).
    Parcel.settle           if written, calls Queue.ack, or leaves the message to its lease; and
                            closes the Delivery, which gives its memory back. If not written, it
                            calls Queue.release: Line.hand_out, for the next request.
    Settler.settle          sends the basic.ack, at the end of the turn of the event loop in which
                            Queue.ack was called, or of the burst under way.

app.Subscriber.peek takes messages the same way, by Queue.peek, which hands them to Line at once.
What Line holds is given back to the broker by Held, when another program consumes the queue.

A lease ends by app.Subscriber.ack or reject, or by Leases._expire: Queue.ack or Queue.reject.
"""

import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy

from door import BrokerUnavailable
from door.amqp import DRAIN, AMQPError, Channel, ChannelClosedByBroker, Link
from door.memory import OutOfMemory

from subscriber.channel import Answers, own_channel
from subscriber.delivery import Delivery, Handle
from subscriber.fetch import Fetch
from subscriber.held import Consumers, Held
from subscriber.line import Line, Waiter
from subscriber.settings import Settings
from subscriber.settle import Settler
from subscriber.shared import Shared

log = logging.getLogger(__name__)

# Share of the memory beyond which no peek takes further messages off the queue. What it took may be
# held for long. However many queues are peeked at, that is little more than this share, and the
# rest is left for those who receive.
PEEKS = 0.25


class Queue:
    """Messages of one queue, in the order of sending, for requests in turns.

    It joins Line, where requests wait, Fetch, which takes messages off the queue, and Settler,
    which acknowledges and rejects them. Their channel is opened for the first request, and anew
    for the next one after it was closed: what ends it ends no other queue's.

    A message that its request could not write is held in Line and goes out before the queue's next
    one. It is not requeued, as the broker counts that towards the delivery limit.
    """

    def __init__(self, name: str, link: Link, settings: Settings, shared: Shared) -> None:
        """Serve the queue of name by link's connection, within what the queues share."""
        self.channel: Channel | None = None
        self._name = name
        self._link = link
        self._timeout = settings.receive_timeout
        self._memory = shared.memory
        self._polls = shared.polls
        # The channel that is being opened, and since when.
        self._opening: Channel | None = None
        self._since = 0.0
        self._line = Line()
        self._settler = Settler(self)
        self._fetch = Fetch(self, name, self._timeout, shared, self._line, self._settler)
        self._held = Held(self._line, self._settler, Consumers(name, settings))
        self._finishing = False
        self._logged = ""

    @property
    def bursting(self) -> bool:
        """Whether a consumer is on the queue."""
        return self._fetch.bursting

    @property
    def idle(self) -> bool:
        """Whether no message of it is here or on its way."""
        return self._settler.oldest == math.inf and not self._fetch.under_way

    @property
    def keeps_some(self) -> bool:
        """Whether a message is here that is held or leased rather than on its way to a client."""
        return self._settler.oldest < time.monotonic() - DRAIN

    @property
    def told(self) -> float:
        """When the broker was last told what became of messages, by time.monotonic()."""
        return self._settler.told

    def get(
        self, want: int = 1, room: float = math.inf, wait: float = 0, address: str = ""
    ) -> list[Delivery]:
        """Return at most want messages, together of at most room bytes as lines of JSON.

        Requests of several addresses get theirs in turns.

        An empty list means that the queue was empty, for wait seconds. The caller must ack(),
        release() or reject() every message returned, and close() it after ack() or reject(). Raises
        BrokerUnavailable at once when not connected, when the connection or the channel is lost,
        and when no answer comes within receive_timeout seconds; OutOfMemory when there is no room
        for a message in that time, and at once when too many requests wait.
        """
        if not self._link.up:
            raise BrokerUnavailable("not connected to the broker")
        wait = 0 if self._finishing else wait
        waiter = Waiter(want, room, patient=wait > 0, address=address)
        self._line.serve(waiter)
        if not waiter.done.is_set():
            self._stand_in_line(waiter, wait)
        if waiter.error and not waiter.deliveries:
            raise waiter.error
        return waiter.deliveries

    def peek(self, most: int, room: float, address: str = "") -> list[Delivery]:
        """Return copies of the next messages, at most most and, but for the first, of room bytes.

        The messages stay for the next requests. They are not given back to the broker, which would
        count it. Each is got alone: a burst may bring more than fits. Raises what get() does.
        """
        found: list[Delivery] = []
        try:
            while len(found) < most and room > 0 and self._may_peek(found):
                got = self.get(room=room if found else math.inf, address=address)
                if not got:
                    break
                found += got
                room -= got[0].size
            return [copy(one) for one in found]
        finally:
            self._put_back(found)

    def holds(self, one: Delivery | Handle) -> bool:
        """Whether one can still be settled; after a lost channel it comes again."""
        return self._settler.holds(one)

    def ack(self, some: Iterable[Delivery | Handle]) -> None:
        """Take some off the queue; nothing for those whose channel is gone."""
        self._settler.ack(some)

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Hand deliveries to the next requests, in their order; they may have been seen before."""
        self._put_back(deliveries, redelivered=True)

    def reject(self, some: Iterable[Delivery | Handle], requeue: bool) -> None:
        """Give some back to the queue, or to the dead ones; both are counted by the broker."""
        self._settler.reject(some, requeue)

    def purge(self) -> int:
        """Drop what waits in the queue or is held here; return how many messages that were.

        What is leased or on its way to a client stays. Raises BrokerUnavailable.
        """
        with own_channel(self._link, self._timeout, f"the queue {self._name!r}") as channel:
            answers = Answers(channel, self._timeout)
            answer = answers.to(lambda: channel.queue_purge(self._name, answers.put))
        self._link.alive()
        self._fetch.emptied()
        held = self._line.give_up()
        self.ack(held)
        for delivery in held:
            delivery.close()
        return int(answer.method.message_count) + len(held)

    def finish(self) -> None:
        """Let nobody wait any longer for messages that are still to come."""
        self._finishing = True
        self._line.hurry_all(self._fetch.gets)
        self._fetch.soon()

    def pause(self) -> None:
        """Fetch nothing until resume()."""
        self._fetch.pause()

    def resume(self) -> None:
        """Fetch what is wanted."""
        self._fetch.resume()

    def moved(self) -> None:
        """Go on by the link's new connection, for those who wait; called when idle."""
        self._forget()
        if self._line.wanted or self._line.patient:
            self.open()

    def end_burst(self) -> None:
        """Let the burst under way, if any, bring no more."""
        self._fetch.end_burst()

    def settle(self) -> None:
        """Tell the broker at once what is acknowledged and rejected."""
        self._settler.settle()

    def alive(self) -> None:
        """Take note that the broker does what it was asked."""
        self._logged = ""
        self._link.alive()

    def lost(self, reason: str) -> None:
        """Forget the channel and what it brought, as the broker requeues it; fail who waits."""
        self._forget()
        self._line.fail(BrokerUnavailable(reason))

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Give the channel up when the block cannot use it."""
        try:
            yield
        except AMQPError as error:
            self._give_up(error)

    def open(self) -> None:
        """Open a channel, unless there is one or it is on its way."""
        main = self._link.channel
        if main is None or self.channel or self._opening:
            return
        with self.giving_up():
            self._opening = main.connection.channel(on_open_callback=self._opened)
            self._opening.add_on_close_callback(self._closed)
            self._since = time.monotonic()

    def _may_peek(self, found: Collection[Delivery]) -> bool:
        """Whether there is memory for one more message than found; OutOfMemory if not for one."""
        if self._line.first or self._memory.held < PEEKS * self._memory.size:
            return True
        if not found:
            raise OutOfMemory
        return False

    def _put_back(self, deliveries: Iterable[Delivery], redelivered: bool = False) -> None:
        for delivery in sorted(deliveries, key=lambda one: one.tag):
            if self.holds(delivery):
                delivery.redelivered |= redelivered
                self._line.hand_out(delivery)
            else:
                delivery.close()

    def _forget(self) -> None:
        self.channel = self._opening = None
        self._settler.lost()
        self._fetch.lost()

    def _opened(self, channel: Channel) -> None:
        if channel is not self._opening:
            return  # of a connection that was moved away from
        self.channel, self._opening = channel, None
        self._fetch.opened(channel)
        self._held.watch()
        self._link.alive()
        self._fetch.soon()

    def _closed(self, channel: Channel, reason: Exception) -> None:
        # If the connection itself has ended, Link knows.
        if channel is self.channel and isinstance(reason, ChannelClosedByBroker):
            # One line for each new reason: a missing queue would have one for each request.
            if repr(reason) != self._logged:
                self._logged = repr(reason)
                log.warning("The channel of queue %r was closed: %s", self._name, self._logged)
            self.lost(f"the channel was closed: {reason}")

    def _give_up(self, reason: Exception) -> None:
        """Close the channel; cut the connection if it is that which cannot be used."""
        main, channel = self._link.channel, self.channel or self._opening
        self.lost(f"the channel was given up: {reason}")
        if main and not main.connection.is_open:
            self._link.drop(reason)
        elif channel:
            with suppress(AMQPError):
                channel.close()

    def _stand_in_line(self, waiter: Waiter, wait: float) -> None:
        if not waiter.patient:
            self._wait_in_line(waiter, wait)
            return
        self._polls.enter()
        try:
            self._wait_in_line(waiter, wait)
        finally:
            self._polls.leave()

    def _wait_in_line(self, waiter: Waiter, wait: float) -> None:
        self._line.enter(waiter, self._fetch.gets)
        self.open()
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
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            if waiter.done.wait(min(left, self._timeout)):
                return
            self._give_up_if_silent()
        if waiter.patient:
            self._line.hurry(waiter, self._fetch.gets)
            self._fetch.soon()
        if not waiter.done.wait(self._timeout):
            self._give_up_if_silent()
            late = BrokerUnavailable("the broker did not answer in time")
            waiter.error = OutOfMemory() if self._fetch.needs_memory else late

    def _give_up_if_silent(self) -> None:
        """Give the channel up when an answer is overdue, not when the line is merely long.

        It is the whole connection when nothing else came over it either.
        """
        # A little less than the time-out, as the clocks need not agree.
        overdue = time.monotonic() - 0.9 * self._timeout
        if self._fetch.silent or (self._opening and self._since < overdue):
            late = BrokerUnavailable("the broker did not answer in time")
            if self._link.heard < overdue:
                self._link.drop(late)
            else:
                self._give_up(late)
