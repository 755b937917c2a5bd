"""What the queues beside the default one promise over HTTP; RabbitMQ is in memory."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from door.memory import MIB, Memory
from flask.testing import FlaskClient
from pika.spec import Basic, Channel, Connection
from subscriber.app import create_app
from subscriber.broker import Broker
from subscriber.settings import Settings
from werkzeug.test import TestResponse

from .conftest import Events, Rabbit, Wire

MEMORY = Memory(2**40)
NAMES = ["takeaway", "pizza", "pasta"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "queues.json"
    write(path, NAMES)
    return path


def write(path: Path, names: list[str]) -> None:
    """Put another file in the place of the one at path."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"queues": names, "topics": []}))
    os.replace(new, path)


@pytest.fixture
def receive_timeout() -> float:
    return 1


@pytest.fixture
def settings(path: Path, receive_timeout: float) -> Settings:
    return Settings(queues_file=path, receive_timeout=receive_timeout)


@pytest.fixture
def wire(rabbit: Rabbit, broker: Broker) -> Wire:
    rabbit.add(*NAMES[1:])
    wire = rabbit.connect(broker)
    wire.prompt = True
    return wire


@pytest.fixture
def client(broker: Broker, settings: Settings, wire: Wire, events: Events) -> Iterator[FlaskClient]:
    assert wire.connection.is_open

    yield create_app(broker, settings, MEMORY, events).test_client()
    assert broker.up, "the connection was not to blame"
    assert len(wire.sent(Connection.Open)) == 1


def get(client: FlaskClient, path: str) -> Any:
    """Start a GET of its own client; on return it waits or has its answer."""
    request = gevent.spawn(client.application.test_client().get, path)
    gevent.sleep(0.01)
    return request


def text(answer: TestResponse) -> str:
    assert answer.status_code == 200, answer.text
    return answer.text


def answers_at_once(client: FlaskClient, path: str, expected: str) -> None:
    begin = time.monotonic()
    assert text(client.get(path)) == expected
    assert time.monotonic() - begin < 0.3


PIZZA, PASTA = "/queues/pizza/messages", "/queues/pasta/messages"
EMPTY = "No message available\n"


def lease(client: FlaskClient, path: str = PIZZA) -> str:
    answer = client.get(f"{path}?ack=manual")
    assert text(answer) != EMPTY
    return answer.headers["X-Receipt"]


def test_messages_of_queues_do_not_mix(client: FlaskClient, rabbit: Rabbit) -> None:
    for name in NAMES:
        rabbit.publish(*[f"{name} {number}".encode() for number in range(20)], queue=name)
    for number in range(3):
        assert text(client.get("/receive")) == f"takeaway {number}\n"
        assert text(client.get(PIZZA)) == f"pizza {number}\n"
    for path, name in (PIZZA, "pizza"), (PASTA, "pasta"), ("/receive", "takeaway"):
        lines = client.get(f"{path}?max=99").text.splitlines()
        bodies = [json.loads(line)["body"] for line in lines]
        first = 0 if name == "pasta" else 3
        assert bodies == [f"{name} {number}" for number in range(first, 20)]
    gevent.idle()
    assert len(rabbit.acked) == 60


def test_the_default_queue_is_reached_by_its_name_too(client: FlaskClient, rabbit: Rabbit) -> None:
    rabbit.publish(b"a", b"b")
    receipt = lease(client, "/queues/takeaway/messages")
    assert client.post("/ack", json={"receipt": receipt}).status_code == 200
    receipt = lease(client, "/receive")
    assert client.post("/queues/takeaway/ack", json={"receipt": receipt}).status_code == 200


@pytest.mark.parametrize(
    ("route", "answer", "left"),
    [
        ("ack", {"acknowledged": 1}, []),
        ("extend", {"extended": 1}, []),
        ("reject", {"rejected": 1}, [b"a"]),
    ],
)
def test_a_receipt_is_good_for_its_own_queue_alone(
    client: FlaskClient, rabbit: Rabbit, route: str, answer: dict[str, int], left: list[bytes]
) -> None:
    rabbit.publish(b"a", queue="pizza")
    receipt = lease(client)
    for other in f"/{route}", f"/queues/pasta/{route}":
        gone = client.post(other, json={"receipt": receipt})
        assert gone.status_code == 410
        assert json.loads(gone.data)["gone"] == [receipt]
    done = client.post(f"/queues/pizza/{route}", json={"receipt": receipt})
    assert (done.status_code, done.json) == (200, answer)
    gevent.idle()
    assert rabbit.bodies("pizza") == left
    assert rabbit.acked == ([b"a"] if route == "ack" else [])


