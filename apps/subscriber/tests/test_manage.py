"""What purging a queue, and redriving or deleting dead messages by their ids, promise over HTTP."""

import gc
import json
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import gevent
import pytest
from door.memory import Memory
from flask.testing import FlaskClient
from pika.spec import Basic, BasicProperties, Channel, Connection
from pika.spec import Queue as QueueMethods
from subscriber import dead
from subscriber.app import MAX_IDS, create_app
from subscriber.broker import Broker
from subscriber.delivery import Delivery
from subscriber.settings import Settings
from werkzeug.test import TestResponse, create_environ

from .conftest import Events, Message, Rabbit, Wire

PIZZA, DEAD = "/queues/pizza/messages", "/queues/pizza/dead"
PURGE = f"{PIZZA}?confirm=pizza"
REDRIVE = f"{DEAD}/redrive"
BY_ID = [("POST", REDRIVE, "redriven"), ("DELETE", DEAD, "deleted")]


@pytest.fixture
def receive_timeout() -> float:
    return 1


@pytest.fixture
def wire(rabbit: Rabbit, broker: Broker) -> Wire:
    rabbit.add("pizza")
    wire = rabbit.connect(broker)
    wire.prompt = True
    return wire


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "queues.json"
    path.write_text(json.dumps({"queues": ["takeaway", "pizza"], "topics": []}))
    return path


@pytest.fixture
def client(
    broker: Broker,
    wire: Wire,
    path: Path,
    events: Events,
    receive_timeout: float,
) -> Iterator[FlaskClient]:
    settings = Settings(queues_file=path, receive_timeout=receive_timeout)
    yield create_app(broker, settings, Memory(2**40), events).test_client()
    assert broker.up, "the connection was not to blame"
    assert len(wire.sent(Connection.Open)) == 1


def done(answer: TestResponse, **expected: int) -> None:
    assert (answer.status_code, answer.json) == (200, expected)


def refused(answer: TestResponse, status: int, text: str) -> None:
    assert answer.status_code == status
    assert text in (answer.json or {})["message"]


def release(client: FlaskClient, path: str = PIZZA) -> None:
    """Have a client take what path has, and hang up before it reads it."""
    app: Any = client.application
    app(create_environ(path), lambda *_: lambda _: None).close()


# What waits in a queue.


def test_a_purge_drops_what_waits_in_its_queue_alone(
    client: FlaskClient, rabbit: Rabbit, events: Events
) -> None:
    rabbit.publish(b"a", b"b", b"c", queue="pizza")
    rabbit.publish(b"dead", queue="pizza.dead")
    rabbit.publish(b"other")
    done(client.delete(PURGE), purged=3)
    assert rabbit.bodies("pizza") == []
    assert (rabbit.bodies("pizza.dead"), rabbit.bodies()) == ([b"dead"], [b"other"])
    done(client.delete(PURGE), purged=0)
    first = events[0]
    assert (first["event"], first["queue"], first["messages"]) == ("purge", "pizza", 3)


@pytest.mark.parametrize("query", ["", "?confirm=", "?confirm=takeaway", "?confirm=Pizza"])
def test_a_purge_that_does_not_name_its_queue_again_is_told_what_to_write(
    client: FlaskClient, rabbit: Rabbit, query: str
) -> None:
    rabbit.publish(b"a", queue="pizza")
    refused(client.delete(f"{PIZZA}{query}"), 400, "write ?confirm=pizza.")
    refused(client.delete(f"{PURGE}&all=1"), 400, "'all'")
    assert rabbit.bodies("pizza") == [b"a"]


