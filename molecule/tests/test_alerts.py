"""What is watched, what is alerted, and how it looks in a browser."""

import base64
import csv
import html
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import PROJECT, Stack, eventually
from prometheus_client.parser import text_string_to_metric_families

PUBLISH = """
import sys, pika
password, port, count, *names = sys.argv[1:]
credentials = pika.PlainCredentials("publisher", password)
parameters = pika.ConnectionParameters("127.0.0.1", int(port), credentials=credentials)
with pika.BlockingConnection(parameters) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    for number in range(int(count)):
        channel.basic_publish(*names, str(number).encode())
print("null")
"""


class Browser:
    """Chromium, in the network of the disposable host."""

    def __init__(self, stack: Stack) -> None:
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
        usual = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
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


def active(stack: Stack) -> set[str]:
    """Return the names of the alerts that Alertmanager would notify of."""
    answer = stack.http("monitoring_alertmanager_port", "/api/v2/alerts?inhibited=false")
    return {alert["labels"]["alertname"] for alert in answer.json}


def notified(stack: Stack) -> list[tuple[str, str]]:
    """Return name and status of each notification in the files."""
    records = [json.loads(line.split("\t", 2)[2]) for line in stack.lines("alerts")]
    return [
        (record["groupLabels"]["alertname"], record["status"])
        for record in records
        if "groupLabels" in record
    ]


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
    old = {name for name in told() if name not in {line["name"] for line in listed}}
    assert old == {
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
    eventually(lambda: ("Watchdog", "firing") in notified(stack), 40, "it was notified")


def test_a_stopped_broker_is_one_notification_and_so_is_its_start(
    stack: Stack, browser: Browser
) -> None:
    before = len(notified(stack))

    def told() -> list[tuple[str, str]]:
        return notified(stack)[before:]

    stack.docker("stop", stack.container("rabbitmq"))
    start = time.monotonic()

    def passed() -> str:
        return f"{time.monotonic() - start:.0f} s"

    eventually(lambda: "RabbitMQDown" in stack.firing(), 60, "RabbitMQDown fires")
    print("fires after", passed())
    build = stack.http("monitoring_prometheus_port", "/api/v1/status/buildinfo").json["data"]
    # Debian's 2.53 has the old pages, at another address.
    tab = "/classic/alerts" if build["version"].startswith("2.") else "/alerts"
    shown = text_of(browser.open(tab, "alerts-tab", 1280, 480))
    assert re.search(r"RabbitMQDown\W+1 active", shown), shown[:3000]
    assert "severity high" in shown or 'severity="high"' in shown

    eventually(lambda: "RabbitMQDown" in active(stack), 60, "Alertmanager has it")
    eventually(lambda: ("RabbitMQDown", "firing") in told(), 60, "it is in a file")
    print("in a file after", passed())
    # Its own targets are down, too: that is held back.
    eventually(lambda: "TargetDown" in stack.firing(), 60, "TargetDown fires")

    stack.docker("start", stack.container("rabbitmq"))
    start = time.monotonic()
    eventually(lambda: stack.firing() == {"Watchdog"}, 120, "it ends in Prometheus")
    print("ends after", passed())
    eventually(lambda: active(stack) == {"Watchdog"}, 120, "it ends in Alertmanager")
    eventually(lambda: ("RabbitMQDown", "resolved") in told(), 120, "its end is in a file")
    print("end in a file after", passed())
    assert told() == [("RabbitMQDown", "firing"), ("RabbitMQDown", "resolved")]
    stack.wait_until_ready()


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


@pytest.mark.usefixtures("empty_queue")
def test_the_page_of_graphs_shows_what_goes_on(stack: Stack, browser: Browser) -> None:
    graphs = ["messages", "depth", "requests", "latency", "connections", "memory", "disk"]
    with load(stack):
        eventually(
            lambda: max(stack.query('rate(http_requests_total{route="/data"}[1m])').values()) > 1,
            60,
            "the load is in Prometheus",
        )
        desktop = browser.open("/consoles/stack.html", "graphs", 1280, 1120)
        browser.open("/consoles/stack.html", "graphs-phone", 390, 3200)
    for graph in graphs:
        card = re.search(rf'<(\w+)[^>]* id="{graph}".*?</\1>', desktop, re.DOTALL)
        assert card, f"{graph} is missing"
        assert "stroke: var" in card[0], f"{graph} has no line"
    shown = text_of(desktop)
    assert "Watchdog" not in shown
    assert re.search(r"Broker up Messages ready \d+ .* Alerts none", shown), shown


@pytest.mark.usefixtures("empty_queue")
def test_a_backlog_raises_an_alert_until_it_is_received(stack: Stack) -> None:
    names = stack.vars["stack_exchange"], stack.vars["stack_queue"]
    port, count = (
        stack.vars["rabbitmq_amqp_port"],
        stack.vars["monitoring_prometheus_backlog_messages"] + 1,
    )
    stack.python(PUBLISH, stack.password("publisher"), str(port), str(count), *names)
    eventually(lambda: "RabbitMQBacklog" in stack.firing(), 60, "the backlog's alert fires")
    eventually(lambda: stack.receive().text == "No message available\n", 90, "all are received")
    eventually(lambda: stack.firing() == {"Watchdog"}, 60, "it ends")
