"""What moving the messages of one queue to another promises."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.settings import BrokerSettings
from pika.spec import Basic, BasicProperties
from subscriber import move, resend
from subscriber.broker import Broker
from subscriber.channel import own_channel
from subscriber.settings import Settings

from .conftest import Queue, Rabbit, Wire

PROJECT = Path(__file__).parents[3]
TEXTS = [b"%d" % number for number in range(250)]


@pytest.fixture
def old(rabbit: Rabbit) -> Queue:
    """A queue of somebody else's, with messages: the exchange does not lead to it."""
    rabbit.queues["old"] = Queue()
    rabbit.publish(*TEXTS, queue="old")
    return rabbit.queues["old"]


@pytest.fixture
def wires(rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Wire]]:
    """The connections by which messages are read and written."""
    found: list[Wire] = []

    def start(link: Any) -> None:
        found.append(rabbit.connect(link))
        found[-1].prompt = True

    monkeypatch.setattr(move.Once, "start", start)
    monkeypatch.setattr(move, "SETTLE", 0)
    yield found
    with gevent.Timeout(5):
        while not all(wire.connection.is_closed for wire in found):
            gevent.sleep(0.01)
    assert len(found) == 2


@pytest.fixture
def moving(wires: list[Wire], old: Queue) -> Callable[[], int]:
    """Move old's messages to takeaway."""
    assert (wires, len(old)) == ([], len(TEXTS))
    reader = BrokerSettings(user="admin")
    request = gevent.Greenlet(move.move, Settings(), reader, "old", "takeaway")

    def run() -> int:
        request.start()
        moved: int = request.get(timeout=10)
        return moved

    return run


def stays(moving: Callable[[], int], match: str) -> None:
    with pytest.raises(BrokerUnavailable, match=match):
        moving()


class Some:
    """Whether the queue is full: at the messages of these numbers."""

    def __init__(self, *numbers: int) -> None:
        self._left, self._numbers = iter(range(1, 10_000)), numbers

    def __bool__(self) -> bool:
        return next(self._left) in self._numbers


def test_all_are_moved_to_the_end_in_their_order(
    rabbit: Rabbit, old: Queue, moving: Callable[[], int]
) -> None:
    rabbit.publish(b"x")
    assert moving() == len(TEXTS)
    assert rabbit.bodies() == [b"x", *TEXTS]
    assert old == []


def test_a_door_s_message_is_still_its_client_s(
    rabbit: Rabbit, old: Queue, moving: Callable[[], int]
) -> None:
    old[0].properties = BasicProperties(headers={"X-Client": "shop"}, user_id="publisher")
    old[1].properties = BasicProperties(headers={"x-death": []}, user_id="admin", message_id="id")
    moving()
    first, second, *_ = (one.properties for one in rabbit.queues["takeaway"])
    user = Settings().broker.user
    kept = {"X-Client": "shop"}
    assert first == BasicProperties(headers=kept, user_id=user, delivery_mode=2)
    assert second == BasicProperties(headers={}, message_id="id", delivery_mode=2)


def test_no_more_is_moved_than_there_was_at_first(
    rabbit: Rabbit, moving: Callable[[], int]
) -> None:
    rabbit.bindings["takeaway-in", "takeaway"] = "old"
    assert moving() == len(TEXTS)
    assert rabbit.bodies("old") == TEXTS


def test_an_empty_queue_has_nothing_to_move(old: Queue, moving: Callable[[], int]) -> None:
    old.clear()
    assert moving() == 0


def test_a_queue_that_becomes_full_keeps_what_it_took_and_the_rest_stays(
    rabbit: Rabbit, moving: Callable[[], int]
) -> None:
    rabbit.full = Some(*range(151, 1000))  # type: ignore[assignment]
    stays(moving, r"took 150 messages, and not the next: it is full.*Basic\.Nack")
    assert (rabbit.bodies(), rabbit.bodies("old")) == (TEXTS[:150], TEXTS[150:])


def test_one_that_is_refused_stays_and_what_was_taken_behind_it_is_in_one_queue(
    rabbit: Rabbit, moving: Callable[[], int]
) -> None:
    rabbit.full = Some(3)  # type: ignore[assignment]
    stays(moving, "took 99 messages")
    assert rabbit.bodies() == [*TEXTS[:2], *TEXTS[3:100]]
    assert rabbit.bodies("old") == [TEXTS[2], *TEXTS[100:]]


def test_what_comes_back_stays_with_all_that_wait_with_it(
    rabbit: Rabbit, moving: Callable[[], int]
) -> None:
    third = Some(3)

    class Bindings(dict[tuple[str, str], str]):
        def get(self, key: Any, default: Any = None) -> Any:
            return None if third else super().get(key, default)

    rabbit.bindings = Bindings(rabbit.bindings)
    stays(moving, "took 0 messages.*no queue 'takeaway' is bound to the exchange 'takeaway-in'")
    assert rabbit.bodies("old") == TEXTS
    assert rabbit.acked == []


