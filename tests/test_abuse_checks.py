"""What the abuse test looks at is seen when it is broken."""

import json
from base64 import b64encode

import pytest
from abuse import Answer, Container, Ledger, Meanwhile, changed, parse

WELL = Container("10.0.0.2", pid=1, started="now", restarts=0, out_of_memory=False, kills=0)


def meanwhile(*posts: tuple[int, float]) -> Meanwhile:
    return Meanwhile(list(posts), [(200, 0.1)], [], [], {}, set())


def test_others_who_are_answered_in_time_are_no_problem() -> None:
    assert meanwhile((201, 0.2), (201, 0.9)).problems() == []


def test_others_who_are_refused_or_wait_are_named() -> None:
    assert meanwhile((201, 1.2)).problems() == ["a POST of somebody else took 1.2 s"]
    assert meanwhile((503, 0.1), (0, 0.1), (503, 0.2)).problems() == [
        'POSTs of somebody else that were refused: {"503": 2, "none": 1}'
    ]


def test_who_is_cut_off_by_the_case_itself_is_no_problem() -> None:
    assert meanwhile((201, 0.2), (0, 0.1)).problems(kills=1) == []
    assert len(meanwhile((0, 0.1), (0, 0.1)).problems(kills=1)) == 1


def test_a_post_that_is_refused_while_the_broker_has_an_alarm_is_no_problem() -> None:
    assert meanwhile((201, 0.2), (503, 0.1)).problems(alarms=1) == []
    assert len(meanwhile((201, 0.2), (500, 0.1)).problems(alarms=1)) == 1


def test_a_container_that_lives_on_is_no_problem() -> None:
    assert changed({"subscriber": WELL}, {"subscriber": WELL}) == []


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({}, "publisher is gone"),
        (
            {"publisher": WELL._replace(pid=2, restarts=1, out_of_memory=True)},
            "publisher was restarted (0 → 1, killed for memory)",
        ),
        ({"publisher": WELL._replace(pid=2)}, "publisher was restarted (0 → 0)"),
        (
            {"publisher": WELL._replace(kills=2)},
            "publisher had 2 processes killed for memory",
        ),
    ],
)
def test_a_container_that_was_killed_is_named(after: dict[str, Container], told: str) -> None:
    assert changed({"publisher": WELL}, after) == [told]


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (Answer(0, {}, b""), None),
        (Answer(431, {}, b""), None),
        (Answer(503, {"Retry-After": "1"}, b""), None),
        (Answer(503, {}, b""), "status 503 without Retry-After"),
        (Answer(500, {}, b"sorry"), "status 500: b'sorry'"),
    ],
)
def test_what_who_abuses_is_told_is_an_answer_and_no_failure(
    answer: Answer, wrong: str | None
) -> None:
    assert answer.wrong() == wrong


def test_a_message_is_found_in_every_form_in_which_it_comes() -> None:
    body = "abuse-0-1 xxx"
    lines = [{"body": body, "receipt": "a"}, {"body": b64encode(b"abuse-0-2 \xff").decode()}]
    lines[1]["encoding"] = "base64"
    told = "\n".join(map(json.dumps, lines)).encode()
    many = Answer(200, {"Content-Type": "application/x-ndjson"}, told)
    assert many.messages() == [("abuse-0-1", "a"), ("abuse-0-2", "")]
    assert Answer(200, {}, body.encode()).messages() == [("abuse-0-1", "")]
    assert Answer(200, {}, b"No message available\n").messages() == []


def test_what_was_cut_has_not_arrived() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n"
    assert parse(head + b"abuse-0-1 xxx").messages() == [("abuse-0-1", "")]
    assert parse(head + b"abuse-0-1 xx").messages() == []
    assert parse(head[:20]).status == 0
    assert parse(b"").status == 0


def test_what_is_lost_or_comes_twice_is_named() -> None:
    ledger = Ledger()
    one, two, three = ledger.names(3)
    ledger.confirmed.update([one, two])
    ledger.seen.update([one, one, two, three])
    # What was only looked at has not arrived.
    ledger.seen.subtract([two])
    assert ledger.problems() == [
        f"1 confirmed messages lost: {two}",
        f"1 messages twice: {one}",
    ]
