"""What the process promises: nothing acknowledged is lost, its memory has an end, it recovers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

if TYPE_CHECKING:
    from tests.conftest import Collector

ACK = {"chunk": "c"}
NEVER = "flush_interval 60s"


def record_of(line: str) -> Any:
    return json.loads(line.split("\t")[2])


def numbers(collector: Collector, name: str) -> list[Any]:
    return [record_of(line)["n"] for line in collector.lines(name)]


def never_by_itself(stopped: Collector) -> Collector:
    """Start a collector that flushes nothing by the clock."""
    stopped.change("flush_interval 0.3s", NEVER)
    stopped.start()
    return stopped


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def is_over(pid: int) -> bool:
    """Return whether the process has ended, reaped by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Sender(threading.Thread):
    """Sends numbered events in bursts, and notes which were acknowledged; reconnects."""

    def __init__(self, collector: Collector, tag: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[int] = []
        self._collector = collector
        self._tag = tag
        self._next = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError), self._collector.connect() as connection:
                while not self._ended.is_set() and self._burst(connection):
                    pass

    def _burst(self, connection: socket.socket) -> bool:
        """Send some events and read their acknowledgements; return whether all came."""
        sent = range(self._next, self._next + 20)
        self._next = sent.stop
        for number in sent:
            event = [self._tag, 0, {"n": number}, {"chunk": str(number)}]
            connection.sendall(msgpack.packb(event))
        unpacker = msgpack.Unpacker()
        count = 0
        while count < len(sent):
            data = connection.recv(65536)
            if not data:
                return False
            unpacker.feed(data)
            for answer in unpacker:
                self.acknowledged.append(int(answer["ack"]))
                count += 1
        return True

    def stop(self) -> None:
        self._ended.set()
        self.join()


# --- nothing acknowledged is lost ----------------------------------------------------------------


def test_nothing_acknowledged_is_lost_by_kill_9(stopped: Collector) -> None:
    stopped.change("flush_interval 0.3s", "flush_interval 0.01s")
    stopped.start()
    senders = [Sender(stopped, tag) for tag in ("rabbitmq", "alerts", "unknown")]
    for sender in senders:
        sender.start()
    try:
        for _ in range(6):
            had = sum(len(sender.acknowledged) for sender in senders)
            # A moment that nothing here chooses, not a time: a slow machine gets there too.
            more = random.randrange(1, 6000)
            stopped.wait_for(
                lambda enough=had + more: sum(len(one.acknowledged) for one in senders) >= enough
            )
            stopped.kill()
            stopped.start()
    finally:
        for sender in senders:
            sender.stop()
    assert stopped.end() == 0
    for sender, name in zip(senders, ("rabbitmq", "alerts", "other"), strict=True):
        whole = [line for line in stopped.lines(name) if line.endswith("}")]
        written = {record_of(line)["n"] for line in whole if line.count("\t") == 2}
        assert set(sender.acknowledged) - written == set()
        assert sender.acknowledged
    assert not list(stopped.folder.glob("*buffer*"))


def test_a_staged_chunk_of_a_killed_run_is_taken_up(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    assert collector.send("x", 0, {"n": 2}, ACK) == {"ack": "c"}
    collector.kill()
    assert collector.lines("rabbitmq") == []
    collector.start()
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1])
    collector.wait_for(lambda: numbers(collector, "other") == [2])
    assert len(collector.said("took up 1 chunks")) == 2
    collector.wait_for(lambda: not list(collector.folder.glob("buffer*")))


