"""How many messages a burst may bring, by the sizes of those that came lately."""

from collections import deque

# Below LEAST_BURST, a consume and a cancel cost more than single gets.
LEAST_BURST = 4
# A burst's messages are all on their way at once: the broker reads them together, and 100 of
# 16 MB killed one of 1 GiB where 16 raised no alarm. AMQP has no bound for their bytes. So the
# first burst is small, and each that brings only small messages makes the next one larger.
FIRST_BURST, LARGEST_BURST = 16, 100
# Bytes of a message from which on single gets are as quick, and bring one message at a time.
LARGE = 64 * 1024
# How many messages are remembered.
LATELY = 100


class Pace:
    """The sizes of the last messages, and the size of the next burst."""

    def __init__(self) -> None:
        """Begin without knowing any message."""
        self._sizes: deque[int] = deque(maxlen=LATELY)
        self._most = FIRST_BURST

    @property
    def largest(self) -> int:
        """Bytes of the largest of the last messages."""
        return max(self._sizes, default=0)

    def note(self, size: int) -> None:
        """Take note of a message of size bytes."""
        self._sizes.append(size)
        if size >= LARGE:
            self._most = FIRST_BURST

    def grow(self) -> None:
        """Take note that a burst was brought whole."""
        self._most = min(2 * self._most, LARGEST_BURST)

    def burst(self, wanted: int) -> int:
        """Return how many of the wanted messages a burst may bring; 0 asks for a single get."""
        count = min(wanted, self._most)
        return count if count >= LEAST_BURST and self.largest < LARGE else 0
