"""The broker: its ports, users, topology and policies."""

import pytest
from conftest import Stack, eventually

# Does one thing as one user and prints how it ended.
ATTEMPT = """
import json, sys, pika
user, password, host, port, action, *names = sys.argv[1:]
def outcome():
    credentials = pika.PlainCredentials(user, password)
    parameters = pika.ConnectionParameters(host, int(port), credentials=credentials)
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        if action == "publish":
            channel.confirm_delivery()
            channel.basic_publish(*names, b"hello", mandatory=True)
        elif action == "get":
            channel.basic_get(*names, auto_ack=True)
        elif action == "declare":
            channel.queue_declare(*names, durable=True)
        elif action == "purge":
            channel.queue_purge(*names)
        elif action == "use up": # deliver and give back until the queue is empty
            for count in range(100):
                method, _, body = channel.basic_get(*names)
                if method is None:
                    return count
                channel.basic_reject(method.delivery_tag, requeue=True)
        elif action == "redrive":
            method, _, body = channel.basic_get(*names)
            channel.basic_reject(method.delivery_tag, requeue=False)
            return body.decode()
    return "ok"
try:
    print(json.dumps(outcome()))
except pika.exceptions.ChannelClosedByBroker as error:
    print(json.dumps(error.reply_code))
except pika.exceptions.AMQPError as error:
    print(json.dumps(type(error).__name__))
"""


def attempt(stack: Stack, user: str, action: str, *names: str) -> object:
    file = stack.secrets / f"rabbitmq_{user}"
    password = file.read_text().strip() if file.exists() else user
    port = str(stack.vars["rabbitmq_amqp_port"])
    return stack.python(ATTEMPT, user, password, "127.0.0.1", port, action, *names)


@pytest.mark.parametrize(
    "port",
    [
        "rabbitmq_amqp_port",
        "rabbitmq_management_port",
        "rabbitmq_metrics_port",
        "apps_publisher_port",
        "apps_subscriber_port",
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
    assert attempt(stack, "guest", "get", "takeaway") == "ProbableAuthenticationError"


@pytest.mark.parametrize(
    ("user", "status"), [("admin", 200), ("monitor", 200), ("publisher", 401), ("subscriber", 401)]
)
def test_the_management_api_is_for_admin_and_monitor(stack: Stack, user: str, status: int) -> None:
    assert stack.api("/nodes", user).status == status


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
        ("subscriber", "publish", ("takeaway-in", "takeaway"), 403),
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
    assert attempt(stack, user, action, *names) == outcome


@pytest.mark.usefixtures("empty_queue")
def test_a_message_that_nobody_can_handle_goes_to_the_dead_queue_and_back(stack: Stack) -> None:
    stack.send("hard")
    # One delivery more than the limit, and the broker has set it aside.
    assert (
        attempt(stack, "subscriber", "use up", "takeaway")
        == stack.vars["rabbitmq_delivery_limit"] + 1
    )
    eventually(lambda: depth(stack, "takeaway.dead") == 1, 20, "the message is in the dead queue")
    assert attempt(stack, "subscriber", "redrive", "takeaway.dead") == "hard"
    eventually(lambda: stack.receive().text == "hard\n", 20, "the message is back")
    eventually(lambda: depth(stack, "takeaway.dead") == 0, 20, "the dead queue is empty")


def depth(stack: Stack, queue: str) -> int:
    return int(stack.api(f"/queues/%2F/{queue}").json.get("messages", -1))
