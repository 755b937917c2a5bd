"""Three hosts, one broker: what was confirmed is handed out, whichever host goes."""

import json
import re
import time

import pytest
from cluster import HOSTS, QUEUE, Cluster, of_hosts
from conftest import Guarded, eventually
from load import LONG_PAUSE, PUBLISHER, SUBSCRIBER, load, rate

# How many messages the single host has, and how many of them one request sends.
WAITING, TOGETHER = 100_000, 10_000


@pytest.fixture(scope="module")
def hosts() -> Cluster:
    return of_hosts()


@pytest.fixture
def cluster(hosts: Cluster) -> Cluster:
    """Return the hosts once all doors and members are there."""
    hosts.wait_until_whole()
    return hosts


def purge(host: Guarded) -> None:
    done = host.api(f"/queues/%2F/{QUEUE}/contents", "admin", "--request", "DELETE")
    assert done.status == 204, done.text


def fill(host: Guarded) -> None:
    """Send the numbers from 1 to WAITING, in order."""
    for start in range(0, WAITING, TOGETHER):
        lines = "".join(f'"{start + number}"\n' for number in range(1, TOGETHER + 1))
        sent = host.http(PUBLISHER, f"/queues/{QUEUE}/batch", "--data-binary", lines)
        assert sent.json == {"sent": TOGETHER}, sent.text


# The first one: prepare leaves a single host.
def test_one_host_becomes_three(hosts: Cluster) -> None:
    single = Cluster({HOSTS[0]: hosts.first})
    alone = rate(single)
    purge(hosts.first)
    fill(hosts.first)
    with load(single, "from one host to three", "audit", LONG_PAUSE) as clients:
        done = single.first.playbook("site")
        assert done.returncode == 0, done.stdout[-3000:]
        hosts.wait_until_whole()
    bodies: list[str] = []
    for place in range(200):
        door = hosts.hosts[HOSTS[place % 3]]
        got = door.http(SUBSCRIBER, f"/queues/{QUEUE}/messages?max=1000&wait=2")
        bodies += [json.loads(line)["body"] for line in got.text.splitlines()]
        if len(bodies) >= WAITING:
            break
    assert bodies == [str(number) for number in range(1, WAITING + 1)]
    print(f"\nmessages a second in batches: one host {alone:,.0f}, three hosts {rate(hosts):,.0f}")
    purge(hosts.first)
    assert clients.stall() <= 10


def test_a_message_that_came_in_at_one_host_goes_out_at_another(cluster: Cluster) -> None:
    for place, name in enumerate(HOSTS):
        sent = cluster.hosts[name].http(PUBLISHER, "/data", "--data", f"message=by {name}")
        assert sent.status == 201, sent.text
        other = cluster.hosts[HOSTS[(place + 1) % 3]].http(SUBSCRIBER, "/receive")
        assert (other.status, other.text) == (200, f"by {name}\n")


def leased(host: Guarded) -> str:
    """Return the receipt of a message that comes in and is leased at this host's doors."""
    assert host.http(PUBLISHER, "/data", "--data", "message=leased").status == 201
    got = host.http(SUBSCRIBER, "/receive?ack=manual&wait=5")
    assert (got.status, got.text) == (200, "leased\n")
    return got.headers["x-receipt"]


def settled(host: Guarded, receipt: str, how: str = "ack") -> int:
    """Return how a host's door answers to a receipt."""
    body = (
        "--header",
        "Content-Type: application/json",
        "--data",
        json.dumps({"receipt": receipt}),
    )
    return host.http(SUBSCRIBER, f"/{how}", *body).status


@pytest.mark.parametrize("owner", HOSTS)
def test_a_receipt_is_good_at_every_door(cluster: Cluster, owner: str) -> None:
    for other in set(HOSTS) - {owner}:
        receipt = leased(cluster.hosts[owner])
        assert settled(cluster.hosts[other], receipt, "extend") == 200
        assert settled(cluster.hosts[other], receipt) == 200
        assert settled(cluster.hosts[owner], receipt) == 410
    assert cluster.first.http(SUBSCRIBER, "/receive").text == "No message available\n"


def test_a_receipt_of_a_door_that_was_killed_is_gone_and_its_message_comes_again(
    cluster: Cluster,
) -> None:
    owner, other = cluster.hosts["broker2"], cluster.hosts["broker3"]
    receipt = leased(owner)
    pid = owner.docker("inspect", "--format", "{{.State.Pid}}", owner.container("subscriber"))
    owner.run("kill -9 %s", pid.strip())
    eventually(lambda: settled(other, receipt) == 410, 60, "the receipt is gone")
    assert other.http(SUBSCRIBER, "/receive?wait=10").text == "leased\n"


def test_a_request_is_found_in_the_logs_of_all_hosts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = f"order-{time.time_ns()}"
    more = ("--header", f"X-Request-Id: {order}", "--data", "message=find me")
    assert cluster.hosts["broker3"].http(PUBLISHER, "/data", *more).status == 201
    assert cluster.hosts["broker2"].http(SUBSCRIBER, "/receive?wait=5").text == "find me\n"
    monkeypatch.setenv("FIND", order)

    def way() -> list[tuple[str, str]]:
        """Return host and service of each line."""
        shown = cluster.first.playbook("logs").stdout
        return re.findall(rf"\S+ +(broker\d) +(\w+) .*{order}", shown)

    both = [("broker3", "publisher"), ("broker2", "subscriber")]
    eventually(lambda: way() == both, 60, "both doors' lines are found, in order of time")


def test_a_door_whose_broker_is_away_tells_of_the_queues(cluster: Cluster) -> None:
    host = cluster.hosts["broker2"]
    # With this header its front leaves a request to the host's own door.
    own = ("--header", "X-Stack-Hop: broker2")
    host.docker("stop", host.container("rabbitmq"))
    try:
        told = host.http(SUBSCRIBER, "/queues", *own)
        assert told.status == 200, told.text
        assert QUEUE in [queue["name"] for queue in told.json["queues"]]
        assert host.api("/queues").status == 0, "its broker is away"
    finally:
        host.docker("start", host.container("rabbitmq"))


def test_every_queue_has_a_member_on_each_host(cluster: Cluster) -> None:
    told = cluster.api("/queues?columns=name,type,members")
    assert {queue["type"] for queue in told} == {"quorum"}
    assert {len(queue["members"]) for queue in told} == {3}


def test_a_second_run_changes_nothing(cluster: Cluster) -> None:
    done = cluster.first.playbook("site")
    assert done.returncode == 0, done.stdout[-3000:]
    for name in HOSTS:
        assert re.search(rf"{name} +: ok=\d+ +changed=0 ", done.stdout), done.stdout[-3000:]
