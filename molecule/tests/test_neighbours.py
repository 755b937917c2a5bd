"""What a neighbour reaches: another host on the host's network, which sends packets by it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Stack

# Addresses for documentation (RFC 5737), which no network has.
HOST, NEIGHBOUR = "198.51.100.1", "198.51.100.2"

# A network namespace that sends everything by the host, packets to 127.0.0.1 too.
MAKE = f"""
set -e
ip netns add neighbour
ip link add to-neighbour type veth peer name to-host netns neighbour
ip address add {HOST}/30 dev to-neighbour
ip link set to-neighbour up
ip -n neighbour address add {NEIGHBOUR}/30 dev to-host
ip -n neighbour link set to-host up
for device in all to-host; do
  echo 1 | ip netns exec neighbour tee /proc/sys/net/ipv4/conf/$device/route_localnet
  echo 0 | ip netns exec neighbour tee /proc/sys/net/ipv4/conf/$device/rp_filter
done
ip -n neighbour route add default via {HOST}
ip -n neighbour route add 127.0.0.1 via {HOST} dev to-host
"""

# Connects to each place, address:port, at once, and prints those that answered.
CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def answers(place):
    address, port = place.split(":")
    try:
        socket.create_connection((address, int(port)), 2).close()
    except OSError:
        return False
    return True
places = sys.argv[1:]
with ThreadPoolExecutor(len(places)) as pool:
    print(json.dumps([place for place, open in zip(places, pool.map(answers, places)) if open]))
"""

pytestmark = pytest.mark.usefixtures("neighbour")


@pytest.fixture(scope="module", autouse=True)
def _booted(stack: Stack) -> None:
    """Set the rules as systemd does at boot: the host has none, and other tests restart it."""
    script = f"/etc/message-broker-stack/{stack.name}/neighbours.sh"
    stack.run("sh %s close %s %s", script, stack.name, f"br-{network(stack)['Id'][:12]}")


@pytest.fixture
def neighbour(stack: Stack) -> Iterator[None]:
    # Deleted with its namespace, the other end goes some time later.
    stack.host.run("ip link delete to-neighbour; ip netns delete neighbour")
    stack.run("sh -c %s", MAKE)
    yield
    stack.run("ip link delete to-neighbour && ip netns delete neighbour")


@pytest.fixture
def published_on_all(stack: Stack) -> Iterator[str]:
    """A container that is published on every address of the host, as 18099; its address."""
    image = stack.inspect("exporter")["Config"]["Image"]
    serve = ["python3", "-m", "http.server", "8099"]
    run = ["run", "--detach", "--name", "neighbours-open", "--network", stack.name]
    stack.docker(*run, "--publish=0.0.0.0:18099:8099", "--entrypoint", serve[0], image, *serve[1:])
    yield address(stack, "neighbours-open")
    stack.docker("rm", "--force", "neighbours-open")


def containers(stack: Stack) -> list[dict[str, Any]]:
    names = stack.docker("ps", "--filter", f"network={stack.name}", "--format", "{{.Names}}")
    found: list[dict[str, Any]] = json.loads(stack.docker("inspect", *names.split()))
    return found


def address(stack: Stack, container: str) -> str:
    inspected = json.loads(stack.docker("inspect", container))[0]
    return str(inspected["NetworkSettings"]["Networks"][stack.name]["IPAddress"])


def network(stack: Stack) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(stack.docker("network", "inspect", stack.name))
    return found[0]


def places(stack: Stack) -> dict[str, str]:
    """Return every place where a published port might answer, and what it is.

    Closed is what must not answer whatever the port is published on.
    """
    gateway = network(stack)["IPAM"]["Config"][0]["Gateway"]
    table: dict[str, str] = {}
    for container in containers(stack):
        own = container["NetworkSettings"]["Networks"][stack.name]["IPAddress"]
        for inner, published in container["NetworkSettings"]["Ports"].items():
            for binding in published or []:
                port, everywhere = binding["HostPort"], binding["HostIp"] == "0.0.0.0"
                name = f"{container['Name']} {binding['HostIp']}:{port}"
                table[f"{own}:{inner.split('/')[0]}"] = f"closed {name}"
                for given in HOST, gateway:
                    table[f"{given}:{port}"] = f"{'open' if everywhere else 'closed'} {name}"
                if not everywhere:
                    table[f"127.0.0.1:{port}"] = f"closed {name}"
    return table


def reached(stack: Stack, wanted: dict[str, str]) -> dict[str, str]:
    """Return those of the places that answer the neighbour."""
    connect = "ip netns exec neighbour python3 -c %s" + " %s" * len(wanted)
    return {place: wanted[place] for place in json.loads(stack.run(connect, CONNECT, *wanted))}


def test_a_neighbour_reaches_what_is_published_for_it_and_nothing_else(stack: Stack) -> None:
    table = places(stack)
    assert len(table) > 4 * 5, table
    meant = {place: what for place, what in table.items() if what.startswith("open")}
    assert reached(stack, table) == meant


def test_a_port_that_is_published_on_all_addresses_goes_on(
    stack: Stack, published_on_all: str
) -> None:
    port = f"{HOST}:18099"
    curl = ("curl", "--silent", "--fail", "--max-time", "10", "--output", "/dev/null")
    table = places(stack)
    stack.run("curl --silent --fail --retry 20 --retry-connrefused --retry-delay 1 127.0.0.1:18099")
    assert reached(stack, table).keys() >= {port}
    assert f"{published_on_all}:8099" not in reached(stack, table)
    # The host itself, also at the container's own address, which nobody else reaches.
    stack.run(" ".join([*curl, port]))
    stack.run(" ".join([*curl, f"{published_on_all}:8099"]))
    # A container of the network by the host's address, and what the containers ask of others.
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
    stack.docker("exec", "neighbours-open", "python3", "-c", ask, f"http://{port}")
    serve = f"ip netns exec neighbour timeout 30 python3 -m http.server --bind {NEIGHBOUR} 8098"
    answers = f"curl --silent --fail --max-time 1 --output /dev/null {NEIGHBOUR}:8098"
    wait = f"for try in $(seq 50); do {answers} && break; sleep 0.2; done"
    stack.run("sh -c %s", f"{serve} >/dev/null 2>&1 & {wait}")
    stack.docker("exec", "neighbours-open", "python3", "-c", ask, f"http://{NEIGHBOUR}:8098")


def test_without_its_rules_the_host_passes_a_neighbours_packets_on(stack: Stack) -> None:
    """What the other tests look for can be seen, so that they can fail."""
    version = stack.docker("version", "--format", "{{.Server.Version}}")
    if int(version.split(".")[0]) >= 28:
        pytest.skip(f"Docker {version} keeps neighbours out by itself")
    script = f"/etc/message-broker-stack/{stack.name}/neighbours.sh"
    table = {place: what for place, what in places(stack).items() if what.startswith("closed")}
    stack.run("sh %s open %s", script, stack.name)
    try:
        assert stack.host.run("sh %s look %s", script, stack.name).rc == 3
        own = {
            address(stack, container["Name"])
            for container in containers(stack)
            if any(container["NetworkSettings"]["Ports"].values())
        }
        seen = {place.split(":")[0] for place in reached(stack, table)}
        assert own | {"127.0.0.1"} == seen
    finally:
        bridge = f"br-{network(stack)['Id'][:12]}"
        stack.run("sh %s close %s %s", script, stack.name, bridge)
    assert stack.run("sh %s look %s", script, stack.name) == ""
