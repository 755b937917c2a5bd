"""Queues and clients come and go while others send and receive, and each client has its rights."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Answer, Stack

# Sends and receives until the file is there, and counts the answers.
LOAD = """
import http.client, json, os, sys, time
from collections import Counter
token, publisher, subscriber = sys.argv[1:]
login = {"Authorization": f"Bearer {token}"}
ways = [
    (http.client.HTTPConnection("127.0.0.1", int(publisher), timeout=10), "POST", "/messages"),
    (http.client.HTTPConnection("127.0.0.1", int(subscriber), timeout=10), "GET", "/receive"),
]
answers, end = Counter(), time.monotonic() + 300
while not os.path.exists("/tmp/enough") and time.monotonic() < end:
    for door, method, path in ways:
        door.request(method, path, b"x" if method == "POST" else None, login)
        answer = door.getresponse()
        answer.read()
        answers[f"{method} {answer.status}"] += 1
    time.sleep(0.03)
print(json.dumps(answers))
"""
RIGHTS = {"send": "messages", "receive": "messages", "manage": "dead"}
# What shop may do by AMQP: action, names, and how it ends.
BY_AMQP = [
    ("publish", ("client.shop", "orders"), "ok"),
    ("publish", ("client.shop", "audit"), "UnroutableError"),
    ("publish", ("events", "order.paid"), "ok"),
    ("publish", ("takeaway-in", "orders"), 403),
    ("publish", ("", "orders"), 403),
    ("get", ("audit",), "ok"),
    ("get", ("audit.dead",), "ok"),
    ("get", ("orders",), 403),
    ("declare", ("new",), 403),
    ("declare", ("orders",), 403),
]


def run_with(
    stack: Stack, queues: list[str], clients: list[dict[str, Any]], **variables: object
) -> str:
    """Run the playbook with these queues beside the others, and these clients; what it says."""
    more = [{"name": name, "max_length": 9} for name in queues]
    given = {"stack_queues": [*stack.vars["stack_queues"], *more], "stack_clients": clients}
    tags = ("--tags", "rabbitmq,publisher,subscriber")
    run = stack.playbook("site", *tags, "--extra-vars", json.dumps(given | variables))
    assert run.returncode == 0, run.stdout[-3000:]
    # Ansible wraps long messages.
    return " ".join(run.stdout.split())


def token(stack: Stack, client: str) -> str:
    return (stack.secrets / f"client_{client}").read_text().split()[0]


def ask(stack: Stack, given: str, path: str, method: str = "GET") -> Answer:
    port = "apps_publisher_port" if method == "POST" else "apps_subscriber_port"
    login = ("--header", f"Authorization: Bearer {given}")
    return stack.http(port, path, *login, "--request", method)


def allowed(stack: Stack, client: str) -> set[tuple[str, str]]:
    """Return what a client may do at the doors, as rights with the names of queues and topics."""
    given, may = token(stack, client), set()
    for queue in (one["name"] for one in stack.vars["stack_queues"]):
        for right, path in RIGHTS.items():
            method = "POST" if right == "send" else "GET"
            answer = ask(stack, given, f"/queues/{queue}/{path}", method)
            if answer.status == 403:
                fault = f"The client '{client}' has no right to {right}: '{queue}'."
                assert answer.json == {"message": fault}
            else:
                assert answer.status in (200, 201, 204), answer.text
                may.add((right, queue))
    for topic in (one["name"] for one in stack.vars["stack_topics"]):
        if ask(stack, given, f"/topics/{topic}/messages?key=order.paid", "POST").status == 201:
            may.add(("send", topic))
    return may


def things(stack: Stack, name: str) -> set[str]:
    """Return what the broker has of the queue name: "binding full", "policy stack:full.dead"."""
    told = stack.api("/definitions").json
    names = {name, f"{name}.dead"}
    return {
        *(f"queue {one['name']}" for one in told["queues"] if one["name"] in names),
        *(
            f"policy {one['name']}"
            for one in told["policies"]
            if one["name"].removeprefix("stack:") in names
        ),
        *(
            f"binding {one['destination']}"
            for one in told["bindings"]
            if one["destination"] in names
        ),
    }


@pytest.mark.usefixtures("empty_queue")
def test_queues_and_clients_come_and_go_beside_what_runs(stack: Stack) -> None:
    before, default = stack.starts(), stack.vars["stack_queue"]
    steady = {"name": "steady", "send": [default], "receive": [default]}
    shop = {"name": "shop", "send": ["orders", "events"], "receive": ["audit"], "manage": ["audit"]}
    shop |= {"amqp": True}
    cook = {"name": "cook", "receive": ["orders"]}
    run_with(stack, ["extra", "full"], [steady, shop, cook])
    assert things(stack, "extra") == {
        *("binding extra", "queue extra", "queue extra.dead"),
        *("policy stack:extra", "policy stack:extra.dead"),
    }
    for client in steady, shop, cook:
        rights = {(right, name) for right in RIGHTS for name in client.get(right, [])}
        assert allowed(stack, str(client["name"])) == rights
    assert stack.receive().status == 401
    ask(stack, token(stack, "shop"), "/queues/orders/messages", "POST")
    lines = ask(stack, token(stack, "cook"), "/queues/orders/messages?max=100").text.splitlines()
    last = json.loads(lines[-1])
    assert (last["headers"]["X-Client"], last["user_id"]) == ("shop", "publisher")
    for action, names, outcome in BY_AMQP:
        found = stack.amqp("shop", action, *names, password=token(stack, "shop"))
        assert found == outcome, (action, names)
    refused = stack.amqp("cook", "get", "orders", password=token(stack, "cook"))
    assert refused == "ProbableAuthenticationError"
    assert stack.amqp("admin", "publish", stack.vars["stack_exchange"], "full") == "ok"

    # Two queues and a client go, and a token is changed, while another client sends and receives.
    old, gone = token(stack, "shop"), token(stack, "cook")
    (stack.secrets / "client_shop").write_text(f"{'n' * 32}\n{old}\n")
    ports = (str(stack.vars[f"apps_{door}_port"]) for door in ("publisher", "subscriber"))
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(stack.python, LOAD, token(stack, "steady"), *ports)
        said = run_with(stack, [], [steady, shop])
        assert things(stack, "extra") == set()
        assert things(stack, "full") == {
            *("queue full", "queue full.dead", "policy stack:full", "policy stack:full.dead")
        }
        assert "full (1 messages)" in said
        assert "stack_queues_remove" in said
        statuses = [
            ask(stack, each, "/queues/audit/messages?max=1").status
            for each in ("n" * 32, old, gone)
        ]
        assert statuses == [204, 204, 401]
        assert stack.amqp("shop", "get", "audit", password="n" * 32) == "ok"

        run_with(stack, [], [], stack_queues_remove=["full"])
        stack.run("touch /tmp/enough")
        answers = load.result()
    print(answers)
    assert answers.keys() == {"POST 201", "GET 200"}
    assert min(answers.values()) > 500
    assert things(stack, "full") == set()
    assert "shop" not in {user["name"] for user in stack.api("/users").json}
    assert "client.shop" not in {one["name"] for one in stack.api("/exchanges").json}
    assert stack.receive().status == 200
    assert stack.starts() == before
    for queue in "orders", "audit":
        stack.api(f"/queues/%2F/{queue}/contents", "admin", "--request", "DELETE")
