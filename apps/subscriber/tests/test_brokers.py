"""What a move to another broker promises, on pika's own connections to a RabbitMQ in memory."""

import time
from typing import Any

import gevent
import pytest
from door.amqp import Channel
from gevent import Greenlet
from pika.spec import Basic
from subscriber.broker import Broker
from subscriber.channel import own_channel
from subscriber.delivery import Delivery
from subscriber.queue import Queue

from .conftest import Rabbit, Wire


def ask(queue: Queue, *args: Any, **kwargs: Any) -> Greenlet:
    """Start a request; on return it waits or has its answer."""
    request = gevent.spawn(queue.get, *args, **kwargs)
    gevent.idle()
    return request


def take(queue: Queue, wire: Wire, want: int = 1) -> list[Delivery]:
    request = ask(queue, want)
    wire.answer()
    found: list[Delivery] = request.get(timeout=2)
    return found


@pytest.fixture
def home(rabbit: Rabbit) -> tuple[Wire, Channel]:
    """Return the connection to another broker of the same cluster, and its main channel."""
    opened: list[Channel] = []
    wire = Wire(rabbit, lambda one: one.channel(on_open_callback=opened.append))
    wire.answer()
    return wire, opened[0]


def test_after_a_move_each_message_comes_once_and_by_the_new_connection(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, home: tuple[Wire, Channel]
) -> None:
    rabbit.publish(b"a", b"b", b"c")
    (first,) = take(queue, wire)
    queue.ack([first])
    gevent.idle()
    assert broker.pause()
    assert broker.idle
    broker.move(home[1])
    broker.resume()
    wire.writes.clear()
    second, third = take(queue, home[0], 2)
    assert [second.body, third.body] == [b"b", b"c"]
    assert not second.redelivered
    queue.ack([second, third])
    gevent.idle()
    assert rabbit.acked == [b"a", b"b", b"c"]
    assert wire.writes == []
    wire.lose()  # the old connection is of no meaning
    gevent.idle()
    assert broker.up
    assert rabbit.bodies() == []


def test_a_long_poll_goes_on_by_the_new_connection(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire, home: tuple[Wire, Channel]
) -> None:
    poll = ask(queue, wait=9)
    wire.answer()
    assert broker.pause()
    assert broker.idle
    home[0].prompt = True
    broker.move(home[1])
    broker.resume()
    gevent.sleep(0.1)
    assert not poll.ready()
    rabbit.publish(b"a")
    assert [one.body for one in poll.get(timeout=2)] == [b"a"]


def test_a_channel_that_the_old_connection_opens_late_is_not_used(
    broker: Broker, rabbit: Rabbit, wire: Wire, home: tuple[Wire, Channel]
) -> None:
    rabbit.add("pasta")
    pasta = broker.queue("pasta")
    rabbit.publish(b"a", queue="pasta")
    request = ask(pasta)  # whose channel is on its way
    broker.move(home[1])
    home[0].answer()
    wire.answer()
    assert [one.body for one in request.get(timeout=2)] == [b"a"]
    assert pasta.channel is not None
    assert pasta.channel.connection is home[1].connection


def test_a_paused_subscriber_fetches_nothing_and_then_what_is_wanted(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a")
    assert broker.pause()
    request = ask(queue)
    wire.answer()
    assert wire.sent(Basic.Get) == []
    assert broker.idle
    broker.resume()
    gevent.idle()
    assert not broker.idle, "an answer is on its way"
    wire.answer()
    assert [one.body for one in request.get(timeout=2)] == [b"a"]
    assert not broker.idle, "a message is on its way to a client"


@pytest.mark.parametrize("how", ["leased", "held"])
def test_a_subscriber_that_keeps_a_message_neither_moves_nor_pauses(
    broker: Broker,
    queue: Queue,
    rabbit: Rabbit,
    wire: Wire,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subscriber.queue.DRAIN", 0.05)
    rabbit.publish(b"a", b"b")
    found = take(queue, wire)
    assert not broker.idle
    gevent.sleep(0.1)
    if how == "held":
        queue.release(found)
    assert not broker.idle
    assert not broker.pause()
    if how == "held":
        found = take(queue, wire)
    second = take(queue, wire)  # nothing is paused
    queue.ack(found + second)
    gevent.idle()
    assert broker.pause()
    assert broker.idle


def test_a_request_with_a_channel_of_its_own_keeps_the_connection(
    broker: Broker, wire: Wire
) -> None:
    wire.prompt = True
    assert broker.idle
    with own_channel(broker, 1, "the dead queue"):
        assert not broker.idle
    assert broker.idle


def test_what_came_in_the_last_moment_is_no_reason_not_to_pause(
    broker: Broker, queue: Queue, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a")
    since = time.monotonic()
    (found,) = take(queue, wire)
    assert time.monotonic() - since < 0.5
    assert broker.pause()
    assert not broker.idle
    queue.ack([found])
    gevent.idle()
    assert broker.idle
