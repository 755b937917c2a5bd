"""What looking at the dead queue and emptying it promise."""

from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from gevent import Greenlet
from pika import frame
from pika.spec import Basic, BasicProperties, Channel
from subscriber.broker import Broker
from subscriber.dead import Dead
from subscriber.delivery import Delivery
from subscriber.settings import Settings

from .conftest import Rabbit, Wire

DEAD = "takeaway.dead"
TEXTS = [b"a", b"b", b"c", b"d"]
CHANNEL = (Channel.Open, Channel.Close)
ASKS = [lambda dead: dead.look(9, 10_000), lambda dead: dead.redrive(9)]


@pytest.fixture
def wire(rabbit: Rabbit, broker: Broker) -> Wire:
    return rabbit.connect(broker)


@pytest.fixture
def dead(broker: Broker, wire: Wire) -> Iterator[Dead]:
    wire.prompt = True
    yield Dead(broker, "takeaway", Settings(receive_timeout=1))
    assert open_channels(wire) == 1, "only the broker's own channel stays open"


def open_channels(wire: Wire) -> int:
    gevent.sleep(0.01)
    return sum(channel.is_open for channel in wire.connection._channels.values()) or 1


def ask(method: Any, *args: Any) -> Any:
    return gevent.spawn(method, *args).get(timeout=2)


