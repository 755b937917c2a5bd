# mypy: disable-error-code=no-untyped-call
"""A message that the broker handed out, and how it is told as JSON."""

import json
import math
import sys
import time
from base64 import b64encode
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any

from common.events import REQUEST_ID, Value, good_id
from door.access import CLIENT_HEADER, DOORS
from door.amqp import BasicProperties, Channel
from door.memory import Grant

# Bytes of a line of JSON besides the message, at most: its members redelivered and receipt, which
# may begin with a door's name of 63.
RECEIPT_ROOM = 144
# Bytes of a body that are made JSON at a time, which takes several times as much memory.
PIECE = 64 * 1024
# Bytes of base64's pieces: a multiple of 3, so that they can be joined.
TRIPLES = 48 * 1024
# Bytes that a message takes besides its body and headers.
OVERHEAD = 2048

# AMQP's properties that a line of JSON has only where the sender set them.
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
    # The line without its end, of a small body, once it is made.
    _made: bytes | None = field(default=None, repr=False)

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

    @property
    def size(self) -> int:
        """Bytes that the message takes at most as a line of JSON."""
        if (short := self._short) is not None:
            return len(short) + RECEIPT_ROOM
        return len(self._begin) + self._body_size + len(self._middle) + RECEIPT_ROOM

    def length(self, receipt: str | None = None) -> int:
        """Return how many bytes line() has."""
        return self.size - RECEIPT_ROOM + len(self._end(receipt))

    def line(self, receipt: str | None = None) -> Iterator[bytes]:
        """Tell the message as a line of JSON, with the receipt by which it is acknowledged.

        The line comes in pieces, so that little more than its body is in memory.
        """
        if (short := self._short) is not None:
            yield short + self._end(receipt)
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

    @property
    def _short(self) -> bytes | None:
        """The line without its end, of a small body; None of a larger one.

        A cached_property would take a lock, and twice the time.
        """
        if self._made is None and len(self.body) <= PIECE:
            try:
                body, encoding = self.body.decode(), "utf-8"
            except UnicodeDecodeError:
                body, encoding = b64encode(self.body).decode(), "base64"
            message_id = to_json(text(self.properties.message_id))
            self._made = dump(
                f'{{"id": {message_id}, "body": {encode_basestring(body)}, {self._known(encoding)}'
            )
        return self._made

    @cached_property
    def _begin(self) -> bytes:
        """What stands before a larger body."""
        return dump(f'{{"id": {to_json(text(self.properties.message_id))}, "body": "')

    @cached_property
    def _middle(self) -> bytes:
        """What stands behind a larger body and is always the same."""
        return dump(f'", {self._known(self._encoding)}')

    def _known(self, encoding: str) -> str:
        """Return what is known of the message besides its id and body, without an end."""
        given = vars(self.properties)
        told = f'"encoding": "{encoding}", "content_type": {to_json(text(given["content_type"]))}'
        for name in OPTIONAL:
            if given[name] is not None and (value := text(given[name])):
                told += f', "{name}": {encode_basestring(value)}'
        for name in ("timestamp", "priority"):
            if isinstance(given[name], int):
                told += f', "{name}": {given[name]}'
        return f'{told}, "headers": {tell(believable(self.properties))}'

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
        yield dump(encode_basestring(decoder.decode(piece, final=start + PIECE >= len(body))))[1:-1]


def believable(properties: BasicProperties) -> dict[Any, Any] | None:
    """Return a message's headers, without a client's name that no door wrote."""
    headers: dict[Any, Any] | None = properties.headers
    if not headers or properties.user_id in DOORS:
        return headers
    # A loop, as most messages have no such header: a comprehension takes twice its time.
    forged = []
    for name in headers:
        if len(name) == 8 and str(name).title() == CLIENT_HEADER:
            forged.append(name)  # noqa: PERF401
    return {name: headers[name] for name in headers if name not in forged} if forged else headers


def tell(headers: dict[Any, Any] | None) -> str:
    """Return a message's headers as JSON, none when they are nested too deeply."""
    try:
        return to_json(headers or {})
    except RecursionError:  # deeper than anybody means
        return "{}"


def to_json(value: Any) -> str:
    """Return a value of AMQP's headers as JSON; what that has no type for becomes text."""
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None:
        return "null"
    if isinstance(value, dict):
        members = [f"{to_json(name)}: {to_json(inner)}" for name, inner in value.items()]
        return f"{{{', '.join(members)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_json, value))}]"
    if isinstance(value, bool | int) or _is_finite(value):
        return json.dumps(value)
    return encode_basestring(value.decode("latin-1") if isinstance(value, bytes) else str(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def dump(told: str) -> bytes:
    """Return JSON on one line: what some programs take for the end of a line is escaped."""
    if told.isascii():
        return told.encode()
    for end, escape in LINE_ENDS.items():
        told = told.replace(end, escape)
    # Python's escape of a lone surrogate is JSON's, too.
    return told.encode(errors="backslashreplace")


def text(value: object) -> str | None:
    """Return value when it is text that is not empty; pika gives bytes for what is not UTF-8."""
    return value if isinstance(value, str) and value else None


def footprint(headers: dict[Any, Any]) -> int:
    """Return the bytes of memory that AMQP's headers take, with all that is in them."""
    total = sys.getsizeof(headers)
    left: list[dict[Any, Any] | list[Any]] = [headers]
    while left:
        outer = left.pop()
        for inner in [*outer, *outer.values()] if isinstance(outer, dict) else outer:
            total += sys.getsizeof(inner)
            if isinstance(inner, dict | list):
                left.append(inner)
    return total
