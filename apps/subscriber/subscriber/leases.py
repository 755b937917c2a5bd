"""Messages that clients hold for a time, each by a receipt."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gevent

from subscriber.broker import Broker
from subscriber.delivery import Delivery

# Seconds that a message can be held however often its lease is extended: RabbitMQ closes the
# channel of one that is unsettled for 1,800.
LONGEST = 1700
# Seconds between two looks for leases that have ended.
TICK = 0.5


class Gone(Exception):  # noqa: N818 - a state of receipts, not a fault
    """Receipts that are used, expired, or another instance's; nothing was done for any."""

    def __init__(self, receipts: Sequence[str]) -> None:
        """Name the receipts."""
        super().__init__(f"{len(receipts)} of the receipts are used, expired, or not of here.")
        self.receipts = receipts


@dataclass
class _Lease:
    delivery: Delivery
    end: float
    last_end: float


class Leases:
    """The leases of this process; they end with it, or with its connection to the broker."""

    def __init__(self, broker: Broker, seconds: float) -> None:
        """Give leases of seconds for broker's messages."""
        self._broker = broker
        self._seconds = seconds
        # No receipt of another process, or of one before, is taken for one of this.
        self._instance = secrets.token_urlsafe(9)
        self._count = 0
        self._leases: dict[str, _Lease] = {}
        self._keeper: gevent.Greenlet | None = None

    def grant(self, delivery: Delivery) -> str:
        """Lease delivery from now on and return the receipt."""
        if self._keeper is None:
            self._keeper = gevent.spawn(self._expire)
        self._count += 1
        receipt = f"{self._instance}.{self._count}"
        now = time.monotonic()
        last_end = delivery.came + LONGEST
        self._leases[receipt] = _Lease(delivery, min(now + self._seconds, last_end), last_end)
        return receipt

    def take(self, receipts: Iterable[str]) -> list[Delivery]:
        """End the leases of receipts and return what was leased; raises Gone for any, or none."""
        found = self._find(receipts)
        for receipt in found:
            del self._leases[receipt]
        return [lease.delivery for lease in found.values()]

    def forget(self, receipts: Iterable[str]) -> None:
        """End the leases of receipts that no client has got."""
        for receipt in receipts:
            self._leases.pop(receipt, None)

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
            and self._broker.holds(lease.delivery)
        }
        if len(found) < len(wanted):
            raise Gone([receipt for receipt in wanted if receipt not in found])
        return found

    def _expire(self) -> None:
        """Give back what was not acknowledged in time, as one that failed, in its order."""
        while True:
            gevent.sleep(TICK)
            now = time.monotonic()
            ended = [receipt for receipt, lease in self._leases.items() if lease.end <= now]
            self._broker.reject([self._leases.pop(one).delivery for one in ended], requeue=True)
