"""The stack with TLS and open to other hosts; by its name the last file of its scenario."""

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from conftest import CA, DOORS, Guarded, Stack, eventually, variables
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from test_alerts import Browser, text_of
from test_neighbours import HOST, NEIGHBOUR, neighbour, places, reached  # noqa: F401

QUEUE = variables()["stack_queue"]
SHOP = {"name": "shop", "send": [QUEUE], "receive": [QUEUE], "manage": [QUEUE], "amqp": True}
OPEN = {
    "stack_tls": "own",
    "stack_bind_address": "0.0.0.0",
    "monitoring_bind_address": "0.0.0.0",
    "rabbitmq_management_bind_address": "0.0.0.0",
    "stack_clients": [SHOP],
    "monitoring_prometheus_alerts": {"CertificateEndsSoon": {"for": "10s"}},
}
# Another client beside the neighbour, by the same way.
OTHER = "198.51.100.5"

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

# Prints the certificate that a port shows.
SHOW = """
import json, ssl, sys
print(json.dumps(ssl.get_server_certificate(("127.0.0.1", int(sys.argv[1])))))
"""

# Asks each port as a neighbour, by plain HTTP, and by TLS with each of some credentials; prints the
# statuses, 0 where no HTTP came back.
ASK = """
import http.client, json, ssl, sys
host, ca, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trust = ssl.create_default_context(cafile=ca)
trust.check_hostname = False # the neighbour's network came after the certificate
def status(port, path, login, tls):
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    door = kind(host, port, timeout=10, **({"context": trust} if tls else {}))
    try:
        door.request("GET", path, headers={"Authorization": login} if login else {})
        return door.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
print(json.dumps([
    [status(port, path, logins[-1], False), *(status(port, path, login, True) for login in logins)]
    for port, path, *logins in rows
]))
"""

# Runs a command while it records what passes the network device, and prints which marks it saw.
CAPTURE = """
import json, socket, subprocess, sys, threading
device, command, marks = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
wire, packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)), []
wire.bind((device, 0))
wire.settimeout(2)
def record():
    try:
        while True:
            packets.append(wire.recv(65536))
    except TimeoutError:
        pass
recorder = threading.Thread(target=record)
recorder.start()
done = subprocess.run(command, capture_output=True, text=True)
recorder.join()
seen = [mark for mark in marks if any(mark.encode() in packet for packet in packets)]
print(json.dumps([done.stdout + done.stderr, seen]))
"""

# Holds many connections from one address, while another one sends; prints how the other fared.
FLOOD = """
import errno, http.client, json, resource, socket, ssl, sys, time
host, port, ca, token, one, other = sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
trust = ssl.create_default_context(cafile=ca)
trust.check_hostname = False
def connect(begun):
    held = socket.socket()
    held.setblocking(False)
    held.bind((one, 0))
    held.connect_ex((host, int(port)))
    return held, begun
def begin(crowd):
    for held, begun in crowd:
        try:
            held.send(begun)
        except OSError:
            pass # refused, or closed
def fared():
    start = time.monotonic()
    door = http.client.HTTPSConnection(
        host, int(port), timeout=10, context=trust, source_address=(other, 0)
    )
    door.request("POST", "/messages", b"x", {"Authorization": f"Bearer {token}"})
    status = door.getresponse().status
    door.close()
    return [status, time.monotonic() - start]
told = {}
for name, count, begun in (
    ("half handshakes", 5000, bytes.fromhex("160301020001")),
    ("idle connections", 3000, b""),
):
    crowd, answers = [], []
    for number in range(count):
        crowd.append(connect(begun))
        if number % 500 == 499:
            begin(crowd[-500:])
            answers.append(fared())
    answers += [fared() for _ in range(20)]
    for held, _ in crowd:
        held.close()
    told[name] = answers
# Headers, one byte a second.
slow = []
for number in range(300):
    try:
        held = trust.wrap_socket(socket.create_connection((host, int(port)), 5, (one, 0)))
        held.send(b"GET / HTTP/1.1\\r\\nX-Slow: ")
        slow.append(held)
    except OSError:
        pass
answers, end = [], time.monotonic() + 12
while time.monotonic() < end:
    for held in slow:
        try:
            held.send(b"x")
        except OSError:
            pass
    answers.append(fared())
    time.sleep(1)
told["slow headers"] = answers
print(json.dumps(told))
"""


