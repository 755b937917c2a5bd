"""The stack with TLS and open to other hosts; by its name the last file of its scenario."""

import json
import re
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import INVENTORY, Answer, Stack, eventually, variables

QUEUE = variables()["stack_queue"]
SHOP = {"name": "shop", "send": [QUEUE], "receive": [QUEUE], "manage": [QUEUE], "amqp": True}
OPEN = {
    "stack_tls": "own",
    "stack_bind_address": "0.0.0.0",
    "monitoring_bind_address": "0.0.0.0",
    "rabbitmq_management_bind_address": "0.0.0.0",
    "stack_clients": [SHOP],
    "monitoring_prometheus_alerts": {"CertificateEnds": {"for": "10s"}},
}
CA = "/tmp/ca.pem"
DOORS = ("apps_publisher_port", "apps_subscriber_port")

# Sends and receives a hundred times a second until the file is there, and counts how it ended.
LOAD = """
import http.client, json, os, ssl, sys, threading, time
from collections import Counter
ca, token, publisher, subscriber = sys.argv[1:]
trust = ssl.create_default_context(cafile=ca)
login = {"Authorization": f"Bearer {token}"}
ended, end = Counter(), time.monotonic() + 300
def work(port, method, path):
    door = None
    while not os.path.exists("/tmp/enough") and time.monotonic() < end:
        start = time.monotonic()
        try:
            door = door or http.client.HTTPSConnection("localhost", port, timeout=30, context=trust)
            door.request(method, path, b"x" if method == "POST" else None, login)
            answer = door.getresponse()
            answer.read()
            ended[f"{method} {answer.status}"] += 1
        except (OSError, http.client.HTTPException) as error:
            ended[f"{method} {error!r}"] += 1
            door = None
        time.sleep(max(0, 0.04 + start - time.monotonic()))
ways = [(int(publisher), "POST", "/messages")] * 2 + [(int(subscriber), "GET", "/receive")] * 2
workers = [threading.Thread(target=work, args=way) for way in ways]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps(ended))
"""

# Publishes and gets a message by AMQP over TLS; prints its body.
AMQPS = """
import json, pika, ssl, sys
ca, port, token, queue = sys.argv[1:]
trust = pika.SSLOptions(ssl.create_default_context(cafile=ca), "localhost")
login = pika.PlainCredentials("shop", token)
with pika.BlockingConnection(
    pika.ConnectionParameters("localhost", int(port), credentials=login, ssl_options=trust)
) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("client.shop", queue, b"by AMQPS", mandatory=True)
    _, _, body = channel.basic_get(queue, auto_ack=True)
print(json.dumps(body.decode()))
"""


@dataclass
class Opened(Stack):
    """The stack as others reach it: by TLS, and with credentials."""

    def http(self, port: str, path: str, *curl: str) -> Answer:
        """Ask path of the port that the variable port sets, as who may; curl says more."""
        login = ("--cacert", CA)
        if port in DOORS:
            login += ("--header", f"Authorization: Bearer {self.token}")
        elif port != "rabbitmq_management_port":
            login += ("--user", f"monitoring:{self.secret('monitoring')}")
        return self.ask(port, path, *login, *curl)

    def ask(self, port: str, path: str, *curl: str) -> Answer:
        """Ask by TLS without credentials."""
        return super().http(port, path, *curl, top="https://localhost")

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().split()[0]

    @property
    def token(self) -> str:
        return self.secret("client_shop")

    def site(self, *args: str) -> str:
        done = self.playbook("site", "--extra-vars", json.dumps(OPEN), *args)
        assert done.returncode == 0, done.stdout[-3000:]
        return str(done.stdout)

    def trust(self) -> None:
        """Give the host what `make ca` prints."""
        told = self.playbook("ca").stdout
        pems = re.findall("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", told, re.S)
        text = "\n".join(line.strip() for pem in pems for line in pem.splitlines())
        self.run("echo %s > %s", text, CA)

    @contextmanager
    def load(self) -> Iterator[None]:
        """A hundred requests a second, none of which may fail."""
        self.run("rm -f /tmp/enough")
        ports = (str(self.vars[port]) for port in DOORS)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(self.python, LOAD, CA, self.token, *ports)
            try:
                yield
            finally:
                self.run("touch /tmp/enough")
            answers = ended.result()
        print(answers)
        assert answers.keys() <= {"POST 201", "GET 200"}, answers
        assert min(answers.values()) > 100


