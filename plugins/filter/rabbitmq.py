"""Filters that the role rabbitmq computes with."""

import base64
import hashlib
import re
from typing import Any

Definitions = dict[str, list[dict[str, Any]]]


def rabbitmq_password_hash(password: str, user: str) -> str:
    """Return password as RabbitMQ's rabbit_password_hashing_sha256.

    That is base64(salt + sha256(salt + password)). The 4-byte salt comes from user and password, so
    that the same pair gives the same text at every run.
    Source: https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = hashlib.sha256(f"{user}\0{password}".encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def rabbitmq_missing(wanted: Definitions, found: Definitions) -> list[str]:
    """Return what of wanted is not in found, or is there otherwise, as "queues takeaway".

    Both are as GET /api/definitions answers. Of exchanges and queues only the name counts, since an
    import changes none that is there.
    Source: https://www.rabbitmq.com/docs/definitions#import
    """
    missing = []
    for kind, items in wanted.items():
        for item in items:
            keys = ("name", "vhost") if kind in ("exchanges", "queues") else tuple(item)
            others = found.get(kind, [])
            if not any(all(other.get(key) == item[key] for key in keys) for other in others):
                name = item.get("name") or item.get("user") or item["destination"]
                missing.append(f"{kind} {name}")
    return missing


def rabbitmq_overruled(wanted: Definitions, found: Definitions) -> list[str]:
    """Return which queues of wanted obey a policy that is not wanted's: "takeaway: everything".

    found is as GET /api/definitions answers. On a queue only the policy with the highest priority
    acts; of two with the same the broker takes any.
    Source: https://www.rabbitmq.com/docs/policies#combining-policy-definitions
    """
    own = {policy["name"] for policy in wanted["policies"]}
    least = min(policy["priority"] for policy in wanted["policies"])
    return [
        f"{queue['name']}: {policy['name']}"
        for queue in wanted["queues"]
        for policy in found.get("policies", [])
        if policy["vhost"] == queue["vhost"]
        and policy["name"] not in own
        and policy["priority"] >= least
        and policy["apply-to"] in ("all", "queues", "quorum_queues")
        and _may_match(policy["pattern"], queue["name"])
    ]


def _may_match(pattern: str, name: str) -> bool:
    """Return whether name matches; a pattern of Perl's that Python does not know may match."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True


def rabbitmq_erlang_args(memory: int) -> str:
    """Return the arguments of Erlang by which a broker comes back in a container of memory bytes.

    They bound the write-ahead log of the quorum queues to a sixteenth of the memory, and to
    RabbitMQ's own 512 MiB. The log is in memory as a whole, twice when it is read at a start: of
    1 GiB, 470 MiB were too much. Until 4.2 the application ra has the bound, since 4.3 rabbit; the
    other's is ignored. rabbitmq.conf refuses the name that its version does not know.
    Source: deps/rabbit/src/rabbit_ra_systems.erl of RabbitMQ
    """
    size = min(memory // 16, 512 * 1024**2)
    return f"-ra wal_max_size_bytes {size} -rabbit quorum_wal_max_size_bytes {size}"


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "rabbitmq_password_hash": rabbitmq_password_hash,
            "rabbitmq_missing": rabbitmq_missing,
            "rabbitmq_overruled": rabbitmq_overruled,
            "rabbitmq_erlang_args": rabbitmq_erlang_args,
        }
