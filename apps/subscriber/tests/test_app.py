"""What the subscriber promises over HTTP, with a fake in the broker's place."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import msgpack
import pytest
from door import BrokerUnavailable
from door.memory import Memory
from door.server import CLIENT
from flask.testing import FlaskClient
from pika.spec import BasicProperties
from prometheus_client import REGISTRY
from subscriber.app import MAX_BATCHES, create_app
from subscriber.delivery import Delivery, Handle
from subscriber.handover import DELIVERY_TIMEOUT
from subscriber.parcel import Parcel
from subscriber.settings import Settings
from werkzeug.test import TestResponse, create_environ

from .conftest import Events, Rabbit

PROJECT = Path(__file__).parents[3]
GETS = ("/receive", "/dead")
MEMORY = Memory(2**40)
ADDRESS = "192.0.2.1"


class FakeBroker:
    def __init__(self) -> None:
        self.up = True
        self.waiting: list[bytes] = []
        self.properties = BasicProperties()
        self.asked: list[tuple[int, float]] = []  # with most messages and seconds
        self.rooms: list[float] = []
        self.addresses: list[str] = []
        self.acked: list[bytes] = []
        self.released: list[bytes] = []
        self.rejected: list[tuple[bytes, bool]] = []
        self.settled: set[int] = set()
        # What comes in a batch's later get().
        self.error: BaseException | None = None
        self._tag = 0
        self._bodies: dict[int, bytes] = {}

    def get(
        self, want: int = 1, room: float = 1e99, wait: float = 0, *, address: str
    ) -> list[Delivery]:
        self.addresses.append(address)
        self.asked.append((want, wait))
        self.rooms.append(room)
        if not self.up:
            raise BrokerUnavailable("away")
        if self.error and room < 1e99:
            raise self.error
        return [self._next() for _ in range(min(want, len(self.waiting)))]

    def _next(self) -> Delivery:
        channel: Any = self
        self._tag += 1
        self._bodies[self._tag] = self.waiting.pop(0)
        return Delivery(self._tag, self._bodies[self._tag], self.properties, channel)

    def queue(self, name: str) -> "FakeBroker":
        assert name == "takeaway"
        return self

    def holds(self, one: Delivery | Handle) -> bool:
        return one.tag not in self.settled

    def _settle(self, some: Iterable[Delivery | Handle]) -> list[bytes]:
        held = [one for one in some if self.holds(one)]
        self.settled |= {one.tag for one in held}
        return [self._bodies[one.tag] for one in held]

    def ack(self, deliveries: Iterable[Delivery | Handle]) -> None:
        self.acked += self._settle(deliveries)

    def release(self, deliveries: Iterable[Delivery]) -> None:
        self.released += self._settle(deliveries)

    def reject(self, deliveries: Iterable[Delivery | Handle], requeue: bool) -> None:
        self.rejected += [(body, requeue) for body in self._settle(deliveries)]


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def client(broker: Any, settings: Settings, events: Events) -> FlaskClient:
    return create_app(broker, settings, MEMORY, events).test_client()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's connection: the server's end and the client's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with near, far:
        yield near, far


def response(
    app: Any, path: str = "/receive", near: socket.socket | None = None, **headers: str
) -> Any:
    """Ask for a message and return the response's body as a WSGI server gets it."""
    environ = create_environ(path, headers={"X-Request-Id": "mine", **headers})
    if near:
        environ[CLIENT] = SimpleNamespace(address=ADDRESS, socket=near, grant=MEMORY.grant())
    return app(environ, lambda *_: lambda _: None)


@pytest.fixture
def app(client: FlaskClient) -> Any:
    return client.application


# The next message.