@dataclass
class Opened(Guarded):
    """The stack, opened by variables of the command line."""

    def as_neighbour(self, script: str, *args: str) -> object:
        """Run a Python script in the neighbour's network; what it printed as JSON."""
        command = "ip netns exec neighbour python3 -c %s" + " %s" * len(args)
        return json.loads(self.run(command, script, *args))

    def certificate(self, port: str) -> x509.Certificate:
        """Return the certificate that a port shows."""
        pem = self.python(SHOW, str(self.vars[port]))
        return x509.load_pem_x509_certificate(pem.encode())

    def site(self, *args: str) -> str:
        done = self.playbook("site", "--extra-vars", json.dumps(OPEN), *args)
        assert done.returncode == 0, done.stdout[-3000:]
        return str(done.stdout)

    def ca(self, change: str = "") -> str:
        done = self.playbook("ca", "--extra-vars", json.dumps({**OPEN, "ca": change}))
        assert done.returncode == 0, done.stdout[-3000:]
        return str(done.stdout)

    def trust(self) -> None:
        """Give the host what `make ca` prints."""
        told = self.ca()
        pems = re.findall("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", told, re.S)
        assert pems
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


def health(opened: Opened) -> set[str]:
    return {target["health"] for target in opened.targets().values()}


def test_prometheus_reaches_every_target_and_alertmanager(opened: Opened) -> None:
    eventually(lambda: health(opened) == {"up"}, 60, "every target is up")
    targets = opened.targets()
    assert "front" in targets
    schemes = [each["scrapeUrl"].partition(":")[0] for each in targets.values()]
    assert schemes.count("https") == 2
    alerts = opened.http("monitoring_alertmanager_port", "/api/v2/alerts")
    assert "Watchdog" in alerts.text
    eventually(
        lambda: set(opened.query("tls_handshake_up").values()) == {1.0}, 30, "TLS is trusted"
    )
    assert len(opened.query("tls_certificate_not_after_timestamp_seconds")) == 5


def test_a_browser_shows_the_page_of_graphs(opened: Opened) -> None:
    browser = Browser(opened)
    login = f"monitoring:{opened.secret('monitoring')}"
    browser.top = f"https://{login}@localhost:{opened.vars['monitoring_prometheus_port']}"
    # It trusts one key, where a user would have it trust the CA.
    key = opened.certificate("monitoring_prometheus_port").public_key()
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    trusted = b64encode(sha256(info).digest()).decode()
    browser.usual.append(f"--ignore-certificate-errors-spki-list={trusted}")
    shown = text_of(browser.open("/consoles/stack.html", "graphs-tls", 1280, 1120))
    assert re.search(r"Broker up Messages ready \d+ ", shown), shown


@pytest.mark.usefixtures("neighbour")
def test_a_neighbour_reaches_what_is_open_and_needs_tls_and_credentials(opened: Opened) -> None:
    table = places(opened)
    meant = {place for place, what in table.items() if what.startswith("open")}
    assert reached(opened, table).keys() == meant
    ports = {place.partition(":")[2] for place in meant}
    bearer = ("", "Bearer wrong", f"Bearer {opened.token}")
    people, scrapes, admin = (
        ("", basic(user, "wrong"), basic(user, opened.secret(file)))
        for user, file in (
            ("monitoring", "monitoring"),
            ("prometheus", "monitoring_scrape"),
            ("admin", "rabbitmq_admin"),
        )
    )
    rows = [
        ("apps_publisher_port", "/openapi.json", *bearer),
        ("apps_subscriber_port", "/queues", *bearer),
        ("apps_publisher_port", "/metrics", *scrapes),
        ("apps_subscriber_port", "/metrics", *people),
        ("monitoring_exporter_port", "/metrics", *scrapes),
        ("rabbitmq_metrics_port", "/metrics", *people),
        ("monitoring_prometheus_port", "/api/v1/alerts", *people),
        ("monitoring_alertmanager_port", "/api/v2/silences", *people),
        ("rabbitmq_management_port", "/api/overview", *admin),
    ]
    asked = [(opened.vars[port], *row) for port, *row in rows]
    # AMQP over TLS has a test of its own.
    assert ports == {str(port) for port, *_ in asked} | {str(opened.vars["rabbitmq_amqps_port"])}
    told = opened.as_neighbour(ASK, HOST, CA, json.dumps(asked))
    assert isinstance(told, list)
    for row, (plain, *by_tls) in zip(rows, told, strict=True):
        assert plain in (0, 400), row
        assert by_tls == [401, 401, 200], row


