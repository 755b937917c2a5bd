"""What Broker promises, on pika's own connection to a RabbitMQ in memory."""

import contextlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.memory import Memory
from gevent import Greenlet
from gevent.event import Event
from hypothesis import given, settings
from hypothesis import strategies as st
from pika.exceptions import ChannelWrongStateError
from pika.spec import Basic, BasicProperties
from subscriber.broker import Broker
from subscriber.delivery import Delivery
from subscriber.line import Waiter
from subscriber.queue import Queue
from subscriber.settings import Settings

from .conftest import Message, Rabbit, Wire, asked

# Requests that wait for a moment only.
hasty = pytest.mark.parametrize("receive_timeout", [0.05])
Settle = Callable[[Queue, list[Delivery]], None]
SETTLED = (Basic.Ack, Basic.Reject, Basic.Cancel)
SETTLE: list[Settle] = [
    Queue.ack,
    lambda queue, deliveries: queue.reject(deliveries, True),
    lambda queue, deliveries: queue.reject(deliveries, False),
]


def ask(queue: Queue, *args: Any, **kwargs: Any) -> Greenlet:
    """Start a request; on return it waits or has its answer."""
    request = gevent.spawn(queue.get, *args, **kwargs)
    gevent.idle()
    return request


def result(request: Greenlet) -> list[Delivery]:
    deliveries: list[Delivery] = request.get(timeout=2)
    return deliveries


def bodies(request: Greenlet) -> list[bytes]:
    return [delivery.body for delivery in result(request)]


def take(queue: Queue, wire: Wire, want: int = 1) -> list[Delivery]:
    request = ask(queue, want)
    wire.answer()
    return result(request)


def acks(wire: Wire) -> list[list[tuple[int, bool]]]:
    gevent.idle()
    sent = wire.sent(Basic.Ack)
    return [[(one.delivery_tag, one.multiple) for one in methods] for methods in sent]


def rejects(wire: Wire) -> list[list[tuple[int, bool]]]:
    gevent.idle()
    sent = wire.sent(Basic.Reject)
    return [[(one.delivery_tag, one.requeue) for one in methods] for methods in sent]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """The looks into the empty queue that are due; the test pops and does them."""
    due: list[Callable[[], object]] = []
    later = gevent.spawn_later

    def spawn_later(seconds: float, call: Callable[..., object], *args: object) -> object:
        return later(seconds, call, *args) if args else due.append(call)

    monkeypatch.setattr(gevent, "spawn_later", spawn_later)
    return due


# The order of asking and of sending.


@pytest.mark.parametrize("patient", [0, 1, 2])
def test_requests_get_messages_in_the_order_of_asking(
    queue: Queue, rabbit: Rabbit, wire: Wire, patient: int
) -> None:
    rabbit.publish(b"a", b"b", b"c")
    requests = [ask(queue, wait=9 * (number == patient)) for number in range(3)]
    wire.answer()
    assert [bodies(request) for request in requests] == [[b"a"], [b"b"], [b"c"]]


def test_one_empty_answer_serves_all_who_waited_when_it_was_asked(queue: Queue, wire: Wire) -> None:
    first, *others = [ask(queue) for _ in range(3)]
    wire.answer(1)
    assert result(first) == []
    assert not any(request.ready() for request in others)
    wire.answer(1)
    assert [result(request) for request in others] == [[], []]
    assert asked(wire) == [1, 1]


@pytest.mark.parametrize("published", [[], [b"new"]])
def test_a_request_is_not_told_empty_by_an_answer_to_an_earlier_question(
    queue: Queue, rabbit: Rabbit, wire: Wire, published: list[bytes]
) -> None:
    early = ask(queue)
    rabbit.publish(*published)
    late = ask(queue)
    wire.answer(1)
    assert result(early) == []
    assert not late.ready()
    wire.answer(1)
    assert bodies(late) == published


# What is settled during a burst.


