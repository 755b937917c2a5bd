"""What GET /queues promises; a server in a thread stands in for RabbitMQ's management API."""

import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import gevent
import pytest
from common.environment import ConfigError, Environment
from door import topology
from door.memory import Memory
from door.settings import BrokerSettings
from door.topology import Topology
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from subscriber import overview
from subscriber.app import create_app
from subscriber.broker import Broker
from subscriber.overview import Overview
from subscriber.settings import Settings

from .conftest import serving

PASSWORD = "p\u00e4ss"
BROKER = BrokerSettings(user="subscriber", password=PASSWORD)
NAMES = ["pizza", "audit", "takeaway"]
RIGHTS = ("send", "receive", "manage")
UNKNOWN: dict[str, Any] = {"ready": None, "unacknowledged": None, "dead": None, "oldest": None}
UNKNOWN |= {"rates": {"in": 0, "out": 0}}


class Api:
    """The management API: what it answers, and what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes | None = None
        self.rows: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str | None]] = []
        # Set while it answers at once.
        self.prompt = threading.Event()
        self.prompt.set()
        self.at_a_time = self.most = 0
        self.url = ""


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        api.asked.append((request.path, request.headers["Authorization"]))
        api.at_a_time += 1
        api.most = max(api.most, api.at_a_time)
        api.prompt.wait(5)
        api.at_a_time -= 1
        return api.status, json.dumps(api.rows).encode() if api.body is None else api.body

    with serving(answer) as api.url:
        yield api
        api.prompt.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "queues.json"
    path.write_text(json.dumps({"queues": NAMES, "topics": ["events"]}))
    return path


def door(path: Path, url: str | None, timeout: float = 1, memory: int = 2**40) -> FlaskClient:
    settings = Settings(BROKER, queues_file=path, management_url=url, receive_timeout=timeout)
    broker = Broker(settings, Memory(2**40))
    return create_app(broker, settings, Memory(memory), None).test_client()


@pytest.fixture
def client(api: Api, path: Path) -> FlaskClient:
    return door(path, api.url)


def row(name: str, ready: int, unacknowledged: int = 0, **rates: float) -> dict[str, Any]:
    stats = {f"{kind}_details": {"rate": rate} for kind, rate in rates.items()}
    counts = {"messages_ready": ready, "messages_unacknowledged": unacknowledged}
    return {"name": name, **counts, "message_stats": stats}


class Clock:
    """The overview's time, which stands still until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(overview, "time", clock)
    return clock


def told(client: FlaskClient, **headers: str) -> Any:
    answer = client.get("/queues", headers=headers)
    assert answer.status_code == 200, answer.text
    return (answer.json or {})["queues"]


