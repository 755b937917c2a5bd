"""The doors' whole interface on the running stack: what is refused, and what goes through."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import PROJECT, Answer, Stack, eventually

# Sends requests byte by byte as they are told and prints what came back. A part is a text, a list
# of parts, or a part and how often it comes; after null nothing more is sent.
ASK = """
import json, re, socket, sys
def build(part):
    if isinstance(part, str):
        return part.encode("latin-1")
    if len(part) == 2 and isinstance(part[1], int):
        return build(part[0]) * part[1]
    return b"".join(build(one) for one in part if one is not None)
def ask(port, parts):
    answer, whole = b"", False
    last = "Connection: close" in str(parts)
    with socket.create_connection(("127.0.0.1", port), 10) as door:
        try:
            door.sendall(build(parts))
            if parts[-1] is None:
                door.shutdown(socket.SHUT_WR)
        except OSError:
            pass # it may have answered before it read all
        try:
            while (last or not whole) and (piece := door.recv(65536)):
                answer += piece
                head, end, body = answer.partition(b"\\r\\n\\r\\n")
                length = re.search(rb"(?i)\\ncontent-length: ([0-9]+)", head)
                whole = end and len(body) >= int(length[1] if length else 0)
        except OSError:
            if last:
                return "" # it was to be closed
    return answer.decode("latin-1")
print(json.dumps([ask(port, parts) for port, parts in json.loads(sys.argv[1])]))
"""

# Holds many clients that send too slowly, and prints how others fare meanwhile.
SLOW = """
import http.client, json, socket, sys, time
port, count, slow_path, method, path = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
slow = []
for number in range(count):
    door = socket.create_connection(("127.0.0.1", port), 10)
    head = f"POST {slow_path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 100\\r\\n\\r\\nx"
    # Every fourth has not even sent its headers.
    door.sendall(head.encode()[: -5 if number % 4 == 0 else None])
    slow.append(door)
fared = []
for number in range(20):
    start = time.monotonic()
    door = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    door.request(method, path, "x" if method == "POST" else None)
    fared.append([door.getresponse().status, time.monotonic() - start])
    door.close()
for door in slow:
    door.close()
print(json.dumps(fared))
"""

# Waits for a message, sends it a second later, and prints how long it then took to come.
WAKE = """
import http.client, json, sys, threading, time
publisher, subscriber = map(int, sys.argv[1:])
came = []
def wait():
    door = http.client.HTTPConnection("127.0.0.1", subscriber, timeout=30)
    door.request("GET", "/receive?wait=20")
    came.extend([door.getresponse().read().decode(), time.monotonic()])
waiting = threading.Thread(target=wait)
waiting.start()
time.sleep(1)
early, sent = list(came), time.monotonic()
door = http.client.HTTPConnection("127.0.0.1", publisher, timeout=10)
door.request("POST", "/messages", "awake")
assert door.getresponse().status == 201
waiting.join()
print(json.dumps([early, came[0], came[1] - sent]))
"""

Part = str | Sequence[Any]

DOORS = ["publisher", "subscriber"]
FORM = "Content-Type: application/x-www-form-urlencoded"
MULTIPART = "Content-Type: multipart/form-data; boundary=x"
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
MANUAL = "/receive?ack=manual"
AS_JSON = "Accept: application/json"
MEGABYTE = ["x", 1_000_000]


def size(part: Part) -> int:
    if isinstance(part, str):
        return len(part)
    if len(part) == 2 and isinstance(part[1], int):
        return size(part[0]) * part[1]
    return sum(map(size, part))


def request(method: str, target: str, *headers: str, body: Part = "") -> list[Any]:
    """Return the parts of a request, with its length unless the headers tell how it ends."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
    if not any(line.startswith(("Content-Length:", "Transfer-Encoding:")) for line in lines):
        lines.append(f"Content-Length: {size(body)}")
    return ["".join(f"{line}\r\n" for line in [*lines, ""]), body]


def get(target: str, *headers: str) -> list[Any]:
    return request("GET", target, *headers)


def form(body: Part) -> list[Any]:
    return request("POST", "/data", FORM, body=body)


