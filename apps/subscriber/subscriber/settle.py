# mypy: disable-error-code=no-untyped-call
"""What is said to the broker of the messages that it brought: acknowledgements and rejections."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Protocol

import gevent
from door.amqp import Channel

from subscriber.delivery import Delivery, Handle

# Delivery tags, each with a flag: multiple (all up to the tag) with an acknowledgement, requeue
# with a rejection.
Said = list[tuple[int, bool]]


class Link(Protocol):
    """The way to the broker: a channel that may be lost, and come anew."""

    @property
    def channel(self) -> Channel | None:
        """The channel that can be used now; None without one."""

    def alive(self) -> None:
        """Take note that the broker does what it was asked."""

    def giving_up(self) -> AbstractContextManager[None]:
        """Give the channel up when the block cannot use it."""


class Unsettled:
    """Delivery tags in the order of delivery, and what the broker is to be told of them next."""

    def __init__(self) -> None:
        """Begin without any, as a channel does."""
        # With when they came, by time.monotonic().
        self._tags: dict[int, float] = {}
        self._acked: set[int] = set()
        self._rejected: dict[int, bool] = {}

    def add(self, tag: int) -> None:
        """Take note that the message of tag came."""
        self._tags[tag] = time.monotonic()

    @property
    def oldest(self) -> float:
        """When the first one came that is not settled, by time.monotonic(); infinity if none is."""
        return next(iter(self._tags.values()), math.inf)

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


class Settler:
    """Settles the messages of link's channel, by one write for each turn of the event loop."""

    def __init__(self, link: Link) -> None:
        """Begin without any message."""
        self._link = link
        self._unsettled = Unsettled()
        # Tags of those that are given back without having been with a client.
        self._unused: set[int] = set()
        self._due = self._paused = False
        # When the broker was last told of any, by time.monotonic().
        self.told = 0.0

    @property
    def oldest(self) -> float:
        """When the first one came that the broker waits for; infinity without one."""
        return self._unsettled.oldest

    def add(self, tag: int) -> None:
        """Take note that the message of tag came."""
        self._unsettled.add(tag)

    def holds(self, one: Delivery | Handle) -> bool:
        """Whether one can still be settled; after a lost channel it comes again."""
        return one.channel is self._link.channel and self._unsettled.has(one.tag)

    def ack(self, some: Iterable[Delivery | Handle]) -> None:
        """Take some off the queue; nothing for those whose channel is gone."""
        self._unsettled.ack(self._tags(some))
        self._soon()

    def reject(self, some: Iterable[Delivery | Handle], requeue: bool) -> None:
        """Give some back to the queue, or to the dead ones; both are counted by the broker."""
        self._unsettled.reject(self._tags(some), requeue)
        self._soon()

    def give_back(self, some: Iterable[Delivery | Handle]) -> None:
        """Give back to the queue some that no client had; before RabbitMQ 4.3 that counts, too."""
        tags = list(self._tags(some))
        self._unused.update(tags)
        self._unsettled.reject(tags, requeue=True)
        self._soon()

    def pause(self) -> None:
        """Tell the broker nothing before resume()."""
        self._paused = True

    def resume(self) -> None:
        """Tell the broker what had to wait, and go on."""
        self._paused = False
        self.settle()

    def lost(self) -> None:
        """Forget all: their channel is gone."""
        self._unsettled.clear()
        self._unused.clear()
        self._paused = False

    def settle(self) -> None:
        """Tell the broker what is acknowledged and rejected."""
        self._due = False
        channel = self._link.channel
        if channel is None or self._paused:
            return
        acks, rejections = self._unsettled.take()
        if not (acks or rejections):
            return
        with self._link.giving_up(), channel.connection.joined():
            for tag, multiple in acks:
                channel.basic_ack(tag, multiple)
            for tag, requeue in rejections:
                # Since RabbitMQ 4.3 a nack is not counted; a rejection always is.
                if tag in self._unused:
                    channel.basic_nack(tag, requeue=requeue)
                else:
                    channel.basic_reject(tag, requeue)
        self._unused.clear()
        self.told = time.monotonic()

    def _tags(self, some: Iterable[Delivery | Handle]) -> Iterator[int]:
        return (one.tag for one in some if one.channel is self._link.channel)

    def _soon(self) -> None:
        """Settle once all that is settled in this turn of the event loop."""
        if not self._due:
            self._due = True
            gevent.get_hub().loop.run_callback(self.settle)
