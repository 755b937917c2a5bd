"""What a page can have a browser do at a door, by every way through it."""

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
from werkzeug.exceptions import abort
from werkzeug.test import Client, TestResponse

HASH = sha256(b"t0ken").hexdigest()
CLIENTS = Access([{"name": "me", "tokens": [HASH], "send": [], "receive": [], "manage": []}])
READERS = Access(
    [{"name": "prometheus", "tokens": [HASH], "send": [], "receive": [], "manage": []}]
)
TOKEN = {"Authorization": "Bearer t0ken"}
APP = "https://app.example.com"
OTHER = "https://evil.example.com"
# Answered by Direct; by Flask, and as what nobody knows.
ROUTES = ("/data", "/openapi.json", "/nowhere")
OPEN = ("/healthz", "/metrics")
ACCESS = "Access-Control-Allow-Origin"


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


class Door:
    """A door called broker.example.com on port 5001, with clients or without."""

    def __init__(
        self, root: Path, lists: Lists, names: tuple[str, ...] = ("broker.example.com",)
    ) -> None:
        self.asked = 0
        self.events = Events()
        (root / "openapi.json").write_text("{}")
        app = Flask("door", root_path=str(root))
        routes = {("GET", "/data"): self._data, ("POST", "/data"): self._data}
        topology = SimpleNamespace(lists=lists)
        equip(app, SimpleNamespace(up=True), self.events, topology, routes, names)
        self._client = Client(app)

    def _data(self, call: Call) -> Answer:
        self.asked += 1
        if call.environ["REQUEST_METHOD"] == "POST":
            abort(413, "That was too large.")
        return json_answer(200, {})

    def ask(self, path: str, method: str = "GET", **headers: str) -> TestResponse:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given.setdefault("Host", "broker.example.com:5001")
        return self._client.open(path, method=method, headers=given)


@pytest.fixture
def anybody(tmp_path: Path) -> Door:
    """Return a door without clients."""
    return Door(tmp_path, Lists(frozenset()))


@pytest.fixture
def listed(tmp_path: Path) -> Door:
    """Return a door with clients, for pages of APP."""
    return Door(tmp_path, Lists(frozenset(), access=CLIENTS, origins=frozenset([APP])))


def refused(answer: TestResponse, *words: str) -> bool:
    """Whether answer is 403, in the shape of all errors and with words."""
    if answer.status_code != 403:
        return False
    assert list(answer.json or {}) == ["message"]
    assert all(word in (answer.json or {})["message"] for word in words)
    assert answer.headers["X-Request-Id"]
    return True


@pytest.mark.parametrize("path", [*ROUTES, *OPEN])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": OTHER},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://broker.example.com"},
        {"Origin": "http://broker.example.com:5000"},
        {"Origin": "http://localhost:5001"},
        {"Origin": "broker.example.com:5001"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://broker.example.com:5001"},
        {"Origin": "null", "Host": ""},
    ],
    ids=str,
)
def test_what_a_foreign_page_has_a_browser_send_is_refused(
    anybody: Door, listed: Door, path: str, headers: dict[str, str]
) -> None:
    for door in anybody, listed:
        assert refused(door.ask(path, **headers), "may not use this door")
        assert refused(door.ask(path, **headers, **TOKEN))
        assert door.asked == 0
        assert ACCESS not in door.ask(path, **headers).headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://broker.example.com:5001"},
        {"Origin": "https://BROKER.example.com:5001", "Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "none"},
    ],
    ids=str,
)
def test_the_door_s_own_pages_and_other_programs_are_let_in(
    anybody: Door, headers: dict[str, str]
) -> None:
    for path in *ROUTES[:2], *OPEN:
        assert anybody.ask(path, **headers).status_code == 200


def test_a_refused_request_is_told_as_others_are(anybody: Door) -> None:
    answer = anybody.ask("/data", Origin=OTHER)
    (event,) = anybody.events
    assert (event["status"], event["path"], event["level"]) == (403, "/data", "warning")
    assert event["request_id"] == answer.headers["X-Request-Id"]
    assert OTHER in event["reason"]


HOSTS = {
    "broker.example.com": True,
    "broker.example.com:80": True,
    "Broker.Example.COM:5001": True,
    "localhost:5001": True,
    "127.0.0.1": True,
    "[::1]:5001": True,
    "": False,
    "evil.example.com": False,
    "evil.example.com:5001": False,
    "broker.example.com.evil.example.com": False,
    "localhost.": False,
    "localhost:5001:80": False,
    "192.0.2.1:5001": False,
}


