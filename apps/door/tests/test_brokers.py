# mypy: disable-error-code=no-untyped-call
"""What a door does with several brokers; real pika, and TLS to all but the first."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from door.amqp import Channel, ChannelClosedByBroker, Link
from door.metrics import BROKER_UP, broker_own
from door.settings import BrokerSettings
from gevent.server import StreamServer
from pika.spec import Channel as ChannelMethods
from pika.spec import Connection as ConnectionMethods
from small_broker import SmallBroker, certified


def eventually(condition: Callable[[], bool], seconds: float = 3) -> None:
    """Let greenlets run until condition holds; fail after seconds."""
    with gevent.Timeout(seconds):
        while not condition():
            gevent.sleep(0.005)


class PatientLink(Link):
    """Says itself when it is idle."""

    busy = False

    @property
    def idle(self) -> bool:
        return super().idle and not self.busy


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[list[SmallBroker]]:
    tls = certified(tmp_path)
    brokers = [SmallBroker(), SmallBroker(tls), SmallBroker(tls)]
    for broker in brokers:
        broker.begin()
    yield brokers
    for broker in brokers:
        broker.awake.set()
        broker.end()


Make = Callable[..., PatientLink]


@pytest.fixture
def make(
    brokers: list[SmallBroker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Return a function that starts a link to the brokers, in a hurry to move back."""
    monkeypatch.setattr("door.amqp.PROBE", (0.02, 0.04))
    monkeypatch.setattr("door.amqp.TRIAL", (0.3, 0.4))
    monkeypatch.setattr("door.amqp.DRAIN", 0.1)
    monkeypatch.setattr("door.amqp.LOOK", 0.1)
    links = []

    def make(heartbeat: int = 10, hosts: tuple[str, ...] = ("localhost", "localhost")) -> Any:
        settings = BrokerSettings(
            host="127.0.0.1",
            port=brokers[0].port,
            heartbeat=heartbeat,
            others=tuple(zip(hosts, [broker.port for broker in brokers[1:]], strict=True)),
            ca_file=str(tmp_path / "ca.pem"),
        )
        links.append(PatientLink(settings, "waiter"))
        links[-1].start()
        return links[-1]

    yield make
    for link in links:
        link.stop()


def at(link: Link, broker: SmallBroker) -> bool:
    """Whether link uses broker."""
    return link.channel is not None and link.channel.connection.params.port == broker.port


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "door.amqp"]


