"""Who is connected to one process, and for whom of them it waits.

A process that runs short of memory, or of connections, lets somebody go who keeps it waiting: of
the address with the most such clients the one that has done nothing for the longest time. So who
floods a door meets himself, and a newcomer is served.
"""

import time
from collections import deque
from typing import Any, Protocol

from door.memory import Grant, Memory

# Bytes of a connection: its greenlet, its buffers here and in the kernel, its request's headers.
CONNECTION = 24 * 1024
# Share of the memory that connections may take.
SHARE = 0.75
# Seconds a client may take for the next part of its body, or of its answer, before it may be let
# go where memory is short. One without a request may be let go at once.
STALLED = 0.5


class Waited(Protocol):
    """A client for whom the server may have to wait."""

    @property
    def address(self) -> str:
        """Where it comes from."""

    def let(self) -> int:
        """Let it go: what the server waits for will not come; the bytes that it holds."""


class Arrivals:
    """Clients that were accepted and are still to be served; their addresses take turns."""

    def __init__(self, most: int) -> None:
        """Begin without any; there may be most of them."""
        self._most = most
        self._lines: dict[str, deque[Any]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def add(self, address: str, client: Any) -> Any | None:
        """Have client wait for its turn; when there are too many, return one who must go.

        That is the first one of the address with the most of them.
        """
        self._lines.setdefault(address, deque()).append(client)
        self._count += 1
        if self._count <= self._most:
            return None
        return self._take(max(self._lines, key=lambda each: len(self._lines[each])))

    def turn(self) -> list[Any]:
        """Return one client of each address that has any."""
        return [self._take(address) for address in list(self._lines)]

    def _take(self, address: str) -> Any:
        line = self._lines[address]
        client = line.popleft()
        if not line:
            del self._lines[address]
        self._count -= 1
        return client


class Waits:
    """The clients for whom the process waits, by address, longest first."""

    def __init__(self) -> None:
        """Begin without any."""
        self._since: dict[str, dict[Waited, float]] = {}

    def begin(self, client: Waited) -> None:
        """Note that client is waited for from now on."""
        self._since.setdefault(client.address, {})[client] = time.monotonic()

    def end(self, client: Waited) -> None:
        """Note that client is waited for no more."""
        others = self._since.get(client.address, {})
        others.pop(client, None)
        if not others:
            self._since.pop(client.address, None)

    def longest(self, least: float = 0) -> Waited | None:
        """Return who is waited for the longest, of the address with the most of them.

        None when that is less than least seconds.
        """
        for others in sorted(self._since.values(), key=len, reverse=True):
            client, since = next(iter(others.items()))
            if time.monotonic() - since >= least:
                return client
        return None


class Clients:
    """The connections of one process, bounded by its memory, and by the files it may have open."""

    def __init__(self, memory: Memory, files: int, fronted: bool = False) -> None:
        """Begin without any; memory sheds some of them when it runs short.

        Where all are fronted, by a proxy, the idle ones stay: it may be about to send a request.
        """
        self.most = min(int(memory.size * SHARE) // CONNECTION, files)
        # Who has not sent all headers of a request since it came, or since its last answer.
        self.idle = Waits()
        # Who is sending a body, or taking an answer.
        self.slow = Waits()
        self.memory = memory
        self._fronted = fronted
        self._count = 0
        # Who was let go and is still to end.
        self._leaving: set[Waited] = set()
        memory.shed = self.shed

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def enter(self, grant: Grant) -> bool:
        """Count a connection and have grant hold its memory; False: refuse it.

        Where there are enough it takes the place of another, whose memory is free in a moment.
        """
        room = self._count - len(self._leaving) < self.most
        if not (room or self.shed(least=0)):
            return False
        self._count += 1
        grant.take_anyway(CONNECTION)
        return True

    def leave(self, client: Waited) -> None:
        """Count client's connection no more."""
        self.idle.end(client)
        self._leaving.discard(client)
        self._count -= 1

    def shed(self, least: float = STALLED) -> int:
        """Let somebody go who is waited for; the bytes that this client holds, 0 without one.

        Whoever is in the middle of a request must have stalled for least seconds.
        """
        client = None if self._fronted else self.idle.longest()
        client = client or self.slow.longest(least)
        if client is None:
            return 0
        self.idle.end(client)
        self.slow.end(client)
        self._leaving.add(client)
        return client.let()

    def part(self) -> None:
        """Let everybody go who has no request under way."""
        while client := self.idle.longest():
            self.idle.end(client)
            client.let()
