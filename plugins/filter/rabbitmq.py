"""Filters that the role rabbitmq computes with."""

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

Definitions = dict[str, list[dict[str, Any]]]

TAGS = {"admin": ["administrator"], "monitor": ["monitoring"]}


def rabbitmq_definitions(
    passwords: Mapping[str, str], *, exchange: str, queue: str, delivery_limit: int, memory: int
) -> Definitions:
    """Return what the broker imports: users by passwords, an exchange, a queue and its dead queue.

    What must hold whatever policies people add is in the queues' arguments, and again in a policy:
    queues made by an older version have no arguments, which cannot be added later, and of overflow
    and strategy a policy's value wins. Only the policy with the highest priority acts. A queue has
    a message for each 2 KiB of memory at most.
    Source: https://www.rabbitmq.com/docs/definitions, https://www.rabbitmq.com/docs/quorum-queues
    """
    dead = f"{queue}.dead"
    into, out = f"^{re.escape(exchange)}$", rf"^{re.escape(queue)}(\.dead)?$"
    nothing = "^$"
    rights = {
        "admin": (".*", ".*", ".*"),
        "publisher": (nothing, into, nothing),
        "subscriber": (nothing, into, out),
        "monitor": (nothing, nothing, nothing),
    }
    length = memory // 2048
    limits = (("dead-letter", queue, dead, delivery_limit), ("redrive", dead, queue, -1))
    return {
        "users": [
            {
                "name": user,
                "password_hash": rabbitmq_password_hash(password, user),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": TAGS.get(user, []),
            }
            for user, password in passwords.items()
        ],
        "vhosts": [{"name": "/"}],
        "permissions": [
            {
                "user": user,
                "vhost": "/",
                **dict(zip(("configure", "write", "read"), rights[user], strict=True)),
            }
            for user in passwords
        ],
        "exchanges": [
            {
                "name": exchange,
                "vhost": "/",
                "type": "direct",
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
        ],
        "queues": [
            _queue(queue, dead, {}),
            _queue(dead, queue, {"x-delivery-limit": -1}),
        ],
        "bindings": [
            {
                "source": exchange,
                "vhost": "/",
                "destination": queue,
                "destination_type": "queue",
                "routing_key": queue,
                "arguments": {},
            }
        ],
        "policies": [_policy(*limit, length) for limit in limits],
    }


def _queue(name: str, dead: str, more: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {
        "x-queue-type": "quorum",
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-dead-letter-strategy": "at-least-once",
        **more,
    }
    return {
        "name": name,
        "vhost": "/",
        "durable": True,
        "auto_delete": False,
        "arguments": arguments,
    }


def _policy(name: str, queue: str, dead: str, delivery_limit: int, length: int) -> dict[str, Any]:
    definition = {
        "dead-letter-exchange": "",
        "dead-letter-routing-key": dead,
        "dead-letter-strategy": "at-least-once",
        "overflow": "reject-publish",
        "delivery-limit": delivery_limit,
        "max-length": length,
    }
    return {
        "name": name,
        "vhost": "/",
        "apply-to": "quorum_queues",
        "priority": 1000,
        "pattern": f"^{re.escape(queue)}$",
        "definition": definition,
    }


def rabbitmq_password_hash(password: str, user: str) -> str:
    """Return password as RabbitMQ's rabbit_password_hashing_sha256.

    That is base64(salt + sha256(salt + password)). The 4-byte salt comes from user and password, so
    that the same pair gives the same text at every run.
    Source: https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = hashlib.sha256(f"{user}\0{password}".encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def rabbitmq_missing(wanted: Definitions, found: Definitions) -> list[str]:
    """Return the items of wanted that are missing from found or differ, as "queues takeaway".

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
            "rabbitmq_definitions": rabbitmq_definitions,
            "rabbitmq_password_hash": rabbitmq_password_hash,
            "rabbitmq_missing": rabbitmq_missing,
            "rabbitmq_overruled": rabbitmq_overruled,
            "rabbitmq_erlang_args": rabbitmq_erlang_args,
        }
