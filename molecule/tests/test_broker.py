"""The broker: its ports, users, topology and policies."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Stack, eventually
from rules import metric_names


@pytest.mark.parametrize(
    "port",
    [
        "rabbitmq_amqp_port",
        "rabbitmq_management_port",
        "rabbitmq_metrics_port",
        "apps_publisher_port",
        "apps_subscriber_port",
        "stack_fluentd_port",
        "monitoring_exporter_port",
        "monitoring_prometheus_port",
        "monitoring_alertmanager_port",
    ],
)
def test_a_published_port_listens_on_loopback_alone(stack: Stack, port: str) -> None:
    number = stack.vars[port]
    assert stack.host.socket(f"tcp://127.0.0.1:{number}").is_listening
    assert not stack.host.socket(f"tcp://0.0.0.0:{number}").is_listening


def test_the_management_ui_answers(stack: Stack) -> None:
    answer = stack.http("rabbitmq_management_port", "/")
    assert answer.status == 200
    assert "RabbitMQ Management" in answer.text


def test_the_plugin_tells_its_metrics(stack: Stack) -> None:
    assert "rabbitmq_identity_info" in stack.http("rabbitmq_metrics_port", "/metrics").text


def test_the_node_bears_the_inventorys_name(stack: Stack) -> None:
    assert stack.api("/overview").json["node"] == "rabbit@broker1"


def test_its_log_has_no_colours(stack: Stack) -> None:
    lines = stack.lines("rabbitmq")
    assert lines
    assert [line for line in lines if "\\u001b" in line or "\x1b" in line] == []


def test_nobody_gets_in_without_a_password_of_ours(stack: Stack) -> None:
    assert [user["name"] for user in stack.api("/users").json] == [
        "admin",
        "monitor",
        "publisher",
        "subscriber",
    ]
    assert (
        stack.http("rabbitmq_management_port", "/api/overview", "--user", "guest:guest").status
        == 401
    )
    assert stack.http("rabbitmq_management_port", "/api/overview").status == 401
    assert stack.amqp("guest", "get", "takeaway", password="guest") == "ProbableAuthenticationError"


@pytest.mark.parametrize(
    ("user", "nodes", "queues"),
    [("admin", 200, 200), ("monitor", 200, 200), ("publisher", 401, 401), ("subscriber", 401, 200)],
)
def test_the_management_api_is_for_admin_and_monitor_and_tells_the_subscriber_of_queues(
    stack: Stack, user: str, nodes: int, queues: int
) -> None:
    assert stack.api("/nodes", user).status == nodes
    assert stack.api("/queues/%2F", user).status == queues


@pytest.mark.usefixtures("empty_queue")
@pytest.mark.parametrize(
    ("user", "action", "names", "outcome"),
    [
        ("publisher", "publish", ("takeaway-in", "takeaway"), "ok"),
        ("publisher", "publish", ("", "takeaway"), 403),
        ("publisher", "publish", ("", "takeaway.dead"), 403),
        ("publisher", "publish", ("amq.direct", "takeaway"), 403),
        ("publisher", "get", ("takeaway",), 403),
        ("publisher", "declare", ("mine",), 403),
        ("subscriber", "get", ("takeaway",), "ok"),
        ("subscriber", "get", ("takeaway.dead",), "ok"),
        ("subscriber", "publish", ("takeaway-in", "takeaway"), "ok"),
        ("subscriber", "publish", ("events", "order.new"), 403),
        ("subscriber", "publish", ("", "takeaway"), 403),
        ("subscriber", "publish", ("", "takeaway.dead"), 403),
        ("subscriber", "declare", ("mine",), 403),
        ("monitor", "get", ("takeaway",), 403),
        ("monitor", "publish", ("takeaway-in", "takeaway"), 403),
        ("monitor", "purge", ("takeaway",), 403),
        ("admin", "publish", ("", "takeaway"), "ok"),
        ("admin", "purge", ("takeaway",), "ok"),
    ],
)
def test_a_user_may_do_what_it_is_for(
    stack: Stack, user: str, action: str, names: tuple[str, ...], outcome: object
) -> None:
    assert stack.amqp(user, action, *names) == outcome


def test_a_queue_of_the_list_has_its_dead_queue_and_their_policies(stack: Stack) -> None:
    for name, entry in listed(stack).items():
        limit = entry.get("max_deliveries", stack.vars["rabbitmq_delivery_limit"])
        for queue, other, deliveries in (name, f"{name}.dead", limit), (f"{name}.dead", name, -1):
            told = stack.api(f"/queues/%2F/{queue}").json
            assert (told["type"], told["policy"]) == ("quorum", f"stack:{queue}")
            assert told["arguments"]["x-dead-letter-routing-key"] == other
            acts = told["effective_policy_definition"]
            assert acts["delivery-limit"] == deliveries
            if "max_length" in entry:
                assert acts["max-length"] == entry["max_length"]
            has = acts.keys() & {"message-ttl", "max-length-bytes"}
            wants = {"message_ttl": "message-ttl", "max_bytes": "max-length-bytes"}
            assert has == (
                {wants[key] for key in wants if key in entry} if queue == name else set()
            )


def test_a_queue_is_bound_by_its_name_and_to_the_topics_that_it_subscribes_to(stack: Stack) -> None:
    told = stack.api("/bindings/%2F").json
    bound = {(one["source"], one["destination"], one["routing_key"]) for one in told}
    exchange, topics = stack.vars["stack_exchange"], stack.vars["stack_topics"]
    assert bound >= {
        *((exchange, name, name) for name in listed(stack)),
        *(
            (topic["name"], one["queue"], one["pattern"])
            for topic in topics
            for one in topic["subscriptions"]
        ),
    }
    kinds = {one["name"]: (one["type"], one["durable"]) for one in stack.api("/exchanges/%2F").json}
    assert {kinds[topic["name"]] for topic in topics} <= {("topic", True)}


@pytest.mark.usefixtures("empty_queue")
def test_a_redriven_message_lives_for_another_full_limit(stack: Stack) -> None:
    stack.send("hard")
    for _ in range(2):
        # One delivery more than the limit, and the broker has set it aside.
        used = stack.amqp("subscriber", "use up", "takeaway")
        assert used == stack.vars["rabbitmq_delivery_limit"] + 1
        eventually(lambda: depth(stack, "takeaway.dead") == 1, 20, "the message is dead")
        assert redrive(stack) == {"redriven": 1}
    eventually(lambda: stack.receive().text == "hard\n", 20, "the message is back")
    eventually(lambda: depth(stack, "takeaway.dead") == 0, 20, "the dead queue is empty")


@pytest.fixture(params=[1, 2000])
def policy_for_all(stack: Stack, request: pytest.FixtureRequest) -> Iterator[None]:
    """A policy for all queues, below and above the stack's own."""
    definition = json.dumps({"max-length": 100_000})
    options = ["--priority", str(request.param), "--apply-to", "queues"]
    control = ["exec", stack.container("rabbitmq"), "rabbitmqctl"]
    stack.docker(*control, "set_policy", *options, "everything", ".*", definition)
    yield
    stack.docker(*control, "clear_policy", "everything")


