"""What lines of JSON become, the ids of messages, and who else has a turn meanwhile."""

import json
import time
import uuid
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise

import gevent
import pytest
from common.events import Event
from door.call import Call
from gevent import socket
from hypothesis import given, settings
from hypothesis import strategies as st
from publisher import payload
from publisher.payload import uuid7
from publisher.settings import Settings
from werkzeug.exceptions import HTTPException


def batch(body: bytes) -> list[tuple[bytes, str]] | str | None:
    """Return bodies and ids of a batch's messages, or why it is refused."""
    environ = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": BytesIO(body)}
    try:
        messages = payload.batch(Call(environ, Event(None, None)), Settings())
    except HTTPException as error:
        return error.description
    assert len({message.id for message in messages}) == len(messages)
    # An id that was not given says its version.
    ids = [one.id if one.id[14:15] != "7" else "" for one in messages]
    return [(one.body, given) for one, given in zip(messages, ids, strict=True)]


# What JSON is made of, and what it is not.
PARTS = [
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b" ", b"\t", b"\r", b"\f", b"\0", b"\\", b"/"),
    *(b'"message"', b'"id"', b'"mess\\u0061ge"', b'"message": "x"', b'"id": "1"', b'"x"', b'""'),
    *(b"\\n", b"\\x", b"\\ud83c", b"\\udf55", b"\\u0000", b"\\uD8", b"null", b"true", b"nul"),
    *(b"NaN", b"Infinity", b"-", b"0", b"01", b"1", b"1e400", b"1E+5", b".5", b"9" * 400),
    *(b"\xef\xbb\xbf", b"\xff", b"\xc3", "é".encode(), "🍕".encode(), b"\xed\xa0\x80", b"\xc0\x80"),
    *(b"[" * 300, b"]" * 300, b'{"message":' * 60, b"}" * 60, b"x" * 500),
]
TEXT = st.text(st.characters(exclude_categories=()), max_size=10)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAME = st.sampled_from(["message", "id"]) | TEXT
# Some names come twice.
OBJECT = st.lists(st.tuples(NAME, TEXT | VALUE), max_size=4).map(
    lambda pairs: "{" + ",".join(f"{json.dumps(a)}:{json.dumps(b)}" for a, b in pairs) + "}"
)
LINE = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=8).map(b"".join),
    OBJECT.map(str.encode),
    (TEXT | VALUE).map(lambda value: json.dumps(value).encode()),
    st.text(max_size=10).map(lambda text: json.dumps(text, ensure_ascii=False).encode()),
)


def by_standard_library(line: bytes) -> object:
    """Return what batch does without orjson."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payload, "SIMPLE", -1)  # no line is so short
        return batch(line)


@settings(max_examples=400)
@given(LINE)
def test_a_line_means_what_the_standard_library_reads_in_it(line: bytes) -> None:
    assert batch(line) == by_standard_library(line)


@pytest.mark.parametrize("nested", [b"[" * 490 + b"]" * 490, b"[" * 1010 + b"]" * 1010])
def test_what_is_nested_too_deeply_is_refused_though_it_is_no_part_of_the_message(
    nested: bytes,
) -> None:
    line = b'{"message": ' + nested + b', "message": "x"}'
    expected = (
        [(b"x", "")] if len(nested) < 1000 else "Line 1 is not JSON in UTF-8. Nothing was sent."
    )
    assert batch(line) == by_standard_library(line) == expected


def test_a_batch_s_messages_have_the_ids_of_their_lines_or_new_ones() -> None:
    lines = [b'{"message": "a", "id": "mine"}', b'"b"', b'{"id": null, "message": "c"}']
    assert batch(b"\n".join(lines)) == [(b"a", "mine"), (b"b", ""), (b"c", "")]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the lines that were read, each of which is a turn."""
    turns: list[bytes] = []
    read = payload._loads
    monkeypatch.setattr(payload, "_loads", lambda line: [turns.append(line), read(line)][1])
    monkeypatch.setattr(payload, "TURN", 0)
    return turns


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Return two sockets that are connected."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_what_arrives_while_batches_are_read_is_looked_at_between_their_turns(
    turns: list[bytes], pair: Pair
) -> None:
    one, other = pair
    requests = [gevent.spawn(batch, b'"x"\n' * 500) for _ in range(3)]
    gevent.spawn(other.send, b"x")
    assert one.recv(1) == b"x"
    assert len(turns) < 10
    gevent.joinall(requests, raise_error=True)


def test_batches_are_read_although_more_arrives_all_the_time(
    turns: list[bytes], pair: Pair
) -> None:
    one, other = pair

    def answer() -> None:
        while other.recv(1):
            other.send(b"x")

    answers = gevent.spawn(answer)
    request = gevent.spawn(batch, b'"x"\n' * 500)
    for _ in range(50):
        one.send(b"x")
        one.recv(1)
    assert len(turns) > 40
    request.kill()
    answers.kill()


def test_an_id_is_a_uuid_of_version_7_that_tells_its_time() -> None:
    before = time.time_ns() // 1_000_000
    text = uuid7()
    after = time.time_ns() // 1_000_000
    value = uuid.UUID(text)
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert str(value) == text
    assert before <= value.int >> 80 <= after


def test_later_ids_sort_behind_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000_123_456_789
    ids = []
    for step in 0, 1, 1000, 10**6, 10**9:  # milliseconds
        monkeypatch.setattr("publisher.payload.time.time_ns", lambda at=step: now + at * 10**6)
        ids.append([uuid7() for _ in range(50)])
    for earlier, later in pairwise(ids):
        assert max(earlier) < min(later)


@given(st.binary(min_size=10, max_size=10))
def test_an_id_is_random_but_for_its_time_version_and_variant(random: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("publisher.payload.os.urandom", lambda count: random[:count])
        value = uuid.UUID(uuid7()).int
    kept = int.from_bytes(random) >> 4
    assert value >> 64 & 0xFFF == kept >> 64
    assert value >> 62 & 0b11 == 0b10
    assert value & 2**62 - 1 == kept & 2**62 - 1


def test_no_two_ids_are_equal() -> None:
    assert len({uuid7() for _ in range(10_000)}) == 10_000
    assert len(set(payload.uuids(10_000))) == 10_000
