"""What roles compute: the broker's hashes, what it has lost, its bounds; where images come from."""

import base64
import copy
import hashlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import bcrypt
import pytest

FILTERS = Path(__file__).parents[1] / "plugins/filter"


@pytest.fixture(scope="module")
def filters() -> Any:
    """Return every filter, by name."""
    found = {}
    for plugin in FILTERS.glob("*.py"):
        spec = importlib.util.spec_from_file_location(f"{plugin.stem}_filters", plugin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.FilterModule().filters()
    return found


@pytest.fixture(scope="module")
def hashed(filters: Any) -> Any:
    return filters["rabbitmq_password_hash"]


def verifies(text: str, password: str) -> bool:
    """Do what the broker does when somebody logs in: rabbit_password_hashing_sha256."""
    raw = base64.b64decode(text, validate=True)
    return len(raw) == 36 and hashlib.sha256(raw[:4] + password.encode()).digest() == raw[4:]


def test_the_verification_agrees_with_rabbitmq_s_documentation() -> None:
    # https://www.rabbitmq.com/docs/passwords#computing-password-hash, salt 908D C60A
    documented = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert base64.b64decode(documented)[:4] == bytes.fromhex("908DC60A")
    assert verifies(documented, "test12")
    assert not verifies(documented, "test13")


@pytest.mark.parametrize("password", ["test12", "", "pässwörd 🍕", "x" * 1000])
def test_a_hash_is_one_that_the_broker_verifies(hashed: Any, password: str) -> None:
    assert verifies(hashed(password, "admin"), password)


def test_a_hash_is_the_same_at_every_run(hashed: Any) -> None:
    assert hashed("test12", "admin") == hashed("test12", "admin")


def test_users_with_one_password_do_not_share_a_hash(hashed: Any) -> None:
    assert hashed("test12", "admin") != hashed("test12", "monitor")


def test_another_password_brings_another_salt(hashed: Any) -> None:
    assert hashed("test12", "admin")[:5] != hashed("test13", "admin")[:5]


@pytest.mark.parametrize(
    ("memory", "size"),
    [(512 << 20, 32 << 20), (1 << 30, 64 << 20), (8 << 30, 512 << 20), (64 << 30, 512 << 20)],
)
def test_the_write_ahead_log_is_a_share_of_the_memory_for_every_version(
    filters: Any, memory: int, size: int
) -> None:
    # Until 4.2 the quorum queues take the value of ra, since 4.3 that of rabbit.
    words = filters["rabbitmq_erlang_args"](memory).split()
    assert words == [
        *("-ra", "wal_max_size_bytes", str(size)),
        *("-rabbit", "quorum_wal_max_size_bytes", str(size)),
    ]


WANTED: dict[str, Any] = {
    "users": [{"name": "monitor", "password_hash": "aGFzaA==", "tags": ["monitoring"]}],
    "vhosts": [{"name": "/"}],
    "permissions": [{"user": "monitor", "vhost": "/", "read": "^$"}],
    "queues": [{"name": "takeaway", "vhost": "/", "arguments": {"x-queue-type": "quorum"}}],
    "bindings": [{"source": "in", "vhost": "/", "destination": "takeaway", "arguments": {}}],
}
NAMES = ["users monitor", "vhosts /", "permissions monitor", "queues takeaway", "bindings takeaway"]


@pytest.fixture
def found() -> Any:
    """What a broker answers that has all of WANTED, and more."""
    answer = copy.deepcopy(WANTED) | {"rabbitmq_version": "4.0.5", "parameters": []}
    answer["users"][0]["limits"] = {}
    answer["queues"].insert(0, {"name": "another", "vhost": "/"})
    return answer


def test_nothing_is_missing_where_all_is_there(filters: Any, found: Any) -> None:
    found["queues"][1]["arguments"] = {"x-queue-type": "classic"}
    assert filters["rabbitmq_missing"](WANTED, found) == []


def test_a_policy_of_an_older_version_is_missing_and_its_queue_without_arguments_is_not(
    filters: Any, found: Any
) -> None:
    wanted = WANTED | {"policies": [{"name": "stack:takeaway", "vhost": "/", "priority": 1000}]}
    found["policies"] = [{"name": "stack:takeaway", "vhost": "/", "priority": 0}]
    found["queues"][1]["arguments"] = {}
    assert filters["rabbitmq_missing"](wanted, found) == ["policies stack:takeaway"]


def test_a_broker_that_tells_nothing_lacks_all(filters: Any) -> None:
    assert filters["rabbitmq_missing"](WANTED, {}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_was_removed_is_missing(filters: Any, found: Any, name: str) -> None:
    found[name.split()[0]].pop()
    assert filters["rabbitmq_missing"](WANTED, found) == [name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("users monitor", {"password_hash": "b3RoZXI="}),
        ("users monitor", {"tags": []}),
        ("permissions monitor", {"read": ".*"}),
        ("queues takeaway", {"vhost": "another"}),
    ],
)
def test_what_was_changed_is_missing(
    filters: Any, found: Any, name: str, change: dict[str, Any]
) -> None:
    found[name.split()[0]][-1] |= change
    assert filters["rabbitmq_missing"](WANTED, found) == [name]


def conflicts(filters: Any, name: str, change: dict[str, Any]) -> list[str]:
    """Return what is in the lists' way in a broker that has all, with a change of name."""
    lists = {"topics": [EVENTS], "clients": [{"name": "shop", "amqp": True}]}
    found = definitions(filters, "takeaway", "orders", **lists)
    for exchange in found["exchanges"]:
        del exchange["internal"]  # RabbitMQ 4.3 tells it only where it is so
    (one,) = (one for one in found["queues"] + found["exchanges"] if one["name"] == name)
    one |= change
    queues = [{"name": "takeaway"}, {"name": "orders"}]
    told: list[str] = filters["rabbitmq_conflicts"](queues, found, exchange="in.to", **lists)
    return told


def arguments(**more: Any) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in more.items()}
    return {"arguments": {"x-queue-type": "quorum"} | given}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("takeaway", {}),
        ("takeaway", arguments()),  # as older versions made it
        ("takeaway", {"arguments": {}}),
        ("takeaway", {"type": "quorum"}),
        ("takeaway.dead", arguments(x_delivery_limit=-1)),
        ("takeaway", {"vhost": "another", "durable": False}),
        ("events", {"arguments": {}}),
        ("events", {"vhost": "another", "type": "fanout"}),
    ],
)
def test_a_queue_of_the_stack_s_or_an_older_version_s_is_not_in_the_way(
    filters: Any, name: str, change: dict[str, Any]
) -> None:
    assert conflicts(filters, name, change) == []
    queues = [{"name": "takeaway"}]
    empty = filters["rabbitmq_conflicts"](queues, {}, exchange="in.to", topics=[], clients=[])
    assert empty == []


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("orders", arguments(x_queue_type="classic"), "its type is classic."),
        ("orders", {"arguments": {}, "type": "stream"}, "its type is stream."),
        ("orders", {"durable": False}, "it is not durable."),
        ("orders", arguments(x_max_length=9, x_expires=5), "it has x-expires: 5, it has x-max-le"),
        ("orders", arguments(x_overflow="drop-head"), "it has x-overflow: drop-head."),
        ("orders", arguments(x_dead_letter_routing_key="x"), "it has x-dead-letter-routing-key: x"),
        ("orders", arguments(x_delivery_limit=-1), "it has x-delivery-limit: -1."),
        ("orders.dead", arguments(x_single_active_consumer=True), "x-single-active-consumer: True"),
        ("events", {"type": "direct"}, "its type is direct. Delete it, or choose another"),
        ("in.to", {"internal": True}, "it is internal, so nobody can send to it. Delete it, or"),
        ("client.shop", {"durable": False}, "it is not durable."),
    ],
)
def test_what_somebody_else_made_by_a_name_of_the_lists_is_told_with_the_way_out(
    filters: Any, name: str, change: dict[str, Any], said: str
) -> None:
    (text,) = conflicts(filters, name, change)
    kind = "queue" if name.startswith("orders") else "exchange"
    assert text.startswith(f"The broker has a{'n' * (kind == 'exchange')} {kind} {name} that")
    assert said in text
    ways = {
        "events": "another name in stack_topics.",
        "in.to": "another name in stack_exchange.",
        "client.shop": "another name in stack_clients.",
    }
    assert ways.get(name, "another name for orders in stack_queues and run `make up`") in text
    move = f"`ansible-playbook playbooks/move.yml -e queue={name} -e to="
    assert (move in text) == (kind == "queue")


