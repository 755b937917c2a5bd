# mypy: disable-error-code=no-untyped-call
"""A message that the broker handed out, and how it is told as JSON."""

import json
import math
import sys
import time
from base64 import b64encode
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from door.events import REQUEST_ID, Value, good_id
from door.memory import Grant
from pika.channel import Channel
from pika.spec import BasicProperties

# A line of JSON has this many bytes at most besides the message: whether it was handed out before,
# and a receipt.
RECEIPT_ROOM = 80
# Bytes of a body that are told at a time: what they become on the way is several times as much.
PIECE = 64 * 1024
# Bytes of base64's pieces: a multiple of 3, so that they can be joined.
TRIPLES = 48 * 1024
# Bytes that a message takes besides its body and headers.
OVERHEAD = 2048

# What else a message's sender may have set, by AMQP's names.
OPTIONAL = (
    "correlation_id",
    "reply_to",
    "type",
    "app_id",
    "user_id",
    "content_encoding",
    "expiration",
)
# Line ends of Unicode that JSON leaves as they are; many programs would split lines there.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_Decoder = getincrementaldecoder("utf-8")
encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Handle:
    """What is needed to settle a message; its body is not."""

    tag: int
    # A tag means something only on its own channel: on a later one it is another message's.
    channel: Channel
    # When the message came, by time.monotonic().
    came: float