def test_each_event_names_its_queue(client: FlaskClient, rabbit: Rabbit, events: Events) -> None:
    rabbit.publish(b"a", queue="pizza")
    client.post("/queues/pizza/ack", json={"receipt": lease(client)})
    client.get("/queues/pasta/messages")
    assert [event["queue"] for event in events] == ["pizza", "pizza", "pasta"]


# Dead queues.


def test_each_queue_has_a_dead_queue_of_its_own(client: FlaskClient, rabbit: Rabbit) -> None:
    rabbit.publish(b"a", b"b", queue="pizza.dead")
    rabbit.publish(b"c", queue="takeaway.dead")
    seen = client.get("/queues/pizza/dead?max=9").text.splitlines()
    assert [json.loads(line)["body"] for line in seen] == ["a", "b"]
    assert client.get("/queues/pasta/dead").status_code == 204
    assert client.post("/queues/pizza/dead/redrive?max=1").json == {"redriven": 1}
    assert client.post("/queues/pasta/dead/redrive").json == {"redriven": 0}
    assert text(client.get(PIZZA)) == "a\n"
    assert rabbit.bodies("pizza.dead") == [b"b"]
    assert rabbit.bodies("takeaway.dead") == [b"c"]


def test_what_is_rejected_is_among_its_queue_s_dead(client: FlaskClient, rabbit: Rabbit) -> None:
    rabbit.publish(b"a", queue="pizza")
    body = {"receipt": lease(client), "requeue": False}
    assert client.post("/queues/pizza/reject", json=body).status_code == 200
    assert json.loads(client.get("/queues/pizza/dead").text)["body"] == "a"


# Which queues there are.


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "messages"),
        ("POST", "ack"),
        ("POST", "extend"),
        ("POST", "reject"),
        ("GET", "dead"),
        ("POST", "dead/redrive"),
    ],
)
def test_a_queue_that_is_not_in_the_file_is_unknown(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, method: str, route: str
) -> None:
    rabbit.add("secret")
    before = len(wire.writes)
    answer = client.open(f"/queues/secret/{route}", method=method)
    assert answer.status_code == 404
    assert answer.json == {"message": "There is no queue 'secret'."}
    assert len(wire.writes) == before


@pytest.mark.parametrize("receive_timeout", [2])
def test_a_queue_that_is_added_to_the_file_is_served_within_a_second(
    client: FlaskClient, rabbit: Rabbit, path: Path
) -> None:
    rabbit.add("soup")
    rabbit.publish(b"a", queue="soup")
    assert client.get("/queues/soup/messages").status_code == 404
    write(path, [*NAMES, "soup"])
    end = time.monotonic() + 1.1
    while (answer := client.get("/queues/soup/messages")).status_code == 404:
        assert time.monotonic() < end
        gevent.sleep(0.02)
    assert text(answer) == "a\n"


