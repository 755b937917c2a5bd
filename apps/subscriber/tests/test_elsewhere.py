"""What a door passes on to doors of other hosts, receipts and questions; with real sockets."""

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.client import HTTPConnection
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from common.environment import ConfigError, Environment
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from door.memory import Memory
from door.server import CLIENT
from flask.testing import FlaskClient
from gevent.pywsgi import WSGIHandler, WSGIServer
from prometheus_client import REGISTRY
from subscriber import elsewhere
from subscriber.app import create_app
from subscriber.broker import Broker
from subscriber.elsewhere import PLACES
from subscriber.settings import ClusterSettings, Settings
from werkzeug.test import TestResponse

from .conftest import Events, Rabbit, serving

LOCAL = "127.0.0.1"
VERBS = {"ack": "acknowledged", "extend": "extended", "reject": "rejected"}
# A name of a queue that a path cannot have as it is.
ODD = "ü 100% ?"


def pems(folder: Path) -> tuple[Path, Path]:
    """Return the files of a new CA and of a key with a certificate for LOCAL, signed by it."""
    folder.mkdir()
    begin, end = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("CA", "door")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    ca, own = (
        x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(name is names[0], None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOCAL))]), False)
        .sign(keys[0], hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        for name, key in zip(names, keys, strict=True)
    )
    key = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "ca.pem").write_bytes(ca)
    (folder / "server.pem").write_bytes(key + own)
    return folder / "ca.pem", folder / "server.pem"


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return pems(tmp_path / "tls")[0]


def listen() -> Any:
    listener = gevent.socket.socket()
    listener.bind((LOCAL, 0))
    listener.listen(128)
    return listener


class Handler(WSGIHandler):  # type: ignore[misc]
    """A client that leaves before its answer is no error."""

    def handle_error(self, kind: type, error: object, trace: object) -> None:
        self.close_connection = True
        if not issubclass(kind, OSError):
            super().handle_error(kind, error, trace)


class Https:
    """Serves an application over TLS on a port of its own; counts connections."""

    def __init__(self, server_pem: Path) -> None:
        self.listener = listen()
        self.url = f"https://{LOCAL}:{self.listener.getsockname()[1]}"
        self.context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(server_pem)
        self.open: set[Any] = set()
        self.connections = 0
        self._server: Any = None

    def serve(self, application: Any) -> None:
        outer = self

        class Server(WSGIServer):  # type: ignore[misc]
            def handle(self, sock: Any, address: Any) -> None:
                outer.connections += 1
                outer.open.add(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    super().handle(sock, address)
                finally:
                    outer.open.discard(sock)

        self._server = Server(
            self.listener,
            application,
            log=None,
            error_log=None,
            handler_class=Handler,
            ssl_context=self.context,
        )
        self._server.start()

    def stop(self) -> None:
        """Take nobody any more, and end the connections that are open."""
        if self._server:
            self._server.stop(0)
        self.listener.close()
        for sock in list(self.open):
            sock.close()


@dataclass
class FakeDoor:
    """A door that answers what it is told to, and what it was asked."""

    https: Https
    status: int = 200
    body: bytes = b"{}"
    # Set while it answers at once.
    prompt: gevent.event.Event = field(default_factory=gevent.event.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_a_time: int = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., object]) -> list[bytes]:
        told = {name: value for name, value in environ.items() if isinstance(value, str)}
        self.asked.append(told | json.loads(environ["wsgi.input"].read() or b"{}"))
        self.at_a_time += 1
        self.prompt.wait()
        self.at_a_time -= 1
        start(f"{self.status} X", [("Content-Length", str(len(self.body)))])
        return [self.body]


