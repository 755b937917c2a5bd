"""What is answered without Flask looks to clients and operators as if Flask had."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from door import BrokerUnavailable
from door.call import Answer, Call, json_answer
from door.memory import OutOfMemory
from door.metrics import REQUESTS
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

    def __init__(self, root: Path, access: Access, direct: bool) -> None:
        self.events = Events()
        self.by_flask = 0
        (root / "openapi.json").write_text("{}")
        app = Flask("door", root_path=str(root))
        routes = {("POST", "/data"): self._data}
        app.before_request(self._count)
        equip(app, SimpleNamespace(up=True), self.events, access, routes, routes if direct else ())
        self.client = Client(app)

    def _count(self) -> None:
        self.by_flask += 1

    def _data(self, call: Call) -> Answer:
        kind = call.header("X-Kind") or ""
        call.event.fields |= {"event": "publish", "message_id": kind}
        if kind == "broker":
            raise BrokerUnavailable("The broker is away.")
        if kind == "memory":
            raise OutOfMemory
        if kind == "bug":
            raise ZeroDivisionError("the code's secret")
        call.event.deferred = kind == "deferred"
        return json_answer(200, {"sent": "ü", **call.query("x")})


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
        ({"X-Kind": "memory"}, "/data", 1),
        ({"X-Kind": "good"}, "/data?x=1", 1),
        ({"X-Kind": "good"}, "/data?y=1", 1),
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
    for door in Door(tmp_path, access, direct=False), Door(tmp_path, access, direct=True):
        before = counts()
        answer = door.client.post(path, headers=GOOD | headers)
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
    assert seen[0] == seen[1]
    if access is ACCESS or "Authorization" not in headers:
        assert door.by_flask == 1 - directly


def counts() -> dict[tuple[str, ...], float]:
    return {labels: child._value.get() for labels, child in REQUESTS._metrics.items()}


def test_a_bug_is_logged_and_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer = Door(tmp_path, Access(), direct=True).client.post("/data", headers={"X-Kind": "bug"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the code's secret" in caplog.text
