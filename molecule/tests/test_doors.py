"""The two HTTP doors, as their users meet them."""

import json
import re

import pytest
from conftest import PROJECT, Stack
from readme import follow, walkthrough

# Sends and receives over one connection each, as a program would, and prints what came back.
IN_AND_OUT = """
import http.client, json, sys, urllib.parse
publisher, subscriber, count = map(int, sys.argv[1:])
door = http.client.HTTPConnection("127.0.0.1", publisher, timeout=20)
for number in range(count):
    body = urllib.parse.urlencode({"message": f"message {number}"})
    door.request("POST", "/data", body, {"Content-Type": "application/x-www-form-urlencoded"})
    answer = door.getresponse()
    answer.read()
    assert answer.status == 201, answer.status
received = []
while not received or received[-1] != "No message available":
    # A new client every hundred messages.
    if len(received) % 100 == 0:
        door = http.client.HTTPConnection("127.0.0.1", subscriber, timeout=20)
    door.request("GET", "/receive")
    received.append(door.getresponse().read().decode().removesuffix("\\n"))
print(json.dumps(received[:-1]))
"""

pytestmark = pytest.mark.usefixtures("empty_queue")


def test_the_readmes_walk_through_passes(stack: Stack) -> None:
    commands = [
        step
        for step in walkthrough((PROJECT / "README.md").read_text())
        if not step[0].startswith("make")
    ]
    assert len(commands) >= 3
    for command, expected in commands:
        follow(command, expected, lambda said: str(stack.host.run(said).stdout))


@pytest.mark.parametrize(
    ("port", "route"), [("apps_publisher_port", "/data"), ("apps_subscriber_port", "/receive")]
)
def test_the_welcome_names_the_route(stack: Stack, port: str, route: str) -> None:
    answer = stack.http(port, "/")
    assert answer.status == 200
    assert route in answer.text


@pytest.mark.parametrize(
    "text", ["", "hello", "two\nlines\r\n", "a&b=c+d%", "\u00fc \U0001f430", "{'Hello-1':'hi'}"]
)
def test_a_text_goes_through_unchanged(stack: Stack, text: str) -> None:
    sent = stack.send(text)
    assert (sent.status, sent.json) == (201, {"Message sent": text})
    assert stack.receive().text == text + "\n"


def test_json_goes_through_unchanged_nul_included(stack: Stack) -> None:
    body = json.dumps({"message": "a\0b\U0001f430"})
    sent = stack.http("apps_publisher_port", "/data", "--json", body)
    assert (sent.status, sent.json) == (201, {"Message sent": "a\0b\U0001f430"})
    assert stack.receive().text == "a\0b\U0001f430\n"


@pytest.mark.parametrize(
    ("curl", "status", "words"),
    [
        (["--data", "text=hello"], 400, "^Payload is missing parameter 'message'.$"),
        (["--json", "{}"], 400, "^Payload is missing parameter 'message'.$"),
        (["--json", "{"], 400, "JSON"),
        (["--data", "message=%ff"], 400, "UTF-8"),
        (["--header", "Content-Type: text/csv", "--data", "a,b"], 415, "application/json"),
        (["--request", "PUT"], 405, ""),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(
    stack: Stack, curl: list[str], status: int, words: str
) -> None:
    answer = stack.http("apps_publisher_port", "/data", *curl)
    assert answer.status == status
    assert re.search(words, answer.json["message"])
    assert stack.receive().text == "No message available\n"


def test_the_longest_message_passes_and_one_byte_more_is_413(stack: Stack) -> None:
    longest = stack.vars["apps_publisher_max_message_bytes"]
    for extra, status in (0, 201), (1, 413):
        stack.run(
            "printf message= > /tmp/long && head -c %s /dev/zero | tr '\\0' x >> /tmp/long",
            str(longest + extra),
        )
        answer = stack.http(
            "apps_publisher_port", "/data", "--header", "Expect:", "--data", "@/tmp/long"
        )
        assert answer.status == status
    assert len(stack.receive().body) == longest + 1


def test_head_takes_no_message(stack: Stack) -> None:
    stack.send("kept")
    assert stack.http("apps_subscriber_port", "/receive", "--head").status == 405
    assert stack.receive().text == "kept\n"


def test_a_received_message_is_not_cached(stack: Stack) -> None:
    assert stack.receive().headers["cache-control"] == "no-store"


def test_a_thousand_messages_come_back_in_order(stack: Stack) -> None:
    ports = [str(stack.vars[f"apps_{app}_port"]) for app in ("publisher", "subscriber")]
    received = stack.python(IN_AND_OUT, *ports, "1000")
    assert received == [f"message {number}" for number in range(1000)]


@pytest.mark.parametrize("port", ["apps_publisher_port", "apps_subscriber_port"])
def test_health_tells_of_the_broker(stack: Stack, port: str) -> None:
    assert stack.http(port, "/healthz").json["broker"] == "up"
    assert stack.http(port, "/healthz?ready").status == 200


def test_metrics_count_the_requests_of_all_workers(stack: Stack) -> None:
    def counted() -> float:
        text = stack.http("apps_publisher_port", "/metrics").text
        found = re.search(
            r'^http_requests_total\{route="/data",status="201"\} (\S+)$', text, re.MULTILINE
        )
        assert re.search(r"^broker_up 1\.0$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = counted()
    # Each curl is a connection of its own, so both workers get some of them.
    for number in range(20):
        assert stack.send(f"{number}").status == 201
    assert counted() - before == 20
