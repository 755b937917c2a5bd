# mypy: disable-error-code=no-untyped-call
"""Messages are written as pika writes them: real pika, connected to a small broker, beside it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gevent
import pytest
from door.amqp import JoinedConnection, Link
from door.settings import BrokerSettings
from door.wire import Wire
from hypothesis import given, settings
from hypothesis import strategies as st
from pika.channel import Channel
from pika.exceptions import ShortStringTooLong
from pika.spec import BasicProperties
from small_broker import SmallBroker

FRAME_MAX = 4096  # the least that AMQP allows


@pytest.fixture(scope="module")
def channel() -> Iterator[Channel]:
    broker = SmallBroker(frame_max=FRAME_MAX)
    broker.begin()
    link = Link(BrokerSettings(host="127.0.0.1", port=broker.port), "writer")
    link.start()
    with gevent.Timeout(3):
        while link.channel is None:
            gevent.sleep(0.005)
    yield link.channel
    link.stop()
    broker.end()


def sent(do: Callable[[], object]) -> bytes | type[Exception]:
    """Return all that do gives pika's connection to send, or what it raises."""
    pieces: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JoinedConnection, "_adapter_emit_data", lambda _, data: pieces.append(data))
        try:
            do()
        except Exception as error:
            return type(error)
    return b"".join(pieces)


def written(channel: Channel, exchange: str, messages: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield what is sent of each message, or raised: by pika, and by ours."""
    connection = channel.connection
    wire = Wire(channel.channel_number, exchange, connection.params.frame_max)
    for message in messages:
        key, body, name, kind, headers, encoding, user = message
        properties = BasicProperties(
            content_type=kind,
            content_encoding=encoding,
            headers=headers,
            delivery_mode=2,
            message_id=name,
            user_id=user,
        )
        publish = partial(channel.basic_publish, exchange, key, body, properties, mandatory=True)
        yield sent(publish), sent(lambda m=message: connection.publish(channel, wire.frames(*m)))


# A short string has 255 bytes at most, a body frame 8 less than the frame's most.
TEXT = st.text(max_size=5) | st.integers(253, 255).map(lambda size: "x" * size)
SIZES = [piece * (FRAME_MAX - 8) + more for piece in (1, 3) for more in range(-2, 3)]
BODY = st.binary(max_size=20) | st.sampled_from(SIZES).map(lambda size: b"x" * size)
HEADERS = st.dictionaries(TEXT, TEXT | st.just("x" * 5000), max_size=3)
MAYBE = st.none() | TEXT
MESSAGE = st.tuples(TEXT, BODY, TEXT, MAYBE, HEADERS, MAYBE, MAYBE)


@settings(max_examples=100)
@given(TEXT, st.lists(MESSAGE, min_size=1, max_size=3), st.data())
def test_a_message_is_written_as_pika_writes_it(
    channel: Channel, exchange: str, messages: list[Any], data: st.DataObject
) -> None:
    # Some have something in common with the one before.
    for index in range(1, len(messages)):
        shared = data.draw(st.lists(st.booleans(), min_size=7, max_size=7))
        pairs = zip(messages[index - 1], messages[index], shared, strict=True)
        messages[index] = [old if same else new for old, new, same in pairs]
    for by_pika, ours in written(channel, exchange, messages):
        assert isinstance(by_pika, bytes)
        assert ours == by_pika


@pytest.mark.parametrize("bad", ["x" * 256, "é" * 128, "\ud800"])
@pytest.mark.parametrize("place", ["exchange", 0, 2, 3, "header", 5, 6])
def test_what_pika_refuses_is_refused(channel: Channel, place: str | int, bad: str) -> None:
    good: list[Any] = ["key", b"body", "id", "text/plain", {}, "gzip", "user"]
    message = [bad if index == place else part for index, part in enumerate(good)]
    if place == "header":
        message[4] = {bad: "value"}
    exchange = bad if place == "exchange" else "exchange"
    ((by_pika, ours),) = written(channel, exchange, [message])
    assert ours is by_pika
    assert issubclass(ours, ShortStringTooLong | UnicodeEncodeError)


def test_a_header_that_utf_8_cannot_carry_is_refused(channel: Channel) -> None:
    message = ["key", b"body", "id", None, {"name": "\ud800"}, None, None]
    assert list(written(channel, "exchange", [message])) == [(UnicodeEncodeError,) * 2]