def test_the_welcome_names_the_way_to_a_message(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    assert "/receive" in answer.text


def test_receive_answers_the_next_message(client: FlaskClient, broker: FakeBroker) -> None:
    broker.waiting = ["Käse ☃".encode(), b"second"]
    answer = client.get("/receive")
    assert answer.status_code == 200
    assert answer.data == "Käse ☃\n".encode()
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Content-Length"] == str(len(answer.data))
    assert answer.headers["Cache-Control"] == "no-store"
    assert client.get("/receive").text == "second\n"


def test_receive_passes_bytes_that_are_no_text(client: FlaskClient, broker: FakeBroker) -> None:
    broker.waiting = [b"\xff\x00"]
    assert client.get("/receive").data == b"\xff\x00\n"


def test_receive_says_when_there_is_none(client: FlaskClient) -> None:
    answer = client.get("/receive")
    assert (answer.status_code, answer.text) == (200, "No message available\n")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"


def test_receive_is_503_while_the_broker_is_away(client: FlaskClient, broker: FakeBroker) -> None:
    broker.up = False
    answer = client.get("/receive")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert answer.json == {"message": "away"}
    assert client.get("/healthz").status_code == 200
    assert client.get("/healthz?ready").status_code == 503


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_only_get_takes_a_message(client: FlaskClient, broker: FakeBroker, method: str) -> None:
    broker.waiting = [b"a"]
    assert client.open("/receive?ack=manual&max=2", method=method).status_code == 405
    assert broker.asked == []


RIGHTS = {
    ("GET", "messages"): "receive",
    ("POST", "ack"): "receive",
    ("POST", "reject"): "receive",
    ("POST", "extend"): "receive",
    ("DELETE", "messages"): "manage",
    ("GET", "dead"): "manage",
    ("DELETE", "dead"): "manage",
    ("POST", "dead/redrive"): "manage",
}


@pytest.mark.parametrize("right", ["send", "receive", "manage"])
def test_a_client_does_only_what_it_has_the_right_for(
    broker: Any, events: Events, tmp_path: Path, right: str
) -> None:
    broker.channel = None  # the dead queue cannot be reached
    tokens = [sha256(b"t0ken").hexdigest()]
    client = {"name": "shop", "tokens": tokens, "send": [], "receive": [], "manage": []}
    told = {
        "queues": ["takeaway", "orders"],
        "topics": [],
        "clients": [client | {right: ["takeaway"]}],
    }
    queues = tmp_path / "queues.json"
    queues.write_text(json.dumps(told))
    door = create_app(broker, Settings(queues_file=queues), MEMORY, events).test_client()
    login = {"Authorization": "Bearer t0ken"}
    for queue in "orders", "takeaway":
        for (method, path), needed in RIGHTS.items():
            path = f"/queues/{queue}/{path}"
            assert door.open(path, method=method).status_code == 401
            answer = door.open(path, method=method, headers=login)
            if (queue, needed) == ("takeaway", right):
                assert answer.status_code in (200, 400, 503), path
            else:
                assert answer.status_code == 403
                fault = f"The client 'shop' has no right to {needed}: {queue!r}."
                assert answer.json == {"message": fault}
    assert {event.get("client") for event in events if event["status"] == 403} == {"shop"}
    for path, needed in ("/receive", "receive"), ("/dead", "manage"):
        assert (door.get(path, headers=login).status_code == 403) == (needed != right)


# How it is asked for.


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", [(1, 0)]),
        ("?wait=0", [(1, 0)]),
        ("?wait=20", [(1, 20)]),
        ("?ack=auto", [(1, 0)]),
        ("?max=1", [(1, 0)]),
        ("?max=2", [(1, 0), (1, 0)]),
        ("?max=10000&wait=007", [(1, 7), (9999, 0)]),
    ],
)
def test_a_request_waits_for_the_first_message_and_takes_the_others_that_are_there(
    client: FlaskClient, broker: FakeBroker, query: str, asked: list[tuple[int, int]]
) -> None:
    broker.waiting = [b"a"]
    assert client.get(f"/receive{query}").status_code == 200
    assert broker.asked == asked


