"""What every door answers besides its own routes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from door.access import Access
from door.call import Answer, Call, json_answer
from door.metrics import REQUESTS
from door.shared import SIZE, forget
from door.topology import Lists
from door.web import equip
from flask import Flask
from flask.testing import FlaskClient
from gevent.event import Event
from werkzeug.exceptions import abort
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
        hashes = [sha256(token.encode()).hexdigest() for token in accepted]
        clients = [{"name": "me", "tokens": hashes, "send": [], "receive": [], "manage": []}]
        lists = Lists(frozenset(), access=Access(clients if accepted else []))
        equip(app, broker, events, SimpleNamespace(lists=lists), ROUTES)
        return app.test_client()

    return client


@pytest.fixture
def client(make: Make) -> FlaskClient:
    return make()


def by_broker(_call: Call) -> Answer:
    raise BrokerUnavailable("The broker is away.")


def in_detail(_call: Call) -> Answer:
    error = BrokerUnavailable("The broker left.")
    error.details = {"certain": 3}
    raise error


def by_caller(_call: Call) -> Answer:
    abort(400, "That was wrong.")


def by_code(_call: Call) -> Answer:
    raise ZeroDivisionError("the code's secret")


def body(call: Call) -> Answer:
    return json_answer(200, len(call.read(LIMIT)))


def query(call: Call) -> Answer:
    return json_answer(200, call.query("max", "wait"))


ROUTES = {
    ("POST", "/broken/broker"): by_broker,
    ("POST", "/broken/detail"): in_detail,
    ("POST", "/broken/caller"): by_caller,
    ("POST", "/broken/code"): by_code,
    ("POST", "/body"): body,
    ("GET", "/query"): query,
}


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
    answer = make("t0ken").open(
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
    assert make("t0ken").get(path).status_code == 200


def test_who_may_enter_does(make: Make) -> None:
    client = make("p", "t0ken")
    for header in "Basic bWU6cA==", "bearer t0ken":
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
    monkeypatch.setattr("door.call.CLIENT_TIMEOUT", 0.05)
    with gevent.Timeout(3):
        answer = post(client, body, length)
    assert answer.status_code == status
    assert word in (answer.json or {})["message"]


def test_of_a_body_without_an_end_no_more_is_read_than_the_limit(client: FlaskClient) -> None:
    body = Input(b"x" * 2 * LIMIT)
    assert post(client, body, None).status_code == 413
    assert body.stream.tell() <= LIMIT + 4096


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ("", 200, ""),
        ("max=1&wait=", 200, ""),
        ("ack=manual", 400, "'ack'; known here: max, wait"),
        ("Max=1", 400, "'Max'"),
        ("max", 200, ""),
        ("max=1&max=1", 400, "max twice"),
        ("&".join(f"a{n}" for n in range(99)), 400, "more than 20"),
    ],
)
def test_a_parameter_that_is_not_known_or_doubled_is_named(
    client: FlaskClient, query: str, status: int, word: str
) -> None:
    answer = client.get(f"/query?{query}")
    assert answer.status_code == status
    assert word in (answer.json or {}).get("message", "")


def test_a_head_request_runs_no_route(client: FlaskClient) -> None:
    answer = client.head("/query")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


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

    before = count("none", 404), count("/broken/caller", 400)
    client.post("/a-path-of-an-attacker")
    client.post("/broken/caller")
    assert (count("none", 404), count("/broken/caller", 400)) == (before[0] + 1, before[1] + 1)
    text = client.get("/metrics").text
    assert "attacker" not in text
    assert 'http_request_duration_seconds_bucket{le="0.001",route="none"}' in text


WORKER = """
import os, sys, types
from door.shared import claim
claim(int(sys.argv[2]))
import flask
from common.events import DROPPED
from door.metrics import BROKER_UP, REQUESTS
from door.topology import Topology
from door.web import equip
BROKER_UP.set(int(sys.argv[1]))
REQUESTS.labels("/data", 201).inc(5)
DROPPED.inc(2)
app = flask.Flask("door", root_path=sys.argv[3])
equip(app, types.SimpleNamespace(up=True), None, Topology("q"), {})
print(app.test_client().get("/metrics").text)
os._exit(0)
"""


def work(folder: Path, root: Path, up: int, slot: int) -> str:
    """Let a worker of slot count five requests and drop two events; its metrics then."""
    (root / "openapi.json").write_text(DESCRIPTION)
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-u", "-c", WORKER, str(up), str(slot), str(root)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_metrics_sum_the_workers_and_forget_a_dead_one_s_gauge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    work(tmp_path, tmp_path, up=0, slot=0)
    assert "broker_up 0.0" in work(tmp_path, tmp_path, up=1, slot=1)
    forget(0)
    text = work(tmp_path, tmp_path, up=1, slot=1)
    assert 'http_requests_total{route="/data",status="201"} 15.0' in text
    assert "events_dropped_total 6.0" in text
    assert "broker_up 1.0" in text


def test_many_restarts_leave_no_files_behind(tmp_path: Path) -> None:
    for count in range(1, 4):
        text = work(tmp_path, tmp_path, up=1, slot=0)
        assert f"events_dropped_total {2.0 * count}" in text
    files = [path.stat() for path in tmp_path.glob("*.db")]
    assert len(files) == 4
    # Nothing is left that a full disk could refuse.
    assert min(file.st_blocks * 512 for file in files) >= SIZE


def test_a_worker_without_room_for_metrics_serves_and_tells_its_own(tmp_path: Path) -> None:
    full = Path("/dev/full-of-nothing")  # a folder that is not there is as good as a full one
    assert "events_dropped_total 2.0" in work(full, tmp_path, up=1, slot=0)