def text(body: Part) -> list[Any]:
    return request("POST", "/data", JSON, body=body)


def multipart(body: Part) -> list[Any]:
    head = '--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n'
    return request("POST", "/data", MULTIPART, body=[head, body, "\r\n--x--\r\n"])


def message(*headers: str, body: Part = "") -> list[Any]:
    return request("POST", "/messages", *headers, body=body)


def batch(body: Part) -> list[Any]:
    return request("POST", "/batch", body=body)


def settle(path: str, **fields: object) -> list[Any]:
    return request("POST", path, JSON, body=json.dumps(fields))


def ack(body: Part) -> list[Any]:
    return request("POST", "/ack", JSON, body=body)


# What a door is asked, and with which status it answers.
CASES: dict[str, list[tuple[str, list[Any], int]]] = {
    "publisher": [
        ("10 MB as a form", form(["message=", [MEGABYTE, 10]]), 413),
        ("10 MB as a multipart form", multipart([MEGABYTE, 10]), 413),
        ("10 MB as JSON", text(['{"message": "', [MEGABYTE, 10], '"}']), 413),
        ("10 MB of bytes", message(body=[MEGABYTE, 10]), 413),
        ("10 MB in chunks", message(CHUNKED, body=[["f4240\r\n", MEGABYTE, "\r\n"], 10]), 413),
        ("10 MB in one line", batch(['"', [MEGABYTE, 10], '"']), 400),
        ("10 MB in ten lines", batch([['"', MEGABYTE, '"\n'], 10]), 201),
        ("20 MB in lines", batch([['"', MEGABYTE, '"\n'], 20]), 413),
        ("10,000 lines", batch(['"x"\n', 10_000]), 201),
        ("10,001 lines", batch(['"x"\n', 10_001]), 413),
        ("no line", batch(""), 400),
        ("an empty line", batch('"x"\n\n"y"\n'), 400),
        ("a bad line behind good ones", batch([['"x"\n', 1000], "x"]), 400),
        ("101 fields", form(["a=1&", 101]), 400),
        ("NUL in a form", form("message=%00"), 201),
        ("NUL as bytes", message(body="\0"), 201),
        ("NUL in JSON, bare", text('{"message": "\0"}'), 400),
        ("NUL in JSON, escaped", text('{"message": "\\u0000"}'), 201),
        ("NUL in a line", batch('"\0"'), 400),
        ("no UTF-8 in a form", form("message=\xff"), 400),
        ("no UTF-8 in a form, escaped", form("message=%ff"), 400),
        ("no UTF-8 in a multipart form", multipart("\xff"), 400),
        ("no UTF-8 in JSON", text('{"message": "\xff"}'), 400),
        ("half a surrogate in JSON", text('{"message": "\\ud800"}'), 400),
        ("no UTF-8 in a line", batch('"\xff"'), 400),
        ("no UTF-8 as bytes", message(body="\xff"), 201),
        ("no UTF-8 in a header", message("X-A: \xff"), 201),
        ("no ASCII in the id", message("Message-Id: \xe4"), 400),
        ("no ASCII in the type", message("Content-Type: \xe4"), 400),
        ("a long id", message("Message-Id: " + "x" * 256), 400),
        ("a long name", message(f"X-{'x' * 254}: x"), 400),
        ("half a JSON", text('{"message": '), 400),
        ("no JSON", text(""), 400),
        ("a list", text('["message"]'), 400),
        ("deep JSON", text(["[", 100_000]), 413),
        ("a long number", text(["1", 10_000]), 400),
        ("a number for a text", text('{"message": 1}'), 400),
        ("a line that is a number", batch("1"), 400),
        ("a line with another name", batch('{"message": "x", "more": 1}'), 400),
        ("a line with a bad id", batch('{"message": "x", "id": 1}'), 400),
        ("another type", request("POST", "/data", "Content-Type: text/csv", body="x"), 415),
        ("no type", request("POST", "/data", body="message=x"), 415),
        *[
            (f"{method} {path}", request(method, path), 405)
            for method, path in [
                ("GET", "/data"),
                ("PUT", "/messages"),
                ("DELETE", "/batch"),
                ("POST", "/"),
                ("FOO", "/healthz"),
            ]
        ],
    ],
    "subscriber": [
        ("10 MB of receipts", ack(['{"receipt": "', [MEGABYTE, 10], '"}']), 413),
        ("10 MB for no reason", request("GET", "/healthz", body=[MEGABYTE, 10]), 200),
        ("NUL in receipts", ack('{"receipt": "\0"}'), 400),
        ("no UTF-8 in receipts", ack('{"receipt": "\xff"}'), 400),
        ("half a surrogate in receipts", ack('{"receipt": "\\ud800"}'), 410),
        ("half a JSON", ack('{"receipt": '), 400),
        ("deep JSON", ack(["[", 100_000]), 400),
        ("a list of receipts", ack('["x"]'), 400),
        ("no receipts", ack("{}"), 400),
        ("a number for a receipt", ack('{"receipt": 1}'), 400),
        ("a number among receipts", ack('{"receipts": ["x", 1]}'), 400),
        ("another name", settle("/extend", receipt="x", seconds=5), 400),
        ("requeue that is a word", settle("/reject", receipt="x", requeue="no"), 400),
        ("an unknown receipt", settle("/reject", receipt="x"), 410),
        ("thousands of receipts", ack(['{"receipts": ["x"', [', "x"', 10_000], "]}"]), 410),
        *[
            (target, request(target.split()[0], target.split()[1]), 400)
            for target in [
                "GET /receive?wait=-1",
                "GET /receive?wait=21",
                "GET /receive?wait=0.5",
                "GET /receive?wait=nan",
                "GET /receive?wait=",
                "GET /receive?wait=%00",
                "GET /receive?wait=%ff",
                "GET /receive?max=0",
                "GET /receive?max=10001",
                "GET /receive?max=%D9%A3",
                f"GET /receive?max={'9' * 5000}",
                "GET /receive?ack=perhaps",
                "GET /dead?max=-1",
                "POST /dead/redrive?max=all",
            ]
        ],
        *[
            (f"{method} {path}", request(method, path), 405)
            for method, path in [
                ("POST", "/receive"),
                ("GET", "/ack"),
                ("PUT", "/reject"),
                ("DELETE", "/dead"),
                ("GET", "/dead/redrive"),
            ]
        ],
    ],
}
# What both are asked.
for own in CASES.values():
    own += [
        ("1 MB of headers", ["GET / HTTP/1.1\r\n", [["X-A: ", ["x", 990], "\r\n"], 1000]], 431),
        ("1 MB in a header", ["GET / HTTP/1.1\r\nX-A: ", MEGABYTE, "\r\n\r\n"], 431),
        ("the last request of a connection", get("/healthz", "Connection: close"), 200),
        ("101 headers", get("/", *["X-A: x"] * 101), 431),
        ("1 MB in the request line", ["GET /", MEGABYTE, " HTTP/1.1\r\n\r\n"], 414),
        ("NUL in a header", get("/", "X-A: x\0y"), 400),
        ("NUL in the path", get("/\0"), 400),
        ("no UTF-8 in the path", get("/%ff"), 404),
        ("an unknown path", get("/nowhere"), 404),
        ("a way out", get("/../../etc/passwd"), 404),
        ("no HTTP", ["\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n"], 400),
        ("an unknown version", ["GET / HTTP/9.9\r\n\r\n"], 400),
        ("a header without a colon", get("/", "X-A"), 400),
        ("a name for a length", get("/", "Content-Length: x"), 400),
        ("a negative length", get("/", "Content-Length: -1"), 400),
        ("two lengths", get("/", "Content-Length: 1", "Content-Length: 2"), 400),
        ("a length of chunks", get("/", "Content-Length: 1", CHUNKED), 400),
    ]
    path = "/messages" if own is CASES["publisher"] else "/ack"
    own += [
        ("a huge length", request("POST", path, "Content-Length: 99999999999999999999"), 413),
        ("a body that ends early", [*request("POST", path, "Content-Length: 9"), "x", None], 400),
        ("chunks that are none", request("POST", path, CHUNKED, body="x\r\n"), 400),
        ("chunks that end early", [*request("POST", path, CHUNKED, body="9\r\nx"), None], 400),
    ]


