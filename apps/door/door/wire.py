# mypy: disable-error-code=no-untyped-call
"""The frames of a message, written at once: pika takes several times as long.

They are byte for byte what its basic_publish writes (tests/test_wire.py), by section 4.2 of
https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf.
"""

from collections.abc import Mapping
from struct import Struct

from pika.exceptions import ShortStringTooLong
from pika.frame import Method
from pika.spec import (
    FRAME_BODY,
    FRAME_END,
    FRAME_HEADER,
    PERSISTENT_DELIVERY_MODE,
    Basic,
    BasicProperties,
)

# Type, channel, and size of what follows; of a header frame also class, weight, and body's size.
FRAME, HEADER = Struct(">BHI"), Struct(">BHIHHQ")
END = bytes([FRAME_END])
# Of the properties that each message has.
FLAGS = (
    BasicProperties.FLAG_HEADERS
    | BasicProperties.FLAG_DELIVERY_MODE
    | BasicProperties.FLAG_MESSAGE_ID
)
# A size; and of a header's value the letter of its type, and its size.
SIZE, VALUE = Struct(">I"), Struct(">cI")


class Wire:
    """Writes the frames of persistent, mandatory messages to one exchange by one channel.

    What a message has in common with the one before is written once. In a batch this is all but
    the ids and the bodies.
    """

    def __init__(self, channel: int, exchange: str, frame_max: int) -> None:
        """Write for the channel of that number, in frames of at most frame_max bytes."""
        self._channel = channel
        self._exchange = exchange
        self._most = frame_max - FRAME.size - len(END)
        self._key: str | None = None
        self._method = b""
        self._common: tuple[object, ...] = ()
        # The properties before and behind the id.
        self._before = self._behind = b""

    def frames(
        self,
        key: str,
        body: bytes,
        message_id: str,
        content_type: str | None,
        headers: Mapping[str, str],
        content_encoding: str | None,
        user: str | None,
    ) -> bytes:
        """Return the frames of a message, whose headers are not changed afterwards.

        Raises ShortStringTooLong and UnicodeEncodeError, as pika does.
        """
        if key != self._key:
            method = Basic.Publish(exchange=self._exchange, routing_key=key, mandatory=True)
            self._method = Method(self._channel, method).marshal()
            self._key = key
        common = content_type, headers, content_encoding, user
        if common != self._common:
            self._write(*common)
            self._common = common
        channel, size = self._channel, len(body)
        before, name, behind = self._before, _short(message_id), self._behind
        length = HEADER.size - FRAME.size + len(before) + len(name) + len(behind)
        head = HEADER.pack(FRAME_HEADER, channel, length, Basic.INDEX, 0, size)
        frames = b"%b%b%b%b%b%b" % (self._method, head, before, name, behind, END)
        if 0 < size <= self._most:
            return b"%b%b%b%b" % (frames, FRAME.pack(FRAME_BODY, channel, size), body, END)
        pieces = [frames]
        for start in range(0, size, self._most):
            piece = body[start : start + self._most]
            pieces += FRAME.pack(FRAME_BODY, channel, len(piece)), piece, END
        return b"".join(pieces)

    def _write(
        self,
        content_type: str | None,
        headers: Mapping[str, str],
        content_encoding: str | None,
        user: str | None,
    ) -> None:
        """Write the properties that the message may have in common with those behind it."""
        flags, before = FLAGS, b""
        if content_type is not None:
            flags |= BasicProperties.FLAG_CONTENT_TYPE
            before = _short(content_type)
        if content_encoding is not None:
            flags |= BasicProperties.FLAG_CONTENT_ENCODING
            before += _short(content_encoding)
        if user is not None:
            flags |= BasicProperties.FLAG_USER_ID
        table = b"".join([_short(name) + _value(text) for name, text in headers.items()])
        self._before = b"%b%b%b%b%c" % (
            flags.to_bytes(2),
            before,
            SIZE.pack(len(table)),
            table,
            PERSISTENT_DELIVERY_MODE,
        )
        self._behind = b"" if user is None else _short(user)


def _short(text: str) -> bytes:
    """Return text as a short string, whose length has one byte."""
    encoded = text.encode()
    if len(encoded) > 255:
        raise ShortStringTooLong(encoded)
    return b"%c%b" % (len(encoded), encoded)


def _value(text: str) -> bytes:
    """Return text as the value of a header."""
    encoded = text.encode()
    return VALUE.pack(b"S", len(encoded)) + encoded
