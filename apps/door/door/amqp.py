# mypy: disable-error-code=no-untyped-call
"""pika: what is replaced in it, and Link, the connection to a broker, which is renewed.

Besides read and wire, which read and write messages, no other module imports pika: they take from
here what they need of it, so that a move to another version changes these three alone. Their tests,
tests/test_amqp.py and those of the two, fail when a version no longer does what is replaced here.
"""

import logging
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import uniform
from struct import calcsize, pack, unpack_from
from typing import Any

import gevent
import pika.data
from gevent.event import AsyncResult, Event
from pika import ConnectionParameters, PlainCredentials, SSLOptions
from pika.adapters.gevent_connection import GeventConnection
from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.frame import Method
from pika.spec import PERSISTENT_DELIVERY_MODE, Basic, BasicProperties

from door.metrics import BROKER_UP, broker_own
from door.read import read_delivery
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
# Where there are several brokers. Seconds between two looks whether the one in use is silent.
LOOK = 1.0
# Seconds, at random between two numbers so that doors do not come all at once: between two looks
# whether the own host's broker is back; and for which it must have answered then. Those are
# doubled, up to MOST_PATIENCE times, for one that served nobody the last time.
PROBE, TRIAL, MOST_PATIENCE = (2.0, 6.0), (4.0, 8.0), 32
# Seconds that new requests may have to wait while those under way end, before a move to it.
DRAIN = 1.0
# Seconds a connection stays open after the last acknowledgement. A quorum queue takes them behind
# the channel's back: closing at once left 267 of 300 acknowledged messages in the queue, a second
# left none. AMQP has no answer to an acknowledgement that could be waited for.
SETTLE = 1.0

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
    there is no public way to see what is unwritten, and none to end without a handshake; and
    _raise_if_not_open and _output_marshaled_frames, as there is none to send what door.wire wrote.
    _on_data_available is replaced, so that door.read reads deliveries.
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

    def publish(self, channel: Channel, frames: bytes) -> None:
        """Send the frames of messages by channel; ChannelWrongStateError when it is closed."""
        channel._raise_if_not_open()
        self._output_marshaled_frames([frames])

    @property
    def unwritten(self) -> int:
        """Bytes that were sent and that the system did not take yet."""
        return 0 if self._transport is None else int(self._transport.get_write_buffer_size())

    def cut(self, reason: Exception) -> None:
        """End at once for reason, as pika does without heartbeats; nothing when cut already."""
        if self._transport is not None:
            self._terminate_stream(reason)

    def _on_data_available(self, data_in: bytes) -> None:
        self._frame_buffer += data_in
        while self._read_deliveries():
            size, frame = self._read_frame()
            if not frame:
                return
            self._trim_frame_buffer(size)
            self._process_frame(frame)

    def _read_deliveries(self) -> bool:
        """Bring channels the deliveries that were received first; whether something is behind."""
        data, end = self._frame_buffer, 0
        try:
            while (content := read_delivery(data, end)) and content.number in self._channels:
                end = content.end
                self.frames_received += 3
                channel: Any = self._channels[content.number]
                channel._on_deliver(content, content, content.body)
        finally:
            self._trim_frame_buffer(end)
        return end < len(data)

    def _adapter_emit_data(self, data: bytes) -> None:
        if self._parts is None:
            super()._adapter_emit_data(data)
        else:
            self._parts.append(data)


