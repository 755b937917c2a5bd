"""Filters that the role rabbitmq computes with."""

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from urllib.parse import quote

Definitions = dict[str, list[dict[str, Any]]]
# An entry of stack_queues or stack_topics.
Entry = Mapping[str, Any]

# With management, a user may ask the API for the queues of its virtual hosts.
TAGS = {"admin": ["administrator"], "monitor": ["monitoring"], "subscriber": ["management"]}
PRIORITY = 1000
# What a policy of the stack's is called by: stack:takeaway. Older versions had the two others.
PREFIX = "stack:"
OLD_POLICIES = ("dead-letter", "redrive")
# By this argument a topic, or a client's exchange, is known as the stack's, and by this tag a user.
# The broker knows no meaning of them.
MARK = {"message-broker-stack": "topic"}
USER_TAG = "message-broker-stack"
# A client that sends by AMQP has an exchange of its own: by another it could reach every queue.
CLIENT_EXCHANGE = "client."
USERS = ("admin", "publisher", "subscriber", "monitor", "guest")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TIME = re.compile(r"[1-9][0-9]{0,9}[smhd]")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE = re.compile(r"[1-9][0-9]{0,9}[KMGT]")
BITS = {"K": 10, "M": 20, "G": 30, "T": 40}
# The broker's timers hold 32 bits of milliseconds.
MOST_SECONDS = 49 * SECONDS["d"]
LEAST_LENGTH = 1000


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
    queues, topics = _sorted(queues), _sorted(topics)
    names, lengths = [entry["name"] for entry in queues], _lengths(queues, memory)
    users = [client for client in _sorted(clients) if client.get("amqp")]
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
        "exchanges": [
            _exchange(exchange, "direct", {}),
            *(_exchange(topic["name"], "topic", MARK) for topic in topics),
            *(_exchange(f"{CLIENT_EXCHANGE}{one['name']}", "direct", MARK) for one in users),
        ],
        "queues": [
            queue
            for name in names
            for queue in (
                _queue(name, f"{name}.dead", {}),
                _queue(f"{name}.dead", name, {"x-delivery-limit": -1}),
            )
        ],
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


