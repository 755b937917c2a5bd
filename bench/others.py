"""Measure the doors beside others, by Docker's proxy, and with tokens: `python3 -m bench.others`.

Broker and doors are those of bench/doors.py. In each of ROUNDS (5) 64 connections send and receive
for SECONDS (5), in turn: at the doors' own addresses; through Docker's proxy, as on `localhost`, at
the door and at RabbitMQ's management API; and with a client's credentials. ELASTICMQ_JAR and
PERFTEST_JAR, Java's class paths of org.elasticmq:elasticmq-server_2.13:1.6.14 and
com.rabbitmq:perf-test:2.22.1, add ElasticMQ, warm and with its messages on disk, and the broker's
own limit. What cannot be had is left out by name.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench.doors import (
    FORM,
    ROUNDS,
    SECONDS,
    TEXT,
    Cases,
    Client,
    Run,
    app,
    check,
    doors,
    figures,
    free_port,
    management,
    measure,
    wrk,
)

WARM = 25
QUEUE = "000000000000/takeaway"
TOKEN = "bench"
CLIENT = {"name": "bench", "tokens": [hashlib.sha256(TOKEN.encode()).hexdigest()]}
RIGHTS = dict.fromkeys(("send", "receive", "manage"), ("takeaway",))
DIRECT, PROXY = "POST /data", "POST /data, Docker's proxy"
# What is compared with what, the ratio that must be reached, and the one aimed at.
REACH = [
    (PROXY, "POST, management API, Docker's proxy", 3.5, 5.0),
    (PROXY, DIRECT, 0, 0),
    (DIRECT, "POST, ElasticMQ", 1, 1.5),
    (DIRECT, "PerfTest", 0, 0),
    ("POST /data, with credentials", DIRECT, 0.8, 0.95),
    ("GET /receive, with credentials", "GET /receive", 0.8, 0.95),
]


def main() -> None:
    """Measure, and print what came out."""
    with ExitStack() as stack:
        publisher, subscriber = stack.enter_context(doors())
        cases: Cases = {
            DIRECT: (0, partial(wrk, 64, f"{publisher.address}/data", FORM)),
            "GET /receive": (6000, partial(wrk, 64, f"{subscriber.address}/receive")),
        }
        if program := find("docker-proxy"):
            door = stack.enter_context(proxy(program, "127.0.0.1", publisher.port))
            api = stack.enter_context(proxy(program, os.environ["RABBITMQ_HOST"], 15672))
            cases[PROXY] = (0, partial(wrk, 64, f"{door}/data", FORM))
            path, put, headers = management()
            once = partial(wrk, 64, f"{api}{path}", put, headers)
            cases["POST, management API, Docker's proxy"] = (0, once)
        java = find("java")
        if java and (jars := given("PERFTEST_JAR")):
            cases["PerfTest"] = (0, partial(perf_test, java, jars))
        if java and (jars := given("ELASTICMQ_JAR")):
            place = stack.enter_context(elasticmq(java, jars))
            cases["POST, ElasticMQ"] = (0, partial(send_elasticmq, place))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        listed = {"queues": ["takeaway"], "topics": [], "clients": [CLIENT | RIGHTS]}
        (folder / "queues.json").write_text(json.dumps(listed))
        # Only the doors that start from here on know clients.
        os.environ["QUEUES_FILE"] = str(folder / "queues.json")
        token = {"Authorization": f"Bearer {TOKEN}"}
        known = stack.enter_context(app("publisher", "-m", "publisher"))
        once = partial(wrk, 64, f"{known.address}/data", FORM, token)
        cases["POST /data, with credentials"] = (0, once)
        known = stack.enter_context(app("subscriber", "-m", "subscriber"))
        once = partial(wrk, 64, f"{known.address}/receive", "", token)
        cases["GET /receive, with credentials"] = (6000, once)
        runs = measure(cases)
    print_figures(runs)
    check(runs)


def print_figures(runs: dict[str, list[Run]]) -> None:
    """Print Markdown tables of what was measured; ratios are those of single rounds."""
    print(f"{ROUNDS} rounds of {SECONDS} s, 64 connections:\n")
    print("| Case | Messages a second | Least | Most | p50 / p99 ms |\n|---|---|---|---|---|")
    for name in runs:
        rates = figures(runs, name, "rate")
        p50, p99 = (median(figures(runs, name, what)) for what in ("p50", "p99"))
        times = f"{p50:.1f} / {p99:.1f}" if p50 else ""
        print(
            f"| {name} | {median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} | {times} |"
        )
    print("\n| To reach | Ratio | Least | Most | Target | Aim |\n|---|---|---|---|---|---|")
    for mine, other, target, aim in REACH:
        if mine in runs and other in runs:
            rates, others = figures(runs, mine, "rate"), figures(runs, other, "rate")
            single = [one / two for one, two in zip(rates, others, strict=True)]
            bounds = f"≥ {target} | {aim}" if target else " | "
            print(
                f"| {mine} to {other} | {median(single):.2f} | {min(single):.2f}"
                f" | {max(single):.2f} | {bounds} |"
            )


def find(program: str) -> str | None:
    """Return where program is; tell that its rows are left out where it is not."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/libexec/docker")
    if found is None:
        print(f"Left out: what needs {program}, which is not here.\n")
    return found


