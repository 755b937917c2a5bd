"""Who gets which message, and who waits."""

import math
from typing import Any

import pytest
from pika.spec import BasicProperties
from subscriber.delivery import Delivery
from subscriber.line import Line, Waiter


def delivery(tag: int) -> Delivery:
    channel: Any = None
    return Delivery(tag, b"x", BasicProperties(), channel)


def enter(
    line: Line, want: int = 1, patient: bool = False, room: float = math.inf, address: str = ""
) -> Waiter:
    waiter = Waiter(want, room, patient, address)
    line.serve(waiter)
    if not waiter.done.is_set():
        line.enter(waiter, since=0)
    return waiter


def tags(waiter: Waiter) -> list[int]:
    return [one.tag for one in waiter.deliveries]


def test_who_came_first_is_served_first_whether_patient_or_not() -> None:
    line = Line()
    waiters = [enter(line, patient=number % 2 == 0) for number in range(4)]
    assert (line.wanted, line.patient) == (2, 2)
    for tag in range(4):
        line.hand_out(delivery(tag))
    assert [tags(waiter) for waiter in waiters] == [[0], [1], [2], [3]]
    assert (line.wanted, line.patient) == (0, 0)


def test_addresses_take_turns_however_many_requests_one_has() -> None:
    line = Line()
    many = [enter(line, address="many") for _ in range(4)]
    batch = enter(line, want=2, address="batch")
    poll = enter(line, patient=True, address="poll")
    for tag in range(7):
        line.hand_out(delivery(tag))
    # A request keeps its turn until it has what it wants.
    assert [tags(waiter) for waiter in (*many, batch, poll)] == [[0], [4], [5], [6], [1, 2], [3]]
    assert (line.wanted, line.patient) == (0, 0)


def test_who_leaves_takes_no_turn_of_others() -> None:
    line = Line()
    first, second, other = (enter(line, address=name) for name in ("a", "a", "b"))
    line.leave(first)
    for tag in range(2):
        line.hand_out(delivery(tag))
    assert sorted(tags(second) + tags(other)) == [0, 1]
    assert tags(first) == []


def test_what_nobody_waits_for_is_held_in_the_queue_s_order() -> None:
    line = Line()
    for tag in 3, 1, 2:
        line.hand_out(delivery(tag))
    assert tags(enter(line, want=2)) == [1, 2]
    assert tags(enter(line, want=2)) == [3]
    assert line.wanted == 1


def test_what_does_not_fit_goes_to_the_next_and_ends_the_wait() -> None:
    line = Line()
    batch, other = enter(line, want=9, room=1.5 * delivery(1).size), enter(line)
    assert line.wanted == 10
    for tag in 1, 2:
        line.hand_out(delivery(tag))
    assert (tags(batch), tags(other)) == ([1], [2])
    assert batch.done.is_set()
    assert line.wanted == 0


def test_who_leaves_gets_nothing() -> None:
    line = Line()
    quitter, other = enter(line, want=5), enter(line)
    line.leave(quitter)
    line.leave(quitter)
    line.hand_out(delivery(1))
    assert (tags(quitter), tags(other)) == ([], [1])
    assert line.wanted == 0


def test_an_empty_queue_ends_the_wait_of_the_impatient_who_asked_before() -> None:
    line = Line()
    patient, early = enter(line, patient=True), enter(line)
    late = Waiter(1, math.inf, patient=False)
    line.enter(late, since=1)
    line.found_empty(1)
    assert [one.done.is_set() for one in (patient, early, late)] == [False, True, False]
    line.hurry_all(since=1)
    assert (line.wanted, line.patient) == (2, 0)
    line.found_empty(2)
    assert patient.done.is_set()


def test_a_failure_ends_every_wait_and_lets_all_messages_go() -> None:
    line = Line()
    batch, poll = enter(line, want=5), enter(line, patient=True)
    given = delivery(1)
    line.hand_out(given)
    error = OSError("gone")
    line.fail(error)
    assert [one.error for one in (batch, poll)] == [error, error]
    assert batch.deliveries == []
    assert given.closed
    assert (line.wanted, line.patient) == (0, 0)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_failure_forgets_what_is_held(waiting: bool) -> None:
    line = Line()
    held = delivery(1)
    line.hand_out(held)
    line.fail(OSError("gone"))
    assert held.closed
    assert tags(enter(line, patient=waiting)) == []
