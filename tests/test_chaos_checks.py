"""What the chaos test checks is seen when it is broken."""

import pytest
from chaos import Delivery, Message, check, read


def seen(text: str) -> list[Delivery]:
    """Return the deliveries that text lists, as `a1 a2 b1`; a later * marks a redelivered one."""
    return [
        Delivery(Message(word[0], int(word[1:].rstrip("*"))), word.endswith("*"))
        for word in text.split()
    ]


def problems(confirmed: str, uncertain: str, *receivers: str) -> list[str]:
    sure, unsure = ({each.message for each in seen(text)} for text in (confirmed, uncertain))
    return check(sure, sure | unsure, [seen(receiver) for receiver in receivers])


@pytest.mark.parametrize(
    "receivers",
    [
        ["a1 b1 a2 b2 a3"],
        # Between two receivers nobody knows which was first.
        ["a2 b1", "a1 b2 a3"],
        # What the broker put back comes before the rest, once or more.
        ["a1 a2 b1 a1* a2* a2* b2 a3"],
        ["a3 a1* a2* b1", "b2"],
        ["a1 a3 b1", "b2", "a2*"],
        # One without a 201 may arrive or not, and late.
        ["a1 a2 a3 b1 b2 b3"],
        ["a1 a2 a0 b1 b2 a3"],
    ],
)
def test_what_is_allowed_is_no_problem(receivers: list[str]) -> None:
    assert problems("a1 a2 a3 b1 b2", "b3 a0", *receivers) == []


@pytest.mark.parametrize(
    ("receivers", "named"),
    [
        (["a1 a2", "b1"], "2 lost: a:3, b:2"),
        (["a1 a3 a2 b1", "b2"], "1 out of order: a:2 after 3 (receiver 0)"),
        (["b2", "a2 b1 a3 a1"], "1 out of order: a:1 after 3 (receiver 1)"),
        (["a1 a2 a3", "a2 b1 b2"], "1 twice without redelivered: a:2"),
        (["a1 a2 a3 a3 b1 b2"], "1 twice without redelivered: a:3"),
        (["a1 a2 a3 b1 b2 c1"], "1 never sent: c:1"),
    ],
)
def test_what_is_broken_is_named(receivers: list[str], named: str) -> None:
    assert problems("a1 a2 a3 b1 b2", "", *receivers) == [named]


def test_a_message_is_read_from_the_beginning_of_its_body() -> None:
    assert read({"body": "a-0:12 xxx", "redelivered": True}) == Delivery(Message("a-0", 12), True)
    assert read({"body": "hello", "redelivered": False}) == Delivery(Message("", -1), False)
