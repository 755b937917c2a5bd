"""Which queues, topics and clients there are, from a file that is read again when it changes."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from common.environment import ConfigError
from werkzeug.exceptions import abort

from door.access import RIGHTS, Access

log = logging.getLogger(__name__)

# Seconds between two looks whether the file was replaced.
LOOK = 1.0


@dataclass(frozen=True)
class Lists:
    """What the file tells: names of queues and topics, who may enter, and who may see metrics."""

    queues: frozenset[str]
    topics: frozenset[str] = frozenset()
    access: Access = field(default_factory=Access)
    readers: Access = field(default_factory=Access)
    # Whose pages may use the door in a browser.
    origins: frozenset[str] = frozenset()


class Topology:
    """The queues and topics that a door serves: those of a file, or a default queue alone."""

    def __init__(self, default: str, path: Path | None = None) -> None:
        """Serve the queue default, and those that the file at path names; raises ConfigError."""
        self._default = default
        self._path = path
        self._version: tuple[int, int] | None = None
        self._next = 0.0
        self._lists = Lists(frozenset([default]))
        if path:
            self._version = _version(path)
            self._lists = read(path)

    @property
    def queues(self) -> frozenset[str]:
        """The names of all queues."""
        self._refresh()
        return self._lists.queues

    @property
    def topics(self) -> frozenset[str]:
        """The names of all topics."""
        self._refresh()
        return self._lists.topics

    @property
    def lists(self) -> Lists:
        """All that the file tells."""
        self._refresh()
        return self._lists

    def queue(self, name: str) -> str:
        """Return name, or the default queue's where it is empty; aborts with 404 without one."""
        if not name:
            return self._default
        if name not in self.queues:
            abort(404, f"There is no queue {name[:200]!r}.")
        return name

    def topic(self, name: str) -> str:
        """Return name; aborts with 404 when there is no such topic."""
        if name not in self.topics:
            abort(404, f"There is no topic {name[:200]!r}.")
        return name

    def _refresh(self) -> None:
        """Read the file again if it was replaced; one that cannot be read changes nothing."""
        if self._path is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK
        try:
            version = _version(self._path)
            if version != self._version:
                self._version = version
                self._lists = read(self._path)
                log.info("The queues, topics and clients were read again")
        except ConfigError as error:
            log.warning("Queues, topics and clients stay as they are: %s", error)


def read(path: Path) -> Lists:
    """Return what the file at path tells; ConfigError where it cannot be read.

    It is `{"queues": ["orders"], "topics": ["events"], "clients": []}`. What a client is, Access
    says. There may be `readers`, clients without rights, who alone may see the metrics then; and
    `origins`, as `https://app.example.com`, which count where there are clients.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        origins = told.get("origins", [])
        if not all(isinstance(name, str) for name in (*told["queues"], *told["topics"], *origins)):
            raise TypeError("a name is no string")
        access = Access(told.get("clients", []))
        readers = Access({**dict.fromkeys(RIGHTS, ()), **one} for one in told.get("readers", []))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"QUEUES_FILE={path} cannot be read: {error!r}") from None
    # Whoever needs no token is kept from browsers altogether.
    allowed = frozenset[str]() if access.open else frozenset(origins)
    return Lists(frozenset(told["queues"]), frozenset(told["topics"]), access, readers, allowed)


def _version(path: Path) -> tuple[int, int]:
    """Return what differs once the file at path was replaced; ConfigError without one."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"QUEUES_FILE={path} cannot be read: {error!r}") from None
    return found.st_ino, found.st_mtime_ns
