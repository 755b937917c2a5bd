"""The HTTP contract, through Flask's test client, with a broker that only remembers."""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from hashlib import sha256
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlencode

import gevent
import gevent.socket
import msgpack  # type: ignore[import-untyped]
import pytest
from common.environment import ConfigError, Environment
from door.memory import Memory
from door.server import Body
from flask.testing import FlaskClient
from prometheus_client import REGISTRY
from publisher.app import create_app
from publisher.broker import Unconfirmed
from publisher.message import Message, Target
from publisher.settings import Settings

PROJECT = Path(__file__).parents[3]
FORM = "application/x-www-form-urlencoded"
MISSING = {"message": "Payload is missing parameter 'message'."}
LIMIT = 1000
BATCH_LIMIT = 100_000
TEXTS = ["", "pizza", "a\nb\r\n", "\0", "🍕 für 2", "1+1=2 & more%", "\ufffd", " ", "a" * LIMIT]


class FakeBroker:
    def __init__(self) -> None:
        self.up = True
        self.certain = 0
        self.messages: list[Message] = []
        self.targets: list[Target] = []
        # Of each request, so many messages match no subscription.
        self.dropped = 0

    def publish(self, messages: Sequence[Message], target: Target) -> int:
        if not self.up:
            raise Unconfirmed("The broker is not connected.", self.certain)
        self.messages += messages
        self.targets.append(target)
        return self.dropped

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    @property
    def last(self) -> Message:
        return self.messages[-1]


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
def client(broker: FakeBroker, events: Events, tmp_path: Path) -> FlaskClient:
    queues = tmp_path / "queues.json"
    queues.write_text('{"queues": ["takeaway", "orders"], "topics": ["events"]}')
    settings = Settings(queues_file=queues, max_message_bytes=LIMIT, max_batch_bytes=BATCH_LIMIT)
    return create_app(settings, broker, events).test_client()


def lists(folder: Path, token: str | None = None, send: Sequence[str] = ("takeaway",)) -> Path:
    """Write the file of queues and topics, and of a client with token if there is one."""
    told: dict[str, Any] = {"queues": ["takeaway", "orders"], "topics": ["events"], "clients": []}
    if token:
        tokens = [sha256(token.encode()).hexdigest()]
        client = {"name": "shop", "tokens": tokens, "send": send, "receive": [], "manage": []}
        told["clients"].append(client)
    file = folder / "queues.json"
    file.write_text(json.dumps(told))
    return file


def arrived(body: bytes, waiting: bytes = b"") -> dict[str, Any]:
    """Return a form as the server passes it on, whose first bytes have arrived with the headers."""
    stream = BufferedReader(BytesIO(body + waiting))  # type: ignore[arg-type]
    source = Body(stream, len(body), None, False)
    environ = {"wsgi.input": source, "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": FORM}
    return {"environ_overrides": environ}


def test_the_welcome_says_how_to_post(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    assert all(word in answer.text for word in ("/data", "message", "curl", "/messages", "/batch"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["form", "arrived form", "raw form", "multipart", "json"])
def test_any_text_is_published_unchanged_and_echoed(
    client: FlaskClient, broker: FakeBroker, text: str, kind: str
) -> None:
    request: dict[str, Any] = {
        "form": {"data": urlencode({"message": text}), "content_type": FORM},
        "arrived form": arrived(urlencode({"message": text}).encode()),
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
    assert broker.last.content_type == "text/plain"


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


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'\xef\xbb\xbf{"message": "pizza"}'),
        ("application/vnd.pizza+json; charset=utf-8", b'{"message": "pizza"}'),
        ("Application/X-WWW-Form-Urlencoded; Charset=UTF-8", b"message=pizza"),
        (FORM, b"m%65ssage=p%69zza"),
        (FORM, b"other=%ff&message=pizza"),
    ],
)
def test_a_text_is_taken_as_clients_spell_it(
    client: FlaskClient, broker: FakeBroker, kind: str, body: bytes
) -> None:
    assert client.post("/data", data=body, content_type=kind).status_code == 201
    assert broker.bodies == [b"pizza"]


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_a_file_named_message_is_its_text(
    client: FlaskClient, broker: FakeBroker, size: int
) -> None:
    form = {"other": (BytesIO(b"\xff"), "a.png"), "message": (BytesIO(b"p" * size), "a.txt")}
    assert client.post("/data", data=form).json == {"Message sent": "p" * size}
    assert broker.bodies == [b"p" * size]


