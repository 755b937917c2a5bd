# mypy: disable-error-code=no-untyped-call
"""pika: what is replaced in it, and Link, one connection to the broker that is renewed.

No other module imports pika: the others take from here what they need of it, so that a move to
another version changes this file alone. tests/test_amqp.py fails when a version no longer calls
what is replaced here.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from struct import calcsize, pack, unpack_from
from typing import Any

import gevent
import pika.data
from gevent.event import AsyncResult
from pika import ConnectionParameters, PlainCredentials
from pika.adapters.gevent_connection import GeventConnection
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.frame import Method
from pika.spec import PERSISTENT_DELIVERY_MODE, Basic, BasicProperties

from door.metrics import BROKER_UP
from door.settings import BrokerSettings

__all__ = [
    "PERSISTENT_DELIVERY_MODE",
    "AMQPError",
    "Basic",
    "BasicProperties",
    "Channel",
    "ChannelClosedByBroker",
    "Link",
    "Method",
]

log = logging.getLogger(__name__)

# pika reports each failure in several lines; the Link has one for each.
logging.getLogger("pika").setLevel(logging.CRITICAL)

# Seconds between two attempts to connect: doubled from the first to the last.
FIRST_RETRY, LAST_RETRY = 0.2, 2.0

# struct's formats of the floats in AMQP's headers.
FLOATS = {b"f": ">f", b"d": ">d"}

_decode_value = pika.data.decode_value
_encode_value = pika.data.encode_value


def decode_value(encoded: bytes, offset: int) -> tuple[Any, int]:
    """Read one value of a message's headers; replaces pika.data.decode_value.

    pika 1.4.4 makes ints of floats, and fails on NaN, on infinity, on a time beyond the year 9999
    and on deep nesting. A failure ends the connection, and any program may send such a message.
    """
    kind, start = encoded[offset : offset + 1], offset + 1
    if kind in FLOATS:
        return unpack_from(FLOATS[kind], encoded, start)[0], start + calcsize(FLOATS[kind])
    try:
        return _decode_value(encoded, offset)
    except (ValueError, OverflowError, OSError):
        if kind != b"T":
            raise
        return unpack_from(">Q", encoded, start)[0], start + 8
    except RecursionError:  # nested deeper than anybody means
        if kind not in (b"A", b"F"):
            raise
        return None, start + 4 + unpack_from(">I", encoded, start)[0]


def encode_value(pieces: list[bytes], value: Any) -> int:
    """Write one value of a message's headers; replaces pika.data.encode_value.

    pika 1.4.4 fails on the floats and the late times that decode_value reads; a message from the
    dead queue is published again with them.
    """
    if isinstance(value, float):
        pieces.append(pack(">cd", b"d", value))
    elif isinstance(value, int) and value >= 2**63:  # a time beyond the year 9999
        pieces.append(pack(">cQ", b"T", value))
    else:
        return _encode_value(pieces, value)
    return 9


pika.data.decode_value = decode_value
pika.data.encode_value = encode_value


class JoinedConnection(GeventConnection):
    """pika's connection; nothing else uses private parts of it.

    _adapter_emit_data is replaced: pika 1.4.4 gives each frame to the system alone, so a message
    is three TCP segments, and reading them costs the broker more than the message. Connection
    sends by that method all that it has marshaled. _transport and _terminate_stream are used, as
    there is no public way to see what is unwritten, and none to end without a handshake.
    """

    _parts: list[bytes] | None = None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Send all that the block sends at its end, in one piece; blocks do not nest or wait."""
        parts: list[bytes] = []
        self._parts = parts
        try:
            yield
        finally:
            self._parts = None
            if parts:
                super()._adapter_emit_data(b"".join(parts))

    @property
    def unwritten(self) -> int:
        """Bytes that were sent and that the system did not take yet."""
        return 0 if self._transport is None else int(self._transport.get_write_buffer_size())

    def cut(self, reason: Exception) -> None:
        """End at once for reason, as pika does without heartbeats; nothing when cut already."""
        if self._transport is not None:
            self._terminate_stream(reason)

    def _adapter_emit_data(self, data: bytes) -> None:
        if self._parts is None:
            super()._adapter_emit_data(data)
        else:
            self._parts.append(data)


