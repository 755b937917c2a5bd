"""What clients may take of the collector: connections, and memory for what is not complete."""

import resource
import time
from collections.abc import Hashable
from typing import Protocol

from collector import log

# File descriptors for everything but clients: chunks, listeners, commands, Python's own.
_RESERVED = 150
# More clients than any host's containers; each one takes up to 50 KiB.
_MOST_CLIENTS = 2_000
# Seconds an unfinished message may take to arrive.
PATIENCE = 60.0


class Client(Hashable, Protocol):
    """A connection of one of the inputs."""

    def refuse(self, reason: str) -> None:
        """Say the reason in one line and close the connection."""

    def close(self) -> None:
        """Close the connection."""


class Limits:
    """Counts the clients and what they have sent of unfinished messages."""

    def __init__(self, most_partial: int) -> None:
        """Allow most_partial bytes of unfinished messages in all."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        files = _MOST_CLIENTS if hard == resource.RLIM_INFINITY else hard - _RESERVED
        self.most_clients = max(1, min(_MOST_CLIENTS, files))
        self._most_partial = most_partial
        self.clients: set[Client] = set()
        self._partial: dict[Client, tuple[int, float]] = {}
        self._sum = 0
        self._seldom = log.Seldom()

    def enter(self, client: Client, peer: str) -> bool:
        """Return whether there is room for one more client; say it when there is none."""
        if len(self.clients) >= self.most_clients:
            self._seldom.warn(f"refused {peer}: there are {self.most_clients} connections already")
            return False
        self.clients.add(client)
        return True

    def leave(self, client: Client) -> None:
        """Forget client."""
        self.clients.discard(client)
        self.hold(client, 0)

    def hold(self, client: Client, size: int) -> None:
        """Note that client has sent size bytes of an unfinished message.

        When all of them are too much, the client that has sent the most is refused: small
        messages go on arriving while somebody holds large ones.
        """
        held, since = self._partial.pop(client, (0, time.monotonic()))
        self._sum += size - held
        if size:
            self._partial[client] = (size, since)
        while self._sum > self._most_partial:
            largest = max(self._partial, key=lambda one: self._partial[one][0])
            self.leave(largest)
            largest.refuse(f"unfinished messages of all clients exceed {self._most_partial} bytes")

    def tick(self) -> None:
        """Refuse clients whose message takes too long; called every now and then."""
        late = time.monotonic() - PATIENCE
        for client in [one for one, (_, since) in self._partial.items() if since < late]:
            self.leave(client)
            client.refuse(f"its message did not end within {PATIENCE:g} s")
