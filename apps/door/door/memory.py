"""What one process may hold for its clients, in bytes: one place grants it and takes it back.

Whoever keeps bytes for a client (headers, bodies, what they become when parsed, messages, answers
that are not taken yet) asks first. What is not granted is refused with 503 before it is read, or
before a message leaves its queue.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gevent import sleep, spawn_later
from gevent.event import Event
from werkzeug.exceptions import ServiceUnavailable

MIB = 1024 * 1024

# Bytes of a process that serves nobody: Python, the libraries and the connection to the broker.
BASE = 48 * MIB
# Share of the rest that is granted; what is left is for what no grant counts: garbage between two
# collections, holes in the heap, the sockets' buffers in the kernel.
SHARE = 0.65
# Share of what is granted that is kept for newcomers' connections: large requests never have all.
RESERVED = 0.125
# Seconds a request waits for memory before it is refused, and a client should wait afterwards.
PATIENCE = 1.0
RETRY_AFTER = 1
# Requests that wait for memory at a time; further ones are refused at once.
MAX_WAITING = 32
# Bytes that were given back, and seconds afterwards, when the heap's holes go back to the system:
# else what thousands of small bodies left would come on top of the large ones that follow.
TRIM, TRIM_DELAY = 16 * MIB, 0.5

LIBC = ctypes.CDLL(None)


class OutOfMemory(ServiceUnavailable):
    """The process has no room for what a request needs: 503 with Retry-After."""

    def __init__(self) -> None:
        """Refuse for now."""
        super().__init__("The door's memory is in use; ask again later.", retry_after=RETRY_AFTER)


class Memory:
    """The bytes of one process, shared by all its greenlets."""

    def __init__(self, size: int) -> None:
        """Grant at most size bytes at a time."""
        self.size = size
        self.held = 0
        # Lets go of whoever has kept the process waiting for longest; the bytes that will be free
        # then, 0 when there is nobody.
        self.shed: Callable[[], int] = lambda: 0
        self._promised = 0
        self._freed = Event()
        self._waiting = 0
        # The most that was held since the heap was trimmed, and whether it will be soon.
        self._peak = 0
        self._trimming = False

    @classmethod
    def of(cls, limit: int, processes: int = 1, reserve: int = 0) -> Self:
        """Return the memory of one of so many processes in a container of limit bytes.

        Each needs reserve bytes for something that takes no part in the sharing.
        """
        return cls(max(0, int((limit / processes - BASE - reserve) * SHARE)))

    def take_now(self, amount: int) -> bool:
        """Hold amount bytes if that leaves the reserved share free; never waits."""
        if self.held + amount > self.size * (1 - RESERVED):
            return False
        self.held += amount
        return True

    def take(self, amount: int) -> None:
        """Hold amount bytes; waits up to PATIENCE seconds for them and raises OutOfMemory then."""
        if self.take_now(amount):
            return
        if amount > self.size * (1 - RESERVED) or self._waiting >= MAX_WAITING:
            raise OutOfMemory
        deadline = time.monotonic() + PATIENCE
        self._waiting += 1
        try:
            while not self.take_now(amount):
                if time.monotonic() > deadline:
                    raise OutOfMemory
                self.make_room(amount)
                self._freed.clear()
                self._freed.wait(0.05)  # whoever stalls now can be shed in a moment
        finally:
            self._waiting -= 1

    def make_room(self, amount: int) -> None:
        """Let go as many clients as hold what is missing for amount bytes; never waits."""
        while self.held - self._promised + amount > self.size * (1 - RESERVED):
            freed = self.shed()
            if not freed:
                break
            self._promised += freed

    def give(self, amount: int) -> None:
        """Take back amount bytes that were held."""
        self._peak = max(self._peak, self.held)
        self.held -= amount
        if self._peak - self.held > TRIM and not self._trimming:
            self._trimming = True
            spawn_later(TRIM_DELAY, self._trim)
        if self._promised:
            self._promised = max(0, self._promised - amount)
        if self._waiting:
            self._freed.set()

    def _trim(self) -> None:
        """Return the free pages of the heap to the system, where the C library can: glibc.

        What ended connections left in cycles is freed first.
        """
        self._peak, self._trimming = self.held, False
        gc.collect()
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)

    def grant(self) -> "Grant":
        """Return a grant of nothing, to grow as its owner needs."""
        return Grant(self)


class Grant:
    """What one owner holds of a Memory; given back at the end of a `with` block, or by close()."""

    __slots__ = ("_memory", "amount")

    def __init__(self, memory: Memory, amount: int = 0) -> None:
        """Hold amount bytes of memory, which were taken already."""
        self._memory = memory
        self.amount = amount

    def take_anyway(self, amount: int) -> None:
        """Hold amount bytes more, which other means than the memory's size bound."""
        self._memory.held += amount
        self.amount += amount

    def resize(self, amount: int) -> None:
        """Hold amount bytes from now on; raises OutOfMemory and holds what it held before."""
        if amount > self.amount:
            self._memory.take(amount - self.amount)
        elif amount < self.amount:
            self._memory.give(self.amount - amount)
        self.amount = amount

    def add_now(self, amount: int) -> None:
        """Hold amount bytes more, or raise OutOfMemory at once; who was let go gets one turn."""
        if not self._memory.take_now(amount):
            self._memory.make_room(amount)
            sleep(0)
            if not self._memory.take_now(amount):
                raise OutOfMemory
        self.amount += amount

    def add(self, amount: int) -> None:
        """Hold amount bytes more; raises OutOfMemory."""
        self.resize(self.amount + amount)

    def close(self) -> None:
        """Hold nothing."""
        if self.amount:
            self._memory.give(self.amount)
            self.amount = 0

    def __enter__(self) -> Self:
        """Hold until the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give all back."""
        self.close()