def definitions(
    filters: Any, *queues: Any, topics: Any = (), clients: Any = (), memory: int = 1 << 30
) -> Any:
    """Return the definitions of queues, each a name or an entry, topics and clients."""
    entries = [{"name": queue} if isinstance(queue, str) else queue for queue in queues]
    return filters["rabbitmq_definitions"](
        {"publisher": "x", "subscriber": "y"},
        exchange="in.to",
        queues=entries,
        topics=topics,
        clients=clients,
        tokens={client["name"]: f"new of {client['name']}\nold" for client in clients},
        delivery_limit=20,
        memory=memory,
    )


def tuned(definitions: Any) -> dict[str, dict[str, int]]:
    """Return the numbers of each policy, by the policy's name."""
    return {
        policy["name"]: {
            key: value for key, value in policy["definition"].items() if isinstance(value, int)
        }
        for policy in definitions["policies"]
    }


ORDERS = {
    "name": "orders",
    "max_deliveries": "2",
    "message_ttl": "1h",
    "max_length": 10000,
    "max_bytes": "100M",
    "description": None,
}
EVENTS = {
    "name": "events",
    "subscriptions": [
        {"queue": "takeaway", "pattern": "#"},
        {"queue": "orders", "pattern": "order.#"},
    ],
}


def test_one_queue_has_all_the_room_and_so_has_its_dead_queue(filters: Any) -> None:
    assert tuned(definitions(filters, "takeaway")) == {
        "stack:takeaway": {"delivery-limit": 20, "max-length": 524288},
        "stack:takeaway.dead": {"delivery-limit": -1, "max-length": 524288},
    }


def test_what_an_entry_says_is_in_its_policy_and_the_others_share_the_room(filters: Any) -> None:
    assert tuned(definitions(filters, "takeaway", ORDERS, "audit")) == {
        "stack:audit": {"delivery-limit": 20, "max-length": 257144},
        "stack:audit.dead": {"delivery-limit": -1, "max-length": 257144},
        "stack:orders": {
            "delivery-limit": 2,
            "max-length": 10000,
            "message-ttl": 3_600_000,
            "max-length-bytes": 100 << 20,
        },
        "stack:orders.dead": {"delivery-limit": -1, "max-length": 10000},
        "stack:takeaway": {"delivery-limit": 20, "max-length": 257144},
        "stack:takeaway.dead": {"delivery-limit": -1, "max-length": 257144},
    }


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("30m", 1800), ("12h", 43200), ("49d", 49 * 86400)]
)
def test_a_time_is_told_in_milliseconds(filters: Any, text: str, seconds: int) -> None:
    limits = tuned(definitions(filters, {"name": "x", "message_ttl": text}))
    assert limits["stack:x"]["message-ttl"] == seconds * 1000