def test_a_missing_queue_is_told(rabbit: Rabbit, moving: Callable[[], int]) -> None:
    del rabbit.queues["old"]
    stays(moving, "no queue 'old'")


@pytest.mark.parametrize("side", [0, 1])
def test_a_connection_that_is_lost_loses_nothing(
    rabbit: Rabbit, wires: list[Wire], moving: Callable[[], int], side: int
) -> None:
    class Cut(Some):
        def __bool__(self) -> bool:
            if super().__bool__():
                gevent.spawn(wires[side].lose)
            return False

    rabbit.full = Cut(150)  # type: ignore[assignment]
    stays(moving, "took [12]|cannot be reached|did not answer|was closed")
    assert {*rabbit.bodies(), *rabbit.bodies("old")} == {*TEXTS}
    assert len(rabbit.acked) >= 100


@pytest.mark.parametrize(
    ("window", "room", "expected"),
    [(1, 99, "PAPAPAPAPA"), (2, 99, "PPAAPPAAPA"), (9, 3, "PPPAAAPPAA"), (9, 99, "PPPPPAAAAA")],
)
def test_no_more_than_a_window_waits_for_its_confirms(
    rabbit: Rabbit,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    room: int,
    expected: str,
) -> None:
    monkeypatch.setattr(resend, "WINDOW_BYTES", room)
    wire = rabbit.connect(broker)
    wire.prompt = True
    rabbit.publish(*TEXTS[:5], queue="takeaway.dead")
    assert gevent.spawn(send, broker, window).get(timeout=2) == 5
    methods = [one for write in wire.writes for one in write]
    kinds = {Basic.Publish: "P", Basic.Ack: "A"}
    assert "".join(kinds.get(type(one), "") for one in methods) == expected


def send(broker: Broker, window: int) -> int:
    """Send takeaway.dead's messages to takeaway."""
    with own_channel(broker, 1, "it") as channel:
        got = resend.deliveries(broker, channel, "takeaway.dead", 1, 9)
        return resend.Resend(channel, "takeaway-in", "takeaway", "u", 1).send(got, window)


def test_a_confirm_is_of_one_or_of_all_before_and_they_come_in_any_order(
    rabbit: Rabbit, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = rabbit.connect(broker)
    wire.prompt = True
    say = wire.peer.say
    answers = {3: [Basic.Ack(3, multiple=True)], 5: [Basic.Ack(5), Basic.Nack(4)]}

    def confirm(number: int, method: Any) -> None:
        some = answers.get(method.delivery_tag, []) if isinstance(method, Basic.Ack) else [method]
        for one in some:
            say(number, one)

    monkeypatch.setattr(wire.peer, "say", confirm)
    rabbit.publish(*TEXTS[:5], queue="takeaway.dead")
    with pytest.raises(BrokerUnavailable, match="took 4 messages"):
        gevent.spawn(send, broker, 5).get(timeout=2)
    assert rabbit.bodies("takeaway.dead") == [TEXTS[3]]


def run(port: int, *names: str) -> tuple[int, str, str]:
    """Return status, output and errors of the program."""
    env = {
        "RABBITMQ_USER": "u",
        "RABBITMQ_PASSWORD": "p",
        "RABBITMQ_HOST": "127.0.0.1",
        "RABBITMQ_PORT": str(port),
        "READER_USER": "admin",
        "READER_PASSWORD": "q",
        "PYTHONPATH": os.pathsep.join(["apps/subscriber", "apps/door", "apps/common"]),
    }
    command = [sys.executable, "-m", "subscriber.move", *names]
    done = subprocess.run(
        command, env=env, cwd=PROJECT, capture_output=True, text=True, timeout=20, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.usefixtures("old")
def test_the_program_says_how_many_it_moved(rabbit: Rabbit, rabbit_port: int) -> None:
    assert run(rabbit_port, "old", "takeaway") == (
        0,
        "moved 250 messages from old to takeaway\n",
        "",
    )
    assert rabbit.bodies() == TEXTS


def test_the_program_tells_what_went_wrong_in_one_line(rabbit_port: int) -> None:
    for port, names, why in [
        (rabbit_port, ("nowhere", "takeaway"), "no queue 'nowhere'"),
        (1, ("old", "takeaway"), "no connection to the broker as admin"),
        (rabbit_port, ("old",), "usage: "),
    ]:
        status, output, errors = run(port, *names)
        assert (status, output) == (1, "")
        assert why in errors
        assert errors.count("\n") == 1
