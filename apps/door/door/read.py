# mypy: disable-error-code=no-untyped-call
"""A delivery's frames, read at once: pika calls a function for each field, at six times the cost.

Only a whole delivery with one body frame is read here, and without what is wrong or rare; pika
reads the rest. tests/test_read.py compares the two.
"""

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any

import pika.data
from pika.spec import FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_METHOD, Basic, BasicProperties

# A method frame up to the number of its class and method; a content header frame up to its flags;
# and a body frame up to its payload. Each begins with its type, channel, and size (AMQP 0-9-1,
# section 4.2.3), and ends with FRAME_END.
METHOD, HEADER, BODY = Struct(">BHLL"), Struct(">BHLHHQH"), Struct(">BHL")
LONG, LONG_LONG = Struct(">L"), Struct(">Q")
# What a frame has besides its payload.
AROUND = 8
# Each property's bit, from the highest down, and how it is written.
SHORT, TABLE, OCTET, TIME = range(4)
PROPERTIES = {
    "content_type": SHORT,
    "content_encoding": SHORT,
    "headers": TABLE,
    "delivery_mode": OCTET,
    "priority": OCTET,
    "correlation_id": SHORT,
    "reply_to": SHORT,
    "expiration": SHORT,
    "message_id": SHORT,
    "timestamp": TIME,
    "type": SHORT,
    "user_id": SHORT,
    "app_id": SHORT,
    "cluster_id": SHORT,
}
# The bits without a property; the last one tells that more flags follow.
NO_PROPERTY = 0b11
TEXT = ord("S")


@dataclass(slots=True)
class Content:
    """What pika's channel takes for both of the frames before a body."""

    number: int
    method: Basic.Deliver
    properties: BasicProperties
    body: bytes
    # Where its frames end.
    end: int


def read_delivery(data: bytes, at: int) -> Content | None:
    """Return the delivery whose frames begin in data at this place; None where pika has to read."""
    try:
        kind, number, size, index = METHOD.unpack_from(data, at)
        if index != Basic.Deliver.INDEX or kind != FRAME_METHOD:
            return None
        header = at + AROUND + size
        *begin, size, kind, _, length, flags = HEADER.unpack_from(data, header)
        body = header + AROUND + size
        *middle, size = BODY.unpack_from(data, body)
        end = body + AROUND + size
        if (
            begin != [FRAME_HEADER, number]
            or kind != BasicProperties.INDEX
            or middle != [FRAME_BODY, number]
            or not 0 < size == length
            or not data[header - 1] == data[body - 1] == data[end - 1] == FRAME_END
            or flags & NO_PROPERTY
        ):
            return None
        method = _read_method(data, at + METHOD.size, header - 1)
        properties = _read_properties(data, header + HEADER.size, body - 1, flags)
    except Exception:  # not all of it is here, a text is not UTF-8, or pika knows what is wrong
        return None
    if method is None or properties is None:
        return None
    return Content(number, method, properties, data[body + BODY.size : end - 1], end)


def _read_method(data: bytes, at: int, end: int) -> Basic.Deliver | None:
    middle = at + 1 + data[at]
    consumer = data[at + 1 : middle].decode()
    (tag,) = LONG_LONG.unpack_from(data, middle)
    at = middle + 9
    middle = at + 1 + data[at]
    exchange = data[at + 1 : middle].decode()
    if middle + 1 + data[middle] != end:
        return None
    key = data[middle + 1 : end].decode()
    return Basic.Deliver(consumer, tag, data[at - 1] & 1 == 1, exchange, key)


@lru_cache
def _flagged(flags: int) -> list[tuple[str, int]]:
    """Return the names and kinds of the properties that flags tell of."""
    return [one for bit, one in enumerate(PROPERTIES.items()) if flags & 1 << 15 - bit]


def _read_properties(data: bytes, at: int, end: int, flags: int) -> BasicProperties | None:
    found: dict[str, Any] = dict.fromkeys(PROPERTIES)
    for name, kind in _flagged(flags):
        if kind == SHORT:
            start = at + 1
            at = start + data[at]
            found[name] = data[start:at].decode()
        elif kind == TABLE:
            found[name], at = _read_table(data, at)
        elif kind == OCTET:
            found[name] = data[at]
            at += 1
        else:
            (found[name],) = LONG_LONG.unpack_from(data, at)
            at += 8
    if at != end:
        return None
    properties = BasicProperties.__new__(BasicProperties)
    properties.__dict__ = found
    return properties


def _read_table(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    table: dict[str, Any] = {}
    (size,) = LONG.unpack_from(data, at)
    at += 4
    end = at + size
    while at < end:
        start = at + 1
        at = start + data[at]
        name = data[start:at].decode()
        if data[at] == TEXT:
            (size,) = LONG.unpack_from(data, at + 1)
            start = at + 5
            at = start + size
            table[name] = data[start:at].decode()
        else:
            table[name], at = pika.data.decode_value(data, at)
    return table, at
