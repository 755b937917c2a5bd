"""Events on their way from an input to the matches of their tag, as finished lines."""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import msgpack

from collector import log
from collector.config import DAY, SUBSECONDS, FileMatch, Match, Pattern, StdoutMatch
from collector.parts import PATIENCE, Event, Parts
from collector.parts import Key as LineKey
from collector.store import Key, Refused, Store

# Bytes of lines that one message may become: a long tag is repeated in each of them.
MOST_LINES = 64 << 20
# Bytes of a tag.
LONGEST_TAG = 16384
# Bytes of lines after which a batch is written without waiting for its end.
_BATCH = 1 << 20

# What msgpack makes of a byte that is no UTF-8, and JSON of an escape that is half a pair.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Malformed(ValueError):  # noqa: N818 - said to a peer in one line
    """The input is not what its source takes; the text says what it is."""


class EventTime:
    """Fluentd's EventTime, the msgpack extension type 0."""

    __slots__ = ("nanoseconds", "seconds")

    def __init__(self, data: bytes) -> None:
        """Read 8 bytes: seconds and nanoseconds, big-endian; Malformed when they are not that."""
        self.seconds = int.from_bytes(data[:4], "big")
        self.nanoseconds = int.from_bytes(data[4:], "big")
        if len(data) != 8 or self.nanoseconds > 999_999_999:
            raise Malformed("a time that is no EventTime")


def unpack_options(longest: int) -> dict[str, Any]:
    """Return msgpack's options for a message of at most `longest` bytes."""
    return {
        "raw": False,
        # to_bytes makes something readable of it.
        "unicode_errors": "surrogateescape",
        "strict_map_key": False,
        "ext_hook": lambda code, data: EventTime(data) if not code else msgpack.ExtType(code, data),
        "max_array_len": longest,
        "max_map_len": longest,
    }


def now() -> tuple[int, int]:
    """Return the time as seconds and nanoseconds."""
    return divmod(time.time_ns(), 10**9)


# --- lines ---------------------------------------------------------------------------------------


def _odd_value(value: object) -> object:
    """Return what JSON has for a value that it does not know."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.seconds if isinstance(value, EventTime) else str(value)


# One for all lines: json.dumps with arguments would make one each time.
_encode = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False,
    default=_odd_value,
).encode  # fmt: skip


def _plain(value: object) -> object:
    """Return value with odd keys and numbers as text: NaN, or a key that is binary."""
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else str(_odd_value(key)): _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def encode(record: dict[Any, Any]) -> str:
    """Return record as compact JSON; Malformed when it is nested too deep."""
    try:
        try:
            return _encode(record)
        except (TypeError, ValueError):
            return _encode(_plain(record))
    except RecursionError:
        raise Malformed("a record nested too deep") from None


def to_bytes(line: str) -> bytes:
    """Return line in UTF-8; U+FFFD stands for what was no UTF-8 when it came (surrogates)."""
    try:
        return line.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", line).encode()


def clock(time_format: str) -> Callable[[int, int], str]:
    """Return what formats seconds and nanoseconds as time_format (see config) says, in UTC."""
    found = SUBSECONDS.search(time_format)
    digits = 0 if not found else 3 if found[0] == "%L" else int(found[1] or 9)
    parts = SUBSECONDS.split(time_format)[:: SUBSECONDS.groups + 1]
    # strftime does not know %:z; gmtime makes %z +0000 whatever the machine's zone.
    formats = [part.replace("%:z", "+00:00").replace("%z", "+0000") for part in parts]

    @lru_cache(maxsize=64)
    def second(seconds: int) -> list[str]:
        moment = time.gmtime(seconds)
        return [time.strftime(part, moment) if part else "" for part in formats]

    def form(seconds: int, nanoseconds: int) -> str:
        if not digits:
            return second(seconds)[0]
        before, after = second(seconds)
        return f"{before}{nanoseconds // 10 ** (9 - digits):0{digits}d}{after}"

    return form


# --- outputs -------------------------------------------------------------------------------------


class FileOutput:
    """A match of @type file: `time TAB tag TAB JSON`, as Fluentd's format out_file."""

    def __init__(self, match: FileMatch) -> None:
        """Write to match's files by way of its chunks."""
        self.store = Store(match)
        self._clock = clock(match.time_format)
        self._by_tag = match.buffer.by_tag

    def line(self, label: str, event: Event) -> bytes:
        """Return the event's line; label is its tag without control characters."""
        seconds, nanoseconds, record = event
        moment = self._clock(seconds, nanoseconds)
        return to_bytes(f"{moment}\t{label}\t{encode(record)}\n")

    def key(self, tag: str, seconds: int) -> Key:
        """Return the key of the event's chunk."""
        return (tag if self._by_tag else None, seconds - seconds % DAY)

    def write(self, key: Key, lines: list[bytes]) -> None:
        """Put lines into the chunk of key; Refused when that is not possible now."""
        self.store.write(key, lines)


