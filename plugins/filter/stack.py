"""Filters that several roles compute with."""

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.message_broker.stack.plugins.plugin_utils.stack import is_own


def stack_url(address: str, port: object, tls: bool, names: Sequence[str] = ()) -> str:
    """Return the URL by which users reach port, published on address of their host.

    With TLS that is the first one of names, the certificates' names that the user gave.
    """
    host = "localhost" if address in ("127.0.0.1", "0.0.0.0") else address
    if tls and names:
        host = names[0]
    return f"{'https' if tls else 'http'}://{host}:{port}"


def stack_others(
    hostvars: Mapping[str, Mapping[str, Any]], nodes: Sequence[str], host: str
) -> list[dict[str, str]]:
    """Return name and address of the hosts of nodes but host, from the one after it on.

    Each host's preflight tells its address in the fact stack_told_address; a host that has told
    none, or is none of the inventory, is left out.
    """
    place = nodes.index(host) if host in nodes else 0
    others = [
        name for name in (*nodes[place:], *nodes[:place]) if name != host and name in hostvars
    ]
    told = {name: hostvars[name].get("stack_told_address", "") for name in others}
    return [{"name": name, "address": address} for name, address in told.items() if address]


def stack_turns(
    hostvars: Mapping[str, Mapping[str, Any]], nodes: Sequence[str], stack: str
) -> dict[str, int]:
    """Return by host of nodes the number of its turn, from 0, to be changed.

    Hosts that have containers of the stack are changed one after the other. The others, where
    nothing runs yet, come with the first of them.
    """
    having = [
        name
        for name in nodes
        if any(
            is_own(container, stack) for container in hostvars[name]["preflight_host"]["containers"]
        )
    ]
    return {name: having.index(name) if name in having else 0 for name in nodes}


def stack_chosen(
    groups: Mapping[str, Sequence[str]], group: str, nodes: Sequence[str]
) -> list[str]:
    """Return those of nodes that the inventory's group has; all where there is no such group.

    A single host is all that there is, whatever its groups.
    """
    chosen = groups.get(group, nodes) if len(nodes) > 1 else nodes
    return [name for name in nodes if name in chosen]


def stack_containers(
    catalogue: Mapping[str, Mapping[str, Any]], host: str, nodes: Sequence[str], guarded: bool
) -> dict[str, Mapping[str, Any]]:
    """Return the containers of catalogue that host runs, one of nodes; the front where guarded.

    What does not name its hosts is run by all.
    """
    return {
        name: container
        for name, container in catalogue.items()
        if (guarded or name != "front")
        and (host not in nodes or host in container.get("hosts", nodes))
    }


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "stack_chosen": stack_chosen,
            "stack_containers": stack_containers,
            "stack_others": stack_others,
            "stack_turns": stack_turns,
            "stack_url": stack_url,
        }
