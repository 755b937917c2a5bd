"""What the modules ports_listen and ports_reach do, asked as Ansible asks a module."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODULES = Path(__file__).parents[1] / "plugins/modules"
HERE, THERE = "127.0.0.7", "127.0.0.8"


def ask(module: str, **options: object) -> dict[str, Any]:
    # stdin and stdout are pipes: what holds them keeps this waiting.
    done = subprocess.run(
        [sys.executable, MODULES / f"{module}.py"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": options}),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert not done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def reach(*ports: int, addresses: tuple[str, ...] = (HERE,), **more: object) -> dict[str, Any]:
    return ask("ports_reach", addresses=addresses, ports=ports, **more)


def unreached(*ports: int, **more: Any) -> list[tuple[str, int, str]]:
    found = reach(*ports, **more)["unreached"]
    return [(one["address"], one["port"], one["why"]) for one in found]


@pytest.fixture
def free_port() -> Callable[[], int]:
    def free_port() -> int:
        with socket.create_server((HERE, 0)) as one:
            return int(one.getsockname()[1])

    return free_port


def test_what_listens_is_reached_until_it_is_told_to_end(free_port: Callable[[], int]) -> None:
    one, two = free_port(), free_port()
    assert unreached(one, two) == [(HERE, one, "refused"), (HERE, two, "refused")]
    listener = ask("ports_listen", address=HERE, ports=[one, two])["listener"]
    assert unreached(one, two) == []
    assert unreached(one, addresses=(HERE, THERE)) == [(THERE, one, "refused")]
    assert "failed" not in ask("ports_listen", end=listener)
    # At once: connections that nobody accepted do not keep it.
    assert unreached(one, two) == [(HERE, one, "refused"), (HERE, two, "refused")]
    with socket.create_server((HERE, one)):
        pass


def test_it_ends_by_itself(free_port: Callable[[], int]) -> None:
    port = free_port()
    listener = ask("ports_listen", address=HERE, ports=[port], seconds=2)["listener"]
    assert unreached(port) == []
    deadline = time.monotonic() + 10
    while not unreached(port):
        assert time.monotonic() < deadline
    assert "failed" not in ask("ports_listen", end=listener)


def test_a_port_that_something_holds_is_left_to_that(free_port: Callable[[], int]) -> None:
    port = free_port()
    with socket.create_server((HERE, 0)) as holder:
        held = holder.getsockname()[1]
        listener = ask("ports_listen", address=HERE, ports=[held, port])["listener"]
        assert unreached(held, port) == []
        ask("ports_listen", end=listener)
        assert unreached(held, port) == [(HERE, port, "refused")]


def test_a_port_that_was_held_a_moment_ago_is_free() -> None:
    with socket.create_server((HERE, 0)) as holder:
        port = holder.getsockname()[1]
        with socket.create_connection((HERE, port)):
            # Who closes first keeps the port in the state TIME_WAIT for a minute.
            holder.accept()[0].close()
    listener = ask("ports_listen", address=HERE, ports=[port])["listener"]
    assert unreached(port) == []
    ask("ports_listen", end=listener)


def test_an_address_of_another_host_is_refused() -> None:
    told = ask("ports_listen", address="192.0.2.1", ports=[4369])
    assert told["failed"]
    assert "Nothing can listen on 192.0.2.1: Cannot assign" in told["msg"]


def test_what_keeps_silent_is_told_in_time_however_many_there_are() -> None:
    # With its queue full, a socket takes no more connections in: the kernel drops them.
    with socket.socket() as full:
        full.bind((HERE, 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection((HERE, port)):
            began = time.monotonic()
            found = unreached(*[port] * 30, seconds=1)
            assert found == [(HERE, port, "timed out")] * 30
            assert time.monotonic() - began < 5


def test_the_time_is_told_between_question_and_answer() -> None:
    asked = time.time()
    told = reach(addresses=(), asked=asked)
    assert asked == told["asked"] < told["began"] <= told["ended"] < time.time()
