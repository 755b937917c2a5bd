"""What the server of a door promises to its clients and to its supervisor, over real sockets."""

import inspect
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPMessage, parse_headers
from io import BufferedReader, BytesIO
from itertools import pairwise
from select import select
from types import SimpleNamespace
from typing import Any, BinaryIO

import gevent
import gevent.socket
import h11
import pytest
from common.events import Event
from door.call import Call
from door.clients import Clients
from door.memory import BASE, MIB, Memory
from door.server import Body, Handler, Refused, Server, read_head
from hypothesis import given
from hypothesis import strategies as st

DEADLINE = 5  # seconds any promise may take
LIMIT = 512 * MIB  # bytes of the container

# Arguments: port, workers, a folder, the container's memory, and constants to be changed.
SCRIPT = """
import os, sys, time
from door import server
begun = time.monotonic()
for name, value in (pair.split("=") for pair in sys.argv[5:]):
    setattr(server, name, float(value))
import gevent
from door.call import Answer, json_answer
from door.topology import Topology
from door.web import equip
from flask import Flask

def tell(word):
    os.write(1, f"{word}\\n".encode())

seen = []

class Connection:
    @property
    def up(self):
        return time.monotonic() > begun + getattr(server, "UP_AFTER", 0)

    def __getattr__(self, name):
        return lambda: tell(name)

def make(memory):
    app = Flask("door", root_path=sys.argv[3])

    def echo(call):
        query = call.query("sleep")
        body = call.read(10_000_000).decode() if call.environ["REQUEST_METHOD"] == "POST" else ""
        if query:
            gevent.sleep(float(query["sleep"]))
        if body:
            tell("answered")
        told = {"pid": os.getpid(), "held": memory.held, "up": seen[0]}
        told |= {"address": call.client.address, "headers": sorted(call.environ)}
        return json_answer(200, {"body": body, **told})

    def unread(call):
        return json_answer(200, {"body": None})

    def large(call):
        call.hold(2_000_000)
        return Answer(200, [("Content-Length", "20000000")], [b"x" * 20_000_000])

    routes = {("GET", "/"): echo, ("POST", "/"): echo}
    routes |= {("POST", "/unread"): unread, ("GET", "/large"): large}
    equip(app, Connection(), None, Topology("queue"), routes)

    def watched(environ, start_response):
        seen.append(Connection().up)
        return app(environ, start_response)

    return watched, Connection()

fronted = bool(getattr(server, "FRONTED", 0))
server.serve("door", make, int(sys.argv[1]), int(sys.argv[4]), int(sys.argv[2]), fronted=fronted)
"""

Answer = tuple[int, HTTPMessage, bytes]


def eventually(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Poll condition until it holds; fail after seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.01)


class Client:
    """One connection; answers are read one after the other."""

    def __init__(self, port: int, data: bytes = b"", seconds: float = DEADLINE) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self.stream: BinaryIO = self.socket.makefile("rb")
        self.socket.sendall(data)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.socket.close()

    def answer(self) -> Answer:
        """Read one answer: status, headers and body."""
        status = int(self.stream.readline().split()[1])
        headers = parse_headers(self.stream)
        return status, headers, self.stream.read(int(headers["Content-Length"] or 0))

    def ended(self) -> bool:
        """Wait for the end; False when something else comes, an error when nothing does."""
        return self.stream.read(1) == b""

    def let_go(self) -> bool:
        """Whether the connection ends, before or in the middle of an answer."""
        with suppress(ConnectionResetError):
            while self.stream.read(100_000):
                pass
        return True

    def trickle(self, data: bytes) -> None:
        """Send data in single bytes until the server answers."""
        self.socket.settimeout(0.05)
        for byte in data:
            self.socket.sendall(bytes([byte]))
            try:
                if self.socket.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        self.socket.settimeout(DEADLINE)