class StdoutOutput:
    """A match of @type stdout, in the form of Fluentd's format stdout."""

    def __init__(self) -> None:
        """Write to the collector's own log."""
        self._clock = clock("%Y-%m-%d %H:%M:%S.%9N %z")

    def line(self, label: str, event: Event) -> bytes:
        """Return the event's line; label is its tag without control characters."""
        seconds, nanoseconds, record = event
        return to_bytes(f"{self._clock(seconds, nanoseconds)} {label}: {encode(record)}\n")

    def key(self, tag: str, seconds: int) -> Key:  # noqa: ARG002 - as FileOutput's
        """Return the one key that there is."""
        return (None, 0)

    def write(self, key: Key, lines: list[bytes]) -> None:  # noqa: ARG002
        """Print lines."""
        log.write(b"".join(lines))


Output = FileOutput | StdoutOutput


class Router:
    """The matches under one label: the first one that matches a tag gets its events."""

    def __init__(self, matches: list[Match]) -> None:
        """Make the outputs; chunks that are left of an earlier run are taken up."""
        self._routes: list[tuple[Pattern, Output]] = [
            (
                match.pattern,
                StdoutOutput() if isinstance(match, StdoutMatch) else FileOutput(match),
            )
            for match in matches
        ]
        self.stores = [out.store for _, out in self._routes if isinstance(out, FileOutput)]
        self.parts = Parts()
        self._known: dict[str, tuple[Output | None, str]] = {}
        self._seldom = log.Seldom()

    def route(self, tag: str) -> tuple[Output | None, str]:
        """Return the output of tag, and tag as it is written; Malformed when it is too long."""
        found = self._known.get(tag)
        if found is None:
            if len(tag) > LONGEST_TAG:
                raise Malformed(f"a tag of more than {LONGEST_TAG} characters")
            outputs = (output for pattern, output in self._routes if pattern.matches(tag))
            found = next(outputs, None), log.visible(tag)
            if found[0] is None:
                self._seldom.warn(f"no match for the tag {tag!r}: its events are dropped")
            # A sender may make up tags without end.
            if len(self._known) < 256 and len(tag) < 256:
                self._known[tag] = found
        return found

    def write_given_up(self, patience: float = PATIENCE) -> None:
        """Write what there is of lines whose next part did not come for patience seconds."""
        for key, event in self.parts.given_up(patience):
            batch = Batch(self)
            # What is refused stays for the next time.
            with contextlib.suppress(Malformed, Refused):
                batch.add(key[0], [event])
                batch.write()
                self.parts.forget([key])


class Batch:
    """The lines of what one read of a connection brought, written together."""

    def __init__(self, router: Router) -> None:
        """Write by way of router."""
        self._router = router
        self._lines: dict[tuple[Output, Key], list[bytes]] = {}
        self._size = 0
        # Lines that were put together.
        self._whole: list[LineKey] = []

    def add(self, tag: str, events: Iterable[Event]) -> None:
        """Add one message's events, all or none; Malformed or Refused when that does not work."""
        output, label = self._router.route(tag)
        if output is None:
            return
        added: list[tuple[Key, bytes]] = []
        size = 0
        for part in events:
            event, whole = self._router.parts.take(tag, part)
            if whole:
                self._whole.append(whole)
            if event is None:
                continue
            line = output.line(label, event)
            added.append((output.key(tag, event[0]), line))
            size += len(line)
            if size > MOST_LINES:
                raise Malformed(f"a message that makes more than {MOST_LINES} bytes of lines")
        for key, line in added:
            self._lines.setdefault((output, key), []).append(line)
        self._size += size
        if self._size > _BATCH:
            self.write()

    def write(self) -> None:
        """Write all lines: once this returns they survive a kill -9. Refused: some may not."""
        lines, self._lines, self._size = self._lines, {}, 0
        whole, self._whole = self._whole, []
        for (output, key), some in lines.items():
            output.write(key, some)
        self._router.parts.forget(whole)
