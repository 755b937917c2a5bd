"""What the broker is told of the messages that were settled."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door.amqp import Link
from door.settings import BrokerSettings
from subscriber.delivery import Handle
from subscriber.settle import Settler, Unsettled

Told = list[tuple[int, bool]]


@pytest.mark.parametrize(
    ("acked", "rejected", "acks", "rejections"),
    [
        ([1, 2, 3], [], [(3, True)], []),
        ([2], [], [(2, False)], []),
        ([4, 1, 2], [], [(2, True), (4, False)], []),
        ([1, 3], [2], [(1, True), (3, False)], [(2, True)]),
        ([], [3, 1], [], [(1, True), (3, True)]),
        ([9], [9], [], []),
    ],
)
def test_what_is_settled_is_told_by_as_few_methods_as_possible(
    acked: list[int],
    rejected: list[int],
    acks: list[tuple[int, bool]],
    rejections: list[tuple[int, bool]],
) -> None:
    unsettled = Unsettled()
    for tag in range(1, 5):
        unsettled.add(tag)
    unsettled.ack(acked)
    unsettled.reject(rejected, requeue=True)
    assert unsettled.take() == (acks, rejections)
    assert unsettled.take() == ([], [])
    left = {1, 2, 3, 4}.difference(acked, rejected)
    assert {tag for tag in range(1, 10) if unsettled.has(tag)} == left


def test_each_is_settled_once_by_who_comes_first() -> None:
    unsettled = Unsettled()
    unsettled.add(1)
    unsettled.ack([1])
    unsettled.reject([1], requeue=False)
    assert unsettled.take() == ([(1, True)], [])
    unsettled.ack([1])
    assert unsettled.take() == ([], [])


def test_a_new_channel_begins_with_none() -> None:
    unsettled = Unsettled()
    unsettled.add(1)
    unsettled.add(2)
    unsettled.ack([1])
    unsettled.clear()
    assert unsettled.take() == ([], [])
    assert not unsettled.has(2)


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def channel(told: Told) -> Any:
    channel = SimpleNamespace(connection=SimpleNamespace(joined=nullcontext))
    channel.basic_ack = channel.basic_reject = lambda *said: told.append(said)
    return channel


@pytest.fixture
def settler(channel: Any) -> Settler:
    """Return a settler of the messages 1 to 3."""
    link = Link(BrokerSettings(), "settler")
    link.channel = channel
    settler = Settler(link)
    for tag in 1, 2, 3:
        settler.add(tag)
    return settler


def test_what_is_settled_in_one_turn_of_the_event_loop_is_told_at_its_end(
    settler: Settler, channel: Any, told: Told
) -> None:
    settler.ack([Handle(1, channel, 0)])
    settler.reject([Handle(3, channel, 0)], requeue=False)
    settler.ack([Handle(2, channel, 0)])
    assert told == []
    gevent.idle()
    assert told == [(2, True), (3, False)]


def test_nothing_is_told_in_a_pause_and_all_of_it_at_its_end(
    settler: Settler, channel: Any, told: Told
) -> None:
    settler.pause()
    for tag in 1, 2:
        settler.ack([Handle(tag, channel, 0)])
        gevent.idle()
    assert (told, settler.holds(Handle(1, channel, 0))) == ([], False)
    settler.resume()
    assert told == [(2, True)]


def test_a_lost_connection_ends_a_pause_and_what_was_to_be_told(
    settler: Settler, channel: Any, told: Told
) -> None:
    settler.pause()
    settler.ack([Handle(1, channel, 0)])
    settler.lost()
    settler.add(1)
    settler.ack([Handle(1, channel, 0)])
    gevent.idle()
    assert told == [(1, True)]


def test_what_no_client_had_is_told_by_a_nack_and_a_tag_of_the_next_channel_is_another_s(
    settler: Settler, channel: Any
) -> None:
    told: list[tuple[str, int, bool]] = []
    channel.basic_nack = lambda tag, requeue: told.append(("nack", tag, requeue))
    channel.basic_reject = lambda tag, requeue: told.append(("reject", tag, requeue))
    settler.reject([Handle(3, channel, 0)], requeue=True)
    settler.give_back([Handle(tag, channel, 0) for tag in (1, 2)])
    gevent.idle()
    assert told == [("nack", 1, True), ("nack", 2, True), ("reject", 3, True)]
    settler.add(4)
    settler.give_back([Handle(4, channel, 0)])
    settler.lost()
    settler.add(4)
    settler.reject([Handle(4, channel, 0)], requeue=True)
    gevent.idle()
    assert told[3:] == [("reject", 4, True)]