def test_the_own_host_s_broker_comes_first_and_then_the_others_at_once(
    make: Make, brokers: list[SmallBroker], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    link = make()
    eventually(lambda: at(link, brokers[0]))
    assert broker_own()._value.get() == 1
    for broker, successor in itertools.pairwise(brokers):
        broker.end()
        eventually(lambda: at(link, successor), 1)  # noqa: B023 - it is called here
        assert broker_own()._value.get() == 0
        assert BROKER_UP._value.get() == 1
    told = [line.partition(": ")[0] for line in lines(caplog)]
    hosts = [f"127.0.0.1:{brokers[0].port}", *[f"localhost:{one.port}" for one in brokers[1:]]]
    assert told == [
        f"Connected to the broker at {hosts[0]}",
        f"No connection to the broker at {hosts[0]}",
        f"Connected to the broker at {hosts[1]}",
        f"No connection to the broker at {hosts[1]}",
        f"Connected to the broker at {hosts[2]}",
    ]


def test_an_address_that_accepts_and_hangs_up_is_passed_by(
    make: Make, brokers: list[SmallBroker]
) -> None:
    """As docker-proxy does for a broker that is away."""
    brokers[0].end()
    proxy = StreamServer(("127.0.0.1", brokers[0].port), lambda client, _: client.close())
    proxy.start()
    link = make()
    eventually(lambda: at(link, brokers[1]), 1)
    proxy.stop()


@pytest.mark.parametrize("wrong", ["name", "ca"])
def test_a_broker_that_does_not_prove_its_name_is_passed_by(
    make: Make, brokers: list[SmallBroker], tmp_path: Path, wrong: str
) -> None:
    brokers[0].end()
    if wrong == "ca":
        other = tmp_path / "other"
        other.mkdir()
        brokers[1].end()
        brokers[1] = SmallBroker(certified(other))
        brokers[1].begin()
    link = make(hosts=("127.0.0.1" if wrong == "name" else "localhost", "localhost"))
    eventually(lambda: at(link, brokers[2]), 1)
    assert brokers[1].methods == []


def test_a_broker_that_accepts_and_is_silent_is_passed_by(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].awake.clear()
    link = make()
    eventually(lambda: at(link, brokers[1]), 5)


@pytest.mark.parametrize("first", [True, False])
def test_a_broker_that_falls_silent_is_left_after_two_heartbeats(
    make: Make, brokers: list[SmallBroker], first: bool
) -> None:
    """Also where pika's own reckoning, of 6 seconds and more, would wait longer."""
    if not first:
        brokers[0].end()
    frozen, successor = brokers[:2] if first else brokers[1:]
    link = make(heartbeat=1)
    eventually(lambda: at(link, frozen))
    gevent.sleep(2.5)
    assert at(link, frozen)  # it answers heartbeats
    frozen.awake.clear()
    since = time.monotonic()
    eventually(lambda: at(link, successor), 4)
    assert time.monotonic() - since > 1


def test_after_a_drop_another_broker_is_tried_first(make: Make, brokers: list[SmallBroker]) -> None:
    link = make()
    eventually(lambda: at(link, brokers[0]))
    brokers[0].awake.clear()
    link.drop(TimeoutError("silence"))
    eventually(lambda: at(link, brokers[1]), 1)


def test_a_broker_that_closes_the_channel_is_left(make: Make, brokers: list[SmallBroker]) -> None:
    link = make()
    eventually(lambda: at(link, brokers[0]))
    brokers[0].send(1, ChannelMethods.Close(541, "INTERNAL_ERROR", 0, 0))
    eventually(lambda: at(link, brokers[1]), 1)


def test_the_door_returns_to_its_own_broker_once_that_lasts(
    make: Make, brokers: list[SmallBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    brokers[0].end()
    link = make()
    monkeypatch.setattr("door.amqp.SETTLE", 0.3)
    monkeypatch.setattr("door.amqp.TRIAL", (0.5, 0.6))
    eventually(lambda: at(link, brokers[1]))
    brokers[0].begin()
    since = time.monotonic()
    eventually(lambda: at(link, brokers[0]))
    assert time.monotonic() - since > 0.3
    assert broker_own()._value.get() == 1
    # What was acknowledged a moment ago is still taken; then there is a good-bye.
    assert brokers[1].told(ConnectionMethods.Close) == 0
    eventually(lambda: brokers[1].told(ConnectionMethods.Close) == 1)
    gevent.sleep(0.5)
    assert at(link, brokers[0])
    assert brokers[0].told(ConnectionMethods.StartOk) == 1
    # What ends now is the new connection.
    brokers[0].end()
    eventually(lambda: at(link, brokers[1]))


def test_a_broker_that_comes_and_goes_is_not_returned_to(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    link = make()
    eventually(lambda: at(link, brokers[1]))
    for _ in range(4):
        brokers[0].begin()
        eventually(lambda: brokers[0].clients > 0)
        gevent.sleep(0.1)
        brokers[0].end()
        assert at(link, brokers[1])
    assert brokers[1].told(ConnectionMethods.StartOk) == 1


def test_a_broker_that_is_silent_again_is_not_returned_to(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    link = make()
    eventually(lambda: at(link, brokers[1]))
    brokers[0].begin()
    eventually(lambda: brokers[0].told(ChannelMethods.Open) == 1)
    brokers[0].awake.clear()
    gevent.sleep(0.8)
    assert at(link, brokers[1])
    brokers[0].awake.set()
    eventually(lambda: at(link, brokers[0]))


def test_a_busy_door_stays_until_it_is_idle(make: Make, brokers: list[SmallBroker]) -> None:
    brokers[0].end()
    link = make()
    link.busy = True
    eventually(lambda: at(link, brokers[1]))
    brokers[0].begin()
    eventually(lambda: brokers[0].clients == 1)
    gevent.sleep(0.8)
    assert at(link, brokers[1])
    assert brokers[0].told(ConnectionMethods.StartOk) == 1  # not anew for each attempt
    link.busy = False
    eventually(lambda: at(link, brokers[0]))


def test_a_broker_that_served_nobody_must_last_longer_the_next_time(
    make: Make, brokers: list[SmallBroker]
) -> None:
    """One without a majority takes connections, too."""
    link = make()
    waits = []
    for served in False, False, True:
        eventually(lambda: at(link, brokers[0]))
        if served:
            link.alive()
        link.drop(TimeoutError("no confirm"))
        eventually(lambda: at(link, brokers[1]))
        since = time.monotonic()
        eventually(lambda: at(link, brokers[0]))
        waits.append(time.monotonic() - since)
    assert waits[0] > 0.4
    assert waits[1] > 0.8
    assert waits[2] < min(waits[:2])


def test_a_stopped_door_says_good_bye_to_both_brokers(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    link = make()
    link.busy = True
    eventually(lambda: at(link, brokers[1]))
    brokers[0].begin()
    eventually(lambda: brokers[0].told(ChannelMethods.Open) == 1)
    gevent.sleep(0.05)
    link.stop()
    eventually(lambda: [one.told(ConnectionMethods.Close) for one in brokers] == [1, 1, 0])
    gevent.sleep(0.3)
    assert brokers[0].told(ConnectionMethods.StartOk) == 1


def test_by_tls_all_that_a_block_sends_arrives_and_the_unwritten_is_counted(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    link = make()
    eventually(lambda: at(link, brokers[1]))
    assert link.channel is not None
    channel: Channel = link.channel
    bodies = [bytes([number]) * 100_000 for number in range(100)]
    for _ in range(3):
        with channel.connection.joined():
            for body in bodies:
                channel.basic_publish("e", "k", body)
            assert channel.connection.unwritten == 0
        assert channel.connection.unwritten > 1_000_000
        eventually(lambda: channel.connection.unwritten == 0)
    eventually(lambda: brokers[1].bodies == 3 * bodies)
    channel.basic_publish("e", "k", b"x" * 16_000_000)
    link.drop(TimeoutError("silence"))
    eventually(lambda: channel.connection.unwritten == 0)
    eventually(lambda: at(link, brokers[2]))
    assert brokers[1].told(ConnectionMethods.Close) == 0


class ScriptedLink(Link):
    """Fails each attempt, but for those whose place the script says; notes attempts and pauses."""

    def __init__(self, script: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(BrokerSettings(others=(("h2", 1), ("h3", 1))), "waiter")
        self.noted: list[float] = []
        self._script = script
        monkeypatch.setattr("door.amqp.gevent.sleep", self.noted.append)

    def _hold_connection(self) -> Exception:
        self.noted.append(self._place)
        match self._script.pop(0):
            case "alive":
                self.alive()
            case "long":
                self.ready(None)  # type: ignore[arg-type]
                self._since -= 60
            case "short":
                self.ready(None)  # type: ignore[arg-type]
        self._stopping = not self._script
        return OSError("away")


@pytest.mark.parametrize(
    ("script", "noted"),
    [
        ([""] * 7, [0, 1, 2, 0.2, 0, 1, 2, 0.4, 0]),
        (["", "short", "short", "short"], [0, 1, 2, 0.2, 0]),
        (["", "", "long", "", "", ""], [0, 1, 2, 0, 1, 0.2, 2]),
        ([""] * 3 + ["alive", "", "", ""], [0, 1, 2, 0.2, 0, 1, 2, 0.2, 0]),
    ],
)
def test_a_pause_comes_after_all_brokers_have_failed_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, script: list[str], noted: list[float]
) -> None:
    link = ScriptedLink(script, monkeypatch)
    link._keep_connected()
    assert link.noted == pytest.approx(noted)


def test_each_broker_s_new_reason_has_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ScriptedLink([""] * 7, monkeypatch)._keep_connected()
    addresses = ["localhost:5672", "h2:1", "h3:1"]
    assert lines(caplog) == [
        f"No connection to the broker at {one}: OSError('away')" for one in addresses
    ]


def test_a_channel_s_end_on_the_connection_before_the_last_is_no_loss(
    make: Make, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    link = make()
    eventually(lambda: at(link, brokers[1]))
    old = link.channel
    brokers[0].begin()
    eventually(lambda: at(link, brokers[0]))
    link._channel_closed(old, ChannelClosedByBroker(541, "INTERNAL_ERROR"))
    gevent.sleep(0.1)
    assert at(link, brokers[0])
