"""Measure many queues beside one: `python3 -m bench.queues`.

A broker and doors as those of bench/doors.py have QUEUES (1,000) queues with a dead queue each.
Each of ROUNDS (5) times 64 connections send and receive for SECONDS (5) by one queue, then in turns
by 16, and by 100. Printed are rates and times, their ratio to those of one queue, how long the
broker takes to import its definitions again, and the memory of broker and doors before and after.
"""

import json
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from bench.doors import CONTAINER, ROUNDS, TEXT, App, Run, check, docker, doors, figures, wrk

QUEUES = int(os.environ.get("QUEUES", "1000"))
NAMES = [f"queue-{number:04}" for number in range(1, QUEUES + 1)]
USED = 1, 16, 100
DEFINITIONS = "/etc/rabbitmq/definitions.json"


def main() -> None:
    """Measure, and print what came out."""
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "queues.json")
        listed.write_text(json.dumps({"queues": ["takeaway", *NAMES], "topics": []}))
        os.environ["QUEUES_FILE"] = str(listed)
        entries = [{"name": name, "max_length": 1000} for name in NAMES[100:]]
        entries += [{"name": name, "max_length": 100_000} for name in ("takeaway", *NAMES[:100])]
        # With 1G the broker has its memory alarm once some of the queues are used.
        with doors(stack_queues=entries, rabbitmq_memory="2G") as (publisher, subscriber):
            print_memory(f"{QUEUES:,} queues, none used", publisher, subscriber)
            started = time.monotonic()
            docker("exec", CONTAINER, "rabbitmqctl", "import_definitions", DEFINITIONS)
            print(f"The definitions imported again: {time.monotonic() - started:.0f} s")
            for number in range(ROUNDS):
                for used in USED:
                    for name, once in cases(publisher, subscriber, NAMES[:used]).items():
                        run = once()
                        runs.setdefault(name, []).append(run)
                        print(f"{number + 1}/{ROUNDS} {name}: {run}", file=sys.stderr)
                    empty(subscriber, NAMES[:used])
            print_memory(f"{QUEUES:,} queues, {max(USED)} used", publisher, subscriber)
    print("\n| Case | Messages a second | p50 / p99 ms | To one queue |\n|---|---|---|---|")
    for name in runs:
        rates = figures(runs, name, "rate")
        ones = figures(runs, f"{name.split(',')[0]}, 1 queue", "rate")
        ratio = median(rate / one for rate, one in zip(rates, ones, strict=True))
        p50, p99 = (median(figures(runs, name, what)) for what in ("p50", "p99"))
        print(f"| {name} | {median(rates):,.0f} | {p50:.1f} / {p99:.1f} | {ratio:.2f} |")
    check(runs)


def cases(publisher: App, subscriber: App, names: list[str]) -> dict[str, partial[Run]]:
    """Return how sending to the queues of names, and receiving from them, are measured once."""
    paths = [f"/queues/{name}/messages" for name in names]
    send = partial(wrk, 64, publisher.address, TEXT, {"Content-Type": "text/plain"}, paths=paths)
    receive = partial(wrk, 64, subscriber.address, paths=paths)
    used = f"{len(names)} queue{'s' * (len(names) > 1)}"
    return {f"POST, {used}": send, f"GET, {used}": receive}


def empty(subscriber: App, names: list[str]) -> None:
    """Drop what the queues of names have left."""
    client = subscriber.client()
    for name in names:
        client.ask("DELETE", f"/queues/{name}/messages?confirm={name}")


def print_memory(when: str, publisher: App, subscriber: App) -> None:
    """Print what broker and doors take."""
    (used,) = re.findall(
        r"^[^/]+", docker("stats", "--no-stream", "--format={{.MemUsage}}", CONTAINER)
    )
    print(
        f"{when}: broker {used.strip()}, publisher {publisher.memory()} MiB,"
        f" subscriber {subscriber.memory()} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
