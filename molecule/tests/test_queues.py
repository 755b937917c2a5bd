"""Queues and topics of the lists, as clients of the doors meet them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Answer, Stack, eventually

pytestmark = pytest.mark.usefixtures("empty_queue", "empty_queues")


@pytest.fixture
def empty_queues(stack: Stack) -> Iterator[None]:
    """Leave no message in the other queues."""
    yield
    for queue in "orders", "orders.dead", "audit":
        stack.api(f"/queues/%2F/{queue}/contents", "admin", "--request", "DELETE")


def post(stack: Stack, path: str, body: str = "") -> Answer:
    return stack.http("apps_publisher_port", path, "--data-binary", body)


def receive(stack: Stack, queue: str, query: str = "") -> list[str]:
    """Return the bodies of all messages of queue, or of what query says."""
    path = f"/queues/{queue}/messages?max=1000{query}"
    answer = stack.http("apps_subscriber_port", path)
    assert answer.status in (200, 204), answer.text
    return [json.loads(line)["body"] for line in answer.text.splitlines()]


def test_a_queue_s_messages_are_its_own(stack: Stack) -> None:
    assert post(stack, "/queues/orders/messages", "one").status == 201
    assert post(stack, "/queues/orders/batch", '"two"\n"three"').json == {"sent": 2}
    assert stack.send("another").status == 201
    assert receive(stack, stack.vars["stack_queue"]) == ["another"]
    assert receive(stack, "audit") == []
    assert receive(stack, "orders") == ["one", "two", "three"]


def test_a_topic_s_message_is_in_each_queue_whose_subscription_matches(stack: Stack) -> None:
    both = post(stack, "/topics/events/messages?key=order.created", "both")
    one = post(stack, "/topics/events/batch?key=order.paid", '"one"')
    none = post(stack, "/topics/events/messages?key=user.removed", "none")
    assert (both.status, both.json["stored"]) == (201, True)
    assert (one.status, one.json) == (201, {"sent": 1, "stored": 1})
    assert (none.status, none.json["stored"]) == (200, False)
    assert receive(stack, "orders") == ["both", "one"]
    assert receive(stack, "audit") == ["both"]
    metrics = stack.http("apps_publisher_port", "/metrics").text
    assert 'topic_messages_dropped_total{topic="events"} ' in metrics


def test_a_queue_has_its_own_limits_and_its_own_dead_queue(stack: Stack) -> None:
    assert post(stack, "/queues/orders/messages", "bad").status == 201
    # max_deliveries of orders, and the first time.
    for _ in range(3):
        leased = stack.http("apps_subscriber_port", "/queues/orders/messages?ack=manual&wait=5")
        assert leased.text == "bad\n"
        body = json.dumps({"receipt": leased.headers["x-receipt"]})
        answer = stack.http("apps_subscriber_port", "/queues/orders/reject", "--json", body)
        assert answer.status == 200, answer.text

    def dead(queue: str) -> str:
        return stack.http("apps_subscriber_port", f"/queues/{queue}/dead").text

    eventually(lambda: '"bad"' in dead("orders"), 10, "what is returned too often is dead")
    assert dead(stack.vars["stack_queue"]) == ""
    redrive = ("apps_subscriber_port", "/queues/orders/dead/redrive", "--request", "POST")
    assert stack.http(*redrive).json == {"redriven": 1}
    assert receive(stack, "orders", "&wait=5") == ["bad"]


def test_a_peek_leaves_the_messages_to_the_next_receiver(stack: Stack) -> None:
    assert post(stack, "/queues/orders/batch", '"one"\n"two"\n"three"').json == {"sent": 3}
    # More often than orders may give a message back (max_deliveries).
    for _ in range(5):
        answer = stack.http("apps_subscriber_port", "/queues/orders/messages/peek?max=2")
        assert answer.status == 200, answer.text
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [(one["body"], one["redelivered"]) for one in lines] == [
            ("one", False),
            ("two", False),
        ]
    assert receive(stack, "orders") == ["one", "two", "three"]
    assert stack.http("apps_subscriber_port", "/queues/orders/messages/peek").status == 204
    assert stack.http("apps_subscriber_port", "/queues/orders/dead").status == 204


def test_a_purge_drops_what_waits_in_its_queue_alone(stack: Stack) -> None:
    assert post(stack, "/queues/orders/batch", '"leased"\n"two"\n"three"').json == {"sent": 3}
    assert stack.send("another").status == 201
    leased = stack.http("apps_subscriber_port", "/queues/orders/messages?ack=manual")
    assert leased.text == "leased\n"
    purge = ("apps_subscriber_port", "/queues/orders/messages")
    refused = stack.http(*purge, "--request", "DELETE")
    assert (refused.status, "?confirm=orders" in refused.json["message"]) == (400, True)
    purge = ("apps_subscriber_port", "/queues/orders/messages?confirm=orders")
    assert stack.http(*purge, "--request", "DELETE").json == {"purged": 2}
    body = json.dumps({"receipt": leased.headers["x-receipt"]})
    assert stack.http("apps_subscriber_port", "/queues/orders/ack", "--json", body).status == 200
    assert receive(stack, "orders") == []
    assert receive(stack, stack.vars["stack_queue"]) == ["another"]


def test_dead_messages_are_sent_back_or_deleted_by_their_ids(stack: Stack) -> None:
    ids = ["a", "b", "c", "b", "d"]
    batch = "\n".join(json.dumps({"message": f"is {one}", "id": one}) for one in ids)
    assert post(stack, "/queues/orders/batch", batch).json == {"sent": len(ids)}
    receipts: list[str] = []
    while len(receipts) < len(ids):
        path = "/queues/orders/messages?max=10&ack=manual&wait=5"
        leased = stack.http("apps_subscriber_port", path)
        assert leased.status == 200, leased.text
        receipts += [json.loads(line)["receipt"] for line in leased.text.splitlines()]
    body = json.dumps({"receipts": receipts, "requeue": False})
    assert stack.http("apps_subscriber_port", "/queues/orders/reject", "--json", body).status == 200

    def dead() -> list[str]:
        lines = stack.http("apps_subscriber_port", "/queues/orders/dead?max=10").text.splitlines()
        return [json.loads(line)["id"] for line in lines]

    eventually(lambda: len(dead()) == len(ids), 10, "all are dead")
    before = dead()
    redrive = ("apps_subscriber_port", "/queues/orders/dead/redrive", "--json")
    assert stack.http(*redrive, '{"ids": ["c", "nowhere"]}').json == {"redriven": 1}
    assert receive(stack, "orders", "&wait=5") == ["is c"]
    delete = ("apps_subscriber_port", "/queues/orders/dead", "--request", "DELETE")
    assert stack.http(*delete).status == 400
    assert stack.http(*delete, "--json", '{"ids": ["b"]}').json == {"deleted": 2}
    assert dead() == [one for one in before if one in ("a", "d")]


def test_the_messages_of_any_queue_are_moved_to_one_of_the_list(stack: Stack) -> None:
    classic = json.dumps({"durable": True, "arguments": {"x-queue-type": "classic"}})
    assert (
        stack.api("/queues/%2F/old", "admin", "--request", "PUT", "--json", classic).status == 201
    )
    bodies = [str(number) for number in range(250)]
    assert post(stack, "/queues/orders/batch", "\n".join(map(json.dumps, bodies))).status == 201
    for queue, to, status, said in [
        ("orders", "audit", 0, "moved 250 messages from orders to audit"),
        ("old", "audit", 0, "moved 0 messages from old to audit"),
        ("nowhere", "audit", 2, "NOT_FOUND - no queue"),
        ("orders", "old", 2, "to is old, which is not in stack_queues"),
    ]:
        run = stack.playbook("move", "--extra-vars", json.dumps({"queue": queue, "to": to}))
        told = " ".join(run.stdout.split())
        assert (run.returncode, said in told) == (status, True), run.stdout[-3000:]
    assert stack.api("/queues/%2F/old", "admin", "--request", "DELETE").status == 204
    assert receive(stack, "orders") == []
    assert receive(stack, "audit") == bodies


def test_the_subscriber_tells_how_many_messages_the_queues_have(stack: Stack) -> None:
    assert post(stack, "/queues/orders/batch", '"one"\n"two"').json == {"sent": 2}

    def told() -> dict[str, dict[str, Any]]:
        answer = stack.http("apps_subscriber_port", "/queues")
        assert answer.status == 200, answer.text
        return {one["name"]: one for one in answer.json["queues"]}

    assert [*told()] == sorted(one["name"] for one in stack.vars["stack_queues"])
    assert all(set(one["rates"]) == {"in", "out"} for one in told().values())
    expected = {"ready": 2, "unacknowledged": 0, "dead": 0}
    eventually(
        lambda: expected.items() <= told()["orders"].items(), 15, "the broker's counts are new"
    )


def test_a_receipt_is_good_at_its_own_queue_only(stack: Stack) -> None:
    assert post(stack, "/queues/orders/messages", "mine").status == 201
    leased = stack.http("apps_subscriber_port", "/queues/orders/messages?ack=manual")
    body = json.dumps({"receipt": leased.headers["x-receipt"]})
    assert stack.http("apps_subscriber_port", "/ack", "--json", body).status == 410
    assert stack.http("apps_subscriber_port", "/queues/orders/ack", "--json", body).status == 200


def test_a_full_queue_refuses_its_own_messages_only(stack: Stack) -> None:
    limit = next(one for one in stack.vars["stack_queues"] if one["name"] == "audit")["max_length"]
    fill = "seq --format '\"%%.0f\"' %s | curl --silent --data-binary @- %s"
    url = f"http://127.0.0.1:{stack.vars['apps_publisher_port']}/queues/audit/batch"
    assert json.loads(stack.run(fill, str(limit), url)) == {"sent": limit}
    # The broker takes a few more: it counts what is in the queue a little late.
    eventually(lambda: post(stack, "/queues/audit/messages").status == 503, 10, "audit is full")
    assert post(stack, "/topics/events/messages?key=order.created").status == 503
    assert post(stack, "/topics/events/messages?key=order.paid").status == 201
    assert stack.send("still open").status == 201


@pytest.mark.parametrize("path", ["/queues/nowhere/messages", "/queues/orders.dead/messages"])
def test_a_queue_that_is_not_in_the_list_is_404_at_both_doors(stack: Stack, path: str) -> None:
    for port in "apps_publisher_port", "apps_subscriber_port":
        method = "POST" if port == "apps_publisher_port" else "GET"
        answer = stack.http(port, path, "--request", method)
        assert (answer.status, answer.json) == (
            404,
            {"message": f"There is no queue '{path.split('/')[2]}'."},
        )
