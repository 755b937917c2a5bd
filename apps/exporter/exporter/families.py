"""Which field of the management API becomes which metric, and the samples of one scrape."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Self

from exporter.settings import Settings
from exporter.text import Family, Kind, label_text

# Field of the API: name without rabbitmq_, help text.
Table = Mapping[str, tuple[str, str]]
# A thing's labels, as text, and its numbers by field.
Row = tuple[str, Mapping[str, float]]

OVERVIEW: Table = {
    "object_totals.channels": ("channels", "Open channels."),
    "object_totals.connections": ("connections", "Open connections."),
    "object_totals.consumers": ("consumers", "Consumers."),
    "object_totals.queues": ("queues", "Queues."),
    "object_totals.exchanges": ("exchanges", "Exchanges."),
    "queue_totals.messages": ("queue_messages_global", "Messages in all queues."),
    "queue_totals.messages_ready": (
        "queue_messages_ready_global",
        "Messages in all queues that wait for a consumer.",
    ),
    "queue_totals.messages_unacknowledged": (
        "queue_messages_unacknowledged_global",
        "Messages of all queues that a consumer has and did not acknowledge yet.",
    ),
    "message_stats.publish_details.rate": (
        "messages_publish_rate",
        "Messages published in a second.",
    ),
    "message_stats.deliver_no_ack_details.rate": (
        "messages_deliver_no_ack_rate",
        "Messages delivered in a second to consumers that acknowledge nothing.",
    ),
    "message_stats.deliver_details.rate": (
        "messages_deliver_rate",
        "Messages delivered in a second to consumers that acknowledge.",
    ),
}
# The names of version 0.29, without labels.
OVERVIEW_OLD: Table = {
    field: (name, f"What rabbitmq_{OVERVIEW[field][0]} is called since version 1.")
    for field, name in {
        "object_totals.channels": "channelsTotal",
        "object_totals.connections": "connectionsTotal",
        "object_totals.consumers": "consumersTotal",
        "object_totals.queues": "queuesTotal",
        "object_totals.exchanges": "exchangesTotal",
        "queue_totals.messages": "queue_messages_total",
        "queue_totals.messages_ready": "queue_messages_ready_total",
        "queue_totals.messages_unacknowledged": "queue_messages_unacknowledged_total",
    }.items()
}

NODE: Table = {
    "uptime": ("uptime", "Milliseconds since the node started."),
    "running": ("running", "1 while the node runs."),
    "mem_used": ("node_mem_used", "Bytes of memory in use."),
    "mem_limit": ("node_mem_limit", "Bytes of memory at which the node blocks publishers."),
    "mem_alarm": ("node_mem_alarm", "1 while publishers are blocked for want of memory."),
    "disk_free": ("node_disk_free", "Bytes free on the disk."),
    "disk_free_alarm": ("node_disk_free_alarm", "1 while publishers are blocked for want of disk."),
    "disk_free_limit": ("node_disk_free_limit", "Bytes free at which the node blocks publishers."),
    "fd_used": ("fd_used", "File descriptors in use."),
    "fd_total": ("fd_available", "File descriptors that the node may use."),
    "sockets_used": ("sockets_used", "Sockets in use."),
    "sockets_total": ("sockets_available", "Sockets that the node may use."),
    "partitions_len": ("partitions", "Nodes that this one is parted from; 0 is good."),
}
# The names of version 0.29, with the label node alone.
NODE_OLD: Table = {
    "fd_total": ("fd_total", "What rabbitmq_fd_available is called since version 1."),
    "sockets_total": (
        "sockets_total",
        "What rabbitmq_sockets_available is called since version 1.",
    ),
}

EXCHANGE_COUNTERS: Table = {
    f"message_stats.{field}": (f"exchange_messages_{name}_total", f"Messages {text}.")
    for field, name, text in [
        ("publish", "published", "published"),
        ("publish_in", "published_in", "published to this exchange, routed or not"),
        ("publish_out", "published_out", "that this exchange gave to queues and exchanges"),
        ("confirm", "confirmed", "confirmed to their publishers"),
        ("deliver", "delivered", "delivered to consumers that acknowledge"),
        ("deliver_no_ack", "delivered_noack", "delivered to consumers that acknowledge nothing"),
        ("get", "get", "fetched one by one, to be acknowledged"),
        ("get_no_ack", "get_noack", "fetched one by one, without acknowledgement"),
        ("ack", "ack", "acknowledged"),
        ("redeliver", "redelivered", "delivered once more"),
        ("return_unroutable", "returned", "returned to their publishers as unroutable"),
    ]
}

QUEUE: Table = {
    "messages_ready": ("queue_messages_ready", "Messages that wait for a consumer."),
    "messages_unacknowledged": (
        "queue_messages_unacknowledged",
        "Messages that a consumer has and did not acknowledge yet.",
    ),
    "messages": ("queue_messages", "Messages, ready and unacknowledged."),
    "messages_ready_ram": ("queue_messages_ready_ram", "Ready messages that are in memory."),
    "messages_unacknowledged_ram": (
        "queue_messages_unacknowledged_ram",
        "Unacknowledged messages that are in memory.",
    ),
    "messages_ram": ("queue_messages_ram", "Messages that are in memory."),
    "messages_persistent": ("queue_messages_persistent", "Messages that survive a restart."),
    "message_bytes": ("queue_message_bytes", "Bytes of all bodies."),
    "message_bytes_ready": ("queue_message_bytes_ready", "Bytes of the ready bodies."),
    "message_bytes_unacknowledged": (
        "queue_message_bytes_unacknowledged",
        "Bytes of the unacknowledged bodies.",
    ),
    "message_bytes_ram": ("queue_message_bytes_ram", "Bytes of the bodies that are in memory."),
    "message_bytes_persistent": (
        "queue_message_bytes_persistent",
        "Bytes of the bodies that survive a restart.",
    ),
    "consumers": ("queue_consumers", "Consumers."),
    "consumer_utilisation": (
        "queue_consumer_utilisation",
        "Share of the time, 0 to 1, in which the consumers could take a message at once.",
    ),
    "memory": ("queue_memory", "Bytes of memory of the queue's process."),
    "head_message_timestamp": (
        "queue_head_message_timestamp",
        "The timestamp property of the oldest message, in seconds since 1970.",
    ),
    "garbage_collection.min_heap_size": ("queue_gc_min_heap", "Smallest heap, in words."),
    "garbage_collection.min_bin_vheap_size": (
        "queue_gc_min_vheap",
        "Smallest virtual heap of binaries, in words.",
    ),
    "garbage_collection.fullsweep_after": (
        "queue_gc_collections_before_fullsweep",
        "Collections of young data before one of all.",
    ),
    "slave_nodes_len": ("queue_slaves_nodes_len", "Mirrors of a classic queue."),
    "synchronised_slave_nodes_len": (
        "queue_synchronised_slave_nodes_len",
        "Mirrors of a classic queue that have every message.",
    ),
    "members_len": ("queue_member_nodes_len", "Nodes that hold a quorum queue."),
    "online_len": ("queue_online_nodes_len", "Nodes that hold a quorum queue and run."),
    "message_stats.publish_details.rate": (
        "queue_messages_publish_rate",
        "Messages published to the queue in a second.",
    ),
    "message_stats.deliver_no_ack_details.rate": (
        "queue_messages_deliver_no_ack_rate",
        "Messages delivered in a second to consumers that acknowledge nothing.",
    ),
    "message_stats.deliver_details.rate": (
        "queue_messages_deliver_rate",
        "Messages delivered in a second to consumers that acknowledge.",
    ),
}
QUEUE_LIMITS: Table = {
    "max-length-bytes": (
        "queue_max_length_bytes",
        "Bytes of ready bodies that the queue may hold.",
    ),
    "max-length": ("queue_max_length", "Ready messages that the queue may hold."),
}
QUEUE_COUNTERS: Table = {
    "disk_reads": ("queue_disk_reads_total", "Messages read from the disk."),
    "disk_writes": ("queue_disk_writes_total", "Messages written to the disk."),
    "reductions": ("queue_reductions_total", "Reductions, Erlang's measure of work."),
    "garbage_collection.minor_gcs": (
        "queue_gc_minor_collections_total",
        "Garbage collections of young data.",
    ),
} | {
    f"message_stats.{field}": (f"queue_messages_{name}_total", f"Messages {text}.")
    for field, name, text in [
        ("publish", "published", "published to the queue"),
        ("confirm", "confirmed", "confirmed to their publishers"),
        ("deliver", "delivered", "delivered to consumers that acknowledge"),
        ("deliver_no_ack", "delivered_noack", "delivered to consumers that acknowledge nothing"),
        ("get", "get", "fetched one by one, to be acknowledged"),
        ("get_no_ack", "get_noack", "fetched one by one, without acknowledgement"),
        ("redeliver", "redelivered", "delivered once more"),
        ("return", "returned", "returned to their publishers as unroutable"),
        ("ack", "ack", "acknowledged"),
    ]
}

CONNECTION: Table = {
    "channels": ("connection_channels", "Open channels."),
    "recv_oct": ("connection_received_bytes", "Bytes received."),
    "recv_cnt": ("connection_received_packets", "Packets received."),
    "send_oct": ("connection_send_bytes", "Bytes sent."),
    "send_cnt": ("connection_send_packets", "Packets sent."),
    "send_pend": ("connection_send_pending", "Packets that wait to be sent."),
}


class ShapeError(ValueError):
    """The API's answer is no JSON or not what this module's answer looks like."""


class Record(NamedTuple):
    """A thing that the API tells of: its fields, and of these the numbers by dotted path."""

    fields: dict[str, Any]
    numbers: dict[str, float]

    def text(self, field: str) -> str:
        """Return a field for a label: its text, true or false, or nothing."""
        value = self.fields.get(field)
        if isinstance(value, bool):
            return str(value).lower()
        # JSON can spell halves of surrogate pairs, which UTF-8 cannot.
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


@dataclass(frozen=True)
class Origin:
    """The node that answered, and how many queues its cluster has."""

    cluster: str
    node: str
    queues: float

    @classmethod
    def of(cls, overview: Record) -> Self:
        """Return where the overview came from."""
        queues = overview.numbers.get("object_totals.queues", 0)
        return cls(overview.text("cluster_name"), overview.text("node"), queues)


def parse(module: str, body: bytes) -> list[Record]:
    """Return what body, module's answer, tells of; ShapeError when that cannot be."""
    answer = decode(body)
    names = {"overview": ("node", "cluster_name"), "connections": ()}.get(module, ("name",))
    return records([answer] if module == "overview" else answer, names)


