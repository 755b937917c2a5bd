# mypy: disable-error-code=no-untyped-call
"""Deliveries that are read at once are read as pika reads them."""

from datetime import datetime
from typing import Any
from unittest.mock import Mock

import pytest
from door.amqp import JoinedConnection
from door.read import Content, read_delivery
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import frame
from pika.adapters.gevent_connection import GeventConnection
from pika.adapters.utils.nbio_interface import AbstractIOServices
from pika.spec import Basic, BasicProperties, Channel, Connection

CONSUMER = "ctag"
LOOP = Mock(AbstractIOServices)
text, octet = st.text(max_size=60), st.integers(0, 255)
odd_text = text | st.binary(max_size=20)
simple = (
    odd_text
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.none()
    | st.decimals(-1000, 1000, places=2)
    | st.datetimes(datetime(1970, 1, 1)).map(lambda time: time.replace(microsecond=0))
)
nested = st.recursive(
    simple,
    lambda one: st.lists(one, max_size=2) | st.dictionaries(text, one, max_size=2),
    max_leaves=4,
)


def make_deliveries(text: Any) -> Any:
    number = st.integers(0, 2**64 - 1)
    return st.builds(Basic.Deliver, st.just(CONSUMER), number, st.booleans(), text, text)


def make_properties(text: Any) -> Any:
    headers = st.dictionaries(text, text | nested, max_size=3)
    kinds = [text, text, headers, octet, octet, *[text] * 4, st.integers(0, 2**64 - 1), *[text] * 4]
    return st.builds(BasicProperties, *(st.none() | kind for kind in kinds))


deliveries, odd_deliveries = make_deliveries(text), make_deliveries(odd_text)
properties, odd_properties = make_properties(text), make_properties(odd_text)
bodies = st.binary(min_size=1, max_size=50)


def content(method: Any, told: BasicProperties, body: bytes, size: int = 100) -> bytes:
    """Return a message's frames, each with no more than size bytes of its body."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    frames: list[Any] = [frame.Method(1, method), frame.Header(1, len(body), told)]
    return b"".join(one.marshal() for one in [*frames, *(frame.Body(1, part) for part in parts)])


def decoded(data: bytes) -> list[Any]:
    found = []
    while data:
        size, one = frame.decode_frame(data)
        found.append(one)
        data = data[size:]
    return found


def agrees(found: Content | None, data: bytes) -> bool:
    """Whether found, if anything, is what pika finds in data, which may be damaged."""
    if found is None:
        return True
    first, second, third = decoded(data[: found.end])
    numbers = {one.channel_number for one in (first, second, third)}
    # Not by ==, to which True is 1 and NaN never NaN.
    told = repr(first.method), repr(vars(second.properties)), second.body_size, third.fragment
    mine = repr(found.method), repr(vars(found.properties)), len(found.body), found.body
    return numbers == {found.number} and told == mine


@settings(max_examples=200, deadline=None, derandomize=True)
@given(deliveries, properties, bodies, st.binary(max_size=9), st.binary(max_size=9))
def test_a_delivery_is_read_as_pika_reads_it(
    method: Basic.Deliver, told: BasicProperties, body: bytes, before: bytes, behind: bytes
) -> None:
    data = content(method, told, body)
    found = read_delivery(before + data + behind, len(before))
    assert found is not None
    found.end -= len(before)
    assert found.end == len(data)
    assert agrees(found, data)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(odd_deliveries, odd_properties, st.just(b"") | bodies)
def test_a_delivery_that_is_odd_is_read_as_pika_reads_it_or_left_to_pika(
    method: Basic.Deliver, told: BasicProperties, body: bytes
) -> None:
    data = content(method, told, body)
    assert agrees(read_delivery(data, 0), data)


def test_a_delivery_that_is_damaged_is_read_as_pika_reads_it_or_left_to_pika() -> None:
    told = BasicProperties("text/plain", "gzip", {"a": "b"}, 2, message_id="m", cluster_id="c")
    data = content(Basic.Deliver(CONSUMER, 7, True, "e", "k"), told, b"pizza")
    for place in range(len(data)):
        assert read_delivery(data[:place], 0) is None
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            # With more behind it, as a size may be too large now.
            stream = bytes(damaged) + data * 3
            assert agrees(read_delivery(stream, 0), stream)
    empty = content(Basic.Deliver(CONSUMER, 7, True, "e", "k"), told, b"")
    assert read_delivery(empty + frame.Body(1, b"").marshal(), 0) is None


class Receiver:
    """A connection of a kind that consumes, and what that saw."""

    def __init__(self, kind: type[GeventConnection]) -> None:
        class Stream(kind):  # type: ignore[misc,valid-type]
            def _adapter_connect_stream(self) -> None:
                pass

        self.seen: list[str] = []
        self.connection: Any = Stream(custom_ioloop=LOOP)
        self.connection._proto_connection_made(Mock())
        self._answer(0, Connection.Start(server_properties={}))
        self._answer(0, Connection.Tune(2047, 131072, 0))
        self._answer(0, Connection.OpenOk())
        channel = self.connection.channel(channel_number=1)
        self._answer(1, Channel.OpenOk())
        channel.basic_consume("q", self._see, consumer_tag=CONSUMER)
        self._answer(1, Basic.ConsumeOk(CONSUMER))
        channel.basic_get("q", self._see)

    def hear(self, pieces: list[bytes]) -> list[Any]:
        """Return what was seen in the end, and what the connection knows of it."""
        for piece in pieces:
            try:
                self.connection._proto_data_received(piece)
            except Exception as error:
                return [*self.seen, repr(error)]
        of = self.connection
        return [*self.seen, of.bytes_received, of.frames_received, of._frame_buffer]

    def _answer(self, number: int, method: Any) -> None:
        self.connection._proto_data_received(frame.Method(number, method).marshal())

    def _see(self, _channel: Any, method: Any, told: BasicProperties, body: bytes) -> None:
        self.seen.append(f"{method} {vars(told)} {body!r}")


got = st.builds(Basic.GetOk, octet, st.booleans(), text, text, octet)
unknown = st.builds(Basic.Deliver, st.just("other"), octet, st.booleans(), text, text)
sizes = st.sampled_from([10, 100])
messages = st.builds(content, deliveries, properties, bodies, sizes)
others = st.builds(content, deliveries | got | unknown, odd_properties, st.binary(), sizes)
heartbeats = st.builds(lambda: frame.Heartbeat().marshal())
streams = st.lists(messages | others | heartbeats, max_size=8).map(b"".join)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[one:two] for one, two in zip([0, *ends], [*ends, len(data)], strict=True)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(streams, st.lists(st.integers(0, 10_000), max_size=5))
def test_a_consumer_sees_of_any_stream_in_any_pieces_what_pika_s_sees(
    data: bytes, places: list[int]
) -> None:
    ours, pikas = Receiver(JoinedConnection), Receiver(GeventConnection)
    assert ours.hear(cut(data, places)) == pikas.hear(cut(data, places))


def test_deliveries_come_by_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another pika reads in another way: see what read.py has to do now."""
    decode = Mock(wraps=frame.decode_frame)
    ours = Receiver(JoinedConnection)
    monkeypatch.setattr(frame, "decode_frame", decode)
    method = Basic.Deliver(CONSUMER, 7, False, "e", "k")
    ours.hear([content(method, BasicProperties(message_id="m"), b"pizza") * 2])
    assert len(ours.seen) == 2
    decode.assert_not_called()