@pytest.mark.parametrize(
    ("text", "size"), [("1K", 1 << 10), ("500M", 500 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
)
def test_a_size_is_told_in_bytes(filters: Any, text: str, size: int) -> None:
    limits = tuned(definitions(filters, {"name": "x", "max_bytes": text}))
    assert limits["stack:x"]["max-length-bytes"] == size


def test_each_queue_has_its_dead_queue_and_is_bound_by_its_name(filters: Any) -> None:
    made = definitions(filters, "b.c", "a", topics=[EVENTS])
    assert [queue["name"] for queue in made["queues"]] == ["a", "a.dead", "b.c", "b.c.dead"]
    assert {
        queue["name"]: queue["arguments"]["x-dead-letter-routing-key"] for queue in made["queues"]
    } == {"a": "a.dead", "a.dead": "a", "b.c": "b.c.dead", "b.c.dead": "b.c"}
    assert [policy["pattern"] for policy in made["policies"]][2:] == ["^b\\.c$", "^b\\.c\\.dead$"]
    assert [
        (binding["source"], binding["destination"], binding["routing_key"])
        for binding in made["bindings"]
    ] == [
        ("in.to", "a", "a"),
        ("in.to", "b.c", "b.c"),
        ("events", "orders", "order.#"),
        ("events", "takeaway", "#"),
    ]
    assert [(one["name"], one["type"], one["arguments"]) for one in made["exchanges"]] == [
        ("in.to", "direct", {}),
        ("events", "topic", {"message-broker-stack": "topic"}),
    ]


def test_the_order_of_the_lists_changes_nothing(filters: Any) -> None:
    other = {"name": "alone"}
    turned = EVENTS | {"subscriptions": EVENTS["subscriptions"][::-1]}  # type: ignore[index]
    one = definitions(filters, "takeaway", ORDERS, topics=[EVENTS, other])
    assert one == definitions(filters, ORDERS, "takeaway", topics=[other, turned])


def test_rights_reach_the_queues_and_topics_of_the_lists_alone(filters: Any) -> None:
    names = ["a", "b.c", "a.dead", "b.c.dead", "in.to", "events", "bxc", "inxto", "ab", "xa", ""]
    granted = {
        right["user"]: {
            kind: [name for name in names if re.search(right[kind], name)]
            for kind in ("configure", "write", "read")
        }
        for right in definitions(filters, "a", "b.c", topics=[{"name": "events"}])["permissions"]
    }
    assert granted == {
        "publisher": {"configure": [""], "write": ["in.to", "events"], "read": [""]},
        "subscriber": {
            "configure": [""],
            "write": ["in.to"],
            "read": ["a", "b.c", "a.dead", "b.c.dead"],
        },
    }


def faults(filters: Any, *queues: Any, **others: Any) -> list[str]:
    """Return what is wrong with queues, each a name or an entry, beside the default queue q."""
    entries = [{"name": queue} if isinstance(queue, str) else queue for queue in queues]
    settings = {"topics": [], "clients": [], "queue": "q", "exchange": "in", "remove": []}
    settings["memory"] = 1 << 30  # type: ignore[assignment]
    told: list[str] = filters["rabbitmq_faults"]([{"name": "q"}, *entries], **(settings | others))
    return told


def topic(queue: str, pattern: str | None) -> dict[str, Any]:
    return {"name": "t", "subscriptions": [{"queue": queue, "pattern": pattern}]}


def test_lists_that_can_be_have_no_faults(filters: Any) -> None:
    edges = {"max_deliveries": 10**6, "max_length": 1, "message_ttl": "49d", "max_bytes": "1K"}
    right = [topic("q", "x" * 255), {"name": "u", "subscriptions": None}]
    assert faults(filters, ORDERS, {"name": "x" * 200} | edges, topics=right, remove=["old"]) == []
    assert faults(filters, {"name": "x", "max_length": 523288}) == []
    assert faults(filters, {"name": "x", "max_length": None}, memory=512 << 20) == []


@pytest.mark.parametrize(
    ("queues", "others", "words"),
    [
        (["q"], {}, ["stack_queues has q twice", "remove"]),
        (["a b"], {}, ["the name 'a b'", "letters, digits"]),
        (["-a"], {}, ["the name '-a'", "letter or digit first"]),
        (["a\n"], {}, ["the name 'a\\n'"]),
        (["x" * 201], {}, ["1 to 200"]),
        (["a.dead"], {}, ["a.dead", "end in .dead", "another name"]),
        (["amq.a"], {}, ["amq.a", "the broker's own", "another name"]),
        ([], {"topics": [{"name": "t"}, {"name": "t"}]}, ["stack_topics has t twice"]),
        ([], {"topics": [{"name": "in"}]}, ["stack_topics has in", "stack_exchange"]),
        ([], {"queue": "z"}, ["stack_queue is z", "{name: z}"]),
        ([], {"topics": [topic("z", "#")]}, ["stack_topics: t", "queue z", "{name: z}"]),
        ([], {"topics": [topic("q", "")]}, ["pattern of q has 0 bytes", "1 to 255", '"order.#"']),
        ([], {"topics": [topic("q", None)]}, ["pattern of q has 0 bytes"]),
        ([{"name": None}], {}, ["the name ''"]),
        ([], {"topics": [topic("q", "ä" * 128)]}, ["pattern of q has 256 bytes"]),
        ([{"name": "a", "message_ttl": "7"}], {}, ["a: message_ttl is 7;", "30m"]),
        ([{"name": "a", "message_ttl": "0s"}], {}, ["a: message_ttl is 0s;"]),
        ([{"name": "a", "message_ttl": "50d"}], {}, ["a: message_ttl is 50d;", "up to 49d"]),
        ([{"name": "a", "max_bytes": "-1G"}], {}, ["a: max_bytes is -1G;", "500M"]),
        ([{"name": "a", "max_bytes": 500}], {}, ["a: max_bytes is 500;"]),
        ([{"name": "a", "max_deliveries": 0}], {}, ["max_deliveries is 0; write 1 to 1000000."]),
        ([{"name": "a", "max_deliveries": 10**6 + 1}], {}, ["max_deliveries is 1000001;"]),
        ([{"name": "a", "max_length": 0}], {}, ["max_length is 0; write 1 to 2147483648."]),
        (
            [{"name": "a", "max_length": 2**31 + 1}],
            {"memory": 1 << 50},
            ["max_length is 2147483649;"],
        ),
        ([], {"remove": ["q"]}, ["stack_queues_remove has q", "one of them"]),
        (
            [{"name": "a", "max_length": 523289}],
            {},
            ["524289 messages", "room for 524288", "raise rabbitmq_memory", "lower max_length"],
        ),
        ([f"a{n}" for n in range(262)], {"memory": 512 << 20}, ["263000 for", "room for 262144"]),
    ],
)
def test_what_cannot_be_is_told_with_its_way_out(
    filters: Any, queues: list[Any], others: dict[str, Any], words: list[str]
) -> None:
    (said,) = faults(filters, *queues, **others)
    assert [word for word in words if word not in said] == [], said


def test_all_that_is_wrong_is_told_at_once(filters: Any) -> None:
    bad = {"name": "a.dead", "max_length": 0, "max_bytes": "1"}
    assert len(faults(filters, "q", bad, queue="z", topics=[{"name": "in"}])) == 6


def surplus(filters: Any, *queues: str, topics: Any = (), change: Any = None) -> Any:
    """Return what is no longer wanted where queues and topics are, of a broker that had more.

    change may change what the broker has.
    """
    had = definitions(filters, "takeaway", "orders", "old", topics=[EVENTS, {"name": "past"}])
    # Somebody else's.
    had["queues"].append({"name": "mine", "vhost": "/"})
    had["queues"].append({"name": "old", "vhost": "other"})
    had["exchanges"].append({"name": "mine", "vhost": "/", "arguments": {}})
    foreign = {"vhost": "/", "priority": 1000, "apply-to": "classic_queues", "pattern": ".*"}
    had["policies"].append({"name": "mine", **foreign})
    had["policies"].append({"name": "redrive", "vhost": "/", "priority": 1})
    mine = had["bindings"][0]
    had["bindings"].append({**mine, "destination": "mine"})
    had["bindings"].append({**mine, "source": "mine"})
    had["bindings"].append({**mine, "arguments": {"x": 1}})
    had["bindings"].append({**mine, "destination_type": "exchange", "destination": "old"})
    if change:
        change(had)
    return filters["rabbitmq_surplus"](definitions(filters, *queues, topics=topics), had)


def test_what_is_wanted_and_what_is_somebody_else_s_stays(filters: Any) -> None:
    left = surplus(filters, "takeaway", "orders", "old", topics=[EVENTS, {"name": "past"}])
    assert left == {"paths": [], "queues": [], "policies": []}
    nothing = filters["rabbitmq_surplus"](definitions(filters, "takeaway"), {})
    assert nothing == {"paths": [], "queues": [], "policies": []}


def test_what_the_lists_no_longer_have_is_surplus(filters: Any) -> None:
    assert surplus(filters, "takeaway", "orders") == {
        "paths": [
            "/bindings/%2F/e/events/q/orders/order.%2523",
            "/bindings/%2F/e/events/q/takeaway/%2523",
            "/bindings/%2F/e/in.to/q/old/old",
            "/exchanges/%2F/events",
            "/exchanges/%2F/past",
        ],
        "queues": ["old", "old.dead"],
        "policies": ["stack:old", "stack:old.dead"],
    }


def test_a_subscription_that_is_no_longer_wanted_is_surplus(filters: Any) -> None:
    topics = [topic("takeaway", "#") | {"name": "events"}, {"name": "past"}]
    left = surplus(filters, "takeaway", "orders", "old", topics=topics)
    assert left["paths"] == ["/bindings/%2F/e/events/q/orders/order.%2523"]


@pytest.mark.parametrize(
    ("key", "part"), [("", "~"), ("a~*", "a%257E%252A"), ("a+ b/ä", "a%252B%2520b%252F%25C3%25A4")]
)
def test_a_binding_is_named_as_the_broker_decodes_it(filters: Any, key: str, part: str) -> None:
    def change(had: Any) -> None:
        had["bindings"].append({**had["bindings"][0], "routing_key": key})

    every = ("takeaway", "orders", "old")
    left = surplus(filters, *every, topics=[EVENTS, {"name": "past"}], change=change)
    assert left["paths"] == [f"/bindings/%2F/e/in.to/q/old/{part}"]


def test_the_policies_of_an_older_version_go_and_are_nobody_else_s(filters: Any) -> None:
    def change(had: Any) -> None:
        for name in ("dead-letter", "redrive"):
            old = {**had["policies"][0], "name": name, "pattern": ".*"}
            had["policies"] = [one for one in had["policies"] if one["name"] != name] + [old]
        told.extend(filters["rabbitmq_overruled"](definitions(filters, "takeaway"), had))

    told: list[str] = []
    every = ("takeaway", "orders", "old")
    left = surplus(filters, *every, topics=[EVENTS, {"name": "past"}], change=change)
    assert left == {"paths": [], "queues": [], "policies": ["dead-letter", "redrive"]}
    assert told == []


def test_a_queue_without_the_stack_s_policy_is_not_the_stack_s(filters: Any) -> None:
    def change(had: Any) -> None:
        had["policies"] = [one for one in had["policies"] if one["name"] != "stack:old"]

    left = surplus(filters, "takeaway", "orders", change=change)
    assert (left["queues"], left["policies"]) == (["old.dead"], ["stack:old.dead"])
    assert "/bindings/%2F/e/in.to/q/old/old" not in left["paths"]


GONE = ["/queues/%2F/old", "/queues/%2F/old.dead"]
GONE_POLICIES = ["/policies/%2F/stack%3Aold", "/policies/%2F/stack%3Aold.dead"]


@pytest.mark.parametrize(
    ("counts", "remove", "paths", "kept"),
    [
        ({"old": 0, "old.dead": 0}, [], GONE + GONE_POLICIES, []),
        ({}, [], GONE + GONE_POLICIES, []),
        ({"old": 3, "old.dead": 0}, [], [], ["old (3 messages)"]),
        # The dead queue's messages can only be sent back to a queue that is there.
        ({"old": 0, "old.dead": 1}, ["other"], [], ["old.dead (1 messages)"]),
        ({"old": None, "old.dead": 0}, [], [], ["old (unknown messages)"]),
        ({"old": 3, "old.dead": 1}, ["old"], GONE + GONE_POLICIES, []),
    ],
)
def test_a_queue_goes_with_its_policies_once_it_and_its_dead_queue_are_empty(
    filters: Any, counts: dict[str, int | None], remove: list[str], paths: Any, kept: Any
) -> None:
    told = [
        {"name": name} | ({} if count is None else {"messages": count})
        for name, count in counts.items()
    ]
    left = {
        "paths": [],
        "queues": ["old", "old.dead"],
        "policies": ["redrive", "stack:old", "stack:old.dead"],
    }
    removals = filters["rabbitmq_removals"](left, told, remove)
    expected = [path for path in paths if path in GONE]
    expected += ["/policies/%2F/redrive", *(path for path in paths if path not in GONE)]
    assert removals == {"paths": expected, "kept": kept}


SHOP = {
    "name": "shop",
    "send": ["orders", "events"],
    "receive": ["takeaway"],
    "manage": ["takeaway"],
    "amqp": True,
}


def test_of_the_doors_users_the_subscriber_s_alone_may_ask_the_management_api(
    filters: Any,
) -> None:
    tags = {user["name"]: user["tags"] for user in definitions(filters, "takeaway")["users"]}
    assert tags == {"publisher": [], "subscriber": ["management"]}


def test_a_client_with_amqp_is_a_user_who_reaches_its_queues_and_topics_alone(filters: Any) -> None:
    one, another = SHOP, {"name": "cook", "receive": ["orders"], "amqp": True}
    made = definitions(
        filters, "takeaway", "orders", topics=[EVENTS], clients=[one, another, {"name": "http"}]
    )
    users = {user["name"]: user for user in made["users"]}
    assert [*users] == ["publisher", "subscriber", "cook", "shop"]
    assert users["shop"]["password_hash"] == filters["rabbitmq_password_hash"]("new", "shop")
    assert users["shop"]["tags"] == ["message-broker-stack"]
    rights = {
        right["user"]: {kind: right[kind] for kind in ("configure", "write", "read")}
        for right in made["permissions"]
    }
    assert rights["shop"] == {
        "configure": "^$",
        "write": r"^(client\.shop|events)$",
        "read": r"^(takeaway|takeaway\.dead)$",
    }
    assert rights["cook"] == {"configure": "^$", "write": r"^(client\.cook)$", "read": "^(orders)$"}
    own = [one for one in made["bindings"] if one["source"].startswith("client.")]
    assert [(one["source"], one["destination"], one["routing_key"]) for one in own] == [
        ("client.shop", "orders", "orders")
    ]


def test_a_client_that_is_gone_is_surplus_and_no_other_user(filters: Any) -> None:
    had = definitions(filters, "takeaway", "orders", topics=[EVENTS], clients=[SHOP])
    had["users"].append({"name": "somebody", "tags": []})
    wanted = definitions(filters, "takeaway", "orders", topics=[EVENTS])
    assert filters["rabbitmq_surplus"](wanted, had)["paths"] == [
        "/bindings/%2F/e/client.shop/q/orders/orders",
        "/exchanges/%2F/client.shop",
        "/users/shop",
    ]


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"name": "a/b"}, ["the name 'a/b'", "letters, digits"]),
        ({"name": "x" * 65}, ["1 to 64"]),
        ({"name": "admin"}, ["the name 'admin'", "none of admin"]),
        ({"name": "a", "send": ["nowhere"]}, ["a: send has nowhere", "stack_topics", "add it"]),
        ({"name": "a", "receive": ["t"]}, ["a: receive has t, which is not in stack_queues;"]),
        ({"name": "a", "manage": ["q.dead"]}, ["a: manage has q.dead"]),
    ],
)
def test_a_client_that_cannot_be_is_told(filters: Any, client: Any, words: list[str]) -> None:
    told = " ".join(faults(filters, topics=[topic("q", "#")], clients=[client]))
    assert [word for word in words if word not in told] == []
    assert faults(filters, topics=[topic("q", "#")], clients=[{"name": "a", "send": ["t"]}]) == []


