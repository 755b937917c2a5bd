"""Fluentd's forward protocol, as Docker's driver and fluent-logger speak it.

https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1: Message, Forward and
PackedForward mode, with acknowledgements; no handshake, no compression.
"""

import asyncio
import socket
from typing import Any

import msgpack

from collector import log
from collector.config import DAY
from collector.events import Batch, EventTime, Malformed, Router, now, unpack_options
from collector.limits import Limits
from collector.parts import Event
from collector.store import Refused

# Values in one message; each takes up to 72 bytes of memory however few it took on the wire.
MOST_VALUES = 1_000_000
# Seconds from now; an event that claims to be farther away gets the present time.
FARTHEST = 30 * DAY
# Characters of a chunk's name, which the sender gets back.
_LONGEST_CHUNK = 256
# Bytes of a message up to which its values need no counting.
_SMALL = 65536
_OTHERS = {
    **dict.fromkeys(b"{[", "JSON text"),
    **dict.fromkeys(b"GHOPDCT", "HTTP or other text"),
    0x16: "a TLS handshake",
}


class Counter:
    """Counts the values of a large message while they are made, to end it in time."""

    def __init__(self) -> None:
        """Begin at 0."""
        self._count = 0

    def __call__(self, value: Any) -> Any:
        """Count value, a list or a map; Malformed when there are too many."""
        self._count += len(value) + 1
        if self._count > MOST_VALUES:
            raise Malformed(f"a message of more than {MOST_VALUES} values")
        return value


class Forward(asyncio.Protocol):
    """One connection."""

    def __init__(self, router: Router, limits: Limits, longest: int) -> None:
        """Take messages of at most longest bytes for router."""
        self._router = router
        self._limits = limits
        self._longest = longest
        self._options = unpack_options(min(longest, MOST_VALUES))
        self._transport: asyncio.Transport = asyncio.Transport()
        self._peer = ""
        # What has come of the message that is not complete, and what finds its end: made when
        # the first byte comes, as most connections are idle.
        self._data = bytearray()
        self._scanner: msgpack.Unpacker | None = None

    # --- asyncio's calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport
        self._peer = peer_of(transport)
        connection = transport.get_extra_info("socket")
        # A peer whose machine is gone would else stay for ever.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self._limits.enter(self, self._peer):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget what did not come to its end: it was never acknowledged."""
        self._limits.leave(self)
        if self._data:
            log.warn(f"{self._peer} left in the middle of a message")
            self._drop()

    def pause_writing(self) -> None:
        """Take nothing more from a client that does not read its acknowledgements."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Write the events of all messages that are complete, then acknowledge them."""
        if self._transport.is_closing():
            return
        batch = Batch(self._router)
        acks: list[bytes] = []
        reason = ""
        try:
            self._read(data, batch, acks)
        except Malformed as error:
            reason = str(error)
        except Refused:
            # The store has said it.
            self.close()
            return
        try:
            batch.write()
        except Refused:
            self.close()
            return
        if acks:
            self._transport.write(b"".join(acks))
        if reason:
            self.refuse(reason)
        else:
            self._limits.hold(self, len(self._data))

    # --- messages ------------------------------------------------------------------------------

    def _read(self, data: bytes, batch: Batch, acks: list[bytes]) -> None:
        """Add each complete message's events to batch and its acknowledgement to acks.

        A message is unpacked when its end has come: what it only announces takes no memory.
        """
        self._data += data
        if self._scanner is None:
            # Its own limit would be an error in the middle; _check_start bounds what it gets.
            self._scanner = msgpack.Unpacker(max_buffer_size=0)
            data = bytes(self._data)
        self._scanner.feed(data)
        start = 0
        with memoryview(self._data) as view:
            while True:
                try:
                    self._scanner.skip()
                except msgpack.OutOfData:
                    break
                except msgpack.StackError:
                    raise Malformed("a message nested too deep") from None
                except ValueError:
                    raise Malformed(_what(view[start:])) from None
                end = self._scanner.tell()
                self._message(view[start:end], batch, acks)
                start = end
            _check_start(view[start:], self._longest)
        if start:
            del self._data[:start]
            # Its buffer may have grown, and the next message may be long in coming.
            self._scanner = None
            self._limits.hold(self, 0)

    def _message(self, frame: memoryview, batch: Batch, acks: list[bytes]) -> None:
        if len(frame) > self._longest:
            raise Malformed(f"a message of more than {self._longest} bytes")
        message = self._unpack(frame)
        if message is None or (isinstance(message, list) and len(message) == 1):
            return  # a heartbeat
        if not isinstance(message, list):
            raise Malformed(_what(frame))
        if not 2 <= len(message) <= 4:
            raise Malformed(f"a message of {len(message)} parts")
        tag, entries, *rest = message
        if not isinstance(tag, str):
            raise Malformed("a tag that is no text")
        if isinstance(entries, str | bytes | list):
            option = rest[0] if rest else None
            self._check_option(option)
            events = self._entries(entries)
        else:
            option = rest[1] if len(rest) > 1 else None
            self._check_option(option)
            if not rest:
                raise Malformed("a message without a record")
            events = [_event(entries, rest[0])]
        batch.add(tag, events)
        if option and "chunk" in option:
            acks.append(msgpack.packb({"ack": option["chunk"]}, unicode_errors="surrogateescape"))

    def _unpack(self, data: memoryview | bytes) -> Any:
        hooks = {}
        if len(data) > _SMALL:
            counter = Counter()
            hooks = {"object_hook": counter, "list_hook": counter}
        try:
            return msgpack.unpackb(data, **self._options, **hooks)
        except Malformed:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Malformed(f"a message that cannot be unpacked: {error}") from None

    def _entries(self, entries: list[Any] | str | bytes) -> list[Event]:
        """Return the events of a Forward (a list) or PackedForward (packed) message."""
        if isinstance(entries, str):
            entries = entries.encode("utf-8", "surrogateescape")
        if isinstance(entries, bytes):
            entries = self._unpack_all(entries)
        events = []
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 2:
                raise Malformed("an entry that is not [time, record]")
            events.append(_event(entry[0], entry[1]))
        return events

    def _unpack_all(self, data: bytes) -> list[Any]:
        """Return the objects in data, one packed after the other."""
        # Their number comes in front; a scan finds it before anything is made of them.
        scanner = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        scanner.feed(data)
        count = 0
        try:
            while scanner.tell() < len(data):
                scanner.skip()
                count += 1
        except (msgpack.UnpackException, ValueError):
            raise Malformed("packed entries that are cut or no msgpack") from None
        head = b"\xdd" + count.to_bytes(4, "big")
        entries: list[Any] = self._unpack(head + data)
        return entries

    @staticmethod
    def _check_option(option: Any) -> None:
        if option is None:
            return
        if not isinstance(option, dict):
            raise Malformed("an option that is no map")
        if option.get("compressed", "text") != "text":
            raise Malformed("compressed entries")
        chunk = option.get("chunk", "")
        if not isinstance(chunk, str | bytes) or len(chunk) > _LONGEST_CHUNK:
            raise Malformed(f"a chunk that is no text of at most {_LONGEST_CHUNK} characters")

    # --- the end -------------------------------------------------------------------------------

    def refuse(self, reason: str) -> None:
        """Say the reason in one line and close the connection."""
        log.warn(f"closed {self._peer}: not Fluentd's forward protocol as known here: {reason}")
        self.close()

    def close(self) -> None:
        """Close the connection, at once when the client does not read."""
        self._drop()
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def _drop(self) -> None:
        self._data = bytearray()
        self._scanner = None