@dataclass(eq=False)
class Delivery:
    """A message that the broker handed out and waits to have settled."""

    tag: int
    body: bytes = field(repr=False)
    properties: BasicProperties = field(repr=False)
    channel: Channel = field(repr=False)
    # Whether the broker, or this process, had handed it out before.
    redelivered: bool = False
    came: float = field(default_factory=lambda: time.monotonic())
    # The memory held for it, if any.
    grant: Grant | None = field(default=None, repr=False)
    # Whether nobody needs its body any more.
    closed: bool = False

    def close(self) -> None:
        """Give its memory back."""
        self.closed = True
        if self.grant is not None:
            self.grant.close()

    @property
    def handle(self) -> Handle:
        """What settles it."""
        return Handle(self.tag, self.channel, self.came)

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes; its headers are kept as JSON, too."""
        headers = self.properties.headers
        return OVERHEAD + len(self.body) + (2 * footprint(headers) if headers else 0)

    @cached_property
    def size(self) -> int:
        """Bytes that the message takes at most as a line of JSON."""
        if self._short is not None:
            return len(self._short) + RECEIPT_ROOM
        return len(self._begin) + self._body_size + len(self._middle) + RECEIPT_ROOM

    def length(self, receipt: str | None = None) -> int:
        """Return how many bytes line() has."""
        return self.size - RECEIPT_ROOM + len(self._end(receipt))

    def line(self, receipt: str | None = None) -> Iterator[bytes]:
        """Tell the message as a line of JSON, with the receipt by which it is acknowledged.

        The line comes in pieces, so that little more than its body is in memory.
        """
        if self._short is not None:
            yield self._short + self._end(receipt)
            return
        yield self._begin
        yield from self._told_body()
        yield self._middle + self._end(receipt)

    @property
    def origin(self) -> dict[str, Value]:
        """What the message tells of itself; any program may have published it, with anything."""
        headers = self.properties.headers or {}
        return {
            "message_id": text(self.properties.message_id),
            "publish_request_id": good_id(headers.get(REQUEST_ID)),
        }

    @cached_property
    def _short(self) -> bytes | None:
        """The line without its end, of a small body; None of a larger one."""
        if len(self.body) > PIECE:
            return None
        try:
            body, encoding = self.body.decode(), "utf-8"
        except UnicodeDecodeError:
            body, encoding = b64encode(self.body).decode(), "base64"
        known: dict[str, Any] = {"id": text(self.properties.message_id), "body": body}
        return tell(self._add_known(known, encoding))[:-1]

    @cached_property
    def _begin(self) -> bytes:
        """What stands before a larger body."""
        return b'{"id": %b, "body": "' % dump(text(self.properties.message_id))

    @cached_property
    def _middle(self) -> bytes:
        """What stands behind a larger body and is always the same."""
        return b'", ' + tell(self._add_known({}, self._encoding))[1:-1]

    def _add_known(self, told: dict[str, Any], encoding: str) -> dict[str, Any]:
        """Return told with what is known of the message besides its id and body."""
        given = vars(self.properties)
        told["encoding"] = encoding
        told["content_type"] = text(given["content_type"])
        for name in OPTIONAL:
            if given[name] is not None and (value := text(given[name])):
                told[name] = value
        for name in ("timestamp", "priority"):
            if isinstance(given[name], int):
                told[name] = given[name]
        told["headers"] = given["headers"] or {}
        return told

    def _end(self, receipt: str | None) -> bytes:
        again = b"true" if self.redelivered else b"false"
        if receipt is None:
            return b', "redelivered": %b}\n' % again
        return b', "redelivered": %b, "receipt": "%b"}\n' % (again, receipt.encode())

    @property
    def _encoding(self) -> str:
        return self._told_as[0]

    @property
    def _body_size(self) -> int:
        return self._told_as[1]

    @cached_property
    def _told_as(self) -> tuple[str, int]:
        """How the body is told, utf-8 or base64, and in how many bytes.

        A larger text is base64 where that is less: binary data may be valid UTF-8.
        """
        in_base64 = 4 * ((len(self.body) + 2) // 3)
        try:
            size = sum(map(len, escaped(self.body)))
        except UnicodeDecodeError:
            return "base64", in_base64
        if size > in_base64:
            return "base64", in_base64
        return "utf-8", size

    def _told_body(self) -> Iterator[bytes]:
        if self._encoding == "utf-8":
            return escaped(self.body)
        return (
            b64encode(self.body[start : start + TRIPLES])
            for start in range(0, len(self.body), TRIPLES)
        )


def escaped(body: bytes) -> Iterator[bytes]:
    """Yield body as the inside of a JSON string; UnicodeDecodeError when it is not UTF-8."""
    decoder = _Decoder()
    for start in range(0, len(body), PIECE):
        piece = body[start : start + PIECE]
        yield dump(decoder.decode(piece, final=start + PIECE >= len(body)))[1:-1]


def tell(known: dict[str, Any]) -> bytes:
    """Return what is known of a message as JSON, without headers that are nested too deeply."""
    try:
        known["headers"] = plain(known["headers"])
        return dump(known)
    except RecursionError:  # deeper than anybody means
        known["headers"] = {}
        return dump(known)


def dump(value: object) -> bytes:
    """Return value as JSON on one line, whatever takes it for one."""
    told = encode(value)
    if not told.isascii():
        for end, escape in LINE_ENDS.items():
            told = told.replace(end, escape)
    # A surrogate's escape is JSON's.
    return told.encode(errors="backslashreplace")


def text(value: object) -> str | None:
    """Return value when it is text that is not empty; pika gives bytes for what is not UTF-8."""
    return value if isinstance(value, str) and value else None


def footprint(headers: object) -> int:
    """Return the bytes of memory that AMQP's headers take, with all that is in them."""
    total, left = 0, [headers]
    while left:
        one = left.pop()
        total += sys.getsizeof(one)
        if isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one
    return total


def plain(headers: Mapping[Any, Any]) -> dict[str, Any]:
    """Return AMQP's headers as JSON has them: what it has no type for becomes text."""

    def value(one: Any) -> Any:
        if one is None or isinstance(one, str | bool | int):
            return one
        if isinstance(one, float) and math.isfinite(one):
            return one
        if isinstance(one, Mapping):
            return plain(one)
        if isinstance(one, list):
            return [value(each) for each in one]
        return one.decode("latin-1") if isinstance(one, bytes) else str(one)

    return {value(name): value(one) for name, one in headers.items()}
