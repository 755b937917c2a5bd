"""What a door tells of each request."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from common.events import good_id
from door import BrokerUnavailable
from door.call import Answer, Call, json_answer
from door.topology import Topology
from door.web import equip
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.exceptions import abort


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


def data(call: Call) -> Answer:
    call.event.fields |= {"event": "publish", "queue": "takeaway", "message_id": "m"}
    match call.query("fault", "secret").get("fault"):
        case "caller":
            abort(400, "That was wrong." * 100)
        case "broker":
            raise BrokerUnavailable("The broker is away.")
        case "code":
            raise ZeroDivisionError("the code's secret")
    return json_answer(200, "done")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def client(events: Events, tmp_path: Path) -> FlaskClient:
    (tmp_path / "openapi.json").write_text("{}")
    app = Flask("door", root_path=str(tmp_path))
    equip(app, SimpleNamespace(up=True), events, Topology("queue"), {("POST", "/data"): data})
    return app.test_client()


def test_a_request_s_event_has_its_fields_and_nothing_of_its_query_or_body(
    client: FlaskClient, events: Events
) -> None:
    client.post("/data?secret", data="secret", headers={"X-Request-Id": "a.B-9_"})
    (record,) = events
    assert 0 < record.pop("duration_ms") < 5000
    assert record == {
        "level": "info",
        "event": "publish",
        "request_id": "a.B-9_",
        "message_id": "m",
        "queue": "takeaway",
        "status": 200,
    }


@pytest.mark.parametrize(
    ("fault", "status", "level", "reason"),
    [
        ("caller", 400, "warning", ("That was wrong." * 100)[:200]),
        ("broker", 503, "error", "The broker is away."),
        ("code", 500, "error", None),
    ],
)
def test_an_error_s_event_has_its_level_and_its_reason(
    client: FlaskClient, events: Events, fault: str, status: int, level: str, reason: str | None
) -> None:
    answer = client.post(f"/data?fault={fault}", headers={"X-Request-Id": "mine"})
    assert answer.headers["X-Request-Id"] == "mine"
    (record,) = events
    assert (record["status"], record["level"], record["event"]) == (status, level, "publish")
    assert reason is None or record["reason"] == reason
    assert "secret" not in str(record)


def test_any_other_request_is_told_by_method_and_path_without_its_query(
    client: FlaskClient, events: Events
) -> None:
    client.post(f"/{'x' * 500}?secret")
    client.get("/%ff")
    first, second = events
    assert (first["event"], first["method"], first["status"]) == ("request", "POST", 404)
    assert first["path"] == "/" + "x" * 199
    assert second["path"] == "/\ufffd"
    assert "secret" not in str(first)


def test_health_and_metrics_have_no_event(client: FlaskClient, events: Events) -> None:
    for path in "/healthz", "/healthz?ready", "/metrics", "/last":
        client.get(path)
    assert [record["path"] for record in events] == ["/last"]


@pytest.mark.parametrize("good", ["a", "0af7651916cd43dd", "A.b_c-1", "x" * 128])
def test_a_good_request_id_comes_back(client: FlaskClient, good: str) -> None:
    for path in "/data", "/nowhere", "/healthz":
        assert client.post(path, headers={"X-Request-Id": good}).headers["X-Request-Id"] == good


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", "a,b", "ä", "{}", None])
def test_a_bad_request_id_is_replaced_by_one_of_its_own(
    client: FlaskClient, events: Events, bad: str | None
) -> None:
    headers = {} if bad is None else {"X-Request-Id": bad}
    answers = [client.post("/data", headers=headers) for _ in range(2)]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert ids[0] != ids[1]
    assert all(len(id_) == 32 and good_id(id_) for id_ in ids)
    assert [record["request_id"] for record in events] == ids


def test_the_count_of_dropped_events_is_there_before_the_first(client: FlaskClient) -> None:
    assert "events_dropped_total" in client.get("/metrics").text