def fails(client: FlaskClient, text: str) -> None:
    answer = client.get("/queues")
    assert answer.status_code == 503
    assert text in (answer.json or {})["message"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_each_queue_of_the_list_is_told_by_its_name(client: FlaskClient, api: Api) -> None:
    api.rows = [
        row("takeaway", 3, 2, publish=1.5, deliver_get=0.25),
        row("takeaway.dead", 4, 1),
        row("somebody.else.s", 9),
        row("audit", 0, publish=7),
        # RabbitMQ's empty object.
        row("audit.dead", 0) | {"message_stats": []},
        # What the broker has just made has no statistics.
        {"name": "pizza"},
        {"name": "pizza.dead", "messages_ready": 1},
    ]
    rates = {"in": 1.5, "out": 0.25}
    assert told(client) == [
        {
            "name": "audit",
            "ready": 0,
            "unacknowledged": 0,
            "dead": 0,
            "oldest": 0,
            "rates": {"in": 7, "out": 0},
        },
        {"name": "pizza", **UNKNOWN},
        {
            "name": "takeaway",
            "ready": 3,
            "unacknowledged": 2,
            "dead": 5,
            "oldest": 0,
            "rates": rates,
        },
    ]


def test_queues_that_the_broker_does_not_know_have_no_counts(api: Api, path: Path) -> None:
    names = [f"q{number}" for number in range(20)]
    path.write_text(json.dumps({"queues": names, "topics": []}))
    assert told(door(path, api.url)) == [{"name": name, **UNKNOWN} for name in sorted(names)]


def test_the_door_asks_for_no_more_than_it_tells_by_its_own_name(
    client: FlaskClient, api: Api
) -> None:
    told(client)
    ((path, login),) = api.asked
    assert path == (
        "/api/queues/%2F?columns=name,messages_ready,messages_unacknowledged,message_bytes_ready,"
        "message_stats.publish,"
        "message_stats.publish_details.rate,message_stats.deliver_get_details.rate,"
        "message_stats.ack,message_stats.get_no_ack,message_stats.deliver_no_ack,"
        "effective_policy_definition.max-length,effective_policy_definition.max-length-bytes"
    )
    assert login == f"Basic {b64encode(f'subscriber:{PASSWORD}'.encode()).decode()}"


@pytest.mark.parametrize("right", [*RIGHTS, None])
def test_a_client_sees_the_queues_for_which_it_has_any_right(
    api: Api, path: Path, right: str | None
) -> None:
    client: dict[str, Any] = {"name": "shop", "tokens": [sha256(b"secret").hexdigest()]}
    client |= {one: ["pizza", "events"] if one == right else [] for one in RIGHTS}
    path.write_text(json.dumps({"queues": NAMES, "topics": ["events"], "clients": [client]}))
    asks = door(path, api.url)
    assert asks.get("/queues").status_code == 401
    names = [one["name"] for one in told(asks, Authorization="Bearer secret")]
    assert names == (["pizza"] if right else [])


def test_an_answer_is_everybody_s_for_a_second(
    client: FlaskClient, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "KEPT", 0.3)
    begin = time.monotonic()
    api.rows = [row("audit", 1)]
    assert told(client)[0]["ready"] == 1
    api.rows = [row("audit", 2)]
    while told(client)[0]["ready"] == 1:
        assert time.monotonic() - begin < 2
        gevent.sleep(0.01)
    assert time.monotonic() - begin > 0.3
    assert len(api.asked) == 2
    assert told(client)[0]["ready"] == 2


def test_many_requests_are_one_question_while_which_others_are_answered(
    client: FlaskClient, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    state = overview.read_state
    monkeypatch.setattr(overview, "read_state", lambda row: read.append(row["name"]) or state(row))
    api.rows = [row("audit", 1)]
    api.prompt.clear()
    get = client.application.test_client().get
    waiting = [gevent.spawn(get, "/queues") for _ in range(20)]
    begin = time.monotonic()
    gevent.sleep(0.1)
    assert client.get("/healthz").status_code == 200
    assert time.monotonic() - begin < 0.5
    assert not any(one.ready() for one in waiting)
    api.prompt.set()
    assert {one.get(timeout=2).status_code for one in waiting} == {200}
    assert len(api.asked) == 1
    assert read == ["audit"], "its answer is parsed once"


def test_a_silent_api_is_told_in_time_and_asked_one_question_at_a_time(
    api: Api, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "KEPT", 0.1)
    client = door(path, api.url, timeout=0.2)
    api.prompt.clear()
    # The thread has more time, as one has whose server says little by little.
    monkeypatch.setattr(
        overview, "HTTPConnection", lambda host, port, **_: connection(host, port, timeout=5)
    )
    begin = time.monotonic()
    get = client.application.test_client().get
    waiting = [gevent.spawn(get, "/queues") for _ in range(20)]
    assert {one.get(timeout=2).status_code for one in waiting} == {503}
    assert time.monotonic() - begin < 0.4, "they wait together"
    gevent.sleep(0.1)
    fails(client, "timed out")
    assert api.most == len(api.asked) == 1
    api.prompt.set()
    gevent.sleep(0.2)
    assert len(told(client)) == len(NAMES)


connection = overview.HTTPConnection


def test_an_api_that_answers_again_is_asked_again(
    client: FlaskClient, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "KEPT", 0.05)
    api.status = 401
    fails(client, "HTTP 401")
    api.status = 200
    gevent.sleep(0.06)
    assert len(told(client)) == len(NAMES)


@pytest.mark.parametrize("status", [301, 401, 404, 500, 503])
def test_what_is_not_200_is_told(client: FlaskClient, api: Api, status: int) -> None:
    api.status = status
    fails(client, f"management API cannot be used: HTTP {status}")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"[{}]", b"3", b'[{"name": "a"', b"\xff"])
