"""What the broker is to have: definitions, hashes of passwords, arguments of Erlang."""

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ansible_collections.message_broker.stack.plugins.plugin_utils.rabbitmq import (
    CLIENT_EXCHANGE,
    PREFIX,
    PRIORITY,
    USER_TAG,
    Definitions,
    Entry,
    by_name,
    bytes_of,
    declared,
    seconds,
)

# With management, a user may ask the API for the queues of its virtual hosts.
TAGS = {"admin": ["administrator"], "monitor": ["monitoring"], "subscriber": ["management"]}


def rabbitmq_definitions(
    passwords: Mapping[str, str],
    *,
    exchange: str,
    queues: Iterable[Entry],
    topics: Iterable[Entry],
    clients: Iterable[Entry],
    tokens: Mapping[str, str],
    delivery_limit: int,
    memory: int,
) -> Definitions:
    """Return what the broker imports: users by passwords, exchanges, and queues with dead queues.

    Clients with amqp are users, too; the first line of a client's text in tokens is the password.

    What must hold whatever policies people add is in the queues' arguments, and again in a policy:
    queues made by an older version have no arguments, which cannot be added later, and of overflow
    and strategy a policy's value wins. Only the policy with the highest priority acts.
    Source: https://www.rabbitmq.com/docs/definitions, https://www.rabbitmq.com/docs/quorum-queues
    """
    queues, topics, clients = by_name(queues), by_name(topics), by_name(clients)
    names, lengths = [entry["name"] for entry in queues], _lengths(queues, memory)
    users = [client for client in clients if client.get("amqp")]
    subscriptions = sorted(
        {
            (topic["name"], str(one["queue"]), str(one["pattern"]))
            for topic in topics
            for one in topic.get("subscriptions") or []
        }
    )
    return {
        "users": [
            *(_user(name, word, TAGS.get(name, [])) for name, word in passwords.items()),
            *(_user(one["name"], tokens[one["name"]].split()[0], [USER_TAG]) for one in users),
        ],
        "vhosts": [{"name": "/"}],
        "permissions": [
            *_permissions(passwords, exchange, names, [one["name"] for one in topics]),
            *(_client_permission(client, names) for client in users),
        ],
        **declared(exchange, queues, topics, clients),
        "bindings": [
            *(_binding(exchange, name, name) for name in names),
            *(_binding(*subscription) for subscription in subscriptions),
            *(
                _binding(f"{CLIENT_EXCHANGE}{one['name']}", queue, queue)
                for one in users
                for queue in _named(one, "send", names)
            ),
        ],
        "policies": [
            policy
            for entry in queues
            for policy in _policies(entry, delivery_limit, lengths[entry["name"]])
        ],
    }


def _lengths(queues: Collection[Entry], memory: int) -> dict[str, int]:
    """Return how many messages each of queues holds at most.

    A broker of memory bytes can be recovered with a message for each 2 KiB. What the queues that
    say a max_length leave of them, the others share.
    """
    given = {entry["name"]: int(entry["max_length"]) for entry in queues if "max_length" in entry}
    others = [entry["name"] for entry in queues if entry["name"] not in given]
    left = memory // 2048 - sum(given.values())
    return given | dict.fromkeys(others, left // max(len(others), 1))


def _user(name: str, password: str, tags: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "password_hash": rabbitmq_password_hash(password, name),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": tags,
    }


def _named(client: Entry, right: str, among: Collection[str]) -> list[str]:
    """Return the names of among for which client has right, in their order."""
    given = set(map(str, client.get(right) or []))
    return sorted(given.intersection(among))


def _client_permission(client: Entry, queues: Collection[str]) -> dict[str, Any]:
    """Return what client may do by AMQP: write to its own exchange and to topics, read queues."""
    topics = sorted(set(map(str, client.get("send") or [])).difference(queues))
    into = [f"{CLIENT_EXCHANGE}{client['name']}", *topics]
    dead = [f"{queue}.dead" for queue in _named(client, "manage", queues)]
    out = [*_named(client, "receive", queues), *dead]
    patterns = [
        f"^({'|'.join(map(re.escape, names))})$" if names else "^$" for names in (into, out)
    ]
    kinds = ("configure", "write", "read")
    rights = dict(zip(kinds, ("^$", *patterns), strict=True))
    return {"user": client["name"], "vhost": "/", **rights}


def _permissions(
    users: Iterable[str], exchange: str, queues: Iterable[str], topics: Iterable[str]
) -> list[dict[str, Any]]:
    nothing, into = "^$", f"^{re.escape(exchange)}$"
    anywhere = f"^({'|'.join(map(re.escape, (exchange, *topics)))})$"
    out = rf"^({'|'.join(map(re.escape, queues))})(\.dead)?$"
    rights = {
        "admin": (".*", ".*", ".*"),
        "publisher": (nothing, anywhere, nothing),
        "subscriber": (nothing, into, out),
        "monitor": (nothing, nothing, nothing),
    }
    kinds = ("configure", "write", "read")
    return [
        {"user": user, "vhost": "/", **dict(zip(kinds, rights[user], strict=True))}
        for user in users
    ]


def _binding(exchange: str, queue: str, key: str) -> dict[str, Any]:
    return {
        "source": exchange,
        "vhost": "/",
        "destination": queue,
        "destination_type": "queue",
        "routing_key": key,
        "arguments": {},
    }


def _policies(entry: Entry, delivery_limit: int, length: int) -> list[dict[str, Any]]:
    """Return the policy of a queue and that of its dead queue.

    A message that expires is dead-lettered like one that was given up. In the dead queue none does.
    """
    name, limit = entry["name"], int(entry.get("max_deliveries", delivery_limit))
    more = {}
    if "message_ttl" in entry:
        more["message-ttl"] = seconds(entry["message_ttl"]) * 1000
    if "max_bytes" in entry:
        more["max-length-bytes"] = bytes_of(entry["max_bytes"])
    limits = {"delivery-limit": limit, "max-length": length, **more}
    dead_limits = {"delivery-limit": -1, "max-length": length}
    return [_policy(name, f"{name}.dead", limits), _policy(f"{name}.dead", name, dead_limits)]


def _policy(queue: str, dead: str, limits: Mapping[str, int]) -> dict[str, Any]:
    definition = {
        "dead-letter-exchange": "",
        "dead-letter-routing-key": dead,
        "dead-letter-strategy": "at-least-once",
        "overflow": "reject-publish",
        **limits,
    }
    return {
        "name": f"{PREFIX}{queue}",
        "vhost": "/",
        "apply-to": "quorum_queues",
        "priority": PRIORITY,
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
            "rabbitmq_erlang_args": rabbitmq_erlang_args,
        }
