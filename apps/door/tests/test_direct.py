"""What is answered without Flask looks to clients and operators as if Flask had."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from door import BrokerUnavailable
from door.direct import Answer, Direct, json_answer
from door.events import Event
from door.settings import Access
from door.web import REQUESTS, current_event, equip
from flask import Flask, request
from werkzeug.test import Client


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


def act(kind: str, event: Event) -> None:
    event.fields |= {"event": "publish", "message_id": kind}
    if kind == "broker":
        raise BrokerUnavailable("The broker is away.")
    if kind == "bug":
        raise ZeroDivisionError("the code's secret")
    event.deferred = kind == "deferred"


class Door:
    """An app with one route, which is direct too; its requests say in X-Kind what it shall do."""

    def __init__(self, root: Path, access: Access) -> None:
        self.events = Events()
        self.directly = 0
        (root / "openapi.json").write_text("{}")
        app = Flask("door", root_path=str(root))
        equip(app, SimpleNamespace(up=True), self.events, access)

        @app.post("/data")
        def data() -> dict[str, str]:
            act(request.headers["X-Kind"], current_event())
            return {"sent": "ü"}

        routes = {("POST", "/data"): self._data}
        self.flask = Client(app)
        self.direct = Client(Direct(app, routes, self.events, access))

    def _data(self, environ: dict[str, Any], event: Event) -> Answer | None:
        if environ["HTTP_X_KIND"] == "unusual":
            return None
        self.directly += 1
        act(environ["HTTP_X_KIND"], event)
        return json_answer(200, {"sent": "ü"})


ACCESS = Access(("Bearer t0ken",))
GOOD = {"Authorization": "bearer t0ken"}


@pytest.mark.parametrize(
    ("headers", "path", "directly"),
    [
        ({"X-Kind": "good"}, "/data", 1),
        ({"X-Kind": "good", "X-Request-Id": "mine"}, "/data", 1),
        ({"X-Kind": "good", "X-Request-Id": "no good one"}, "/data", 1),
        ({"X-Kind": "deferred"}, "/data", 1),
        ({"X-Kind": "broker"}, "/data", 1),
        ({"X-Kind": "bug"}, "/data", 1),
        ({"X-Kind": "unusual"}, "/data", 0),
        ({"X-Kind": "good"}, "/data?x=1", 0),
        ({"X-Kind": "good"}, "/nowhere", 0),
        ({"X-Kind": "good", "Authorization": "bearer wrong"}, "/data", 0),
        ({"X-Kind": "good", "Authorization": ""}, "/data", 0),
    ],
)
@pytest.mark.parametrize("access", [ACCESS, Access()], ids=["closed", "open"])
def test_a_direct_answer_and_its_event_and_its_count_are_as_flask_s(
    tmp_path: Path, headers: dict[str, str], path: str, directly: int, access: Access
) -> None:
    seen = []
    door = Door(tmp_path, access)
    for client in door.flask, door.direct:
        before = counts()
        answer = client.post(path, headers=GOOD | headers)
        told = dict(answer.headers)
        id_ = told.pop("X-Request-Id")
        for event in door.events:
            assert event.pop("request_id") == id_
            assert event.pop("duration_ms") > 0
        counted = {key: value - before.get(key, 0) for key, value in counts().items()}
        seen.append(
            (
                answer.status,
                told,
                answer.json,
                id_ if len(id_) < 32 else "a new one",
                list(door.events),
                {key for key, value in counted.items() if value},
            )
        )
        door.events.clear()
    assert seen[0] == seen[1]
    if access is ACCESS or "Authorization" not in headers:
        assert door.directly == directly


def counts() -> dict[tuple[str, ...], float]:
    return {labels: child._value.get() for labels, child in REQUESTS._metrics.items()}


def test_a_bug_is_logged_and_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = Door(tmp_path, Access()).direct.post("/data", headers={"X-Kind": "bug"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the code's secret" in caplog.text