def _sorted(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return entries by their names, which may be written as numbers, without what is not set."""
    given = ({key: value for key, value in one.items() if value is not None} for one in entries)
    return sorted(
        ({**one, "name": str(one.get("name", ""))} for one in given), key=lambda one: one["name"]
    )


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


def _exchange(name: str, kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "vhost": "/",
        "type": kind,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {**arguments},
    }


def _binding(exchange: str, queue: str, key: str) -> dict[str, Any]:
    return {
        "source": exchange,
        "vhost": "/",
        "destination": queue,
        "destination_type": "queue",
        "routing_key": key,
        "arguments": {},
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


def _policies(entry: Entry, delivery_limit: int, length: int) -> list[dict[str, Any]]:
    """Return the policy of a queue and that of its dead queue.

    A message that expires is dead-lettered like one that was given up. In the dead queue none does.
    """
    name, limit = entry["name"], int(entry.get("max_deliveries", delivery_limit))
    more = {}
    if "message_ttl" in entry:
        more["message-ttl"] = _seconds(entry["message_ttl"]) * 1000
    if "max_bytes" in entry:
        more["max-length-bytes"] = _bytes(entry["max_bytes"])
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


def _seconds(text: object) -> int:
    """Return the seconds of a time such as 12h; 0 where it is none."""
    time = str(text)
    return int(time[:-1]) * SECONDS[time[-1]] if TIME.fullmatch(time) else 0


def _bytes(text: object) -> int:
    """Return the bytes of a size such as 500M; 0 where it is none."""
    size = str(text)
    return int(size[:-1]) << BITS[size[-1]] if SIZE.fullmatch(size) else 0


def rabbitmq_faults(
    queues: Iterable[Entry],
    *,
    topics: Iterable[Entry],
    clients: Iterable[Entry],
    queue: str,
    exchange: str,
    remove: Iterable[object],
    memory: int,
) -> list[str]:
    """Return what is wrong with the lists, each a sentence with its fix."""
    queues, topics, clients = _sorted(queues), _sorted(topics), _sorted(clients)
    names, topic_names = ([entry["name"] for entry in some] for some in (queues, topics))
    faults = [
        *_name_faults("stack_queues", names),
        *_name_faults("stack_topics", topic_names),
        *_client_faults(clients, names, topic_names),
        *(fault for entry in queues for fault in _queue_faults(entry)),
        *_subscription_faults(topics, names),
        *(
            f"stack_queues_remove has {name}, which is in stack_queues; remove it from one of them."
            for name in map(str, remove)
            if name in names
        ),
    ]
    if exchange in topic_names:
        faults.append(f"stack_topics has {exchange}, which is stack_exchange; choose another name.")
    if str(queue) not in names:
        faults.append(
            f"stack_queue is {queue}, which is not in stack_queues; add {{name: {queue}}} there,"
            " or set stack_queue to one of its names."
        )
    return [*faults, *_length_faults(queues, memory)]


def _name_faults(variable: str, names: list[str]) -> list[str]:
    faults = []
    for name in sorted(set(names)):
        if names.count(name) > 1:
            faults.append(f"{variable} has {name} twice; remove one of them.")
        if not NAME.fullmatch(name):
            faults.append(
                f"{variable} has the name {name!r}; write 1 to 200 letters, digits, dots, dashes"
                " and underscores, a letter or digit first."
            )
        if name.endswith(".dead"):
            faults.append(
                f"{variable} has {name}, but only dead queues end in .dead; choose another name."
            )
        if name.startswith("amq."):
            faults.append(
                f"{variable} has {name}, but amq. is for the broker's own; choose another name."
            )
    return faults


def _queue_faults(entry: Entry) -> list[str]:
    faults = []
    for key, most in ("max_deliveries", 10**6), ("max_length", 2**31):
        if key in entry and not 1 <= int(entry[key]) <= most:
            faults.append(f"{key} is {entry[key]}; write 1 to {most}.")
    if "message_ttl" in entry and not 0 < _seconds(entry["message_ttl"]) <= MOST_SECONDS:
        ttl = entry["message_ttl"]
        faults.append(f"message_ttl is {ttl}; write a time such as 45s, 30m, 12h or 7d, up to 49d.")
    if "max_bytes" in entry and not _bytes(entry["max_bytes"]):
        faults.append(f"max_bytes is {entry['max_bytes']}; write a size such as 500M or 2G.")
    return [f"stack_queues: {entry['name']}: {fault}" for fault in faults]


def _subscription_faults(topics: Iterable[Entry], queues: list[str]) -> list[str]:
    faults = []
    for topic in topics:
        for one in topic.get("subscriptions") or []:
            # Without quotes, # begins a comment and leaves nothing.
            queue, size = str(one["queue"]), len(str(one["pattern"] or "").encode())
            if queue not in queues:
                faults.append(
                    f"stack_topics: {topic['name']}: the queue {queue} is not in stack_queues; add"
                    f" {{name: {queue}}} there, or correct the subscription."
                )
            if not 1 <= size <= 255:
                faults.append(
                    f"stack_topics: {topic['name']}: the pattern of {queue} has {size} bytes; write"
                    ' 1 to 255 in quotes, such as "order.#" ("#" is everything).'
                )
    return faults


def _client_faults(clients: Collection[Entry], queues: list[str], topics: list[str]) -> list[str]:
    names = [client["name"] for client in clients]
    faults = [
        f"{name} is in stack_queues and in stack_topics: a right would be for both; rename one."
        for name in sorted({*queues} & {*topics})
    ]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            faults.append(f"stack_clients has {name} twice; remove one of them.")
        if not CLIENT_NAME.fullmatch(name) or name in USERS:
            faults.append(
                f"stack_clients has the name {name!r}; write 1 to 64 letters, digits, dots, dashes"
                f" and underscores, a letter or digit first, and none of {', '.join(USERS)}."
            )
    for client in clients:
        for right, known in ("send", [*queues, *topics]), ("receive", queues), ("manage", queues):
            faults += [
                f"stack_clients: {client['name']}: {right} has {name}, which is not in stack_queues"
                f"{' or stack_topics' if right == 'send' else ''}; add it there, or correct it."
                for name in map(str, client.get(right) or [])
                if name not in known
            ]
    faults += [
        f"stack_topics has {name}, but {CLIENT_EXCHANGE} is for clients; choose another name."
        for name in topics
        if name.startswith(CLIENT_EXCHANGE)
    ]
    return faults


def _length_faults(queues: Collection[Entry], memory: int) -> list[str]:
    given = [int(entry["max_length"]) for entry in queues if "max_length" in entry]
    room, least = memory // 2048, LEAST_LENGTH * (len(queues) - len(given))
    if sum(given) + least <= room:
        return []
    return [
        f"stack_queues needs room for {sum(given) + least} messages: {sum(given)} by max_length and"
        f" {least} for the queues without one. With this rabbitmq_memory there is room for {room};"
        " raise rabbitmq_memory, or lower max_length."
    ]


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
        and not _is_old(policy)
        and policy["priority"] >= least
        and policy["apply-to"] in ("all", "queues", "quorum_queues")
        and _may_match(policy["pattern"], queue["name"])
    ]


def _is_old(policy: Mapping[str, Any]) -> bool:
    """Return whether an older version of the stack made policy."""
    return policy["name"] in OLD_POLICIES and policy["priority"] == PRIORITY


def _may_match(pattern: str, name: str) -> bool:
    """Return whether name matches; a pattern of Perl's that Python does not know may match."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True


def rabbitmq_surplus(wanted: Definitions, found: Definitions) -> dict[str, list[str]]:
    """Return what of found is the stack's and not wanted.

    found is as GET /api/definitions answers. "paths" has the API's paths of bindings, topics and
    users; "queues" and "policies" have names. A queue is the stack's by its policy, a topic by
    MARK, a user by USER_TAG, and a binding where it leads from an exchange to a queue that both
    are, and has no arguments.
    """
    here = {
        kind: [item for item in found.get(kind, []) if item.get("vhost") == "/"] for kind in wanted
    }
    names = {kind: _names(wanted[kind]) for kind in ("exchanges", "queues", "policies")}
    policies = _names(here["policies"])
    queues = {name for name in _names(here["queues"]) if f"{PREFIX}{name}" in policies}
    marked = {one["name"] for one in here["exchanges"] if _has(one["arguments"], MARK)}
    bindings = [
        binding
        for binding in here["bindings"]
        if not any(_has(binding, one) for one in wanted["bindings"])
        and binding["source"] in names["exchanges"] | marked
        and binding["destination_type"] == "queue"
        and binding["destination"] in names["queues"] | queues
        and not binding["arguments"]
    ]
    return {
        "paths": [
            *sorted(map(_binding_path, bindings)),
            *(f"/exchanges/%2F/{quote(name, '')}" for name in sorted(marked - names["exchanges"])),
            *(
                f"/users/{quote(user['name'], '')}"
                for user in found.get("users", [])
                if USER_TAG in user["tags"] and user["name"] not in _names(wanted["users"])
            ),
        ],
        "queues": sorted(queues - names["queues"]),
        "policies": sorted(
            policy["name"]
            for policy in here["policies"]
            if policy["name"] not in names["policies"]
            and (policy["name"].startswith(PREFIX) or _is_old(policy))
        ),
    }


def _has(item: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(item.get(key) == value for key, value in values.items())


def _names(items: Iterable[Mapping[str, Any]]) -> set[str]:
    return {item["name"] for item in items}


def _binding_path(binding: Mapping[str, Any]) -> str:
    """Return the path of a binding without arguments, whose last part is its properties_key.

    The broker decodes that part twice: of the path, and of itself, where ~ separates.
    Source: deps/rabbitmq_management/src/rabbit_mgmt_wm_binding.erl of RabbitMQ
    """
    key = quote(binding["routing_key"], "").replace("~", "%7E") or "~"
    parts = ("%2F", "e", quote(binding["source"], ""), "q", quote(binding["destination"], ""))
    return "/".join(("/bindings", *parts, quote(key, "")))


def rabbitmq_removals(
    surplus: Mapping[str, list[str]], counts: Iterable[Mapping[str, Any]], remove: Iterable[object]
) -> dict[str, list[str]]:
    """Return which queues and policies of surplus go, by "paths" of the API, and which are "kept".

    counts is as GET /api/queues answers. A queue stays, with its dead queue and their policies,
    while one of the two may hold a message, unless remove names it. "kept" says how many they hold:
    "old (3 messages)".
    """
    held = {one["name"]: one.get("messages", "unknown") for one in counts}
    given_up = {f"{name}{end}" for name in remove for end in ("", ".dead")}
    full = {
        name.removesuffix(".dead")
        for name in surplus["queues"]
        if held.get(name, 0) != 0 and name not in given_up
    }
    stay = [name for name in surplus["queues"] if name.removesuffix(".dead") in full]
    policies = [name for name in surplus["policies"] if name.removeprefix(PREFIX) not in stay]
    return {
        "paths": [
            *(f"/queues/%2F/{quote(name, '')}" for name in surplus["queues"] if name not in stay),
            *(f"/policies/%2F/{quote(name, '')}" for name in policies),
        ],
        "kept": [f"{name} ({held[name]} messages)" for name in stay if held.get(name, 0) != 0],
    }


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
            "rabbitmq_faults": rabbitmq_faults,
            "rabbitmq_surplus": rabbitmq_surplus,
            "rabbitmq_removals": rabbitmq_removals,
            "rabbitmq_erlang_args": rabbitmq_erlang_args,
        }
