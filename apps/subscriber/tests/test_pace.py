"""How many messages are on their way at once."""

from subscriber.pace import LARGE, LARGEST_BURST, LATELY, Pace


def test_the_first_burst_is_small_and_each_that_came_whole_makes_the_next_larger() -> None:
    pace = Pace()
    pace.note(100)
    found = []
    for _ in range(5):
        found.append(pace.burst(1000))
        pace.grow()
    assert found == [16, 32, 64, LARGEST_BURST, LARGEST_BURST]
    assert [pace.burst(wanted) for wanted in (3, 4, 50)] == [0, 4, 50]


def test_after_a_large_message_they_come_one_by_one_until_it_is_long_ago() -> None:
    pace = Pace()
    pace.grow()
    pace.note(LARGE)
    for _ in range(LATELY - 1):
        pace.note(100)
        assert pace.burst(1000) == 0
    pace.note(200)
    assert (pace.burst(1000), pace.largest) == (16, 200)
