"""What the filters of the role rabbitmq share: the lists' entries, and what the stack declares."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Definitions = dict[str, list[dict[str, Any]]]
# An entry of stack_queues or stack_topics.
Entry = Mapping[str, Any]

PRIORITY = 1000
# What a policy of the stack's is called by: stack:takeaway.
PREFIX = "stack:"
# By this argument a topic, or a client's exchange, is known as the stack's, and by this tag a user.
# The broker knows no meaning of them.
MARK = {"message-broker-stack": "topic"}
USER_TAG = "message-broker-stack"
# A client that sends by AMQP has an exchange of its own: by another it could reach every queue.
CLIENT_EXCHANGE = "client."

TIME = re.compile(r"[1-9][0-9]{0,9}[smhd]")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE = re.compile(r"[1-9][0-9]{0,9}[KMGT]")
BITS = {"K": 10, "M": 20, "G": 30, "T": 40}


def by_name(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return entries by their names, which may be written as numbers, without what is not set."""
    given = ({key: value for key, value in one.items() if value is not None} for one in entries)
    return sorted(
        ({**one, "name": str(one.get("name", ""))} for one in given), key=lambda one: one["name"]
    )


def seconds(text: object) -> int:
    """Return the seconds of a time such as 12h; 0 where it is none."""
    time = str(text)
    return int(time[:-1]) * SECONDS[time[-1]] if TIME.fullmatch(time) else 0


def bytes_of(text: object) -> int:
    """Return the bytes of a size such as 500M; 0 where it is none."""
    size = str(text)
    return int(size[:-1]) << BITS[size[-1]] if SIZE.fullmatch(size) else 0


def declared(
    exchange: str, queues: Iterable[Entry], topics: Iterable[Entry], clients: Iterable[Entry]
) -> Definitions:
    """Return the exchanges and queues that the stack declares, as definitions."""
    return {
        "exchanges": [
            _exchange(exchange, "direct", {}),
            *(_exchange(topic["name"], "topic", MARK) for topic in by_name(topics)),
            *(
                _exchange(f"{CLIENT_EXCHANGE}{one['name']}", "direct", MARK)
                for one in by_name(clients)
                if one.get("amqp")
            ),
        ],
        "queues": [
            queue
            for name in (entry["name"] for entry in by_name(queues))
            for queue in (
                _queue(name, f"{name}.dead", {}),
                _queue(f"{name}.dead", name, {"x-delivery-limit": -1}),
            )
        ],
    }


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