class Door:
    """A server in a process of its own."""

    def __init__(
        self,
        root: str,
        settings: dict[str, float],
        workers: int = 1,
        limit: int = LIMIT,
        files: int = 4096,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        arguments = [str(self.port), str(workers), root, str(limit)]
        arguments += [f"{name}={value}" for name, value in settings.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
        eventually(self._listens, 20)

    def _listens(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        began = time.monotonic()
        try:
            answers = self.ask("/healthz")[0] == 200
            # Seconds that the first answer took.
            self.waited = time.monotonic() - began
            return answers
        except OSError:
            return False

    def client(self, data: bytes = b"", seconds: float = DEADLINE) -> Client:
        return Client(self.port, data, seconds)

    def running(self, seconds: float) -> Client:
        """Return the client of a request that the application is answering for seconds."""
        client = self.client(
            f"POST /?sleep={seconds} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n".encode()
            + b"Expect: 100-continue\r\n\r\n"
        )
        assert client.answer()[0] == 100
        client.socket.sendall(b"x")
        return client

    def ask(self, target: str, seconds: float = DEADLINE) -> tuple[int, dict[str, Any]]:
        with self.client(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), seconds) as client:
            status, _, body = client.answer()
            return status, json.loads(body)

    def pids(self) -> set[int]:
        """Return who answers ten requests at a time."""
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(self.ask, ["/?sleep=0.05"] * 10))
        assert {status for status, _ in answers} == {200}
        return {body["pid"] for _, body in answers}

    def all_pids(self, count: int) -> set[int]:
        """Wait until count processes have answered, and return which."""
        pids: set[int] = set()

        def complete() -> bool:
            pids.update(self.pids())
            return len(pids) == count

        eventually(complete)
        return pids

    def wait(self) -> list[str]:
        """Wait for the end, which must be a good one, and return what was printed."""
        output, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0
        return output.split()

    def kill(self) -> None:
        with self.process:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("root")
    (path / "openapi.json").write_text("{}")
    return str(path)


Start = Callable[..., Door]


@pytest.fixture
def start(root: str) -> Iterator[Start]:
    """Start a server for one test: start(workers, CONSTANT=value)."""
    with ExitStack() as doors:

        def begin(
            workers: int = 1, limit: int = LIMIT, files: int = 4096, **settings: float
        ) -> Door:
            door = Door(root, settings, workers, limit, files)
            doors.callback(door.kill)
            return door

        yield begin


@pytest.fixture(scope="module")
def door(root: str) -> Iterator[Door]:
    """Return a server with its own constants, for the tests that leave it as it is."""
    door = Door(root, {})
    yield door
    door.kill()


@pytest.fixture(scope="module")
def hasty(root: str) -> Iterator[Door]:
    """Return a server with little patience."""
    door = Door(root, {"CLIENT_TIMEOUT": 0.5})
    yield door
    door.kill()


ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LINE = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (LINE + b"X: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
        (LINE + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 600) for n in range(60)) + b"\r\n", 431),
        (LINE + b"X: x\r\n" * 101 + b"\r\n", 431),
        (LINE + b"no colon\r\n\r\n", 400),
        (LINE + b"X: x\r\n folded\r\n\r\n", 400),
        (LINE + b"X : x\r\n\r\n", 400),
        (LINE + b": x\r\n\r\n", 400),
        (LINE + b"X: x\0x\r\n\r\n", 400),
        (LINE + b"X: x\rX: x\r\n\r\n", 400),
        (LINE + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
        (LINE + b"Content-Length: 1\r\ncontent-length: 2\r\n\r\nx", 400),
        (LINE + b"Authorization: Basic a\r\nAuthorization: Basic b\r\n\r\n", 400),
        (LINE + b"Host: a\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 400),
        (LINE + CHUNKED + b"\r\nContent-Length: 1\r\n\r\n0\r\n\r\n", 400),
        (LINE + CHUNKED + b"\r\n" + CHUNKED + b"\r\n\r\n0\r\n\r\n", 400),
        *[
            (LINE + b"Content-Length: " + length + b"\r\n\r\nxxxxx", 400)
            for length in (b"+5", b"-5", b"5, 5", b"0x5", b"5_0", b"5.0", b"", b"\xb2", b"9" * 5000)
        ],
        *[
            (LINE + b"Transfer-Encoding: " + encoding + b"\r\n\r\n", 501)
            for encoding in (b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"")
        ],
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"x" * 100_000, 414),
        (b"GET /\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_refused_client_can_read_why_while_it_is_still_sending(
    door: Door, request_: bytes, status: int
) -> None:
    with door.client(request_ + b"x" * 500_000) as client:
        told, headers, body = client.answer()
        assert (told, headers["Content-Type"]) == (status, "application/json")
        assert headers["Connection"] == "close"
        assert headers["X-Request-Id"]
        assert list(json.loads(body)) == ["message"]
        assert client.ended()


def test_headers_up_to_the_limits_are_taken(door: Door) -> None:
    many = b"".join(b"X-%d: x\r\n" % number for number in range(99))
    for headers in many, b"X: " + b"x" * 32_000 + b"\r\n":
        with door.client(LINE + headers + b"\r\n") as client:
            assert client.answer()[0] == 200


def test_repeated_headers_are_joined_and_a_name_passes_for_no_other() -> None:
    environ: dict[str, Any] = {}
    lines = [
        "X-A: 1",
        "x-a:\t2 ",
        "Cookie: a",
        "cookie: b",
        "Content_Length: 9",
        "X_A: 3",
        "N\u00f6: x",
    ]
    with pytest.raises(Refused, match="A header cannot be read"):
        read_head(["GET /%41?b=%41 HTTP/1.0", *lines], environ)
    environ.clear()
    read_head(["GET /%41?b=%41 HTTP/1.0", *lines[:-1]], environ)
    assert environ == {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.0",
        "PATH_INFO": "/A",
        "QUERY_STRING": "b=%41",
        "HTTP_X_A": "1,2",
        "HTTP_COOKIE": "a; b",
    }


NAMES = ["Host", "Content-Length", "content-length", "Transfer-Encoding", "X-A", "x-a", "X_A"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(NAMES) | st.text("Aa-_ \t:\0\x7f\xe9", max_size=3),
            st.sampled_from([": ", ":", " :", ""]),
            st.sampled_from(["1", "chunked", "+1", "x"])
            | st.text("a1, \t\r\0\x1f\x85\xe9", max_size=3),
        ),
        max_size=4,
    )
)
def test_whoever_reads_a_request_that_is_taken_reads_the_same(
    headers: list[tuple[str, str, str]],
) -> None:
    """Else a proxy in front could take a part of its body for another request (RFC 9112, 11.2)."""
    lines = ["POST / HTTP/1.1", "Host: x", *map("".join, headers)]
    environ: dict[str, Any] = {}
    try:
        read_head(lines, environ)
    except Refused:
        return
    peer = h11.Connection(h11.SERVER)
    peer.receive_data("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
    request: Any = peer.next_event()
    told: dict[str, str] = {}
    for name, value in request.headers:
        if b"_" not in name:
            key = name.decode().upper().replace("-", "_")
            key = key if key.startswith("CONTENT_") else f"HTTP_{key}"
            told[key] = (
                f"{told[key]},{value.decode('latin-1')}" if key in told else value.decode("latin-1")
            )
    ours = {key: value for key, value in environ.items() if key.startswith(("HTTP_", "CONTENT_"))}
    assert ours == told


def test_headers_end_at_the_first_empty_line_whatever_ends_their_lines(door: Door) -> None:
    """What came behind them is the next request, not a header of the first one."""
    lines = LINE.replace(b"\r", b"") + b"Content-Length: 1\n\nx"
    with door.client(lines + b"GET / HTTP/1.1\nHost: x\r\nX-A: x\r\n\r\n") as client:
        first, second = (json.loads(client.answer()[2]) for _ in range(2))
    assert (first["body"], second["body"]) == ("x", "")
    assert "HTTP_X_A" not in first["headers"]
    assert "HTTP_X_A" in second["headers"]


def served(application: Any, asked: bytes) -> bytes:
    """Return all that a server of application sends to whoever asks."""
    server = Server(("127.0.0.1", 0), application, Memory(64 * MIB))
    server.start()
    answer = b""
    with gevent.Timeout(DEADLINE):
        client = gevent.socket.create_connection(("127.0.0.1", server.server_port))
        client.sendall(asked)
        while piece := client.recv(65536):
            answer += piece
    client.close()
    server.stop(timeout=1)
    return answer


class Pieces(list[Any]):
    """An answer that says when it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("fault", ["before", "no head", "\r", "\n", "between"])
def test_a_bug_of_the_application_ends_the_connection_and_closes_the_answer(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    # What is no bytes cannot be sent.
    answer = Pieces([b"one", 2])

    def application(_environ: Any, start_response: Any) -> Any:
        if fault == "before":
            raise ZeroDivisionError("secret")
        if fault == "no head":
            return answer
        more = "a" if fault == "between" else f"a{fault}X: secret"
        start_response("200 OK", [("Content-Length", "99"), ("X-A", more)])
        return answer

    told = served(application, ASK * 2)
    assert told.count(b"HTTP/1.1 ") == 1
    assert b"secret" not in told
    assert told.startswith(b"HTTP/1.1 200 " if fault == "between" else b"HTTP/1.1 500 ")
    assert answer.closed == (fault in ("between", "no head"))
    assert "A request failed" in caplog.text


def test_an_answer_of_unknown_length_ends_with_the_connection() -> None:
    def application(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return iter([b"", b"one", b"", b"two"])

    told = served(application, ASK * 2)
    assert told.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in told
    assert told.endswith(b"\r\n\r\nonetwo")


def test_pipelined_requests_are_answered_in_order(door: Door) -> None:
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n%d"
    with door.client(b"".join(one % number for number in range(9))) as client:
        answers = [client.answer() for _ in range(9)]
    assert [json.loads(body)["body"] for _, _, body in answers] == list("012345678")


@pytest.mark.parametrize("line", [LINE, b"POST / HTTP/1.0\r\nConnection: keep-alive\r\n"])
def test_a_connection_is_kept_for_the_next_request(door: Door, line: bytes) -> None:
    with door.client() as client:
        for number in range(3):
            client.socket.sendall(line + b"Content-Length: 1\r\n\r\n%d" % number)
            status, _, body = client.answer()
            assert (status, json.loads(body)["body"]) == (200, str(number))


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nCONNECTION: Close\r\n\r\n",
    ],
)
def test_a_connection_ends_after_the_answer_when_its_client_wants_that(
    door: Door, request_: bytes
) -> None:
    with door.client(request_) as client:
        assert client.answer()[0] == 200
        assert client.ended()


@pytest.mark.parametrize("length", [b"Content-Length: 9000000", CHUNKED])
def test_a_body_that_nobody_read_ends_the_connection_after_a_readable_answer(
    door: Door, length: bytes
) -> None:
    with door.client(b"POST /unread HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n") as client:
        client.socket.sendall(b"1\r\nx\r\n" * 100_000)
        status, headers, _ = client.answer()
        assert (status, headers["Connection"]) == (200, "close")
        assert client.ended()


def test_a_chunked_body_is_put_together_and_the_next_request_is_found_behind_it(
    door: Door,
) -> None:
    chunked = LINE + CHUNKED + b"\r\n\r\n3\r\nabc\r\n0A;x=y\r\n0123456789\r\n0\r\nX: y\r\n\r\n"
    with door.client(chunked * 2) as client:
        for _ in range(2):
            status, _, body = client.answer()
            assert (status, json.loads(body)["body"]) == (200, "abc0123456789")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 4096, None])
def test_a_chunked_body_may_be_read_in_pieces_of_any_size(size: int | None) -> None:
    body = chunked_body(b"3\r\nabc\r\n1;x\r\nd\r\n5\r\nefghi\r\n0\r\nX: x\r\n\r\nGET")
    pieces = list(iter(lambda: body.read(size), b""))
    assert b"".join(pieces) == b"abcdefghi"
    assert size is None or {len(piece) for piece in pieces[:-1]} <= {size}
    assert not body.unread
    assert body.rfile.read() == b"GET"


def chunked_body(wire: bytes) -> Any:
    stream: Any = BytesIO(wire)
    return Body(BufferedReader(stream), None, None, True)


@pytest.mark.parametrize(
    "chunks",
    [
        b"",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b"1\nx\r\n",
        b"1\r\nxx\r\n",
        b"2\r\nx",
        b"2\r\nx\r\n0\r\n\r\n",
        b"1" * 99,
        b"1;" + b"x" * 5000,
        b"0\r\n" + b"X: x\r\n" * 1000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_chunks_that_cannot_be_told_apart_are_the_client_s_fault(door: Door, chunks: bytes) -> None:
    with door.client(LINE + CHUNKED + b"\r\n\r\n" + chunks) as client:
        client.socket.shutdown(socket.SHUT_WR)
        status, _, body = client.answer()
        assert (status, json.loads(body)) == (400, {"message": "The body is not whole."})
        assert client.ended()


@pytest.mark.parametrize(
    ("length", "sent"), [(b"Content-Length: 3", b"abc"), (CHUNKED, b"3\r\nabc\r\n0\r\n\r\n")]
)
def test_a_client_that_expects_100_continue_sends_its_body_after_it(
    door: Door, length: bytes, sent: bytes
) -> None:
    head = b"Expect: 100-continue\r\n" + length + b"\r\n\r\n"
    with door.client(LINE + head) as client:
        assert client.answer()[0] == 100
        client.socket.sendall(sent)
        assert json.loads(client.answer()[2])["body"] == "abc"
    with door.client(b"POST /unread HTTP/1.1\r\nHost: x\r\n" + head) as client:
        assert client.answer()[0] == 200, "a body that nobody wants is not asked for"
        assert client.ended()


SLOW_BODY = LINE + b"Content-Length: 99\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "drops"),
    [
        (LINE + b"X: x\r\n", b""),
        (LINE + b"X: x\r\n", b"x" * 90),
        (SLOW_BODY, b""),
        (SLOW_BODY, b"x" * 90),
        (LINE + CHUNKED + b"\r\n\r\n50\r\n", b""),
        (LINE + CHUNKED + b"\r\n\r\n50\r\n", b"x" * 90),
        (LINE, b""),
    ],
)
def test_slow_headers_and_slow_bodies_end_by_408_in_time(
    hasty: Door, head: bytes, drops: bytes
) -> None:
    started = time.monotonic()
    with hasty.client(head) as client:
        client.trickle(drops)
        status, _, body = client.answer()
        assert client.ended()
    assert (status, list(json.loads(body))) == (408, ["message"])
    assert 0.4 < time.monotonic() - started < 3


@pytest.mark.parametrize("request_", [b"", b"GET /", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_without_a_next_request_is_let_go_in_time(hasty: Door, request_: bytes) -> None:
    with hasty.client(request_, seconds=2) as client:
        if request_.endswith(b"\n"):
            assert client.answer()[0] == 200
        assert client.ended()


def test_a_client_that_does_not_read_its_answer_is_let_go_in_time(hasty: Door) -> None:
    with hasty.client(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        time.sleep(1)  # the client's slowness is the test
        received = 0
        try:
            while data := client.socket.recv(1_000_000):
                received += len(data)
        except ConnectionResetError:
            pass
    assert received < 1_000_000, "the system took what the client did not"


def test_hundreds_of_slow_clients_keep_nobody_waiting_and_are_all_told(start: Start) -> None:
    door = start(CLIENT_TIMEOUT=2)
    with ExitStack() as stack:
        heads = [LINE + b"X: x\r\n", SLOW_BODY + b"x"] * 150
        clients = [stack.enter_context(door.client(head)) for head in heads]
        started = time.monotonic()
        for _ in range(5):
            assert door.ask("/")[0] == 200
        assert time.monotonic() - started < 1
        assert {client.answer()[0] for client in clients} == {408}


def test_no_header_keeps_others_waiting(start: Start) -> None:
    door = start()
    with door.client(LINE + b"X:" + b" " * 30_000 + b"\0\r\n\r\n"):
        assert door.ask("/", seconds=2)[0] == 200


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b"1\r\nx\r\n"),
        (b"", b"1;" + b"x" * 200 + b"\r\nx\r\n"),
        (b"0\r\n", b"x: " + b"x" * 4000 + b"\r\n"),
    ],
    ids=["small chunks", "extensions", "trailers"],
)
def test_no_chunked_body_keeps_others_waiting(start: Start, first: bytes, then: bytes) -> None:
    door = start()
    flood = then * (100_000 // len(then))
    with door.client(LINE + CHUNKED + b"\r\n\r\n" + first) as client:

        def pour() -> None:
            with suppress(OSError):
                while not select([client.socket], [], [], 0)[0]:
                    client.socket.sendall(flood)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(pour)
            try:
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    assert door.ask("/")[0] == 200
            finally:
                door.kill()


@pytest.mark.parametrize("extension", [b"", b";" + b"x" * 200])
def test_little_is_read_of_a_chunked_body_between_two_turns_of_others(extension: bytes) -> None:
    body = chunked_body((b"1" + extension + b"\r\nx\r\n") * 9000 + b"0\r\n\r\n")
    seen = [0]

    def watch() -> None:
        while True:
            seen.append(body.rfile.tell())
            gevent.sleep(0)

    watcher = gevent.spawn(watch)
    try:
        environ = {"wsgi.input": body, "HTTP_TRANSFER_ENCODING": "chunked"}
        assert Call(environ, Event(None, None)).read(100_000) == b"x" * 9000
    finally:
        watcher.kill()
    seen.append(body.rfile.tell())
    assert max(after - before for before, after in pairwise(seen)) < 2**20


# What door.server replaces of gevent.
REPLACED = {
    Body: ["_chunked_read"],
    Server: ["_do_read", "do_handle"],
}
CHUNKS = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"


def test_gevent_calls_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another gevent does it in another way: see what door.server has to replace now."""
    called: set[tuple[type, str]] = set()

    def watch(kind: Any, name: str) -> None:
        function = getattr(kind, name)

        def call(*args: Any) -> Any:
            # What the event loop calls has no caller.
            caller = inspect.stack(0)[1:2]
            if not caller or caller[0].frame.f_globals["__name__"].startswith("gevent."):
                called.add((kind, name))
            return function(*args)

        monkeypatch.setattr(kind, name, call)

    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["wsgi.input"].read(), b"y"]

    for kind, names in REPLACED.items():
        for name in names:
            arguments(getattr(kind, name), getattr(kind.__base__, name))
            watch(kind, name)
    answer = served(application, CHUNKS + b"bad\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"HTTP/1.1 400 " in answer
    assert {(kind, name) for kind in REPLACED for name in REPLACED[kind]} - called == set()


def arguments(ours: Any, gevent_s: Any) -> None:
    """Assert that ours takes what gevent's takes."""
    taken, given = (list(inspect.signature(one).parameters.values()) for one in (ours, gevent_s))
    if given[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        assert [one.name.strip("_") for one in taken] == [one.name for one in given]


def test_what_a_refused_client_still_sends_keeps_nobody_waiting() -> None:
    class Line:
        received = 0

        def shutdown(self, _how: int) -> None:
            pass

        def recv(self, size: int) -> bytes:
            self.received += 1
            return b"x" * (size if self.received < 10_000 else 0)

    handler: Any = Handler.__new__(Handler)
    handler.socket = line = Line()
    handler.server = SimpleNamespace(clients=Clients(Memory(MIB), 1))
    handler.address = ""
    seen: list[int] = []
    gevent.spawn(lambda: seen.append(line.received))
    handler._linger()
    gevent.idle()
    assert seen[0] < 10_000


def test_a_target_with_a_host_is_that_host_s(door: Door) -> None:
    line = b"GET http://x:5001/?sleep=0 HTTP/1.1\r\nHost: x\r\n\r\n"
    with door.client(line + line.replace(b"/?sleep=0", b"")) as client:
        assert [client.answer()[0] for _ in range(2)] == [200, 200]


def test_an_empty_line_before_a_request_is_skipped(door: Door) -> None:
    with door.client(b"\r\n" + LINE + b"Content-Length: 1\r\n\r\nx") as client:
        assert json.loads(client.answer()[2])["body"] == "x"


# A door of little memory: 3.9 MiB, of which 124 connections may take three quarters.
SMALL = BASE + 6 * MIB
CONNECTIONS = 300


def flood(stack: ExitStack, door: Door, data: bytes) -> list[Client]:
    """Have CONNECTIONS clients send data and no more."""
    return [stack.enter_context(door.client(data)) for _ in range(CONNECTIONS)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 30_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        LINE + b"Content-Length: 9000000\r\n\r\n" + b"x" * 30_000,
        b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["idle", "in its headers", "answered", "in its body", "not reading"],
)
def test_clients_who_keep_a_door_waiting_make_room_for_others(start: Start, data: bytes) -> None:
    door = start(limit=SMALL)
    with ExitStack() as stack:
        clients = flood(stack, door, data)
        for _ in range(5):
            assert door.ask("/")[0] == 200
        assert clients[0].let_go(), "who came first and did nothing is still there"
    eventually(lambda: door.ask("/")[1]["held"] < MIB)


def test_clients_make_room_for_others_when_no_more_files_may_be_open(start: Start) -> None:
    door = start(files=256)
    with ExitStack() as stack:
        flood(stack, door, b"")
        for _ in range(5):
            assert door.ask("/", seconds=1)[0] == 200


def test_a_body_counts_as_it_arrives(door: Door) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(door.client(LINE + b"Content-Length: 9000000\r\n\r\n"))
        eventually(lambda: door.ask("/")[1]["held"] > 50 * 64 * 1024)
        assert door.ask("/")[1]["held"] < 50 * 128 * 1024


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_a_signal_lets_running_requests_finish_and_ends_the_rest(
    start: Start, workers: int, number: int
) -> None:
    door = start(workers)
    door.all_pids(workers)
    with ExitStack() as stack:
        idle = stack.enter_context(door.client(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert idle.answer()[0] == 200
        short, long = (stack.enter_context(door.running(seconds)) for seconds in (0.2, 0.8))
        door.process.send_signal(number)
        for client in short, long:
            status, _, body = client.answer()
            assert (status, json.loads(body)["body"]) == (200, "x")
            assert client.ended()
            if client is short:
                assert not select([long.socket], [], [], 0)[0], "it waited for the long one"
                with pytest.raises(ConnectionRefusedError):
                    door.client(seconds=0.3)
        assert idle.ended()
    told = door.wait()
    assert sorted(told) == sorted(["start", "finish", "stop"] * workers + ["answered"] * 2)
    if workers == 1:
        assert told == ["start", "finish", "answered", "answered", "stop"]
    with pytest.raises(ConnectionRefusedError):
        door.client()


def through_the_end(door: Door, ask: Callable[[], bool], clients: int, seconds: float) -> int:
    """Let clients ask again and again, and the door end in the middle; how often it answered.

    Each of them stops once it is refused a connection, which ask tells by False.
    """
    answered = [0] * clients

    def go_on(number: int) -> None:
        while ask():
            answered[number] += 1

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(go_on, number) for number in range(clients)]
        time.sleep(seconds)
        door.process.terminate()
        for one in running:
            one.result(DEADLINE)
    door.wait()
    return sum(answered)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_proxy_loses_no_request_by_a_door_s_end(start: Start, workers: int) -> None:
    """It has 20 connections and sends 100 requests a second by those that no answer ended."""
    door = start(workers)
    door.all_pids(workers)
    pool = [door.client() for _ in range(20)]
    begun = time.monotonic()

    def ask() -> bool:
        time.sleep(0.01)
        if not pool:
            with suppress(ConnectionRefusedError):
                pool.append(door.client())
        if not pool:
            return False
        client = pool.pop(0)
        client.socket.sendall(ASK)
        status, headers, body = client.answer()
        assert (status, json.loads(body)["body"]) == (200, "")
        if headers["Connection"] == "close":
            assert client.ended()
            client.__exit__()
        else:
            pool.append(client)
        return True

    assert through_the_end(door, ask, clients=1, seconds=1) > 50
    assert not pool
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("workers", [1, 2])
def test_whoever_is_connected_when_a_door_ends_is_answered(start: Start, workers: int) -> None:
    door = start(workers)
    door.all_pids(workers)

    def ask() -> bool:
        with suppress(ConnectionRefusedError), door.client() as client:
            client.socket.sendall(ASK)
            assert client.answer()[0] == 200
            return True
        return False

    assert through_the_end(door, ask, clients=8, seconds=0.5) > 50


def test_an_answer_that_began_before_the_end_leaves_its_connection_open(start: Start) -> None:
    """Its headers did not say that it ends, so the client may have sent the next request."""
    door = start()
    with door.client(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        assert client.stream.peek(1)
        door.process.terminate()
        time.sleep(0.3)  # while the end goes on
        status, headers, _ = client.answer()
        assert (status, headers["Connection"]) == (200, None)
        client.socket.sendall(ASK)
        status, headers, _ = client.answer()
        assert (status, headers["Connection"]) == (200, "close")
        assert client.ended()
    door.wait()


def test_a_door_that_nobody_is_connected_to_ends_at_once(start: Start) -> None:
    door = start()
    begun = time.monotonic()
    door.process.terminate()
    door.wait()
    assert time.monotonic() - begun < 1


def test_a_request_without_an_end_does_not_keep_the_process(start: Start) -> None:
    door = start(DRAIN_TIMEOUT=0.2)
    with door.running(seconds=99) as client:
        door.process.terminate()
        assert door.wait() == ["start", "finish", "stop"]
        assert client.ended()


def test_a_worker_answers_nobody_before_it_is_connected_unless_that_takes_long(
    start: Start,
) -> None:
    assert start(UP_AFTER=1.5, CONNECT_WAIT=9).ask("/")[1]["up"] is True
    assert start(UP_AFTER=99, CONNECT_WAIT=0.1).ask("/")[1]["up"] is False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_door_behind_a_proxy_refuses_connections_until_it_is_connected(
    start: Start, workers: int
) -> None:
    door = start(workers, UP_AFTER=1.5, CONNECT_WAIT=0.1, FRONTED=1)
    assert door.ask("/")[1]["up"] is True
    assert door.waited < 1, "it was not refused"
    assert start(UP_AFTER=99, FRONTED_CONNECT_WAIT=0.1, FRONTED=1).ask("/")[1]["up"] is False


@pytest.mark.parametrize("fronted", [0, 1])
@pytest.mark.parametrize(
    ("told", "address"),
    [(b"192.0.2.7", "192.0.2.7"), (b"192.0.2.6, 192.0.2.7", "192.0.2.7"), (None, "127.0.0.1")],
)
def test_a_door_believes_who_a_request_is_from_only_behind_a_proxy(
    start: Start, fronted: int, told: bytes | None, address: str
) -> None:
    door = start(FRONTED=fronted)
    line = b"X-Forwarded-For: " + told + b"\r\n" if told else b""
    with door.client(ASK) as client:
        assert json.loads(client.answer()[2])["address"] == "127.0.0.1"
        client.socket.sendall(ASK[:-2] + line + b"\r\n")
        body = json.loads(client.answer()[2])
        client.socket.sendall(ASK)
        assert json.loads(client.answer()[2])["address"] == "127.0.0.1"
    assert body["address"] == (address if fronted else "127.0.0.1")
    # A message takes headers X-… along, but not this one.
    assert ("HTTP_X_FORWARDED_FOR" in body["headers"]) == (told is not None and not fronted)


def test_a_proxy_s_idle_connections_stay_when_memory_is_short(start: Start) -> None:
    door = start(limit=SMALL, FRONTED=1)
    with ExitStack() as stack:
        idle = [stack.enter_context(door.client(ASK)) for _ in range(20)]
        for client in idle:
            assert client.answer()[0] == 200
        body = b"Content-Length: 9000000\r\n\r\n" + b"x" * 60_000
        senders = [stack.enter_context(door.client(LINE + body)) for _ in range(60)]
        eventually(lambda: bool(select([one.socket for one in senders], [], [], 0)[0]))
        for client in idle:
            client.socket.sendall(ASK)
            assert client.answer()[0] == 200


def test_a_killed_worker_is_replaced_while_the_others_answer_and_all_end_together(
    start: Start,
) -> None:
    door = start(workers=2, RESPAWN_DELAY=0.2)
    pids = door.all_pids(2)
    assert door.process.pid not in pids
    victim, survivor = pids
    os.kill(victim, signal.SIGKILL)
    assert victim not in door.pids()
    later = door.all_pids(2)
    assert survivor in later
    assert victim not in later
    door.process.terminate()
    told = door.wait()
    assert [told.count(word) for word in ("start", "finish", "stop")] == [3, 2, 2]
    for pid in pids | later:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