def test_sigterm_ends_with_0_and_leaves_everything_in_the_files(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    with collector.connect() as idle:
        idle.sendall(msgpack.packb(["rabbitmq", 0, {"n": 1}, ACK]))
        assert msgpack.unpackb(idle.recv(4096)) == {"ack": "c"}
        assert collector.send("x", 0, {"n": 2}, ACK) == {"ack": "c"}
        assert collector.end() == 0
        assert idle.recv(4096) == b""
    assert numbers(collector, "rabbitmq") == [1]
    assert numbers(collector, "other") == [2]
    collector.wait_for(lambda: not list(collector.folder.glob("buffer*")))


def test_sigterm_takes_what_is_on_its_way(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    with collector.connect() as sender:
        sender.sendall(msgpack.packb(["rabbitmq", 0, {"n": 0}, ACK]))
        sender.recv(4096)
        collector.signal(signal.SIGTERM)
        collector.wait_for(lambda: collector.said("stopping"))
        sender.sendall(msgpack.packb(["rabbitmq", 0, {"n": 1}, ACK]))
        assert msgpack.unpackb(sender.recv(4096)) == {"ack": "c"}
    assert collector.end() == 0
    assert numbers(collector, "rabbitmq") == [0, 1]


def test_sigusr1_flushes_now(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    collector.send("rabbitmq", 0, {"n": 1}, ACK)
    assert collector.lines("rabbitmq") == []
    collector.signal(signal.SIGUSR1)
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1])


# --- the start -----------------------------------------------------------------------------------


def test_a_dry_run_accepts_the_roles_file_and_does_nothing(stopped: Collector) -> None:
    stopped.folder.rmdir()
    # With its ports taken: it must not want them.
    with (
        socket.create_server(("127.0.0.1", stopped.port)),
        socket.create_server(("127.0.0.1", stopped.http_port)),
    ):
        assert stopped.run("--dry-run").wait(10) == 0
    assert not stopped.folder.exists()


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_what_is_not_known_ends_the_start_by_name(stopped: Collector, arguments: list[str]) -> None:
    stopped.folder.rmdir()
    stopped.change("append true", "append true\n  symlink_path /x")
    assert stopped.run(*arguments).wait(10) == 1
    (line,) = stopped.said(r"\[error\]")
    number = stopped.config.read_text().splitlines().index("  symlink_path /x") + 1
    assert f"line {number}:" in line
    assert "unknown parameter symlink_path" in line
    assert not stopped.folder.exists()


def test_a_second_one_leaves_the_first_ones_chunks_alone(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    before = names(collector.folder)
    assert collector.run().wait(10) == 1
    assert names(collector.folder) == before
    assert collector.end() == 0
    assert numbers(collector, "rabbitmq") == [1]


def test_a_log_that_nobody_reads_stops_nothing(stopped: Collector) -> None:
    reader, writer = os.pipe()
    with open(writer, "wb") as log:
        stopped.process = subprocess.Popen(stopped.command(), env=stopped.environment, stdout=log)
    stopped.wait_for(lambda: b"now running" in os.read(reader, 65536))
    for _ in range(900):
        with contextlib.suppress(ConnectionError), stopped.connect() as connection:
            connection.sendall(b"x")
    assert stopped.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    os.close(reader)


def test_a_port_that_is_taken_is_one_line_and_status_1(stopped: Collector) -> None:
    for port in stopped.port, stopped.http_port:
        with socket.create_server(("127.0.0.1", port)):
            assert stopped.run().wait(10) == 1
        (line,) = stopped.said(rf"\[error\].*{port}")
        assert "address already in use" in line
    assert stopped.said("Traceback") == []


# --- hostile clients -----------------------------------------------------------------------------


def test_1000_idle_connections_take_little_memory(collector: Collector) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(1000, soft - 200)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(collector.connect())
        assert collector.process
        files = Path(f"/proc/{collector.process.pid}/fd")
        collector.wait_for(lambda: len(list(files.iterdir())) > count)
        assert collector.send("rabbitmq", 0, {}, ACK) == {"ack": "c"}
        assert collector.rss() < 50
        assert collector.end() == 0


def test_a_length_of_1_gb_takes_no_memory(collector: Collector) -> None:
    before = collector.rss()
    lengths = [kind + b"\x40\0\0\0" for kind in (b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9")]
    # As the whole, the tag, the entries, and within a record.
    starts = [b"", b"\x93", b"\x92\xa1x", b"\x93\xa1x\x01\x81\xa1k"]
    connections = []
    for start in starts:
        for length in lengths:
            connection = collector.connect()
            connections.append(connection)
            with contextlib.suppress(ConnectionError):
                connection.sendall(start + length + b"\x01" * 100_000)
    assert collector.send("rabbitmq", 0, {}, ACK) == {"ack": "c"}
    for connection in connections:
        connection.close()
    # Each was closed with its line, or has left in the middle.
    collector.wait_for(lambda: len(collector.said("closed 127|left in the middle")) == 20)
    assert collector.rss() < before + 20


def test_many_partial_messages_have_one_bound(collector: Collector) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(collector.connect())
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"\x93\xa8rabbitmq\x01\x81\xa1x\xdb\x00\x0f\x00\x00")
                connection.sendall(b"y" * 900_000)
        collector.wait_for(lambda: len(collector.said("unfinished messages of all")) == 22)
        assert collector.rss() < 120
        assert collector.send("rabbitmq", 0, {}, ACK) == {"ack": "c"}


def test_random_bytes_end_nothing(collector: Collector) -> None:
    noise = random.Random(4)
    before = collector.rss()
    for _ in range(1000):
        with contextlib.suppress(ConnectionError), collector.connect() as connection:
            # Half of them begin as a message does.
            start = noise.choice([b"", b"\x93\xa8rabbitmq", b"\x92\xa1x\xdd", b"\x94"])
            connection.sendall(start + noise.randbytes(noise.randrange(1, 4000)))
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    assert collector.rss() < before + 20
    assert collector.said(r"\[error\]|Traceback") == []
    collector.wait_for(lambda: len(collector.said("closed 127|left in the middle")) > 900)


def test_hostile_tags_name_no_file_outside_the_folder(collector: Collector) -> None:
    outside = names(collector.folder.parent) - names(collector.folder)
    tags = ["../../x", "/tmp/x", "", "x" * 10_000, "\0", "a\nb", "rabbitmq\n", "rabbitmq\t{}", "."]
    for tag in tags:
        assert collector.send(tag, 0, {"n": 1}, ACK) == {"ack": "c"}
    assert collector.send("rabbitmq", 0, {"n": 2}, ACK) == {"ack": "c"}
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [2])
    collector.wait_for(lambda: numbers(collector, "other") == [1] * len(tags))
    today = collector.file("x").name.removeprefix("x.")
    assert names(collector.folder) == {f"rabbitmq.{today}", f"other.{today}"}
    inside = {f"log/{name}" for name in names(collector.folder)}
    assert names(collector.folder.parent) - inside == outside
    assert not list(Path("/tmp").glob("x*.log"))


# --- the exec input ------------------------------------------------------------------------------


def test_what_a_command_prints_comes_out_on_stdout(stopped: Collector) -> None:
    stopped.change("command true", "command echo one; echo two")
    stopped.start()
    for word in "one", "two":
        stopped.wait_for(
            lambda word=word: stopped.said(rf'fluent\.prune: \{{"message":"{word}"\}}$')
        )


def test_a_command_that_fails_is_one_line(stopped: Collector) -> None:
    runs = stopped.folder.parent / "runs"
    stopped.change(
        "command true", f"command echo x >> {runs}; echo first >&2; echo last >&2; exit 3"
    )
    stopped.start()
    stopped.wait_for(lambda: runs.exists() and len(runs.read_text()) >= 4)
    stopped.end()
    said = stopped.said(r"\[error\]")
    assert all("ended with status 3 and said: first\\u000alast" in line for line in said)
    assert 1 <= len(said) <= len(runs.read_text().split())


def hang(stopped: Collector) -> Path:
    """Let the command hang, with a child that holds its output; return the file of their pids."""
    pids = stopped.folder.parent / "pids"
    stopped.change(
        "command true", f"command echo $$ >> {pids}; sleep 600 & echo $! >> {pids}; wait"
    )
    return pids


def test_a_command_that_hangs_is_killed_with_its_children(stopped: Collector) -> None:
    pids = hang(stopped)
    stopped.start()
    stopped.wait_for(lambda: len(stopped.said("was killed: it took more than 0.2 s")) >= 2)
    for pid in pids.read_text().split()[:4]:
        stopped.wait_for(lambda pid=pid: is_over(int(pid)))
    # Whatever the command does, events are taken.
    assert stopped.send("rabbitmq", 0, {}, ACK) == {"ack": "c"}


def test_a_command_that_runs_is_killed_at_the_end(stopped: Collector) -> None:
    pids = hang(stopped)
    stopped.change("run_interval 0.2s", "run_interval 0.8s")
    stopped.start()
    stopped.wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    assert stopped.end() == 0
    for pid in pids.read_text().split():
        stopped.wait_for(lambda pid=pid: is_over(int(pid)), 2)
    assert stopped.said("was killed") == []


# --- the disk ------------------------------------------------------------------------------------


def test_a_target_in_the_way_is_one_line_and_recovers_by_itself(collector: Collector) -> None:
    target = collector.file("rabbitmq")
    target.mkdir()
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    collector.wait_for(lambda: collector.said(r"cannot write .*, next try in 1 s"))
    assert collector.send("rabbitmq", 0, {"n": 2}, ACK) == {"ack": "c"}
    target.rmdir()
    collector.wait_for(lambda: collector.said("can be written again"))
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1, 2])
    assert len(collector.said("cannot write")) == 1