def basic(user: str, password: str) -> str:
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.mark.usefixtures("neighbour")
def test_nobody_on_the_way_reads_a_message_or_a_password(opened: Opened) -> None:
    body, control = "words-for-one-reader", "words-for-everybody"
    top = "curl --silent --show-error --max-time 10 --cacert " + CA
    token, people = opened.token, opened.secret("monitoring")

    def ask(port: str, more: str, scheme: str = "https") -> str:
        number = opened.vars[port]
        name = f"--resolve localhost:{number}:{HOST}"
        return f"{top} {name} {more.format(f'{scheme}://localhost:{number}')}"

    login = f"-H 'Authorization: Bearer {token}'"
    commands = [
        ask("apps_publisher_port", f"{login} -d message={body} {{}}/data"),
        ask("apps_subscriber_port", f"{login} {{}}/receive"),
        ask("monitoring_prometheus_port", f"-u monitoring:{people} {{}}/api/v1/alerts"),
        ask("monitoring_alertmanager_port", f"-u monitoring:{people} {{}}/api/v2/status"),
        # Seen by whoever looks: the test itself can see.
        ask("apps_publisher_port", f"-H 'X-Control: {control}' {{}}/", scheme="http") + " || true",
    ]
    inside = ["ip", "netns", "exec", "neighbour", "sh", "-ec", "; ".join(commands)]
    secrets = [body, token, people, b64encode(f"monitoring:{people}".encode()).decode()]
    marks = json.dumps([*secrets, control])
    said, seen = opened.python(CAPTURE, "to-neighbour", json.dumps(inside), marks)
    assert body in said
    assert "Watchdog" in said
    assert seen == [control]


@pytest.mark.usefixtures("neighbour")
def test_a_client_that_floods_the_front_keeps_no_other_waiting(opened: Opened) -> None:
    opened.run(f"ip -n neighbour address add {OTHER}/32 dev to-host")
    opened.run(f"ip route add {OTHER}/32 dev to-neighbour")
    before, port = opened.starts(), str(opened.vars["apps_publisher_port"])
    told = opened.as_neighbour(FLOOD, HOST, port, CA, opened.token, NEIGHBOUR, OTHER)
    assert isinstance(told, dict)
    for kind, answers in told.items():
        slowest = max(seconds for _, seconds in answers)
        print(f"{kind}: {len(answers)} answers, the slowest after {slowest:.2f} s")
        assert {status for status, _ in answers} == {201}, kind
        assert slowest < 1, kind
    assert opened.starts() == before
    opened.api(f"/queues/%2F/{QUEUE}/contents", "admin", "--request", "DELETE")


def test_doors_certificates_and_the_ca_change_and_no_request_fails(opened: Opened) -> None:
    opened.ca("next")
    opened.site()
    opened.trust()
    ports = ["apps_publisher_port", "rabbitmq_amqps_port", "monitoring_prometheus_port"]
    old = {port: opened.certificate(port) for port in ports}
    with opened.load():
        for door in "publisher", "subscriber":
            opened.docker("restart", "--time", "10", opened.container(door))
            opened.wait_until_ready()
        opened.ca("use")
        before = opened.starts()
        opened.site()
        assert opened.starts() == before
    for port in ports:
        assert opened.certificate(port).issuer != old[port].issuer, port
    eventually(lambda: health(opened) == {"up"}, 60, "every target is up")
    # That it has loaded other files must not count as a stop, after which nothing restarts.
    pid = opened.inspect("front")["State"]["Pid"]
    opened.run("kill -9 %s", str(pid))
    eventually(
        lambda: opened.inspect("front")["State"]["Pid"] not in (0, pid), 30, "the front runs again"
    )


def test_a_certificate_that_ends_in_six_days_is_told(opened: Opened) -> None:
    folder = f"/etc/message-broker-stack/{opened.name}/prometheus/tls"
    ca, key = (opened.secrets / f"tls_ca{end}.pem" for end in ("", "_key"))
    old, issuer = opened.certificate("monitoring_prometheus_port"), ca.read_bytes()
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    short = (
        x509.CertificateBuilder(
            x509.load_pem_x509_certificate(issuer).subject, old.subject, old.public_key()
        )
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(1))
        .not_valid_after(datetime.now(UTC) + timedelta(6))
        .add_extension(names, critical=False)
        .sign(load_pem_private_key(key.read_bytes(), None), SHA256())
    )
    # Prometheus reads it at the next connection.
    pem = short.public_bytes(Encoding.PEM).decode()
    own = (opened.secrets / "tls_broker1_prometheus_key.pem").read_text()
    opened.run("printf %%s %s > %s/server.pem", pem + own, folder)
    eventually(lambda: "CertificateEndsSoon" in opened.firing(), 90, "the end is told")