def test_two_clients_of_one_name_or_a_name_for_two_things_are_told(filters: Any) -> None:
    assert "a twice" in " ".join(faults(filters, clients=[{"name": "a"}, {"name": "a"}]))
    assert "in stack_queues and in" in " ".join(faults(filters, "t", topics=[topic("q", "#")]))
    other = [topic("q", "#") | {"name": "client.a"}]
    assert "client. is for clients" in " ".join(faults(filters, topics=other))


def test_the_doors_are_told_names_in_order_and_hashes_of_tokens(filters: Any) -> None:
    queues, topics = [{"name": "takeaway"}, {"name": "orders"}], [{"name": "events"}]
    clients = [SHOP, {"name": "cook", "receive": None}]
    told = filters["apps_lists"](queues, topics, clients, {"shop": "new\nold\n", "cook": "c"})
    hashes = [hashlib.sha256(token.encode()).hexdigest() for token in ("c", "new", "old")]
    assert json.loads(told) == {
        "queues": ["orders", "takeaway"],
        "topics": ["events"],
        "clients": [
            {"name": "cook", "tokens": hashes[:1], "send": [], "receive": [], "manage": []},
            {
                "name": "shop",
                "tokens": hashes[1:],
                "send": ["events", "orders"],
                "receive": ["takeaway"],
                "manage": ["takeaway"],
            },
        ],
    }
    alone = filters["apps_lists"](queues[:1], [], [], {})
    assert alone == '{"queues": ["takeaway"], "topics": [], "clients": []}'


def test_the_doors_are_told_whose_pages_come_and_who_sees_metrics(filters: Any) -> None:
    origins, readers = ["https://b", "https://a"], {"prometheus": "p", "monitoring": "m"}
    told = json.loads(filters["apps_lists"]([], [], [], {}, origins, readers))
    assert told["origins"] == ["https://a", "https://b"]
    hashes = [hashlib.sha256(password.encode()).hexdigest() for password in ("m", "p")]
    assert told["readers"] == [
        {"name": "monitoring", "tokens": hashes[:1]},
        {"name": "prometheus", "tokens": hashes[1:]},
    ]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, []),
        ({"a": "x" * 20, "b": f"{'y' * 32}\n{'z' * 32}\n"}, []),
        ({"a": "x" * 19}, ["client_a has a token", "20 ASCII"]),
        ({"a": "x" * 20 + "\nshort"}, ["client_a has a token"]),
        ({"a": "\u00e4" * 20}, ["client_a has a token"]),
        ({"a": "x" * 20, "b": "x" * 20}, ["client_b has a token of a"]),
        ({"other": "short"}, []),
    ],
)
def test_tokens_that_could_be_guessed_are_told(
    filters: Any, tmp_path: Path, files: dict[str, str], words: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / f"client_{name}").write_text(text)
    told = filters["apps_token_faults"]([{"name": "a"}, {"name": "b"}], str(tmp_path))
    assert len(told) == bool(words)
    assert [word for word in words if word not in " ".join(told)] == []


OWN = {"name": "own", "vhost": "/", "priority": 1000, "apply-to": "quorum_queues", "pattern": ".*"}


@pytest.mark.parametrize(
    ("change", "overruled"),
    [
        ({}, ["takeaway: other"]),
        ({"priority": 1000}, ["takeaway: other"]),
        ({"priority": 999}, []),
        ({"apply-to": "all"}, ["takeaway: other"]),
        ({"apply-to": "classic_queues"}, []),
        ({"pattern": "^take"}, ["takeaway: other"]),
        ({"pattern": "^away"}, []),
        # Perl knows \K, Python does not.
        ({"pattern": "take\\Kaway"}, ["takeaway: other"]),
        ({"vhost": "another"}, []),
        ({"name": "own"}, []),
    ],
)
def test_a_policy_in_the_place_of_the_stack_s_is_told(
    filters: Any, found: Any, change: dict[str, Any], overruled: list[str]
) -> None:
    other = {**OWN, "name": "other", "priority": 1001, "apply-to": "queues", **change}
    found["policies"] = [OWN, other]
    assert filters["rabbitmq_overruled"](WANTED | {"policies": [OWN]}, found) == overruled
    assert filters["rabbitmq_overruled"](WANTED | {"policies": [OWN]}, {}) == []


def test_every_queue_that_obeys_another_policy_is_told(filters: Any) -> None:
    wanted = definitions(filters, "orders", "takeaway")
    other = {**OWN, "name": "other", "pattern": "^(orders|takeaway\\.dead)"}
    told = filters["rabbitmq_overruled"](wanted, {"policies": [*wanted["policies"], other]})
    assert told == ["orders: other", "orders.dead: other", "takeaway.dead: other"]


@pytest.fixture
def plan(filters: Any, tmp_path: Path) -> Any:
    """Return a function that plans the images of a tree that a test may change."""
    for name in ("images/base", "images/own", "apps/door", "apps/app"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "Dockerfile").write_text("FROM x\n")
    wanted = {
        "own": {"contexts": ["images/own"], "base": "debian", "upstream": "official:1"},
        "app": {"contexts": ["apps/door", "apps/app"]},
    }
    settings = {"root": str(tmp_path), "stack": "broker", "debian": "debian:x", "revision": 1}

    def planned(source: str = "build", **others: Any) -> dict[str, dict[str, str]]:
        images = filters["image_plan"](wanted, **{**settings, "source": source, **others})
        return {image["name"]: image for image in images}

    return planned


@pytest.mark.parametrize(
    ("given", "own", "app"),
    [
        ({"source": "build"}, ("build", "broker/own:"), ("build", "broker/app:")),
        ({"source": "registry"}, ("upstream", "official:1"), ("build", "broker/app:")),
        ({"registry": "r:5"}, ("registry", "r:5/broker/own:"), ("registry", "r:5/broker/app:")),
        (
            {"source": "registry", "registry": "r:5", "push": True},
            ("build", "r:5/broker/own:"),
            ("build", "r:5/broker/app:"),
        ),
    ],
)
def test_an_image_comes_from_where_it_can_be_had(
    plan: Any, given: dict[str, Any], own: tuple[str, str], app: tuple[str, str]
) -> None:
    images = plan(**given)
    assert list(images) == ["base", "own", "app"]
    assert (images["own"]["origin"], images["app"]["origin"]) == (own[0], app[0])
    assert images["own"]["ref"].startswith(own[1])
    assert images["app"]["ref"].startswith(app[1])
    assert (images["base"]["origin"], images["base"]["ref"][:12]) == ("build", "broker/base:")


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("images/own/Dockerfile", {"own"}),
        ("apps/door/new/file", {"app"}),
        # What stands on the base is built anew with it.
        ("images/base/Dockerfile", {"base", "app"}),
        ("apps/app/tests/test_app.py", set()),
        ("apps/app/app/__pycache__/app.pyc", set()),
        ("apps/app/.mypy_cache/3.13/app", set()),
    ],
)
def test_an_image_is_named_by_its_content(
    plan: Any, tmp_path: Path, path: str, changed: set[str]
) -> None:
    before = plan()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("changed")
    after = plan()
    assert {name for name in after if after[name]["ref"] != before[name]["ref"]} == changed