def test_the_time_that_a_client_asked_to_wait_is_none_of_the_request_s_duration(
    client: FlaskClient, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def duration() -> float:
        labels = {"route": "/receive"}
        return REGISTRY.get_sample_value("http_request_duration_seconds_sum", labels) or 0

    get = broker.get
    monkeypatch.setattr(broker, "get", lambda **asked: (gevent.sleep(0.3), get(**asked))[1])
    before = duration()
    assert client.get("/receive?wait=1").status_code == 200
    assert duration() - before < 0.2
    # One that is to be answered at once is slow.
    assert client.get("/receive?wait=0").status_code == 200
    assert duration() - before > 0.3


@pytest.mark.parametrize(
    "query",
    [
        *["wait=21", "wait=-1", "wait=1.5", "wait=", "wait=x", "wait=1e1", "wait=%D9%A1"],
        *["max=0", "max=10001", "max=-1", "max=", "max=1_0", "max=%C2%B2", f"max={'9' * 5000}"],
        *["ack=", "ack=yes", "ack=Manual"],
    ],
)
def test_an_argument_that_makes_no_sense_takes_no_message(
    client: FlaskClient, broker: FakeBroker, query: str
) -> None:
    broker.waiting = [b"a"]
    answer = client.get(f"/receive?{query}")
    assert answer.status_code == 400
    assert answer.json
    assert answer.json.keys() == {"message"}
    assert answer.json["message"].startswith(query[: query.index("=")])
    assert broker.asked == []


@pytest.mark.parametrize(
    ("query", "accept", "kind"),
    [
        ("", "*/*", "text/plain"),
        ("", "text/plain, application/json;q=0.9", "text/plain"),
        ("", "application/json", "application/json"),
        ("", "application/json;q=0.9, */*;q=0.8", "application/json"),
        ("", "", "text/plain"),
        ("", "text/*", "text/plain"),
        ("", "text/html, */*;q=0.1", "text/plain"),
        ("", "application/json; charset=utf-8", "application/json"),
        ("", "application/*", "application/json"),
        ("", "APPLICATION/JSON", "application/json"),
        ("", "application/json;q=0.9,text/html", "application/json"),
        ("", "application/json, text/plain;q=0.9", "application/json"),
        ("?max=1", "*/*", "application/x-ndjson"),
        ("?max=9", "application/json", "application/x-ndjson"),
        ("?max=9", "application/x-ndjson", "application/x-ndjson"),
    ],
)
def test_the_form_of_the_answer_follows_accept_and_max(
    client: FlaskClient, broker: FakeBroker, query: str, accept: str, kind: str
) -> None:
    empty = client.get(f"/receive{query}", headers={"Accept": accept})
    broker.waiting = [b"a", b"b"]
    answer = client.get(f"/receive{query}", headers={"Accept": accept})
    assert answer.mimetype == kind
    if kind == "text/plain":
        assert empty.status_code == 200
        assert answer.data == b"a\n"
    else:
        assert (empty.status_code, empty.data) == (204, b"")
        assert "Content-Type" not in empty.headers
        told = [json.loads(line)["body"] for line in answer.text.splitlines()]
        assert told == (["a", "b"] if query == "?max=9" else ["a"])
        assert answer.text.endswith("}\n")
    for one in empty, answer:
        assert one.headers["Cache-Control"] == "no-store"
        assert one.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("query", "accept"),
    [
        ("", "application/x-ndjson"),
        ("", "text/html"),
        ("", "image/*, text/plain;q=0, application/json;q=0"),
        ("", "nonsense"),
        ("?max=9", "text/plain"),
    ],
)
def test_who_takes_nothing_that_can_be_given_takes_no_message(
    client: FlaskClient, broker: FakeBroker, query: str, accept: str
) -> None:
    answer = client.get(f"/receive{query}", headers={"Accept": accept})
    assert answer.status_code == 406
    assert (answer.json or {})["message"].startswith("Accept")
    assert broker.asked == []


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("ackmode=manual", "'ackmode'"),
        ("Ack=manual", "'Ack'"),
        ("maxx=1", "'maxx'"),
        ("ack=manual&max_messages=5", "'max_messages'"),
        ("ack=manual&ack=auto", "ack twice"),
    ],
)
def test_a_parameter_that_is_not_known_is_named_and_takes_no_message(
    client: FlaskClient, broker: FakeBroker, query: str, name: str
) -> None:
    answer = client.get(f"/receive?{query}")
    assert answer.status_code == 400
    assert name in (answer.json or {})["message"]
    assert broker.asked == []


def test_a_message_as_json_tells_all_of_it(client: FlaskClient, broker: FakeBroker) -> None:
    broker.waiting = [b"\xff"]
    broker.properties = properties(message_id="m", content_type="a/b", headers={"X-A": 1})
    assert client.get("/receive", headers={"Accept": "application/json"}).json == {
        "id": "m",
        "body": "/w==",
        "encoding": "base64",
        "content_type": "a/b",
        "headers": {"X-A": 1},
        "redelivered": False,
    }


@pytest.mark.parametrize(
    "body", [b"a" * 1_000_000, b"\0" * 1_000_000, b'"' * 50_000, b"\xff" * 99_999]
)
@pytest.mark.parametrize("query", ["", "?max=1", "?ack=manual", "?max=9&ack=manual"])
def test_a_large_message_arrives_whole_in_each_form(
    client: FlaskClient, broker: FakeBroker, body: bytes, query: str
) -> None:
    broker.waiting = [body, b"small"]
    answer = client.get(
        f"/receive{query}", headers={"Accept": "*/*" if query else "application/json"}
    )
    assert answer.headers["Content-Length"] == str(len(answer.data))
    if answer.mimetype == "text/plain":
        assert answer.data == body + b"\n"
        return
    first = json.loads(answer.data.splitlines()[0])
    told = first["body"].encode()
    assert (b64decode(told) if first["encoding"] == "base64" else told) == body


