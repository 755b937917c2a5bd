"""Three hosts, one broker: what was confirmed is handed out, whichever host goes."""

import json
import os
import re
import time

import pytest
from cluster import HOSTS, QUEUE, Cluster, of_hosts, outside
from conftest import Guarded, eventually
from load import LONG_PAUSE, PUBLISHER, SUBSCRIBER, load, rate

# What no chain of iptables has.
WRONG = {("INPUT", "-o"), ("OUTPUT", "-i")}
# How many messages the single host has, and how many of them one request sends.
WAITING, TOGETHER = 100_000, 10_000
# How often each outage is made.
rounds = pytest.mark.parametrize("turn", range(int(os.environ.get("ROUNDS", "1"))))


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


@rounds
def test_the_host_of_the_leader_is_killed(cluster: Cluster, turn: int) -> None:
    leader = cluster.leader()
    with load(cluster, f"{turn}: {leader}, which leads, killed") as clients:
        outside("kill", cluster.machine(leader))
        time.sleep(15)
        outside("start", cluster.machine(leader))
        cluster.wait_until_whole()
    assert clients.stall(without=leader) <= 5


@rounds
def test_the_broker_that_leads_is_frozen(cluster: Cluster, turn: int) -> None:
    leader = cluster.leader()
    container = cluster.first.container("rabbitmq")
    with load(cluster, f"{turn}: the broker of {leader}, which leads, frozen") as clients:
        cluster.hosts[leader].docker("pause", container)
        time.sleep(25)
        cluster.hosts[leader].docker("unpause", container)
        cluster.wait_until_whole()
    assert clients.stall() <= 15


@rounds
def test_a_host_is_cut_off(cluster: Cluster, turn: int) -> None:
    leader = cluster.leader()
    host = cluster.hosts[leader]
    way = [(chain, side) for chain in ("INPUT", "OUTPUT", "FORWARD") for side in ("-i", "-o")]
    rules = [f"{chain} {side} eth0 -j DROP" for chain, side in way if (chain, side) not in WRONG]
    with load(cluster, f"{turn}: {leader}, which leads, cut off") as clients:
        host.run("; ".join(f"iptables -I {rule}" for rule in rules))
        time.sleep(20)
        sent = host.http(PUBLISHER, "/queues/audit/messages", "--data", "on the cut side")
        assert sent.status == 503, sent.text
        time.sleep(40)
        host.run("; ".join(f"iptables -D {rule}" for rule in rules))
        cluster.wait_until_whole()
    assert clients.stall(without=leader) <= 15


@rounds
def test_two_hosts_are_killed(cluster: Cluster, turn: int) -> None:
    with load(cluster, f"{turn}: two hosts killed") as clients:
        for name in HOSTS[1:]:
            outside("kill", cluster.machine(name))
        time.sleep(5)
        before = clients.confirmed()
        sent = cluster.first.http(PUBLISHER, "/queues/audit/messages", "--data", "to one of three")
        assert sent.status == 503, sent.text
        time.sleep(10)
        assert clients.confirmed() == before
        for name in HOSTS[1:]:
            outside("start", cluster.machine(name))
        second = cluster.hosts[HOSTS[1]]
        eventually(lambda: second.api("/overview").status == 200, 90, "the second broker is back")
        back = eventually(lambda: clients.confirmed() > before, 10, "messages are confirmed again")
        print(f"\nconfirmed again {back:.1f} s after the second broker was back")
        cluster.wait_until_whole()


@rounds
def test_every_broker_is_changed_in_turn(cluster: Cluster, turn: int) -> None:
    change = json.dumps({"rabbitmq_disk_free_limit": f"{1000 + turn}MB"})
    with load(cluster, f"{turn}: every broker changed", pause=LONG_PAUSE) as clients:
        done = cluster.first.playbook("site", "--extra-vars", change)
        assert done.returncode == 0, done.stdout[-3000:]
        cluster.wait_until_whole()
    assert clients.stall() <= 3
