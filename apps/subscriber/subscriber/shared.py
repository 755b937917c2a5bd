"""What all queues share: the memory, the places of long polls, and the times for looks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from door.memory import Memory, OutOfMemory
from gevent.lock import BoundedSemaphore

# Seconds between two looks into an empty queue while requests wait for a message.
POLL = 0.05
# Seconds between two looks into any queues. Up to 5 queues are looked into every POLL; the more
# there are, the longer each has to wait: 100 queues every POLL would be 2,000 gets a second.
SPACE = 0.01


class Polls:
    """The bounds of long polls: places for those that wait, and times for looks."""

    def __init__(self, most: int) -> None:
        """Have places for most long polls."""
        self._places = BoundedSemaphore(most)
        self._last = 0.0

    def enter(self) -> None:
        """Take a place, until leave(); raises OutOfMemory when none is left."""
        if not self._places.acquire(blocking=False):
            raise OutOfMemory

    def leave(self) -> None:
        """Give a place back."""
        self._places.release()

    def pause(self) -> float:
        """Return the seconds until a queue may be looked into again; its look is then due."""
        now = time.monotonic()
        self._last = max(now + POLL, self._last + SPACE)
        return self._last - now


class Spare:
    """The room for one message that is no part of the Memory; one queue has it at a time."""

    def __init__(self) -> None:
        """Begin with room that nobody has."""
        self._owner: object = None
        # Who wanted it meanwhile, with what to call once it is free.
        self._waiting: dict[object, Callable[[], None]] = {}

    def take(self, owner: object, again: Callable[[], None]) -> bool:
        """Have the room until give(), or have again called once it is worth another attempt."""
        if self._owner not in (None, owner):
            self._waiting[owner] = again
            return False
        self._owner = owner
        return True

    def waits(self, owner: object) -> bool:
        """Whether owner wanted the room and could not have it yet."""
        return owner in self._waiting

    def give(self, owner: object) -> None:
        """Take the room back, if owner has it."""
        if self._owner is owner:
            self._owner = None
            waiting, self._waiting = self._waiting, {}
            for again in waiting.values():
                again()


@dataclass(frozen=True)
class Shared:
    """What all queues share."""

    memory: Memory
    polls: Polls
    spare: Spare = field(default_factory=Spare)