@pytest.mark.parametrize(("fits", "bodies"), [(3, ["a", "b"]), (1, ["a"]), (0.5, ["a"])])
def test_a_batch_has_room_for_its_lines_and_for_one_message_of_any_size(
    broker: Any, events: Events, fits: float, bodies: list[str]
) -> None:
    broker.waiting = [b"a", b"b"]
    size = Delivery(1, b"a", broker.properties, broker).size
    settings = Settings(max_batch_bytes=int(fits * size))
    answer = create_app(broker, settings, MEMORY, events).test_client().get("/receive?max=9")
    assert [json.loads(line)["body"] for line in answer.text.splitlines()] == bodies
    assert broker.rooms[1:] == ([2 * size] if fits == 3 else [])


# What becomes of it.


@pytest.mark.parametrize("path", ["/receive", "/receive?max=9"])
def test_a_message_is_acknowledged_only_when_more_than_its_body_is_asked_for(
    app: Any, broker: FakeBroker, path: str
) -> None:
    bodies = [b"a", b"b"] if "max" in path else [b"a"]
    broker.waiting = [*bodies]
    steps = response(app, path)
    assert next(steps)
    assert broker.acked == []
    assert next(steps, None) is None
    steps.close()
    assert (broker.acked, broker.released) == (bodies, [])


@pytest.mark.parametrize("path", ["/receive", "/receive?max=2", "/receive?ack=manual"])
@pytest.mark.parametrize("taken", [0, 1])
def test_a_message_that_was_not_written_is_released(
    app: Any, broker: FakeBroker, path: str, taken: int
) -> None:
    bodies = [b"a", b"b"] if "max" in path else [b"a"]
    broker.waiting = [*bodies]
    steps = response(app, path)
    for _ in range(taken):
        next(steps)
    steps.close()
    steps.close()
    assert (broker.acked, broker.released) == ([], bodies)


@pytest.mark.parametrize("path", ["/receive", "/receive?max=9", "/receive?ack=manual"])
@pytest.mark.parametrize("when", ["while it waited", "before it read"])
def test_a_client_that_left_before_it_read_leaves_its_message(
    app: Any,
    broker: FakeBroker,
    ends: tuple[socket.socket, socket.socket],
    path: str,
    when: str,
) -> None:
    near, far = ends
    broker.waiting = [b"a"]
    steps = response(app, path, near=near)
    if when == "while it waited":
        far.close()
    near.sendall(next(steps))
    far.close()
    with pytest.raises(ConnectionResetError):
        next(steps)
    steps.close()
    assert (broker.acked, broker.released) == ([], [b"a"])


@pytest.mark.parametrize("path", ["/receive", "/receive?max=9"])
def test_a_client_that_has_said_all_it_has_to_say_gets_its_answer(
    app: Any, broker: FakeBroker, ends: tuple[socket.socket, socket.socket], path: str
) -> None:
    near, far = ends
    broker.waiting = [b"a"]
    far.shutdown(socket.SHUT_WR)
    steps = response(app, path, near=near)
    near.sendall(next(steps))
    assert b"a" in far.recv(1000)
    assert next(steps, None) is None
    assert (broker.acked, broker.released) == ([b"a"], [])


