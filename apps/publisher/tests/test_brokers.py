# mypy: disable-error-code=no-untyped-call
"""What a publisher promises with several brokers; real pika, and small brokers that confirm."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from door.settings import BrokerSettings
from publisher.broker import Broker, Unconfirmed
from publisher.message import Message, Target
from publisher.settings import Settings
from small_broker import SmallBroker, certified

QUEUE = Target("takeaway-in", "takeaway")


def eventually(condition: Callable[[], bool], seconds: float = 3) -> None:
    """Let greenlets run until condition holds; fail after seconds."""
    with gevent.Timeout(seconds):
        while not condition():
            gevent.sleep(0.005)


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[list[SmallBroker]]:
    brokers = [SmallBroker(), SmallBroker(certified(tmp_path))]
    for broker in brokers:
        broker.begin()
    yield brokers
    for broker in brokers:
        broker.end()


@pytest.fixture
def publisher(
    brokers: list[SmallBroker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Broker]:
    monkeypatch.setattr("door.amqp.PROBE", (0.02, 0.04))
    monkeypatch.setattr("door.amqp.TRIAL", (0.3, 0.4))
    settings = BrokerSettings(
        host="127.0.0.1",
        port=brokers[0].port,
        others=(("localhost", brokers[1].port),),
        ca_file=str(tmp_path / "ca.pem"),
    )
    publisher = Broker(Settings(broker=settings, confirm_timeout=0.5))
    publisher.start()
    yield publisher
    publisher.stop()


def at(publisher: Broker, broker: SmallBroker) -> bool:
    """Whether publisher uses broker."""
    channel = publisher.channel
    return channel is not None and channel.connection.params.port == broker.port


class Stream:
    """Clients that send one message after the other."""

    def __init__(self, publisher: Broker, clients: int) -> None:
        self._publisher = publisher
        self.confirmed: list[bytes] = []
        self.failures: list[Unconfirmed] = []
        self._clients = [gevent.spawn(self._send, number) for number in range(clients)]

    def _send(self, client: int) -> None:
        number = 0
        while True:
            number += 1
            body = f"{client} {number}".encode()
            try:
                self._publisher.publish([Message(body, f"id of {body!r}")], QUEUE)
                self.confirmed.append(body)
            except Unconfirmed as error:
                self.failures.append(error)
                gevent.sleep(0.01)

    def end(self) -> None:
        gevent.killall(self._clients)


def test_the_way_back_fails_no_request_of_a_steady_stream(
    publisher: Broker, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    eventually(lambda: at(publisher, brokers[1]))
    stream = Stream(publisher, 8)
    eventually(lambda: len(stream.confirmed) > 100)
    stream.failures.clear()
    brokers[0].begin()
    eventually(lambda: len(brokers[0].bodies) > 100, 10)
    assert at(publisher, brokers[0])
    stream.end()
    assert stream.failures == []
    taken = [body for broker in brokers for body in broker.bodies]
    assert set(stream.confirmed) <= set(taken)
    assert len(taken) == len(set(taken))


def test_a_dead_broker_costs_what_was_under_way_and_no_more(
    publisher: Broker, brokers: list[SmallBroker]
) -> None:
    eventually(lambda: at(publisher, brokers[0]))
    stream = Stream(publisher, 8)
    eventually(lambda: len(stream.confirmed) > 100)
    brokers[0].end()
    eventually(lambda: len(brokers[1].bodies) > 100, 1)
    stream.end()
    taken = [body for broker in brokers for body in broker.bodies]
    assert set(stream.confirmed) <= set(taken)


def test_a_broker_without_a_majority_gives_no_201_and_is_left(
    publisher: Broker, brokers: list[SmallBroker]
) -> None:
    brokers[0].alone = True
    eventually(lambda: at(publisher, brokers[0]))
    with pytest.raises(Unconfirmed, match="unknown"):
        publisher.publish([Message(b"a", "a")], QUEUE)
    eventually(lambda: at(publisher, brokers[1]), 1)
    assert publisher.publish([Message(b"b", "b")], QUEUE) == 0
    assert (brokers[0].bodies, brokers[1].bodies) == ([], [b"b"])


def test_where_no_broker_has_a_majority_each_request_is_answered_in_time(
    publisher: Broker, brokers: list[SmallBroker]
) -> None:
    for broker in brokers:
        broker.alone = True
    for _ in range(5):
        with gevent.Timeout(1), pytest.raises(Unconfirmed):
            publisher.publish([Message(b"a", "a")], QUEUE)
        gevent.sleep(0.1)


def test_a_batch_under_way_keeps_the_publisher_where_it_is(
    publisher: Broker, brokers: list[SmallBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("door.amqp.DRAIN", 0.1)
    brokers[0].end()
    eventually(lambda: at(publisher, brokers[1]))
    publisher.publish([Message(b"a", "a")], QUEUE)
    held: Any = publisher._in_flight
    held.messages += 1  # as one that waits for its confirm
    brokers[0].begin()
    gevent.sleep(1)
    assert at(publisher, brokers[1])
    # Others go on.
    with gevent.Timeout(1):
        publisher.publish([Message(b"b", "b")], QUEUE)
    held.messages -= 1
    eventually(lambda: at(publisher, brokers[0]))


def test_a_block_of_the_old_connection_is_not_the_new_one_s(
    publisher: Broker, brokers: list[SmallBroker]
) -> None:
    brokers[0].end()
    eventually(lambda: at(publisher, brokers[1]))
    assert publisher.channel is not None
    old = publisher.channel.connection
    brokers[0].begin()
    eventually(lambda: at(publisher, brokers[0]))
    publisher._on_blocked(old, None)  # type: ignore[arg-type]
    assert publisher.up