@pytest.mark.parametrize("settle", SETTLE)
def test_what_is_settled_during_a_burst_brings_no_more_than_was_asked_for(
    queue: Queue, rabbit: Rabbit, wire: Wire, settle: Settle
) -> None:
    rabbit.publish(*[b"%d" % number for number in range(9)])
    taken = take(queue, wire)
    requests = [gevent.spawn(queue.get) for _ in range(5)]
    for request in requests[:-1]:
        while not request.ready():
            wire.answer(1)
        settle(queue, taken)
        taken = result(request)
        assert acks(wire) == rejects(wire) == []
    wire.answer()
    assert bodies(requests[-1]) == [b"5"]
    assert asked(wire) == [1, 5]
    settled = [one for write in wire.writes for one in write if isinstance(one, SETTLED)]
    assert isinstance(settled[0], Basic.Cancel)
    assert len(settled) == (2 if settle is Queue.ack else 5)
    assert rabbit.bodies()[-3:] == [b"6", b"7", b"8"], "the consumer brought no more"


def test_a_burst_begins_when_the_consumer_of_the_last_one_is_gone(
    queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(*[b"%d" % number for number in range(20)])
    taken = take(queue, wire)
    requests = [gevent.spawn(queue.get) for _ in range(5)]
    while not requests[-1].ready():
        wire.answer(1)
    batch = ask(queue, 5)
    assert asked(wire) == [1, 5]
    while not batch.ready():
        assert acks(wire) == []
        wire.answer(1)
        if len(asked(wire)) > 2:
            queue.ack(taken)
    assert asked(wire) == [1, 5, 5]
    wire.answer()
    assert acks(wire) == [[(1, True)]]


# Batches.


@pytest.mark.parametrize(
    ("want", "room", "found", "next_found"),
    [
        (2, math.inf, b"ab", b"c"),
        (9, math.inf, b"abc", b""),
        (9, 3, b"abc", b""),
        (9, 2, b"ab", b"c"),
        (2, 2, b"ab", b"c"),
        (9, 0.5, b"", b"a"),
    ],
)
@pytest.mark.parametrize("released", [0, 1, 3])
def test_a_batch_takes_what_is_wanted_fits_and_is_there(
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    released: int,
    want: int,
    room: float,
    found: bytes,
    next_found: bytes,
) -> None:
    rabbit.publish(b"a", b"b", b"c")
    if released:
        queue.release(take(queue, wire, released))
    channel: Any = None
    size = Delivery(1, b"x", BasicProperties(), channel).size
    batch = ask(queue, want, room * size)
    wire.answer()
    assert b"".join(bodies(batch)) == found
    assert b"".join(one.body for one in take(queue, wire)) == next_found


def test_a_batch_whose_connection_is_lost_fails_and_its_messages_come_again(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a", b"b", b"c")
    batch = ask(queue, 5)
    wire.answer(2)
    broker.lost("gone")
    wire.lose()
    with pytest.raises(BrokerUnavailable, match="gone"):
        result(batch)
    wire = rabbit.connect(broker, queue)
    assert [one.body for one in take(queue, wire, 3)] == [b"a", b"b", b"c"]
    assert asked(wire) == [1, 1, 1], "only the new request's messages are wanted"


# What other programs publish.


class Raw(BasicProperties):
    """Properties with one header, of AMQP's type and bytes."""

    def __init__(self, value: bytes) -> None:
        super().__init__()
        self.value = value

    def encode(self) -> list[bytes]:
        table = b"\1h" + self.value
        return [struct.pack(">HI", self.FLAG_HEADERS, len(table)), table]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"d" + struct.pack(">d", 2), 2),
        (b"d" + struct.pack(">d", math.nan), None),
        (b"f" + struct.pack(">f", math.inf), math.inf),
        # Milliseconds: the year 33658.
        (b"T" + struct.pack(">Q", 10**12), 10**12),
    ],
)
def test_a_message_is_handed_out_whatever_is_in_its_headers(
    queue: Queue, rabbit: Rabbit, wire: Wire, value: bytes, told: int | None
) -> None:
    rabbit.queues["takeaway"].append(Message(b"a", Raw(value)))
    (delivery,) = take(queue, wire)
    assert delivery.body == b"a"
    assert told in (None, delivery.properties.headers["h"])


# What was given back.


def test_released_messages_go_first_and_sorted(queue: Queue, rabbit: Rabbit, wire: Wire) -> None:
    rabbit.publish(b"a", b"b", b"c", b"d")
    a, b, c = take(queue, wire, 3)
    assert not a.redelivered
    queue.release([c])
    queue.release([b, a])
    before = len(asked(wire))
    deliveries = [one for _ in range(3) for one in result(ask(queue))]
    assert [(one.body, one.redelivered) for one in deliveries] == [
        (text, True) for text in (b"a", b"b", b"c")
    ]
    assert len(asked(wire)) == before, "a held message needs no basic.get"
    assert rejects(wire) == [], "the broker would count it"


