"""What the monitor promises: Fluentd's numbers of the outputs, over a socket."""

from __future__ import annotations

import http.client
import json
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Collector

PATH = "/api/plugins.json"
NOW = {"chunk": "c"}
LINE = len('2026-11-25T00:00:00.000+00:00\trabbitmq\t{"n":1}\n')


@pytest.fixture
def door(stopped: Collector) -> Collector:
    """A collector that flushes when it is told to."""
    stopped.change("flush_interval 0.3s", "flush_interval 60s")
    stopped.start()
    return stopped


def ask(
    door: Collector, path: str = PATH, method: str = "GET", body: bytes | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request on a connection of its own; return the answer and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", door.monitor_port, timeout=10)
    connection.request(method, path, body)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer, found


def plugins(door: Collector) -> dict[str, Any]:
    """Return the outputs by id."""
    answer, body = ask(door)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return {one["plugin_id"]: one for one in json.loads(body)["plugins"]}


def output(name: str, **numbers: float) -> dict[str, Any]:
    """Return what is told of an idle output, but for numbers."""
    return {
        "plugin_id": name,
        "plugin_category": "output",
        "type": "file",
        "output_plugin": True,
        "retry_count": 0,
        "emit_records": 0,
        "write_count": 0,
        "buffer_stage_length": 0,
        "buffer_stage_byte_size": 0,
        "buffer_queue_length": 0,
        "buffer_queue_byte_size": 0,
        "buffer_total_queued_size": 0,
        "buffer_available_buffer_space_ratios": 100.0,
    } | numbers


def test_each_output_with_a_buffer_is_told_by_its_id(door: Collector) -> None:
    assert plugins(door) == {"files": output("files"), "other": output("other")}


def test_an_output_without_an_id_has_a_name_of_its_own_like_fluentds(door: Collector) -> None:
    door.end()
    door.change("  @id files\n", "")
    door.change("  @id other\n", "")
    door.start()
    names = plugins(door).keys()
    assert len(names) == 2
    assert all(name.startswith("object:") for name in names)
    assert plugins(door).keys() == names


def test_what_was_taken_is_told_and_told_again_once_it_is_written(door: Collector) -> None:
    for _ in range(3):
        door.send("rabbitmq", 0, {"n": 1}, NOW)
    door.send("alerts", 0, {"n": 1}, NOW)
    size = 4 * LINE - len("rabbitmq") + len("alerts")
    staged = {"buffer_stage_length": 2, "buffer_stage_byte_size": size}
    assert plugins(door) == {
        "files": output("files", emit_records=4, buffer_total_queued_size=size, **staged),
        "other": output("other"),
    }
    door.signal(signal.SIGUSR1)
    written = output("files", emit_records=4, write_count=2)
    door.wait_for(lambda: plugins(door)["files"] == written)


def test_a_file_that_cannot_be_written_shows_in_tries_errors_and_a_queue(door: Collector) -> None:
    target = door.file("rabbitmq")
    target.mkdir()
    door.send("rabbitmq", 0, {"n": 1}, NOW)
    for tries in 1, 2:
        door.signal(signal.SIGUSR1)
        # More, when the clock brought a try of its own.
        door.wait_for(lambda least=tries: plugins(door)["files"]["retry_count"] >= least)
    found = plugins(door)["files"]
    assert found == output(
        "files",
        emit_records=1,
        retry_count=found["retry_count"],
        write_count=found["retry_count"],
        buffer_queue_length=1,
        buffer_queue_byte_size=LINE,
        buffer_total_queued_size=LINE,
    )
    target.rmdir()
    door.signal(signal.SIGUSR1)
    door.wait_for(lambda: not plugins(door)["files"]["buffer_queue_length"])
    found = plugins(door)["files"]
    # The errors stay: they are since the start.
    errors, tries = found["retry_count"], found["write_count"]
    assert tries == errors + 1 > 2
    assert found == output("files", emit_records=1, retry_count=errors, write_count=tries)


def test_what_is_refused_counts_as_an_error_and_the_space_left_is_told(door: Collector) -> None:
    door.end()
    door.change("total_limit_size 64m", "total_limit_size 1k")
    door.start()
    door.send("unknown", 0, {"x": "y" * 700}, NOW)
    found = plugins(door)["other"]
    size = found["buffer_total_queued_size"]
    assert 700 < size < 800
    assert found["buffer_available_buffer_space_ratios"] == round(100 - 100 * size / 1024, 1)
    assert door.send("unknown", 0, {"x": "y" * 700}, NOW) is None
    assert plugins(door)["other"] == found | {"retry_count": 1}


def test_chunks_that_an_earlier_run_left_are_told(door: Collector) -> None:
    door.send("rabbitmq", 0, {"n": 1}, NOW)
    door.kill()
    door.file("rabbitmq").mkdir()
    door.start()
    door.wait_for(lambda: plugins(door)["files"]["retry_count"])
    found = plugins(door)["files"]
    assert (found["emit_records"], found["buffer_queue_length"]) == (0, 1)
    assert found["buffer_total_queued_size"] == LINE


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/plugins", 404),
        ("GET", "/api/config.json", 404),
        ("POST", "/alerts", 404),
        ("POST", PATH, 405),
        ("DELETE", PATH, 405),
        ("HEAD", PATH, 405),
        ("GET", f"{PATH}?debug=1", 400),
    ],
)
def test_nothing_else_is_known(door: Collector, method: str, path: str, status: int) -> None:
    answer, _ = ask(door, path, method)
    assert answer.status == status
    assert answer.headers["Allow"] == ("GET" if status == 405 else None)
    assert door.said("Traceback|exception") == []
    assert plugins(door)["files"] == output("files")


def test_a_question_with_a_body_is_a_413(door: Collector) -> None:
    assert ask(door, body=b"x")[0].status == 413


def test_questions_without_end_are_answered_in_bounded_memory(door: Collector) -> None:
    one = f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", door.monitor_port), timeout=10) as connection:
        connection.sendall(one * 200)
        data = b""
        while data.count(b"HTTP/1.1 200") < 200 or not data.endswith(b"]}"):
            piece = connection.recv(65536)
            assert piece
            data += piece
    assert door.rss() < 60
