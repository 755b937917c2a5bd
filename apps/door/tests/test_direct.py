"""A route is answered without Flask; test_web.py says how."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from door.access import Access
from door.call import Answer, Call, json_answer
from door.topology import Lists
from door.web import equip
from flask import Flask
from werkzeug.test import Client


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


class Door:
    """A door with one route; its requests say in X-Kind what it shall do."""

    def __init__(self, root: Path, access: Access) -> None:
        self.events = Events()
        self.by_flask = 0
        (root / "openapi.json").write_text("{}")
        app = Flask("door", root_path=str(root))
        routes = {
            ("POST", "/data"): self._data,
            ("GET", "/queues"): self._name,
            ("GET", "/queues/{queue}/messages"): self._name,
        }
        app.before_request(self._count)
        lists = SimpleNamespace(lists=Lists(frozenset(), access=access))
        equip(app, SimpleNamespace(up=True), self.events, lists, routes)
        self.client = Client(app)

    def _count(self) -> None:
        self.by_flask += 1

    def _data(self, call: Call) -> Answer:
        kind = call.header("X-Kind") or ""
        call.event.fields |= {"event": "publish", "message_id": kind}
        if kind == "bug":
            raise ZeroDivisionError("the code's secret")
        call.event.deferred = kind == "deferred"
        return json_answer(200, {"sent": "ü", **call.query("x")})

    def _name(self, call: Call) -> Answer:
        return json_answer(200, {"name": call.name})


GOOD = "bearer t0ken"
HASH = sha256(b"t0ken").hexdigest()
CLIENT = {"name": "me", "tokens": [HASH], "send": [], "receive": [], "manage": []}


@pytest.mark.parametrize(
    ("authorization", "path", "by_flask"),
    [(GOOD, "/data", 0), (GOOD, "/nowhere", 1), ("bearer wrong", "/data", 1), ("", "/data", 1)],
)
def test_flask_has_what_is_no_route_and_who_has_no_access(
    tmp_path: Path, authorization: str, path: str, by_flask: int
) -> None:
    door = Door(tmp_path, Access([CLIENT]))
    door.client.post(path, headers={"Authorization": authorization})
    assert door.by_flask == by_flask


def test_an_event_that_is_deferred_is_not_told(tmp_path: Path) -> None:
    door = Door(tmp_path, Access())
    for kind in "good", "deferred":
        door.client.post("/data", headers={"X-Kind": kind})
    assert [event["message_id"] for event in door.events] == ["good"]


def test_a_bug_is_logged_and_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = Door(tmp_path, Access()).client.post("/data", headers={"X-Kind": "bug"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the code's secret" in caplog.text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/queues", ""),
        ("/queues/orders/messages", "orders"),
        ("/queues/%C3%BC/messages", "\u00fc"),
        ("/queues/{queue}/messages", "{queue}"),
        ("/queues/*/messages", "*"),
        ("/queues/../messages", ".."),
    ],
)
def test_a_path_may_have_a_name_in_it(tmp_path: Path, path: str, name: str) -> None:
    answer = Door(tmp_path, Access()).client.get(path)
    assert answer.get_json() == {"name": name}


@pytest.mark.parametrize(
    "path",
    [
        "/queues/",
        "/queues//messages",
        "/queues/orders",
        "/queues/orders/",
        "/queues/a%2Fb/messages",
        "/queues/orders/messages/",
        "/topics/orders/messages",
    ],
)
def test_a_path_that_is_no_route_is_404(tmp_path: Path, path: str) -> None:
    assert Door(tmp_path, Access()).client.get(path).status_code == 404


def test_the_metrics_have_the_path_without_its_name(tmp_path: Path) -> None:
    client = Door(tmp_path, Access()).client
    client.get("/queues/orders/messages")
    assert client.head("/queues/secret/messages").headers["Allow"] == "GET"
    told = client.get("/metrics").text
    for status in 200, 405:
        line = f'http_requests_total{{route="/queues/{{queue}}/messages",status="{status}"}} '
        assert line in told
    assert "secret" not in told


def test_a_client_is_in_its_events_and_in_the_metrics(tmp_path: Path) -> None:
    door = Door(tmp_path, Access([CLIENT]))
    door.client.post("/data", headers={"Authorization": GOOD})
    assert door.events[0]["client"] == "me"
    told = door.client.get("/metrics", headers={"Authorization": GOOD}).text
    assert 'client_requests_total{client="me",status="200"} ' in told