def ask(stack: Stack, door: str, *requests: list[Any]) -> list[Answer]:
    """Return a door's answers to requests, each on a connection of its own."""
    port = stack.vars[f"apps_{door}_port"]
    said: list[str] = stack.python(ASK, json.dumps([(port, parts) for parts in requests]))
    answers = []
    for one in said:
        head, _, body = one.partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        answers.append(
            Answer(int(first.split()[1]) if first else 0, headers, body.encode("latin-1"))
        )
    return answers


def send(stack: Stack, *bodies: str) -> None:
    sent = ask(stack, "publisher", *[message(body=body) for body in bodies])
    assert [one.status for one in sent] == [201] * len(bodies)


def receive(stack: Stack, target: str = "/receive?wait=5") -> Any:
    """Return the next message of target, told as JSON."""
    (answer,) = ask(stack, "subscriber", get(target, AS_JSON))
    assert answer.status == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json


def lines(answer: Answer) -> list[Any]:
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.body.splitlines()]


def failures(stack: Stack) -> dict[str, dict[str, str]]:
    """Return how many answers of each door were a 5xx, by route and status."""
    counted = r'^http_requests_total\{(route="[^"]*",status="5..")\} (\S+)$'
    answers = {door: stack.http(f"apps_{door}_port", "/metrics") for door in DOORS}
    return {
        door: dict(re.findall(counted, answer.text, re.MULTILINE))
        for door, answer in answers.items()
    }


