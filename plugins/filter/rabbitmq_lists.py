"""What is wrong with the lists of queues, topics and clients."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from ansible_collections.message_broker.stack.plugins.plugin_utils.rabbitmq import (
    CLIENT_EXCHANGE,
    SECONDS,
    Entry,
    by_name,
    bytes_of,
    seconds,
)

USERS = ("admin", "publisher", "subscriber", "monitor", "guest")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# The broker's timers hold 32 bits of milliseconds.
MOST_SECONDS = 49 * SECONDS["d"]
LEAST_LENGTH = 1000


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
    queues, topics, clients = by_name(queues), by_name(topics), by_name(clients)
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
    if "message_ttl" in entry and not 0 < seconds(entry["message_ttl"]) <= MOST_SECONDS:
        ttl = entry["message_ttl"]
        faults.append(f"message_ttl is {ttl}; write a time such as 45s, 30m, 12h or 7d, up to 49d.")
    if "max_bytes" in entry and not bytes_of(entry["max_bytes"]):
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


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"rabbitmq_faults": rabbitmq_faults}
