"""What the nodes of a cluster tell of it, compared with the hosts of the inventory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def rabbitmq_apart(nodes: Iterable[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """Return the nodes of hosts that do not run in the cluster, as GET /api/nodes tells it."""
    # A broker that cannot answer yet says why, in an object.
    told = [node for node in nodes if isinstance(node, Mapping)]
    running = {str(node["name"]) for node in told if node.get("running")}
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


def _node(host: str) -> str:
    return f"rabbit@{host}"


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "rabbitmq_apart": rabbitmq_apart,
            "rabbitmq_without_members": rabbitmq_without_members,
        }