def parameters(broker: BrokerSettings, name: str) -> ConnectionParameters:
    """Return pika's parameters for one attempt to connect, shown to operators as name."""
    return ConnectionParameters(
        host=broker.host,
        port=broker.port,
        credentials=PlainCredentials(broker.user, broker.password),
        heartbeat=broker.heartbeat,
        connection_attempts=1,
        socket_timeout=3,
        stack_timeout=4,
        client_properties={"connection_name": name},
    )


class Link:
    """A connection with a main channel, for callers that are greenlets of one thread.

    pika's callbacks run in gevent's hub and never block. A subclass sets the channel up in
    opened(), calls ready() with it, and forgets in lost() what the connection brought.
    """

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        """Prepare a connection that operators see as name; nothing connects before start()."""
        self.channel: Channel | None = None
        # When the broker last did what it was asked, by time.monotonic().
        self.heard = 0.0
        self._broker_settings = settings
        self._name = name
        self._retry = FIRST_RETRY
        self._keeper: gevent.Greenlet | None = None
        self._stopping = False
        self._logged = ""
        # The first connection's event loop: each new one would leave a pipe open.
        self._ioloop: Any = None
        BROKER_UP.set(0)

    @property
    def up(self) -> bool:
        """Whether the channel can be used now."""
        return self.channel is not None

    def start(self) -> None:
        """Connect in the background, and again for as long as it takes whenever that is lost."""
        self._keeper = gevent.spawn(self._keep_connected)

    def finish(self) -> None:
        """Let no request wait for what is still to come, as the end is near."""

    def stop(self) -> None:
        """Close the connection for good."""
        self._stopping = True
        if self.channel is not None:
            self.channel.connection.close()
        if self._keeper is not None:
            self._keeper.join(timeout=1)

    def opened(self, channel: Channel) -> None:
        """Use channel, which was just opened."""
        self.ready(channel)

    def ready(self, channel: Channel) -> None:
        """Let callers use channel."""
        self.channel, self._logged = channel, ""
        BROKER_UP.set(1)
        log.info(
            "Connected to the broker at %s:%d",
            self._broker_settings.host,
            self._broker_settings.port,
        )

    def alive(self) -> None:
        """Take note that the broker does what it was asked: the next loss is a new one."""
        self._retry = FIRST_RETRY
        self.heard = time.monotonic()

    def lost(self, reason: object) -> None:  # noqa: ARG002 - for those who override it
        """Use the channel no more; called once or more for each connection."""
        self.channel = None
        BROKER_UP.set(0)

    def drop(self, reason: Exception) -> None:
        """Cut the connection, without the closing handshake that a silent broker never ends."""
        if self.channel is not None:
            connection = self.channel.connection
            self.lost(reason)
            connection.cut(reason)

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Give the connection up when the block cannot use it."""
        try:
            yield
        except AMQPError as error:
            self.drop(error)

    def _keep_connected(self) -> None:
        while not self._stopping:
            try:
                reason = self._hold_connection()
            except Exception as error:  # whatever it was, the answer is the next attempt
                reason = error
            self.lost(reason)
            # One line for each loss and each new reason, not for each attempt.
            if repr(reason) != self._logged and not self._stopping:
                self._logged = repr(reason)
                log.warning("No connection to the broker: %s", self._logged)
            gevent.sleep(self._retry)
            self._retry = min(2 * self._retry, LAST_RETRY)

    def _hold_connection(self) -> Exception:
        """Connect, wait until the connection has ended, and return why it did."""
        ended = AsyncResult()
        connection = JoinedConnection(
            parameters(self._broker_settings, self._name),
            on_open_callback=self._connected,
            on_open_error_callback=lambda _connection, reason: ended.set(reason),
            on_close_callback=lambda _connection, reason: ended.set(reason),
            custom_ioloop=self._ioloop,
        )
        self._ioloop = connection.ioloop
        reason: Exception = ended.get()
        return reason

    def _connected(self, connection: JoinedConnection) -> None:
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._channel_closed)
        self.opened(channel)

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        # A queue or a right is missing and may come back: connect again. If the connection itself
        # has ended, _hold_connection knows.
        if isinstance(reason, ChannelClosedByBroker):
            self.lost(reason)
            channel.connection.cut(reason)