def test_an_answer_that_makes_no_sense_is_told(client: FlaskClient, api: Api, body: bytes) -> None:
    api.body = body
    fails(client, "makes no sense")


def test_an_answer_that_is_too_large_is_told(
    client: FlaskClient, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "LARGEST", 100)
    api.rows = [row("audit", 1), row("pizza", 1)]
    fails(client, "more than 100 bytes")


def test_memory_is_held_for_an_answer_before_it_is_read(api: Api, path: Path) -> None:
    api.rows = [row(f"queue {number}", 1) for number in range(1000)]
    fails(door(path, api.url, memory=100_000), "memory is in use")


def test_an_api_that_is_not_there_is_told(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fails(door(path, f"http://127.0.0.1:{port}"), "management API cannot be used")


def test_without_an_address_it_says_what_to_set(path: Path) -> None:
    fails(door(path, None), "set RABBITMQ_MANAGEMENT_URL")


def test_a_parameter_is_not_known(client: FlaskClient, api: Api) -> None:
    assert client.get("/queues?name=pizza").status_code == 400
    assert api.asked == []


def counted(name: str, ready: int, limits: dict[str, int] | None = None, **stats: int) -> Any:
    """Return a row with messages of 10 bytes, a policy's limits, and counts since the start."""
    policy = limits or []
    more = {"message_bytes_ready": 10 * ready, "effective_policy_definition": policy}
    return row(name, ready) | more | {"message_stats": stats}


def oldest(client: FlaskClient, clock: Clock, api: Api, *rows: Any) -> Any:
    """Return the age that is told of the queue audit, 10 seconds later, when the API tells rows."""
    clock.now += 10
    api.rows = list(rows)
    return told(client)[0]["oldest"]


def gauges(client: FlaskClient) -> dict[str, float]:
    """Return the ages in the metrics, by queue."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.labels["queue"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "queue_oldest_message_age_seconds"
    }


def test_the_age_of_the_oldest_message_is_told_until_it_was_taken(
    client: FlaskClient, api: Api, clock: Clock
) -> None:
    see = partial(oldest, client, clock, api)
    assert see(counted("audit", 0)) == 0
    assert see(counted("audit", 1, publish=1)) == 10
    assert see(counted("audit", 2, publish=2)) == 20
    assert see(counted("audit", 1, publish=2, ack=1)) == 20
    assert see(counted("audit", 1, publish=2, ack=1)) == 30
    assert see(counted("audit", 0, publish=2, ack=2)) == 0


def test_an_age_is_not_told_while_the_broker_has_no_counts_and_grows_meanwhile(
    client: FlaskClient, api: Api, clock: Clock
) -> None:
    see = partial(oldest, client, clock, api)
    assert see(counted("audit", 0)) == 0
    assert see(counted("audit", 1, publish=1)) == 10
    assert see({"name": "audit"}) is None
    assert see() is None
    clock.now += 10
    api.status = 503
    fails(client, "HTTP 503")
    api.status = 200
    assert see(counted("audit", 1, publish=1)) == 50


@pytest.mark.parametrize("limits", [{"max-length": 10}, {"max-length": 99, "max-length-bytes": 99}])
@pytest.mark.parametrize("way", ["ack", "get_no_ack", "deliver_no_ack", "dead", "dead and acked"])
def test_what_a_full_queue_refuses_makes_its_oldest_message_no_younger(
    client: FlaskClient, api: Api, clock: Clock, limits: dict[str, int], way: str
) -> None:
    def see(ready: int, published: int, left: int) -> Any:
        stats = {way: left, "publish": published}
        dead = {
            "dead": row("audit.dead", left),
            "dead and acked": counted("audit.dead", 0, ack=left),
        }
        rows = [counted("audit", ready, limits, **stats), dead.get(way, row("audit.dead", 0))]
        return oldest(client, clock, api, *rows)

    assert see(0, 0, 0) == 0
    assert see(10, 20, 0) == 10
    assert see(10, 120, 0) == 20
    # Two that have left made room for two.
    assert see(10, 220, 2) == 30
    assert see(8, 320, 4) == 40
    # All of the first ten are gone.
    assert see(8, 326, 10) == 30


def test_what_expires_in_a_queue_that_is_not_full_makes_room_for_the_next(
    client: FlaskClient, api: Api, clock: Clock
) -> None:
    see = partial(oldest, client, clock, api)
    see(counted("audit", 0, {"max-length": 10}))
    for number in range(5, 50, 5):
        assert see(counted("audit", 5, {"max-length": 10}, publish=number)) == 10


def test_the_metrics_have_the_ages_of_the_queues_of_the_list(
    client: FlaskClient, api: Api, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "LOOK", 0)
    rows = [counted(name, 0) for name in ("audit", "audit.dead", "pizza", "somebody.else.s")]
    assert oldest(client, clock, api, *rows) == 0
    rows[0] = counted("audit", 1, publish=1)
    assert oldest(client, clock, api, *rows) == 10
    assert gauges(client) == {"audit": 10, "pizza": 0}
    path.write_text(json.dumps({"queues": ["pizza", "takeaway"], "topics": ["events"]}))
    assert oldest(client, clock, api, *rows) == 0
    assert gauges(client) == {"pizza": 0}
    clock.now += 10
    api.status = 503
    fails(client, "HTTP 503")
    assert gauges(client) == {}


def test_the_queues_are_watched_while_nobody_asks_and_each_new_reason_why_not_is_logged_once(
    client: FlaskClient,
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(overview, "WATCH", 0.01)
    monkeypatch.setattr(overview, "KEPT", 0)
    settings = Settings(BROKER, management_url=api.url, receive_timeout=1)
    watched = Overview(settings, Memory(2**40), Topology("audit"))

    def asked(times: int) -> None:
        """Wait until the API was asked so often, and has answered."""
        until = len(api.asked) + times
        deadline = time.monotonic() + 5
        while len(api.asked) < until:
            assert time.monotonic() < deadline
            gevent.sleep(0.01)

    api.rows = [counted("audit", 7)]
    watch = gevent.spawn(watched.watch)
    try:
        asked(3)
        assert 0 < gauges(client)["audit"] < 5
        for api.status in (503, 401, 200, 401):
            asked(5)
        assert gauges(client) == {}
    finally:
        watch.kill()
    why = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert why == ["HTTP 503", "HTTP 401", "HTTP 401"]


@pytest.mark.parametrize("watch", [True, False])
def test_only_the_door_s_own_process_watches(monkeypatch: pytest.MonkeyPatch, watch: bool) -> None:
    watched: list[Overview] = []
    monkeypatch.setattr(Overview, "watch", lambda self: watched.append(self))
    settings = Settings(BROKER)
    memory = Memory(2**40)
    create_app(Broker(settings, memory), settings, memory, None, watch=watch)
    gevent.sleep(0)
    assert len(watched) == watch


def test_without_an_address_nobody_watches() -> None:
    Overview(Settings(BROKER), Memory(2**40), Topology("audit")).watch()


ENVIRONMENT = {"RABBITMQ_USER": "u", "RABBITMQ_PASSWORD": "p"}


@pytest.mark.parametrize("url", ["http://rabbitmq:15672", "http://[::1]:1/", "HTTP://10.0.0.1"])
def test_the_address_is_read_from_the_environment(url: str) -> None:
    settings = Settings.read(Environment(ENVIRONMENT | {"RABBITMQ_MANAGEMENT_URL": url}))
    assert settings.management_url == url
    assert Settings.read(Environment(ENVIRONMENT)).management_url is None


@pytest.mark.parametrize(
    "url",
    ["", "rabbitmq:15672", "https://rabbitmq", "http://a:0", "http://a:65536", "http://u:p@a"],
)
def test_an_address_that_cannot_be_used_stops_the_start_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="RABBITMQ_MANAGEMENT_URL"):
        Settings.read(Environment(ENVIRONMENT | {"RABBITMQ_MANAGEMENT_URL": url}))
