"""A collector as a process of its own, with the role's configuration in a temporary folder."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import pytest

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "roles/fluentd/templates/fluentd/fluent.conf.j2"
TAGS = "rabbitmq|publisher|subscriber|exporter|prometheus|alertmanager|alerts"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        return [stack.enter_context(server).getsockname()[1] for server in servers]


@pytest.fixture(scope="session")
def fluent_conf() -> str:
    """Return fluent.conf as the role renders it."""
    text = TEMPLATE.read_text()
    text = text.replace("{{ ansible_managed | comment }}", "# managed")
    text = text.replace("{{ __fluentd_tags | join('|') }}", TAGS)
    assert "{{" not in text
    return text


def _wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
    return result


class Collector:
    """The process, its folder and its log."""

    wait_for = staticmethod(_wait_for)

    def __init__(self, folder: Path, text: str) -> None:
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT / "apps/collector")}
        self.folder = folder / "log"
        self.folder.mkdir()
        self.port, self.http_port, self.monitor_port = free_ports(3)
        self.log_path = folder / "stdout"
        self.config = folder / "fluent.conf"
        text = text.replace("/fluentd/log", str(self.folder)).replace("0.0.0.0", "127.0.0.1")
        for usual, port in (24224, self.port), (9880, self.http_port), (24220, self.monitor_port):
            text = text.replace(f"port {usual}", f"port {port}")
        text = text.replace("run_interval 2s", "run_interval 0.2s")
        text = text.replace("sh /fluentd/etc/prune.sh", "true")
        self.config.write_text(text.replace("flush_interval 5s", "flush_interval 0.3s"))
        self.process: subprocess.Popen[bytes] | None = None

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "collector", "-c", str(self.config), *arguments]

    def run(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                self.command(*arguments),
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start(self) -> None:
        said = self.log().count("worker is now running")
        self.process = self.run()
        try:
            self.wait_for(lambda: self.log().count("worker is now running") > said)
        except AssertionError:
            print(self.config.read_text(), self.log(), f"it ended: {self.process.poll()}", sep="\n")
            raise

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def said(self, pattern: str) -> list[str]:
        return [line for line in self.log().splitlines() if re.search(pattern, line)]

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        process, self.process = self.process, None
        assert process
        process.send_signal(number)
        return process.wait(10)

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def rss(self) -> float:
        """Return the most memory it had, in MiB."""
        assert self.process
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def send(self, *message: Any) -> Any:
        """Send one message that asks for an acknowledgement, and return the answer."""
        with self.connect() as connection:
            connection.sendall(msgpack.packb(message))
            answer = connection.recv(4096)
            return msgpack.unpackb(answer) if answer else None

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.{datetime.now(UTC):%Y%m%d}.log"

    def lines(self, name: str) -> list[str]:
        """Return the lines of all days' files of name."""
        files = sorted(self.folder.glob(f"{name}.????????.log"))
        return [line for file in files for line in file.read_text().split("\n")[:-1]]


@pytest.fixture
def stopped(tmp_path: Path, fluent_conf: str) -> Iterator[Collector]:
    """A collector that is not started yet."""
    collector = Collector(tmp_path, fluent_conf)
    yield collector
    if collector.process:
        collector.kill()


@pytest.fixture
def collector(stopped: Collector) -> Collector:
    stopped.start()
    return stopped
