"""The requests that wait for messages, and the messages that wait for a request."""

import heapq
import math
from dataclasses import dataclass, field

from gevent.event import Event

from subscriber.delivery import Delivery


@dataclass(eq=False)
class Waiter:
    """A request that waits for want messages of room bytes, or less when the queue is empty."""

    want: int
    room: float
    # Whether an empty queue does not end its wait: a long poll that has no message yet.
    patient: bool
    # Where its client is.
    address: str = ""
    # Its place in the line.
    number: int = 0
    # Gets sent before it joined: an empty answer to one of those says nothing to it.
    since: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    done: Event = field(default_factory=Event)
    error: Exception | None = None

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


class Turns:
    """Requests whose addresses take turns; those of one address are in the order of asking."""

    def __init__(self) -> None:
        """Begin without any."""
        # The address whose turn it is comes first.
        self._lines: dict[str, dict[int, Waiter]] = {}

    def add(self, waiter: Waiter) -> None:
        """Let waiter be the last of its address."""
        self._lines.setdefault(waiter.address, {})[waiter.number] = waiter

    def remove(self, waiter: Waiter) -> None:
        """Forget waiter, if it is here; its address has had its turn."""
        line = self._lines.get(waiter.address, {})
        if line.pop(waiter.number, None):
            del self._lines[waiter.address]
            if line:
                self._lines[waiter.address] = line

    def first(self) -> Waiter | None:
        """Return whose turn it is, if there is anybody."""
        for line in self._lines.values():
            return next(iter(line.values()))
        return None

    def clear(self) -> None:
        """Forget all."""
        self._lines.clear()


class Line:
    """Requests that wait for messages, or messages that wait for a request; never both.

    Addresses take turns: one with hundreds of requests delays another's by one of them. Messages
    are held in the order of the queue, and requests take those before they wait.
    """

    def __init__(self) -> None:
        """Begin without any."""
        # How many messages the impatient still miss.
        self.wanted = 0
        # A heap, by tag.
        self._held: list[tuple[int, Delivery]] = []
        # By their numbers, in the order of asking.
        self._impatient: dict[int, Waiter] = {}
        self._patient: dict[int, Waiter] = {}
        self._turns = Turns()
        self._arrived = 0

    @property
    def patient(self) -> int:
        """How many requests wait although the queue is empty."""
        return len(self._patient)

    @property
    def first(self) -> Delivery | None:
        """The first message that is held, if any is."""
        return self._held[0][1] if self._held else None

    def serve(self, waiter: Waiter) -> None:
        """Give waiter what is held here."""
        while self._held and not waiter.done.is_set():
            if waiter.take(self._held[0][1]):
                heapq.heappop(self._held)

    def enter(self, waiter: Waiter, since: int) -> None:
        """Let waiter wait at the end of the line; since is how many gets were sent before."""
        self._arrived += 1
        waiter.number, waiter.since = self._arrived, since
        self._turns.add(waiter)
        if waiter.patient:
            self._patient[waiter.number] = waiter
        else:
            self._impatient[waiter.number] = waiter
            self.wanted += waiter.missing

    def leave(self, waiter: Waiter) -> None:
        """Let waiter wait no more."""
        self._turns.remove(waiter)
        self._patient.pop(waiter.number, None)
        if self._impatient.pop(waiter.number, None):
            self.wanted -= waiter.missing

    def hurry(self, waiter: Waiter, since: int) -> None:
        """Have waiter get what there is now; what came since the last look is not missed."""
        self.leave(waiter)
        waiter.patient = False
        self.enter(waiter, since)

    def hurry_all(self, since: int) -> None:
        """Hurry all who would go on waiting."""
        for waiter in list(self._patient.values()):
            self.hurry(waiter, since)

    def hand_out(self, delivery: Delivery) -> None:
        """Give delivery to the first who has room for it, or hold it for the next to come."""
        while waiter := self._turns.first():
            taken = waiter.take(delivery)
            if taken and not waiter.patient:
                self.wanted -= 1
            if waiter.done.is_set():
                self.leave(waiter)
            if taken:
                return
        heapq.heappush(self._held, (delivery.tag, delivery))

    def give_up(self) -> list[Delivery]:
        """Return what is held, and hold it no more."""
        held, self._held = self._held, []
        return [delivery for _, delivery in held]

    def found_empty(self, asked: int) -> None:
        """End the wait of the impatient who came before get number asked, whose answer is empty.

        It says nothing to those who came later: the queue may have had a message by then.
        """
        while (waiter := _first(self._impatient)) and waiter.since < asked:
            waiter.done.set()
            self.leave(waiter)

    def fail(self, error: Exception) -> None:
        """End all waits by error; what came for them, and what is held, comes again."""
        waiting = [*self._impatient.values(), *self._patient.values()]
        lost = [one for _, one in self._held]
        for waiter in waiting:
            lost += waiter.deliveries
            waiter.deliveries = []
            waiter.error = error
            waiter.done.set()
        for delivery in lost:
            delivery.close()
        self._held.clear()
        self._turns.clear()
        self._impatient.clear()
        self._patient.clear()
        self.wanted = 0


def _first(line: dict[int, Waiter]) -> Waiter | None:
    return next(iter(line.values()), None)