@pytest.fixture(autouse=True)
def _close_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a program leaves to its end: connections that are kept."""
    made: list[HTTPConnection] = []

    class Noted(HTTPConnection):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("http.client.HTTPConnection", Noted)
    yield
    for connection in made:
        connection.close()


@pytest.fixture
def owner(ca: Path) -> Iterator[FakeDoor]:
    """The door of h2."""
    fake = FakeDoor(Https(ca.parent / "server.pem"))
    fake.prompt.set()
    fake.https.serve(fake)
    yield fake
    fake.prompt.set()
    fake.https.stop()


@dataclass
class Host:
    """A subscriber of the cluster, served over TLS by its URL."""

    client: FlaskClient
    https: Https
    events: Events

    def lease(self, path: str = "/receive") -> str:
        return self.client.get(f"{path}?ack=manual").headers["X-Receipt"]

    def post(self, verb: str, *receipts: str, **headers: str) -> TestResponse:
        return self.client.post(f"/{verb}", json={"receipts": receipts}, headers=headers)


Hosts = dict[str, Host]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "queues.json"
    path.write_text(json.dumps({"queues": ["takeaway", "pizza", ODD], "topics": []}))
    return path


@pytest.fixture
def make(rabbit: Rabbit, ca: Path, path: Path) -> Iterator[Callable[..., Host]]:
    """Make a host that knows other doors by their URLs."""
    with ExitStack() as stack:

        def make(name: str, doors: dict[str, str], memory: int = 2**40, **more: Any) -> Host:
            https, events = more.get("https") or Https(ca.parent / "server.pem"), Events()
            cluster = ClusterSettings(name, doors, more.get("ca", ca))
            url = more.get("url")
            settings = Settings(
                queues_file=more.get("path", path), cluster=cluster, management_url=url
            )
            broker = Broker(settings, Memory(2**40))
            rabbit.connect(broker).prompt = True
            stack.callback(broker.lost, "the test is over")
            app = create_app(broker, settings, Memory(memory), events)
            https.serve(app)
            stack.callback(https.stop)
            return Host(app.test_client(), https, events)

        yield make


@pytest.fixture
def hosts(rabbit: Rabbit, ca: Path, make: Callable[..., Host]) -> Hosts:
    """Three hosts with one broker."""
    rabbit.add("pizza", ODD)
    ports = {name: Https(ca.parent / "server.pem") for name in ("h1", "h2", "h3")}
    urls = {name: https.url for name, https in ports.items()}
    return {
        name: make(name, {o: url for o, url in urls.items() if o != name}, https=https)
        for name, https in ports.items()
    }


@pytest.fixture
def h1(make: Callable[..., Host], owner: FakeDoor) -> Host:
    """A host that knows the fake door of h2."""
    return make("h1", {"h2": owner.https.url})


def told(answer: TestResponse, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = json.loads(answer.data)
    if status >= 400:
        assert body.pop("message")
    assert ("Retry-After" in answer.headers) == (status == 503)
    return body


def passed(status: int) -> float:
    labels = {"door": "h2", "status": str(status)}
    return REGISTRY.get_sample_value("passed_on_requests_total", labels) or 0


# Real doors.


@pytest.mark.parametrize("queue", ["", "pizza", ODD])
@pytest.mark.parametrize("verb", VERBS)
def test_a_receipt_is_good_at_every_door(
    hosts: Hosts, rabbit: Rabbit, verb: str, queue: str
) -> None:
    name = queue or "takeaway"
    rabbit.publish(b"a", queue=name)
    before = f"/queues/{queue.replace('%', '%25').replace('?', '%3F')}/" if queue else "/"
    receipt = hosts["h2"].lease(before + ("messages" if queue else "receive"))
    assert receipt.startswith("h2.")
    done = hosts["h1"].client.post(before + verb, json={"receipt": receipt})
    assert told(done, 200) == {VERBS[verb]: 1}
    gevent.sleep(0.05)
    assert rabbit.acked == ([b"a"] if verb == "ack" else [])
    assert rabbit.bodies(name) == ([b"a"] if verb == "reject" else [])
    again = hosts["h3"].client.post(before + verb, json={"receipt": receipt})
    if verb == "extend":
        assert told(again, 200) == {"extended": 1}
    else:
        assert told(again, 410) == {"gone": [receipt]}


@pytest.mark.parametrize("requeue", [True, False])
def test_a_rejection_says_at_the_other_door_what_becomes_of_the_message(
    hosts: Hosts, rabbit: Rabbit, requeue: bool
) -> None:
    rabbit.publish(b"a")
    body = {"receipt": hosts["h2"].lease(), "requeue": requeue}
    assert told(hosts["h1"].client.post("/reject", json=body), 200) == {"rejected": 1}
    gevent.sleep(0.05)
    assert rabbit.bodies("takeaway" if requeue else "takeaway.dead") == [b"a"]


@pytest.mark.parametrize("verb", VERBS)
def test_receipts_of_all_doors_go_together(hosts: Hosts, rabbit: Rabbit, verb: str) -> None:
    rabbit.publish(*[b"a", b"b", b"c", b"d"])
    receipts = [hosts[name].lease() for name in ("h2", "h1", "h3", "h2")]
    assert told(hosts["h1"].post(verb, *receipts, *receipts), 200) == {VERBS[verb]: 4}
    gevent.sleep(0.05)
    assert sorted(rabbit.acked) == ([b"a", b"b", b"c", b"d"] if verb == "ack" else [])


def all_good(hosts: Hosts, *receipts: str) -> None:
    assert told(hosts["h1"].post("extend", *receipts), 200) == {"extended": len(receipts)}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("bad", ["h1", "h2"])
def test_one_receipt_that_is_gone_is_named_and_nothing_is_done_at_two_doors(
    hosts: Hosts, rabbit: Rabbit, verb: str, bad: str
) -> None:
    rabbit.publish(*[b"a", b"b", b"c"])
    good = [hosts[name].lease() for name in ("h1", "h2")]
    used = hosts[bad].lease()
    assert told(hosts[bad].post("ack", used), 200)
    assert told(hosts["h1"].post(verb, *good, used), 410) == {"gone": [used]}
    all_good(hosts, *good)


def test_receipts_that_were_settled_before_one_was_gone_are_told(
    hosts: Hosts, rabbit: Rabbit
) -> None:
    rabbit.publish(*[b"a", b"b", b"c"])
    own, settled, bad = (hosts[name].lease() for name in ("h1", "h2", "h3"))
    assert told(hosts["h3"].post("ack", bad), 200)
    answer = hosts["h1"].post("ack", own, settled, bad)
    assert told(answer, 410) == {"gone": [bad], "done": [settled]}
    all_good(hosts, own)
    assert told(hosts["h2"].post("ack", settled), 410) == {"gone": [settled]}


def test_receipts_of_here_that_end_while_others_are_settled_are_told(
    hosts: Hosts, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    rabbit.publish(*[b"a", b"b"])
    own, settled = (hosts[name].lease() for name in ("h1", "h2"))
    ask = elsewhere.Door.ask

    def slow(*args: Any) -> Any:
        answer = ask(*args)
        hosts["h1"].post("ack", own)
        return answer

    monkeypatch.setattr(elsewhere.Door, "ask", slow)
    assert told(hosts["h1"].post("ack", own, settled), 410) == {"gone": [own], "done": [settled]}


@pytest.mark.parametrize("receipt", ["h4.unknown", "h2", "h2.unknown", ".h2", "h2.\ud800"])
def test_a_receipt_that_nobody_gave_is_gone(hosts: Hosts, receipt: str) -> None:
    assert told(hosts["h1"].post("ack", receipt), 410) == {"gone": [receipt]}


def test_a_request_is_told_at_both_doors_under_its_id(hosts: Hosts, rabbit: Rabbit) -> None:
    rabbit.publish(b"a")
    receipt = hosts["h2"].lease()
    before = passed(200)
    hosts["h1"].post("ack", receipt, **{"X-Request-Id": "mine"})
    for name, more in ("h1", {"passed_on": "h2"}), ("h2", {}):
        event = hosts[name].events[-1]
        del event["duration_ms"]
        expected = {"level": "info", "request_id": "mine", "queue": "takeaway", "status": 200}
        assert event == expected | more
    assert passed(200) == before + 1


def test_what_a_front_has_sent_to_another_host_s_door_is_passed_on_to_the_owner(
    hosts: Hosts, rabbit: Rabbit
) -> None:
    rabbit.publish(b"a")
    receipt = hosts["h1"].lease()
    assert told(hosts["h2"].post("ack", receipt, **{"X-Stack-Hop": "h1"}), 200)


def test_what_a_door_has_passed_on_is_not_passed_on_again(hosts: Hosts, rabbit: Rabbit) -> None:
    rabbit.publish(b"a")
    receipt = hosts["h2"].lease()
    before = hosts["h2"].https.connections
    headers = {"X-Stack-Hop": "h3", "X-Stack-Door": "h3"}
    assert told(hosts["h1"].post("ack", receipt, **headers), 410) == {"gone": [receipt]}
    assert hosts["h2"].https.connections == before
    all_good(hosts, receipt)


def test_addresses_that_lead_to_the_wrong_door_make_no_circle(
    make: Callable[..., Host], ca: Path
) -> None:
    """Each takes the other for h3."""
    ports = [Https(ca.parent / "server.pem") for _ in range(2)]
    first = make("h1", {"h3": ports[1].url}, https=ports[0])
    make("h2", {"h3": ports[0].url}, https=ports[1])
    assert told(first.post("ack", "h3.x"), 410) == {"gone": ["h3.x"]}
    assert [port.connections for port in ports] == [0, 1]


# Credentials.


def write_clients(path: Path, *rights: str) -> None:
    client = {"name": "shop", "tokens": [sha256(b"t").hexdigest()], "send": [], "manage": []}
    clients = [client | {"receive": list(rights)}]
    path.write_text(json.dumps({"queues": ["takeaway"], "topics": [], "clients": clients}))


@pytest.mark.parametrize(
    ("known", "status"), [("shop", 200), ("shop without rights", 403), ("nobody", 401)]
)
def test_a_client_does_at_the_owner_what_it_has_the_right_for_there(
    make: Callable[..., Host], rabbit: Rabbit, ca: Path, tmp_path: Path, known: str, status: int
) -> None:
    lists = [tmp_path / "1.json", tmp_path / "2.json"]
    write_clients(lists[0], "takeaway")
    write_clients(lists[1], "takeaway")
    https = Https(ca.parent / "server.pem")
    h1 = make("h1", {"h2": https.url}, path=lists[0])
    h2 = make("h2", {}, path=lists[1], https=https)
    rabbit.publish(b"a")
    shop = {"Authorization": "Bearer t"}
    receipt = h2.client.get("/receive?ack=manual", headers=shop).headers["X-Receipt"]
    if status != 200:
        new = lists[1].with_suffix(".new")
        write_clients(new, *(["pizza"] if status == 403 else ["takeaway"]))
        if known == "nobody":
            new.write_text(new.read_text().replace(sha256(b"t").hexdigest(), "0" * 64))
        new.replace(lists[1])
        gevent.sleep(1.1)  # the door looks once a second
    answer = h1.post("ack", receipt, **shop)
    told(answer, status)
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert told(h1.post("ack", receipt), 401) == {}
    gevent.sleep(0.05)
    assert rabbit.acked == ([b"a"] if status == 200 else [])


# An owner that misbehaves.


def test_the_owner_is_told_who_asks_and_for_whom(h1: Host, owner: FakeDoor) -> None:
    headers = {"X-Request-Id": "mine", "Authorization": "Basic c2hvcDp0", "X-Other": "1"}
    body = {"receipts": ["h2.b", "h2.a", "h2.b"], "requeue": False}
    answer = h1.client.post("/queues/pizza/reject", json=body, headers=headers)
    assert told(answer, 200) == {"rejected": 2}
    (asked,) = owner.asked
    assert {name: asked[name] for name in ("REQUEST_METHOD", "PATH_INFO")} == {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/queues/pizza/reject",
    }
    assert asked["receipts"] == ["h2.b", "h2.a"]
    assert asked["requeue"] is False
    assert {name: asked[name] for name in asked if name.startswith("HTTP_")} == {
        "HTTP_HOST": owner.https.url.removeprefix("https://"),
        "HTTP_ACCEPT_ENCODING": "identity",
        "HTTP_X_STACK_HOP": "h1",
        "HTTP_X_STACK_DOOR": "h1",
        "HTTP_X_REQUEST_ID": "mine",
        "HTTP_AUTHORIZATION": "Basic c2hvcDp0",
    }
    h1.post("ack", "h2.a")
    assert "HTTP_AUTHORIZATION" not in owner.asked[1]
    assert "requeue" not in owner.asked[1]


@pytest.mark.parametrize("verb", VERBS)
def test_a_receipt_of_an_owner_that_is_gone_is_gone(
    h1: Host, owner: FakeDoor, rabbit: Rabbit, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    rabbit.publish(b"a")
    own = h1.lease()
    owner.https.stop()
    before = passed(410)
    for _ in range(2):
        assert told(h1.post(verb, own, "h2.a", "h2.b"), 410) == {"gone": ["h2.a", "h2.b"]}
    assert passed(410) == before + 2
    assert told(h1.post("extend", own), 200), "nothing was done for it"
    (line,) = caplog.messages
    assert "The door of h2" in line
    assert "refused" in line


def test_where_nobody_answers_a_connection_the_owner_is_gone_and_the_next_know_it_at_once(
    make: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "CONNECT_TIMEOUT", 0.5)
    with socket.socket() as full, ExitStack() as stack:
        full.bind((LOCAL, 0))
        full.listen(0)
        for _ in range(3):  # further ones are not answered
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        h1 = make("h1", {"h2": f"https://{LOCAL}:{full.getsockname()[1]}"})
        begin = time.monotonic()
        requests = [gevent.spawn(h1.post, "ack", "h2.a") for _ in range(2 * PLACES)]
        for request in requests:
            assert told(request.get(timeout=5), 410) == {"gone": ["h2.a"]}
        assert 0.5 <= time.monotonic() - begin < 0.95
        gevent.sleep(elsewhere.ABSENT)
        begin = time.monotonic()
        assert told(h1.post("ack", "h2.a"), 410)
        assert time.monotonic() - begin >= 0.5, "it is looked for again"


def test_an_owner_that_does_not_answer_in_time_leaves_it_unknown_and_keeps_nobody_waiting(
    make: Callable[..., Host], owner: FakeDoor, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "ANSWER_TIMEOUT", 2)
    monkeypatch.setattr(elsewhere, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(elsewhere, "PLACES", 2)
    h1 = make("h1", {"h2": owner.https.url})
    rabbit.publish(b"a", b"b")
    own = h1.lease()
    owner.prompt.clear()
    begin, before = time.monotonic(), passed(503)
    requests = [gevent.spawn(h1.post, "ack", own, "h2.a") for _ in range(4)]
    gevent.sleep(0.5)
    assert h1.client.get("/receive").text == "b\n"
    assert owner.at_a_time == 2
    assert time.monotonic() - begin < 1.9, "before any of them was answered"
    for request in requests:
        answer = request.get(timeout=5)
        assert told(answer, 503) == {}
        assert "'h2'" in answer.text
        assert "no answer within 2 s" in answer.text
    assert 2 <= time.monotonic() - begin < 4
    assert passed(503) == before + 4
    owner.prompt.set()
    assert told(h1.post("ack", own, "h2.a"), 200) == {"acknowledged": 2}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *[(status, b"{}") for status in (201, 301, 400, 404, 413, 429, 500, 503)],
        *[(410, body) for body in (b"", b"<p>", b"[]", b"{}", b'{"gone": []}', b'{"gone": [[]]}')],
        (410, b'{"gone": ["h1.a"]}'),
        (410, b"[" * 4000),
        (200, b" " * 5000),
    ],
)
def test_an_answer_that_makes_no_sense_leaves_it_unknown(
    h1: Host,
    owner: FakeDoor,
    rabbit: Rabbit,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: bytes,
) -> None:
    rabbit.publish(b"a")
    own = h1.lease()
    owner.status, owner.body = status, body
    for _ in range(2):
        assert told(h1.post("ack", own, "h2.a"), 503) == {}
    assert len(caplog.messages) == 1, "each new reason is logged once"
    owner.status, owner.body = 200, b"{}"
    assert told(h1.post("ack", own, "h2.a"), 200) == {"acknowledged": 2}


def test_an_answer_that_is_cut_off_leaves_it_unknown(h1: Host, owner: FakeDoor) -> None:
    owner.prompt.clear()
    request = gevent.spawn(h1.post, "ack", "h2.a")
    gevent.sleep(0.1)
    for sock in list(owner.https.open):
        sock.shutdown(socket.SHUT_RDWR)
    assert told(request.get(timeout=2), 503) == {}


def test_an_owner_that_speaks_no_tls_leaves_it_unknown(
    make: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    with listen() as listener:

        def hang_up() -> None:
            listener.accept()[0].close()

        gevent.spawn(hang_up)
        h1 = make("h1", {"h2": f"https://{LOCAL}:{listener.getsockname()[1]}"})
        assert told(h1.post("ack", "h2.a"), 503) == {}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("limit", ["CONNECT_TIMEOUT", "ANSWER_TIMEOUT"])
def test_an_owner_that_takes_a_connection_and_says_nothing_leaves_it_unknown(
    make: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(elsewhere, limit, 0.3)
    with listen() as listener:
        h1 = make("h1", {"h2": f"https://{LOCAL}:{listener.getsockname()[1]}"})
        request = gevent.spawn(h1.post, "ack", "h2.a")
        with listener.accept()[0] as silent, gevent.Timeout(2):
            assert silent.recv(65536), "the client's half of the handshake"
            assert silent.recv(65536) == b"", "its end"
        assert told(request.get(timeout=2), 503) == {}


@pytest.mark.parametrize("wrong", ["CA", "name"])
def test_nothing_is_told_to_who_is_not_the_owner(
    make: Callable[..., Host],
    owner: FakeDoor,
    tmp_path: Path,
    ca: Path,
    caplog: pytest.LogCaptureFixture,
    wrong: str,
) -> None:
    url = owner.https.url.replace(LOCAL, "localhost") if wrong == "name" else owner.https.url
    h1 = make("h1", {"h2": url}, ca=pems(tmp_path / "other")[0] if wrong == "CA" else ca)
    for _ in range(2):
        assert told(h1.post("ack", "h2.a"), 503) == {}
    assert owner.asked == []
    (line,) = caplog.messages
    assert "certificate verify failed" in line


def test_a_ca_that_was_changed_counts_with_the_next_connection(
    make: Callable[..., Host],
    owner: FakeDoor,
    tmp_path: Path,
    ca: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elsewhere, "KEPT", 0)
    file = pems(tmp_path / "other")[0]
    h1 = make("h1", {"h2": owner.https.url}, ca=file)
    assert told(h1.post("ack", "h2.a"), 503) == {}
    file.write_bytes(ca.read_bytes())
    assert told(h1.post("ack", "h2.a"), 200) == {"acknowledged": 1}
    file.unlink()
    assert told(h1.post("ack", "h2.a"), 503) == {}


# What brokers of other hosts tell.


@pytest.fixture
def api() -> Iterator[str]:
    """The management API of a broker that knows nothing but that it is there."""
    with serving(lambda _: (200, b'[{"name": "pizza", "messages_ready": 7}]')) as url:
        yield url


def ready(answer: TestResponse) -> dict[str, Any]:
    """Return how many messages wait in each queue, by an answer to GET /queues."""
    assert answer.content_type == "application/json"
    return {one["name"]: one["ready"] for one in told(answer, 200)["queues"]}


def test_while_the_own_broker_is_away_another_door_tells_of_the_queues(
    make: Callable[..., Host], ca: Path, api: str
) -> None:
    away = Https(ca.parent / "server.pem")
    away.stop()
    mute = make("h2", {})
    knows = make("h3", {}, url=api)
    h1 = make("h1", {"h4": away.url, "h2": mute.https.url, "h3": knows.https.url})
    before = passed(503)
    answer = h1.client.get("/queues", headers={"X-Request-Id": "mine"})
    assert ready(answer) == ready(knows.client.get("/queues"))
    assert ready(answer)["pizza"] == 7
    assert passed(503) == before + 1
    assert h1.events[-1]["passed_on"] == "h3"
    assert mute.events[-1]["request_id"] == knows.events[-2]["request_id"] == "mine"


def test_the_own_broker_is_asked_alone_where_it_answers(
    make: Callable[..., Host], owner: FakeDoor, api: str
) -> None:
    h1 = make("h1", {"h2": owner.https.url}, url=api)
    assert ready(h1.client.get("/queues"))["pizza"] == 7
    assert owner.asked == []
    assert "passed_on" not in h1.events[-1]


def test_a_question_is_passed_on_with_the_client_s_token_and_to_one_door_only(
    h1: Host, owner: FakeDoor
) -> None:
    owner.body = b'{"queues": []}'
    assert ready(h1.client.get("/queues", headers={"Authorization": "Bearer x"})) == {}
    (asked,) = owner.asked
    assert (asked["REQUEST_METHOD"], asked["PATH_INFO"]) == ("GET", "/queues")
    assert asked["HTTP_AUTHORIZATION"] == "Bearer x"
    assert asked["HTTP_X_STACK_HOP"] == asked["HTTP_X_STACK_DOOR"] == "h1"
    told(h1.client.get("/queues", headers={"X-Stack-Door": "h2"}), 503)
    assert len(owner.asked) == 1


@pytest.mark.parametrize("fault", ["status", "size", "silence", "end"])
def test_where_no_door_tells_of_the_queues_the_own_reason_is_told(
    h1: Host, owner: FakeDoor, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(elsewhere, "LOOK_TIMEOUT", 0.3)
    if fault == "status":
        owner.status = 403
    elif fault == "size":
        owner.body = b" " * 20_000
    elif fault == "silence":
        owner.prompt.clear()
    else:
        owner.https.stop()
    answer = h1.client.get("/queues")
    told(answer, 503)
    assert "set RABBITMQ_MANAGEMENT_URL" in answer.text
    assert h1.events[-1]["passed_on"] == "h2"


# Connections and memory.


def test_a_connection_serves_one_request_after_the_other(h1: Host, owner: FakeDoor) -> None:
    for status in 200, 410, 403, 200:
        owner.status, owner.body = status, b'{"gone": ["h2.a"]}'
        told(h1.post("ack", "h2.a"), status)
    assert owner.https.connections == 1
    requests = [gevent.spawn(h1.post, "ack", "h2.a") for _ in range(5 * PLACES)]
    for request in requests:
        told(request.get(timeout=5), 200)
    assert owner.https.connections == PLACES


def test_a_connection_that_has_ended_or_was_kept_for_long_is_not_used(
    h1: Host, owner: FakeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(h1.post("ack", "h2.a"), 200)
    for sock in list(owner.https.open):
        sock.shutdown(socket.SHUT_RDWR)
    gevent.sleep(0.05)
    told(h1.post("ack", "h2.a"), 200)
    assert owner.https.connections == 2
    monkeypatch.setattr(elsewhere, "KEPT", 0)
    told(h1.post("ack", "h2.a"), 200)
    assert owner.https.connections == 3
    gevent.sleep(0.05)
    assert len(owner.https.open) == 1


def test_without_memory_nothing_is_passed_on(make: Callable[..., Host], owner: FakeDoor) -> None:
    h1 = make("h1", {"h2": owner.https.url})
    h1.client.application.wsgi_app = small(h1.client.application.wsgi_app)
    assert told(h1.post("ack", "h2.a"), 503) == {}
    assert told(h1.client.get("/queues"), 503) == {}
    assert owner.asked == []


def small(application: Any) -> Any:
    """Return application for clients whose memory has room for little."""

    def call(environ: dict[str, Any], start: Any) -> Any:
        client = SimpleNamespace(
            address="", socket=None, grant=Memory(8192).grant(), waiting=nullcontext(), let_go=False
        )
        return application(environ | {CLIENT: client}, start)

    return call


# Settings.


def test_without_settings_receipts_are_as_ever_and_nothing_is_passed_on(
    make: Callable[..., Host], owner: FakeDoor, rabbit: Rabbit
) -> None:
    host = make("", {})
    rabbit.publish(b"a")
    receipt = host.lease()
    assert len(receipt) == 22
    assert "." not in receipt
    assert told(host.post("ack", "h2.a", receipt), 410) == {"gone": ["h2.a"]}
    assert told(host.post("ack", receipt), 200) == {"acknowledged": 1}
    assert "passed_on" not in host.events[-1]
    assert owner.asked == []


def test_a_door_s_name_before_a_receipt_takes_nothing_from_its_randomness(
    make: Callable[..., Host], rabbit: Rabbit
) -> None:
    host = make("a-1", {})
    rabbit.publish(b"a", b"b")
    receipts = [host.lease(), host.lease()]
    assert [receipt.partition(".")[0] for receipt in receipts] == ["a-1", "a-1"]
    assert [len(receipt.partition(".")[2]) for receipt in receipts] == [22, 22]
    assert receipts[0] != receipts[1]
    assert told(host.post("ack", receipts[0].partition(".")[2]), 410)


ENVIRONMENT = {"RABBITMQ_USER": "u", "RABBITMQ_PASSWORD": "p"}


def read(**more: str) -> ClusterSettings:
    return Settings.read(Environment(ENVIRONMENT | more)).cluster


def test_the_other_doors_are_read_from_the_environment(ca: Path) -> None:
    assert read() == ClusterSettings()
    assert read(CA_FILE=str(ca)) == ClusterSettings()
    assert read(HOST_NAME="h1") == ClusterSettings("h1")
    doors = {"h2": "https://h2:5001", "H-3": "https://[::1]/"}
    told = ", ".join(f"{name}={url}" for name, url in doors.items())
    assert read(HOST_NAME="h1", OTHER_DOORS=told, CA_FILE=str(ca)) == ClusterSettings(
        "h1", doors, ca
    )


GOOD = {"HOST_NAME": "h1", "OTHER_DOORS": "h2=https://h2:5001", "CA_FILE": "ca.pem"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("HOST_NAME", name) for name in ("", "a.b", "a_b", "-a", "a-", "a" * 64, "ä", None)],
        *[("OTHER_DOORS", f"h2{rest}") for rest in ("", "=", "=h2:5001", "=http://h2:5001")],
        *[("OTHER_DOORS", f"h2=https://{rest}") for rest in ("", "h2:0", "h2:65536", "h2/x")],
        *[("OTHER_DOORS", f"{name}=https://h2") for name in ("", "a.b", "h1", "h 2")],
        *[("OTHER_DOORS", doors) for doors in ("", ",", "h2=https://a,h2=https://b")],
        *[("OTHER_DOORS", doors) for doors in ("h2=https://h2,", "h2=https://u:p@h2")],
        *[("CA_FILE", file) for file in ("", "/nowhere", "empty.pem", "text.pem", None)],
    ],
)
def test_a_setting_that_makes_no_sense_stops_the_start_by_name(
    ca: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    monkeypatch.chdir(ca.parent)
    Path("empty.pem").touch()
    Path("text.pem").write_text("text")
    read(**GOOD)
    changed = {one: given for one, given in GOOD.items() if one != name}
    with pytest.raises(ConfigError, match=name):
        read(**changed | ({name: value} if value is not None else {}))
