"""Every container's log is in files, and no line of a container that runs on is lost."""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import SERVICES, Stack, eventually

LOGGING = [service for service in SERVICES if service != "fluentd"]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"

# Sends each tag given as JSON, with one record, in a connection of its own.
SEND = """
import json, socket, struct, sys, time
port, *tags = sys.argv[1:]
for tag in map(json.loads, tags):
    name = tag.encode()
    frame = b"\\x93\\xdb" + struct.pack(">I", len(name)) + name
    frame += b"\\xce" + struct.pack(">I", int(time.time())) + b"\\x81\\xa3log\\xa7hostile"
    with socket.create_connection(("127.0.0.1", int(port))) as connection:
        connection.sendall(frame)
print("null")
"""


def events(stack: Stack, service: str) -> list[dict[str, Any]]:
    """Return the structured events in a service's files."""
    records = [json.loads(line.split("\t", 2)[2]) for line in stack.lines(service)]
    return [record for record in records if "event" in record]


@pytest.mark.parametrize("service", LOGGING)
def test_a_services_lines_are_in_a_file_of_its_name(stack: Stack, service: str) -> None:
    logs = f"docker logs --tail 1 {stack.container(service)} 2>&1"
    said = json.dumps(stack.run(logs).rstrip("\n"), ensure_ascii=False)
    file = f"{stack.vars['fluentd_log_dir']}/{service}.{datetime.now(UTC):%Y%m%d}.log"
    eventually(
        lambda: f'"log":{said}' in stack.host.run("cat %s", file).stdout, 10, f"{said} is in {file}"
    )
    for line in stack.run("cat %s", file).splitlines():
        assert re.match(rf"{TIME}\t{service}\t\{{", line)


def test_only_fluentds_own_log_does_not_go_through_fluentd(stack: Stack) -> None:
    configs = {name: stack.inspect(name)["HostConfig"]["LogConfig"] for name in LOGGING}
    assert {config["Type"] for config in configs.values()} == {"fluentd"}
    assert {name: config["Config"]["tag"] for name, config in configs.items()} == {
        name: name for name in LOGGING
    }
    own = stack.inspect("fluentd")["HostConfig"]["LogConfig"]
    assert own == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}


def test_its_http_doors_are_on_the_stacks_network_alone(stack: Stack) -> None:
    ports = stack.inspect("fluentd")["NetworkSettings"]["Ports"]
    assert ports.get("9880/tcp") is None
    assert ports.get("24220/tcp") is None
    post(stack, "alerts", '{"receiver": "files", "alerts": []}')
    eventually(
        lambda: any('{"receiver":"files","alerts":[]}' in line for line in stack.lines("alerts")),
        10,
        "the notification is in a file",
    )


@pytest.mark.usefixtures("empty_queue")
def test_one_grep_shows_a_messages_way(stack: Stack) -> None:
    header = "--header", "X-Request-Id: way-of-1"
    sent = stack.http("apps_publisher_port", "/data", *header, "--data", "message=secret-body")
    assert (sent.status, sent.headers["x-request-id"]) == (201, "way-of-1")
    received = stack.receive()
    assert received.text == "secret-body\n"
    folder = stack.vars["fluentd_log_dir"]
    grep = f"grep --no-filename way-of-1 {folder}/publisher.*.log {folder}/subscriber.*.log"
    eventually(
        lambda: len(stack.host.run(grep).stdout.splitlines()) == 2, 10, "both events are in files"
    )
    publish, receive = (json.loads(line.split("\t", 2)[2]) for line in stack.run(grep).splitlines())
    queue = stack.vars["stack_queue"]
    assert publish == {
        "level": "info",
        "event": "publish",
        "request_id": "way-of-1",
        "message_id": publish["message_id"],
        "queue": queue,
        "status": 201,
        "duration_ms": publish["duration_ms"],
    }
    assert receive == {
        "level": "info",
        "event": "receive",
        "request_id": received.headers["x-request-id"],
        "publish_request_id": "way-of-1",
        "message_id": publish["message_id"],
        "queue": queue,
        "status": 200,
        "duration_ms": receive["duration_ms"],
    }
    assert all(0 < event["duration_ms"] < 5000 for event in (publish, receive))
    assert stack.host.run(f"grep --recursive secret-body {folder}").rc == 1


