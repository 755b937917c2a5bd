"""What becomes of confirmed messages, and for how long nothing is confirmed, while hosts go."""

import json
import os
import time

import pytest
from cluster import HOSTS, Cluster, of_hosts, outside
from conftest import eventually
from load import LONG_PAUSE, PUBLISHER, load

# What no chain of iptables has.
WRONG = {("INPUT", "-o"), ("OUTPUT", "-i")}
# How often each outage is made.
rounds = pytest.mark.parametrize("turn", range(int(os.environ.get("ROUNDS", "1"))))


@pytest.fixture
def cluster() -> Cluster:
    """Return the hosts once all doors and members are there."""
    hosts = of_hosts()
    hosts.wait_until_whole()
    return hosts


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
