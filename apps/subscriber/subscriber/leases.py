"""Messages that clients hold for a time, each by a receipt."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gevent
import werkzeug.exceptions
from door.memory import Memory, OutOfMemory

from subscriber.delivery import Delivery, Handle
from subscriber.held import LONGEST
from subscriber.queue import Queue

# Seconds between two looks for leases that have ended.
TICK = 0.5
# Random bytes of a receipt, so that none can be guessed.
RECEIPT = 16
# Bytes of memory that a lease takes.
LEASE = 1024


class Gone(werkzeug.exceptions.Gone):
    """Receipts that are used, expired, or not of this queue and instance; nothing was done."""

    def __init__(self, receipts: Sequence[str]) -> None:
        """Name the receipts."""
        super().__init__(f"{len(receipts)} of the receipts are used, expired, or not of here.")
        self.details = {"gone": list(receipts)}


@dataclass(slots=True)
class _Lease:
    handle: Handle
    end: float
    last_end: float


class Leases:
    """The leases of one queue; they end with this process, or with the queue's channel.

    A lease holds no message body, so a client that takes ever more leases uses little memory.
    """

    def __init__(self, queue: Queue, seconds: float, memory: Memory, door: str = "") -> None:
        """Give leases of seconds for queue's messages, and hold memory for them.

        Where the door has a name, receipts begin with it, so that other doors know whose they are.
        """
        self._prefix = f"{door}." if door else ""
        self._queue = queue
        self._seconds = seconds
        self._memory = memory
        self._leases: dict[str, _Lease] = {}
        self._keeper: gevent.Greenlet | None = None

    def grant(self, delivery: Delivery) -> str:
        """Lease delivery from now on and return the receipt; raises OutOfMemory."""
        if not self._memory.take_now(LEASE):
            raise OutOfMemory
        if self._keeper is None:
            self._keeper = gevent.spawn(self._expire)
        receipt = self._prefix + secrets.token_urlsafe(RECEIPT)
        last_end = delivery.came + LONGEST
        end = min(time.monotonic() + self._seconds, last_end)
        self._leases[receipt] = _Lease(delivery.handle, end, last_end)
        return receipt

    def take(self, receipts: Iterable[str]) -> list[Handle]:
        """End the leases of receipts and return what was leased; raises Gone for any, or none."""
        return [self._end(receipt).handle for receipt in self._find(receipts)]

    def forget(self, receipts: Iterable[str]) -> None:
        """End the leases of receipts that no client has got."""
        for receipt in receipts:
            if receipt in self._leases:
                self._end(receipt)

    def extend(self, receipts: Iterable[str]) -> int:
        """Let leases last for as long as new ones, within LONGEST; how many. Raises Gone."""
        found = self._find(receipts)
        for lease in found.values():
            lease.end = min(time.monotonic() + self._seconds, lease.last_end)
        return len(found)

    def _find(self, receipts: Iterable[str]) -> dict[str, _Lease]:
        now = time.monotonic()
        wanted = list(dict.fromkeys(receipts))
        found = {
            receipt: lease
            for receipt in wanted
            if (lease := self._leases.get(receipt))
            and lease.end > now
            and self._queue.holds(lease.handle)
        }
        if len(found) < len(wanted):
            raise Gone([receipt for receipt in wanted if receipt not in found])
        return found

    def _end(self, receipt: str) -> _Lease:
        self._memory.give(LEASE)
        return self._leases.pop(receipt)

    def _expire(self) -> None:
        """Give back what was not acknowledged in time, as one that failed, in its order."""
        while True:
            gevent.sleep(TICK)
            now = time.monotonic()
            ended = [receipt for receipt, lease in self._leases.items() if lease.end <= now]
            self._queue.reject([self._end(one).handle for one in ended], requeue=True)