@pytest.fixture(scope="module")
def opened(stack: Stack) -> Opened:
    """The stack, opened by one run of the playbook."""
    opened = Opened(stack.host)
    opened.site()
    opened.trust()
    opened.wait_until_ready()
    return opened


def test_a_second_run_changes_nothing(opened: Opened) -> None:
    before = opened.starts()
    assert re.search(r"broker1 +: ok=\d+ +changed=0 ", opened.site())
    assert opened.starts() == before
    assert f"{opened.name}-front" in before


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_sends_and_receives(opened: Opened, version: str) -> None:
    sent = opened.http("apps_publisher_port", "/data", version, "--data", "message=hi")
    assert (sent.status, sent.json) == (201, {"Message sent": "hi"})
    got = opened.http("apps_subscriber_port", "/receive", version)
    assert (got.status, got.text) == (200, "hi\n")
    assert got.headers["x-request-id"]


def test_an_amqp_client_sends_and_receives(opened: Opened) -> None:
    port = str(opened.vars["rabbitmq_amqps_port"])
    assert opened.python(AMQPS, CA, port, opened.token, QUEUE) == "by AMQPS"


def test_prometheus_reaches_every_target_and_alertmanager(opened: Opened) -> None:
    def health() -> set[str]:
        return {target["health"] for target in opened.targets().values()}

    eventually(lambda: health() == {"up"}, 60, "every target is up")
    assert "front" in opened.targets()
    told = opened.http("monitoring_alertmanager_port", "/api/v2/alerts").text
    assert "Watchdog" in told
    ports = [each["scrapeUrl"].partition(":")[0] for each in opened.targets().values()]
    assert ports.count("https") == 2


def test_a_browser_shows_the_page_of_graphs(opened: Opened) -> None:
    from test_alerts import Browser, text_of

    browser = Browser(opened)
    login = f"monitoring:{opened.secret('monitoring')}"
    browser.top = f"https://{login}@localhost:{opened.vars['monitoring_prometheus_port']}"
    browser.usual.append(f"--ignore-certificate-errors-spki-list={key_hash(opened, 'prometheus')}")
    shown = text_of(browser.open("/consoles/stack.html", "graphs-tls", 1280, 1120))
    assert re.search(r"Broker up Messages ready \d+ ", shown), shown


def key_hash(opened: Opened, container: str) -> str:
    """Return the hash by which Chromium knows a container's key."""
    pem = Path(opened.secrets, f"tls_broker1_{container}.pem").read_text()
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(sha256(info).digest()).decode()


def test_doors_certificates_and_the_ca_change_and_no_request_fails(opened: Opened) -> None:
    assert opened.playbook("ca", "--extra-vars", "ca=next").returncode == 0
    opened.site()
    opened.trust()
    old = {port: opened.serial(port) for port in PORTS}
    with opened.load():
        for door in "publisher", "subscriber":
            opened.docker("restart", "--time", "10", opened.container(door))
            opened.wait_until_ready()
        assert opened.playbook("ca", "--extra-vars", "ca=use").returncode == 0
        before = opened.starts()
        opened.site()
        assert opened.starts() == before
        assert all(opened.serial(port) != old[port] for port in PORTS)
    assert opened.playbook("ca", "--extra-vars", "ca=forget").returncode == 0
    opened.site()
    opened.trust()
    assert opened.send("still there").status == 201
    assert opened.receive().text == "still there\n"
    test_prometheus_reaches_every_target_and_alertmanager(opened)


def test_a_certificate_that_ends_in_six_days_is_told(opened: Opened) -> None:
    folder = f"/etc/message-broker-stack/{opened.name}/front/tls"