@pytest.mark.parametrize(
    ("most", "room", "seen"),
    [
        (1, 99, b"a"),
        (3, 99, b"abc"),
        (4, 99, b"abcd"),
        (9, 99, b"abcd"),
        (9, 2, b"ab"),
        (9, 2.9, b"ab"),
        (9, 0, b"a"),
    ],
)
def test_a_look_shows_the_first_and_leaves_all_in_their_order(
    dead: Dead, rabbit: Rabbit, wire: Wire, most: int, room: float, seen: bytes
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    channel: Any = None
    size = Delivery(1, b"x", rabbit.queues[DEAD][0].properties, channel).size
    for again in False, True:
        # Whether a message was redelivered makes a line shorter, which the bounds allow for.
        found = ask(dead.look, most, int(room * size))
        assert b"".join(one.body for one in found) == seen
        assert [one.redelivered for one in found] == [again] * len(found)
        assert rabbit.bodies(DEAD) == TEXTS
    assert rabbit.acked == rabbit.bodies() == []
    # The broker may count other ways back as failed deliveries.
    nacks = [one for methods in wire.sent(Basic.Nack) for one in methods]
    assert [(one.multiple, one.requeue) for one in nacks] == [(True, True)] * 2


@pytest.mark.parametrize("method", ["look", "redrive"])
def test_an_empty_dead_queue_has_nothing(dead: Dead, method: str) -> None:
    args = [9, 10_000][: 1 + (method == "look")]
    assert not ask(getattr(dead, method), *args)


@pytest.mark.parametrize(("most", "moved"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_redrive_sends_the_first_back_in_their_order(
    dead: Dead, rabbit: Rabbit, wire: Wire, most: int, moved: int
) -> None:
    rabbit.publish(b"x")
    rabbit.publish(*TEXTS, queue=DEAD)
    assert ask(dead.redrive, most) == moved
    assert rabbit.bodies() == [b"x", *TEXTS[:moved]]
    assert rabbit.bodies(DEAD) == TEXTS[moved:]
    assert rabbit.acked == TEXTS[:moved]
    assert all(one.mandatory for methods in wire.sent(Basic.Publish) for one in methods)


def test_a_policy_in_the_stacks_place_makes_redrive_lose_nothing(
    dead: Dead, rabbit: Rabbit
) -> None:
    rabbit.dead_letter.clear()  # what is rejected is gone
    rabbit.publish(*TEXTS, queue=DEAD)
    assert ask(dead.redrive, 9) == len(TEXTS)
    assert rabbit.bodies() == TEXTS


def test_a_redriven_message_is_new_and_all_that_it_had(dead: Dead, rabbit: Rabbit) -> None:
    own = {"X-Colour": "blue", "ratio": 0.5, "late": 2**63, "none": None, "x-deathly": 1}
    past = {"x-death": [{"count": 21}], "x-first-death-queue": "takeaway", "x-delivery-count": 21}
    past |= {"x-acquired-count": 21, "x-last-death-reason": "delivery_limit"}
    told = {"message_id": "my-id", "content_type": "image/png", "timestamp": 7, "priority": 3}
    rabbit.publish(b"", queue=DEAD)
    rabbit.queues[DEAD][0].properties = BasicProperties(**told, headers=own | past, user_id="admin")
    assert ask(dead.redrive, 9) == 1
    (message,) = rabbit.queues["takeaway"]
    # The broker takes no message that bears another user's name.
    assert message.properties == BasicProperties(**told, headers=own, delivery_mode=2)
    assert not message.redelivered


def test_a_redriven_message_is_still_its_client_s(dead: Dead, rabbit: Rabbit) -> None:
    rabbit.publish(b"", queue=DEAD)
    properties = BasicProperties(headers={"X-Client": "shop"}, user_id="publisher")
    rabbit.queues[DEAD][0].properties = properties
    assert ask(dead.redrive, 9) == 1
    (message,) = rabbit.queues["takeaway"]
    assert message.properties.user_id == Settings().broker.user
    assert message.properties.headers == {"X-Client": "shop"}


def test_what_has_no_headers_is_redriven_without(dead: Dead, rabbit: Rabbit) -> None:
    rabbit.publish(b"x", queue=DEAD)
    assert ask(dead.redrive, 9) == 1
    assert rabbit.queues["takeaway"][0].properties == BasicProperties(delivery_mode=2)


def test_a_message_leaves_the_dead_queue_only_after_the_confirm(
    dead: Dead, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.prompt = False
    redrive = gevent.spawn(dead.redrive, 9)
    wire.answer(2)  # the channel, the first message
    assert rabbit.bodies() == TEXTS[:1]
    assert not rabbit.acked
    wire.answer(1)
    assert rabbit.acked == TEXTS[:1]
    wire.answer()
    assert redrive.get(timeout=2) == len(TEXTS)


@pytest.mark.parametrize("cause", ["full", "returned", "forbidden"])
def test_what_the_queue_does_not_take_stays_dead(dead: Dead, rabbit: Rabbit, cause: str) -> None:
    rabbit.full = cause == "full"
    if cause == "returned":
        rabbit.bindings.clear()
    if cause == "forbidden":
        rabbit.forbidden.add("takeaway-in")
    reason = {"full": "Basic.Nack", "returned": "NO_ROUTE", "forbidden": "ACCESS_REFUSED"}[cause]
    rabbit.publish(*TEXTS, queue=DEAD)
    fails(gevent.spawn(dead.redrive, 9), f"took 0 messages.*{reason}")
    assert rabbit.bodies(DEAD) == TEXTS
    assert rabbit.bodies() == rabbit.acked == []
    assert dead._broker.up, "the connection is not to blame"


def test_a_silent_confirm_leaves_the_message_dead(dead: Dead, rabbit: Rabbit, wire: Wire) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.peer.deaf = (Basic.Publish, frame.Header, frame.Body)
    dead._timeout = 0.02
    fails(gevent.spawn(dead.redrive, 9), "took 0 messages")
    assert rabbit.bodies(DEAD) == TEXTS


def test_redrive_moves_no_more_than_there_was_at_first(dead: Dead, rabbit: Rabbit) -> None:
    rabbit.bindings["takeaway-in", "takeaway"] = DEAD  # what goes back dies again at once
    rabbit.publish(*TEXTS, queue=DEAD)
    assert ask(dead.redrive, 9) == len(TEXTS)
    assert rabbit.bodies(DEAD) == TEXTS


def test_redrive_ends_where_others_have_taken_the_rest(
    dead: Dead, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.prompt = False
    redrive = gevent.spawn(dead.redrive, 9)
    wire.answer(1)
    assert rabbit.bodies(DEAD) == TEXTS[1:], "the first is on its way"
    del rabbit.queues[DEAD][:]
    wire.answer()
    assert redrive.get(timeout=2) == 1


@pytest.mark.parametrize("method", ASKS)
def test_it_is_done_when_the_broker_says_so(
    dead: Dead, rabbit: Rabbit, wire: Wire, method: Any
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.prompt = False
    request = gevent.spawn(method, dead)
    while not request.ready():
        wire.answer(1)
    assert not wire.answers, "the channel was still being closed"


def test_requests_take_turns(dead: Dead, rabbit: Rabbit, wire: Wire) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    looks = [gevent.spawn(dead.look, 9, 10_000) for _ in range(3)]
    assert [[one.body for one in look.get(timeout=2)] for look in looks] == [TEXTS] * 3
    order = [type(one) for write in wire.writes for one in write if isinstance(one, CHANNEL)]
    assert order[1:] == [Channel.Open, Channel.Close] * 3


def fails(request: Greenlet, match: str | None = None) -> None:
    with pytest.raises(BrokerUnavailable, match=match):
        request.get(timeout=2)


@pytest.mark.parametrize("method", ASKS)
def test_without_a_connection_it_is_told(broker: Broker, dead: Dead, method: Any) -> None:
    broker.lost("gone")
    fails(gevent.spawn(method, dead), "not connected")


@pytest.mark.parametrize("method", ASKS)
def test_a_silent_broker_is_told_and_the_next_request_has_its_turn(
    dead: Dead, rabbit: Rabbit, wire: Wire, method: Any
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.peer.deaf = (Basic.Get,)
    dead._timeout = 0.02
    fails(gevent.spawn(method, dead), "did not answer")
    wire.peer.deaf = ()
    dead._timeout = 1
    assert [one.body for one in ask(dead.look, 9, 10_000)] == TEXTS


@pytest.mark.parametrize("method", ASKS)
def test_no_channel_is_left_to_open_too_late(
    broker: Broker, dead: Dead, rabbit: Rabbit, wire: Wire, method: Any
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.peer.deaf = (Channel.Open,)
    dead._timeout = 0.02
    fails(gevent.spawn(method, dead), "opened no channel")
    gevent.idle()
    assert wire.cut
    dead._timeout = 1
    rabbit.connect(broker).prompt = True
    assert [one.body for one in ask(dead.look, 9, 10_000)] == TEXTS


@pytest.mark.parametrize("method", ASKS)
def test_a_missing_dead_queue_is_told(dead: Dead, rabbit: Rabbit, method: Any) -> None:
    del rabbit.queues[DEAD]
    fails(gevent.spawn(method, dead), f"no queue '{DEAD}'")
    assert dead._broker.up, "the connection is not to blame"


@pytest.mark.parametrize("method", ASKS)
@pytest.mark.parametrize("heard", [0, 1, 2, 3])
def test_a_connection_that_is_lost_is_told_and_nothing_is_used_up(
    broker: Broker, dead: Dead, rabbit: Rabbit, wire: Wire, method: Any, heard: int
) -> None:
    rabbit.publish(*TEXTS, queue=DEAD)
    wire.prompt = False
    dead._timeout = 0.2
    request = gevent.spawn(method, dead)
    wire.answer(heard)
    assert not request.ready()
    wire.lose()
    broker.lost("gone")
    fails(request)
    # Between confirm and acknowledgement, a message is in both.
    assert sorted({*rabbit.bodies(), *rabbit.bodies(DEAD)}) == TEXTS


@pytest.mark.parametrize("method", ASKS)
def test_a_connection_that_ended_a_moment_ago_is_told(dead: Dead, wire: Wire, method: Any) -> None:
    wire.lose()
    fails(gevent.spawn(method, dead))


def test_a_lost_connection_is_not_blamed_on_the_next(
    broker: Broker, dead: Dead, rabbit: Rabbit, wire: Wire
) -> None:
    wire.prompt = False
    dead._timeout = 0.05
    look = gevent.spawn(dead.look, 9, 10_000)
    gevent.idle()
    broker.lost("gone")
    wire.lose()
    renewed = rabbit.connect(broker)
    fails(look)
    gevent.idle()
    assert broker.up
    assert not renewed.cut