def decode(body: bytes) -> Any:
    """Return body's JSON with every number as a float; ShapeError when it is none."""
    try:
        # Whole numbers as floats: these have no end at which Python refuses them.
        return json.loads(body.decode("utf-8", "replace"), parse_int=float, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ShapeError("the answer is no JSON") from None


def records(found: Any, names: Iterable[str]) -> list[Record]:
    """Return the things in found, which each have a text of these names; ShapeError."""
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise ShapeError("the answer is JSON of an unexpected shape")
    for name in names:
        if not all(isinstance(fields.get(name), str) for fields in found):
            raise ShapeError(f"the answer lacks a {name}")
    try:
        return [Record(fields, dict(_numbers(fields))) for fields in found]
    except RecursionError:
        raise ShapeError("the answer is JSON of an unexpected shape") from None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _numbers(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in fields by dotted path: a boolean is 1 or 0, a list its `…_len`."""
    for name, value in fields.items():
        if isinstance(value, float | bool):
            yield prefix + name, float(value)
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}_len", float(len(value))


class Families:
    """The families of one scrape's data."""

    def __init__(self, settings: Settings, origin: Origin) -> None:
        """Label with origin what settings let through."""
        self._settings = settings
        self._origin = origin

    def of(self, module: str, records: list[Record]) -> Iterator[Family]:
        """Yield the families of module's records."""
        yield from {
            "overview": self._overview,
            "node": self._node,
            "exchange": self._exchange,
            "queue": self._queue,
            "connections": self._connections,
        }[module](records)

    def _self(self, node: str) -> str:
        if self._settings.loadbalancer:
            return "lb"
        return "1" if node == self._origin.node else "0"

    def _table(
        self,
        table: Table,
        rows: list[Row],
        kind: Kind = "gauge",
        default: float | None = None,
    ) -> Iterator[Family]:
        """Yield table's families; a row without a field's number has default, None: no sample."""
        for field, (name, text) in table.items():
            if field not in self._settings.exclude:
                samples = ((labels, numbers.get(field, default)) for labels, numbers in rows)
                given = [(labels, value) for labels, value in samples if value is not None]
                yield Family(f"rabbitmq_{name}", text, given, kind)

    def _overview(self, records: list[Record]) -> Iterator[Family]:
        overview = records[0]
        cluster, node = self._origin.cluster, self._origin.node
        yield from self._table(OVERVIEW, [(label_text({"cluster": cluster}), overview.numbers)])
        yield from self._table(OVERVIEW_OLD, [("", overview.numbers)])
        version = {
            "rabbitmq": overview.text("rabbitmq_version"),
            "erlang": overview.text("erlang_version"),
            "node": node,
            "cluster": cluster,
        }
        text = "1; the labels tell the versions."
        yield Family("rabbitmq_version_info", text, [(label_text(version), 1)])

    def _node(self, records: list[Record]) -> Iterator[Family]:
        nodes = [(record.text("name"), record.numbers) for record in records]
        cluster = self._origin.cluster
        rows: list[Row] = [
            (label_text({"cluster": cluster, "node": node, "self": self._self(node)}), numbers)
            for node, numbers in nodes
        ]
        yield from self._table(NODE, rows)
        rows = [(label_text({"node": node}), numbers) for node, numbers in nodes]
        yield from self._table(NODE_OLD, rows)

    def _exchange(self, records: list[Record]) -> Iterator[Family]:
        rows: list[Row] = []
        for record in records:
            vhost, name = record.text("vhost"), record.text("name")
            if self._settings.vhosts.takes(vhost) and self._settings.exchanges.takes(name):
                labels = {"cluster": self._origin.cluster, "vhost": vhost, "exchange": name}
                rows.append((label_text(labels), record.numbers))
        yield from self._table(EXCHANGE_COUNTERS, rows, "counter")

    def _queue(self, records: list[Record]) -> Iterator[Family]:
        rows: list[Row] = []
        limits: list[Row] = []
        states: list[tuple[str, float]] = []
        idle: list[tuple[str, float]] = []
        for record in records:
            vhost, name = record.text("vhost"), record.text("name")
            if not self._settings.vhosts.takes(vhost) or not self._settings.queues.takes(name):
                continue
            labels = {
                "cluster": self._origin.cluster,
                "vhost": vhost,
                "queue": name,
                "durable": record.text("durable"),
                "policy": record.text("policy"),
                "self": self._self(record.text("node")),
            }
            queue = label_text(labels)
            rows.append((queue, record.numbers))
            limits.append((queue, _limits(record.numbers)))
            state = record.text("state")
            if (since := _seconds(record.text("idle_since"))) is not None:
                idle.append((queue, since))
                state = "idle" if state == "running" else state
            states.append((label_text(labels | {"state": state}), 1))
        yield from self._table(QUEUE, rows)
        yield from self._table(QUEUE_COUNTERS, rows, "counter", default=0)
        yield from self._table(QUEUE_LIMITS, limits)
        yield Family("rabbitmq_queue_state", "1 for the state that the queue is in.", states)
        text = "When the queue was used last, in seconds since 1970."
        yield Family("rabbitmq_queue_idle_since_seconds", text, idle)

    def _connections(self, records: list[Record]) -> Iterator[Family]:
        sums: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        states: dict[tuple[str, ...], float] = defaultdict(float)
        for record in records:
            key = tuple(record.text(name) for name in ("vhost", "node", "peer_host", "user"))
            states[*key, record.text("state")] += 1
            numbers = sums[key]
            for field in CONNECTION.keys() & record.numbers.keys():
                numbers[field] = numbers.get(field, 0) + record.numbers[field]
        rows: list[Row] = [(label_text(self._peer(*key)), numbers) for key, numbers in sums.items()]
        yield from self._table(CONNECTION, rows)
        text = "Connections in this state."
        counts = [
            (label_text(self._peer(*key) | {"state": state}), count)
            for (*key, state), count in states.items()
        ]
        yield Family("rabbitmq_connection_status", text, counts)

    def _peer(self, vhost: str, node: str, peer_host: str, user: str) -> dict[str, str]:
        return {
            "cluster": self._origin.cluster,
            "vhost": vhost,
            "node": node,
            "peer_host": peer_host,
            "user": user,
            "self": self._self(node),
        }


def _limits(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return for each limit the lower one of the queue's argument and its policies."""
    limits: dict[str, float] = {}
    for limit in QUEUE_LIMITS:
        paths = f"arguments.x-{limit}", f"effective_policy_definition.{limit}"
        if given := [numbers[path] for path in paths if path in numbers]:
            limits[limit] = min(given)
    return limits


def _seconds(time: str) -> float | None:
    """Return a time of the API, which is UTC unless it says otherwise, in seconds since 1970."""
    try:
        when = datetime.fromisoformat(time)
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
