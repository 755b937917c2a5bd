# mypy: disable-error-code=no-untyped-call
"""One connection to the broker, renewed for as long as it takes; each process of a door has one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from struct import calcsize, pack, unpack_from
from typing import Any

import gevent
import pika.data
from gevent.event import AsyncResult
from pika.adapters.gevent_connection import GeventConnection
from pika.channel import Channel
from pika.connection import Connection
from pika.exceptions import ChannelClosedByBroker

from door.metrics import BROKER_UP
from door.settings import BrokerSettings

log = logging.getLogger(__name__)

FLOATS = {b"f": ">f", b"d": ">d"}

_decode_value = pika.data.decode_value


def decode_value(encoded: bytes, offset: int) -> tuple[Any, int]:
    """Read one value of a header as pika does, which fails on numbers and times without an int.

    pika 1.4.4 makes ints of floats and takes a time beyond the year 9999 for an error, which ends
    the connection: any program may have sent a message with one.
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


pika.data.decode_value = decode_value

_encode_value = pika.data.encode_value


def encode_value(pieces: list[bytes], value: Any) -> int:
    """Write one value of a header as pika does, which fails on what decode_value reads besides."""
    if isinstance(value, float):
        pieces.append(pack(">cd", b"d", value))
    elif isinstance(value, int) and value >= 2**63:  # a time beyond the year 9999
        pieces.append(pack(">cQ", b"T", value))
    else:
        return _encode_value(pieces, value)
    return 9


pika.data.encode_value = encode_value

# Seconds between two attempts to connect: doubled from the first to the last.
FIRST_RETRY, LAST_RETRY = 0.2, 2.0


class JoinedConnection(GeventConnection):
    """pika's connection, which can send many methods by one call of the system.

    pika 1.4.4 gives each frame to the system alone: a message is three TCP segments, and reading
    them costs the broker more than the message. This overrides `_adapter_emit_data`, by which
    every adapter of pika sends what Connection has marshaled, and nothing else of it.
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

    def _adapter_emit_data(self, data: bytes) -> None:
        if self._parts is None:
            super()._adapter_emit_data(data)
        else:
            self._parts.append(data)


class Link:
    """A connection with one channel, for callers that are greenlets of one thread.

    pika's callbacks run in gevent's hub and never block. A subclass sets the channel up in
    opened(), calls ready() with it, and forgets in lost() what the connection brought.
    """

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        """Prepare a connection that operators see as name; nothing connects before start()."""
        self.channel: Channel | None = None
        self._broker = settings
        self._name = name
        self._retry = FIRST_RETRY
        self._keeper: gevent.Greenlet | None = None
        self._stopping = False
        self._logged = ""
        # The first connection's, kept because every new one would leave a pipe open.
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
        log.info("Connected to the broker at %s:%d", self._broker.host, self._broker.port)

    def alive(self) -> None:
        """Take note that the broker does what it was asked: the next loss is a new one."""
        self._retry = FIRST_RETRY

    def lost(self, reason: object) -> None:  # noqa: ARG002 - for those who override it
        """Use the channel no more; called once or more for each connection."""
        self.channel = None
        BROKER_UP.set(0)

    def drop(self, reason: Exception) -> None:
        """Cut the connection, without the closing handshake that a silent broker never ends."""
        if self.channel is not None:
            connection = self.channel.connection
            self.lost(reason)
            _cut(connection, reason)

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
            self._broker.parameters(self._name),
            on_open_callback=self._connected,
            on_open_error_callback=lambda _connection, reason: ended.set(reason),
            on_close_callback=lambda _connection, reason: ended.set(reason),
            custom_ioloop=self._ioloop,
        )
        self._ioloop = connection.ioloop
        reason: Exception = ended.get()
        return reason

    def _connected(self, connection: Connection) -> None:
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._channel_closed)
        self.opened(channel)

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        # What it needs is missing or forbidden, and may come back. The connection's own end is
        # reported elsewhere.
        if isinstance(reason, ChannelClosedByBroker):
            self.lost(reason)
            _cut(channel.connection, reason)


def _cut(connection: Connection, reason: Exception) -> None:
    """Cut connection unless it is cut already, as it is while pika still has to tell of it."""
    if connection._transport is not None:
        # pika's heartbeat checker does the same; there is no public way.
        connection._terminate_stream(reason)