def given(name: str) -> str | None:
    """Return the class path in the environment's name; tell what is left out without it."""
    found = os.environ.get(name)
    if not found:
        print(f"Left out: what needs {name}, which is not set.\n")
    return found


@contextmanager
def program(*command: str, port: int) -> Iterator[None]:
    """Run command, from when it listens on port."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError as error:
                if time.monotonic() > end or running.poll() is not None:
                    sys.exit(f"{command[0]} does not listen: {error}")
            time.sleep(0.1)
        yield
    finally:
        running.terminate()
        running.wait(20)


@contextmanager
def proxy(docker_proxy: str, host: str, to: int) -> Iterator[str]:
    """Run Docker's proxy to a port of host, as Docker does for a port that is published."""
    port = free_port()
    command = [docker_proxy, "-proto=tcp", "-host-ip=127.0.0.1", f"-host-port={port}"]
    command += [f"-container-ip={host}", f"-container-port={to}"]
    # It tells its parent by the file 3 that it listens.
    with program("sh", "-c", 'exec "$@" 3> /dev/null', "sh", *command, port=port):
        yield f"127.0.0.1:{port}"


@contextmanager
def elasticmq(java: str, jars: str) -> Iterator[str]:
    """Run ElasticMQ with its messages on disk, warm, and yield host and port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "logback.xml").write_text("<configuration/>")
        options = {
            "messages-storage.enabled": "true",
            "messages-storage.uri": f"jdbc:h2:{folder}/messages",
            "rest-sqs.bind-hostname": "127.0.0.1",
            "rest-sqs.bind-port": port,
            "rest-stats.enabled": "false",
        }
        command = [java, *(f"-D{name}={value}" for name, value in options.items())]
        command += [f"-Dlogback.configurationFile={folder}/logback.xml"]
        with program(*command, "-cp", jars, "org.elasticmq.server.Main", port=port):
            client = Client(f"127.0.0.1:{port}", timeout=30)
            client.ask("POST", "/", "Action=CreateQueue&QueueName=takeaway")
            print(f"ElasticMQ is warmed for {WARM} s", file=sys.stderr)
            end = time.monotonic() + WARM
            while time.monotonic() < end:
                send_elasticmq(f"127.0.0.1:{port}")
            yield f"127.0.0.1:{port}"


def send_elasticmq(place: str) -> Run:
    """Load ElasticMQ for SECONDS; none of its messages are looked for in RabbitMQ."""
    run = wrk(64, f"{place}/{QUEUE}", f"Action=SendMessage&MessageBody={TEXT}")
    return run | {"missing": 0}


def perf_test(java: str, jars: str) -> Run:
    """Return the rate of PerfTest with 256 messages under way, as raw pika has them."""
    host, password = (os.environ[f"RABBITMQ_{name}"] for name in ("HOST", "PASSWORD"))
    command = [java, "-cp", jars, "com.rabbitmq.perf.PerfTest", "--predeclared"]
    command += [f"--uri=amqp://admin:{password}@{host}:5672", "--exchange=takeaway-in"]
    command += ["--routing-key=takeaway", "--queue=takeaway", "--consumers=0", "--confirm=256"]
    command += ["--flag=persistent", f"--size={len(TEXT)}", f"--time={SECONDS}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (rate,) = re.findall(r"sending rate avg: (\d+) msg/s", done.stdout)
    return {"rate": float(rate), "missing": 0}


if __name__ == "__main__":
    main()