def test_a_revision_and_another_debian_name_every_built_image_anew(plan: Any) -> None:
    one, two, other = plan(), plan(revision=2), plan(debian="debian:y")
    for name, image in one.items():
        assert len({image["ref"], two[name]["ref"], other[name]["ref"]}) == 3


def test_what_is_there_is_not_missing_and_the_base_only_where_something_stands_on_it(
    filters: Any, plan: Any
) -> None:
    def missing(*there: str) -> list[str]:
        images = [{"RepoTags": [planned[name]["ref"]], "RepoDigests": None} for name in there]
        return [image["name"] for image in filters["image_missing"](planned.values(), images)]

    planned = plan()
    assert missing() == ["base", "own", "app"]
    assert missing("app") == ["own"]
    assert missing("own", "app") == []
    assert missing("base", "own") == ["app"]
    planned = plan(registry="r:5")
    assert missing("own") == ["app"]


def test_a_run_is_gone_when_its_process_is_and_only_its_own_machine_can_tell(
    filters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, gone = filters["preflight_owner"], filters["preflight_gone"]
    mine = owner("make up")
    assert re.fullmatch(rf"make up by process {os.getppid()} on {socket.gethostname()}", mine)
    assert gone(mine), "this very run may go on"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert gone(f"make up by process 1 on {socket.gethostname()}"), "process 1 is another program"
    command = [sys.executable, "-c", "print(flush=True); input()", "ansible"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3) as child:
        assert child.stdout
        child.stdout.readline()
        alive = f"make up by process {child.pid} on {socket.gethostname()}"
        assert not gone(alive)
        assert not gone(f"{alive}-other"), "only the other machine can tell"
    assert gone(alive)
    assert not gone("")
    assert not gone("something else")


OWN_LABEL = {"message-broker-stack": "broker"}


def container(name: str, labels: dict[str, str] | None, *ports: int) -> dict[str, Any]:
    published = [{"PublicPort": port} for port in ports]
    return {"Names": [f"/{name}"], "Image": "x:1", "Labels": labels, "Ports": published}


def test_only_what_carries_the_stack_s_label_is_its_own(filters: Any) -> None:
    own = container("broker-rabbitmq", OWN_LABEL)
    containers = [own, container("broker-fluentd", None), container("other-exporter", {})]
    assert filters["preflight_own"](containers, "broker") == {"rabbitmq": own}
    volumes = [
        {"Name": "broker-rabbitmq", "Labels": OWN_LABEL, "Mountpoint": "/1"},
        {"Name": "broker-prometheus", "Labels": None, "Mountpoint": "/2"},
    ]
    names = ["rabbitmq", "fluentd", "prometheus"]
    assert filters["preflight_foreign"](names, "broker", containers, volumes) == [
        "broker-fluentd (container of image x:1)",
        "broker-prometheus (volume at /2)",
    ]


def test_what_begins_like_an_option_and_is_none_is_unknown(filters: Any, tmp_path: Path) -> None:
    for role, options in {"one": {"one_a": {}, "other_b": {}}, "two": {"two_a": {}}}.items():
        (tmp_path / role / "meta").mkdir(parents=True)
        specs = {"argument_specs": {"main": {"options": options}}}
        (tmp_path / role / "meta/argument_specs.yml").write_text(json.dumps(specs))
    names = ["one_a", "one_b", "two_b", "other_b", "other_c", "two_a", "onerous"]
    assert filters["preflight_unknown"](names, str(tmp_path)) == ["one_b", "two_b"]


def test_a_port_that_two_variables_have_is_told(filters: Any) -> None:
    ports = {"a_port": "5000", "b_port": "5001", "c_port": "5000"}
    assert filters["preflight_twice"](ports) == ["a_port and c_port are 5000"]


def test_a_port_is_free_where_the_container_itself_publishes_it(filters: Any) -> None:
    containers = {
        "x": {"ports": {"a_port": "", "b_port": ""}},
        "y": {"ports": {"c_port": "", "d_port": ""}},
    }
    own = {"x": container("broker-x", OWN_LABEL, 5000), "y": container("broker-y", {}, 5001)}
    own["front"] = container("broker-front", OWN_LABEL, 5002)
    ports = {"a_port": "5000", "b_port": "5001", "c_port": "5000", "d_port": "5002"}
    # 5001 is y's, and 5000 x's, until they are made anew.
    expected = {"b_port": "5001", "c_port": "5000"}
    assert filters["preflight_not_held"](ports, containers, own) == expected


FILES = {"main.conf": "a", "rules/one.yml": "b"}


def on_the_host(path: str, text: str | None, **more: Any) -> dict[str, Any]:
    """Return what ansible.builtin.find tells of a file, or of a folder where text is None."""
    kind: dict[str, Any] = {"isdir": text is None, "isreg": text is not None}
    kind |= {"mode": "0750" if text is None else "0640", "uid": 0, "gid": 10001}
    if text is not None:
        kind["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return {"path": f"/etc/x{path}", **kind, **more}


RIGHT = [
    on_the_host("", None),
    on_the_host("/main.conf", "a"),
    on_the_host("/rules", None),
    on_the_host("/rules/one.yml", "b"),
]


@pytest.mark.parametrize(
    ("found", "differs"),
    [
        (RIGHT, False),
        ([], True),
        ([*RIGHT[1:], on_the_host("", None, mode="0755")], True),
        ([*RIGHT[:-1], on_the_host("/rules/one.yml", "c")], True),
        ([*RIGHT[:-1], on_the_host("/rules/one.yml", "b", gid=0)], True),
        ([*RIGHT[:-1], on_the_host("/rules/one.yml", None)], True),
        ([*RIGHT, on_the_host("/rules/old.yml", "b")], True),
        ([*RIGHT, on_the_host("y/another.yml", "b")], False),
    ],
    ids=["right", "nothing", "mode", "text", "group", "kind", "more", "neighbour"],
)
def test_a_configuration_is_told_to_differ(
    filters: Any, found: list[dict[str, Any]], differs: bool
) -> None:
    assert filters["config_differs"](FILES, found, "/etc/x", 10001) is differs


@pytest.mark.parametrize(
    ("files", "salt", "same"),
    [
        ({"b.conf": "1", "a.conf": "2", "tls/ca.pem": "other"}, "salt", True),
        ({"a.conf": "2", "b.conf": "2", "tls/ca.pem": "3"}, "salt", False),
        ({"a.conf": "2", "tls/ca.pem": "3"}, "salt", False),
        ({"a.conf": "2", "b.conf": "1", "tls/ca.pem": "3"}, "pepper", False),
    ],
    ids=["order and what is read again", "a text", "a file less", "the salt"],
)
def test_a_hash_tells_what_is_only_read_at_the_start(
    filters: Any, files: dict[str, str], salt: str, same: bool
) -> None:
    told = filters["config_hash"](
        {"a.conf": "2", "b.conf": "1", "tls/ca.pem": "3"}, "salt", ["tls/ca.pem"]
    )
    assert (filters["config_hash"](files, salt, ["tls/ca.pem"]) == told) is same


def test_a_check_has_the_files_where_the_container_has_them(filters: Any, tmp_path: Path) -> None:
    texts = {"a b.conf": "it's $HOME\n", "rules/one.yml": "\u00e4"}
    script = filters["config_script"](
        texts, str(tmp_path), "cat 'a b.conf' rules/one.yml >&2; false"
    )
    done = subprocess.run(
        ["sh", "-e"], input=script, capture_output=True, text=True, check=False, timeout=10
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "it's $HOME\n\u00e4", "")


def test_prometheus_scrapes_what_the_catalogue_says(filters: Any) -> None:
    params = {"family": ["queue"]}
    more = {"job": "rabbitmq_detailed", "port": 2, "path": "/more", "params": params}
    catalogue = {"rabbitmq": {"scrapes": [{"port": 1}, more]}, "fluentd": {}}
    assert filters["monitoring_scrapes"](catalogue, "/etc/p", False, False) == [
        {"job_name": "rabbitmq", "static_configs": [{"targets": ["rabbitmq:1"]}]},
        {
            "job_name": "rabbitmq_detailed",
            "metrics_path": "/more",
            "params": params,
            "static_configs": [{"targets": ["rabbitmq:2"]}],
        },
    ]


def test_a_scrape_has_password_and_tls_where_the_target_asks_for_them(filters: Any) -> None:
    catalogue = {
        "door": {"scrapes": [{"port": 1, "password": True}]},
        "web": {"scrapes": [{"port": 2, "password": True, "tls": True}]},
        "open": {"scrapes": [{"port": 3}]},
    }
    scrapes = filters["monitoring_scrapes"]
    password = {"username": "prometheus", "password_file": "/p/scrape_password"}
    door, web, open_ = scrapes(catalogue, "/p", True, True, "mq.example.com")
    assert (door["basic_auth"], "scheme" in door, "tls_config" in door) == (password, False, False)
    assert (web["basic_auth"], web["scheme"]) == (password, "https")
    assert web["tls_config"] == {"ca_file": "/p/tls/ca.pem", "server_name": "mq.example.com"}
    assert open_.keys() == {"job_name", "static_configs"}
    plain = scrapes(catalogue, "/p", True, False)
    assert ["basic_auth" in one for one in plain] == [True, True, False]
    assert not any("scheme" in one or "tls_config" in one for one in plain)


def test_a_target_of_a_cluster_has_the_same_labels_in_every_prometheus(filters: Any) -> None:
    params = {"family": ["queue"]}
    more = {"job": "rabbitmq_detailed", "port": 2, "path": "/more", "params": params}
    catalogue = {
        "rabbitmq": {"scrapes": [{"port": 1, "published": "m"}, more | {"published": "m"}]},
        "web": {"scrapes": [{"port": 3, "password": True, "tls": True, "published": "w"}]},
        "front": {"scrapes": [{"port": 8405}]},
    }
    hosts = ["h1", "h2", "h3"]

    def labels(host: str) -> set[tuple[str, str, str]]:
        others = [{"name": name, "address": "192.0.2.1"} for name in hosts if name != host]
        scrapes = filters["monitoring_cluster_scrapes"]
        configs = scrapes(catalogue, "/p", host, others, {"m": 15, "w": 9}, "mq.example.com")
        assert len({config["job_name"] for config in configs}) == len(configs) == 7
        # What Prometheus makes of a target that does not say it.
        return {
            (
                static["labels"].get("job", config["job_name"]),
                static["labels"]["host"],
                static["labels"].get("instance", static["targets"][0]),
            )
            for config in configs
            for static in config["static_configs"]
        }

    jobs = {"rabbitmq": 15, "rabbitmq_detailed": 15, "web": 9}
    everywhere = {(job, host, f"{host}:{port}") for job, port in jobs.items() for host in hosts}
    for host in hosts:
        assert labels(host) == everywhere | {("front", host, f"{host}:8405")}


def test_another_host_is_scraped_by_tls_with_a_password_and_the_own_one_as_ever(
    filters: Any,
) -> None:
    scrape = {"port": 2, "path": "/more", "params": {"family": ["queue"]}, "published": "m"}
    others = [{"name": "h2", "address": "192.0.2.2"}]
    own, other = filters["monitoring_cluster_scrapes"](
        {"rabbitmq": {"scrapes": [scrape]}}, "/p", "h1", others, {"m": 15}, "mq.example.com"
    )
    assert own.keys() == {"job_name", "metrics_path", "params", "static_configs"}
    assert own["static_configs"][0]["targets"] == ["rabbitmq:2"]
    assert other == {
        "job_name": "rabbitmq_others",
        "metrics_path": "/more",
        "params": {"family": ["queue"]},
        "scheme": "https",
        "basic_auth": {"username": "prometheus", "password_file": "/p/scrape_password"},
        "tls_config": {"ca_file": "/p/tls/ca.pem", "server_name": "mq.example.com"},
        "static_configs": [{"targets": ["h2:15"], "labels": {"host": "h2", "job": "rabbitmq"}}],
    }


def test_of_several_hosts_an_alert_holds_back_what_is_near(filters: Any) -> None:
    rules = [{"equal": ["queue"], "near": True}, {"source_matchers": ["a = b"], "near": True}, {}]
    inhibit = filters["monitoring_inhibit_rules"]
    assert inhibit(rules, False) == [{"equal": ["queue"]}, {"source_matchers": ["a = b"]}, {}]
    assert inhibit(rules, True) == [
        {"equal": ["queue", "host"]},
        {"source_matchers": ["a = b"], "equal": ["host"]},
        {},
    ]


def test_the_web_configuration_has_hashes_that_stay_the_same(filters: Any) -> None:
    web = filters["monitoring_web"]({"a": "secret", "b": "secret"}, "salt", True)
    assert web == filters["monitoring_web"]({"a": "secret", "b": "secret"}, "salt", True)
    hashes = web["basic_auth_users"]
    assert all(bcrypt.checkpw(b"secret", hashes[user].encode()) for user in "ab")
    assert hashes["a"] != hashes["b"]
    assert web["tls_server_config"]["min_version"] == "TLS12"
    assert "tls_server_config" not in filters["monitoring_web"]({}, "salt", False)


def test_a_url_is_the_one_that_users_type(filters: Any) -> None:
    url = filters["stack_url"]
    assert url("0.0.0.0", 5000, False, ["mq.example.com"]) == "http://localhost:5000"
    assert url("127.0.0.1", 5000, True) == "https://localhost:5000"
    assert url("192.0.2.1", 5000, True) == "https://192.0.2.1:5000"
    assert url("0.0.0.0", 5000, True, ["mq.example.com", "b"]) == "https://mq.example.com:5000"


def test_a_node_that_does_not_run_in_the_cluster_is_apart(filters: Any) -> None:
    nodes = [{"name": "rabbit@h1", "running": True}, {"name": "rabbit@h2", "running": False}]
    assert filters["rabbitmq_apart"](nodes, ["h1", "h2", "h3"]) == ["rabbit@h2", "rabbit@h3"]
    assert filters["rabbitmq_apart"](nodes, ["h1"]) == []


def test_a_host_on_which_a_quorum_queue_has_no_member_is_told(filters: Any) -> None:
    names = ["rabbit@h1", "rabbit@h2", "rabbit@h3"]
    queues = [
        {"name": "a", "type": "quorum", "members": names, "online": names[:2]},
        {"name": "b", "type": "quorum", "members": names[:2], "online": names[:2]},
        {"name": "c", "type": "classic", "node": "rabbit@h1"},
    ]
    hosts = ["h1", "h2", "h3"]
    assert filters["rabbitmq_without_members"](queues, hosts) == ["h3"]
    assert filters["rabbitmq_without_members"](queues[:1], hosts) == []
    assert filters["rabbitmq_without_members"](queues[:1], hosts, online=True) == ["h3"]


def test_a_node_is_forgotten_only_when_it_is_gone_and_most_others_run(filters: Any) -> None:
    def faults(running: str, *forget: str) -> str:
        nodes = [{"name": f"rabbit@h{n}", "running": n in running} for n in "123"]
        return " ".join(filters["rabbitmq_forget_faults"](nodes, forget, ["h1", "h3", "h4"]))

    assert faults("13", "h2") == ""
    assert faults("1", "h9") == ""
    assert "h2 runs;" in faults("123", "h2")
    assert "only 1 of 3 nodes run" in faults("1", "h2")
    assert "h3 is in the inventory" in faults("12", "h3")
    assert filters["rabbitmq_known"]([{"name": "rabbit@h2"}], ["h2", "h9"]) == ["h2"]


def test_the_other_hosts_begin_with_the_next_one(filters: Any) -> None:
    hostvars = {name: {"stack_told_address": f"192.0.2.{name[1:]}"} for name in ("h1", "h2", "h3")}
    names = {
        host: [one["name"] for one in filters["stack_others"](hostvars, list(hostvars), host)]
        for host in hostvars
    }
    assert names == {"h1": ["h2", "h3"], "h2": ["h3", "h1"], "h3": ["h1", "h2"]}
    del hostvars["h2"]["stack_told_address"]
    assert filters["stack_others"](hostvars, list(hostvars), "h1") == [
        {"name": "h3", "address": "192.0.2.3"}
    ]
    assert filters["stack_others"]({"h1": {}}, ["h1"], "h1") == []
    assert filters["stack_others"]({"h1": {}}, ["h1", "h9"], "h1") == []


def test_hosts_that_have_the_stack_are_changed_one_after_the_other(filters: Any) -> None:
    def host(*stacks: str) -> dict[str, Any]:
        containers = [{"Labels": {"message-broker-stack": stack}} for stack in stacks]
        return {"preflight_host": {"containers": [{"Labels": {}}, *containers]}}

    hostvars = {"h1": host(), "h2": host("broker"), "h3": host("other"), "h4": host("broker")}
    turns = filters["stack_turns"](hostvars, list(hostvars), "broker")
    assert turns == {"h1": 0, "h2": 0, "h3": 0, "h4": 1}


NODES = ["h1", "h2", "h3"]


def test_groups_choose_hosts_of_a_cluster_and_nothing_of_a_single_host(filters: Any) -> None:
    chosen = filters["stack_chosen"]
    groups = {"doors": ["h3", "h9", "h1"], "monitoring": ["h9"]}
    assert chosen(groups, "doors", NODES) == ["h1", "h3"]
    assert chosen(groups, "monitoring", NODES) == []
    assert chosen({}, "doors", NODES) == NODES
    assert chosen(groups, "doors", ["h2"]) == ["h2"]


def test_a_host_has_the_containers_that_are_not_for_others(filters: Any) -> None:
    catalogue = {"rabbitmq": {}, "publisher": {"hosts": ["h1", "h3"]}, "front": {}}

    def names(host: str, guarded: bool = True) -> str:
        return " ".join(filters["stack_containers"](catalogue, host, NODES, guarded))

    assert names("h1") == names("h3") == "rabbitmq publisher front"
    assert names("h2") == "rabbitmq front"
    assert names("h2", guarded=False) == "rabbitmq"
    # Where images are built, which is no host of the stack.
    assert names("localhost") == "rabbitmq publisher front"


def test_a_container_is_scraped_where_it_runs(filters: Any) -> None:
    catalogue = {
        "rabbitmq": {"scrapes": [{"port": 1, "published": "m"}]},
        "web": {"scrapes": [{"port": 2, "published": "w"}], "hosts": ["h1"]},
    }

    def targets(host: str) -> list[tuple[str, str]]:
        others = [{"name": name} for name in NODES if name != host]
        configs = filters["monitoring_cluster_scrapes"](
            catalogue, "/p", host, others, {"m": 15, "w": 9}
        )
        return [
            (config["job_name"], target)
            for config in configs
            for static in config["static_configs"]
            for target in static["targets"]
        ]

    brokers = [
        ("rabbitmq", "rabbitmq:1"),
        ("rabbitmq_others", "h2:15"),
        ("rabbitmq_others", "h3:15"),
    ]
    assert targets("h1") == [*brokers, ("web", "web:2")]
    assert targets("h2")[-2:] == [("rabbitmq_others", "h3:15"), ("web_others", "h1:9")]


def told(**more: Any) -> dict[str, Any]:
    """Return what a host without an address of its own and without data tells."""
    common = {
        "nodes": NODES,
        "groups": {},
        "address": "",
        "addresses": [""],
        "binds": {},
        "tls": True,
    }
    return {"__preflight_told": common | {"node": "", "same": {}, "version": ""} | more}


def faults_of(filters: Any, nodes: list[str] = NODES, **options: Any) -> list[str]:
    """Return what is said of nodes by h1, where all three have that list unless hosts say more."""
    hosts = {name: told(nodes=nodes) for name in NODES}
    given = {"hosts": hosts, "host": "h1", "known": [*NODES, "h4", "h_5"], "running": NODES}
    found: list[str] = filters["preflight_cluster_faults"](nodes=nodes, **given | options)
    return found


def node_faults(filters: Any, nodes: list[str], **options: Any) -> str:
    return " ".join(faults_of(filters, nodes, **options))


def test_a_cluster_is_a_list_of_hosts_that_all_run(filters: Any) -> None:
    assert node_faults(filters, NODES) == ""
    even = node_faults(filters, ["h1", "h2"])
    assert even.startswith("stack_nodes has 2 hosts, [h1, h2]; use 1, 3 or 5")
    assert "7 hosts" in node_faults(filters, [*NODES, "h4", "h_5", "h6", "h7"])
    assert "stack_nodes has h2 twice" in node_faults(filters, ["h1", "h2", "h2"])
    assert "has h9, which is no host of the inventory" in node_faults(filters, ["h1", "h2", "h9"])
    assert "has h_5; the hosts reach" in node_faults(filters, ["h1", "h2", "h_5"])
    without = node_faults(filters, NODES, host="h4")
    assert "stack_nodes of h4 is [h1, h2, h3], without h4 itself" in without
    absent = node_faults(filters, NODES, running=["h1"])
    assert absent.startswith("h2 and h3 are in stack_nodes, and not part of this run")
    assert "without --limit" in absent
    alone = {"h1": told(), "h2": {}, "h3": {}}
    assert node_faults(filters, NODES, hosts=alone).startswith(
        "stack_nodes is [h1, h2, h3] on h1, [h2] on h2, [h3] on h3; write the same"
    )


def cluster_faults(filters: Any, **second: Any) -> list[str]:
    """Return what is said of three hosts, of which h2 tells second and was given `given`."""
    given = second.pop("given", {})
    hosts: dict[str, Any] = {
        name: told(
            address=f"192.0.2.{name[1:]}",
            addresses=[f"192.0.2.{name[1:]}", "172.17.0.1"],
            binds={"stack_bind_address": "0.0.0.0"},
            node=name,
            same={"stack_name": "broker", "apps_publisher_port": 5000},
            version="4.0.5",
        )
        | {"rabbitmq_cookie": "A"}
        for name in NODES
    }
    hosts["h2"] |= given
    hosts["h2"]["__preflight_told"] |= second
    return faults_of(filters, hosts=hosts)


def test_hosts_that_fit_are_one_cluster(filters: Any) -> None:
    assert cluster_faults(filters) == []
    assert cluster_faults(filters, binds={"stack_bind_address": "192.0.2.2"}) == []
    assert cluster_faults(filters, version="4.1.0") == []
    # No data yet.
    assert cluster_faults(filters, version="") == []
    # What the play does not know.
    assert cluster_faults(filters, node="") == []


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"address": "192.0.2.9"}, "stack_cluster_address of h2 is 192.0.2.9; of its own IPv4"),
        ({"address": ""}, "stack_cluster_address of h2 is empty; of its own IPv4 addresses, [192"),
        ({"address": "127.0.0.1"}, "[192.0.2.2, 172.17.0.1], write the one at which the other"),
        (
            {"binds": {"stack_bind_address": "127.0.0.1"}},
            "stack_bind_address is 127.0.0.1 on h2, where the other",
        ),
        ({"tls": False}, "stack_tls is off on h2, and"),
        ({"node": "h1"}, "rabbitmq_host_name is h1 on h1 and h2; each host has its own"),
        (
            {"same": {"stack_name": "mq", "apps_publisher_port": 5000}},
            "stack_name is broker on h1 and h3, mq on h2; write the same",
        ),
        (
            {"same": {"stack_name": "broker", "apps_publisher_port": 8080}},
            "apps_publisher_port is 5000 on h1 and h3, 8080 on h2",
        ),
        (
            {"version": "4.2.1"},
            "The data of h1 and h3 are RabbitMQ 4.0.5's, those of h2 4.2.1's, more than one series",
        ),
        ({"given": {"rabbitmq_cookie": "B"}}, "rabbitmq_cookie of h1 and h3 differs from that of"),
        ({"given": {"stack_admin_password": "B"}}, "stack_admin_password of h1 and h3 differs"),
    ],
)
def test_hosts_that_do_not_fit_are_named(filters: Any, second: Any, words: str) -> None:
    [fault] = cluster_faults(filters, **second)
    assert words in fault


