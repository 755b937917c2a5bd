"""How long the oldest message of a queue has waited, which RabbitMQ does not tell of a quorum one.

It is worked out of counts. A queue hands out in order, so of all messages that ever came the ones
that wait are the last: the oldest of them came when all that had come was that many less than now.
"""

from dataclasses import dataclass
from itertools import pairwise

# Samples of a queue that has a backlog, about 30 KiB. Of more, those go without which the age is
# too high by no more than this share; a week of samples becomes 260.
MOST = 256
SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Counts:
    """What is known of a queue at one time."""

    # Messages that wait.
    ready: int
    # Messages that were published into it by AMQP 0-9-1, with those that it refused: RabbitMQ does
    # not wait for the queue's answer (deliver_to_queues in deps/rabbit/src/rabbit_channel.erl).
    published: int
    # Messages that it has or that left it, as far as ways to leave are counted.
    kept: int
    # Whether it may refuse messages now.
    full: bool


class History:
    """How many messages had come into one queue at which time."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._counts: Counts | None = None
        self._arrived = 0
        # Times, and how many had come by then. Of the first time the oldest message was not there
        # yet, or nobody had looked before.
        self._samples: list[tuple[float, int]] = []

    def note(self, now: float, counts: Counts) -> float:
        """Note counts at the time now; return the age of the oldest waiting message, in seconds.

        It is too high by no more than the time between two notes, or SHARE of it. A message that
        waited already at the first note counts from then on. Without a message it is 0.
        """
        self._arrived += self._arrivals(counts)
        self._counts = counts
        samples = self._samples
        if len(samples) > 1 and samples[-1][1] == self._arrived:
            samples.pop()
        samples.append((now, self._arrived))
        before_oldest = self._arrived - counts.ready
        while len(samples) > 1 and samples[1][1] <= before_oldest:
            del samples[0]
        if len(samples) > MOST:
            self._thin(now)
        return now - self._samples[0][0]

    def _arrivals(self, counts: Counts) -> int:
        """Return how many messages came since the last note.

        As many as were published, but into a full queue: there it is what the queue has more, or
        what left it. A count that is smaller than before began anew with the broker.
        """
        last = self._counts or counts
        if counts.full or last.full:
            return max(0, counts.kept - last.kept)
        return max(0, counts.published - last.published)

    def _thin(self, now: float) -> None:
        """Drop each sample whose neighbours are close to each other for their age."""
        first, *others = self._samples
        thin = [first]
        for sample, (later, _) in pairwise(others):
            if later - thin[-1][0] > SHARE * (now - later):
                thin.append(sample)
        self._samples = [*thin, others[-1]]
