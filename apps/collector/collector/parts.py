"""Lines of more than 16 KiB, which Docker cuts, put together again.

Docker's driver gives each part the texts partial_message ("true"), partial_id, partial_ordinal
(from 1 on) and partial_last. Source: daemon/logger/fluentd/fluentd.go of Moby.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Characters of a line, and of all lines that are not whole yet; what is longer stays in pieces.
LONGEST_LINE = 1 << 20
MOST_HELD = 8 << 20
# Seconds after which the next part of a line does not come any more.
PATIENCE = 5.0

# Seconds since 1970 in UTC, nanoseconds, record.
Event = tuple[int, int, dict[Any, Any]]
# Tag, container and partial_id.
Key = tuple[str, str, str]


@dataclass
class _Line:
    """A line that is not whole yet: the time and the fields of the part that came first."""

    event: Event
    parts: dict[int, str] = field(default_factory=dict)
    size: int = 0
    touched: float = 0

    def whole(self) -> Event:
        seconds, nanoseconds, record = self.event
        rest = {name: value for name, value in record.items() if not _is_partial(name)}
        rest["log"] = "".join(self.parts[ordinal] for ordinal in sorted(self.parts))
        return seconds, nanoseconds, rest


class Parts:
    """What has come of lines whose last part has not; a kill -9 loses it."""

    def __init__(self) -> None:
        """Begin without any."""
        self._lines: dict[Key, _Line] = {}
        self._size = 0

    def take(self, tag: str, event: Event) -> tuple[Event | None, Key | None]:
        """Return event, the whole line when event is its last part, or None when it is another.

        With a line comes its key, for forget once the line is written: until then the last part
        may come again.
        """
        record = event[2]
        ordinal, text = record.get("partial_ordinal"), record.get("log")
        if (
            record.get("partial_message") != "true"
            or not isinstance(text, str)
            or not isinstance(ordinal, str)
            or not (ordinal.isdecimal() and len(ordinal) < 10)
            or self._size + len(text) > MOST_HELD
        ):
            return event, None
        key = tag, str(record.get("container_id")), str(record.get("partial_id"))
        line = self._lines.setdefault(key, _Line(event))
        added = len(text) - len(line.parts.get(int(ordinal), ""))
        line.parts[int(ordinal)] = text
        line.size += added
        self._size += added
        line.touched = time.monotonic()
        if record.get("partial_last") != "true" and line.size < LONGEST_LINE:
            return None, None
        return line.whole(), key

    def forget(self, keys: Iterable[Key]) -> None:
        """Let go of lines that are written."""
        for key in keys:
            if line := self._lines.pop(key, None):
                self._size -= line.size

    def given_up(self, patience: float = PATIENCE) -> list[tuple[Key, Event]]:
        """Return the lines to which nothing was added for patience seconds, with what there is."""
        late = time.monotonic() - patience
        return [(key, line.whole()) for key, line in self._lines.items() if line.touched <= late]


def _is_partial(name: object) -> bool:
    return isinstance(name, str) and name.startswith("partial_")
