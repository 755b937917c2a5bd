"""Measure the front beside a door itself: `python3 -m bench.front`.

Broker and doors are those of bench/doors.py. Before two more doors stand two fronts, one of them
with TLS: containers with the project's configuration, whose limits for a client are raised. In each
of ROUNDS (5) 64 connections send and receive for SECONDS (5) by the door and by both fronts, in
turn, on connections that are kept and on a new one for each request. All are asked at addresses of
their own, not through Docker's proxy. Printed are rates and times, and the rates' ratio to those of
the door.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench.doors import (
    FORM,
    LABEL,
    LUA,
    ROOT,
    ROUNDS,
    SECONDS,
    App,
    Cases,
    Client,
    Run,
    app,
    check,
    docker,
    doors,
    figures,
    measure,
)
from tests.support import render

PATH = "/usr/local/etc/haproxy"
KINDS = {"keep-alive": "keep-alive", "new connections": "close"}
# A client's limits, which one program that makes all of the load would meet.
LIMITS = {f"front_client_{what}": 1_000_000 for what in ("connections", "new_connections")}
LIMITS |= {"front_client_requests": 1_000_000}


def main() -> None:
    """Measure, and print what came out."""
    with doors() as (publisher, subscriber):
        # Only the doors that start from here on are behind a front.
        os.environ["TRUST_FORWARDED"] = "true"
        with (
            app("publisher", "-m", "publisher") as publisher_2,
            app("subscriber", "-m", "subscriber") as subscriber_2,
            front("off", publisher_2, subscriber_2) as plain,
            front("own", publisher_2, subscriber_2) as tls,
        ):
            runs = measure(
                make_cases(
                    {
                        "door": [f"http://{door.address}" for door in (publisher, subscriber)],
                        "front": [f"http://{plain}:{port}" for port in (5000, 5001)],
                        "front, TLS": [f"https://{tls}:{port}" for port in (5000, 5001)],
                    }
                )
            )
    print_figures(runs)
    check(runs)


def print_figures(runs: dict[str, list[Run]]) -> None:
    """Print a Markdown table of what was measured; ratios are those of single rounds."""
    print(f"{ROUNDS} rounds of {SECONDS} s, 64 connections:\n")
    print("| Case | Messages a second | p50 / p99 ms | To the door | Least | Most |")
    print("|---|---|---|---|---|---|")
    for name in runs:
        rates = figures(runs, name, "rate")
        others = figures(runs, f"{name.partition(': ')[0]}: door", "rate")
        single = [one / two for one, two in zip(rates, others, strict=True)]
        p50, p99 = (median(figures(runs, name, what)) for what in ("p50", "p99"))
        print(
            f"| {name} | {median(rates):,.0f} | {p50:.1f} / {p99:.1f}"
            f" | {median(single):.2f} | {min(single):.2f} | {max(single):.2f} |"
        )


def make_cases(places: dict[str, list[str]]) -> Cases:
    """Return how each of places, by name the URLs of publisher and subscriber, is measured once."""
    cases: Cases = {}
    for kind, connection in KINDS.items():
        for name, (publisher, _) in places.items():
            once = partial(load, f"{publisher}/data", connection, FORM)
            cases[f"POST, {kind}: {name}"] = (0, once)
        for name, (_, subscriber) in places.items():
            once = partial(load, f"{subscriber}/receive", connection)
            cases[f"GET, {kind}: {name}"] = (6000, once)
    return cases


def load(url: str, connection: str, body: str = "") -> Run:
    """Load url for SECONDS by 64 connections, by POST when there is a body."""
    lua = [LUA, f"per, wrk.method, wrk.body = 1, '{'POST' if body else 'GET'}', '{body}'"]
    lua += ["wrk.headers['Content-Type'] = 'application/x-www-form-urlencoded'"] if body else []
    lua += [f"wrk.headers['Connection'] = '{connection}'"]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write("\n".join(lua))
        script.flush()
        command = ["wrk", "--threads=1", "--connections=64", "--timeout=10s"]
        command += [f"--duration={SECONDS}s", f"--script={script.name}", url]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def front(tls: str, publisher: App, subscriber: App) -> Iterator[str]:
    """Run a front of these doors, stack_tls being tls, and yield its address."""
    container = f"broker-bench-front-{tls}"
    remove(container)
    try:
        image = json.loads((ROOT / ".venv/images.json").read_text())["front"]
        # The memory that the role gives it.
        create = ["create", f"--name={container}", f"--label={LABEL}", "--user=99:99"]
        docker(*create, "--memory=512M", image, "-f", f"{PATH}/haproxy.cfg")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "haproxy.cfg").write_text(configuration(folder, tls, publisher, subscriber))
            (folder / "loaded").write_text("")
            write_certificate(folder / "tls")
            for file in "haproxy.cfg", "loaded", "tls":
                docker("cp", f"{folder}/{file}", f"{container}:{PATH}")
        docker("start", container)
        address = docker("inspect", "--format={{.NetworkSettings.IPAddress}}", container)
        wait_for(container, address)
        yield address
    finally:
        remove(container)


def configuration(folder: Path, tls: str, publisher: App, subscriber: App) -> str:
    """Return the role's configuration, with the addresses of these doors."""
    text = render(folder, stack_tls=tls, __front_path=PATH, **LIMITS)["front/haproxy.cfg"]
    # They are no containers, whom the engine's DNS knows: this machine is the bridge's gateway.
    found = docker("network", "inspect", "--format={{(index .IPAM.Config 0).Gateway}}", "bridge")
    for name, port, door in ("publisher", 5000, publisher), ("subscriber", 5001, subscriber):
        text = text.replace(f" {name}:{port} ", f" {found}:{door.port} ")
    return text


def write_certificate(folder: Path) -> None:
    """Make folder/front.pem: a certificate and its key, of the kind that the role tls makes."""
    folder.mkdir()
    file = folder / "front.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x"
    command = [*make.split(), "-days", "1", "-keyout", str(file), "-out", str(file)]
    subprocess.run(command, capture_output=True, check=True)
    file.chmod(0o644)  # HAProxy is another user


def wait_for(container: str, address: str) -> None:
    """Return once the front answers; SystemExit with its log when it does not."""
    end = time.monotonic() + 30
    while True:
        try:
            Client(address, 8405, timeout=5).ask("GET", "/healthz")
            return
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if time.monotonic() > end:
                subprocess.run(["docker", "logs", container], check=False)
                sys.exit(f"{container} is not ready: {error}")
        time.sleep(0.2)


def remove(container: str) -> None:
    """Remove a front of the bench, and no container that only has its name."""
    mine = [f"--filter=name=^/{container}$", f"--filter=label={LABEL}"]
    for found in docker("ps", "--all", "--quiet", *mine).split():
        docker("rm", "--force", "--volumes", found)


if __name__ == "__main__":
    main()