def test_a_queue_that_was_removed_from_the_file_takes_back_what_was_leased(
    broker: Broker,
    settings: Settings,
    wire: Wire,
    rabbit: Rabbit,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert wire.connection.is_open
    monkeypatch.setattr("subscriber.leases.TICK", 0.05)
    lasting = Settings(queues_file=path, receive_timeout=1, lease_seconds=2)
    client = create_app(broker, lasting, MEMORY, None).test_client()
    assert settings.queues_file == path
    rabbit.publish(b"a", queue="pizza")
    receipt = lease(client)
    write(path, ["takeaway"])
    gevent.sleep(1.1)
    assert client.get(PIZZA).status_code == 404
    assert client.post("/queues/pizza/ack", json={"receipt": receipt}).status_code == 404
    assert rabbit.bodies("pizza") == []
    end = time.monotonic() + 2
    while not rabbit.bodies("pizza"):
        assert time.monotonic() < end
        gevent.sleep(0.02)


# One queue holds up no other.


def test_a_queue_whose_answer_is_slow_leaves_the_others_answering(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a", b"b", queue="pasta")
    rabbit.publish(b"d")
    rabbit.slow.add("pizza")
    slow = [get(client, path) for path in (PIZZA, f"{PIZZA}?wait=5", f"{PIZZA}?max=9")]
    answers_at_once(client, PASTA, "a\n")
    receipt = lease(client, PASTA)
    gevent.sleep(0.8)
    answers_at_once(client, "/receive", "d\n")
    for one in slow:
        answer = one.get(timeout=2)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert "did not answer in time" in answer.json["message"]
    # It was given up alone: leases of others are good, and its next request has a new channel.
    assert client.post("/queues/pasta/ack", json={"receipt": receipt}).status_code == 200
    rabbit.slow.clear()
    rabbit.publish(b"c", queue="pizza")
    answers_at_once(client, PIZZA, "c\n")
    assert wire.sent(Channel.Close)


def test_an_answer_that_comes_after_the_channel_was_given_up_is_nobody_s(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.slow.add("pizza")
    wire.peer.deaf = (Channel.Close,)
    late = get(client, PIZZA)
    old = max(wire.connection._channels)
    gevent.sleep(0.5)
    client.get(PASTA)
    assert late.get(timeout=2).status_code == 503
    gevent.sleep(0.05)
    wire.prompt = False
    rabbit.slow.clear()
    rabbit.publish(b"a", queue="pizza")
    again = get(client, PIZZA)
    wire.answer(1)  # the new channel is open, and its get on the way
    with gevent.Timeout(5):
        while not wire.answers:
            gevent.sleep(0.01)
    (answer,) = wire.answers
    wire.answers.clear()
    wire.peer.say(old, Basic.GetEmpty())
    wire.answer()
    assert not again.ready()
    wire.answers.append(answer)
    wire.answer()
    assert text(again.get(timeout=2)) == "a\n"


def test_a_channel_that_does_not_open_is_given_up_alone(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a", b"b", queue="pasta")
    answers_at_once(client, PASTA, "a\n")
    wire.peer.deaf = (Channel.Open,)
    begin = time.monotonic()
    waiting = [get(client, PIZZA) for _ in range(3)]
    gevent.sleep(0.5)
    answers_at_once(client, PASTA, "b\n")
    assert [one.get(timeout=2).status_code for one in waiting] == [503] * 3
    assert 0.9 < time.monotonic() - begin < 2
    wire.peer.deaf = ()
    rabbit.publish(b"c", queue="pizza")
    answers_at_once(client, PIZZA, "c\n")


def test_a_dead_queue_whose_channel_does_not_open_ends_no_other(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a", b"b", queue="pasta")
    answers_at_once(client, PASTA, "a\n")
    wire.peer.deaf = (Channel.Open,)
    look = get(client, "/queues/pizza/dead")
    number = max(wire.connection._channels)
    gevent.sleep(0.5)
    answers_at_once(client, PASTA, "b\n")
    assert look.get(timeout=2).status_code == 503
    wire.peer.deaf = ()
    wire.peer.say(number, Channel.OpenOk())
    wire.answer()
    assert number not in wire.connection._channels, "no channel is left open"


def test_a_burst_of_one_queue_leaves_the_others_answering(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(*[b"%d" % number for number in range(50)], queue="pizza")
    rabbit.publish(b"a", queue="pasta")
    assert text(client.get(PIZZA)) == "0\n"
    wire.prompt = False
    batch = get(client, f"{PIZZA}?max=40")
    while not wire.sent(Basic.Consume):
        wire.answer(1)
    # Its messages are on their way; what is asked now is answered behind them, not after it.
    other = get(client, PASTA)
    del rabbit.queues["pizza"][:]  # the burst cannot go on
    wire.prompt = True
    wire.answer()
    assert text(other.get(timeout=0.3)) == "a\n"
    assert len(batch.get(timeout=3).text.splitlines()) > 10


@pytest.mark.parametrize("receive_timeout", [2])
def test_a_backlog_of_requests_of_one_queue_leaves_the_others_answering(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    rabbit.slow.add("pizza")
    rabbit.publish(b"a", queue="pasta")
    waiting = [gevent.spawn(client.application.test_client().get, PIZZA) for _ in range(100)]
    gevent.sleep(0.5)
    answers_at_once(client, PASTA, "a\n")
    assert {one.get(timeout=5).status_code for one in waiting} == {503}


# A queue whose channel the broker closes.


def test_a_queue_that_the_broker_does_not_know_is_unavailable_alone(
    client: FlaskClient, rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    rabbit.publish(b"a", queue="pasta")
    receipt = lease(client, PASTA)
    poll = get(client, f"{PASTA}?wait=5")
    lost = rabbit.queues.pop("pizza")
    for path in PIZZA, f"{PIZZA}?wait=5", f"{PIZZA}?max=9":
        answer = client.get(path)
        assert answer.status_code == 503
        assert "no queue 'pizza'" in (answer.json or {})["message"]
        assert answer.headers["Retry-After"]
    assert client.post("/queues/pasta/ack", json={"receipt": receipt}).status_code == 200
    assert not poll.ready()
    told = [one for one in caplog.messages if "'pizza'" in one]
    assert len(told) == 1
    # It comes back.
    rabbit.queues["pizza"] = lost
    rabbit.publish(b"b", queue="pizza")
    answers_at_once(client, PIZZA, "b\n")
    gevent.sleep(0.01)  # until it is acknowledged
    del rabbit.queues["pizza"]
    assert client.get(PIZZA).status_code == 503
    assert len([one for one in caplog.messages if "'pizza'" in one]) == 2
    rabbit.publish(b"c", queue="pasta")
    assert text(poll.get(timeout=1)) == "c\n"


def test_a_channel_that_the_broker_closes_ends_its_waits_and_leases_alone(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    rabbit.publish(b"a", queue="pizza")
    rabbit.publish(b"a", queue="pasta")
    receipt, other = lease(client), lease(client, PASTA)
    (number,) = [
        number
        for number, unsettled in wire.peer.unsettled.items()
        if any(one.queue == "pizza" for one in unsettled.values())
    ]
    poll, other_poll = get(client, f"{PIZZA}?wait=5"), get(client, f"{PASTA}?wait=5")
    wire.peer.close(number, 406, "PRECONDITION_FAILED - delivery acknowledgement timed out")
    wire.answer()
    answer = poll.get(timeout=1)
    assert answer.status_code == 503
    assert "acknowledgement timed out" in answer.json["message"]
    assert client.post("/queues/pizza/ack", json={"receipt": receipt}).status_code == 410
    assert client.post("/queues/pasta/ack", json={"receipt": other}).status_code == 200
    assert not other_poll.ready()
    answers_at_once(client, PIZZA, "a\n")
    other_poll.kill()


def test_a_lost_connection_ends_the_waits_of_all_queues_and_they_go_on_with_the_next(
    client: FlaskClient, broker: Broker, rabbit: Rabbit, wire: Wire
) -> None:
    for name in NAMES:
        rabbit.publish(name.encode(), queue=name)
    paths = [f"/queues/{name}" for name in NAMES]
    receipts = [lease(client, f"{path}/messages") for path in paths]
    polls = [get(client, f"{path}/messages?wait=9") for path in paths]
    wire.lose()
    broker.lost("gone")
    for poll in polls:
        answer = poll.get(timeout=1)
        assert (answer.status_code, answer.json["message"]) == (503, "the broker was lost: gone")
    assert client.get(PIZZA).status_code == 503
    rabbit.connect(broker).prompt = True
    for path, name, receipt in zip(paths, NAMES, receipts, strict=True):
        assert client.post(f"{path}/ack", json={"receipt": receipt}).status_code == 410
        assert text(client.get(f"{path}/messages")) == f"{name}\n"


# Many queues.


@pytest.mark.parametrize("receive_timeout", [4])
def test_each_of_many_queues_has_one_channel(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, path: Path
) -> None:
    names = [f"q{number}" for number in range(300)]
    write(path, names)
    gevent.sleep(1.1)
    rabbit.add(*names)
    for name in names:
        rabbit.publish(name.encode(), queue=name)
    requests = [
        gevent.spawn(client.application.test_client().get, f"/queues/{name}/messages")
        for name in names
    ]
    assert [text(one.get(timeout=9)) for one in requests] == [f"{name}\n" for name in names]
    for name in names:
        assert text(client.get(f"/queues/{name}/messages")) == EMPTY
    assert sum(map(len, wire.sent(Channel.Open))) == 1 + 300


def gets(wire: Wire) -> int:
    return sum(map(len, wire.sent(Basic.Get)))


@pytest.mark.parametrize(("queues", "least", "most"), [(1, 15, 21), (5, 70, 101), (50, 70, 101)])
def test_long_polls_look_into_all_queues_a_hundred_times_a_second(
    client: FlaskClient,
    rabbit: Rabbit,
    wire: Wire,
    path: Path,
    queues: int,
    least: int,
    most: int,
) -> None:
    names = [f"q{number}" for number in range(queues)]
    write(path, names)
    gevent.sleep(1.1)
    rabbit.add(*names)
    polls = [get(client, f"/queues/{name}/messages?wait=9") for name in names]
    gevent.sleep(0.1)
    before = gets(wire)
    gevent.sleep(1)
    assert least <= gets(wire) - before <= most
    for name in names:
        rabbit.publish(name.encode(), queue=name)
    assert [text(one.get(timeout=2)) for one in polls] == [f"{name}\n" for name in names]


def test_long_polls_are_bounded_over_all_queues(
    rabbit: Rabbit, path: Path, receive_timeout: float
) -> None:
    memory = Memory(240 * 1024)  # room for 5
    settings = Settings(queues_file=path, receive_timeout=receive_timeout)
    broker = Broker(settings, memory)
    rabbit.add(*NAMES[1:])
    rabbit.connect(broker).prompt = True
    client = create_app(broker, settings, memory, None).test_client()
    polls = [get(client, f"/queues/{name}/messages?wait=9") for name in [*NAMES, *NAMES[1:]]]
    assert not any(one.ready() for one in polls)
    assert client.get(f"{PIZZA}?wait=9").status_code == 503
    assert text(client.get(PIZZA)) == EMPTY
    rabbit.publish(b"a", queue="pasta")
    assert text(polls[2].get(timeout=1)) == "a\n"
    assert not get(client, f"{PIZZA}?wait=9").ready(), "there is a place again"
    broker.finish()
    gevent.sleep(0.1)
    broker.lost("the test is over")
    gevent.sleep(0.01)


def test_while_memory_is_short_one_message_comes_from_all_queues_together(
    rabbit: Rabbit, path: Path, receive_timeout: float
) -> None:
    memory = Memory(8 * MIB)
    settings = Settings(queues_file=path, receive_timeout=receive_timeout)
    broker = Broker(settings, memory)
    rabbit.add(*NAMES[1:])
    rabbit.connect(broker).prompt = True
    for name in NAMES:
        rabbit.publish(b"x" * MIB, queue=name)
    memory.held = 7 * MIB
    requests = [gevent.spawn(broker.queue(name).get) for name in NAMES]
    gevent.sleep(0.1)
    assert [bool(rabbit.bodies(name)) for name in NAMES] == [False, True, True]
    memory.held -= 5 * MIB
    for request in requests:
        (delivery,) = request.get(timeout=1)
        delivery.close()
    broker.lost("the test is over")
    gevent.sleep(0.05)


# The end.


def test_at_the_end_all_queues_are_settled_and_their_long_polls_answered(
    client: FlaskClient,
    broker: Broker,
    rabbit: Rabbit,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subscriber.broker.SETTLE", 0.3)
    monkeypatch.setattr("subscriber.fetch.BURST_TIMEOUT", 9)
    polls = [get(client, f"/queues/{name}/messages?wait=9") for name in NAMES]
    broker.finish()
    assert [text(one.get(timeout=1)) for one in polls] == [EMPTY] * 3
    for name in NAMES:
        rabbit.publish(name.encode(), *[b"more"] * 20, queue=name)
    receipts = {name: lease(client, f"/queues/{name}/messages") for name in NAMES}
    gevent.sleep(0.05)
    wire.prompt = False
    bursts = [get(client, f"/queues/{name}/messages?max=9") for name in NAMES]
    wire.answer(len(NAMES))  # a message for each, of many
    for name in NAMES:
        del rabbit.queues[name][2:]  # before the consumers have begun
    wire.answer()
    assert len(wire.sent(Basic.Consume)) == len(NAMES)
    for name in NAMES:
        assert client.post(f"/queues/{name}/ack", json={"receipt": receipts[name]}).json
    gevent.idle()
    assert rabbit.acked == [], "a burst under way comes first"
    closed: list[float] = []
    monkeypatch.setattr(wire.connection, "close", lambda: closed.append(time.monotonic()))
    wire.prompt = True
    begin = time.monotonic()
    broker.stop()
    assert 0.3 <= closed[0] - begin < 0.7, "the time to settle is waited once"
    assert {name.encode() for name in NAMES} <= set(rabbit.acked)
    gevent.joinall(bursts, timeout=1)


def test_at_the_end_the_acknowledgements_of_each_queue_are_given_time(
    client: FlaskClient,
    broker: Broker,
    rabbit: Rabbit,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subscriber.broker.SETTLE", 0.3)
    for path in "/receive", PASTA:
        assert text(client.get(path)) == EMPTY
    rabbit.publish(b"a", queue="pasta")
    closed: list[float] = []
    monkeypatch.setattr(wire.connection, "close", lambda: closed.append(time.monotonic()))
    assert text(client.get(PASTA)) == "a\n"  # which is acknowledged at the end of the turn
    begin = time.monotonic()
    broker.stop()
    assert rabbit.acked == [b"a"]
    assert closed[0] - begin >= 0.25
