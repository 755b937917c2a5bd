"""The HTTP contract, through Flask's test client, with a broker that only remembers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlencode

import pytest
from door import BrokerUnavailable
from door.settings import ConfigError, Environment
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

    def publish(self, body: bytes) -> None:
        if not self.up:
            raise BrokerUnavailable("The broker is not connected.")
        self.bodies.append(body)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def client(broker: FakeBroker) -> FlaskClient:
    return create_app(Settings(max_message_bytes=LIMIT), broker).test_client()


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
            }
        )
    )
    assert (read.broker.user, read.exchange, read.routing_key) == ("u", "e", "k")
    assert (read.max_message_bytes, read.confirm_timeout) == (7, 2)
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


def test_the_check_before_the_start_counts_as_no_worker() -> None:
    script = "import publisher.__main__, sys; sys.exit('door.web' in sys.modules)"
    folders = os.pathsep.join(["apps/publisher", "apps/door"])
    subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": folders}, cwd=PROJECT, check=True
    )