def starts(stack: Stack) -> str:
    """Return since when each container runs, and how often it was restarted."""
    told = "{{.Name}} {{.State.StartedAt}} {{.RestartCount}}"
    return stack.run("docker inspect --format %s $(docker ps --all --quiet)", told)


@pytest.fixture(scope="module", autouse=True)
def before(stack: Stack) -> tuple[str, dict[str, dict[str, str]]]:
    """How the stack was before any of this."""
    stack.wait_until_ready()
    return starts(stack), failures(stack)


@pytest.fixture(scope="module")
def answers(stack: Stack) -> dict[str, dict[str, Answer]]:
    """How each of CASES was answered; what was taken is gone before it is a backlog."""
    answered = {}
    for door, cases in CASES.items():
        said = ask(stack, door, *[parts for _, parts, _ in cases])
        answered[door] = dict(zip([name for name, _, _ in cases], said, strict=True))
    contents = f"/queues/%2F/{stack.vars['stack_queue']}/contents"
    assert stack.api(contents, "admin", "--request", "DELETE").status == 204
    return answered


@pytest.mark.parametrize(
    ("door", "name", "status"),
    [(door, name, status) for door, cases in CASES.items() for name, _, status in cases],
)
def test_an_absurd_request_is_answered_clearly(
    answers: dict[str, dict[str, Answer]], door: str, name: str, status: int
) -> None:
    answer = answers[door][name]
    assert answer.status == status, answer.text[:200]
    if status >= 400:
        assert answer.headers["content-type"] == "application/json"
        assert re.search(r"\w", answer.json["message"])


@pytest.mark.parametrize(
    ("door", "slow_path", "method", "path", "status"),
    [
        ("publisher", "/messages", "POST", "/messages", 201),
        ("publisher", "/batch", "POST", "/messages", 201),
        ("subscriber", "/ack", "GET", "/receive", 200),
    ],
)
def test_nobody_waits_for_200_slow_clients(
    stack: Stack, door: str, slow_path: str, method: str, path: str, status: int
) -> None:
    port = str(stack.vars[f"apps_{door}_port"])
    fared = stack.python(SLOW, port, "200", slow_path, method, path)
    assert {one for one, _ in fared} == {status}
    assert max(seconds for _, seconds in fared) < 1


