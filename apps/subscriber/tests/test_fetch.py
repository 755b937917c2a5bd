"""How messages are taken off the queue, on pika's own connection to a RabbitMQ in memory."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import gevent
import pytest
from door.amqp import Link
from door.memory import MIB, Memory
from door.settings import BrokerSettings
from pika.channel import Channel
from subscriber.delivery import OVERHEAD
from subscriber.fetch import Fetch
from subscriber.line import Line, Waiter
from subscriber.settle import Settler
from subscriber.shared import Polls, Shared

from .conftest import Rabbit, Wire, asked


class Fetcher(Link):
    """A connection that does nothing but fetch what waiters want."""

    def __init__(self) -> None:
        super().__init__(BrokerSettings(), "fetcher")
        self.signs = 0
        self.memory = Memory(8 * MIB)
        self.line = Line()
        self.settler = Settler(self)
        shared = Shared(self.memory, Polls(1))
        self.fetch = Fetch(self, "takeaway", 1, shared, self.line, self.settler)

    def opened(self, channel: Channel) -> None:
        self.fetch.opened(channel)
        self.ready(channel)

    def alive(self) -> None:
        self.signs += 1

    def want(self, count: int = 1) -> Waiter:
        waiter = Waiter(count, math.inf, patient=False)
        self.line.enter(waiter, self.fetch.gets)
        self.fetch.soon()
        return waiter


@pytest.fixture
def link() -> Iterator[Fetcher]:
    link = Fetcher()
    yield link
    link.fetch.lost()


@pytest.fixture
def wire(rabbit: Rabbit, link: Fetcher) -> Wire:
    return rabbit.connect(link)


def bodies(*waiters: Waiter) -> list[bytes]:
    assert all(waiter.done.is_set() for waiter in waiters)
    return [delivery.body for waiter in waiters for delivery in waiter.deliveries]


def numbers(*of: int) -> list[bytes]:
    return [b"%d" % number for number in range(*of)]


@pytest.mark.parametrize(
    ("want", "queued", "questions"),
    [
        (1, 9, [1]),
        (5, 0, [1]),
        (5, 1, [1] * 2),
        (5, 4, [1] * 5),
        (4, 9, [1] * 4),
        (5, 5, [1, 4]),
        (9, 5, [1, 4, 1]),
        (5, 9, [1, 4]),
        (250, 300, [1, 16, 32, 64, 100, 37]),
    ],
)
@pytest.mark.parametrize("batch", [True, False])
def test_the_broker_is_asked_for_what_is_wanted_and_the_queue_has(
    link: Fetcher,
    rabbit: Rabbit,
    wire: Wire,
    want: int,
    queued: int,
    questions: list[int],
    batch: bool,
) -> None:
    rabbit.publish(*numbers(queued))
    waiters = [link.want(one) for one in ([want] if batch else [1] * want)]
    wire.answer()
    assert bodies(*waiters) == numbers(queued)[:want]
    assert asked(wire) == questions
    assert rabbit.bodies() == numbers(queued)[want:], "none is taken off the queue unasked"
    rabbit.publish(b"later")
    assert rabbit.bodies()[-1] == b"later"


@pytest.fixture
def short_burst(
    link: Fetcher, rabbit: Rabbit, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> Waiter:
    """Who waits for 1 to 9, of which others take all but two."""
    monkeypatch.setattr("subscriber.fetch.BURST_TIMEOUT", 0.05)
    rabbit.publish(*numbers(20))
    link.want()
    wire.answer()
    batch = link.want(9)
    gevent.idle()
    del rabbit.queues["takeaway"][2:]  # before the consumer has begun
    wire.answer()
    assert asked(wire) == [1, 9]
    assert not batch.done.is_set()
    return batch


@pytest.mark.parametrize("late", [[], [b"new"]])
def test_a_burst_that_others_were_quicker_than_ends_with_what_there_is(
    rabbit: Rabbit, wire: Wire, short_burst: Waiter, late: list[bytes]
) -> None:
    rabbit.publish(*late)
    wire.prompt = True
    wire.answer()
    short_burst.done.wait(2)
    assert bodies(short_burst) == [b"1", b"2", *late]
    assert asked(wire) == [1, 9, 1]
    rabbit.publish(b"later")
    assert rabbit.bodies() == [b"later"], "the consumer is gone"


def test_a_message_that_comes_as_a_burst_is_ended_is_not_missed(
    rabbit: Rabbit, wire: Wire, short_burst: Waiter
) -> None:
    while not wire.answers:  # to the question whether the burst goes on
        gevent.sleep(0.01)
    rabbit.publish(b"new")
    wire.prompt = True
    wire.answer()
    short_burst.done.wait(2)
    assert bodies(short_burst) == [b"1", b"2", b"new"]


def test_a_burst_that_ends_early_gives_the_memory_back_that_it_did_not_need(
    link: Fetcher, wire: Wire, short_burst: Waiter
) -> None:
    wire.prompt = True
    wire.answer()
    short_burst.done.wait(2)
    assert link.memory.held == OVERHEAD + 1 + sum(one.weight for one in short_burst.deliveries)


def test_each_answer_of_the_broker_is_a_sign_of_life(
    link: Fetcher, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(*numbers(5))
    link.want(6)
    wire.answer()
    assert asked(wire) == [1, 4, 1]
    assert link.signs == 6


def test_the_broker_is_silent_when_what_it_was_asked_for_does_not_come(
    link: Fetcher, rabbit: Rabbit, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("subscriber.fetch.time", clock)
    rabbit.publish(*numbers(6))
    link.want(6)
    seen = []
    for answers in 1, 3, 0:  # to the get; to the consumer, with a message; and nothing
        gevent.idle()
        seen.append(link.fetch.silent)
        clock.now += 1
        seen.append(link.fetch.silent)
        wire.answer(answers)
    assert asked(wire) == [1, 5]
    assert seen == [False, True] * 3


def test_large_messages_come_one_by_one(link: Fetcher, rabbit: Rabbit, wire: Wire) -> None:
    rabbit.publish(*[b"x" * 100_000] * 20)
    link.want(20)
    wire.answer()
    assert asked(wire) == [1] * 20


def test_the_first_burst_after_a_large_message_is_small(
    link: Fetcher, rabbit: Rabbit, wire: Wire
) -> None:
    for large in [], [b"x" * 100_000]:
        rabbit.publish(*large, *numbers(200))
        link.want(200 + len(large))
        wire.answer()
    assert asked(wire)[:5] == [1, 16, 32, 64, 87]
    # The large one is among the last 100, then bursts begin anew.
    assert asked(wire)[5:] == [1] * 101 + [16, 32, 52]


def test_who_keeps_the_process_waiting_is_let_go_where_memory_is_short(
    link: Fetcher, rabbit: Rabbit, wire: Wire
) -> None:
    shed: list[None] = []
    link.memory.shed = lambda: not shed.append(None)  # type: ignore[method-assign]
    rabbit.publish(b"x" * MIB)
    link.memory.held = 7 * MIB
    link.want()
    wire.answer()
    gevent.sleep(0.05)
    assert shed
