"""What is watched, what is alerted, and how it looks in a browser."""

import base64
import csv
import html
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pytest
from conftest import PROJECT, Stack, eventually
from prometheus_client.parser import text_string_to_metric_families

# Logs in with a wrong password, as often as the last argument says.
LOG_IN = """
import sys, pika
port, count = map(int, sys.argv[1:])
credentials = pika.PlainCredentials("publisher", "wrong")
parameters = pika.ConnectionParameters("127.0.0.1", port, credentials=credentials)
for _ in range(count):
    try:
        pika.BlockingConnection(parameters)
    except pika.exceptions.ProbableAuthenticationError:
        pass
print("null")
"""


class Browser:
    """Chromium, in the network of the disposable host."""

    def __init__(self, stack: Stack) -> None:
        self.usual = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        self.container = f"{stack.vars['ansible_host'].removesuffix('-broker1')}-browser"
        self.top = f"http://127.0.0.1:{stack.vars['monitoring_prometheus_port']}"

    def open(self, path: str, picture: str, width: int, height: int) -> str:
        """Return the page's DOM once its scripts have run; the picture is kept in .pictures."""
        shot = ["--screenshot=/tmp/page.png", f"--window-size={width},{height}"]
        dom = self._chromium(path, "--dump-dom", shot[1])
        self._chromium(path, *shot)
        png = self._run("base64", "/tmp/page.png")
        file = PROJECT / f".pictures/{picture}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(base64.b64decode(png))
        return dom

    def _chromium(self, path: str, *args: str) -> str:
        usual = [*self.usual, "--virtual-time-budget=8000"]
        return self._run("chromium-headless-shell", *usual, *args, self.top + path)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            ["docker", "exec", self.container, "timeout", "60", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def browser(stack: Stack) -> Browser:
    return Browser(stack)


@pytest.fixture(scope="module")
def listed() -> list[dict[str, str]]:
    """Return the families that the exporter shares with the one whose names it has."""
    text = (PROJECT / "apps/exporter/tests/families.tsv").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines, delimiter="\t"))


def text_of(dom: str) -> str:
    plain = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", dom, flags=re.DOTALL)
    return " ".join(html.unescape(plain).split())


def told(stack: Stack, since: int = 0) -> list[tuple[str, dict[str, str]]]:
    """Return status and labels of each alert in the notifications in the files."""
    records = [json.loads(line.split("\t", 2)[2]) for line in stack.lines("alerts")[since:]]
    return [(alert["status"], alert["labels"]) for record in records for alert in record["alerts"]]


def test_every_target_is_up_and_scraped_every_10_seconds(stack: Stack) -> None:
    def health() -> set[str]:
        return {target["health"] for target in stack.targets().values()}

    eventually(lambda: health() == {"up"}, 30, "every target is up")
    assert stack.targets().keys() == {
        "prometheus",
        "alertmanager",
        "exporter",
        "rabbitmq",
        "rabbitmq_detailed",
        "publisher",
        "subscriber",
    }
    assert {target["scrapeInterval"] for target in stack.targets().values()} == {"10s"}


def test_every_target_tells_when_its_process_was_started(stack: Stack) -> None:
    started = {dict(labels)["job"] for labels in stack.query("process_start_time_seconds > 0")}
    assert started | {"rabbitmq_detailed"} == stack.targets().keys()


@pytest.fixture
def classic_queue(stack: Stack) -> Iterator[None]:
    """A queue of another kind, with limits and a message that has a time."""
    arguments = {"x-queue-type": "classic", "x-max-length": 9, "x-max-length-bytes": 9000}
    queue = json.dumps({"durable": True, "arguments": arguments})
    message = {"routing_key": "classic", "payload": "hi", "payload_encoding": "string"}
    message["properties"] = {"timestamp": 1767225600}
    put = ("--request", "PUT", "--data", queue)
    assert stack.api("/queues/%2F/classic", "admin", *put).status == 201
    post = ("--request", "POST", "--data", json.dumps(message))
    assert stack.api("/exchanges/%2F/amq.default/publish", "admin", *post).json == {"routed": True}
    yield
    assert stack.api("/queues/%2F/classic", "admin", "--request", "DELETE").status == 204


