"""Filters by which the preflight compares the hosts of a cluster.

Each host has told in the fact __preflight_told: nodes (its list of the cluster's hosts), address,
addresses (all its own), binds (addresses of published ports, by their variables), tls, node (the
host's name in that of the RabbitMQ node), same (values that all must share, by their variables) and
version (of RabbitMQ, that opened the data last; empty where there are none).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations, permutations
from operator import getitem
from typing import Any

Host = Mapping[str, Any]
Hosts = Mapping[str, Host]

SIZES = (1, 3, 5)
# Seconds by which clocks may differ.
CLOCKS = 5
# Variables of addresses at which the other hosts ask; the management UI is for people.
CROSSING = ("stack_bind_address", "monitoring_bind_address", "stack_cluster_address")
# What people may give instead of what a run generates; never shown.
SECRET = re.compile(r"(stack|rabbitmq)_\w*(password|cookie|tokens|salt)")
# RabbitMQ's series in whose place a new major version came: neighbours like 4.0 and 4.1.
LAST_OF_MAJOR = {3: 13}


def preflight_crossing(ports: Mapping[str, object], addresses: Mapping[str, str]) -> list[int]:
    """Return those of ports, by their variables, that the other hosts must reach.

    addresses has the variable of each one's address. A port is empty where its role is not run.
    """
    return sorted(
        int(str(port)) for name, port in ports.items() if addresses[name] in CROSSING and port != ""
    )


def preflight_version(host: Host, stack: str) -> str:
    """Return the version that opened the broker's data last; nothing where there are none.

    host is what host_info tells.
    """
    volumes = [volume["Name"] for volume in host["volumes"]]
    record = host["records"].get("rabbitmq.version", "")
    return str(record).partition(" ")[0] if f"{stack}-rabbitmq" in volumes else ""


def preflight_cluster_faults(
    hosts: Hosts, nodes: Sequence[str], host: str, known: Collection[str], running: Collection[str]
) -> list[str]:
    """Return why the hosts of nodes, which host has as stack_nodes, cannot be one cluster.

    hosts are Ansible's hostvars, known all hosts of the inventory, and running those of this run.
    """
    faults = list(_list_faults(nodes, host, known, running))
    if faults:
        return faults
    # Hostvars are put together at each access.
    named = {name: hosts[name] for name in nodes}
    # Who has told nothing is a cluster of its own.
    told = {name: one.get("__preflight_told", {"nodes": [name]}) for name, one in named.items()}
    return _differing("stack_nodes", {name: one["nodes"] for name, one in told.items()}) or [
        *_told_faults(told),
        *_secret_faults(named),
    ]


def _list_faults(
    nodes: Sequence[str], host: str, known: Collection[str], running: Collection[str]
) -> Iterator[str]:
    if len(nodes) not in SIZES:
        yield (
            f"stack_nodes has {len(nodes)} hosts, {_text(nodes)}; use 1, 3 or 5, so that a "
            "majority exists."
        )
    for name in sorted({name for name in nodes if nodes.count(name) > 1}):
        yield f"stack_nodes has {name} twice; name each host once."
    for name in nodes:
        if name not in known:
            yield f"stack_nodes has {name}, which is no host of the inventory; correct the name."
        elif not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", name):
            yield (
                f"stack_nodes has {name}; the hosts reach each other by this name: give it "
                "letters, digits, dashes and dots in the inventory."
            )
    if host not in nodes:
        yield (
            f"stack_nodes of {host} is {_text(nodes)}, without {host} itself; add it, or set "
            f"stack_nodes to [{host}] for a stack of its own."
        )
    absent = [name for name in nodes if name in known and name not in running]
    if absent:
        yield (
            f"{_and(absent)} {_is(absent)} in stack_nodes, and not part of this run: addresses, "
            "certificates and turns need all of them. Run without --limit, on hosts that answer."
        )


def _told_faults(told: Hosts) -> Iterator[str]:
    def all_of(*path: str) -> dict[str, Any]:
        """Return, by the hosts' names, what they have told under path."""
        return {name: reduce(getitem, path, one) for name, one in told.items()}

    first, addresses = next(iter(told.values())), all_of("address")
    for group, names in first["groups"].items():
        if not names:
            yield (
                f"The group {group} of the inventory has none of stack_nodes, {_text([*told])}; "
                "name at least one of them there, or remove the group for all of them."
            )
    yield from _address_faults(addresses, all_of("addresses"))
    yield from _twice("stack_cluster_address", addresses)
    for name in first["binds"]:
        yield from _bind_faults(name, all_of("binds", name), addresses)
    yield from _tls_faults(all_of("tls"))
    yield from _twice("rabbitmq_host_name", all_of("node"))
    for name in first["same"]:
        yield from _differing(name, all_of("same", name))
    yield from _version_faults(all_of("version"))


def _address_faults(addresses: Mapping[str, str], own: Mapping[str, list[str]]) -> Iterator[str]:
    for name, address in addresses.items():
        if address not in own[name]:
            yield (
                f"stack_cluster_address of {name} is {address or 'empty'}; of its own IPv4 "
                f"addresses, {_text(own[name])}, write the one at which the other hosts reach it."
            )