def test_a_client_that_says_no_more_and_reads_nothing_leaves_its_message(
    app: Any, broker: FakeBroker, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    broker.waiting = [b"a" * 8_000_000]
    far.shutdown(socket.SHUT_WR)
    steps = response(app, near=near)
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.sendall(next(steps))  # the two systems hold a part of it
    begin = time.monotonic()
    next(steps)
    with pytest.raises(ConnectionResetError):
        next(steps)
    assert time.monotonic() - begin < 2 * DELIVERY_TIMEOUT
    steps.close()
    assert (broker.acked, len(broker.released)) == ([], 1)


def test_a_client_that_left_while_it_waited_keeps_no_more_messages_from_others(
    app: Any, broker: FakeBroker, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    broker.waiting = [b"a", b"b"]
    far.close()
    response(app, "/receive?max=9", near).close()
    assert broker.asked == [(1, 0)]
    assert broker.released == [b"a"]


def test_a_request_waits_under_its_client_s_address(
    app: Any, broker: FakeBroker, ends: tuple[socket.socket, socket.socket]
) -> None:
    broker.waiting = [b"a", b"b"]
    response(app, "/receive?max=2", ends[0]).close()
    # For the first message, and for those behind it.
    assert broker.addresses == [ADDRESS, ADDRESS]


def test_a_client_that_read_everything_and_left_has_its_message(
    app: Any, broker: FakeBroker, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    broker.waiting = [b"a"]
    steps = response(app, near=near)
    near.sendall(next(steps))
    assert far.recv(10) == b"a\n"
    far.close()
    assert next(steps, None) is None
    assert broker.acked == [b"a"]


def properties(**fields: Any) -> BasicProperties:
    return BasicProperties(**fields)


def test_a_message_is_told_once_it_is_acknowledged_and_leads_back_to_its_post(
    app: Any, broker: FakeBroker, events: Events
) -> None:
    broker.waiting = [b"secret"]
    broker.properties = properties(message_id="m", headers={"X-Request-Id": "posted"})
    steps = response(app, "/receive")
    next(steps)
    assert events == []
    assert next(steps, None) is None
    steps.close()
    (event,) = events
    assert event.pop("duration_ms") > 0
    assert event == {
        "level": "info",
        "event": "receive",
        "request_id": "mine",
        "publish_request_id": "posted",
        "message_id": "m",
        "queue": "takeaway",
        "status": 200,
    }


@pytest.mark.parametrize("taken", [0, 1])
def test_a_message_that_its_client_did_not_take_is_told_with_a_warning(
    app: Any, broker: FakeBroker, events: Events, taken: int
) -> None:
    broker.waiting = [b"secret"]
    broker.properties = properties(message_id="m")
    steps = response(app)
    for _ in range(taken):
        next(steps)
    assert events == []
    steps.close()
    steps.close()
    (event,) = events
    assert (event["level"], event["reason"]) == ("warning", "the client hung up")
    assert (event["message_id"], event["event"]) == ("m", "receive")
    assert "secret" not in str(event)


def test_an_answer_without_a_message_is_told_at_once(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    empty = client.get("/receive")
    broker.up = False
    away = client.get("/receive")
    ids = [answer.headers["X-Request-Id"] for answer in (empty, away)]
    assert [event["request_id"] for event in events] == ids
    assert [event["event"] for event in events] == ["receive", "receive"]
    assert [event["queue"] for event in events] == ["takeaway", "takeaway"]
    assert [event["status"] for event in events] == [200, 503]
    assert [event["level"] for event in events] == ["info", "error"]
    assert [event.get("reason") for event in events] == [None, "away"]
    assert not any("message_id" in event for event in events)


@pytest.mark.parametrize(
    ("message_id", "headers", "told"),
    [
        (None, None, {}),
        ("", {}, {}),
        (b"\xff", {"X-Request-Id": 7}, {}),
        ("x" * 255, {"X-Request-Id": "a b"}, {"message_id": "x" * 200}),
        ("m", {"X-Request-Id": ["a"]}, {"message_id": "m"}),
        ("m", {"X-Request-Id": "x" * 129}, {"message_id": "m"}),
        ("m", {"X-Request-Id": b"a"}, {"message_id": "m"}),
        ("m", {"X-Request-Id": "a\n"}, {"message_id": "m"}),
        ("m\udcff", {"other": "a"}, {"message_id": "m\udcff"}),
    ],
)
def test_only_a_bounded_text_of_another_program_s_message_is_told(
    client: FlaskClient,
    broker: FakeBroker,
    events: Events,
    message_id: Any,
    headers: Any,
    told: dict[str, str],
) -> None:
    broker.waiting = [b"a"]
    broker.properties = properties(message_id=message_id, headers=headers)
    assert client.get("/receive").data == b"a\n"
    (event,) = events
    found = {key: event[key] for key in ("message_id", "publish_request_id") if key in event}
    assert found == told


def test_many_messages_are_one_event(app: Any, broker: FakeBroker, events: Events) -> None:
    broker.waiting = [b"a", b"b"]
    broker.properties = properties(message_id="m")
    list(response(app, "/receive?max=9"))
    (event,) = events
    assert (event["event"], event["messages"]) == ("receive", 2)
    assert "message_id" not in event


# Leases.


def receipts(answer: TestResponse) -> list[str]:
    if receipt := answer.headers.get("X-Receipt"):
        return [receipt]
    return [json.loads(line)["receipt"] for line in answer.text.splitlines()]


@pytest.fixture
def leased(client: FlaskClient, broker: FakeBroker) -> list[str]:
    """The receipts of three messages."""
    broker.waiting = [b"a", b"b", b"c"]
    return receipts(client.get("/receive?ack=manual&max=3"))


@pytest.mark.parametrize(
    ("query", "accept"), [("", "*/*"), ("", "application/json"), ("&max=9", "*/*")]
)
def test_a_leased_message_has_a_receipt_and_is_off_the_queue_once_it_was_used(
    client: FlaskClient, broker: FakeBroker, query: str, accept: str
) -> None:
    broker.waiting = [b"a"]
    answer = client.get(f"/receive?ack=manual{query}", headers={"Accept": accept})
    assert ("X-Receipt" in answer.headers) == (answer.mimetype == "text/plain")
    (receipt,) = receipts(answer)
    assert broker.settled == set()
    ack = client.post("/ack", json={"receipt": receipt})
    assert (ack.status_code, ack.json) == (200, {"acknowledged": 1})
    assert broker.acked == [b"a"]


def test_a_message_that_is_not_leased_has_no_receipt(
    client: FlaskClient, broker: FakeBroker
) -> None:
    broker.waiting = [b"a"] * 2
    answer = client.get("/receive", headers={"Accept": "application/json"})
    assert "receipt" not in (answer.json or {})
    assert "X-Receipt" not in client.get("/receive").headers


@pytest.mark.parametrize(
    ("path", "more", "answer"),
    [
        ("/ack", {}, {"acknowledged": 2}),
        ("/reject", {}, {"rejected": 2}),
        ("/reject", {"requeue": True}, {"rejected": 2}),
        ("/reject", {"requeue": False}, {"rejected": 2}),
        ("/extend", {}, {"extended": 2}),
    ],
)
def test_receipts_acknowledge_reject_and_extend(
    client: FlaskClient,
    broker: FakeBroker,
    leased: list[str],
    path: str,
    more: dict[str, bool],
    answer: dict[str, int],
) -> None:
    done = client.post(path, json={"receipts": leased[1:], **more})
    assert (done.status_code, done.json) == (200, answer)
    assert broker.acked == ([b"b", b"c"] if path == "/ack" else [])
    requeue = more.get("requeue", True)
    assert broker.rejected == ([(b"b", requeue), (b"c", requeue)] if path == "/reject" else [])
    again = client.post(path, json={"receipts": leased, **more})
    assert again.status_code == (200 if path == "/extend" else 410)


@pytest.mark.parametrize("path", ["/ack", "/reject", "/extend"])
def test_one_receipt_that_is_gone_is_named_and_nothing_is_done(
    client: FlaskClient, broker: FakeBroker, leased: list[str], path: str
) -> None:
    assert client.post("/ack", json={"receipt": leased[1]}).status_code == 200
    answer = client.post(path, json={"receipts": [leased[0], leased[1], "\ud800"]})
    assert answer.status_code == 410
    told = json.loads(answer.data)
    assert told.pop("message")
    assert told == {"gone": [leased[1], "\ud800"]}
    assert (broker.acked, broker.rejected) == ([b"b"], [])
    assert client.post("/ack", json={"receipt": leased[0]}).status_code == 200


@pytest.mark.parametrize("path", ["/ack", "/reject", "/extend"])
@pytest.mark.parametrize(
    "body",
    [
        *[b"", b"\xff", b"{", b"[" * 100_000, b"[]", b"1", b'"receipt"', b"{}"],
        *[b'{"receipt": 1}', b'{"receipt": null}', b'{"receipts": "r"}', b'{"receipts": [1]}'],
        *[b'{"receipts": null}', b'{"receipts": {"r": 1}}', b'{"receipts": ["r"], "other": 1}'],
        *[b'{"receipts": ["r"], "requeue": 1}', b'{"receipts": ["r"], "requeue": null}'],
    ],
)
def test_a_body_that_makes_no_sense_does_nothing(
    client: FlaskClient, broker: FakeBroker, leased: list[str], path: str, body: bytes
) -> None:
    answer = client.post(path, data=body.replace(b'"r"', json.dumps(leased[0]).encode()))
    assert answer.status_code == 400
    assert answer.json
    assert answer.json.keys() == {"message"}
    assert broker.settled == set()


def test_no_receipt_is_dropped_in_silence(
    client: FlaskClient, broker: FakeBroker, leased: list[str]
) -> None:
    answer = client.post("/ack", json={"receipt": leased[0], "receipts": leased[1:]})
    assert answer.status_code == 400
    assert broker.settled == set()


@pytest.mark.parametrize("path", ["/ack", "/extend"])
def test_only_a_rejection_says_what_becomes_of_the_message(
    client: FlaskClient, broker: FakeBroker, leased: list[str], path: str
) -> None:
    answer = client.post(path, json={"receipts": leased, "requeue": False})
    assert answer.status_code == 400
    assert broker.settled == set()


def test_a_body_that_is_too_large_does_nothing(client: FlaskClient) -> None:
    assert client.post("/ack", data=b" " * (1024 * 1024 + 1)).status_code == 413


@pytest.mark.parametrize("path", ["/ack", "/reject", "/extend", "/dead/redrive"])
def test_what_changes_something_is_not_a_get(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code == 405


def test_what_was_not_written_is_leased_to_nobody(app: Any, broker: FakeBroker) -> None:
    broker.waiting = [b"a", b"b"]
    before = MEMORY.held
    steps = response(app, "/receive?max=9&ack=manual")
    (piece,) = [next(steps)]
    steps.close()
    assert MEMORY.held == before
    broker.settled.clear()
    leased = [json.loads(line)["receipt"] for line in piece.splitlines()]
    assert app.test_client().post("/ack", json={"receipts": leased}).status_code == 410


@pytest.mark.parametrize(
    "path",
    [
        "/receive",
        "/receive?wait=0",
        "/receive?max=2",
    ],
)
def test_a_message_that_could_not_be_told_goes_to_the_next_client(
    client: FlaskClient, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    broker.waiting = [b"a"]
    monkeypatch.setattr(Parcel, "_make_headers", lambda *_: 1 / 0)
    assert client.get(path).status_code == 500
    assert broker.released == [b"a"]


# Batches at a time.


def written(steps: Any) -> None:
    assert len(list(steps)) == 1
    steps.close()


def hung_up(steps: Any) -> None:
    next(steps)
    steps.close()


def unread(steps: Any) -> None:
    steps.close()


@pytest.mark.parametrize("end", [written, hung_up, unread])
@pytest.mark.parametrize("ack", ["auto", "manual"])
def test_only_some_batches_are_made_at_a_time(
    app: Any, broker: FakeBroker, end: Callable[[Any], None], ack: str
) -> None:
    broker.waiting = [b"a"] * 100
    path = f"/receive?max=2&ack={ack}"
    under_way = [response(app, path) for _ in range(MAX_BATCHES)]
    more = [gevent.spawn(response, app, path) for _ in range(2)]
    gevent.idle()
    assert not any(one.ready() for one in more)
    assert next(response(app)) == b"a\n", "a single message waits for no batch"
    for steps in under_way:
        end(steps)
        steps.close()
    for one in more:
        end(one.get(timeout=2))


@pytest.mark.parametrize(
    ("error", "status"), [(BrokerUnavailable("away"), 503), (ZeroDivisionError(), 500)]
)
def test_a_batch_that_fails_gives_back_its_place_and_its_messages(
    app: Any, broker: FakeBroker, error: Exception, status: int
) -> None:
    broker.waiting = [b"a"] * 100
    broker.error = error
    for number in range(2 * MAX_BATCHES):
        with gevent.Timeout(2):
            assert app.test_client().get("/receive?max=2").status_code == status
        assert broker.released == [b"a"] * (number + 1)
    assert broker.acked == []


# The dead queue.


class FakeDead:
    """Stands in for Dead; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.found: list[bytes] = []

    def look(self, most: int, room: int) -> list[Delivery]:
        assert room == Settings().max_batch_bytes
        self.asked.append(("look", most))
        channel: Any = None
        return [Delivery(1, body, BasicProperties(), channel) for body in self.found]

    def redrive(self, most: int) -> int:
        self.asked.append(("redrive", most))
        return len(self.found)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> FakeDead:
    dead = FakeDead()
    monkeypatch.setattr("subscriber.app.Dead", lambda *_: dead)
    return dead


@pytest.mark.parametrize(("query", "most"), [("", 1), ("?max=1", 1), ("?max=10000", 10_000)])
def test_the_dead_queue_is_shown(dead: FakeDead, app: Any, query: str, most: int) -> None:
    client = app.test_client()
    assert client.get(f"/dead{query}").status_code == 204
    dead.found = [b"a", b"b"]
    answer = client.get(f"/dead{query}")
    assert (answer.status_code, answer.mimetype) == (200, "application/x-ndjson")
    assert [json.loads(line)["body"] for line in answer.text.splitlines()] == ["a", "b"]
    assert dead.asked == [("look", most)] * 2


@pytest.mark.parametrize(("query", "most"), [("", 10_000), ("?max=1", 1), ("?max=10000", 10_000)])
def test_the_dead_queue_is_redriven(dead: FakeDead, app: Any, query: str, most: int) -> None:
    dead.found = [b"a", b"b"]
    answer = app.test_client().post(f"/dead/redrive{query}")
    assert (answer.status_code, answer.json) == (200, {"redriven": 2})
    assert dead.asked == [("redrive", most)]


def test_a_parameter_that_the_dead_queue_does_not_know_is_named(dead: FakeDead, app: Any) -> None:
    client = app.test_client()
    answers = client.get("/dead?limit=5"), client.post("/dead/redrive?count=1")
    assert [answer.status_code for answer in answers] == [400, 400]
    assert "'limit'" in answers[0].json["message"]
    assert "'count'" in answers[1].json["message"]
    assert dead.asked == []


@pytest.mark.parametrize("value", ["0", "10001", "", "x"])
def test_a_bad_number_of_dead_messages_is_refused(dead: FakeDead, app: Any, value: str) -> None:
    client = app.test_client()
    answers = client.get(f"/dead?max={value}"), client.post(f"/dead/redrive?max={value}")
    assert [answer.status_code for answer in answers] == [400, 400]
    assert dead.asked == []


def test_the_dead_queue_is_shown_like_a_batch(dead: FakeDead, app: Any, broker: FakeBroker) -> None:
    broker.waiting = [b"a"] * 100
    under_way = [response(app, "/receive?max=2") for _ in range(MAX_BATCHES)]
    look = gevent.spawn(app.test_client().get, "/dead")
    gevent.idle()
    assert dead.asked == []
    under_way[0].close()
    assert look.get(timeout=2).status_code == 204


# The process.


@contextmanager
def process(port: int, *, rabbit: int = 1, collector: int | None = None) -> Iterator[Any]:
    """Run the subscriber on port."""
    env = {
        "RABBITMQ_USER": "u",
        "RABBITMQ_PASSWORD": "p",
        "RABBITMQ_HOST": "127.0.0.1",
        "RABBITMQ_PORT": str(rabbit),
        "PORT": str(port),
        "PYTHONPATH": os.pathsep.join(["apps/subscriber", "apps/door", "apps/common"]),
    }
    if collector:
        env |= {"FLUENTD_HOST": "127.0.0.1", "FLUENTD_PORT": str(collector)}
    command = [sys.executable, "-m", "subscriber"]
    with subprocess.Popen(command, env=env, cwd=PROJECT, stderr=subprocess.PIPE) as server:
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


def fetch(port: int, path: str = "/receive") -> tuple[int, str, str]:
    """Return status, request id and text of a GET, once the server is up."""
    end = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.headers["X-Request-Id"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["X-Request-Id"], error.read().decode()
        except urllib.error.URLError:
            assert time.monotonic() < end, "the server never answered"
            time.sleep(0.05)


def test_an_event_made_just_before_the_end_is_sent(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector:
        collector.settimeout(10)
        with process(port, collector=collector.getsockname()[1]) as server:
            told = [fetch(port)[1] for _ in range(20)]
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        connection, _ = collector.accept()
        with connection, connection.makefile("rb") as stream:
            packets = list(msgpack.Unpacker(stream))
    assert [record["request_id"] for _, _, record in packets] == told
    assert {tag for tag, _, _ in packets} == {"subscriber"}


def test_at_the_end_a_long_poll_is_answered_and_acknowledgements_arrive(
    port: int, rabbit: Rabbit, rabbit_port: int
) -> None:
    rabbit.publish(b"a", b"b")
    with process(port, rabbit=rabbit_port) as server, ThreadPoolExecutor() as pool:
        end = time.monotonic() + 10
        while fetch(port, "/healthz?ready")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert fetch(port)[2] == "a\n"
        assert fetch(port)[2] == "b\n"
        poll = pool.submit(fetch, port, "/receive?wait=20")
        while not rabbit.empties:
            assert time.monotonic() < end
            time.sleep(0.01)
        begin = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert poll.result(2)[2] == "No message available\n"
        assert server.wait(10) == 0
        assert time.monotonic() - begin < 4
    assert rabbit.acked == [b"a", b"b"]
    assert rabbit.bodies() == []


def test_a_setting_that_cannot_be_used_stops_the_start_by_name(port: int) -> None:
    with process(port, rabbit=0) as server:
        assert server.wait(10) == 1
        assert b"RABBITMQ_PORT must be from 1 to 65535, got 0" in server.stderr.read()