@pytest.mark.usefixtures("empty_queue")
def test_bytes_and_headers_come_back_as_they_were_sent(stack: Stack) -> None:
    body = "\0\xff\r\n"
    headers = ["Content-Type: image/png", "Message-Id: my-id", "X-Colour: blue", "X-Request-Id: r"]
    (sent,) = ask(stack, "publisher", message(*headers, body=body))
    assert (sent.status, sent.json, sent.headers["message-id"]) == (201, {"id": "my-id"}, "my-id")
    received = receive(stack)
    assert received == {
        "id": "my-id",
        "body": b64encode(body.encode("latin-1")).decode(),
        "encoding": "base64",
        "content_type": "image/png",
        "headers": {"X-Colour": "blue", "X-Request-Id": "r"},
        "redelivered": False,
    }


@pytest.mark.usefixtures("empty_queue")
def test_a_batch_of_a_thousand_comes_in_its_order(stack: Stack) -> None:
    texts = [f"message {number}" for number in range(1000)]
    (sent,) = ask(stack, "publisher", batch("\n".join(map(json.dumps, texts))))
    assert (sent.status, sent.json) == (201, {"sent": 1000})
    many, none = ask(stack, "subscriber", *[get("/receive?max=1000")] * 2)
    assert [one["body"] for one in lines(many)] == texts
    assert none.status == 204


@pytest.mark.usefixtures("empty_queue")
def test_a_receipt_can_be_used_once(stack: Stack) -> None:
    send(stack, "one", "two")
    receipt = receive(stack, MANUAL)["receipt"]
    (as_text,) = ask(stack, "subscriber", get(MANUAL))
    assert as_text.text == "two\n"
    both = [receipt, as_text.headers["x-receipt"]]
    extended, first, again, empty = ask(
        stack,
        "subscriber",
        settle("/extend", receipts=both),
        settle("/ack", receipts=both),
        settle("/ack", receipt=receipt),
        get("/receive", AS_JSON),
    )
    assert (extended.status, extended.json) == (200, {"extended": 2})
    assert (first.status, first.json) == (200, {"acknowledged": 2})
    assert (again.status, again.json["gone"]) == (410, [receipt])
    assert empty.status == 204


@pytest.mark.usefixtures("empty_queue")
def test_a_rejected_message_comes_again(stack: Stack) -> None:
    send(stack, "again")
    receipt = receive(stack, MANUAL)["receipt"]
    (rejected,) = ask(stack, "subscriber", settle("/reject", receipt=receipt))
    assert (rejected.status, rejected.json) == (200, {"rejected": 1})
    received = receive(stack)
    assert (received["body"], received["redelivered"]) == ("again", True)


@pytest.mark.usefixtures("empty_queue")
def test_a_given_up_message_can_be_looked_at_and_sent_back(stack: Stack) -> None:
    send(stack, "dead")
    receipt = receive(stack, MANUAL)["receipt"]
    ask(stack, "subscriber", settle("/reject", receipt=receipt, requeue=False))

    def look(times: int) -> list[Answer]:
        return ask(stack, "subscriber", *[get("/dead?max=10")] * times)

    eventually(lambda: look(1)[0].status == 200, 5, "the message is dead")
    # A look uses nothing up, so the second one sees the same.
    assert [[one["body"] for one in lines(seen)] for seen in look(2)] == [["dead"]] * 2
    (redriven,) = ask(stack, "subscriber", request("POST", "/dead/redrive"))
    assert (redriven.status, redriven.json) == (200, {"redriven": 1})
    assert receive(stack)["body"] == "dead"
    assert look(1)[0].status == 204


@pytest.mark.usefixtures("empty_queue")
def test_who_waits_is_woken_by_a_message(stack: Stack) -> None:
    ports = [str(stack.vars[f"apps_{door}_port"]) for door in DOORS]
    early, body, seconds = stack.python(WAKE, *ports)
    assert (early, body) == ([], "awake\n")
    assert seconds < 1


@pytest.mark.parametrize("door", DOORS)
def test_a_door_describes_itself(stack: Stack, door: str) -> None:
    answer = stack.http(f"apps_{door}_port", "/openapi.json")
    assert answer.status == 200
    assert answer.json == json.loads((PROJECT / f"apps/{door}/{door}/openapi.json").read_text())


def test_all_of_this_was_no_failure_and_restarted_nothing(
    stack: Stack, before: tuple[str, dict[str, dict[str, str]]]
) -> None:
    assert (starts(stack), failures(stack)) == before