def peer_of(transport: asyncio.BaseTransport) -> str:
    """Return the address and port of transport's other end."""
    peer = transport.get_extra_info("peername")
    return f"{peer[0]}:{peer[1]}" if peer else "a client that is gone"


def _event(moment: Any, record: Any) -> Event:
    """Return the event; Malformed when moment is no time or record no map."""
    if type(record) is not dict:
        raise Malformed("a record that is no map")
    if type(moment) is EventTime:
        seconds, nanoseconds = moment.seconds, moment.nanoseconds
    elif type(moment) is int and 0 <= moment < 2**32:
        seconds, nanoseconds = moment, 0
    else:
        raise Malformed(f"a time that is neither seconds nor EventTime but {type(moment).__name__}")
    present = now()
    # As Fluentd does with 0. Each day has a file: a sender must not choose from all of time.
    if abs(seconds - present[0]) > FARTHEST:
        seconds, nanoseconds = present
    return seconds, nanoseconds, record


def _what(frame: memoryview) -> str:
    """Return what a message that is none looks like by its first byte."""
    if _head(frame, 0)[0] == "array":
        return "bytes that are no msgpack"
    return _OTHERS.get(frame[0], f"bytes that begin with 0x{frame[0]:02x}")


def _check_start(frame: memoryview, longest: int) -> None:
    """Malformed when an unfinished message is too long already, or announces to become that.

    Only its outer parts are looked at; what is announced further in ends at `longest` bytes.
    """
    if not frame:
        return
    if len(frame) > longest:
        raise Malformed(f"a message of more than {longest} bytes")
    kind, length, at = _head(frame, 0)
    if kind != "array" or length > 4:
        raise Malformed(_what(frame))
    for _ in range(2):
        if at >= len(frame):
            return
        kind, length, at = _head(frame, at)
        # Each element takes at least a byte.
        if length > longest:
            raise Malformed(f"a message that announces {length} bytes or parts")
        if kind != "text":
            return
        at += length


# First bytes: kind and the length's own length in bytes.
_HEADS = {
    0xC4: ("text", 1), 0xC5: ("text", 2), 0xC6: ("text", 4),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip


def _head(frame: memoryview, at: int) -> tuple[str, int, int]:
    """Return kind, length and the end of the msgpack head at `at` (a cut one has length 0)."""
    first = frame[at]
    if 0x90 <= first <= 0x9F:
        return "array", first & 0x0F, at + 1
    if 0xA0 <= first <= 0xBF:
        return "text", first & 0x1F, at + 1
    kind, width = _HEADS.get(first, ("other", 0))
    end = at + 1 + width
    return kind, int.from_bytes(frame[at + 1 : end], "big") if end <= len(frame) else 0, end
