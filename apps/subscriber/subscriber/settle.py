"""What one channel of the broker brought and is not settled yet."""

from collections.abc import Iterable
from itertools import takewhile

# Tags with what is said of each: of an acknowledgement, whether it is for all up to the tag; of a
# rejection, whether the message goes back to the queue.
Said = list[tuple[int, bool]]


class Unsettled:
    """Delivery tags in the order of delivery, and what the broker is to be told of them next."""

    def __init__(self) -> None:
        """Begin without any, as a channel does."""
        self._tags: dict[int, None] = {}
        self._acked: set[int] = set()
        self._rejected: dict[int, bool] = {}

    def add(self, tag: int) -> None:
        """Take note that the message of tag came."""
        self._tags[tag] = None

    def has(self, tag: int) -> bool:
        """Whether the message of tag can still be settled."""
        return tag in self._tags and tag not in self._acked and tag not in self._rejected

    def ack(self, tags: Iterable[int]) -> None:
        """Have those of tags acknowledged that can still be settled."""
        self._acked.update(filter(self.has, tags))

    def reject(self, tags: Iterable[int], requeue: bool) -> None:
        """Have those of tags rejected that can still be settled."""
        self._rejected.update((tag, requeue) for tag in tags if self.has(tag))

    def take(self) -> tuple[Said, Said]:
        """Return what is to be told, acknowledgements and rejections, and forget their tags.

        It is as few methods as possible: one acknowledgement for all up to a tag where nothing
        else is below it. Rejections are told each alone, as on 4.3 a nack of many does not count
        towards the delivery limit, and in their order, which the queue keeps.
        """
        acked, rejected = self._acked, self._rejected
        self._acked, self._rejected = set(), {}
        prefix = list(takewhile(acked.__contains__, self._tags))
        for tag in (*acked, *rejected):
            del self._tags[tag]
        acks = [(prefix[-1], True)] if prefix else []
        acks += [(tag, False) for tag in sorted(acked.difference(prefix))]
        return acks, sorted(rejected.items())

    def clear(self) -> None:
        """Forget all: their channel is gone."""
        self._tags.clear()
        self._acked.clear()
        self._rejected.clear()
