"""What the subscriber promises over HTTP, with a fake in the broker's place."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from door import BrokerUnavailable
from flask.testing import FlaskClient
from subscriber import create_app
from subscriber.app import SOCKET
from subscriber.broker import Delivery
from werkzeug.test import create_environ


class FakeBroker:
    def __init__(self) -> None:
        self.up = True
        self.queue: list[bytes] = []
        self.acked: list[bytes] = []
        self.released: list[bytes] = []
        self.gets = 0

    def get(self) -> Delivery | None:
        self.gets += 1
        if not self.up:
            raise BrokerUnavailable("away")
        channel: Any = None
        return Delivery(self.gets, self.queue.pop(0), channel) if self.queue else None

    def ack(self, delivery: Delivery) -> None:
        self.acked.append(delivery.body)

    def release(self, delivery: Delivery) -> None:
        self.released.append(delivery.body)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def client(broker: Any) -> FlaskClient:
    return create_app(broker).test_client()


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's connection: the server's end and the client's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with near, far:
        yield near, far


def response(broker: Any, near: socket.socket | None = None) -> Any:
    """Ask for a message and return the response's body as a WSGI server gets it."""
    environ = create_environ("/receive")
    if near:
        environ[SOCKET] = near
    return create_app(broker)(environ, lambda *_: lambda _: None)


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


def test_a_client_that_left_while_it_waited_gets_no_message(
    broker: FakeBroker, wire: tuple[socket.socket, socket.socket]
) -> None:
    near, far = wire
    broker.queue = [b"a"]
    steps = response(broker, near)
    far.close()
    with pytest.raises(ConnectionResetError):
        next(steps)
    steps.close()
    assert (broker.acked, broker.released) == ([], [b"a"])


def test_a_client_that_left_without_reading_leaves_its_message(
    broker: FakeBroker, wire: tuple[socket.socket, socket.socket]
) -> None:
    near, far = wire
    broker.queue = [b"a"]
    steps = response(broker, near)
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