@pytest.mark.parametrize("wait", [0, 9])
@pytest.mark.parametrize("queued", [[], [b"c"]])
def test_messages_released_while_requests_wait_go_to_them_in_order(
    queue: Queue, rabbit: Rabbit, wire: Wire, wait: int, queued: list[bytes]
) -> None:
    rabbit.publish(b"a", b"b", *queued)
    deliveries = take(queue, wire, 2)
    waiting = [ask(queue, wait=wait) for _ in range(2)]
    queue.release(reversed(deliveries))
    assert [bodies(request) for request in waiting] == [[b"a"], [b"b"]]
    wire.answer()
    assert [one.body for one in take(queue, wire)] == queued


@hasty
def test_a_message_that_comes_for_a_request_that_gave_up_is_held(
    queue: Queue, rabbit: Rabbit, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The request gives up; the broker is not silent for long enough.
    monkeypatch.setattr("subscriber.fetch.time", SimpleNamespace(monotonic=lambda: 1.0))
    rabbit.publish(b"a")
    quitter = ask(queue)
    with pytest.raises(BrokerUnavailable):
        result(quitter)
    wire.answer()
    assert bodies(ask(queue)) == [b"a"]
    assert asked(wire) == [1]


# Acknowledgements and rejections.


@pytest.mark.parametrize(
    ("rejected", "turns", "sent"),
    [
        ([], [[1]], [[(1, True)]]),
        ([], [[1, 2, 3]], [[(3, True)]]),
        ([], [[3, 1, 2], [4]], [[(3, True)], [(4, True)]]),
        ([], [[2]], [[(2, False)]]),
        ([], [[4, 1, 2]], [[(2, True), (4, False)]]),
        ([], [[2], [1, 3]], [[(2, False)], [(3, True)]]),
        ([], [[2], [1]], [[(2, False)], [(1, True)]]),
        ([], [[2], [2], [1, 2]], [[(2, False)], [(1, True)]]),
        ([2], [[1]], [[(1, True)]]),
        ([2], [[1, 2]], [[(1, True)]]),
        ([2], [[1, 3]], [[(3, True)]]),
        ([1], [[2, 4]], [[(2, True), (4, False)]]),
    ],
)
def test_acknowledgements_are_joined_where_nothing_unsettled_lies_below(
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    rejected: list[int],
    turns: list[list[int]],
    sent: list[list[tuple[int, bool]]],
) -> None:
    rabbit.publish(b"1", b"2", b"3", b"4")
    by_tag = {one.tag: one for one in take(queue, wire, 4)}
    queue.reject([by_tag[tag] for tag in rejected], False)
    gevent.idle()
    for tags in turns:
        for tag in tags:
            queue.ack([by_tag[tag]])
        gevent.idle()
    assert acks(wire) == sent
    settled = {tag for tags in turns for tag in tags}.difference(rejected)
    assert sorted(rabbit.acked) == [b"%d" % tag for tag in sorted(settled)]


@pytest.mark.parametrize("requeue", [False, True])
def test_rejections_are_sent_in_the_queue_s_order(
    queue: Queue, rabbit: Rabbit, wire: Wire, requeue: bool
) -> None:
    rabbit.publish(b"a", b"b", b"c", b"d")
    a, b, c = take(queue, wire, 3)
    queue.reject([c, a, b], requeue)
    queue.reject([b], requeue)
    assert rejects(wire) == [[(1, requeue), (2, requeue), (3, requeue)]]
    assert rabbit.bodies("takeaway.dead") == ([] if requeue else [b"a", b"b", b"c"])
    again = take(queue, wire, 9)
    assert [one.body for one in again] == ([b"a", b"b", b"c", b"d"] if requeue else [b"d"])
    assert again[0].redelivered is requeue


def test_what_is_settled_in_one_turn_is_sent_in_one_piece(
    queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"1", b"2", b"3", b"4", b"5")
    one, two, three, four, five = take(queue, wire, 5)
    before = len(wire.writes)
    queue.reject([five], True)
    queue.ack([four, one])
    queue.reject([three], False)
    queue.ack([two])
    gevent.idle()
    assert len(wire.writes) == before + 1
    assert acks(wire) == [[(2, True), (4, False)]]
    assert rejects(wire) == [[(3, False), (5, True)]]


@pytest.mark.parametrize("first", SETTLE)
@pytest.mark.parametrize("second", SETTLE)
def test_a_message_can_be_settled_once(
    queue: Queue, rabbit: Rabbit, wire: Wire, first: Settle, second: Settle
) -> None:
    rabbit.publish(b"a")
    deliveries = take(queue, wire)
    first(queue, deliveries)
    assert not queue.holds(deliveries[0])
    second(queue, deliveries)
    queue.release(deliveries)
    gevent.idle()
    second(queue, deliveries)
    gevent.idle()
    assert sum(len(one) for one in acks(wire) + rejects(wire)) == 1
    assert not ask(queue).ready(), "nothing is held for the next"


# Long polls.


def test_a_long_poll_gets_a_message_by_the_next_look(
    queue: Queue, rabbit: Rabbit, wire: Wire, looks: list[Callable[[], object]]
) -> None:
    waiting = ask(queue, wait=9)
    wire.answer()
    rabbit.publish(b"a")
    assert not waiting.ready()
    looks.pop()()
    wire.answer()
    assert bodies(waiting) == [b"a"]
    assert looks == []


@pytest.mark.parametrize("published", [[], [b"a"]])
def test_a_long_poll_is_told_empty_only_by_a_question_after_its_time_was_up(
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    looks: list[Callable[[], object]],
    published: list[bytes],
) -> None:
    waiting = ask(queue, wait=0.1)
    wire.answer()
    looks.pop()()
    gevent.sleep(0.11)
    rabbit.publish(*published)
    assert asked(wire) == [1, 1], "the look's answer is still on the way"
    wire.answer(1)
    assert not waiting.ready()
    wire.answer()
    assert bodies(waiting) == published
    assert asked(wire) == [1, 1, 1]


def test_the_queue_is_looked_into_only_while_somebody_waits(
    queue: Queue, wire: Wire, looks: list[Callable[[], object]]
) -> None:
    assert take(queue, wire) == []
    assert looks == []
    waiting = ask(queue, wait=0.05)
    wire.answer()
    assert len(looks) == 1
    gevent.sleep(0.06)
    wire.answer()
    assert result(waiting) == []
    before = asked(wire)
    looks.pop()()
    wire.answer()
    assert (looks, asked(wire)) == ([], before)


def test_a_thousand_long_polls_cost_one_question_a_look(
    queue: Queue, rabbit: Rabbit, wire: Wire, looks: list[Callable[[], object]]
) -> None:
    requests = [gevent.spawn(queue.get, wait=9) for _ in range(1000)]
    wire.answer()
    for _ in range(3):
        (look,) = looks
        looks.clear()
        look()
        wire.answer()
    assert asked(wire) == [1] * 4
    texts = [b"%d" % number for number in range(6)]
    rabbit.publish(*texts)
    looks.pop()()
    wire.answer()
    assert [bodies(request) for request in requests[:6]] == [[text] for text in texts]
    assert not any(request.ready() for request in requests[6:])
    assert asked(wire)[4:] == [1, 5, 1]


def test_a_request_that_does_not_wait_is_told_empty_beside_long_polls(
    queue: Queue, rabbit: Rabbit, wire: Wire, looks: list[Callable[[], object]]
) -> None:
    waiting = ask(queue, wait=9)
    wire.answer()
    assert take(queue, wire) == []
    rabbit.publish(b"a")
    assert take(queue, wire) == [], "the long poll asked first"
    assert bodies(waiting) == [b"a"]
    assert len(looks) == 1


def test_at_the_end_long_polls_get_what_there_is_and_go(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, looks: list[Callable[[], object]]
) -> None:
    requests = [ask(queue, wait=9) for _ in range(3)]
    wire.answer()
    rabbit.publish(b"a")
    broker.finish()
    wire.answer()
    assert [bodies(request) for request in requests] == [[b"a"], [], []]
    assert len(looks) == 1


def test_after_the_end_has_begun_no_request_waits(broker: Broker, queue: Queue, wire: Wire) -> None:
    broker.finish()
    waiting = ask(queue, wait=9)
    wire.answer()
    assert waiting.ready()


# A broker that is away.


@hasty
@pytest.mark.parametrize("wait", [0, 9])
def test_a_silent_broker_is_given_up_and_fails_every_request(
    broker: Broker, queue: Queue, wire: Wire, wait: int
) -> None:
    requests = [gevent.spawn(queue.get, wait=wait) for _ in range(100)]
    for request in requests:
        with pytest.raises(BrokerUnavailable):
            result(request)
    assert not broker.up
    assert wire.cut


@hasty
def test_a_broker_that_answers_others_is_not_silent(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("subscriber.fetch.time", clock)
    rabbit.publish(b"a", b"b")
    first, second = ask(queue), ask(queue)
    clock.now = 100
    wire.answer(1)
    assert bodies(first) == [b"a"]
    with pytest.raises(BrokerUnavailable, match="in time"):
        result(second)
    assert broker.up
    assert not wire.cut


@hasty
def test_a_batch_that_waits_too_long_for_the_rest_goes_with_what_it_has(
    queue: Queue, rabbit: Rabbit, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("subscriber.fetch.time", clock)
    rabbit.publish(b"a", b"b")
    batch = ask(queue, 3)
    clock.now = 100
    wire.answer(1)
    assert bodies(batch) == [b"a"]
    wire.answer()
    assert bodies(ask(queue)) == [b"b"]


def test_a_lost_connection_fails_who_waits_and_then_everybody_at_once(
    broker: Broker, queue: Queue, wire: Wire
) -> None:
    requests = [ask(queue, wait=wait) for wait in (0, 0, 9)]
    broker.lost("gone")
    for request in requests:
        with pytest.raises(BrokerUnavailable, match="gone"):
            result(request)
    with pytest.raises(BrokerUnavailable, match="not connected"):
        queue.get()
    assert asked(wire) == [1]


@pytest.mark.parametrize("settle", [*SETTLE, Queue.release])
def test_a_delivery_of_a_lost_connection_is_not_settled_on_the_next(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, settle: Settle
) -> None:
    rabbit.publish(b"a", b"b", b"c")
    old, held, late = take(queue, wire, 3)
    queue.release([held])
    settle(queue, [late])  # in the same turn
    broker.lost("gone")
    wire.lose()
    settle(queue, [old])  # while there is no connection
    renewed = rabbit.connect(broker, queue)
    deliveries = take(queue, renewed, 3)
    settle(queue, [old])
    assert [(one.tag, one.body) for one in deliveries] == [(1, b"a"), (2, b"b"), (3, b"c")]
    assert [queue.holds(one) for one in (old, *deliveries)] == [False, True, True, True]
    queue.ack(deliveries[1:2])
    assert acks(renewed) == [[(2, False)]]
    assert acks(wire) == rejects(wire) == rejects(renewed) == []


def test_a_channel_that_cannot_be_written_to_is_given_up(
    broker: Broker, queue: Queue, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_method: object) -> None:
        raise ChannelWrongStateError("closed")

    monkeypatch.setattr(queue.channel, "_send_method", closed)
    with pytest.raises(BrokerUnavailable, match="closed"):
        result(ask(queue))
    assert broker.up
    assert not wire.cut
    assert take(queue, wire) == [], "the next request has a new one"


@pytest.mark.parametrize("settle", [*SETTLE, None])
def test_a_connection_that_ended_a_moment_ago_is_given_up_without_an_error(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, settle: Settle | None
) -> None:
    rabbit.publish(b"a")
    deliveries = take(queue, wire)
    wire.lose()
    if settle:
        settle(queue, deliveries)
        gevent.idle()
    else:
        with pytest.raises(BrokerUnavailable):
            result(ask(queue))
    assert not broker.up


def test_a_missing_queue_is_the_reason_that_requests_get(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    del rabbit.queues["takeaway"]
    requests = [ask(queue), ask(queue, wait=9)]
    wire.answer()
    for request in requests:
        with pytest.raises(BrokerUnavailable, match="no queue 'takeaway'"):
            result(request)
    assert broker.up
    assert not wire.cut


def test_any_exception_while_connecting_is_followed_by_another_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("door.amqp.FIRST_RETRY", 0.001)
    broker = Broker(Settings(), Memory(2**40))
    attempts = iter([OSError("no such host"), RuntimeError("a bug"), None])

    def attempt() -> Exception:
        error = next(attempts)
        if error:
            raise error
        broker._stopping = True
        return OSError("the end")

    monkeypatch.setattr(broker, "_hold_connection", attempt)
    broker.start()
    assert broker._keeper is not None
    broker._keeper.get(timeout=2)
    assert next(attempts, "none left") == "none left"


@pytest.mark.parametrize("acknowledged", [[], [b"a"]])
def test_at_the_end_the_broker_has_time_to_take_the_acknowledgements(
    broker: Broker,
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
    acknowledged: list[bytes],
) -> None:
    steps: list[Any] = []
    monkeypatch.setattr("subscriber.broker.SETTLE", 7)
    monkeypatch.setattr(gevent, "sleep", lambda seconds: steps.append(round(seconds)))
    monkeypatch.setattr(wire.connection, "close", lambda: steps.append("closed"))
    rabbit.publish(b"a", b"b")
    queue.ack(take(queue, wire)[: len(acknowledged)])
    broker.stop()
    assert rabbit.acked == acknowledged
    assert steps == [7 if acknowledged else 0, "closed"]


@pytest.mark.parametrize("more", [[], [b"new"]])
def test_at_the_end_a_burst_under_way_holds_no_acknowledgement_back(
    broker: Broker,
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
    more: list[bytes],
) -> None:
    monkeypatch.setattr("subscriber.broker.SETTLE", 0.1)
    monkeypatch.setattr("subscriber.fetch.BURST_TIMEOUT", 9)
    rabbit.publish(*[b"%d" % number for number in range(20)])
    taken = take(queue, wire)
    ask(queue, 9)
    del rabbit.queues["takeaway"][2:]  # before the consumer has begun
    wire.answer()
    queue.ack(taken)
    assert (asked(wire), acks(wire)) == ([1, 9], [])
    rabbit.publish(*more)
    wire.prompt = True
    broker.stop()
    assert rabbit.acked == [b"0"]
    assert rabbit.bodies() == [b"1", b"2", *more]


# All of it together.


class TimeIsUp(BaseException):
    pass


class Bell(Event):
    """An event for which a greenlet waits until it is set or the test says that time is up."""

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        with contextlib.suppress(TimeIsUp):
            super().wait()
        return bool(self.is_set())


@dataclass(eq=False)
class Request:
    greenlet: Greenlet
    want: int
    patient: bool
    # How often the queue had been found empty when the request wanted to know.
    empties: int
    # Whether it may end with less, or without an answer.
    excused: bool = False


class Interleavings:
    """Requests, answers, clients and other programs in any order, some in one turn of the loop.

    What the steps are is in STEPS; each takes a number from 0 to 9, of something or as an index.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = SimpleNamespace(now=1.0, monotonic=lambda: self.clock.now)
        self.timers: list[Callable[[], object]] = []
        handed: list[Delivery] = []

        class Spied(Waiter):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.done = Bell()

            def take(self, delivery: Delivery) -> bool:
                handed.append(delivery)
                return super().take(delivery)

        self.handed = handed
        patch.setattr("subscriber.queue.Waiter", Spied)
        for module in "broker", "fetch", "queue", "settle", "shared":
            patch.setattr(f"subscriber.{module}.time", self.clock)
        patch.setattr("subscriber.pace.LARGEST_BURST", 6)
        patch.setattr("subscriber.fetch.BURST_TIMEOUT", 0)
        patch.setattr(
            gevent, "spawn_later", lambda _, call, *args: self.timers.append(partial(call, *args))
        )
        self.rabbit = Rabbit()
        self.broker = Broker(Settings(receive_timeout=1e9), Memory(2**40))
        self.queue = self.broker.queue("takeaway")
        self.wire = self.rabbit.connect(self.broker, self.queue)
        self.published = 0
        self.elsewhere: list[bytes] = []
        self.requests: list[Request] = []
        self.hands: list[Delivery] = []
        self.acked: set[bytes] = set()
        self.last = -1

    def check(self) -> None:
        """Compare what came with what was promised."""
        for delivery in self.handed:
            number = int(delivery.body)
            assert delivery.redelivered or number > self.last, "out of order"
            self.last = max(self.last, number)
        self.handed.clear()
        for request in [one for one in self.requests if one.greenlet.ready()]:
            self.requests.remove(request)
            if not request.greenlet.successful():
                assert request.excused
                continue
            deliveries: list[Delivery] = request.greenlet.value
            if len(deliveries) < request.want and not request.excused:
                assert self.rabbit.empties > request.empties, "the queue was not empty"
            held = {one.body for one in self.hands if self.queue.holds(one)}
            assert held.isdisjoint(one.body for one in deliveries), "two clients have it"
            self.hands += deliveries
        assert self.acked.issuperset(self.rabbit.acked), "nobody acknowledged it"
        assert self.rabbit.faults == []

    def end(self) -> None:
        """Let all who wait have an answer, take all that is left, and count."""
        self.finish()
        self.run_dry()
        assert self.requests == []
        self.settle(10_000, Queue.ack)
        for _ in range(2 + self.published // 9):
            self.request(9)
            self.run_dry()
            self.settle(10_000, Queue.ack)
        self.run_dry()
        dead = self.rabbit.bodies("takeaway.dead")
        ended = sorted(map(int, self.rabbit.acked + dead + self.elsewhere))
        assert ended == list(range(self.published)), "none is lost or twice"

    def run_dry(self) -> None:
        self.answer(10_000)
        while self.timers:
            self.timers_fire()
            self.answer(10_000)
        self.check()

    def publish(self, count: int) -> None:
        numbers = range(self.published, self.published + count)
        self.rabbit.publish(*[b"%d" % number for number in numbers])
        self.published += count

    def others_take(self, count: int) -> None:
        queue = self.rabbit.queues["takeaway"]
        self.elsewhere += [queue.take().body for _ in range(min(count, len(queue)))]

    def request(self, want: int) -> None:
        self._request(want or 1, wait=0)

    def long_poll(self, _: int) -> None:
        self._request(1, wait=1e-9)

    def _request(self, want: int, wait: float) -> None:
        greenlet = gevent.spawn(self.queue.get, want, wait=wait)
        request = Request(greenlet, want, wait > 0, self.rabbit.empties)
        channel = self.queue.channel
        request.excused = bool(channel and channel.channel_number in self.wire.peer.closing)
        self.requests.append(request)
        gevent.sleep(0)

    def time_is_up(self, index: int) -> None:
        for request in self.requests[index : index + 1]:
            request.excused = not request.patient
            request.patient, request.empties = False, self.rabbit.empties
            self.clock.now += 1e-6
            request.greenlet.kill(TimeIsUp, block=False)
            gevent.sleep(0)

    def answer(self, count: int) -> None:
        self.wire.answer(count)

    def timers_fire(self, _: int = 0) -> None:
        """Look into the empty queue, and at bursts that bring nothing."""
        timers = self.timers[:]
        self.timers.clear()
        self.clock.now += 1
        for call in timers:
            gevent.spawn(call)
        gevent.sleep(0)

    def settle(self, count: int, how: Settle) -> None:
        """Settle the first that came, and every other one, as clients differ in their pace."""
        self.check()
        chosen = self.hands[:count] + self.hands[count + 1 :: 2]
        self.hands = self.hands[count : count + 1] + self.hands[count + 2 :: 2]
        if how is Queue.ack:
            self.acked |= {one.body for one in chosen}
        how(self.queue, chosen[::-1])

    def finish(self) -> None:
        for request in self.requests:
            if request.patient:
                request.patient, request.empties = False, self.rabbit.empties
        self.broker.finish()

    def close_channel(self, _: int) -> None:
        """Let the broker close the queue's channel, of which the next request may hear late."""
        if channel := self.queue.channel:
            self.wire.peer.close(channel.channel_number, 406, "PRECONDITION_FAILED - timeout")
            for request in self.requests:
                request.excused = True

    def lose(self, _: int) -> None:
        self.broker.lost("gone")
        self.wire.lose()
        for request in self.requests:
            request.excused = True
        self.wire = self.rabbit.connect(self.broker, self.queue)


STEPS: list[Callable[[Interleavings, int], None]] = [
    *[Interleavings.publish] * 2,
    *[Interleavings.request] * 3,
    Interleavings.long_poll,
    *[Interleavings.answer] * 5,
    *[partial(Interleavings.settle, how=how) for how in (*SETTLE, Queue.release)],
    Interleavings.time_is_up,
    Interleavings.timers_fire,
    Interleavings.others_take,
    Interleavings.lose,
    Interleavings.close_channel,
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), min_size=30, max_size=60))
def test_whatever_happens_in_whatever_order_each_message_goes_its_way(
    steps: list[tuple[Callable[[Interleavings, int], None], int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        all_of_it = Interleavings(patch)
        try:
            for step, number in steps:
                step(all_of_it, number)
                all_of_it.check()
            all_of_it.end()
        finally:
            all_of_it.broker.lost("the end")
