"""What the subscriber does with the memory it has, on pika's own connection."""

from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.memory import MIB, Memory, OutOfMemory
from gevent import Greenlet
from subscriber.broker import Broker
from subscriber.delivery import Delivery
from subscriber.queue import Queue
from subscriber.settings import Settings

from .conftest import Rabbit, Wire

SMALL = [b"%d" % number for number in range(200)]


@pytest.fixture
def memory() -> Memory:
    return Memory(8 * MIB)


@pytest.fixture
def broker(memory: Memory) -> Iterator[Broker]:
    broker = Broker(Settings(receive_timeout=1), memory)
    yield broker
    broker.lost("the test is over")


def ask(queue: Queue, *args: Any, **kwargs: Any) -> Greenlet:
    request = gevent.spawn(queue.get, *args, **kwargs)
    gevent.idle()
    return request


def take(queue: Queue, wire: Wire, want: int) -> list[Delivery]:
    request = ask(queue, want)
    wire.answer()
    found: list[Delivery] = request.get(timeout=2)
    return found


def learn(queue: Queue, rabbit: Rabbit, wire: Wire) -> None:
    """Let the broker bring so many small messages that a burst may have 100."""
    rabbit.publish(*SMALL)
    for delivery in (found := take(queue, wire, 200)):
        delivery.close()
    queue.ack(found)
    gevent.idle()


def test_a_message_holds_memory_until_it_is_let_go(
    queue: Queue, rabbit: Rabbit, wire: Wire, memory: Memory
) -> None:
    rabbit.publish(b"x" * MIB, *SMALL[:20])
    found = take(queue, wire, 21)
    assert MIB < memory.held == sum(one.weight for one in found)
    queue.release(found[:1])
    assert memory.held == sum(one.weight for one in found), "it is held here"
    again = take(queue, wire, 1)
    for one in [*again, *found[1:]]:
        one.close()
    queue.ack(found)
    assert memory.held == 0


@pytest.mark.parametrize("when", ["held", "waiting", "handed out"])
def test_a_lost_connection_gives_all_memory_back(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, memory: Memory, when: str
) -> None:
    rabbit.publish(*SMALL[:9])
    if when == "waiting":
        request = ask(queue, 99)
        wire.answer(4)
    else:
        found = take(queue, wire, 9)
    if when == "held":
        queue.release(found)
    assert memory.held
    broker.lost("gone")
    if when == "waiting":
        with pytest.raises(BrokerUnavailable):
            request.get(timeout=2)
    elif when == "handed out":
        queue.release(found)
    assert memory.held == 0


def test_while_memory_is_short_one_message_comes_and_no_other(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, memory: Memory
) -> None:
    rabbit.publish(b"x" * MIB, b"next")
    others = memory.held = 7 * MIB
    (large,) = take(queue, wire, 1)
    assert memory.held == others
    second = ask(queue)
    wire.answer()
    assert rabbit.bodies() == [b"next"], "it stays in the queue"
    with pytest.raises(OutOfMemory):
        second.get(timeout=3)
    assert broker.up, "the broker is not to blame"
    third = ask(queue)
    memory.held -= 2 * MIB
    gevent.sleep(0.05)
    wire.answer()
    assert [one.body for one in third.get(timeout=2)] == [b"next"]
    assert memory.held == 5 * MIB + large.weight + third.value[0].weight


def test_a_message_that_never_got_memory_makes_way_once_it_is_written(
    queue: Queue, rabbit: Rabbit, wire: Wire, memory: Memory
) -> None:
    rabbit.publish(b"x" * MIB, b"next")
    memory.held = 7 * MIB
    found = take(queue, wire, 1)
    second = ask(queue)
    queue.ack(found)
    found[0].close()
    gevent.sleep(0.05)
    wire.answer()
    assert [one.body for one in second.get(timeout=2)] == [b"next"]


@pytest.mark.parametrize("released", [False, True])
def test_what_a_burst_brings_beyond_memory_goes_back_in_its_order(
    queue: Queue, rabbit: Rabbit, wire: Wire, memory: Memory, released: bool
) -> None:
    learn(queue, rabbit, wire)
    assert memory.held == 0
    bodies = [b"first", *[b"%02d" % number + b"x" * MIB for number in range(30)]]
    rabbit.publish(*bodies)
    wire.prompt = True
    batch = ask(queue, 31)
    found = batch.get(timeout=3)
    assert memory.held <= memory.size
    assert 1 < len(found) < 9
    if released:
        queue.release(found)
        found = []
    seen = [one.body for one in found]
    for one in found:
        one.close()
    queue.ack(found)
    while len(seen) < 31:
        (one,) = take(queue, wire, 1)
        seen.append(one.body)
        one.close()
        queue.ack([one])
    assert seen == bodies
    gevent.idle()
    assert (rabbit.bodies(), memory.held) == ([], 0)


def test_too_many_long_polls_are_refused_at_once_and_nobody_else(
    queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    most = int(8 * MIB * 0.75 * 0.75 / (24 * 1024))
    polls = [gevent.spawn(queue.get, wait=9) for _ in range(most)]
    wire.answer()
    with pytest.raises(OutOfMemory):
        ask(queue, wait=9).get(timeout=0.1)
    assert take(queue, wire, 1) == []
    rabbit.publish(b"a")
    gevent.sleep(0.06)
    wire.answer()
    assert [one.body for one in polls[0].get(timeout=1)] == [b"a"]
    again = ask(queue, wait=9)
    assert not again.ready()