def test_a_purge_drops_what_the_door_holds_for_the_next_request(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    rabbit.publish(b"a", b"b", b"c", queue="pizza")
    for _ in range(2):
        release(client, f"{PIZZA}?max=2")
    assert rabbit.bodies("pizza") == [b"c"], "the door holds two"
    done(client.delete(PURGE), purged=3)
    gevent.sleep(0.01)
    assert sorted(rabbit.acked) == [b"a", b"b"]
    assert client.get(PIZZA).text == "No message available\n"


def test_what_is_leased_or_on_its_way_to_a_client_stays(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    rabbit.publish(b"leased", b"on its way", b"c", queue="pizza")
    receipt = client.get(f"{PIZZA}?ack=manual").headers["X-Receipt"]
    app: Any = client.application
    body = app(create_environ(PIZZA), lambda *_: lambda _: None)
    done(client.delete(PURGE), purged=1)
    assert b"".join(body) == b"on its way\n"
    body.close()
    gevent.sleep(0.01)
    assert rabbit.acked == [b"on its way"]
    done(client.post("/queues/pizza/reject", json={"receipt": receipt}), rejected=1)
    gevent.sleep(0.01)
    assert client.get(PIZZA).text == "leased\n"


def test_many_requests_after_a_purge_hear_at_once_that_there_is_nothing(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    rabbit.publish(*[b"x"] * 100, queue="pizza")
    assert client.get(PIZZA).text == "x\n"
    done(client.delete(PURGE), purged=99)
    begin = time.monotonic()
    get = client.application.test_client().get
    requests = [gevent.spawn(get, PIZZA) for _ in range(50)]
    answers = {one.get(timeout=2).text for one in requests}
    assert answers == {"No message available\n"}
    assert time.monotonic() - begin < 0.4


def test_a_purge_closes_its_channel(client: FlaskClient, rabbit: Rabbit, wire: Wire) -> None:
    rabbit.publish(b"a", queue="pizza")
    done(client.delete(PURGE), purged=1)
    assert [len(wire.sent(kind)) for kind in (Channel.Open, Channel.Close)] == [2, 1]


@pytest.mark.parametrize("cause", ["missing", "silent"])
def test_a_purge_that_fails_keeps_what_is_held_and_ends_nothing_else(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, cause: str
) -> None:
    rabbit.publish(b"a", queue="pizza")
    release(client)
    lost = rabbit.queues["pizza"]
    if cause == "missing":
        del rabbit.queues["pizza"]
    else:
        wire.peer.deaf = (QueueMethods.Purge,)
    answer = client.delete(PURGE)
    refused(answer, 503, {"missing": "no queue 'pizza'", "silent": "did not answer"}[cause])
    assert answer.headers["Retry-After"]
    rabbit.queues["pizza"] = lost
    assert client.get(PIZZA).text == "a\n"


# Dead messages by their ids.


def die(rabbit: Rabbit, *ids: str | bytes | None, queue: str = "pizza.dead") -> None:
    """Let messages be dead; the bodies are numbers."""
    for number, one in enumerate(ids):
        body = b"%d" % number
        rabbit.queues[queue].append(Message(body, BasicProperties(message_id=one)))


@pytest.mark.parametrize(("method", "route", "done_as"), BY_ID)
@pytest.mark.parametrize(
    ("ids", "taken"),
    [
        (["b"], [1]),
        (["d", "b"], [1, 4]),
        (["a"], [0, 2]),
        (["nowhere"], []),
        (["b", "nowhere", "b"], [1]),
        (["a", "b", "c", "d"], [0, 1, 2, 3, 4]),
    ],
)
def test_the_messages_of_the_ids_go_and_the_others_stay_in_their_order(
    client: FlaskClient,
    rabbit: Rabbit,
    method: str,
    route: str,
    done_as: str,
    ids: list[str],
    taken: list[int],
) -> None:
    rabbit.publish(b"x", queue="pizza")
    die(rabbit, "a", "b", "a", "c", "d", None, b"\xff")
    done(client.open(route, method=method, json={"ids": ids}), **{done_as: len(taken)})
    gone = [b"%d" % number for number in taken]
    assert rabbit.bodies("pizza.dead") == [b"%d" % one for one in range(7) if one not in taken]
    assert rabbit.bodies("pizza") == [b"x", *(gone if method == "POST" else [])]
    assert rabbit.acked == gone


def test_the_default_queue_is_redriven_by_ids_too(client: FlaskClient, rabbit: Rabbit) -> None:
    die(rabbit, "a", "b", queue="takeaway.dead")
    done(client.post("/dead/redrive", json={"ids": ["b"]}), redriven=1)
    assert (rabbit.bodies(), rabbit.bodies("takeaway.dead")) == ([b"1"], [b"0"])


def test_without_a_body_the_oldest_are_redriven(client: FlaskClient, rabbit: Rabbit) -> None:
    die(rabbit, "a", "b", "c")
    done(client.post(f"{REDRIVE}?max=1"), redriven=1)
    done(client.post(REDRIVE), redriven=2)


def test_a_deletion_is_told(client: FlaskClient, rabbit: Rabbit, events: Any) -> None:
    die(rabbit, "a", "a")
    done(client.delete(DEAD, json={"ids": ["a"]}), deleted=2)
    (event,) = events
    assert (event["event"], event["queue"], event["messages"]) == ("delete", "pizza", 2)


@pytest.mark.parametrize(("method", "route", "_done_as"), BY_ID)
@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b'{"ids": []}',
        b'{"ids": "a"}',
        b'{"ids": null}',
        b'{"ids": ["a", 1]}',
        b'{"ids": ["a", ""]}',
        b'{"ids": ["a"], "max": 1}',
        b"ids=a",
        json.dumps({"ids": ["a", "x" * 256]}).encode(),
        json.dumps({"ids": ["a"] * (MAX_IDS + 1)}).encode(),
    ],
)
def test_a_body_that_makes_no_sense_moves_nothing(
    client: FlaskClient, rabbit: Rabbit, method: str, route: str, _done_as: str, body: bytes
) -> None:
    die(rabbit, "a")
    answer = client.open(route, method=method, data=body, content_type="application/json")
    refused(answer, 400, "")
    assert rabbit.bodies("pizza.dead") == [b"0"]
    assert rabbit.bodies("pizza") == []


def test_the_longest_list_of_the_longest_ids_is_taken(client: FlaskClient, rabbit: Rabbit) -> None:
    ids = [f"{number:0255}" for number in range(MAX_IDS)]
    die(rabbit, ids[-1], "a")
    done(client.post(REDRIVE, json={"ids": ids}), redriven=1)


def test_nobody_deletes_all_by_accident(client: FlaskClient, rabbit: Rabbit) -> None:
    die(rabbit, "a")
    assert client.delete(DEAD).status_code == 400
    refused(client.delete(f"{DEAD}?max=1", json={"ids": ["a"]}), 400, "'max'")
    assert rabbit.bodies("pizza.dead") == [b"0"]


def test_ids_and_a_number_are_not_both_given(client: FlaskClient, rabbit: Rabbit) -> None:
    die(rabbit, "a")
    refused(client.post(f"{REDRIVE}?max=1", json={"ids": ["a"]}), 400, "not both")
    assert rabbit.bodies("pizza.dead") == [b"0"]


def test_of_those_that_stay_no_body_is_kept(
    client: FlaskClient, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(rabbit, *["other"] * 50, "mine")
    most = 0

    def text(value: object) -> object:
        nonlocal most
        most = max(most, sum(isinstance(one, Delivery) for one in gc.get_objects()) - before)
        return value

    monkeypatch.setattr(dead, "text", text)
    before = sum(isinstance(one, Delivery) for one in gc.get_objects())
    done(client.delete(DEAD, json={"ids": ["mine"]}), deleted=1)
    assert 1 <= most <= 2


def test_a_message_that_the_queue_does_not_take_stays_with_the_others_in_their_order(
    client: FlaskClient, rabbit: Rabbit, wire: Wire
) -> None:
    die(rabbit, "a", "b", "c", "d")
    rabbit.full = True
    answer = client.post(REDRIVE, json={"ids": ["c"]})
    refused(answer, 503, "took 0 messages")
    assert rabbit.bodies("pizza.dead") == [b"0", b"1", b"2", b"3"]
    assert wire.sent(Basic.Publish)


# Who may.


@pytest.mark.parametrize("right", ["send", "receive", "manage"])
def test_all_of_this_needs_the_right_to_manage(
    broker: Broker, wire: Wire, rabbit: Rabbit, path: Path, right: str
) -> None:
    assert wire.prompt
    client = {"name": "shop", "tokens": [sha256(b"secret").hexdigest()]}
    client |= {one: ["pizza"] if one == right else [] for one in ("send", "receive", "manage")}
    path.write_text(json.dumps({"queues": ["pizza"], "topics": [], "clients": [client]}))
    settings = Settings(queues_file=path)
    door = create_app(broker, settings, Memory(2**40), None).test_client()
    rabbit.publish(b"a", queue="pizza")
    die(rabbit, "a", "b")
    login = {"Authorization": "Bearer secret"}
    for method, place, body in [
        ("DELETE", PURGE, None),
        ("DELETE", DEAD, {"ids": ["a"]}),
        ("POST", REDRIVE, {"ids": ["b"]}),
    ]:
        assert door.open(place, method=method, json=body).status_code == 401
        answer = door.open(place, method=method, json=body, headers=login)
        if right == "manage":
            assert answer.status_code == 200, answer.text
        else:
            refused(answer, 403, "The client 'shop' has no right to manage: 'pizza'.")
    left = [b"1"] if right == "manage" else [b"a"]
    assert rabbit.bodies("pizza") == left
    assert len(rabbit.bodies("pizza.dead")) == (0 if right == "manage" else 2)


@pytest.mark.parametrize(
    ("method", "place"), [("DELETE", "messages?confirm=nowhere"), ("DELETE", "dead")]
)
def test_a_queue_that_is_not_in_the_list_is_404(
    client: FlaskClient, rabbit: Rabbit, method: str, place: str
) -> None:
    rabbit.add("nowhere")
    rabbit.publish(b"a", queue="nowhere")
    answer = client.open(f"/queues/nowhere/{place}", method=method, json={"ids": ["a"]})
    refused(answer, 404, "There is no queue 'nowhere'.")
    assert rabbit.bodies("nowhere") == [b"a"]


def test_head_is_told_all_methods_of_a_path(client: FlaskClient) -> None:
    answer = client.head(PIZZA)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "DELETE"}
