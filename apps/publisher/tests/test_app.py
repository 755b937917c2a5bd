"""The HTTP contract, through Flask's test client, with a broker that only remembers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlencode

import msgpack  # type: ignore[import-untyped]
import pytest
from door import BrokerUnavailable
from door.environment import ConfigError, Environment
from flask.testing import FlaskClient
from publisher.app import create_app
from publisher.settings import Settings

PROJECT = Path(__file__).parents[3]
FORM = "application/x-www-form-urlencoded"
MISSING = {"message": "Payload is missing parameter 'message'."}
LIMIT = 1000
TEXTS = ["", "pizza", "a\nb\r\n", "\0", "🍕 für 2", "1+1=2 & more%", "\ufffd", " ", "a" * LIMIT]


class FakeBroker:
    def __init__(self) -> None:
        self.up = True
        self.bodies: list[bytes] = []
        self.ids: list[tuple[str, str]] = []

    def publish(self, body: bytes, message_id: str, request_id: str) -> None:
        if not self.up:
            raise BrokerUnavailable("The broker is not connected.")
        self.bodies.append(body)
        self.ids.append((message_id, request_id))


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def client(broker: FakeBroker, events: Events) -> FlaskClient:
    return create_app(Settings(max_message_bytes=LIMIT), broker, events).test_client()


def test_the_welcome_says_how_to_post(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    assert all(word in answer.text for word in ("/data", "message", "curl"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["form", "raw form", "multipart", "json"])
def test_any_text_is_published_unchanged_and_echoed(
    client: FlaskClient, broker: FakeBroker, text: str, kind: str
) -> None:
    request: dict[str, Any] = {
        "form": {"data": urlencode({"message": text}), "content_type": FORM},
        # Bytes beyond ASCII as they are: what curl -d sends.
        "raw form": {
            "data": f"message={quote_plus(text, safe='🍕ü')}".encode(),
            "content_type": f"{FORM}; charset=UTF-8",
        },
        "multipart": {"data": {"message": text}, "content_type": "multipart/form-data"},
        "json": {"json": {"message": text}},
    }[kind]
    answer = client.post("/data", **request)
    assert (answer.status_code, answer.mimetype) == (201, "application/json")
    assert answer.json == {"Message sent": text}
    assert broker.bodies == [text.encode()]


def test_the_answer_is_exactly_the_original_s(client: FlaskClient) -> None:
    assert client.post("/data", data={"message": "hi"}).data == b'{"Message sent": "hi"}'


def test_of_a_repeated_field_the_first_counts(client: FlaskClient, broker: FakeBroker) -> None:
    client.post("/data", data="x=0&message=1&message=2", content_type=FORM)
    client.post("/data", data={"message": ["3", "4"]}, content_type="multipart/form-data")
    assert broker.bodies == [b"1", b"3"]


@pytest.mark.parametrize(
    "request_",
    [
        {"data": "", "content_type": FORM},
        {"data": "massage=back", "content_type": FORM},
        {"data": {"massage": "back"}, "content_type": "multipart/form-data"},
        {"json": {"massage": "back"}},
    ],
)
def test_a_missing_message_is_the_caller_s_fault(
    client: FlaskClient, broker: FakeBroker, request_: dict[str, Any]
) -> None:
    answer = client.post("/data", **request_)
    assert (answer.status_code, answer.json) == (400, MISSING)
    assert broker.bodies == []


@pytest.mark.parametrize(
    ("kind", "body", "fault"),
    [
        (FORM, b"message=%ff", "not UTF-8"),
        (FORM, b"message=\xe4", "not UTF-8"),
        (FORM, b"message=%ed%a0%80", "not UTF-8"),
        (FORM, b"message=1" + b"&a=1" * 100, "more than 100 fields"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n\xe4\r\n--x--\r\n',
            "not UTF-8",
        ),
        ("application/json", b"", "not JSON"),
        ("application/json", b"{", "not JSON"),
        ("application/json", b'{"message": "\xe4"}', "not JSON in UTF-8"),
        ("application/json", b"[" * 5000, "not JSON"),
        ("application/json", b'["message"]', "must be an object"),
        ("application/json", b'{"message": 1}', "must be a string"),
        ("application/json", b'{"message": null}', "must be a string"),
        ("application/json", b'{"message": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_bad_body_is_refused_with_its_fault(
    client: FlaskClient, broker: FakeBroker, kind: str, body: bytes, fault: str
) -> None:
    answer = client.post("/data", data=body, content_type=kind)
    assert answer.status_code == 400
    assert fault in answer.json["message"]  # type: ignore[index]
    assert broker.bodies == []


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", None])
def test_another_media_type_is_refused(client: FlaskClient, kind: str | None) -> None:
    answer = client.post("/data", data=b"message=1", content_type=kind)
    assert answer.status_code == 415
    assert answer.json is not None


def test_a_message_may_have_the_largest_size_in_its_longest_spelling(
    client: FlaskClient, broker: FakeBroker
) -> None:
    escaped = '{"message": "%s"}' % ("\\u0000" * LIMIT)
    assert client.post("/data", data=escaped, content_type="application/json").status_code == 201
    assert broker.bodies == [b"\0" * LIMIT]


@pytest.mark.parametrize("text", ["a" * (LIMIT + 1), "ü" * (LIMIT // 2 + 1)])
def test_a_message_with_too_many_bytes_is_refused(
    client: FlaskClient, broker: FakeBroker, text: str
) -> None:
    answer = client.post("/data", json={"message": text})
    assert answer.status_code == 413
    assert str(LIMIT) in answer.json["message"]  # type: ignore[index]
    assert broker.bodies == []


class Unreadable:
    def read(self, *_: object) -> bytes:
        raise AssertionError("the body was read")

    readline = readinto = readall = read


@pytest.mark.parametrize("kind", [FORM, "application/json", "multipart/form-data; boundary=x"])
def test_a_body_that_is_too_large_is_refused_unread(client: FlaskClient, kind: str) -> None:
    environ = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "99999999", "CONTENT_TYPE": kind}
    assert client.post("/data", environ_overrides=environ).status_code == 413


def test_a_chunked_body_that_is_too_large_is_refused_not_cut_off(
    client: FlaskClient, broker: FakeBroker
) -> None:
    limit = client.application.config["MAX_CONTENT_LENGTH"]
    head, tail = b"junk=", b"&message=pizza"
    body = head + b"a" * (limit - len(head) - len(tail) + 2) + tail
    answer = client.post(
        "/data",
        data=body,
        content_type=FORM,
        environ_overrides={"wsgi.input_terminated": True, "CONTENT_LENGTH": ""},
    )
    assert answer.status_code == 413
    assert broker.bodies == []


def test_no_broker_is_503_and_to_be_tried_again(client: FlaskClient, broker: FakeBroker) -> None:
    broker.up = False
    answer = client.post("/data", data={"message": "pizza"})
    assert (answer.status_code, answer.json) == (503, {"message": "The broker is not connected."})
    assert answer.headers["Retry-After"] == "1"


def test_only_a_post_publishes(client: FlaskClient, broker: FakeBroker) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        assert client.open("/data", method=method).status_code == 405
    assert broker.bodies == []


LOGIN = {"RABBITMQ_USER": "u", "RABBITMQ_PASSWORD": "p"}


def test_settings_come_from_the_environment() -> None:
    read = Settings.read(
        Environment(
            {
                **LOGIN,
                "RABBITMQ_EXCHANGE": "e",
                "RABBITMQ_ROUTING_KEY": "k",
                "MAX_MESSAGE_BYTES": "7",
                "CONFIRM_TIMEOUT": "2",
                "FLUENTD_HOST": "f",
                "FLUENTD_PORT": "3",
            }
        )
    )
    assert (read.broker.user, read.exchange, read.routing_key) == ("u", "e", "k")
    assert (read.max_message_bytes, read.confirm_timeout) == (7, 2)
    assert (read.events.host, read.events.port) == ("f", 3)
    assert Settings.read(Environment(LOGIN)) == Settings(broker=read.broker)


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_MESSAGE_BYTES", "16777217"), ("CONFIRM_TIMEOUT", "5")]
)
def test_a_setting_out_of_range_stops_the_start_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for variable, text in {**LOGIN, name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        create_app(broker=FakeBroker())


def test_health_and_metrics_are_served(client: FlaskClient, broker: FakeBroker) -> None:
    assert client.get("/healthz?ready").status_code == 200
    broker.up = False
    assert client.get("/healthz?ready").status_code == 503
    assert "http_requests_total" in client.get("/metrics").text


def test_no_error_repeats_the_message(client: FlaskClient) -> None:
    answer = client.post("/data", data=b'{"message": "secret"', content_type="application/json")
    assert answer.status_code == 400
    assert "secret" not in json.dumps(answer.json)


def test_a_published_message_is_told_with_its_ids_which_travel_with_it(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    answer = client.post("/data", data={"message": "secret"}, headers={"X-Request-Id": "mine"})
    assert answer.headers["X-Request-Id"] == "mine"
    ((message_id, request_id),) = broker.ids
    assert uuid.UUID(message_id).version == 4
    assert request_id == "mine"
    (event,) = events
    assert event.pop("duration_ms") > 0
    assert event == {
        "level": "info",
        "event": "publish",
        "request_id": "mine",
        "message_id": message_id,
        "queue": "takeaway",
        "status": 201,
    }


def test_a_message_that_the_broker_may_not_have_is_told_with_its_id(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    broker.up = False
    answer = client.post("/data", data={"message": "secret"})
    (event,) = events
    assert event["request_id"] == answer.headers["X-Request-Id"]
    assert uuid.UUID(event["message_id"]).version == 4
    assert (event["event"], event["level"], event["status"]) == ("publish", "error", 503)
    assert event["reason"] == "The broker is not connected."


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FORM, b"secret=1"),
        (FORM, b"message=secret%ff"),
        (FORM, b"message=secret" + b"&secret=1" * 100),
        (FORM, b"message=" + b"secret" * LIMIT),
        ("multipart/form-data; boundary=x", b"--x\r\nsecret\r\n"),
        ("application/json", b'{"message": "secret\xe4"}'),
        ("application/json", b'{"message": "secret'),
        ("application/json", b'{"message": "secret\\x"}'),
        ("application/json", b'{"message": "secret\n"}'),
        ("application/json", b'{"message": secret}'),
        ("application/json", b'{"secret": 1}'),
        ("application/json", b'{"message": %s}' % (b"1" * 5000)),
        ("secret", b"secret"),
    ],
)
def test_a_refused_request_is_told_with_its_reason_and_nothing_of_its_body(
    client: FlaskClient, events: Events, kind: str, body: bytes
) -> None:
    status = client.post("/data?secret", data=body, content_type=kind).status_code
    (event,) = events
    assert (event["event"], event["level"], event["status"]) == ("publish", "warning", status)
    assert event["reason"]
    assert "secret" not in str(event)
    assert not any(part in event["reason"] for part in ("e4", "11111"))
    assert "message_id" not in event


def test_events_made_just_before_the_end_are_sent_by_a_worker(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector, socket.socket() as free:
        collector.settimeout(10)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        env = {
            **LOGIN,
            "RABBITMQ_PORT": "1",
            "FLUENTD_HOST": "127.0.0.1",
            "FLUENTD_PORT": str(collector.getsockname()[1]),
            "GRANIAN_HOST": "127.0.0.1",
            "GRANIAN_PORT": str(port),
            # A second one might still be starting at the end, when granian does not hear SIGTERM.
            "GRANIAN_WORKERS": "1",
            "GRANIAN_LOG_LEVEL": "error",
            "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(["apps/publisher", "apps/door"]),
        }
        command = [sys.executable, "-m", "publisher"]
        with subprocess.Popen(command, env=env, cwd=PROJECT) as server:
            try:
                told = [post(port) for _ in range(40)]
                server.send_signal(signal.SIGTERM)
                assert server.wait(10) == 0
            finally:
                server.kill()
        connection, _ = collector.accept()
        with connection, connection.makefile("rb") as stream:
            heard = [record["request_id"] for _, _, record in msgpack.Unpacker(stream)]
    assert heard == told


def post(port: int) -> str:
    """Return the request id of a POST that the absent broker fails, once the server is up."""
    url = f"http://127.0.0.1:{port}/data"
    end = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(url, b"message=1", timeout=5)
        except urllib.error.HTTPError as error:
            with error:
                return str(error.headers["X-Request-Id"])
        except urllib.error.URLError:
            assert time.monotonic() < end, "the server never answered"
            time.sleep(0.05)


def test_the_check_before_the_start_counts_as_no_worker() -> None:
    script = "import publisher.__main__, sys; sys.exit('door.web' in sys.modules)"
    folders = os.pathsep.join(["apps/publisher", "apps/door"])
    subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": folders}, cwd=PROJECT, check=True
    )