def parameters(broker: BrokerSettings, name: str, place: int = 0) -> ConnectionParameters:
    """Return pika's parameters for one attempt to connect, shown to operators as name.

    place is the broker's in the list: beyond the first it is another host's, which must prove its
    name. The file of the CAs is read each time, as they may be renewed.
    """
    host, port = broker.addresses[place]
    tls = SSLOptions(ssl.create_default_context(cafile=broker.ca_file), host) if place else None
    return ConnectionParameters(
        host=host,
        port=port,
        ssl_options=tls,
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

    Where there are several brokers, the next of the list is tried at once when one cannot be used.
    While that is another host's, the own host's is connected to as well. When that has lasted, and
    pause() and idle say that nothing is lost by it, move() takes that connection for the old one.
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
        # Requests that have a channel of their own.
        self.borrowed = 0
        # The broker that is used or tried, by its place in the list, and the connection to it.
        self._place = 0
        self._connection: JoinedConnection | None = None
        self._ended = AsyncResult()
        # When its channel could be used, by time.monotonic(); 0 when it never could.
        self._since = 0.0
        # How many brokers failed one after the other.
        self._failures = 0
        self._returner: gevent.Greenlet | None = None
        self._patience = 1
        # Place → why there was no connection, as it was last logged.
        self._logged: dict[int, str] = {}
        # The first connection's event loop: each new one would leave a pipe open.
        self._ioloop: Any = None
        BROKER_UP.set(0)

    @property
    def up(self) -> bool:
        """Whether the channel can be used now."""
        return self.channel is not None

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with the connection."""
        return self.channel is not None and not self.borrowed

    def start(self) -> None:
        """Connect in the background, and again for as long as it takes whenever that is lost."""
        self._keeper = gevent.spawn(self._keep_connected)
        if self._broker_settings.others:
            self._returner = gevent.spawn(self._keep_returning)

    def pause(self) -> bool:
        """Begin nothing new until resume(), so that this gets idle soon; False when it cannot."""
        return True

    def resume(self) -> None:
        """Begin what had to wait, and go on."""

    def move(self, channel: Channel) -> None:
        """Use channel, of another connection, from now on; called when idle."""
        self.lost("moved")
        self.opened(channel)

    def finish(self) -> None:
        """Let no request wait for what is still to come, as the end is near."""

    def stop(self) -> None:
        """Close the connection for good."""
        self._stopping = True
        if self._returner is not None:
            self._returner.kill()
        if self.channel is not None:
            self.channel.connection.close()
        if self._keeper is not None:
            self._keeper.join(timeout=1)

    def opened(self, channel: Channel) -> None:
        """Use channel, which was just opened."""
        self.ready(channel)

    def ready(self, channel: Channel) -> None:
        """Let callers use channel."""
        self.channel, self._since = channel, time.monotonic()
        self._logged.clear()
        BROKER_UP.set(1)
        if self._broker_settings.others:
            broker_own().set(self._place == 0)
        log.info("Connected to the broker at %s:%d", *self._broker_settings.addresses[self._place])

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
            if repr(reason) != self._logged.get(self._place) and not self._stopping:
                self._logged[self._place] = repr(reason)
                log.warning("No connection to the broker%s: %r", self._which, reason)
            self._take_next()

    @property
    def _which(self) -> str:
        """Which broker it is, where there are several."""
        host, port = self._broker_settings.addresses[self._place]
        return f" at {host}:{port}" if self._broker_settings.others else ""

    def _take_next(self) -> None:
        """Turn to the next broker of the list; pause when all have failed one after the other."""
        count = len(self._broker_settings.addresses)
        if self._since:
            if time.monotonic() - self._since > LAST_RETRY:
                self._failures = 0
            if self._place == 0:
                served = self.heard > self._since
                self._patience = 1 if served else min(2 * self._patience, MOST_PATIENCE)
        self._since = 0.0
        self._place = (self._place + 1) % count
        self._failures += 1
        if self._failures % count == 0:
            gevent.sleep(self._retry)
            self._retry = min(2 * self._retry, LAST_RETRY)

    def _hold_connection(self) -> Exception:
        """Connect, wait until the connection has ended, and return why it did."""
        self._ended = AsyncResult()
        self._connection = self._connect(self._place, self._connected, self._over)
        received, since = 0, time.monotonic()
        while True:
            with suppress(gevent.Timeout):
                reason: Exception = self._ended.get(
                    timeout=LOOK if self._broker_settings.others else None
                )
                return reason
            # move() may have changed it.
            connection = self._connection
            if received != connection.bytes_received:
                received, since = connection.bytes_received, time.monotonic()
            elif time.monotonic() - since > 2 * self._broker_settings.heartbeat:
                # pika itself waits for up to twice a heartbeat and 5 seconds.
                silence = TimeoutError("silent for two heartbeats")
                self.lost(silence)
                connection.cut(silence)

    def _connect(
        self,
        place: int,
        opened: Callable[[Any], Any],
        ended: Callable[[Any, Any], None],
    ) -> JoinedConnection:
        """Begin to connect to the broker at place; ended is called also when that fails."""
        connection = JoinedConnection(
            parameters(self._broker_settings, self._name, place),
            on_open_callback=opened,
            on_open_error_callback=ended,
            on_close_callback=ended,
            custom_ioloop=self._ioloop,
        )
        self._ioloop = connection.ioloop
        return connection

    def _over(self, connection: JoinedConnection, reason: Exception) -> None:
        if connection is self._connection:
            self._ended.set(reason)

    def _connected(self, connection: JoinedConnection) -> None:
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._channel_closed)
        self.opened(channel)

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        # A queue or a right is missing and may come back: connect again. If the connection itself
        # has ended, _hold_connection knows.
        if isinstance(reason, ChannelClosedByBroker):
            if self.channel in (None, channel):  # not after a move
                self.lost(reason)
            channel.connection.cut(reason)

    # The way back to the own host's broker.

    def _keep_returning(self) -> None:
        while True:
            gevent.sleep(between(*PROBE))
            if self._place and self.channel is not None:
                with suppress(AMQPError):  # it has just gone again
                    self._return()

    def _return(self) -> None:
        """Connect to the own host's broker, too, and move there once that lasted."""
        opened, ended = AsyncResult(), Event()

        def over(connection: JoinedConnection, reason: Exception) -> None:
            ended.set()
            self._over(connection, reason)

        home = self._connect(0, lambda one: one.channel(on_open_callback=opened.set), over)
        pause = self._patience * between(*TRIAL)
        try:
            while not ended.wait(pause) and opened.ready() and self._place:
                if self._drained(opened.get()):
                    self._move(home, opened.get())
                    return
                self.resume()
                pause = between(*PROBE)
        finally:
            self.resume()
            if home is not self._connection:
                close(home)

    def _drained(self, channel: Channel) -> bool:
        """Hold back what is new until the rest has ended; False when that, or channel, lasts."""
        answered = Event()
        channel.basic_qos(prefetch_count=1, callback=lambda _: answered.set())
        if answered.wait(DRAIN) and self.pause():
            with gevent.Timeout(DRAIN, False):
                while not self.idle:
                    gevent.sleep(0.005)
                return channel.is_open
        return False

    def _move(self, home: JoinedConnection, channel: Channel) -> None:
        old, self._connection, self._place = self._connection, home, 0
        channel.add_on_close_callback(self._channel_closed)
        self.move(channel)
        gevent.spawn_later(SETTLE, close, old)


def between(least: float, most: float) -> float:
    """Return a number at random."""
    return uniform(least, most)  # noqa: S311 - it is no secret


def close(connection: JoinedConnection) -> None:
    """Say good-bye, unless the connection has ended."""
    with suppress(AMQPError):
        connection.close()
