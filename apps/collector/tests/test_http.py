"""What the HTTP input promises, over a socket; for the clock's sake the time-out is in-process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
from typing import TYPE_CHECKING

import pytest
from collector.config import Pattern, StdoutMatch
from collector.events import Router
from collector.http_input import HttpInput
from collector.limits import Limits

if TYPE_CHECKING:
    from tests.conftest import Collector

JSON = {"Content-Type": "application/json"}
HEAD = b"POST /alerts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIMIT = 1 << 20  # body_size_limit of the role's file


@pytest.fixture
def door(stopped: Collector) -> Collector:
    """A collector whose lines stay in their staged chunks, where `stored` finds them at once."""
    stopped.change("flush_interval 0.3s", "flush_interval 60s")
    stopped.start()
    return stopped


def stored(door: Collector) -> list[list[str]]:
    """Return time, tag and JSON of each line, staged or not."""
    files = sorted(door.folder.glob("*.log"))
    return [line.split("\t") for file in files for line in file.read_text().split("\n")[:-1]]


def ask(
    door: Collector,
    body: bytes = b'{"n":1}',
    path: str = "/alerts",
    method: str = "POST",
    headers: dict[str, str] = JSON,
) -> http.client.HTTPResponse:
    """Send one request on a connection of its own and return the answer, read."""
    connection = http.client.HTTPConnection("127.0.0.1", door.http_port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def dial(door: Collector) -> socket.socket:
    return socket.create_connection(("127.0.0.1", door.http_port), timeout=10)


def everything(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", data)]


def test_200_comes_with_an_empty_body_once_the_line_is_staged(door: Collector) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.http_port, timeout=10)
    connection.request("POST", "/alerts", b'{"alerts": [{"a": "K\xc3\xa4se"}]}', JSON)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")
    connection.close()
    (chunk,) = door.folder.glob("buffer.b*.log")
    assert chunk.read_text().endswith('\talerts\t{"alerts":[{"a":"Käse"}]}\n')


def test_an_array_is_an_event_for_each_object(door: Collector) -> None:
    assert ask(door, b'[{"n":1},{"n":2}]').status == 200
    assert [record for _, _, record in stored(door)] == ['{"n":1}', '{"n":2}']


def test_the_content_type_may_name_a_charset(door: Collector) -> None:
    assert ask(door, headers={"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    assert len(stored(door)) == 1


def test_the_path_is_the_tag(door: Collector) -> None:
    for path in "/rabbitmq", "/a/b/c", "/../../x":
        assert ask(door, path=path).status == 200
    assert [tag for _, tag, _ in stored(door)] == ["a.b.c", "......x", "rabbitmq"]


@pytest.mark.parametrize("as_array", [False, True])
def test_what_is_no_object_is_a_400_and_stores_nothing(door: Collector, as_array: bool) -> None:
    bodies = [b'{"n":', b"", b"5", b"null", b'{"n":NaN}', b'{"n":-Infinity}', b'{"n":"\xff"}', b"x"]
    bodies += [
        b"[1]",
        b"[]",
        b'{"n":1}{"n":2}',
        b"[" * 50_000,
        b'{"n":' * 5000 + b"1" + b"}" * 5000,
    ]
    if as_array:
        bodies = [b'[{"n":1},' + body + b"]" for body in bodies if body != b'{"n":1}{"n":2}']
    assert [(body[:20], ask(door, body).status) for body in bodies] == [
        (body[:20], 400) for body in bodies
    ]
    assert stored(door) == []
    assert len(door.said("answered 400")) == len(bodies)


def test_a_body_of_too_many_values_is_a_413_in_bounded_memory(door: Collector) -> None:
    assert ask(door, b"[" + b"{}," * 300_000 + b"{}]").status == 413
    assert stored(door) == []
    assert door.rss() < 60


def test_only_post_is_known(door: Collector) -> None:
    for method in "GET", "HEAD", "PUT", "DELETE":
        answer = ask(door, method=method)
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert stored(door) == []


def test_a_path_without_a_tag_is_a_404(door: Collector) -> None:
    assert ask(door, path="/").status == 404
    assert ask(door, path="*").status == 404
    assert stored(door) == []


def test_another_or_a_compressed_content_is_a_415(door: Collector) -> None:
    for headers in {"Content-Type": "text/plain"}, {}, {**JSON, "Content-Encoding": "gzip"}:
        assert ask(door, headers=headers).status == 415
    assert stored(door) == []


def test_a_body_without_a_length_is_a_411(door: Collector) -> None:
    with dial(door) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert statuses(everything(connection)) == [411]


def test_a_body_that_announces_too_much_is_a_413_at_once(door: Collector) -> None:
    with dial(door) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1))
        assert statuses(everything(connection)) == [413]


def test_a_body_without_end_is_a_413_in_bounded_memory(door: Collector) -> None:
    with dial(door) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(piece)
        assert statuses(everything(connection)) == [413]
    assert stored(door) == []
    assert door.rss() < 80


def test_a_chunked_body_within_the_limit_is_taken(door: Collector) -> None:
    with dial(door) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b'3\r\n{"n\r\n4\r\n":1}\r\n0\r\n\r\n')
        assert statuses(everything(connection)) == [200]
    assert [record for _, _, record in stored(door)] == ['{"n":1}']


def test_unfinished_bodies_of_all_clients_are_bounded(door: Collector) -> None:
    connections = [dial(door) for _ in range(30)]
    for connection in connections:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % LIMIT)
        with contextlib.suppress(ConnectionError):
            connection.sendall(b" " * 1_000_000)
    door.wait_for(lambda: len(door.said("unfinished messages of all clients")) == 14)
    assert door.said("answered") == []
    for connection in connections:
        connection.close()
    assert door.rss() < 100
    assert ask(door).status == 200


def test_a_connection_is_kept_for_the_next_request(door: Collector) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.http_port, timeout=10)
    connection.connect()
    kept = connection.sock
    answers = []
    for body in b'{"n":1}', b"[", b'{"n":2}':
        connection.request("POST", "/alerts", body, JSON)
        answer = connection.getresponse()
        answer.read()
        answers.append(answer.status)
    assert answers == [200, 400, 200]
    assert connection.sock is kept
    connection.close()
    assert [record for _, _, record in stored(door)] == ['{"n":1}', '{"n":2}']


def test_pipelined_requests_are_answered_in_turn(door: Collector) -> None:
    one = HEAD + b'Content-Length: 7\r\n\r\n{"n":1}'
    wrong = HEAD + b"Content-Length: 1\r\n\r\n5"
    last = HEAD + b'Connection: close\r\nContent-Length: 7\r\n\r\n{"n":2}'
    with dial(door) as connection:
        connection.sendall(one + wrong + last)
        assert statuses(everything(connection)) == [200, 400, 200]
    assert [record for _, _, record in stored(door)] == ['{"n":1}', '{"n":2}']


def test_a_client_that_expects_100_continue_gets_it(door: Collector) -> None:
    head = HEAD + b"Expect: 100-continue\r\nConnection: close\r\n"
    with dial(door) as connection:
        connection.sendall(head + b"Content-Length: 7\r\n\r\n")
        assert statuses(connection.recv(4096)) == [100]
        connection.sendall(b'{"n":1}')
        assert statuses(everything(connection)) == [200]
    with dial(door) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1))
        assert statuses(everything(connection)) == [413]


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b'{"n":1}\r\n\r\n',
        b"\x93" * 100_000,
    ],
)
def test_what_is_no_http_is_one_line_and_a_closed_connection(door: Collector, data: bytes) -> None:
    with dial(door) as connection:
        connection.sendall(data)
        assert statuses(everything(connection))[:1] in ([400], [431], [])
    assert len(door.said(r"127\.0\.0\.1:\d+ \(HTTP\)")) == 1
    assert door.said("Traceback|exception") == []
    assert ask(door).status == 200


@pytest.mark.parametrize("data", [HEAD, HEAD + b'Content-Length: 99\r\n\r\n{"n":1}'])
def test_a_client_that_leaves_in_the_middle_stores_nothing(door: Collector, data: bytes) -> None:
    with dial(door) as connection:
        connection.sendall(data)
    door.wait_for(lambda: door.said(r"\(HTTP\)"))
    assert stored(door) == []
    assert ask(door).status == 200
    assert len(door.said(r"127\.0\.0\.1:\d+ \(HTTP\)")) == 1
    assert door.said("Traceback|exception") == []


def test_a_full_store_is_a_503_that_says_when_to_come_again(door: Collector) -> None:
    door.end()
    door.change("total_limit_size 64m", "total_limit_size 100k")
    door.start()
    body = json.dumps({"x": "y" * 60_000}).encode()
    assert ask(door, body).status == 200
    answer = ask(door, body)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert len(door.said("events for .* are refused")) == 1
    assert ask(door).status == 200


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", 0), (HEAD, 1), (HEAD + b"Content-Length: 99\r\n\r\n{", 1), (b"\x93\xa8rabbit", 1)],
)
def test_a_slow_client_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], data: bytes, said: int
) -> None:
    monkeypatch.setattr("collector.http_input._PATIENCE", 0.1)
    door = HttpInput(Router([StdoutMatch(Pattern("**"))]), Limits(LIMIT), LIMIT)

    async def talk() -> bytes:
        async with (
            asyncio.timeout(10),
            await asyncio.start_server(door.serve, "127.0.0.1") as server,
        ):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(data)
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

    assert asyncio.run(talk()) == b""
    assert capfd.readouterr().out.count("did not end within 0.1 s") == said
