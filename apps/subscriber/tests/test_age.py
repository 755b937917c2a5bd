"""What the ages of messages promise, beside a queue of which each message's age is known."""

import random
import tracemalloc
from collections import deque
from dataclasses import dataclass, field

import pytest
from subscriber.age import SHARE, Counts, History

# Seconds between two notes.
STEP = 10


@dataclass
class Fifo:
    """A queue, and what RabbitMQ would count of it."""

    limit: int = 2**31
    waiting: deque[float] = field(default_factory=deque)
    published: int = 0
    acked: int = 0
    dead: int = 0

    def send(self, now: float, count: int = 1) -> None:
        for _ in range(count):
            self.published += 1
            if len(self.waiting) < self.limit:
                self.waiting.append(now)

    def take(self, count: int = 1) -> None:
        for _ in range(min(count, len(self.waiting))):
            self.waiting.popleft()
            self.acked += 1

    def expire(self, born: float) -> None:
        while self.waiting and self.waiting[0] <= born:
            self.waiting.popleft()
            self.dead += 1

    def counts(self) -> Counts:
        ready = len(self.waiting)
        kept = ready + self.acked + self.dead
        return Counts(ready, self.published, kept, ready > 0.8 * self.limit)

    def age(self, now: float) -> float:
        return now - self.waiting[0] if self.waiting else 0


def notes(queue: Fifo, history: History, times: range) -> list[float]:
    return [history.note(now, queue.counts()) for now in times]


def test_an_empty_queue_has_no_age() -> None:
    assert notes(Fifo(), History(), range(0, 50, STEP)) == [0] * 5


def test_a_message_grows_old_until_it_is_taken_and_then_the_next_one_counts() -> None:
    queue, history = Fifo(), History()
    history.note(0, queue.counts())
    queue.send(5)
    assert notes(queue, history, range(10, 60, STEP)) == [10, 20, 30, 40, 50]
    queue.send(55)
    assert notes(queue, history, range(60, 90, STEP)) == [60, 70, 80]
    queue.take()
    assert notes(queue, history, range(90, 120, STEP)) == [40, 50, 60]
    queue.take()
    assert notes(queue, history, range(120, 140, STEP)) == [0, 0]
    queue.send(135)
    assert notes(queue, history, range(140, 160, STEP)) == [10, 20]


def test_what_waited_already_at_the_first_look_counts_from_then_on() -> None:
    queue, history = Fifo(), History()
    queue.send(-1000, 3)
    assert notes(queue, history, range(0, 30, STEP)) == [0, 10, 20]
    queue.take(2)
    queue.send(25, 10)
    assert notes(queue, history, range(30, 50, STEP)) == [30, 40]
    queue.take()
    assert notes(queue, history, range(50, 60, STEP)) == [30]


@pytest.mark.parametrize("limit", [6, 100])
def test_an_age_goes_on_growing_when_the_broker_s_counts_begin_anew(limit: int) -> None:
    queue, history = Fifo(limit), History()
    queue.send(0, 6)
    queue.take()
    queue.send(0)
    notes(queue, history, range(0, 100, STEP))
    queue.published = queue.acked = 0
    assert notes(queue, history, range(100, 120, STEP)) == [100, 110]
    queue.take(5)
    queue.send(115, 5)
    assert notes(queue, history, range(120, 140, STEP)) == [120, 130]
    queue.take()
    assert notes(queue, history, range(140, 150, STEP)) == [30]


def test_ages_of_messages_that_come_seldom_are_exact() -> None:
    queue, history = Fifo(), History()
    history.note(0, queue.counts())
    for sent in 5, 100_005:
        queue.send(sent)
        notes(queue, history, range(sent + 5, sent + 100_000, STEP))
    queue.take()
    assert notes(queue, history, range(200_010, 200_020, STEP)) == [100_010]


@pytest.mark.parametrize("limit", [2**31, 40])
@pytest.mark.parametrize("seed", range(10))
def test_an_age_is_never_too_low_and_hardly_too_high(seed: int, limit: int) -> None:
    chance = random.Random(seed)
    queue, history = Fifo(limit), History()
    rate = 1.0
    told: list[tuple[float, float]] = []
    for now in range(20_000):
        if now % 500 == 0:
            rate = chance.choice([0, 0.05, 0.9, 1.1])
        if chance.random() < 0.5:
            queue.send(now, chance.choice([0, 1, 3]))
        if chance.random() < rate:
            queue.take(chance.choice([0, 1, 2]))
        # A purge. No count tells of it; of a full queue it makes ages too high for a while.
        if now % 5000 == 4999 and limit > 40:
            queue.waiting.clear()
        queue.expire(now - 3000)
        if now % STEP == 0:
            told.append((queue.age(now), history.note(now, queue.counts())))
    assert max(age for age, _ in told) > 1000
    assert len({age for age, _ in told}) > 100
    for true, age in told:
        assert true <= age <= true * (1 + SHARE) + 2 * STEP


def test_a_full_queue_s_refused_messages_make_nothing_younger() -> None:
    queue, history = Fifo(limit=100), History()
    history.note(0, queue.counts())
    for now in range(STEP, 1000, STEP):
        queue.send(now - 1, 50)
        age = history.note(now, queue.counts())
    assert age == 990


def test_a_long_backlog_takes_little_memory() -> None:
    history = History()
    history.note(0, Fifo().counts())
    tracemalloc.start()
    for now in range(1, 5000):
        counts = Counts(now, now, now, full=False)
        age = history.note(now * 10_000, counts)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert age == 4999 * 10_000
    assert size < 64 * 1024