def test_a_group_without_any_of_the_hosts_is_named(filters: Any) -> None:
    hosts = {name: told(groups={"doors": ["h2"], "monitoring": []}) for name in NODES}
    fault = faults_of(filters, hosts=hosts)[0]
    assert fault.startswith("The group monitoring of the inventory has none of stack_nodes, [h1,")


def test_two_hosts_with_one_address_are_named(filters: Any) -> None:
    faults = cluster_faults(filters, address="192.0.2.1", addresses=["192.0.2.1"])
    assert faults == ["stack_cluster_address is 192.0.2.1 on h1 and h2; each host has its own."]


@pytest.mark.parametrize(
    ("one", "other", "fit"),
    [
        ("4.2.0", "4.3.6", True),
        ("4.1.0", "4.3.6", False),
        ("3.13.7", "4.0.5", True),
        ("3.12.0", "4.0.5", False),
        ("3.13.7", "4.1.0", False),
        # Not the text counts: 4.9 comes before 4.10.
        ("4.10.0", "4.9.1", True),
        ("4.11.0", "4.9.1", False),
    ],
)
def test_neighbours_in_the_order_of_upgrades_fit(
    filters: Any, one: str, other: str, fit: bool
) -> None:
    hosts = {"h1": told(version=one), "h2": told(version=other), "h3": told()}
    assert (faults_of(filters, hosts=hosts) == []) is fit


