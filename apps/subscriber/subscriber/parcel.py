"""What one response hands over: messages, how they are told, and what becomes of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from door.server import give_way

from subscriber.delivery import PIECE, Delivery
from subscriber.leases import Leases
from subscriber.queue import Queue

TEXT = "text/plain; charset=utf-8"
JSON, LINES = "application/json", "application/x-ndjson"


class Parcel:
    """The messages of one response, as kind: TEXT and JSON have one, LINES have many."""

    def __init__(
        self,
        deliveries: Sequence[Delivery],
        kind: str,
        queue: Queue,
        leases: Leases | None,
        done: Callable[[], object],
    ) -> None:
        """Pack deliveries, which are leased, or acknowledged once they are written.

        done is called at the end. Raises OutOfMemory when they cannot be leased.
        """
        self._deliveries = deliveries
        self._kind = kind
        self._queue = queue
        self._leases = leases
        self._done = done
        self._receipts: list[str] = []
        try:
            if leases:
                for delivery in deliveries:
                    self._receipts.append(leases.grant(delivery))
            self.headers = self._make_headers()
        except BaseException:
            self.settle(False)
            raise

    def pieces(self) -> Iterator[bytes]:
        """Return the body; what is made at a time takes little more than a piece."""
        if self._kind != TEXT:
            return lines(zip_longest(self._deliveries, self._receipts))
        body = self._deliveries[0].body
        return iter([body + b"\n"] if len(body) < PIECE else [body, b"\n"])

    def settle(self, written: bool) -> None:
        """Acknowledge what was written, or keep its lease; hand on what was not."""
        self._done()
        if not written:
            if self._leases:
                self._leases.forget(self._receipts)
            self._queue.release(self._deliveries)
            return
        if not self._leases:
            self._queue.ack(self._deliveries)
        for delivery in self._deliveries:
            delivery.close()

    def _make_headers(self) -> list[tuple[str, str]]:
        if self._kind == TEXT:
            length = len(self._deliveries[0].body) + 1
        else:
            pairs = zip_longest(self._deliveries, self._receipts)
            length = sum(one.length(receipt) for one, receipt in pairs)
        headers = [
            ("Content-Type", self._kind),
            ("Content-Length", str(length)),
            ("Cache-Control", "no-store"),
        ]
        if self._receipts and self._kind == TEXT:
            headers.append(("X-Receipt", self._receipts[0]))
        return headers


def lines(pairs: Iterable[tuple[Delivery, str | None]]) -> Iterator[bytes]:
    """Yield deliveries with their receipts as lines of JSON; others get a turn after each piece."""
    small = bytearray()
    for delivery, receipt in pairs:
        for part in delivery.line(receipt):
            small += part
            if len(small) >= PIECE:
                yield bytes(small)
                small.clear()
                give_way()
    if small:
        yield bytes(small)
