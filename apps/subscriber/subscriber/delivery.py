# mypy: disable-error-code=no-untyped-call
"""A message that the broker handed out, and how it is told as JSON."""

import json
import math
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from door.events import REQUEST_ID, Value, good_id
from pika.channel import Channel
from pika.spec import BasicProperties

# A line of JSON has this many bytes at most besides id, body, type and headers.
RECEIPT_ROOM = 64


@dataclass(frozen=True, order=True)
class Delivery:
    """A message that the broker handed out and waits to have settled."""

    tag: int
    body: bytes = field(compare=False, repr=False)
    properties: BasicProperties = field(compare=False, repr=False)
    # A tag means something only on its own channel: on a later one it is another message's.
    channel: Channel = field(compare=False, repr=False)
    # Whether the broker had handed it out before.
    redelivered: bool = field(compare=False, default=False)
    # When it came, by time.monotonic().
    came: float = field(compare=False, default_factory=lambda: time.monotonic())

    @cached_property
    def json(self) -> str:
        """The message as a JSON object without its closing brace, where a receipt may follow."""
        try:
            body, encoding = self.body.decode(), "utf-8"
        except UnicodeDecodeError:
            body, encoding = b64encode(self.body).decode(), "base64"
        properties = self.properties
        try:
            headers = plain(properties.headers or {})
        except RecursionError:  # nested deeper than anybody means
            headers = {}
        told = {
            "id": text(properties.message_id),
            "body": body,
            "encoding": encoding,
            "content_type": text(properties.content_type),
            "headers": headers,
            "redelivered": self.redelivered,
        }
        return json.dumps(told)[:-1]

    @property
    def size(self) -> int:
        """Bytes that the message takes at most as a line of JSON."""
        return len(self.json) + RECEIPT_ROOM

    def line(self, receipt: str | None = None) -> bytes:
        """Return the message as a line of JSON, with the receipt by which it is acknowledged."""
        end = "}\n" if receipt is None else f', "receipt": {json.dumps(receipt)}}}\n'
        return (self.json + end).encode()

    @property
    def origin(self) -> dict[str, Value]:
        """What the message tells of itself; any program may have published it, with anything."""
        headers = self.properties.headers or {}
        return {
            "message_id": text(self.properties.message_id),
            "publish_request_id": good_id(headers.get(REQUEST_ID)),
        }


def text(value: object) -> str | None:
    """Return value when it is text that is not empty; pika gives bytes for what is not UTF-8."""
    return value if isinstance(value, str) and value else None


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