@pytest.mark.usefixtures("empty_queue", "policy_for_all")
def test_a_policy_for_all_queues_loses_nothing(stack: Stack) -> None:
    stack.send("kept")
    receipt = stack.http("apps_subscriber_port", "/receive?ack=manual").headers["x-receipt"]
    rejected = json.dumps({"receipt": receipt, "requeue": False})
    stack.http("apps_subscriber_port", "/reject", "--data", rejected)
    eventually(lambda: depth(stack, "takeaway.dead") == 1, 20, "the message is dead")
    assert redrive(stack) == {"redriven": 1}
    eventually(lambda: stack.receive().text == "kept\n", 20, "the message is back")


def listed(stack: Stack) -> dict[str, dict[str, Any]]:
    """Return the entries of stack_queues by name; in the defaults the name is a template."""
    default = stack.vars["stack_queue"]
    entries = stack.vars["stack_queues"]
    return {entry["name"].replace("{{ stack_queue }}", default): entry for entry in entries}


def redrive(stack: Stack) -> Any:
    return stack.http("apps_subscriber_port", "/dead/redrive", "--request", "POST").json


def depth(stack: Stack, queue: str) -> int:
    return int(stack.api(f"/queues/%2F/{queue}").json.get("messages", -1))


def test_every_metric_that_a_rule_reads_is_scraped(stack: Stack) -> None:
    """Otherwise an alert would never fire once a version renames what it reads."""
    groups = stack.http("monitoring_prometheus_port", "/api/v1/rules").json["data"]["groups"]
    read = {
        name for group in groups for rule in group["rules"] for name in metric_names(rule["query"])
    }
    assert len(read) > 30
    path = "/api/v1/label/__name__/values"

    def missing() -> set[str]:
        return read - set(stack.http("monitoring_prometheus_port", path).json["data"])

    eventually(lambda: not missing(), 30, "every metric is scraped")