def test_a_folder_that_was_removed_is_made_again(collector: Collector) -> None:
    collector.send("rabbitmq", 0, {"n": 1}, ACK)
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1])
    shutil.rmtree(collector.folder)
    assert collector.send("rabbitmq", 0, {"n": 2}, ACK) == {"ack": "c"}
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [2])


def test_a_removed_chunk_carries_no_acknowledgement(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    shutil.rmtree(collector.folder)
    assert collector.send("rabbitmq", 0, {"n": 2}, ACK) == {"ack": "c"}
    collector.kill()
    collector.start()
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1, 2])


def test_what_a_removed_folder_takes_along_is_written_again_at_the_end(stopped: Collector) -> None:
    collector = never_by_itself(stopped)
    assert collector.send("rabbitmq", 0, {"n": 1}, ACK) == {"ack": "c"}
    shutil.rmtree(collector.folder)
    assert collector.end() == 0
    assert numbers(collector, "rabbitmq") == [1]


def test_a_disk_that_refuses_bytes_costs_nothing_acknowledged(stopped: Collector) -> None:
    """A limit of a file's size stands in for a full disk: both fail in the middle of a write."""
    collector = never_by_itself(stopped)
    assert collector.process
    pid = collector.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8000, hard))
    taken = []
    for number in range(10):
        event = {"n": number, "x": "y" * 1500}
        if collector.send("rabbitmq", 0, event, ACK) == {"ack": "c"}:
            taken.append(number)
    assert taken == [0, 1, 2, 3, 4]
    assert len(collector.said("events for .* are refused: .*File too large")) == 1
    # The flush fails too, as the file has something in it already.
    collector.file("rabbitmq").write_text("old\n" * 500)
    collector.signal(signal.SIGUSR1)
    collector.wait_for(lambda: collector.said("cannot write .*File too large"))
    assert collector.file("rabbitmq").read_text() == "old\n" * 500
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert collector.send("rabbitmq", 0, {"n": 10}, ACK) == {"ack": "c"}
    assert collector.end() == 0
    lines = collector.lines("rabbitmq")
    assert [record_of(line)["n"] for line in lines[500:]] == [*taken, 10]
    collector.wait_for(lambda: not list(collector.folder.glob("buffer*")))


def test_files_are_readable_by_others(collector: Collector) -> None:
    collector.send("rabbitmq", 0, {"n": 1}, ACK)
    collector.wait_for(lambda: numbers(collector, "rabbitmq") == [1])
    assert os.stat(collector.file("rabbitmq")).st_mode & 0o777 == 0o640
