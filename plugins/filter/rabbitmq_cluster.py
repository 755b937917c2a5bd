"""What the nodes of a cluster tell of it, compared with the hosts of the inventory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def rabbitmq_apart(nodes: Iterable[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Return the nodes of hosts that do not run in the cluster, as GET /api/nodes tells it."""
    # A broker that cannot answer yet says why, in an object.
    running = _running(node for node in nodes if isinstance(node, Mapping))
    return [name for name in map(_node, hosts) if name not in running]


def rabbitmq_without_members(
    queues: Iterable[Mapping[str, Any]], hosts: Sequence[str], *, online: bool = False
) -> list[str]:
    """Return the hosts on which some quorum queue has no member, or, with online, none that runs.

    queues are as GET /api/queues tells them.
    """
    kind = "online" if online else "members"
    members = [set(queue.get(kind, [])) for queue in queues if queue.get("type") == "quorum"]
    return [host for host in hosts if any(_node(host) not in one for one in members)]


def rabbitmq_known(nodes: Iterable[Mapping[str, Any]], hosts: Iterable[str]) -> list[str]:
    """Return those of hosts that the cluster still knows."""
    names = {str(node["name"]) for node in nodes}
    return [host for host in hosts if _node(host) in names]


def rabbitmq_forget_faults(
    nodes: Sequence[Mapping[str, Any]], forget: Iterable[str], hosts: Sequence[str]
) -> list[str]:
    """Return why the nodes of forget cannot be forgotten, with the way out."""
    known, running = rabbitmq_known(nodes, forget), _running(nodes)
    faults = [f"{name} is in the inventory; take it out." for name in forget if name in hosts]
    faults += [
        f"{name} runs; stop it for good (`docker rm --force` of its container), and run again."
        for name in known
        if _node(name) in running
    ]
    if known and 2 * len(running) <= len(nodes):
        faults.append(
            f"only {len(running)} of {len(nodes)} nodes run, and a change needs more than half of"
            " them; start others first."
        )
    return faults


def _running(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    return {str(node["name"]) for node in nodes if node.get("running")}


def _node(host: str) -> str:
    return f"rabbit@{host}"


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "rabbitmq_apart": rabbitmq_apart,
            "rabbitmq_forget_faults": rabbitmq_forget_faults,
            "rabbitmq_known": rabbitmq_known,
            "rabbitmq_without_members": rabbitmq_without_members,
        }
