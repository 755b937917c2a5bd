"""What a peek promises over HTTP, and what becomes of messages that the door holds."""

import json
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.memory import MIB, Memory
from door.server import CLIENT
from door.settings import BrokerSettings
from flask.testing import FlaskClient
from pika.spec import Basic
from subscriber import held
from subscriber.app import MAX_PEEKED, MAX_PEEKED_BYTES, create_app
from subscriber.broker import Broker
from subscriber.settings import Settings
from werkzeug.test import create_environ

from .conftest import Events, Rabbit, Wire, serving

PIZZA = "/queues/pizza/messages"
PEEK = f"{PIZZA}/peek"
USER = "subscriber"
RIGHTS = ("send", "receive", "manage")


@pytest.fixture
def memory() -> Memory:
    return Memory(64 * MIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "queues.json"
    path.write_text(json.dumps({"queues": ["takeaway", "pizza"], "topics": []}))
    return path


class Api:
    """The management API: the answer, and for which paths it was asked."""

    def __init__(self) -> None:
        self.body = b'{"consumer_details": []}'
        self.asked: list[str] = []
        self.url = ""

    def tell(self, *users: str) -> None:
        """Have consumers of users, from now on."""
        consumers = [{"channel_details": {"user": user}} for user in users]
        self.body = json.dumps({"consumer_details": consumers}).encode()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        api.asked.append(request.path)
        return 200, api.body

    with serving(answer) as api.url:
        yield api


@pytest.fixture
def settings(path: Path, api: Api) -> Settings:
    broker = BrokerSettings(user=USER)
    return Settings(broker, queues_file=path, management_url=api.url, receive_timeout=1)


@pytest.fixture
def broker(settings: Settings, memory: Memory) -> Iterator[Broker]:
    broker = Broker(settings, memory)
    yield broker
    broker.lost("the test is over")


@pytest.fixture
def wire(rabbit: Rabbit, broker: Broker) -> Wire:
    rabbit.add("pizza")
    wire = rabbit.connect(broker)
    wire.prompt = True
    return wire


@pytest.fixture
def client(
    broker: Broker, settings: Settings, memory: Memory, wire: Wire, events: Events
) -> FlaskClient:
    assert wire.connection.is_open
    return create_app(broker, settings, memory, events).test_client()


def seen(client: FlaskClient, query: str = "") -> list[tuple[str, bool]]:
    """Return the bodies that a peek shows, each with whether it is redelivered."""
    answer = client.get(f"{PEEK}{query}")
    assert answer.status_code == (200 if answer.data else 204), answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert not any("receipt" in line for line in lines)
    return [(line["body"], line["redelivered"]) for line in lines]


def new(*bodies: str) -> list[tuple[str, bool]]:
    return [(body, False) for body in bodies]


def received(client: FlaskClient) -> list[tuple[str, bool]]:
    lines = map(json.loads, client.get(f"{PIZZA}?max=1000").text.splitlines())
    return [(line["body"], line["redelivered"]) for line in lines]


def settled(wire: Wire) -> list[Any]:
    gevent.sleep(0.01)
    said = wire.sent(Basic.Ack) + wire.sent(Basic.Nack) + wire.sent(Basic.Reject)
    return [one for some in said for one in some]


def test_a_peek_shows_what_the_next_receiver_gets(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, events: Events
) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    answer = client.get(PEEK)
    assert answer.content_type == "application/x-ndjson"
    assert answer.headers["Cache-Control"] == "no-store"
    assert seen(client) == seen(client) == new("a")
    assert settled(wire) == [], "the broker counts nothing"
    assert client.get(PIZZA).text == "a\n"
    assert client.get(PIZZA).text == "b\n"
    assert len(settled(wire)) == 2
    assert rabbit.acked == [b"a", b"b"]
    told = events[0]
    assert (told["event"], told["queue"], told["messages"]) == ("peek", "pizza", 1)


def test_peeks_show_messages_in_their_order_and_leave_them_so(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    bodies = [f"{number}" for number in range(150)]
    rabbit.publish(*map(str.encode, bodies), queue="pizza")
    assert seen(client, "?max=2") == new(*bodies[:2])
    assert len(rabbit.bodies("pizza")) == 148
    assert seen(client, "?max=5") == new(*bodies[:5]), "what is held, and more"
    assert seen(client, "?max=3") == new(*bodies[:3])
    assert seen(client, f"?max={MAX_PEEKED}") == new(*bodies[:MAX_PEEKED])
    assert received(client) == new(*bodies)


def test_a_peek_says_what_is_redelivered_as_the_broker_does(
    client: FlaskClient, rabbit: Rabbit, broker: Broker, wire: Wire
) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    assert seen(client) == new("a")
    wire.lose()
    broker.lost("gone")
    assert client.get(PEEK).status_code == 503
    rabbit.connect(broker).prompt = True
    assert seen(client, "?max=9") == [("a", True), ("b", False)]


def test_there_is_nothing_to_see_in_an_empty_queue(client: FlaskClient, events: Events) -> None:
    answer = client.get(f"{PEEK}?max=9")
    assert (answer.status_code, answer.data) == (204, b"")
    assert events[0]["messages"] == 0


@pytest.mark.parametrize("query", ["max=0", "max=101", "max=x", "wait=1", "ack=manual"])
def test_a_peek_that_makes_no_sense_takes_nothing(
    client: FlaskClient, rabbit: Rabbit, query: str
) -> None:
    rabbit.publish(b"a", queue="pizza")
    assert client.get(f"{PEEK}?{query}").status_code == 400
    assert rabbit.bodies("pizza") == [b"a"]


@pytest.mark.parametrize("right", RIGHTS)
def test_a_peek_needs_the_right_to_manage(
    client: FlaskClient, rabbit: Rabbit, path: Path, right: str
) -> None:
    me = {"name": "me", "tokens": [sha256(b"secret").hexdigest()], **{one: [] for one in RIGHTS}}
    lists = {"queues": ["takeaway", "pizza"], "topics": [], "clients": [{**me, right: ["pizza"]}]}
    path.write_text(json.dumps(lists))
    gevent.sleep(1.1)  # until the door has read them
    rabbit.publish(b"a", queue="pizza")
    answer = client.get(PEEK, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == (200 if right == "manage" else 403)
    assert rabbit.bodies("pizza") == ([] if right == "manage" else [b"a"])


def test_a_client_that_leaves_half_way_leaves_all_as_it_was(
    client: FlaskClient, rabbit: Rabbit, memory: Memory
) -> None:
    bodies = [letter * 200_000 for letter in "abc"]
    rabbit.publish(*map(str.encode, bodies), queue="pizza")
    app: Any = client.application
    body = app(create_environ(f"{PEEK}?max=9"), lambda *_: lambda _: None)
    assert b'"body": "aaa' in next(iter(body))
    body.close()
    assert received(client) == new(*bodies)
    gevent.sleep(0.01)
    assert memory.held == 0


def test_what_is_shown_stays_the_same_whatever_becomes_of_the_message(
    client: FlaskClient, rabbit: Rabbit
) -> None:
    rabbit.publish(b"a", queue="pizza")
    app: Any = client.application
    headers: list[tuple[str, str]] = []
    peek = app(create_environ(PEEK), lambda _, told: headers.extend(told) or bytes)
    app(create_environ(PIZZA), lambda *_: lambda _: None).close()  # who hangs up
    body = b"".join(peek)
    assert dict(headers)["Content-Length"] == str(len(body))
    assert json.loads(body)["redelivered"] is False
    assert received(client) == [("a", True)]


def test_what_is_held_comes_again_after_the_broker_closed_the_channel(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, memory: Memory
) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    assert seen(client) == new("a")
    (number,) = [number for number, some in wire.peer.unsettled.items() if some]
    wire.peer.close(number, 406, "PRECONDITION_FAILED")
    wire.answer()
    assert (memory.held, rabbit.bodies("pizza")) == (0, [b"a", b"b"])
    assert seen(client, "?max=2") == [("a", True), ("b", False)]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_peek_that_fails_leaves_what_it_had(
    client: FlaskClient, broker: Broker, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    queue = broker.queue("pizza")
    get = queue.get

    def fail_later(**told: Any) -> Any:
        if len(rabbit.bodies("pizza")) == 2 - slow:
            raise BrokerUnavailable("away")
        return get(**told)

    with monkeypatch.context() as patch:
        patch.setattr(queue, "get", fail_later)
        assert client.get(f"{PEEK}?max=2").status_code == 503
    assert rabbit.bodies("pizza") == [b"a", b"b"][slow:]
    assert received(client) == new("a", "b")


# Memory.


def test_a_peek_shows_at_most_so_many_bytes_besides_the_first_message(
    client: FlaskClient, rabbit: Rabbit, memory: Memory
) -> None:
    rabbit.publish(b"x" * 2 * MAX_PEEKED_BYTES, b"small", queue="pizza")
    assert len(seen(client, "?max=9")) == 1
    assert rabbit.bodies("pizza") == [b"small"]
    assert received(client)[0][0].startswith("xx")
    rabbit.publish(*[b"x" * 300_000] * 50, queue="pizza")
    assert received(client)
    rabbit.publish(*[b"x" * 300_000] * 50, queue="pizza")
    assert len(seen(client, "?max=50")) == len(seen(client, "?max=50")) == 3
    assert memory.held < 2 * MAX_PEEKED_BYTES


def test_what_peeks_took_leaves_most_of_the_memory_to_others(
    broker: Broker, settings: Settings, path: Path, rabbit: Rabbit, memory: Memory, wire: Wire
) -> None:
    names = [f"q{number}" for number in range(40)]
    path.write_text(json.dumps({"queues": ["takeaway", *names], "topics": []}))
    client = create_app(broker, settings, memory, None).test_client()
    rabbit.add(*names)
    for name in names:
        rabbit.publish(b"x" * MIB, b"more", queue=name)
    statuses = [client.get(f"/queues/{name}/messages/peek?max=9").status_code for name in names]
    assert sorted(set(statuses)) == [200, 503]
    assert 0.25 * memory.size <= memory.held < 0.3 * memory.size
    # What is held can be shown, and received: by then there is room again.
    assert client.get("/queues/q0/messages/peek?max=9").status_code == 200
    for name in names:
        assert client.get(f"/queues/{name}/messages").data == b"x" * MIB + b"\n"
    gevent.sleep(0.01)
    assert client.get(f"/queues/{names[-1]}/messages/peek").status_code == 200
    assert wire.connection.is_open


def test_what_is_shown_holds_memory_until_it_is_written(
    client: FlaskClient, rabbit: Rabbit, memory: Memory
) -> None:
    rabbit.publish(b"x" * MIB, queue="pizza")
    app: Any = client.application
    grant = memory.grant()
    reader = SimpleNamespace(address="", socket=None, grant=grant)
    app({**create_environ(PEEK), CLIENT: reader}, lambda *_: lambda _: None)
    assert len(received(client)) == 1, "it goes out, and gives its memory back, meanwhile"
    gevent.sleep(0.01)
    assert MIB < memory.held == grant.amount < 1.1 * MIB


# Other programs that consume the queue.


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "LOOK", 0.05)


@pytest.mark.usefixtures("looks")
def test_what_is_held_goes_back_in_order_once_another_program_consumes_the_queue(
    client: FlaskClient, rabbit: Rabbit, wire: Wire, api: Api, memory: Memory
) -> None:
    rabbit.publish(b"a", b"b", b"c", b"d", queue="pizza")
    app: Any = client.application
    app(create_environ(f"{PIZZA}?max=2"), lambda *_: lambda _: None).close()  # who hangs up
    assert seen(client, "?max=3") == [("a", True), ("b", True), ("c", False)]
    api.tell(USER)
    gevent.sleep(0.2)
    assert rabbit.bodies("pizza") == [b"d"], "the door's own consumers are no reason"
    assert set(api.asked) == {"/api/queues/%2F/pizza?columns=consumer_details.channel_details.user"}
    api.tell(USER, "billing")
    gevent.sleep(0.2)
    assert rabbit.bodies("pizza") == [b"a", b"b", b"c", b"d"]
    assert [type(one) for one in settled(wire)] == [Basic.Nack] * 3, "4.3 does not count it"
    assert memory.held == 0
    asked = len(api.asked)
    gevent.sleep(0.2)
    assert len(api.asked) == asked, "nothing is held"
    assert received(client) == [("a", True), ("b", True), ("c", True), ("d", False)]


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("body", [b"no JSON", b"[]", b"{}", b'{"consumer_details": [1]}'])
def test_without_an_answer_messages_go_on_being_held(
    client: FlaskClient, rabbit: Rabbit, api: Api, body: bytes
) -> None:
    rabbit.publish(b"a", queue="pizza")
    assert seen(client) == new("a")
    api.body = body
    with gevent.Timeout(5):
        while len(api.asked) < 2:
            gevent.sleep(0.01)
    assert rabbit.bodies("pizza") == []
    api.tell("billing")
    gevent.sleep(0.2)
    assert rabbit.bodies("pizza") == [b"a"], "it is asked again"


@pytest.mark.usefixtures("looks")
def test_what_is_held_goes_back_before_the_broker_closes_the_channel(
    client: FlaskClient, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    assert seen(client, "?max=2") == new("a", "b")
    gevent.sleep(0.1)
    assert rabbit.bodies("pizza") == []
    monkeypatch.setattr(held, "LONGEST", 0.1)
    gevent.sleep(0.1)
    assert rabbit.bodies("pizza") == [b"a", b"b"]


def test_a_purge_drops_what_was_peeked_at(client: FlaskClient, rabbit: Rabbit) -> None:
    rabbit.publish(b"a", b"b", queue="pizza")
    assert seen(client) == new("a")
    assert client.delete(f"{PIZZA}?confirm=pizza").json == {"purged": 2}
    assert seen(client) == []