@pytest.mark.usefixtures("classic_queue")
def test_the_exporter_tells_what_the_list_says(stack: Stack, listed: list[dict[str, str]]) -> None:
    assert stack.send("one").status == 201
    assert stack.receive().status == 200
    expected = {
        line["name"]: (line["type"], set(line["labels"].split(",")))
        for line in listed
        if line["on_4.0.5"] == line["default_scrape"] == "yes"
    }
    assert len(expected) > 60

    def told() -> dict[str, tuple[str, set[str]]]:
        text = stack.http("monitoring_exporter_port", "/metrics").text
        return {
            sample.name: (family.type, set(sample.labels))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def differences() -> list[str]:
        seen = told()
        return [name for name in expected if seen.get(name) != expected[name]]

    # The broker counts anew every 5 seconds.
    try:
        eventually(lambda: not differences(), 15, "every family is told as listed")
    finally:
        print("differ:", {name: told().get(name) for name in differences()})
    others = {name for name in told() if name not in {line["name"] for line in listed}}
    assert others == {
        "process_start_time_seconds",
        "fluentd_up",
        *(f"fluentd_output_status_{what}" for what in ("emit_records", "write_count")),
        *(f"fluentd_output_status_{what}" for what in ("retry_count", "buffer_total_bytes")),
        "fluentd_output_status_buffer_queue_length",
        "fluentd_output_status_buffer_available_space_ratio",
        *(
            f"rabbitmq_{what}Total"
            for what in ["channels", "connections", "consumers", "queues", "exchanges"]
        ),
        "rabbitmq_queue_messages_total",
        "rabbitmq_queue_messages_ready_total",
        "rabbitmq_queue_messages_unacknowledged_total",
        "rabbitmq_fd_total",
        "rabbitmq_sockets_total",
    }


def test_only_the_watchdog_fires_and_its_notification_is_in_a_file(stack: Stack) -> None:
    eventually(lambda: stack.firing() == {"Watchdog"}, 30, "only the watchdog fires")
    watchdog = Drill("Watchdog")
    eventually(lambda: watchdog.is_told("firing", told(stack)), 40, "it was notified")


@dataclass
class Drill:
    """A failure that is caused and cured, and what was seen of its alert."""

    alert: str
    cause: Callable[[Stack], object] = lambda _: None
    cure: Callable[[Stack], object] = lambda _: None
    labels: dict[str, str] = field(default_factory=dict)
    # Seconds from the cause to the line in the file, and from the cure to the line of its end.
    seconds: dict[str, float] = field(default_factory=dict)

    def is_told(self, status: str, lines: list[tuple[str, dict[str, str]]]) -> bool:
        """Return whether the last of lines that is of this alert says status."""
        labels = {"alertname": self.alert, **self.labels}
        return [one for one, of in lines if labels.items() <= of.items()][-1:] == [status]


def ctl(*args: str) -> Callable[[Stack], object]:
    """Return what runs rabbitmqctl with args."""
    return lambda stack: stack.docker(
        "exec", stack.container("rabbitmq"), "rabbitmqctl", "--quiet", *args
    )


def send_one(stack: Stack) -> None:
    assert stack.send("nobody receives this").status == 201


def receive_all(stack: Stack) -> None:
    eventually(lambda: stack.receive().text == "No message available\n", 30, "all are received")


def give_up_one(stack: Stack) -> None:
    message = {"routing_key": f"{stack.vars['stack_queue']}.dead", "payload": "given up"}
    message |= {"payload_encoding": "string", "properties": {}}
    post = ("--request", "POST", "--data", json.dumps(message))
    assert stack.api("/exchanges/%2F/amq.default/publish", "admin", *post).json == {"routed": True}


def empty_the_dead_queue(stack: Stack) -> None:
    path = f"/queues/%2F/{stack.vars['stack_queue']}.dead/contents"
    assert stack.api(path, "admin", "--request", "DELETE").status == 204


def log_in_with_a_wrong_password(stack: Stack) -> None:
    stack.python(LOG_IN, str(stack.vars["rabbitmq_amqp_port"]), "15")


def cut_the_subscriber_off(stack: Stack) -> None:
    ctl("set_user_limits", "subscriber", '{"max-connections": 0}')(stack)
    ctl("close_all_user_connections", "subscriber", "drill")(stack)


def restore_memory(stack: Stack) -> None:
    ctl("set_vm_memory_high_watermark", "absolute", stack.watermark())(stack)


def restart_the_exporter_three_times(stack: Stack) -> None:
    """Restart it, each time until Prometheus sees another process."""

    def started() -> list[float]:
        return [*stack.query('process_start_time_seconds{job="exporter"}').values()]

    for _ in range(3):
        before = started()
        stack.docker("restart", stack.container("exporter"))
        eventually(lambda last=before: started() not in ([], last), 30, "it is scraped")


def container(action: str, service: str) -> Callable[[Stack], object]:
    """Return what stops, kills or starts the service's container."""
    return lambda stack: stack.docker(action, stack.container(service))


# Those of the broker that may be wrong at the same time; what blocks publishers comes last.
BROKER = [
    Drill("RabbitMQNobodyReceives", send_one, receive_all),
    Drill("RabbitMQDeadLetters", give_up_one, empty_the_dead_queue),
    Drill("RabbitMQLoginsFailed", log_in_with_a_wrong_password),
    Drill(
        "DoorDisconnected",
        cut_the_subscriber_off,
        ctl("clear_user_limits", "subscriber", "max-connections"),
        {"job": "subscriber"},
    ),
    Drill(
        "RabbitMQMemoryAlarm",
        ctl("set_vm_memory_high_watermark", "absolute", "10MB"),
        restore_memory,
    ),
    Drill(
        "RabbitMQDiskAlarm",
        ctl("set_disk_free_limit", "200000000000000"),
        lambda stack: ctl("set_disk_free_limit", stack.vars["rabbitmq_disk_free_limit"])(stack),
    ),
]
EXPORTER = Drill(
    "TargetDown", container("kill", "exporter"), container("start", "exporter"), {"job": "exporter"}
)
COLLECTOR = Drill("FluentdDown", container("stop", "fluentd"), container("start", "fluentd"))
STOP = Drill("RabbitMQDown", container("stop", "rabbitmq"), container("start", "rabbitmq"))
DRILLS = [*BROKER, EXPORTER, COLLECTOR, STOP]

# Seconds that a drill has for each of its steps.
PATIENCE = 90


class Drills:
    """Waits for several drills at a time, and notes what was seen in time."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.first = len(stack.lines("alerts"))
        self._since: dict[tuple[str, str], float] = {}

    def cause(self, *drills: Drill) -> None:
        for drill in drills:
            drill.cause(self._stack)
            self._since[drill.alert, "firing"] = time.monotonic()

    def cure(self, *drills: Drill) -> None:
        # In reverse: what was caused last may stand in the way.
        for drill in reversed(drills):
            drill.cure(self._stack)
            self._since[drill.alert, "resolved"] = time.monotonic()

    def wait(self, status: str, *drills: Drill) -> None:
        """Wait until a line in the files tells that each of drills is firing or resolved."""
        waiting = list(drills)

        def all_told() -> bool:
            lines = told(self._stack, self.first)
            for drill in [one for one in waiting if one.is_told(status, lines)]:
                drill.seconds[status] = time.monotonic() - self._since[drill.alert, status]
                waiting.remove(drill)
            return not waiting

        self.until(all_told)

    @staticmethod
    def until(check: Callable[[], bool]) -> None:
        """Wait until check is true, but not for ever: who fails does not hide the others."""
        deadline = time.monotonic() + PATIENCE
        while not check() and time.monotonic() < deadline:
            time.sleep(0.5)


@pytest.fixture(scope="module")
def drills(stack: Stack, browser: Browser, refusals: Future[dict[str, str]]) -> dict[str, Any]:
    """All drills, overlapped where one cause does not hide the other; what was seen besides."""
    seen: dict[str, Any] = {}
    run = Drills(stack)
    start = time.monotonic()
    run.cause(*BROKER)
    run.wait("firing", *BROKER)
    # They want every container left alone, and what they take is not the drills' time.
    waited = time.monotonic()
    wait([refusals])
    seen["waited"] = time.monotonic() - waited
    run.cure(*BROKER)
    run.cause(EXPORTER)
    run.wait("firing", EXPORTER)
    run.cure(EXPORTER)
    run.wait("resolved", *BROKER, EXPORTER)

    # What cannot be told while Fluentd is away is told afterwards.
    lines = len(stack.lines("alerts"))
    run.cause(COLLECTOR, STOP)
    run.until(lambda: {COLLECTOR.alert, STOP.alert} <= stack.firing())
    run.cure(COLLECTOR)
    build = stack.http("monitoring_prometheus_port", "/api/v1/status/buildinfo").json["data"]
    # Debian's 2.53 has the old pages, at another address.
    tab = "/classic/alerts" if build["version"].startswith("2.") else "/alerts"
    seen["tab"] = text_of(browser.open(tab, "alerts-tab", 1280, 480))
    run.wait("firing", COLLECTOR, STOP)
    # Its own targets are down, too, and the doors cut off: that is held back.
    run.until(lambda: {"TargetDown", "DoorDisconnected"} <= stack.firing())
    seen["fired"] = stack.firing()
    run.cure(STOP)
    run.wait("resolved", COLLECTOR, STOP)
    seen["told"] = [
        (labels["alertname"], status)
        for status, labels in told(stack, lines)
        if labels["alertname"] != COLLECTOR.alert
    ]
    seen["alerts"] = {labels["alertname"] for _, labels in told(stack, run.first)}
    stack.wait_until_ready()
    seen["seconds"] = time.monotonic() - start - seen["waited"]
    return seen


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.alert)
@pytest.mark.usefixtures("drills")
def test_a_failure_is_told_and_so_is_its_end(drill: Drill) -> None:
    assert drill.seconds.keys() == {"firing", "resolved"}


def test_a_stopped_broker_is_one_notification_and_so_is_its_start(drills: dict[str, Any]) -> None:
    assert drills["fired"] >= {"RabbitMQDown", "TargetDown", "DoorDisconnected"}
    assert drills["told"] == [("RabbitMQDown", "firing"), ("RabbitMQDown", "resolved")]
    assert re.search(r"RabbitMQDown\W+1 active", drills["tab"]), drills["tab"][:3000]
    assert "severity high" in drills["tab"] or 'severity="high"' in drills["tab"]


def test_nothing_is_told_that_has_no_cause(drills: dict[str, Any]) -> None:
    assert drills["alerts"] == {drill.alert for drill in DRILLS}


def test_the_drills_take_less_than_5_minutes(
    drills: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(
            f"\n  {len(DRILLS)} drills: {drills['seconds']:.0f} s, "
            f"and {drills['waited']:.0f} s for the refusals"
        )
        for drill in DRILLS:
            print(
                f"    {drill.alert}: "
                + ", ".join(f"{k} {v:.0f} s" for k, v in drill.seconds.items())
            )
    assert drills["seconds"] < 300


# Its alert ends ten minutes later: no test waits for that.
def test_what_is_restarted_over_and_over_is_told(stack: Stack) -> None:
    drill = Drill("Restarting", restart_the_exporter_three_times, labels={"job": "exporter"})
    run = Drills(stack)
    run.cause(drill)
    run.wait("firing", drill)
    assert drill.seconds.keys() == {"firing"}


@contextmanager
def load(stack: Stack) -> Iterator[None]:
    """Send and receive, one message after the other, until the end of the block."""
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            assert stack.send("load").status == 201
            stack.receive()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        end.set()
        worker.join()


def card(dom: str, graph: str) -> str:
    found = re.search(rf'<(\w+)[^>]* id="{graph}".*?</\1>', dom, re.DOTALL)
    assert found, f"{graph} is missing"
    return found[0]


def rates(dom: str) -> dict[str, float]:
    """Return the last value of each line of the graph of messages in and out."""
    text = text_of(card(dom, "messages"))
    return {line: float(rate) for line, rate in re.findall(r"([a-z]+ed) ([\d.]+) /s", text)}


# Last: by then, every graph has something to show.
@pytest.mark.usefixtures("empty_queue")
def test_the_page_of_graphs_shows_what_goes_on(stack: Stack, browser: Browser) -> None:
    graphs = ["messages", "depth", "requests", "latency", "connections", "memory", "disk"]
    with load(stack):
        eventually(
            lambda: max(stack.query('rate(http_requests_total{route="/data"}[1m])').values()) > 1,
            60,
            "the load is in Prometheus",
        )
        before = stack.alerts()
        desktop = browser.open("/consoles/stack.html", "graphs", 1280, 1120)
        after = stack.alerts()
        browser.open("/consoles/stack.html", "graphs-phone", 390, 3200)
    for graph in graphs:
        assert "stroke: var" in card(desktop, graph), f"{graph} has no line"
    shown = text_of(desktop)
    assert re.search(r"Broker up Messages ready \d+ ", shown), shown
    assert "Watchdog" not in shown
    # What Alertmanager could not tell while Fluentd was away may still be pending.
    listed = set(re.findall(r"(\w+) (?:pending|firing) (?:high|low|none)\b", shown))
    assert listed or "Alerts none" in shown, shown
    assert before & after <= {"Watchdog", *listed} <= before | after, shown


@pytest.mark.usefixtures("empty_queue")
def test_the_page_of_graphs_shows_the_queue_that_its_address_names(
    stack: Stack, browser: Browser
) -> None:
    page, busy, idle = "/consoles/stack.html?queue=", stack.vars["stack_queue"], "orders"
    published = f'rate(rabbitmq_queue_messages_published_total{{queue="{busy}"}}[1m])'
    with load(stack):
        eventually(
            lambda: max(stack.query(published).values(), default=0) > 1,
            60,
            "the load is in Prometheus",
        )
        shown = browser.open(page + busy, "graphs-queue", 1280, 1120)
        other = browser.open(page + idle, "graphs-other-queue", 1280, 1120)
    offered = re.findall('<option value="([^"]*)"( selected)?', shown)
    names = [name for name, _ in offered]
    assert names[0] == ""
    assert {queue["name"] for queue in stack.vars["stack_queues"]} <= {*names}
    assert [name for name in names if name.endswith(".dead")] == []
    assert [name for name, selected in offered if selected] == [busy]

    depth = text_of(card(shown, "depth"))
    for line in (f"{busy} ready", f"{busy}.dead ready", f"{busy} unacknowledged"):
        assert line in depth
    assert f"{idle} ready" not in depth
    moved = {"received", "delivered", "acknowledged"}
    assert {line for line, rate in rates(shown).items() if rate > 0} == moved
    assert {line for line, rate in rates(other).items() if rate == 0} == moved
    for tile in ("Messages ready", "In the dead queue"):
        assert re.search(rf"{tile} of {idle} \d+ ", text_of(other))


def test_the_page_of_graphs_takes_a_strange_queue_for_a_name(browser: Browser) -> None:
    name = """x"} or vector(1) or x{y="\\<img src=x onerror="document.title='taken in'">"""
    dom = browser.open(f"/consoles/stack.html?queue={quote(name)}", "graphs-strange", 1280, 1120)
    assert "<title>Message broker</title>" in dom
    assert f"Queue depth of {name}" in text_of(dom)
    for graph in ("messages", "depth"):
        assert "no data" in card(dom, graph)
    assert "Prometheus refuses" not in text_of(dom)