def part(name: str, value: str = "") -> str:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "status", "fault"),
    [
        ("x", part("message", "pizza"), 400, "cannot be read"),
        ("x", "--x\r\n\r\n\r\n--x--\r\n", 400, "cannot be read"),
        ("", part("message", "pizza") + "--x--", 400, "cannot be read"),
        ("ä", part("message", "pizza") + "--x--", 400, "cannot be read"),
        ("x", part("other") * 101 + "--x--", 413, "more than 100 fields"),
        ("x", "--x\r\n" + "a:\r\n" * 40_000 + "\r\n--x--", 413, "65536 bytes around"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_multipart_form_that_is_none_is_refused(
    broker: FakeBroker, kind: str, body: str, status: int, fault: str
) -> None:
    client = create_app(Settings(), broker, Events()).test_client()
    type_ = f"multipart/form-data; boundary={kind}"
    answer = client.post("/data", data=body.encode(), content_type=type_)
    assert (answer.status_code, broker.bodies) == (status, [])
    assert fault in (answer.json or {})["message"]


@pytest.mark.parametrize(
    "body", [b'{"message": "hi"}', b' {"message": "a=b&c"}', b"\xef\xbb\xbf{}"]
)
def test_json_that_is_sent_as_a_form_is_told_so(client: FlaskClient, body: bytes) -> None:
    for form in {"data": body, "content_type": FORM}, arrived(body):
        answer = client.post("/data", **form)
        assert answer.status_code == 400
        assert answer.json == {
            "message": "The body looks like JSON; send it with Content-Type: application/json."
        }


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "it cannot be read from line 1, column 1 on."),
        (b'{"message":\n oops}', "it cannot be read from line 2, column 2 on."),
        (b'{"message": "\xe4"}', "its byte 14 is not UTF-8."),
        (b"[" * 5000, "it is nested too deeply."),
        (b'{"message": %s}' % (b"1" * 5000), "it has a number that is too long."),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_json_is_told_in_plain_words(
    client: FlaskClient, body: bytes, words: str
) -> None:
    answer = client.post("/data", data=body, content_type="application/json")
    assert answer.json == {"message": f"The body is not JSON in UTF-8: {words}"}


@pytest.mark.parametrize("path", ["/data", "/batch"])
@pytest.mark.parametrize("encoding", ["gzip", "Deflate", "identity, br"])
def test_text_that_is_sent_encoded_is_refused_by_name_and_unread(
    client: FlaskClient, broker: FakeBroker, path: str, encoding: str
) -> None:
    environ = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "9", "CONTENT_TYPE": FORM}
    headers = {"Content-Encoding": encoding}
    answer = client.post(path, environ_overrides=environ, headers=headers)
    assert answer.status_code == 415
    assert answer.json == {"message": f"The body is sent as {encoding.lower()}; send it unencoded."}
    assert broker.messages == []


@pytest.mark.parametrize("encoding", ["identity", " Identity", ""])
def test_text_may_say_that_it_is_not_encoded(
    client: FlaskClient, broker: FakeBroker, encoding: str
) -> None:
    headers = {"Content-Encoding": encoding}
    assert client.post("/data", data={"message": "1"}, headers=headers).status_code == 201
    assert client.post("/batch", data=b'"2"', headers=headers).status_code == 201
    assert broker.bodies == [b"1", b"2"]


@pytest.mark.parametrize("encoding", [None, "gzip", "x" * 255])
def test_a_message_of_any_bytes_keeps_its_encoding(
    client: FlaskClient, broker: FakeBroker, encoding: str | None
) -> None:
    body, headers = gzip.compress(b"pizza"), {"Content-Encoding": encoding} if encoding else {}
    assert client.post("/messages", data=body, headers=headers).status_code == 201
    assert (broker.last.body, broker.last.content_encoding) == (body, encoding)


class Held:
    """The server's client of a request, with as much memory as it is told."""

    socket = None
    waiting = nullcontext()
    let_go = False

    def __init__(self, memory: int) -> None:
        self.grant = Memory(memory).grant()


