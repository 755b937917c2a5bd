"""A route is answered without Flask; test_web.py says how."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from door.call import Answer, Call, json_answer
from door.settings import Access
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
        routes = {("POST", "/data"): self._data}
        app.before_request(self._count)
        equip(app, SimpleNamespace(up=True), self.events, access, routes)
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


GOOD = "bearer t0ken"


@pytest.mark.parametrize(
    ("authorization", "path", "by_flask"),
    [(GOOD, "/data", 0), (GOOD, "/nowhere", 1), ("bearer wrong", "/data", 1), ("", "/data", 1)],
)
def test_flask_has_what_is_no_route_and_who_has_no_access(
    tmp_path: Path, authorization: str, path: str, by_flask: int
) -> None:
    door = Door(tmp_path, Access(("Bearer t0ken",)))
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
