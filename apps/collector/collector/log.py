"""The collector's own log on stdout, in the form of Fluentd's: time, level, text, one line each."""

import contextlib
import os
import re
import sys
import time

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Characters of a line; what a peer sent may be in it.
_LONGEST = 1000


def visible(text: str) -> str:
    r"""Return text with its control characters as JSON writes them (\u000a), on one line."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _write(level: str, text: str) -> None:
    moment = time.strftime("%Y-%m-%d %H:%M:%S +0000", time.gmtime())
    line = f"{moment} [{level}]: {visible(text)[:_LONGEST]}\n"
    write(line.encode(errors="backslashreplace"))


def write(lines: bytes) -> None:
    """Print lines as they are; a stdout that nobody reads any more stops nothing."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), lines)


def info(text: str) -> None:
    """Say what is as it should be."""
    _write("info", text)


def warn(text: str) -> None:
    """Say what somebody should look at."""
    _write("warn", text)


def error(text: str) -> None:
    """Say what does not work."""
    _write("error", text)


class Seldom:
    """Warns at most once in SECONDS: for what every event may bring about again."""

    SECONDS = 5.0

    def __init__(self) -> None:
        """Be ready to warn at once."""
        self._next = 0.0

    def warn(self, text: str) -> None:
        """Warn of text unless the last warning is too fresh."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.SECONDS
            warn(text)
