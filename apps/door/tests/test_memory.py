"""What a process holds for its clients, and what happens when that is all it has."""

import os
import time
from pathlib import Path

import gevent
import pytest
from door import memory
from door.clients import CONNECTION, STALLED, Arrivals, Clients
from door.memory import MIB, Memory, OutOfMemory

# Of so many bytes, requests may hold 7 MiB: the rest is for newcomers' connections.
SIZE = 8 * MIB


class Someone:
    """A client who holds so much, and gives it back a moment after it was let go."""

    def __init__(self, memory: Memory, amount: int, address: str = "a") -> None:
        self.address = address
        self.grant = memory.grant()
        self.grant.add(amount)
        self.gone = False

    def let(self) -> int:
        self.gone = True
        amount = self.grant.amount
        gevent.spawn_later(0.01, self.grant.close)
        return amount


def test_a_container_s_memory_is_shared_by_its_processes() -> None:
    one, two = Memory.of(512 * MIB), Memory.of(512 * MIB, 2)
    assert 0 < two.size < one.size < 512 * MIB
    assert Memory.of(1).size == 0


def test_what_is_held_is_given_back_at_the_end_of_the_block() -> None:
    memory = Memory(SIZE)
    with pytest.raises(ZeroDivisionError), memory.grant() as grant:  # noqa: PT012
        grant.add(MIB)
        grant.resize(2 * MIB)
        assert memory.held == 2 * MIB
        raise ZeroDivisionError
    assert memory.held == 0


def test_more_than_there_ever_is_is_refused_at_once() -> None:
    memory = Memory(SIZE)
    with memory.grant() as grant, pytest.raises(OutOfMemory):
        grant.add(SIZE)
    assert memory.held == 0


def test_a_request_waits_a_moment_for_memory_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("door.memory.PATIENCE", 0.2)
    memory = Memory(SIZE)
    first, second = memory.grant(), memory.grant()
    first.add(7 * MIB)
    started = time.monotonic()
    with pytest.raises(OutOfMemory):
        second.add(MIB)
    assert 0.2 <= time.monotonic() - started < 2
    gevent.spawn_later(0.05, first.close)
    second.add(MIB)
    assert memory.held == MIB


def test_only_so_many_wait_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_ = Memory(SIZE)
    full = memory_.grant()
    full.add(7 * MIB)
    waiting = [gevent.spawn(memory_.grant().add, MIB) for _ in range(memory.MAX_WAITING)]
    gevent.idle()
    monkeypatch.setattr("door.memory.PATIENCE", 60)
    with gevent.Timeout(3), pytest.raises(OutOfMemory):
        memory_.grant().add(MIB)
    gevent.killall(waiting)


def test_only_as_many_are_let_go_as_hold_what_is_missing() -> None:
    memory = Memory(SIZE)
    clients = Clients(memory, 1000)
    idle = [Someone(memory, MIB) for _ in range(7)]
    for one in idle:
        clients.idle.begin(one)
    memory.grant().add(2 * MIB)
    assert [one.gone for one in idle] == [True, True, *[False] * 5], "the first were idle longest"


def test_who_has_the_most_connections_is_let_go_first() -> None:
    memory = Memory(SIZE)
    clients = Clients(memory, 1000)
    modest = Someone(memory, MIB, "modest")
    greedy = [Someone(memory, MIB, "greedy") for _ in range(6)]
    for one in (modest, *greedy):
        clients.idle.begin(one)
    memory.grant().add(5 * MIB)
    assert not modest.gone


def test_a_client_in_the_middle_of_a_request_is_let_go_only_when_it_stalls() -> None:
    memory = Memory(SIZE)
    clients = Clients(memory, 1000)
    slow = Someone(memory, 7 * MIB)
    clients.slow.begin(slow)
    started = time.monotonic()
    memory.grant().add(MIB)
    assert slow.gone
    assert time.monotonic() - started >= STALLED


def test_a_newcomer_is_let_in_in_the_place_of_who_does_nothing() -> None:
    memory = Memory(4 * CONNECTION)
    clients = Clients(memory, 1000)
    assert clients.most == 3
    idle = [Someone(memory, 0) for _ in range(3)]
    for one in idle:
        assert clients.enter(one.grant)
        clients.idle.begin(one)
    assert clients.enter(memory.grant())
    assert [one.gone for one in idle] == [True, False, False]


def test_a_newcomer_is_refused_while_everybody_is_being_served() -> None:
    memory = Memory(4 * CONNECTION)
    clients = Clients(memory, 1000)
    assert [clients.enter(memory.grant()) for _ in range(4)] == [True, True, True, False]


def test_addresses_take_turns() -> None:
    arrivals = Arrivals(10)
    for client in "a1", "a2", "a3", "b1", "c1", "b2":
        assert arrivals.add(client[0], client) is None
    assert len(arrivals) == 6
    turns = [sorted(arrivals.turn()) for _ in range(4)]
    assert turns == [["a1", "b1", "c1"], ["a2", "b2"], ["a3"], []]
    assert len(arrivals) == 0


def test_who_came_first_of_the_address_with_the_most_arrivals_makes_room() -> None:
    arrivals = Arrivals(3)
    gone = [arrivals.add(client[0], client) for client in ("a1", "b1", "a2", "c1", "b2")]
    assert gone == [None, None, None, "a1", "b1"]


def test_clients_are_bounded_by_the_files_that_may_be_open() -> None:
    assert Clients(Memory(SIZE), 10).most == 10
    assert Clients(Memory(SIZE), 100_000).most == int(SIZE * 0.75) // CONNECTION


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_small_bodies_took_goes_back_to_the_system() -> None:
    memory = Memory(256 * MIB)
    with memory.grant() as grant:
        grant.add(100 * MIB)
        bodies = [bytes(50_000) for _ in range(2000)]
        # What stays among them keeps the heap from shrinking by itself.
        stays = bodies[:: len(bodies) // 20]
        full = resident()
        del bodies
    deadline = time.monotonic() + 5
    while resident() > full - 60 * MIB and time.monotonic() < deadline:
        gevent.sleep(0.05)
    assert full - resident() > 60 * MIB
    assert len(stays) == 20