def test_a_refused_request_is_an_event(stack: Stack) -> None:
    header = "--header", "X-Request-Id: refused-1"
    assert stack.http("apps_publisher_port", "/data", *header, "--data", "text=x").status == 400
    found: list[dict[str, Any]] = []

    def arrived() -> bool:
        found[:] = [e for e in events(stack, "publisher") if e["request_id"] == "refused-1"]
        return bool(found)

    eventually(arrived, 10, "the event is in a file")
    assert (found[0]["level"], found[0]["status"]) == ("warning", 400)


def test_without_fluentd_everything_starts_and_works(stack: Stack) -> None:
    stack.docker("stop", stack.container("fluentd"))
    try:
        for service in SERVICES:
            stack.docker("restart", stack.container(service))
        stack.wait_until_ready(90)
        assert stack.send("without a log").status == 201
        assert stack.receive().text == "without a log\n"
    finally:
        stack.docker("start", stack.container("fluentd"))
        eventually(lambda: healthy(stack), 60, "fluentd is back")
    connected = stack.inspect("publisher")["State"]["StartedAt"][:23]
    eventually(
        lambda: any(
            "Connected to the broker" in line and line[:23] > connected
            for line in stack.lines("publisher")
        ),
        # The engine waits up to a minute between two attempts.
        90,
        "what was said meanwhile is in the files",
    )


@contextmanager
def containers(stack: Stack, *scripts: str) -> Iterator[list[str]]:
    """Containers that run scripts and log as the stack's do, by their names."""
    like = stack.inspect("publisher")
    options = like["HostConfig"]["LogConfig"]["Config"]
    names = [f"writer-{secrets.token_hex(4)}" for _ in scripts]
    try:
        for name, script in zip(names, scripts, strict=True):
            log = [f"--log-opt={key}={value}" for key, value in (options | {"tag": name}).items()]
            command = ["--init", "--entrypoint", "sh", like["Config"]["Image"], "-c", script]
            stack.docker("run", "--detach", "--name", name, "--log-driver=fluentd", *log, *command)
        yield names
    finally:
        stack.docker("rm", "--force", *names)


def test_a_long_line_is_one_line_beside_another_one(stack: Stack) -> None:
    def script(letter: str) -> str:
        line = f"head --bytes=50000 /dev/zero | tr '\\0' {letter}"
        return f"while :; do {line}; echo; sleep 0.1; done"

    with containers(stack, script("x"), script("y")) as names:

        def found() -> list[tuple[str, str]]:
            lines = [line.split("\t", 2) for line in stack.lines("other")]
            return [(tag, json.loads(record)["log"]) for _, tag, record in lines if tag in names]

        eventually(lambda: len(found()) > 20, 30, "the lines are in a file")
        assert set(found()) == {(names[0], "x" * 50_000), (names[1], "y" * 50_000)}


def test_the_last_word_of_a_door_that_cannot_start_is_in_a_file(stack: Stack) -> None:
    with containers(stack, *["exec python3 -m publisher"] * 5) as names:

        def told() -> set[str]:
            lines = [line.split("\t", 2) for line in stack.lines("other")]
            return {tag for _, tag, record in lines if "publisher: RABBITMQ_" in record}

        eventually(lambda: told() >= set(names), 20, "each has said what is missing")


@pytest.fixture
def writers(stack: Stack) -> Iterator[list[str]]:
    """Three containers that say 20 lines a second."""
    script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done"
    with containers(stack, *[script] * 3) as names:
        yield names


def test_no_line_is_lost_while_fluentd_is_away_or_killed(stack: Stack, writers: list[str]) -> None:
    def written(name: str = writers[0]) -> int:
        return int(stack.docker("logs", "--tail", "1", name).split()[-1])

    def go_on(lines: int) -> None:
        enough = written() + lines
        eventually(lambda: written() > enough, 60, "the containers log")

    go_on(50)
    stack.docker("stop", stack.container("fluentd"))
    go_on(400)  # 20 s
    stack.docker("start", stack.container("fluentd"))
    eventually(lambda: healthy(stack), 60, "fluentd is back")
    pid = stack.inspect("fluentd")["State"]["Pid"]
    stack.run("kill -9 %s", str(pid))
    go_on(20)
    eventually(lambda: healthy(stack), 60, "fluentd is back after kill -9")
    expected = {f"{name} line {number}" for name in writers for number in range(written(name) + 1)}
    missing = expected

    def complete() -> bool:
        nonlocal missing
        found = set()
        for line in stack.lines("other"):
            _, tag, record = line.split("\t", 2)
            found.add(f"{tag} {json.loads(record).get('log')}")
        missing = expected - found
        return not missing

    try:
        eventually(complete, 90, "each line is in the files")
    finally:
        print(f"{len(missing)} of {len(expected)} lines missing")


