"""What a scrape tells of a broker, compared with the original's list and the API's fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Exporter, FakeBroker

LINES = Path(__file__).with_name("families.tsv").read_text().splitlines()[1:]
FAMILIES = [dict(zip(LINES[0].split("\t"), line.split("\t"), strict=True)) for line in LINES[1:]]
OLD_TOTALS = {
    "rabbitmq_channelsTotal": "rabbitmq_channels",
    "rabbitmq_connectionsTotal": "rabbitmq_connections",
    "rabbitmq_consumersTotal": "rabbitmq_consumers",
    "rabbitmq_queuesTotal": "rabbitmq_queues",
    "rabbitmq_exchangesTotal": "rabbitmq_exchanges",
    "rabbitmq_queue_messages_total": "rabbitmq_queue_messages_global",
    "rabbitmq_queue_messages_ready_total": "rabbitmq_queue_messages_ready_global",
    "rabbitmq_queue_messages_unacknowledged_total": "rabbitmq_queue_messages_unacknowledged_global",
}
OLD_NODE = {
    "rabbitmq_fd_total": "rabbitmq_fd_available",
    "rabbitmq_sockets_total": "rabbitmq_sockets_available",
}
COMPUTED = {
    "rabbitmq_queue_max_length": 400,
    "rabbitmq_queue_max_length_bytes": 7000,
    "rabbitmq_queue_state": 1,
    "rabbitmq_queue_idle_since_seconds": 1795521600.5,
    "rabbitmq_connection_status": 1,
    "rabbitmq_version_info": 1,
}
QUEUE = {
    "cluster": "rabbit@broker1",
    "vhost": "/",
    "queue": "takeaway",
    "durable": "true",
    "policy": "takeaway",
    "self": "1",
}


def field(pages: dict[str, Any], source: str) -> float:
    """Return the number at a source of the list, such as `/api/queues garbage_collection.x`."""
    path, _, steps = source.partition(" ")
    found = pages[path][0] if isinstance(pages[path], list) else pages[path]
    for step in steps.split("."):
        found = len(found[step[:-4]]) if step.endswith("_len") else found[step]
    return float(found)


def test_a_scrape_has_each_family_of_the_list_with_its_type_and_labels(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    scraped = export(RABBIT_EXPORTERS=broker.modules).scrape()
    expected = {
        line["name"]: (line["type"], sorted(line["labels"].split(","))) for line in FAMILIES
    }
    expected |= dict.fromkeys(OLD_TOTALS, ("gauge", []))
    expected |= dict.fromkeys(OLD_NODE, ("gauge", ["node"]))
    expected["process_start_time_seconds"] = ("gauge", [])
    found = {
        name: (kind, *{tuple(sorted(labels)) for labels in scraped.labels(name)})
        for name, kind in scraped.types.items()
    }
    assert found == {name: (kind, tuple(labels)) for name, (kind, labels) in expected.items()}
    helps = [line for line in scraped.text.splitlines() if line.startswith("# HELP")]
    assert all(len(line.split(" ", 3)[3]) > 1 for line in helps)


def test_each_family_has_the_number_of_its_field(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    scraped = export(RABBIT_EXPORTERS=broker.modules).scrape()
    found = {name: value for (name, _), value in scraped.samples.items()}
    expected = {
        line["name"]: COMPUTED.get(line["name"]) or field(broker.pages, line["source"])
        for line in FAMILIES
        if line["module"] != "global"
    }
    assert {name: found[name] for name in expected} == expected


def test_labels_tell_what_the_api_tells(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    scraped = export(RABBIT_EXPORTERS=broker.modules).scrape()
    cluster = {"cluster": "rabbit@broker1"}
    node = {"node": "rabbit@broker1"}
    version = {"rabbitmq": "4.0.5", "erlang": "26.2.5"}
    connection = {"vhost": "/", "peer_host": "172.18.0.5", "user": "publisher", "self": "1"}
    for name, labels in {
        "rabbitmq_version_info": version | cluster | node,
        "rabbitmq_up": cluster | node,
        "rabbitmq_channels": cluster,
        "rabbitmq_running": cluster | node | {"self": "1"},
        "rabbitmq_fd_total": node,
        "rabbitmq_queue_messages": QUEUE,
        "rabbitmq_queue_state": QUEUE | {"state": "idle"},
        "rabbitmq_connection_status": cluster | node | connection | {"state": "running"},
        "rabbitmq_exporter_build_info": {
            "version": "0.1.0",
            "revision": "",
            "branch": "",
            "builddate": "",
        },
    }.items():
        assert scraped.labels(name) == [labels]


def test_the_names_of_version_0_29_have_the_same_numbers(export: Callable[..., Exporter]) -> None:
    scraped = export().scrape()
    cluster = {"cluster": "rabbit@broker1"}
    for old, new in OLD_TOTALS.items():
        assert scraped.value(old) == scraped.value(new, **cluster) is not None
    node = {"node": "rabbit@broker1"}
    for old, new in OLD_NODE.items():
        assert scraped.value(old, **node) == scraped.value(new, **cluster, **node, self="1")
        assert scraped.value(old, **node)


def test_the_default_scrape_has_no_connections(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    scraped = export().scrape()
    assert not {name for name in scraped.types if name.startswith("rabbitmq_connection_")}
    assert scraped.modules() == {"overview": 1, "exchange": 1, "node": 1, "queue": 1}
    assert broker.paths["connections"] not in broker.asked


def test_counters_that_the_api_lacks_are_zero_of_queues_and_absent_of_exchanges(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    del broker.pages["/api/queues"][0]["message_stats"]
    broker.pages["/api/exchanges"][0]["message_stats"] = {"publish_in": 5}
    scraped = export().scrape()
    assert scraped.value("rabbitmq_queue_messages_published_total", **QUEUE) == 0
    assert scraped.value("rabbitmq_queue_messages_publish_rate", **QUEUE) is None
    names = {name for name in scraped.types if name.startswith("rabbitmq_exchange_")}
    assert names == {"rabbitmq_exchange_messages_published_in_total"}


def change(broker: FakeBroker, **fields: Any) -> None:
    broker.pages["/api/queues"][0] |= fields


@pytest.mark.parametrize(
    ("arguments", "policy", "expected"),
    [({}, {}, None), ({"x-max-length": 5}, {}, 5), ({}, {"max-length": 6}, 6)],
)
def test_a_limit_is_told_where_there_is_one(
    broker: FakeBroker,
    export: Callable[..., Exporter],
    arguments: dict[str, int],
    policy: dict[str, int],
    expected: int | None,
) -> None:
    change(broker, arguments=arguments, effective_policy_definition=policy)
    assert export().scrape().value("rabbitmq_queue_max_length", **QUEUE) == expected


@pytest.mark.parametrize(
    ("state", "idle_since", "expected", "seconds"),
    [
        ("running", None, "running", None),
        ("running", "", "running", None),
        ("running", "lately", "running", None),
        ("running", "2026-11-24 12:00:00", "idle", 1795521600),
        ("running", "2026-11-24T13:00:00.25+01:00", "idle", 1795521600.25),
        ("flow", "2026-11-24 12:00:00", "flow", 1795521600),
    ],
)
def test_a_running_queue_with_a_time_of_rest_is_idle(
    broker: FakeBroker,
    export: Callable[..., Exporter],
    state: str,
    idle_since: str | None,
    expected: str,
    seconds: float | None,
) -> None:
    change(broker, state=state, idle_since=idle_since)
    scraped = export().scrape()
    assert scraped.labels("rabbitmq_queue_state") == [QUEUE | {"state": expected}]
    assert scraped.value("rabbitmq_queue_idle_since_seconds", **QUEUE) == seconds


def test_connections_are_summed_by_their_labels(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    def connection(name: str, channels: int, **fields: str) -> dict[str, Any]:
        full: dict[str, Any] = broker.connection(lambda: channels, name)
        return full | fields

    broker.pages["/api/connections"] = [
        connection("a", 1),
        connection("b", 2),
        connection("c", 4, state="blocked"),
        connection("d", 8, node="rabbit@broker2"),
        {"name": "one that is only starting"},
    ]
    scraped = export(RABBIT_EXPORTERS="connections").scrape()
    peer = {"vhost": "/", "peer_host": "172.18.0.5", "user": "publisher"} | {
        "cluster": "rabbit@broker1"
    }
    first = peer | {"node": "rabbit@broker1", "self": "1"}
    second = peer | {"node": "rabbit@broker2", "self": "0"}
    assert scraped.value("rabbitmq_connection_channels", **first) == 7
    assert scraped.value("rabbitmq_connection_channels", **second) == 8
    assert scraped.value("rabbitmq_connection_status", **first, state="running") == 2
    assert scraped.value("rabbitmq_connection_status", **first, state="blocked") == 1
    assert scraped.value("rabbitmq_connection_status", **second, state="running") == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["0", "1"]),
        ({"RABBIT_CONNECTION": "direct"}, ["0", "1"]),
        ({"RABBIT_CONNECTION": "loadbalancer"}, ["lb", "lb"]),
    ],
)
def test_self_tells_which_node_answered_unless_a_load_balancer_chose_it(
    broker: FakeBroker,
    export: Callable[..., Exporter],
    variables: dict[str, str],
    expected: list[str],
) -> None:
    for module in "node", "queue":
        other = getattr(broker, module)(lambda: 1, "rabbit@broker2")
        broker.pages[broker.paths[module]].append(other | {"node": "rabbit@broker2"})
    scraped = export(**variables).scrape()
    for name in "rabbitmq_running", "rabbitmq_queue_messages":
        assert sorted(labels["self"] for labels in scraped.labels(name)) == expected


THINGS = [("/", "orders"), ("/", "orders.dead"), ("test", "orders"), ("/", "")]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        # Unanchored; the default skips the empty name, the one of the default exchange.
        ({}, {0, 1, 2}),
        ({"INCLUDE_{}": "dead"}, {1}),
        ({"INCLUDE_{}": "^orders$"}, {0, 2}),
        ({"SKIP_{}": "dead$"}, {0, 2, 3}),
        ({"SKIP_{}": "^.$"}, {0, 1, 2, 3}),
        ({"INCLUDE_VHOST": "es"}, {2}),
        ({"SKIP_VHOST": "^test$", "INCLUDE_{}": "orders"}, {0, 1}),
    ],
)
@pytest.mark.parametrize("module", ["queue", "exchange"])
def test_filters_search_names_and_vhosts(
    broker: FakeBroker,
    export: Callable[..., Exporter],
    variables: dict[str, str],
    expected: set[int],
    module: str,
) -> None:
    what = f"{module}s".upper()
    make = getattr(broker, module)
    things = [make(lambda: 1, name) | {"vhost": vhost} for vhost, name in THINGS]
    broker.pages[broker.paths[module]] = things
    scraped = export(**{name.format(what): value for name, value in variables.items()}).scrape()
    name = f"rabbitmq_{module}_messages_published_total"
    found = {(labels["vhost"], labels[module]) for labels in scraped.labels(name)}
    assert found == {THINGS[number] for number in expected}


def test_excluded_fields_take_their_families_with_them(export: Callable[..., Exporter]) -> None:
    every = set(export().scrape().types)
    fields = "messages_ready,message_stats.publish,object_totals.queues,fd_total,max-length,nothing"
    assert every - set(export(EXCLUDE_METRICS=fields).scrape().types) == {
        "rabbitmq_queue_messages_ready",
        "rabbitmq_queue_messages_published_total",
        "rabbitmq_exchange_messages_published_total",
        "rabbitmq_queues",
        "rabbitmq_queuesTotal",
        "rabbitmq_fd_available",
        "rabbitmq_fd_total",
        "rabbitmq_queue_max_length",
    }


def test_more_queues_than_allowed_are_not_asked_for(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    broker.pages["/api/overview"]["object_totals"]["queues"] = 3
    exporter = export(MAX_QUEUES="2")
    scraped = exporter.scrape()
    assert scraped.labels("rabbitmq_queue_messages") == []
    assert scraped.modules()["queue"] == 1
    assert scraped.value("rabbitmq_queues", cluster="rabbit@broker1") == 3
    assert broker.paths["queue"] not in broker.asked
    broker.pages["/api/overview"]["object_totals"]["queues"] = 2
    assert exporter.scrape().labels("rabbitmq_queue_messages") == [QUEUE]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", "Bestellung Nr. 1 für Łódź 🍕"])
def test_any_name_survives_the_text_format(
    broker: FakeBroker, export: Callable[..., Exporter], name: str
) -> None:
    change(broker, name=name)
    assert export().scrape().value("rabbitmq_queue_memory", **QUEUE | {"queue": name})


def test_half_a_character_becomes_a_question_mark(
    broker: FakeBroker, export: Callable[..., Exporter]
) -> None:
    change(broker, name="a\ud800")
    assert '"a\\ud800"' in json.dumps(broker.pages["/api/queues"])
    assert export().scrape().value("rabbitmq_queue_memory", **QUEUE | {"queue": "a?"})
