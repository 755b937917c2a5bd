"""What the broker is told of the messages that were settled."""

import pytest
from subscriber.settle import Unsettled


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