def _bind_faults(
    variable: str, binds: Mapping[str, str], addresses: Mapping[str, str]
) -> Iterator[str]:
    for bind, names in _by_value(binds).items():
        closed = [name for name in names if bind not in ("0.0.0.0", addresses[name])]
        if closed:
            yield (
                f"{variable} is {bind} on {_and(closed)}, where the other hosts do not reach it; "
                "set it to 0.0.0.0, or to each host's stack_cluster_address."
            )


def _tls_faults(tls: Mapping[str, bool]) -> Iterator[str]:
    without = [name for name, on in tls.items() if not on]
    if without:
        yield (
            f"stack_tls is off on {_and(without)}, and the hosts of a cluster speak TLS to each "
            "other; set it to own (docs/security.md)."
        )


def _twice(variable: str, values: Mapping[str, str]) -> Iterator[str]:
    for value, names in _by_value(values).items():
        if value and len(names) > 1:
            yield f"{variable} is {value} on {_and(names)}; each host has its own."


def _differing(variable: str, values: Mapping[str, object]) -> list[str]:
    groups = _by_value({name: _text(value) for name, value in values.items()})
    if len(groups) == 1:
        return []
    shown = ", ".join(f"{value} on {_and(names)}" for value, names in groups.items())
    return [f"{variable} is {shown}; write the same for all hosts of the cluster."]


def _secret_faults(hosts: Hosts) -> Iterator[str]:
    names = {name for host in hosts.values() for name in host if SECRET.fullmatch(name)}
    for name in sorted(names):
        groups = _by_value({host: str(values.get(name, "")) for host, values in hosts.items()})
        if len(groups) > 1:
            shown = " differs from that of ".join(map(_and, groups.values()))
            yield f"{name} of {shown}; write the same for all hosts of the cluster."


def _version_faults(versions: Mapping[str, str]) -> Iterator[str]:
    """Return which versions of RabbitMQ cannot be in one cluster: it allows two neighbours."""
    names = {version: names for version, names in _by_value(versions).items() if version}
    for one, other in combinations(sorted(names, key=_series), 2):
        if not _neighbours(_series(one), _series(other)):
            yield (
                f"The data of {_and(names[one])} are RabbitMQ {one}'s, those of "
                f"{_and(names[other])} {other}'s, more than one series apart; upgrade the older "
                "step by step first, or give up its data (docs/cluster.md)."
            )


def _series(version: str) -> tuple[int, int]:
    major, minor = [*re.findall(r"\d+", version), "0", "0"][:2]
    return int(major), int(minor)


def _neighbours(old: tuple[int, int], new: tuple[int, int]) -> bool:
    if old[0] == new[0]:
        return new[1] - old[1] <= 1
    return new == (old[0] + 1, 0) and LAST_OF_MAJOR.get(old[0]) == old[1]


def preflight_clock_faults(hosts: Hosts, nodes: Sequence[str], now: float) -> list[str]:
    """Return which clocks of nodes differ, by what ports_reach returned; now is this machine's.

    A host was asked after `asked`, and its answer came before now, both by this machine's clock.
    So its clock is at least ended - now, and at most began - asked, ahead of this machine's: what
    the question itself took is no difference.
    """
    answers = {name: hosts[name]["__preflight_first"] for name in nodes}
    least = {name: one["ended"] - now for name, one in answers.items()}
    most = {name: one["began"] - one["asked"] for name, one in answers.items()}
    return [
        f"The clock of {one} is {int(least[one] - most[other])} s or more ahead of {other}'s, and "
        f"{CLOCKS} s are allowed; let both follow a time server (timedatectl set-ntp true)."
        for one, other in permutations(nodes, 2)
        if least[one] - most[other] > CLOCKS
    ]


def preflight_silent(hosts: Hosts, nodes: Sequence[str], host: str) -> list[int]:
    """Return the ports of host that refused others, by what ports_reach returned to them."""
    address = hosts[host]["stack_told_address"]
    return sorted(
        {
            one["port"]
            for name in nodes
            for one in hosts[name]["__preflight_first"]["unreached"]
            if one["address"] == address and one["why"] == "refused"
        }
    )


def preflight_unreached(
    unreached: Iterable[Mapping[str, Any]],
    others: Iterable[Mapping[str, str]],
    ports: Mapping[str, object],
    host: str,
) -> list[str]:
    """Return what of others host does not reach: unreached of ports_reach, in words.

    ports are by their variables.
    """
    variables = {str(port): variable for variable, port in ports.items()}
    names = {other["address"]: other["name"] for other in others}
    found: dict[tuple[str, str], list[str]] = {}
    for one in unreached:
        port = f"{one['port']} ({variables[str(one['port'])]})"
        found.setdefault((one["address"], one["why"]), []).append(port)
    return [
        f"{host} does not reach {names[address]} at {address} ({why}) on {_and(missed)}; let the "
        "firewalls between them pass it (docs/cluster.md), or correct stack_cluster_address."
        for (address, why), missed in found.items()
    ]


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups


def _text(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _and(names: Iterable[str]) -> str:
    """Return names in one text: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _is(names: Collection[str]) -> str:
    return "are" if len(names) > 1 else "is"


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "preflight_crossing": preflight_crossing,
            "preflight_version": preflight_version,
            "preflight_cluster_faults": preflight_cluster_faults,
            "preflight_clock_faults": preflight_clock_faults,
            "preflight_silent": preflight_silent,
            "preflight_unreached": preflight_unreached,
        }
