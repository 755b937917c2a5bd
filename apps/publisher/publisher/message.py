"""What is published, and where it goes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Message(NamedTuple):
    """What is published: body, id, content type and encoding (None: not told), and headers."""

    body: bytes
    id: str
    content_type: str | None = "text/plain"
    headers: Mapping[str, str] = MappingProxyType({})
    content_encoding: str | None = None


class Target(NamedTuple):
    """Where the messages of a request go: an exchange, and their routing key there.

    Whoever sends to a topic does not know whether anybody subscribed: it may drop what matches no
    subscription. A queue may not.
    """

    exchange: str
    key: str
    topic: bool = False
