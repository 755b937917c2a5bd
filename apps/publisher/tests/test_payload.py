"""What the ids of messages promise."""

import time
import uuid
from itertools import pairwise

import pytest
from publisher.payload import uuid7


def test_an_id_is_a_uuid_of_version_7_that_tells_its_time() -> None:
    before = time.time_ns() // 1_000_000
    text = uuid7()
    after = time.time_ns() // 1_000_000
    value = uuid.UUID(text)
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert str(value) == text
    assert before <= value.int >> 80 <= after


def test_later_ids_sort_behind_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000_123_456_789
    ids = []
    for step in 0, 1, 1000, 10**6, 10**9:  # milliseconds
        monkeypatch.setattr("publisher.payload.time.time_ns", lambda at=step: now + at * 10**6)
        ids.append([uuid7() for _ in range(50)])
    for earlier, later in pairwise(ids):
        assert max(earlier) < min(later)


@pytest.mark.parametrize("random", [b"\0" * 10, b"\xff" * 10])
def test_an_id_is_random_but_for_its_time_version_and_variant(
    monkeypatch: pytest.MonkeyPatch, random: bytes
) -> None:
    monkeypatch.setattr("publisher.payload.os.urandom", lambda count: random[:count])
    digit = f"{random[0]:02x}"[0]
    variant = {"0": "8", "f": "b"}[digit]
    assert uuid7()[14:] == f"7{digit * 3}-{variant}{digit * 3}-{digit * 12}"


def test_no_two_ids_are_equal() -> None:
    assert len({uuid7() for _ in range(10_000)}) == 10_000
