"""What a broker has, compared with what it is to have."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from ansible_collections.message_broker.stack.plugins.plugin_utils.rabbitmq import (
    CLIENT_EXCHANGE,
    MARK,
    PREFIX,
    PRIORITY,
    USER_TAG,
    Definitions,
    Entry,
    declared,
)

# A queue or an exchange.
Item = Mapping[str, Any]
# Policies of older versions of the stack.
OLD_POLICIES = ("dead-letter", "redrive")


def rabbitmq_conflicts(
    queues: Iterable[Entry],
    found: Definitions,
    *,
    exchange: str,
    topics: Iterable[Entry],
    clients: Iterable[Entry],
) -> list[str]:
    """Return which queues and exchanges of found are in the way of the lists', with the way out.

    found is as GET /api/definitions answers. An import changes none that is there. What a queue of
    an older version does not say by arguments is no conflict: its policy says it.
    """
    wanted = declared(exchange, queues, topics, clients)
    return [
        *_conflicts(wanted["queues"], found.get("queues", []), _queue_conflict),
        *_conflicts(
            wanted["exchanges"],
            found.get("exchanges", []),
            lambda own, other: _exchange_conflict(own, other, exchange),
        ),
    ]


def _conflicts(
    wanted: Iterable[Item], found: Iterable[Item], compare: Callable[[Item, Item], str]
) -> Iterator[str]:
    """Yield what compare says of each of wanted and the one of found that has its name."""
    others = {one["name"]: one for one in found if one["vhost"] == "/"}
    for own in wanted:
        said = compare(own, others[own["name"]]) if own["name"] in others else ""
        if said:
            yield said


def _queue_conflict(own: Item, other: Item) -> str:
    arguments = {**other.get("arguments", {})}
    # Since 4.1 the type is told, too. Without either it is rabbitmq.conf's default_queue_type.
    kind = arguments.pop("x-queue-type", None) or other.get("type", "quorum")
    differences = [] if kind == "quorum" else [f"its type is {kind}"]
    if not other["durable"]:
        differences.append("it is not durable")
    differences += [
        f"it has {name}: {value}"
        for name, value in sorted(arguments.items())
        if own["arguments"].get(name) != value
    ]
    if not differences:
        return ""
    name, queue = own["name"], own["name"].removesuffix(".dead")
    return (
        f"The broker has a queue {name} that somebody else made: {', '.join(differences)}. Write"
        f" another name for {queue} in stack_queues and run `make up`; then `ansible-playbook"
        f" playbooks/move.yml -e queue={name} -e to=<that name>` moves its messages, and you can"
        f" delete {name}."
    )


def _exchange_conflict(own: Item, other: Item, exchange: str) -> str:
    kind = other["type"]
    differences = [] if kind == own["type"] else [f"its type is {kind}"]
    if not other["durable"]:
        differences.append("it is not durable")
    # RabbitMQ 4.3 tells this only where it is so.
    if other.get("internal"):
        differences.append("it is internal, so nobody can send to it")
    if not differences:
        return ""
    name = own["name"]
    variable = "stack_exchange" if name == exchange else "stack_topics"
    if name.startswith(CLIENT_EXCHANGE):
        variable = "stack_clients"
    return (
        f"The broker has an exchange {name} that somebody else made: {', '.join(differences)}."
        f" Delete it, or choose another name in {variable}."
    )


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


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "rabbitmq_conflicts": rabbitmq_conflicts,
            "rabbitmq_missing": rabbitmq_missing,
            "rabbitmq_overruled": rabbitmq_overruled,
            "rabbitmq_surplus": rabbitmq_surplus,
            "rabbitmq_removals": rabbitmq_removals,
        }