def test_a_version_counts_where_there_are_data(filters: Any) -> None:
    host = {
        "volumes": [{"Name": "a-rabbitmq"}],
        "records": {"rabbitmq.version": "4.0.5 rabbit@h i"},
    }
    assert filters["preflight_version"](host, "a") == "4.0.5"
    assert filters["preflight_version"](host, "b") == ""
    assert filters["preflight_version"]({"volumes": host["volumes"], "records": {}}, "a") == ""


def test_what_a_question_takes_is_no_difference_of_clocks(filters: Any) -> None:
    def faults(*ahead: float) -> list[str]:
        # Each was asked at 1000; h2's answer took 4 s, and all were there at 1006.
        times = zip(NODES, ahead, (0.5, 4.0, 0.5), strict=True)
        answers = {
            name: {"asked": 1000.0, "began": 1000 + late + by, "ended": 1000.1 + late + by}
            for name, by, late in times
        }
        hosts = {name: {"__preflight_first": answer} for name, answer in answers.items()}
        found: list[str] = filters["preflight_clock_faults"](hosts, NODES, 1006.0)
        return found

    assert faults(0, 0, 0) == []
    assert faults(0, 2, -2) == []
    assert [fault[:50] for fault in faults(0, 30, 0)] == [
        "The clock of h2 is 27 s or more ahead of h1's, and",
        "The clock of h2 is 27 s or more ahead of h3's, and",
    ]
    assert "The clock of h1 is 20 s or more ahead of h2's" in faults(0, -30, 0)[0]