@pytest.mark.parametrize(("host", "known"), HOSTS.items())
def test_a_door_without_clients_answers_under_its_own_names_alone(
    anybody: Door, host: str, known: bool
) -> None:
    for path in ROUTES:
        assert refused(anybody.ask(path, Host=host), "is not called", repr(host)) is not known
    assert anybody.asked == known


def test_health_and_metrics_have_any_name(anybody: Door) -> None:
    for path in OPEN:
        assert anybody.ask(path, Host="192.0.2.1:5000").status_code == 200


def test_a_request_of_http_1_0_needs_no_name(anybody: Door) -> None:
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/data", "QUERY_STRING": ""}
    told: list[str] = []
    anybody._client.application(environ, lambda status, *_: told.append(status))
    assert told == ["200 OK"]


def test_a_door_with_clients_or_without_names_answers_under_any_name(
    listed: Door, tmp_path: Path
) -> None:
    assert listed.ask("/data", Host="evil.example.com", **TOKEN).status_code == 200
    nameless = Door(tmp_path, Lists(frozenset()), names=())
    assert nameless.ask("/data", Host="evil.example.com").status_code == 200


def asking(origin: str, headers: str = "authorization,x-name, X-Other,x-bad\u00fc,cookie") -> Any:
    """Return the headers by which a browser asks what a page of origin may send."""
    return {
        "method": "OPTIONS",
        "Origin": origin,
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": headers,
    }


@pytest.mark.parametrize("path", ["/data", "/openapi.json", "/metrics"])
def test_a_browser_is_told_what_a_listed_page_may_send(listed: Door, path: str) -> None:
    answer = listed.ask(path, **asking(APP))
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers[ACCESS] == APP
    assert answer.headers["Vary"] == "Origin"
    assert answer.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
    allowed = answer.headers["Access-Control-Allow-Headers"].split(", ")
    assert {"Authorization", "Content-Type", "Message-Id", "x-name", "X-Other"} <= set(allowed)
    assert not {"cookie", "x-bad\u00fc"} & set(allowed)
    assert int(answer.headers["Access-Control-Max-Age"]) > 0


def test_a_browser_is_told_nothing_of_what_others_may_send(listed: Door, anybody: Door) -> None:
    for door, origin in (listed, OTHER), (anybody, APP):
        answer = door.ask("/data", **asking(origin))
        assert refused(answer)
        assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("site", [{}, {"Sec_Fetch_Site": "cross-site"}])
@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("GET", "/data", TOKEN, 200),
        ("POST", "/data", TOKEN, 413),
        ("GET", "/data", {}, 401),
        ("GET", "/openapi.json", TOKEN, 200),
        ("GET", "/nowhere", TOKEN, 404),
        ("OPTIONS", "/data", {}, 401),
    ],
)
def test_a_listed_page_may_read_every_answer(
    listed: Door, method: str, path: str, token: dict[str, str], status: int, site: dict[str, str]
) -> None:
    answer = listed.ask(path, method, Origin=APP, **token, **site)
    assert answer.status_code == status
    assert answer.headers.getlist(ACCESS) == [APP]
    assert answer.headers["Vary"] == "Origin"
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"Message-Id", "Retry-After", "X-Receipt", "X-Request-Id"} <= set(exposed)


def test_who_is_no_page_is_told_nothing_of_pages(listed: Door) -> None:
    answer = listed.ask("/data", **TOKEN)
    assert answer.status_code == 200
    assert ACCESS not in answer.headers


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, 401),
        ({"Authorization": "Basic cHJvbWV0aGV1czp0MGtlbg=="}, 200),
        ({"Authorization": "Basic cHJvbWV0aGV1czp0b2tlbg=="}, 401),
        ({"Authorization": "Basic bWU6Y2xpZW50"}, 401),
    ],
)
def test_with_readers_metrics_are_for_them_alone_and_health_for_everybody(
    tmp_path: Path, given: dict[str, str], status: int
) -> None:
    client = {"name": "me", "tokens": [sha256(b"client").hexdigest()]}
    access = Access([{**client, "send": [], "receive": [], "manage": []}])
    for lists in (
        Lists(frozenset(), readers=READERS),
        Lists(frozenset(), frozenset(), access, READERS),
    ):
        door = Door(tmp_path, lists)
        for method in "GET", "HEAD":
            answer = door.ask("/metrics", method, **given)
            assert answer.status_code == status
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        assert door.ask("/healthz").status_code == 200
        assert door.ask("/healthz?ready").status_code == 200


def test_a_reader_is_no_client(tmp_path: Path) -> None:
    other = {"name": "me", "tokens": [], "send": [], "receive": [], "manage": []}
    door = Door(tmp_path, Lists(frozenset(), access=Access([other]), readers=READERS))
    assert door.ask("/data", **TOKEN).status_code == 401
