"""Measure the collector: `python3 bench/collector.py [events]`, by default 1,000,000.

A subprocess of its own takes the events into a temporary folder. A sender process sends them in
each mode with many messages on the way, and a twentieth of them one at a time with
acknowledgements, as Docker's driver does. Printed are events a second by the clock and by the
collector's CPU time, and the most memory that it had (VmHWM).
"""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
<source>
  @type forward
  bind 127.0.0.1
  port {port}
  chunk_size_limit 1m
</source>
<match publisher>
  @type file
  path {folder}/${{tag}}.%Y%m%d
  append true
  <format>
    @type out_file
    time_format %Y-%m-%dT%H:%M:%S.%3N%:z
  </format>
  <buffer tag,time>
    @type file
    path {folder}/buffer.*.log
    timekey 1d
    timekey_use_utc true
    flush_mode interval
    flush_interval 5s
    flush_at_shutdown true
    chunk_limit_size 16m
    total_limit_size 64m
    retry_forever true
    retry_max_interval 30s
  </buffer>
</match>
"""
PER_MESSAGE = 500
Sender = Callable[[socket.socket, int], None]


def event(number: int) -> list[object]:
    """Return time and record as Docker's driver sends them."""
    record = {
        "container_id": "0123456789abcdef" * 4,
        "container_name": "/broker-publisher",
        "source": "stdout",
        "log": f"{number:09d} INFO a line of the length that such lines have, more or less",
    }
    moment = msgpack.ExtType(0, int(time.time()).to_bytes(4, "big") + b"\x12\x34\x56\x78")
    return [moment, record]


def message_mode(connection: socket.socket, events: int) -> None:
    """Send each event as a message, and ask for an acknowledgement of the last one only."""
    pack = msgpack.Packer().pack
    waiting = bytearray()
    for number in range(events - 1):
        waiting += pack(["publisher", *event(number)])
        if len(waiting) > 65536:
            connection.sendall(waiting)
            waiting.clear()
    connection.sendall(waiting + pack(["publisher", *event(events), {"chunk": "end"}]))
    connection.recv(100)


def packed_mode(connection: socket.socket, events: int) -> None:
    """Send messages of PER_MESSAGE events, each acknowledged, with many on the way."""
    pack = msgpack.Packer().pack
    acks = msgpack.Unpacker()
    sent = taken = 0
    while taken < events // PER_MESSAGE:
        if sent < events // PER_MESSAGE:
            entries = b"".join(pack(event(number)) for number in range(PER_MESSAGE))
            connection.sendall(pack(["publisher", entries, {"chunk": str(sent)}]))
            sent += 1
        if sent - taken >= 50 or sent == events // PER_MESSAGE:
            acks.feed(connection.recv(4096))
            taken += sum(1 for _ in acks)


def one_at_a_time(connection: socket.socket, events: int) -> None:
    """Send each event as a message and wait for its acknowledgement."""
    pack = msgpack.Packer().pack
    for number in range(events):
        connection.sendall(pack(["publisher", *event(number), {"chunk": "x" * 24}]))
        connection.recv(100)


def run(send: Sender, port: int, events: int) -> None:
    """Send events over a connection of its own."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        send(connection, events)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that process pid has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(name: str, send: Sender, events: int) -> None:
    """Run a collector and a sender, check that every event is in the file, print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = Path(folder, "fluent.conf")
        config.write_text(CONFIG.format(port=port, folder=folder))
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "apps/collector")}
        with subprocess.Popen(
            [sys.executable, "-m", "collector", "-c", str(config)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as collector:
            for line in collector.stdout or []:
                if "worker is now running" in line:
                    break
            before, start = cpu_seconds(collector.pid), time.monotonic()
            sender = multiprocessing.get_context("fork").Process(
                target=run, args=(send, port, events)
            )
            sender.start()
            sender.join()
            wall = time.monotonic() - start
            # With the last flush, which ends when no chunk is left.
            collector.send_signal(signal.SIGUSR1)
            while any(Path(folder).glob("buffer.*")):
                time.sleep(0.01)
            cpu = cpu_seconds(collector.pid) - before
            status = Path(f"/proc/{collector.pid}/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024
            collector.send_signal(signal.SIGTERM)
            collector.communicate()
        lines = sum(1 for file in Path(folder).glob("publisher.*.log") for _ in _lines(file))
        print(
            f"{name:<34} {events:>9,} events {wall:6.1f} s {events / wall:9,.0f}/s"
            f" {events / max(cpu, 0.01):9,.0f}/CPU-s  {peak:5.1f} MiB  {lines:,} lines in files"
        )
        if lines != events:
            sys.exit("events are missing")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def main() -> None:
    """Measure each mode."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    measure("Message, no acknowledgements", message_mode, events)
    measure(f"PackedForward, {PER_MESSAGE} a message", packed_mode, events - events % PER_MESSAGE)
    measure("Message, one at a time with ack", one_at_a_time, max(1, events // 20))


if __name__ == "__main__":
    main()