def test_ports_that_others_need_are_those_at_open_addresses(filters: Any) -> None:
    addresses = {"a": "stack_bind_address", "b": "stack_loopback", "c": "stack_cluster_address"}
    addresses |= {"d": "rabbitmq_management_bind_address", "e": "monitoring_bind_address"}
    ports = {"a": 5000, "b": 24224, "c": "4369", "d": 15672, "e": ""}
    assert filters["preflight_crossing"](ports, addresses) == [4369, 5000]


def test_a_host_listens_where_it_refused_others(filters: Any) -> None:
    def found(*answers: tuple[str, int, str]) -> dict[str, Any]:
        keys = ("address", "port", "why")
        unreached = [dict(zip(keys, answer, strict=True)) for answer in answers]
        return {"__preflight_first": {"unreached": unreached}}

    hosts = {
        "h1": found(("b", 4369, "refused")) | {"stack_told_address": "a"},
        "h2": found(("a", 5000, "refused"), ("a", 4369, "refused"), ("c", 1, "refused")),
        "h3": found(("a", 4369, "refused"), ("a", 9090, "timed out")),
    }
    assert filters["preflight_silent"](hosts, NODES, "h1") == [4369, 5000]


def test_what_a_host_does_not_reach_is_named(filters: Any) -> None:
    others = [{"name": "h2", "address": "192.0.2.2"}, {"name": "h3", "address": "192.0.2.3"}]
    ports = {"stack_epmd_port": 4369, "apps_publisher_port": "5000", "unused_port": ""}
    unreached = [
        {"address": "192.0.2.2", "port": 4369, "why": "timed out"},
        {"address": "192.0.2.2", "port": 5000, "why": "timed out"},
        {"address": "192.0.2.3", "port": 4369, "why": "refused"},
    ]
    first, second = filters["preflight_unreached"](unreached, others, ports, "h1")
    assert first.startswith(
        "h1 does not reach h2 at 192.0.2.2 (timed out) on 4369 (stack_epmd_port) and 5000 (apps_pub"
    )
    assert second.startswith("h1 does not reach h3 at 192.0.2.3 (refused) on 4369 (stack_epmd_p")
    assert filters["preflight_unreached"]([], others, ports, "h1") == []


def test_doors_are_told_of_the_brokers_and_doors_of_other_hosts_and_of_their_names(
    filters: Any,
) -> None:
    others = [{"name": "h2", "address": "192.0.2.2"}, {"name": "h3", "address": "192.0.2.3"}]
    assert filters["apps_brokers"](others, 5671) == "h2:5671,h3:5671"
    assert filters["apps_doors"](others, 5001) == "h2=https://h2:5001,h3=https://h3:5001"
    hostvars = {"h1": {}, "h2": {"ansible_host": "two.example"}, "h3": {}}
    told = filters["apps_other_names"](hostvars, others)
    assert told == ["h2", "192.0.2.2", "two.example", "h3", "192.0.2.3", "h3"]
    alone = filters["apps_brokers"]([], 5671), filters["apps_doors"]([], 5001)
    assert (*alone, filters["apps_other_names"](hostvars, [])) == ("", "", [])


def test_an_official_image_is_what_its_variable_names(filters: Any) -> None:
    catalogue = {"a": {"image": {"contexts": ["x"], "upstream": "a_image"}}}
    catalogue |= {"b": {"image": {"contexts": ["y"]}}, "c": {}}
    wanted = filters["image_wanted"](catalogue, ["a", "b"], {"a_image": "a:1"})
    assert wanted == {
        "a": {"contexts": ["x"], "upstream": "a:1"},
        "b": {"contexts": ["y"], "upstream": ""},
    }


def test_what_is_backed_up_is_the_volume_of_each_container_that_has_data(filters: Any) -> None:
    def mounted(name: str, source: str) -> dict[str, str]:
        return {"Type": "volume", "Name": name, "Source": source}

    bind, other = {"Type": "bind", "Source": "/etc/x"}, mounted("0a1b", "/v/0")
    containers = {
        name: {"Names": [f"/b-{name}"], "State": state, "Mounts": mounts}
        for name, state, mounts in [
            ("rabbitmq", "running", [bind, other, mounted("b-rabbitmq", "/v/1")]),
            ("prometheus", "exited", [mounted("b-prometheus", "/v/2")]),
            ("publisher", "running", [bind]),
        ]
    }
    services = ["rabbitmq", "alertmanager", "prometheus"]
    assert filters["backup_running"](services, containers) == ["rabbitmq"]
    folders = {"rabbitmq": "/v/1", "prometheus": "/v/2"}
    assert filters["backup_volumes"](services, containers) == folders


def test_what_carries_the_stack_s_label_is_there_already(filters: Any) -> None:
    volumes = [{"Name": "broker-x", "Labels": OWN_LABEL}, {"Name": "y", "Labels": None}]
    containers = [container("broker-a", OWN_LABEL), container("broker-b", {}), container("c", None)]
    host = {"containers": containers, "volumes": volumes}
    there = ["container broker-a", "volume broker-x"]
    assert filters["preflight_there"](host, "broker") == there


def test_a_password_file_that_no_run_could_use_is_told(filters: Any) -> None:
    def file(path: str, size: int = 32, uid: int = os.getuid()) -> dict[str, Any]:
        return {"path": path, "size": size, "uid": uid}

    files = [file("/good"), file("/empty", 0), file("/x.lockfile"), file("/other", uid=4242)]
    assert filters["preflight_useless"](files) == ["/empty", "/x.lockfile", "/other"]


def test_a_receiver_s_file_is_a_secret_that_is_given_or_the_image_s(filters: Any) -> None:
    folder = "/etc/alertmanager/secrets"
    receivers = [
        {"webhook_configs": [{"url_file": f"{folder}/one"}, {"url_file": f"{folder}/empty"}]},
        {"email_configs": [{"tls_config": {"ca_file": "/etc/ssl/ca.pem"}, "to": "a_file"}]},
        {"email_configs": [{"auth_password_file": "/elsewhere"}]},
    ]
    missing = filters["monitoring_missing_secrets"](receivers, {"one": "1", "empty": ""})
    assert missing == [f"{folder}/empty", "/elsewhere"]


@pytest.mark.parametrize(
    ("given", "bad"),
    [
        ({"for": "1m30s", "above": 0.5, "within": "1d", "hours": "4", "days": 7}, []),
        ({"for": "0s"}, ["0s"]),
        ({"for": "90"}, ["90"]),
        ({"for": ""}, [""]),
        ({"above": -1}, ["-1"]),
        ({"above": "1\n"}, ["1\n"]),
        ({"below": 1}, ["below"]),
        ({"queues": {"orders": 5000, "orders.dead": "0.5"}}, []),
        ({"queues": {"order": 1, "orders": "many"}}, ["order", "many"]),
        ({"queues": 5000}, ["5000"]),
    ],
)
def test_an_alert_takes_the_values_that_it_knows(
    filters: Any, given: dict[str, Any], bad: list[str]
) -> None:
    known = dict.fromkeys(("for", "above", "within", "hours", "days", "queues"))
    assert filters["monitoring_bad_values"](given, known, ["takeaway", "orders"]) == bad