PART = b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\npizza\r\n--x--\r\n'
MIB = 1024 * 1024
PADDED = b'{"message": "pizza", "x": "%b"}'


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/data", b'{"message": [%b0]}' % (b"[0]," * 1_575_000), 413),
        ("/data", b"{%b}" % b",".join(b'"%d":0' % number for number in range(400_000)), 413),
        ("/data", b'"' * (6 * MIB), 413),
        ("/data", b"[" * (6 * MIB), 413),
        ("/data", b'"' + b"\\\\" * (3 * MIB), 400),
        ("/batch", b'{"message": [%b0]}' % (b"[0]," * 1_500_000), 400),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_json_that_no_text_needs_is_refused_before_it_is_read(
    broker: FakeBroker, path: str, body: bytes, status: int
) -> None:
    client = create_app(Settings(), broker, Events()).test_client()
    tracemalloc.start()
    answer = client.post(path, data=body, content_type="application/json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (answer.status_code, broker.bodies) == (status, [])
    assert peak < 3.5 * len(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"message":%b"pizza"}' % (b" \n\t" * MIB),
        PADDED % (b"[0]," * MIB),
        PADDED % (rb"\"[0],\\" * (MIB // 2)),
        PADDED % (b'", "y": "' * 7000),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_json_may_be_long_in_its_strings_and_blanks(broker: FakeBroker, body: bytes) -> None:
    client = create_app(Settings(), broker, Events()).test_client()
    answer = client.post("/data", data=body, content_type="application/json")
    assert (answer.status_code, broker.bodies) == (201, [b"pizza"]), answer.json


def multipart(value: bytes) -> bytes:
    return PART.replace(b"pizza", value)


MULTIPART = "multipart/form-data; boundary=x"
LARGE = [
    ("/data", FORM, b"message=" + b"a" * MIB),
    ("/data", FORM, b"message=" + b"\0" * MIB),
    ("/data", FORM, b"message=" + b"%41" * MIB),
    ("/data", FORM, b"message=" + b"%00" * MIB),
    ("/data", MULTIPART, multipart(b"\0" * MIB)),
    ("/data", MULTIPART, multipart("ä".encode() * (MIB // 2))),
    ("/data", "application/json", b'{"message": "%b"}' % (b"a" * MIB)),
    ("/data", "application/json", b'{"message": "%b"}' % (b"\\u0000" * MIB)),
    ("/data", "application/json", b'{"message": "%b"}' % ("ä".encode() * (MIB // 2))),
    ("/data", "application/json", PADDED % ("🍕".encode() + b"a" * (6 * MIB))),
    ("/batch", "application/x-ndjson", (b'"%b"\n' % (b"a" * (MIB - 3))) * 15),
    ("/batch", "application/x-ndjson", (b'"%b"\n' % (b"\\u0000" * MIB)) * 2),
    ("/batch", "application/x-ndjson", b'""\n' * 10_000),
]


@pytest.mark.parametrize(("path", "kind", "body"), LARGE, ids=lambda value: repr(value)[:30])
def test_what_a_request_becomes_is_within_the_memory_that_is_held_for_it(
    broker: FakeBroker, path: str, kind: str, body: bytes
) -> None:
    client = create_app(Settings(), broker, Events()).test_client()
    seen = Held(1024 * MIB)

    def post(held: Held) -> Any:
        environ = {"door.client": held}
        stream = BytesIO(body)
        return client.post(
            path,
            input_stream=stream,
            content_type=kind,
            content_length=len(body),
            environ_overrides=environ,
        )

    tracemalloc.start()
    answer = post(seen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.status_code == 201
    assert peak < seen.grant.amount + MIB
    broker.messages.clear()
    answer = post(Held(seen.grant.amount // 2))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert broker.messages == []


@pytest.mark.parametrize(
    ("path", "kind", "body", "turns"),
    [
        ("/data", FORM, b"message=" + b"%41" * MIB, 40),
        ("/data", MULTIPART, multipart(b"\n--xx" * (MIB // 6)), 10),
        ("/batch", FORM, b'""\n' * 10_000, 30),
        ("/batch", FORM, (b'"%b"\n' % (b"a" * (MIB - 3))) * 15, 10),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_others_get_a_turn_while_a_large_request_is_read(
    broker: FakeBroker, path: str, kind: str, body: bytes, turns: int
) -> None:
    client = create_app(Settings(), broker, Events()).test_client()
    request = gevent.spawn(client.post, path, data=body, content_type=kind)
    taken = 0
    while not request.ready():
        gevent.sleep(0)
        taken += 1
    assert request.get().status_code == 201
    assert taken > turns


class Unreadable:
    def read(self, *_: object) -> bytes:
        raise AssertionError("the body was read")

    readline = readinto = readall = read


@pytest.mark.parametrize(
    ("kind", "body", "room"),
    [
        (FORM, b"message=pizza&", 3 * LIMIT),
        ("multipart/form-data; boundary=x", PART, LIMIT),
        ("application/json", b'{"message": "pizza"}', 6 * LIMIT),
    ],
)
def test_a_chunked_body_that_is_too_large_is_refused_not_cut_off(
    client: FlaskClient, broker: FakeBroker, kind: str, body: bytes, room: int
) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Type": kind}
    for over, status in (0, 201), (1, 413):
        stream = BytesIO(body.ljust(room + 64 * 1024 + over))
        assert client.post("/data", input_stream=stream, headers=headers).status_code == status
    assert broker.bodies == [b"pizza"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data", FORM),
        ("/data", "application/json"),
        ("/data", "multipart/form-data; boundary=x"),
        ("/messages", "image/png"),
        ("/batch", "application/x-ndjson"),
    ],
)
def test_every_route_refuses_a_body_that_is_too_large_unread(
    client: FlaskClient, broker: FakeBroker, path: str, kind: str
) -> None:
    environ = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "99999999", "CONTENT_TYPE": kind}
    answer = client.post(path, environ_overrides=environ)
    assert (answer.status_code, list(answer.json or [])) == (413, ["message"])
    assert broker.bodies == []


@pytest.mark.parametrize(
    "body",
    [
        b"message=pizza",
        b"message=",
        b"x=0&message=1&message=2",
        b"message=&message=1",
        b"message=%f0%9f%8d%95+f%C3%BCr+2%00",
        "message=ä".encode(),
        b"message",
        b"massage=back",
        b"",
        b"&",
        b"message=%ff",
        b"message=\xe4",
        b"message=%ed%a0%80",
        b"message=1" + b"&a=1" * 100,
        b"message=" + b"a" * (LIMIT // 4),
        b"message=" + b"a" * LIMIT,
        b"message=" + b"a" * (LIMIT + 1),
        b"message=" + b"a" * 5000,
    ],
    ids=lambda value: repr(value)[:30],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"headers": {"X-Request-Id": "mine"}},
        {"headers": {"X-Request-Id": "not one"}},
        {"query_string": "message=no"},
        {"broker": "down"},
        {"headers": {"Authorization": "Bearer wrong"}, "token": "t0ken"},
        {"headers": {"Authorization": "Bearer t0ken"}, "token": "t0ken"},
    ],
    ids=str,
)
def test_a_form_that_has_arrived_is_answered_and_told_as_every_other(
    tmp_path: Path, body: bytes, options: dict[str, Any]
) -> None:
    seen = []
    for slow in False, True:
        broker, events, given = FakeBroker(), Events(), dict(options)
        broker.up = given.pop("broker", "up") == "up"
        lists(tmp_path, given.pop("token", None))
        settings = Settings(max_message_bytes=LIMIT, queues_file=tmp_path / "queues.json")
        app = create_app(settings, broker, events)
        form = {"data": body, "content_type": FORM} if slow else arrived(body, b"GET / HTTP/1.1")
        answer = app.test_client().post("/data", **form, **given)
        for event in events:
            assert event.pop("duration_ms") > 0
            assert event.pop("request_id") == answer.headers["X-Request-Id"]
            if "message_id" in event:
                event["message_id"] = uuid.UUID(event["message_id"]).version
        headers = dict(answer.headers)
        if len(headers.pop("X-Request-Id")) == 32:
            headers["X-Request-Id"] = "a new one"
        sent = [
            (one.body, one.content_type, uuid.UUID(one.id).version, one.headers["X-Request-Id"])
            for one in broker.messages
        ]
        assert {one[-1] for one in sent} <= {answer.headers["X-Request-Id"]}
        told = [one[:-1] for one in sent]
        seen.append((answer.status, headers, answer.data, told, list(events)))
        if not slow:
            source = form["environ_overrides"]["wsgi.input"]
            assert source.unread == (answer.status_code == 401 and body != b"")
            assert source.rfile.read()[-14:] == b"GET / HTTP/1.1", "the next request is left alone"
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("come", "then", "status"),
    [
        (b"", "come", 201),
        (b"message=piz", "come", 201),
        (b"", "expect", 201),
        (b"", "end", 400),
        (b"message=piz", "end", 400),
        (b"", "wait", 408),
        (b"message=piz", "wait", 408),
    ],
)
def test_a_form_that_has_not_arrived_is_waited_for(
    client: FlaskClient,
    broker: FakeBroker,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    come: bytes,
    then: str,
    status: int,
) -> None:
    monkeypatch.setattr("door.call.CLIENT_TIMEOUT", 0.5)
    ours, theirs = gevent.socket.socketpair()
    with ours, theirs, ours.makefile("rb") as stream:
        ours.settimeout(0.5)
        theirs.sendall(b"the headers" + come)
        stream.read(11)
        match then:
            case "come":
                gevent.spawn_later(0.02, theirs.sendall, b"message=pizza"[len(come) :])
            case "expect":
                gevent.spawn(lambda: theirs.recv(99) and theirs.sendall(b"message=pizza"))
            case "end":
                theirs.shutdown(socket.SHUT_WR)
        form = arrived(b"message=pizza")
        form["environ_overrides"]["wsgi.input"].rfile = stream
        if then == "expect":
            form["environ_overrides"]["wsgi.input"].socket = ours
            form["environ_overrides"]["HTTP_EXPECT"] = "100-continue"
        assert client.post("/data", **form).status_code == status
    assert broker.bodies == [b"pizza"] * (status == 201)
    assert [(event["status"], event.get("event")) for event in events] == [(status, "publish")]


def test_no_broker_is_503_and_to_be_tried_again(client: FlaskClient, broker: FakeBroker) -> None:
    broker.up = False
    answer = client.post("/data", data={"message": "pizza"})
    assert (answer.status_code, answer.json) == (503, {"message": "The broker is not connected."})
    assert answer.headers["Retry-After"] == "1"


def test_only_a_post_publishes(client: FlaskClient, broker: FakeBroker) -> None:
    for path in "/data", "/messages", "/batch":
        for method in "GET", "HEAD", "PUT", "DELETE":
            assert client.open(path, method=method).status_code == 405
    assert broker.bodies == []


@pytest.mark.parametrize("body", [b"", b"pizza", bytes(range(256)), b"\xff" * LIMIT])
@pytest.mark.parametrize(
    "kind", ["image/png", "text/plain; charset=latin-1", "x" * 255, FORM, None]
)
def test_any_bytes_are_published_with_their_content_type(
    client: FlaskClient, broker: FakeBroker, body: bytes, kind: str | None
) -> None:
    answer = client.post("/messages", data=body, content_type=kind)
    assert (answer.status_code, answer.mimetype) == (201, "application/json")
    (message,) = broker.messages
    assert (message.body, message.content_type) == (body, kind)
    assert answer.json == {"id": message.id}
    assert answer.headers["Message-Id"] == message.id
    assert uuid.UUID(message.id).version == 7


@pytest.mark.parametrize("given", ["a", "order 7/42", "x" * 255])
def test_a_message_keeps_the_id_that_its_sender_gave_it(
    client: FlaskClient, broker: FakeBroker, given: str
) -> None:
    answer = client.post("/messages", data=b"pizza", headers={"Message-Id": given})
    assert (answer.json, answer.headers["Message-Id"]) == ({"id": given}, given)
    assert broker.last.id == given


def test_headers_that_begin_with_x_travel_with_the_message_and_no_others(
    client: FlaskClient, broker: FakeBroker
) -> None:
    headers = {
        "x-table": "7",
        "X-Gast": "Jürgen".encode().decode("latin-1"),  # as a server passes on UTF-8
        "X-Bytes": "\xff",
        "X-Request-Id": "mine",
        "Authorization": "Basic c2VjcmV0",
        "Cookie": "secret",
        "XY": "no",
    }
    client.post("/messages", data=b"pizza", headers=headers)
    assert broker.last.headers == {
        "X-Table": "7",
        "X-Gast": "Jürgen",
        "X-Bytes": "\ufffd",
        "X-Request-Id": "mine",
    }


def test_the_request_id_that_travels_is_the_one_of_the_answer(
    client: FlaskClient, broker: FakeBroker
) -> None:
    for path, body in ("/messages", b"1"), ("/batch", b'"1"'), ("/data", b"message=1"):
        answer = client.post(
            path, data=body, content_type=FORM, headers={"X-Request-Id": "not one"}
        )
        assert answer.status_code == 201
        assert broker.last.headers == {"X-Request-Id": answer.headers["X-Request-Id"]}


@pytest.mark.parametrize(
    ("headers", "status", "word"),
    [
        ({"Message-Id": "x" * 256}, 400, "Message-Id"),
        ({"Message-Id": "ä"}, 400, "Message-Id"),
        ({"Content-Type": "x" * 256}, 400, "Content-Type"),
        ({"Content-Type": "ä"}, 400, "Content-Type"),
        ({"Content-Encoding": "x" * 256}, 400, "Content-Encoding"),
        ({"X-" + "x" * 254: "1"}, 400, "name of a header"),
        ({}, 413, str(LIMIT)),
        ({"Transfer-Encoding": "chunked"}, 413, str(LIMIT)),
    ],
)
def test_what_amqp_or_the_limit_has_no_room_for_is_refused(
    client: FlaskClient, broker: FakeBroker, headers: dict[str, str], status: int, word: str
) -> None:
    body = b"x" * (LIMIT + (status == 413))
    stream = {"input_stream": BytesIO(body)} if "Transfer-Encoding" in headers else {"data": body}
    answer = client.post("/messages", headers=headers, **stream)
    assert answer.status_code == status
    assert word in (answer.json or {})["message"]
    assert broker.messages == []


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_batch_is_published_in_its_order_with_its_ids(
    client: FlaskClient, broker: FakeBroker, end: bytes
) -> None:
    lines = [
        b'"one"',
        '"zwölf 🍕"'.encode(),
        b'""',
        b'"a\\nb"',
        b'{"message": "two"}',
        b' {"id": "mine", "message": "three"} ',
        b'{"message": "four", "id": null}',
        b'"one"',
    ]
    answer = client.post("/batch", data=b"\n".join(lines) + end)
    assert (answer.status_code, answer.json) == (201, {"sent": 8})
    texts = ["one", "zwölf 🍕", "", "a\nb", "two", "three", "four", "one"]
    assert broker.bodies == [text.encode() for text in texts]
    assert {message.content_type for message in broker.messages} == {"text/plain"}
    ids = [message.id for message in broker.messages]
    assert ids.pop(5) == "mine"
    assert {uuid.UUID(id_).version for id_ in ids} == {7}
    assert len(set(ids)) == 7


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "is empty"),
        (b" ", "is empty"),
        (b"one", "not JSON"),
        (b'"one', "not JSON"),
        (b'"one" "two"', "not JSON"),
        (b'"\xe4"', "not JSON in UTF-8"),
        (b'"one"\xef\xbb\xbf', "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"1", "is no string"),
        (b"null", "is no string"),
        (b"NaN", "is no string"),
        (b'["one"]', "is no string"),
        (b"{}", "is no string"),
        (b'{"id": "x"}', "is no string"),
        (b'{"message": 1}', "is no string"),
        (b'{"message": null}', "is no string"),
        (b'{"message": "x", "ID": "x"}', "another name"),
        (b'{"message": "x", "id": 7}', "no string of 1 to 255"),
        (b'{"message": "x", "id": ""}', "no string of 1 to 255"),
        (b'{"message": "x", "id": "%s"}' % (b"x" * 256), "no string of 1 to 255"),
        ('{"message": "x", "id": "ä"}'.encode(), "not ASCII"),
        (b'"\\ud800"', "lone surrogate"),
        (b'"%s"' % (b"x" * (LIMIT + 1)), f"{LIMIT + 1} bytes; at most {LIMIT}"),
        ('"%s"' % ("ä" * (LIMIT // 2 + 1)), f"{LIMIT + 2} bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_line_is_named_and_nothing_of_its_batch_is_sent(
    client: FlaskClient, broker: FakeBroker, line: bytes | str, fault: str, before: int
) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    answer = client.post("/batch", data=b'"good"\n' * before + bad + b'\n"good"\n')
    assert answer.status_code == 400
    message = (answer.json or {})["message"]
    assert message.startswith(f"Line {before + 1} ")
    assert fault in message
    assert broker.messages == []


@pytest.mark.parametrize(
    ("body", "status", "sent"),
    [
        (b"", 400, 0),
        (b"\n", 400, 0),
        (b'"x"\n\n', 201, 1),
        (b'"x"\r\n\r\n \n', 201, 1),
        (b'\xef\xbb\xbf"x"\n', 201, 1),
        (b"\xef\xbb\xbf\n", 400, 0),
        (b'"x"', 201, 1),
        (b'"%s"\n' % (b"x" * LIMIT), 201, 1),
        (b'""\n' * 10_000, 201, 10_000),
        (b'""\n' * 10_000 + b'""', 413, 0),
        (b'""'.ljust(BATCH_LIMIT), 201, 1),
        (b'""'.ljust(BATCH_LIMIT + 1), 413, 0),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_batch_has_from_one_line_to_ten_thousand_and_its_bytes(
    client: FlaskClient, broker: FakeBroker, body: bytes, status: int, sent: int, chunked: bool
) -> None:
    if chunked:
        headers = {"Transfer-Encoding": "chunked"}
        answer = client.post("/batch", input_stream=BytesIO(body), headers=headers)
    else:
        answer = client.post("/batch", data=body)
    assert answer.status_code == status
    assert list(answer.json or []) == ["sent" if sent else "message"]
    assert len(broker.messages) == sent


def test_a_failed_batch_tells_how_much_of_it_is_certain(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    broker.up, broker.certain = False, 2
    answer = client.post("/batch", data=b'"1"\n"2"\n"3"\n')
    assert answer.status_code == 503
    assert answer.json == {"message": "The broker is not connected.", "certain": 2}
    assert answer.headers["Retry-After"] == "1"
    (event,) = events
    assert (event["event"], event["status"], event["level"]) == ("publish", 503, "error")
    assert (event["messages"], event["certain"]) == (3, 2)


def test_a_batch_is_told_with_its_size(client: FlaskClient, events: Events) -> None:
    client.post("/batch", data=b'"secret"\n' * 3, headers={"X-Request-Id": "mine"})
    (event,) = events
    assert event.pop("duration_ms") > 0
    assert event == {
        "level": "info",
        "event": "publish",
        "request_id": "mine",
        "messages": 3,
        "queue": "takeaway",
        "status": 201,
    }


@pytest.mark.parametrize("up", [True, False])
def test_a_message_of_any_bytes_is_told_with_its_id(
    client: FlaskClient, broker: FakeBroker, events: Events, up: bool
) -> None:
    broker.up = up
    answer = client.post("/messages", data=b"secret", headers={"Message-Id": "mine"})
    assert answer.status_code == (201 if up else 503)
    (event,) = events
    assert (event["event"], event["message_id"]) == ("publish", "mine")
    assert event["status"] == answer.status_code


ROUTES = {
    "/data": "takeaway",
    "/messages": "takeaway",
    "/batch": "takeaway",
    "/queues/orders/messages": "orders",
    "/queues/orders/batch": "orders",
    "/topics/events/messages?key=a": "events",
    "/topics/events/batch?key=a": "events",
}


@pytest.mark.parametrize("send", [[], ["takeaway"], ["orders"], ["events"]])
def test_a_client_sends_only_to_what_it_has_the_right_for(
    broker: FakeBroker, events: Events, tmp_path: Path, send: list[str]
) -> None:
    settings = Settings(queues_file=lists(tmp_path, "t0ken", send))
    client = create_app(settings, broker, events).test_client()
    login = {"Authorization": "Bearer t0ken"}
    for path, name in ROUTES.items():
        assert client.post(path, json={"message": "pizza"}).status_code == 401
        broker.messages.clear()
        answer = client.post(path, json={"message": "pizza"}, headers=login)
        assert answer.status_code == (201 if name in send else 403), path
        if answer.status_code == 403:
            fault = f"The client 'shop' has no right to send: {name!r}."
            assert answer.json == {"message": fault}
        assert len(broker.messages) == (name in send)
        assert events[-1]["client"] == "shop"


def test_no_client_can_send_in_another_s_name(
    broker: FakeBroker, events: Events, tmp_path: Path
) -> None:
    forged = {"X-Client": "another"}
    for token, named in ("t0ken", {"X-Client": "shop"}), (None, {}):
        client = create_app(
            Settings(queues_file=lists(tmp_path, token)), broker, events
        ).test_client()
        headers = {"Authorization": f"Bearer {token}", **forged}
        for path in "/data", "/messages", "/batch":
            sent = client.post(path, json={"message": "pizza"}, headers=headers)
            assert sent.status_code == 201
            told = {key: value for key, value in broker.last.headers.items() if key == "X-Client"}
            assert told == named


def test_the_description_names_every_route(client: FlaskClient) -> None:
    described = {
        (path, method)
        for path, item in (client.get("/openapi.json").json or {})["paths"].items()
        for method in {"get", "post"} & item.keys()
    }
    assert described == {
        (rule.rule.replace("<", "{").replace(">", "}"), method.lower())
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


LOGIN = {"RABBITMQ_USER": "u", "RABBITMQ_PASSWORD": "p"}


def test_settings_come_from_the_environment() -> None:
    read = Settings.read(
        Environment(
            {
                **LOGIN,
                "RABBITMQ_EXCHANGE": "e",
                "RABBITMQ_QUEUE": "k",
                "PORT": "4",
                "WORKERS": "5",
                "MAX_MESSAGE_BYTES": "7",
                "MAX_BATCH_BYTES": "8",
                "CONFIRM_TIMEOUT": "2",
                "MEMORY_LIMIT": "268435456",
                "FLUENTD_HOST": "f",
                "FLUENTD_PORT": "3",
            }
        )
    )
    assert (read.broker.user, read.exchange, read.queue) == ("u", "e", "k")
    assert (read.port, read.workers) == (4, 5)
    assert (read.max_message_bytes, read.max_batch_bytes, read.confirm_timeout) == (7, 8, 2)
    assert read.memory == 256 * 1024 * 1024
    assert (read.events.host, read.events.port) == ("f", 3)
    assert Settings.read(Environment(LOGIN)) == Settings(broker=read.broker)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_MESSAGE_BYTES", "16777217"),
        ("MAX_BATCH_BYTES", "67108865"),
        ("CONFIRM_TIMEOUT", "5"),
        ("WORKERS", "0"),
        ("PORT", "65536"),
    ],
)
def test_a_setting_out_of_range_stops_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        Settings.read(Environment({**LOGIN, name: value}))


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
    message_id = broker.last.id
    assert uuid.UUID(message_id).version == 7
    assert broker.last.headers == {"X-Request-Id": "mine"}
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
    assert uuid.UUID(event["message_id"]).version == 7
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


def run(**variables: str) -> "subprocess.Popen[str]":
    """Start the publisher with variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "publisher"],
        env={
            "PYTHONPATH": os.pathsep.join(["apps/publisher", "apps/door", "apps/common"]),
            **variables,
        },
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "RABBITMQ_USER must be set"),
        ({**LOGIN, "WORKERS": "many"}, "WORKERS must be a number, got 'many'"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(variables: dict[str, str], words: str) -> None:
    with run(**variables) as server:
        output, errors = server.communicate(timeout=10)
    assert (server.returncode, output, errors) == (1, "", f"publisher: {words}\n")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_events_that_still_wait_at_the_end_are_sent_by_every_worker(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = []
        for workers in 1, 2:
            port, collector = free_port(), stack.enter_context(socket.socket())
            collector.bind(("127.0.0.1", 0))  # refuses connections until it listens
            collector.settimeout(10)
            (tmp_path / str(workers)).mkdir()
            server = run(
                **LOGIN,
                RABBITMQ_PORT="1",
                FLUENTD_HOST="127.0.0.1",
                FLUENTD_PORT=str(collector.getsockname()[1]),
                PORT=str(port),
                WORKERS=str(workers),
                PROMETHEUS_MULTIPROC_DIR=str(tmp_path / str(workers)),
            )
            stack.enter_context(server)
            stack.callback(server.kill)
            servers.append((server, collector, [post(port) for _ in range(40)]))
        # Now the senders' next attempts are further away than the end of their processes.
        time.sleep(1.6)
        for server, collector, told in servers:
            collector.listen()
            server.terminate()
            _, errors = server.communicate(timeout=10)
            assert (server.returncode, "Traceback" in errors) == (0, False), errors
            heard: list[str] = []
            while len(heard) < len(told):
                connection, _ = collector.accept()
                with connection, connection.makefile("rb") as stream:
                    heard += [record["request_id"] for _, _, record in msgpack.Unpacker(stream)]
            assert sorted(heard) == sorted(told)


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
    folders = os.pathsep.join(["apps/publisher", "apps/door", "apps/common"])
    subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": folders}, cwd=PROJECT, check=True
    )


@pytest.mark.parametrize(
    ("path", "queue"),
    [
        ("/messages", "takeaway"),
        ("/batch", "takeaway"),
        ("/queues/orders/messages", "orders"),
        ("/queues/orders/batch", "orders"),
        ("/queues/takeaway/messages", "takeaway"),
    ],
)
def test_a_message_goes_to_the_queue_of_its_path(
    client: FlaskClient, broker: FakeBroker, events: Events, path: str, queue: str
) -> None:
    assert client.post(path, data=b'"hi"').status_code == 201
    assert broker.targets == [Target("takeaway-in", queue)]
    assert (events[0]["event"], events[0]["queue"]) == ("publish", queue)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/queues/orders.dead/messages", "There is no queue 'orders.dead'."),
        ("/queues/events/batch", "There is no queue 'events'."),
        ("/topics/orders/messages?key=a", "There is no topic 'orders'."),
        (f"/queues/{'q' * 300}/messages", f"There is no queue '{'q' * 200}'."),
        ("/queues/a%2Fb/messages", "was not found"),
        ("/queues/../messages", "There is no queue '..'."),
    ],
)
def test_a_queue_or_topic_that_is_not_there_is_404(
    client: FlaskClient, broker: FakeBroker, path: str, fault: str
) -> None:
    answer = client.post(path, data=b'"hi"')
    assert answer.status_code == 404
    assert fault in answer.json["message"]  # type: ignore[index]
    assert broker.messages == []


def test_a_topic_s_messages_are_sent_by_their_key(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    single = client.post("/topics/events/messages?key=order.created", data=b"hi")
    assert (single.status_code, single.json["stored"]) == (201, True)  # type: ignore[index]
    assert single.headers["Message-Id"] == broker.last.id == single.json["id"]  # type: ignore[index]
    many = client.post("/topics/events/batch?key=a%20b", data=b'"1"\n"2"')
    assert (many.status_code, many.json) == (201, {"sent": 2, "stored": 2})
    assert broker.targets == [Target("events", key, True) for key in ("order.created", "a b")]
    assert (events[0]["topic"], events[0]["key"]) == ("events", "order.created")


def test_what_matches_no_subscription_is_no_error_and_is_counted(
    client: FlaskClient, broker: FakeBroker, events: Events
) -> None:
    def counted() -> float:
        told = REGISTRY.get_sample_value("topic_messages_dropped_total", {"topic": "events"})
        assert told is not None, "it is told from the start on"
        return told

    before = counted()
    broker.dropped = 1
    single = client.post("/topics/events/messages?key=a", data=b"hi")
    assert (single.status_code, single.json["stored"]) == (200, False)  # type: ignore[index]
    some = client.post("/topics/events/batch?key=a", data=b'"1"\n"2"')
    assert (some.status_code, some.json) == (201, {"sent": 2, "stored": 1})
    none = client.post("/topics/events/batch?key=a", data=b'"1"')
    assert (none.status_code, none.json) == (200, {"sent": 1, "stored": 0})
    assert [event["dropped"] for event in events] == [1, 1, 1]
    assert counted() == before + 3


@pytest.mark.parametrize("query", ["", "?key=", f"?key={'k' * 256}", "?key=%C3%BC"])
def test_a_topic_needs_a_key_that_amqp_takes(
    client: FlaskClient, broker: FakeBroker, query: str
) -> None:
    for path in "/topics/events/messages", "/topics/events/batch":
        answer = client.post(path + query, data=b'"hi"')
        assert answer.status_code == 400
        assert "Say the routing key" in answer.json["message"]  # type: ignore[index]
    assert broker.messages == []


@pytest.mark.parametrize(
    "path", ["/messages", "/batch", "/queues/orders/messages", "/topics/events/batch"]
)
def test_an_unknown_parameter_is_named(client: FlaskClient, path: str) -> None:
    answer = client.post(f"{path}?kye=a", data=b'"1"')
    assert answer.status_code == 400
    assert "'kye'" in answer.json["message"]  # type: ignore[index]


def test_a_batch_for_a_topic_tells_what_is_certain(client: FlaskClient, broker: FakeBroker) -> None:
    broker.up, broker.certain = False, 3
    answer = client.post("/topics/events/batch?key=a", data=b'"1"')
    assert (answer.status_code, answer.json["certain"]) == (503, 3)  # type: ignore[index]
