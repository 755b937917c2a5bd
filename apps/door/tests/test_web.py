"""What every door answers besides its own routes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from door import BrokerUnavailable
from door.web import REQUESTS, equip
from flask import Flask, abort
from flask.testing import FlaskClient


@pytest.fixture
def broker() -> SimpleNamespace:
    return SimpleNamespace(up=True)


@pytest.fixture
def client(broker: SimpleNamespace) -> FlaskClient:
    app = Flask("door")
    equip(app, broker, None)

    @app.post("/broken/<kind>")
    def broken(kind: str) -> str:
        if kind == "broker":
            raise BrokerUnavailable("The broker is away.")
        if kind == "caller":
            abort(400, "That was wrong.")
        raise ZeroDivisionError("the code's secret")

    return app.test_client()


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


def test_health_is_alive_without_a_broker_and_ready_only_with_it(
    client: FlaskClient, broker: SimpleNamespace
) -> None:
    assert client.get("/healthz?ready").json == {"broker": "up"}
    broker.up = False
    assert client.get("/healthz").status_code == 200
    answer = client.get("/healthz?ready")
    assert (answer.status_code, answer.json) == (503, {"broker": "down"})


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
from door.web import BROKER_UP, REQUESTS, equip
BROKER_UP.set(int(sys.argv[1]))
REQUESTS.labels("/data", 201).inc(5)
DROPPED.inc(2)
if sys.argv[2] == "dies":
    os._exit(0)
app = flask.Flask("door")
equip(app, types.SimpleNamespace(up=True), None)
print(app.test_client().get("/metrics").text)
"""


def test_metrics_sum_the_workers_and_forget_a_dead_one_s_gauge(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    text = ""
    for arguments in (["0", "dies"], ["1", "answers"]):
        command = [sys.executable, "-c", WORKER, *arguments]
        text = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert 'http_requests_total{route="/data",status="201"} 10.0' in text
    assert "events_dropped_total 4.0" in text
    assert "broker_up 1.0" in text
