"""What every door answers besides its own routes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.settings import Access
from door.web import REQUESTS, _Bodies, equip, read_body
from flask import Flask, abort
from flask.testing import FlaskClient
from gevent.event import Event
from werkzeug.test import TestResponse

LIMIT = 49 * 4096  # bytes of a body: whole pieces, as it is read
DESCRIPTION = '{"openapi": "3.1.0"}'


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


@pytest.fixture
def broker() -> SimpleNamespace:
    return SimpleNamespace(up=True)


@pytest.fixture
def events() -> Events:
    return Events()


Make = Callable[..., FlaskClient]


@pytest.fixture
def make(broker: SimpleNamespace, events: Events, tmp_path: Path) -> Make:
    (tmp_path / "openapi.json").write_text(DESCRIPTION)

    def client(*accepted: str) -> FlaskClient:
        app = Flask("door", root_path=str(tmp_path))
        equip(app, broker, events, Access(accepted))
        add_routes(app)
        return app.test_client()

    return client


@pytest.fixture
def client(make: Make) -> FlaskClient:
    return make()


def add_routes(app: Flask) -> None:
    @app.post("/broken/<kind>")
    def broken(kind: str) -> str:
        if kind == "broker":
            raise BrokerUnavailable("The broker is away.")
        if kind == "detail":
            error = BrokerUnavailable("The broker left.")
            error.details = {"certain": 3}
            raise error
        if kind == "caller":
            abort(400, "That was wrong.")
        raise ZeroDivisionError("the code's secret")

    @app.post("/body")
    def body() -> str:
        return str(len(read_body(LIMIT)))


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/broken/caller", 400, "That was wrong."),
        ("/broken/broker", 503, "The broker is away."),
        ("/broken/code", 500, None),
        ("/nowhere", 404, None),
    ],
)
def test_every_error_is_json_with_a_message(
    client: FlaskClient, path: str, status: int, message: str | None
) -> None:
    answer = client.post(path)
    assert (answer.status_code, answer.mimetype) == (status, "application/json")
    assert answer.json is not None
    assert list(answer.json) == ["message"]
    assert message is None or answer.json["message"] == message
    assert "secret" not in answer.text
    assert answer.content_length == len(answer.data)


def test_a_wrong_method_is_told_the_right_one(client: FlaskClient) -> None:
    answer = client.get("/broken/caller")
    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]
    assert answer.json is not None


def test_an_absent_broker_says_when_to_ask_again(client: FlaskClient) -> None:
    assert int(client.post("/broken/broker").headers["Retry-After"]) > 0


def test_an_absent_broker_s_details_are_told(client: FlaskClient) -> None:
    assert client.post("/broken/detail").json == {"message": "The broker left.", "certain": 3}


def test_the_description_is_served(client: FlaskClient) -> None:
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.text == DESCRIPTION


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/body"), ("POST", "/broken/code"), ("GET", "/openapi.json"), ("GET", "/nowhere")],
)
@pytest.mark.parametrize("given", [None, "Bearer wrong"])
def test_who_may_not_enter_gets_401_before_anything_of_the_request_is_read(
    make: Make, events: Events, method: str, path: str, given: str | None
) -> None:
    headers = {"Authorization": given} if given else {}
    answer = make("Bearer t0ken").open(
        path,
        method=method,
        headers=headers,
        environ_overrides={"wsgi.input": Input(AssertionError("read")), "CONTENT_LENGTH": "5"},
    )
    assert answer.status_code == 401
    assert list(answer.json or []) == ["message"]
    challenges = answer.headers.getlist("WWW-Authenticate")
    assert [one.split()[0] for one in challenges] == ["Basic", "Bearer"]
    assert "realm=" in challenges[0]
    (event,) = events
    assert (event["status"], event["level"]) == (401, "warning")
    assert event["request_id"] == answer.headers["X-Request-Id"]
    assert "Bearer wrong" not in str(event)


@pytest.mark.parametrize("path", ["/healthz", "/healthz?ready", "/metrics"])
def test_health_and_metrics_need_no_credentials(make: Make, path: str) -> None:
    assert make("Bearer t0ken").get(path).status_code == 200


def test_who_may_enter_does(make: Make) -> None:
    client = make("Basic dTpw", "Bearer t0ken")
    for header in "Basic dTpw", "bearer t0ken":
        assert client.post("/body", headers={"Authorization": header}).status_code == 200


class Input:
    """A body, or the error that reading it raises, or what it waits for."""

    def __init__(self, body: bytes | Exception | Event) -> None:
        self._trouble = None if isinstance(body, bytes) else body
        self.stream = BytesIO(body if isinstance(body, bytes) else b"x" * LIMIT)

    def read(self, size: int) -> bytes:
        if isinstance(self._trouble, Event):
            self._trouble.wait()
        elif self._trouble:
            raise self._trouble
        return self.stream.read(size)


def post(client: FlaskClient, body: Input, length: int | None) -> TestResponse:
    """Post body with its length, or chunked."""
    environ: dict[str, Any] = {"wsgi.input": body, "HTTP_TRANSFER_ENCODING": "chunked"}
    if length is not None:
        environ = {"wsgi.input": body, "CONTENT_LENGTH": str(length)}
    return client.post("/body", environ_overrides=environ)


@pytest.mark.parametrize("size", [0, 1, 100_000, LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit_is_read(client: FlaskClient, size: int, chunked: bool) -> None:
    answer = post(client, Input(b"x" * size), None if chunked else size)
    assert (answer.status_code, answer.text) == (200, str(size))


@pytest.mark.parametrize(
    ("body", "length", "status", "word"),
    [
        (Input(AssertionError("it was read")), LIMIT + 1, 413, f"more than {LIMIT} bytes"),
        (Input(b"x" * (LIMIT + 1)), None, 413, f"more than {LIMIT} bytes"),
        (Input(TimeoutError("timed out")), 9, 408, "0.05 s"),
        (Input(Event()), 9, 408, "0.05 s"),
        (Input(Event()), LIMIT, 408, "0.05 s"),
        (Input(Event()), None, 408, "0.05 s"),
        (Input(OSError("unexpected end of file")), 9, 400, "not whole"),
        (Input(ConnectionResetError("reset")), None, 400, "not whole"),
    ],
)
def test_a_body_that_is_too_large_or_late_or_cut_off_is_the_client_s_fault(
    client: FlaskClient,
    monkeypatch: pytest.MonkeyPatch,
    body: Input,
    length: int | None,
    status: int,
    word: str,
) -> None:
    monkeypatch.setattr("door.web.CLIENT_TIMEOUT", 0.05)
    with gevent.Timeout(3):
        answer = post(client, body, length)
    assert answer.status_code == status
    assert word in (answer.json or {})["message"]
    assert _Bodies.held == 0


def test_of_a_body_without_an_end_no_more_is_read_than_the_limit(client: FlaskClient) -> None:
    body = Input(b"x" * 2 * LIMIT)
    assert post(client, body, None).status_code == 413
    assert body.stream.tell() <= LIMIT + 4096


@pytest.mark.parametrize("chunked", [False, True])
def test_too_many_large_bodies_at_a_time_are_to_be_sent_later(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    monkeypatch.setattr("door.web.MAX_BODIES", 2 * LIMIT)
    length = None if chunked else LIMIT
    come = Event()
    held = [gevent.spawn(post, client, Input(come), LIMIT) for _ in range(2)]
    gevent.idle()
    assert _Bodies.held == 2 * LIMIT
    for _ in range(2):  # a refused one takes nothing
        busy = post(client, Input(AssertionError("it was read")), length)
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
        assert list(busy.json or []) == ["message"]
    assert post(client, Input(b"x" * 9), 9).status_code == 200
    none = {"wsgi.input": Input(AssertionError("it was read")), "CONTENT_LENGTH": None}
    assert client.post("/body", environ_overrides=none).text == "0", "no length is no body"
    come.set()
    assert {one.get(timeout=3).status_code for one in held} == {200}
    assert _Bodies.held == 0
    assert post(client, Input(b"x" * LIMIT), length).status_code == 200


def test_a_large_body_alone_is_taken_whatever_the_bound_of_all(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("door.web.MAX_BODIES", 1)
    assert post(client, Input(b"x" * LIMIT), LIMIT).status_code == 200


def test_health_is_alive_without_a_broker_and_ready_only_with_it(
    client: FlaskClient, broker: SimpleNamespace
) -> None:
    assert client.get("/healthz?ready").json == {"broker": "up"}
    broker.up = False
    assert client.get("/healthz").status_code == 200
    answer = client.get("/healthz?ready")
    assert (answer.status_code, answer.json) == (503, {"broker": "down"})
    assert answer.headers["Retry-After"] == "1"


def test_requests_are_counted_by_route_not_by_path(client: FlaskClient) -> None:
    def count(route: str, status: int) -> float:
        return REQUESTS.labels(route, status)._value.get()

    before = count("none", 404), count("/broken/<kind>", 400)
    client.post("/a-path-of-an-attacker")
    client.post("/broken/caller")
    assert (count("none", 404), count("/broken/<kind>", 400)) == (before[0] + 1, before[1] + 1)
    text = client.get("/metrics").text
    assert "attacker" not in text
    assert 'http_request_duration_seconds_bucket{le="0.001",route="none"}' in text


WORKER = """
import os, sys, flask, types
from door.events import DROPPED
from door.settings import Access
from door.web import BROKER_UP, REQUESTS, equip
BROKER_UP.set(int(sys.argv[1]))
REQUESTS.labels("/data", 201).inc(5)
DROPPED.inc(2)
if sys.argv[2] == "dies":
    os._exit(0)
app = flask.Flask("door", root_path=sys.argv[3])
equip(app, types.SimpleNamespace(up=True), None, Access())
print(app.test_client().get("/metrics").text)
"""


def test_metrics_sum_the_workers_and_forget_a_dead_one_s_gauge(tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text(DESCRIPTION)
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    text = ""
    for arguments in (["0", "dies"], ["1", "answers"]):
        command = [sys.executable, "-c", WORKER, *arguments, str(tmp_path)]
        text = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert 'http_requests_total{route="/data",status="201"} 10.0' in text
    assert "events_dropped_total 4.0" in text
    assert "broker_up 1.0" in text
