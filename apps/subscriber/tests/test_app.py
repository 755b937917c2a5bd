"""What the subscriber promises over HTTP, with a fake in the broker's place."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from door import BrokerUnavailable
from flask.testing import FlaskClient
from pika.spec import BasicProperties
from subscriber import create_app
from subscriber.app import SOCKET
from subscriber.broker import Delivery, Settings
from werkzeug.test import create_environ

PROJECT = Path(__file__).parents[3]


class FakeBroker:
    def __init__(self) -> None:
        self.up = True
        self.queue: list[bytes] = []
        self.properties = BasicProperties()  # type: ignore[no-untyped-call]
        self.acked: list[bytes] = []
        self.released: list[bytes] = []
        self.gets = 0

    def get(self) -> Delivery | None:
        self.gets += 1
        if not self.up:
            raise BrokerUnavailable("away")
        channel: Any = None
        if not self.queue:
            return None
        return Delivery(self.gets, self.queue.pop(0), self.properties, channel)

    def ack(self, delivery: Delivery) -> None:
        self.acked.append(delivery.body)

    def release(self, delivery: Delivery) -> None:
        self.released.append(delivery.body)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def client(broker: Any, events: Events) -> FlaskClient:
    return create_app(broker, Settings(), events).test_client()


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's connection: the server's end and the client's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with near, far:
        yield near, far


def response(broker: Any, near: socket.socket | None = None, events: Events | None = None) -> Any:
    """Ask for a message and return the response's body as a WSGI server gets it."""
    environ = create_environ("/receive", headers={"X-Request-Id": "mine"})
    if near:
        environ[SOCKET] = near
    return create_app(broker, Settings(), events)(environ, lambda *_: lambda _: None)


def test_the_welcome_names_the_way_to_a_message(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    assert "/receive" in answer.text


def test_receive_answers_the_next_message(client: FlaskClient, broker: FakeBroker) -> None:
    broker.queue = ["Käse ☃".encode(), b"second"]
    answer = client.get("/receive")
    assert answer.status_code == 200
    assert answer.data == "Käse ☃\n".encode()
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Content-Length"] == str(len(answer.data))
    assert answer.headers["Cache-Control"] == "no-store"
    assert client.get("/receive").text == "second\n"


def test_receive_passes_bytes_that_are_no_text(client: FlaskClient, broker: FakeBroker) -> None:
    broker.queue = [b"\xff\x00"]
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
    broker.queue = [b"a"]
    assert client.open("/receive", method=method).status_code == 405
    assert broker.gets == 0


def test_a_message_is_acknowledged_only_when_more_than_its_body_is_asked_for(
    broker: FakeBroker,
) -> None:
    broker.queue = [b"a"]
    steps = response(broker)
    assert next(steps) == b"a\n"
    assert broker.acked == []
    assert next(steps, None) is None
    steps.close()
    assert (broker.acked, broker.released) == ([b"a"], [])


@pytest.mark.parametrize("taken", [0, 1])
def test_a_message_that_was_not_written_is_released(broker: FakeBroker, taken: int) -> None:
    broker.queue = [b"a"]
    steps = response(broker)
    for _ in range(taken):
        next(steps)
    steps.close()
    steps.close()
    assert (broker.acked, broker.released) == ([], [b"a"])


@pytest.mark.parametrize("written", [False, True])
def test_a_client_that_left_before_it_read_leaves_its_message(
    broker: FakeBroker, wire: tuple[socket.socket, socket.socket], written: bool
) -> None:
    near, far = wire
    broker.queue = [b"a"]
    steps = response(broker, near)
    if written:
        near.sendall(next(steps))
    far.close()
    with pytest.raises(ConnectionResetError):
        next(steps)
    steps.close()
    assert (broker.acked, broker.released) == ([], [b"a"])


def test_a_client_that_read_everything_and_left_has_its_message(
    broker: FakeBroker, wire: tuple[socket.socket, socket.socket]
) -> None:
    near, far = wire
    broker.queue = [b"a"]
    steps = response(broker, near)
    near.sendall(next(steps))
    assert far.recv(10) == b"a\n"
    far.close()
    assert next(steps, None) is None
    assert broker.acked == [b"a"]


def properties(**fields: Any) -> BasicProperties:
    return BasicProperties(**fields)  # type: ignore[no-untyped-call]


def test_a_message_is_told_once_it_is_acknowledged_and_leads_back_to_its_post(
    broker: FakeBroker, events: Events
) -> None:
    broker.queue = [b"secret"]
    broker.properties = properties(message_id="m", headers={"X-Request-Id": "posted"})
    steps = response(broker, events=events)
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
    broker: FakeBroker, events: Events, taken: int
) -> None:
    broker.queue = [b"secret"]
    broker.properties = properties(message_id="m")
    steps = response(broker, events=events)
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
    broker.queue = [b"a"]
    broker.properties = properties(message_id=message_id, headers=headers)
    assert client.get("/receive").data == b"a\n"
    (event,) = events
    found = {key: event[key] for key in ("message_id", "publish_request_id") if key in event}
    assert found == told


def test_an_event_made_just_before_the_end_is_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector, socket.socket() as free:
        collector.settimeout(10)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        env = {
            "RABBITMQ_USER": "u",
            "RABBITMQ_PASSWORD": "p",
            "RABBITMQ_PORT": "1",
            "PORT": str(port),
            "FLUENTD_HOST": "127.0.0.1",
            "FLUENTD_PORT": str(collector.getsockname()[1]),
            "PYTHONPATH": os.pathsep.join(["apps/subscriber", "apps/door"]),
        }
        command = [sys.executable, "-m", "subscriber"]
        with subprocess.Popen(command, env=env, cwd=PROJECT, stderr=subprocess.PIPE) as server:
            try:
                told = [receive(port) for _ in range(20)]
                server.send_signal(signal.SIGTERM)
                assert server.wait(10) == 0
            finally:
                server.kill()
        connection, _ = collector.accept()
        with connection, connection.makefile("rb") as stream:
            packets = list(msgpack.Unpacker(stream))
    assert [record["request_id"] for _, _, record in packets] == told
    assert {tag for tag, _, _ in packets} == {"subscriber"}


def receive(port: int) -> str:
    """Return the request id of a GET that the absent broker fails, once the server is up."""
    end = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/receive", timeout=5)
        except urllib.error.HTTPError as error:
            with error:
                return str(error.headers["X-Request-Id"])
        except urllib.error.URLError:
            assert time.monotonic() < end, "the server never answered"
            time.sleep(0.05)
