"""What a receipt is good for, and for how long."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door.memory import Memory, OutOfMemory
from pika.spec import Basic
from subscriber.broker import Broker
from subscriber.delivery import Delivery
from subscriber.held import LONGEST
from subscriber.leases import Gone, Leases
from subscriber.queue import Queue

from .conftest import Rabbit, Wire

SECONDS = 60
MEMORY = Memory(2**40)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("subscriber.leases.time", clock)
    monkeypatch.setattr("subscriber.delivery.time", clock)
    return clock


@pytest.fixture
def leases(queue: Queue, clock: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leases]:  # noqa: ARG001
    monkeypatch.setattr("subscriber.leases.TICK", 0.001)
    leases = Leases(queue, SECONDS, MEMORY)
    yield leases
    if leases._keeper:
        leases._keeper.kill()


@pytest.fixture
def deliveries(queue: Queue, rabbit: Rabbit, wire: Wire, clock: Any) -> list[Delivery]:  # noqa: ARG001
    """Three messages that a request has got."""
    rabbit.publish(b"a", b"b", b"c")
    request = gevent.spawn(queue.get, 3)
    wire.answer()
    found: list[Delivery] = request.get(timeout=2)
    return found


def tick() -> None:
    gevent.sleep(0.01)


def rejects(wire: Wire) -> list[tuple[int, bool]]:
    return [
        (one.delivery_tag, one.requeue) for methods in wire.sent(Basic.Reject) for one in methods
    ]


def test_a_receipt_takes_its_message_once(leases: Leases, deliveries: list[Delivery]) -> None:
    a, b, c = map(leases.grant, deliveries)
    assert leases.take([c, a, c]) == [deliveries[2].handle, deliveries[0].handle]
    assert leases.take([]) == []
    for receipts in [a], [b, c]:
        with pytest.raises(Gone):
            leases.take(receipts)
    assert leases.take([b]) == [deliveries[1].handle]


@pytest.mark.parametrize("ask", [Leases.take, Leases.extend])
@pytest.mark.parametrize(
    "bad", ["used", "forgotten", "expired", "of another instance", "of no instance"]
)
def test_with_one_bad_receipt_nothing_is_done_and_it_is_named(
    queue: Queue,
    leases: Leases,
    deliveries: list[Delivery],
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
    ask: Any,
    bad: str,
) -> None:
    monkeypatch.setattr("subscriber.leases.TICK", 60)  # what expired was not looked for yet
    receipt = "1" if bad == "of no instance" else leases.grant(deliveries[0])
    clock.now += SECONDS - 1
    good = leases.grant(deliveries[1])
    if bad == "used":
        leases.take([receipt])
    elif bad == "forgotten":
        leases.forget([receipt, "unknown"])
    elif bad == "expired":
        clock.now += 1
    elif bad == "of another instance":
        other = Leases(queue, SECONDS, MEMORY)
        receipt = other.grant(deliveries[0])
        other._keeper.kill()  # type: ignore[union-attr]
    with pytest.raises(Gone, match="1 of the receipts") as error:
        ask(leases, [good, receipt])
    assert error.value.details == {"gone": [receipt]}
    assert leases.take([good]) == [deliveries[1].handle]


def test_a_lost_connection_ends_its_leases(
    broker: Broker,
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    leases: Leases,
    deliveries: list[Delivery],
) -> None:
    receipts = [leases.grant(one) for one in deliveries]
    broker.lost("gone")
    wire.lose()
    for _ in range(2):
        for ask in leases.take, leases.extend:
            with pytest.raises(Gone) as error:
                ask(receipts)
            assert error.value.details == {"gone": receipts}
        wire = rabbit.connect(broker, queue)
        request = gevent.spawn(queue.get, 3)  # of which the new connection has the same tags
        wire.answer()
        assert [one.tag for one in request.get(timeout=2)] == [1, 2, 3]
        broker.lost("gone")
        wire.lose()


def test_a_lease_lasts_for_its_seconds_and_as_long_again_from_each_extension(
    leases: Leases, deliveries: list[Delivery], clock: Any
) -> None:
    receipts = [leases.grant(one) for one in deliveries]
    clock.now += SECONDS - 1
    assert leases.extend(receipts[:2]) == 2
    clock.now += SECONDS - 1
    tick()
    assert leases.take(receipts[:1]) == [deliveries[0].handle]
    for receipt in receipts[2], receipts[1]:
        with pytest.raises(Gone):
            leases.take([receipt])
        clock.now += 1


def test_no_extension_outlasts_the_broker_s_patience(
    leases: Leases, deliveries: list[Delivery], clock: Any
) -> None:
    receipt = leases.grant(deliveries[0])
    end = clock.now + LONGEST
    while clock.now + SECONDS - 1 < end:
        clock.now += SECONDS - 1
        assert leases.extend([receipt]) == 1
    clock.now = end - 1
    assert leases.extend([receipt]) == 1
    clock.now = end
    with pytest.raises(Gone):
        leases.extend([receipt])
    assert LONGEST < 1800


def test_the_broker_s_patience_begins_with_the_delivery(
    leases: Leases, queue: Queue, deliveries: list[Delivery], clock: Any
) -> None:
    came = clock.now
    queue.release(deliveries)
    clock.now += 200
    again = gevent.spawn(queue.get).get(timeout=2)
    receipt = leases.grant(again[0])
    while clock.now < came + LONGEST:
        clock.now += SECONDS - 1
        with suppress(Gone):
            leases.extend([receipt])
    with pytest.raises(Gone):
        leases.take([receipt])


def test_a_lease_that_ends_gives_its_message_back_as_one_that_failed_in_order(
    rabbit: Rabbit, wire: Wire, leases: Leases, deliveries: list[Delivery], clock: Any
) -> None:
    before = MEMORY.held
    c, b, a = map(leases.grant, reversed(deliveries))
    clock.now += SECONDS - 1
    tick()
    assert rejects(wire) == []
    leases.extend([b])
    clock.now += 1
    tick()
    assert rejects(wire) == [(1, True), (3, True)]
    assert rabbit.bodies() == [b"a", b"c"]
    clock.now += SECONDS
    tick()
    assert rejects(wire) == [(1, True), (3, True), (2, True)]
    with pytest.raises(Gone):
        leases.take([a, b, c])
    assert MEMORY.held == before, "each has given back what it held"


@pytest.mark.parametrize("end", [Leases.take, Leases.forget])
def test_a_lease_that_was_ended_gives_nothing_back(
    wire: Wire, leases: Leases, deliveries: list[Delivery], clock: Any, end: Any
) -> None:
    end(leases, [leases.grant(one) for one in deliveries])
    clock.now += LONGEST
    tick()
    assert rejects(wire) == []


def test_receipts_are_never_the_same_and_tell_nothing_of_the_next(
    leases: Leases, deliveries: list[Delivery]
) -> None:
    receipts = [leases.grant(one) for one in deliveries * 100]
    assert len(set(receipts)) == len(receipts)
    assert {len(receipt) for receipt in receipts} == {22}, "16 random bytes"
    for place in range(21):  # the last character has the two bits that are left
        assert len({receipt[place] for receipt in receipts}) > 32


def test_a_lease_keeps_no_body(leases: Leases, deliveries: list[Delivery]) -> None:
    receipts = [leases.grant(one) for one in deliveries]
    bodies = [weakref.ref(one) for one in deliveries]
    deliveries.clear()
    gc.collect()
    assert [one() for one in bodies] == [None] * 3
    assert [one.tag for one in leases.take(receipts)] == [1, 2, 3]


def test_without_memory_there_is_no_lease(queue: Queue, deliveries: list[Delivery]) -> None:
    memory = Memory(0)
    with pytest.raises(OutOfMemory):
        Leases(queue, SECONDS, memory).grant(deliveries[0])
    assert memory.held == 0
