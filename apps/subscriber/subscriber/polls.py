"""The long polls of all queues together: how many there may be, and how often they look."""

import time

from door.memory import OutOfMemory
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