def test_a_hostile_tag_names_no_file(stack: Stack) -> None:
    before = folders(stack)
    tags = [
        "../../x",
        "../../tmp/x",
        "../log/rabbitmq",
        "",
        "x" * 10_000,
        "a\0b",
        "rabbitmq\nx",
        "/",
    ]
    send = [json.dumps(tag) for tag in tags]
    stack.python(SEND, str(stack.vars["stack_fluentd_port"]), *send)
    eventually(
        lambda: sum('"hostile"' in line for line in stack.lines("other")) >= len(tags),
        10,
        "each is in the file of all other tags",
    )
    assert folders(stack) == before
    assert healthy(stack)


def test_an_old_file_is_deleted(stack: Stack) -> None:
    days = stack.vars["fluentd_log_days"]
    left = prune(
        stack,
        f"touch --date='{days} days ago 1 hour ago' alerts.20260101.log",
        f"touch --date='{days} days ago 1 hour' alerts.20260102.log",
        said=f"deleted alerts.20260101.log: older than {days} days",
    )
    assert left == ["alerts.20260102.log"]


def test_the_oldest_files_go_when_all_are_too_large(stack: Stack) -> None:
    assert stack.vars["fluentd_log_limit"] == "1G"
    left = prune(
        stack,
        "for n in 1 2 3 4 5 6; do truncate --size 200M alerts.2026010$n.log",
        'touch --date="$n hours ago" alerts.2026010$n.log; done',
        said=r"deleted alerts\.20260106\.\d{6}\.log: more than 1G in all",
    )
    # Four of them fit; each was too large for one day's file.
    found = [re.fullmatch(r"alerts\.2026010(\d)\.\d{6}\.log", name) for name in left]
    assert [name and name[1] for name in found] == ["1", "2", "3", "4"]


def prune(stack: Stack, *make: str, said: str) -> list[str]:
    """Make files alerts.202601…, prune, wait until that is said, and return those that are left."""
    folder = stack.vars["fluentd_log_dir"]
    fluentd = stack.container("fluentd")
    since = stack.run("date +%s").strip()
    # Whole when they come into the folder: Fluentd runs the script by itself, too.
    made = f"d=$(mktemp --directory --tmpdir={folder}) && cd $d"
    stack.run("; ".join([made, *make, f"mv * {folder}; rmdir $d"]))
    try:
        by_hand = stack.docker("exec", fluentd, "sh", "/fluentd/etc/prune.sh")
        eventually(
            lambda: re.search(said, by_hand + stack.docker("logs", "--since", since, fluentd)),
            5,
            f"it says {said}",
        )
        return stack.run(f"cd {folder} && ls alerts.202601*").split()
    finally:
        stack.run(f"rm --force {folder}/alerts.202601*")


def post(stack: Stack, tag: str, body: str) -> None:
    """Post body, JSON, from the stack's network, as Alertmanager does."""
    address = stack.inspect("fluentd")["NetworkSettings"]["Networks"][stack.name]["IPAddress"]
    json_type = "--header 'Content-Type: application/json'"
    url = f"http://{address}:9880/{tag}"
    stack.run(f"curl --silent --show-error --fail {json_type} --data %s %s", body, url)


def healthy(stack: Stack) -> bool:
    state = stack.inspect("fluentd")["State"]
    return bool(state["Running"] and state["Health"]["Status"] == "healthy")


def folders(stack: Stack) -> set[str]:
    """Return all but the logs in the folder, beside it, and in the container's own folders."""
    folder = stack.vars["fluentd_log_dir"]
    outside = stack.run("find %s -path %s -prune -o -print", str(Path(folder).parent), folder)
    find = ["find", "/tmp", "/fluentd", "-path", "/fluentd/log", "-prune", "-o", "-print"]
    inside = stack.docker("exec", stack.container("fluentd"), *find)
    names = stack.run("ls --almost-all %s", folder).split()
    known = re.compile(
        r"(buffer|buffer-other)\.[bq][0-9a-f]{32}\.log(\.meta)?|[a-z]+\.\d{8}(\.\d{6})?\.log"
    )
    logs = {name for name in names if known.fullmatch(name)}
    # The engine has runc-process… in /tmp for as long as it takes to start a health check.
    others = {line for line in outside.splitlines() if "/runc-process" not in line}
    return {*others, *inside.splitlines(), *names} - logs
