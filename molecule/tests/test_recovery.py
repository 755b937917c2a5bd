"""The broker comes back with all that it took in, also when its disk was too slow for it."""

from dataclasses import dataclass

import pytest
from conftest import Stack, eventually

# Publishes messages of 1 MB, each after the confirm of the one before; prints how many were
# confirmed until there were count, or the broker blocked for two seconds.
FILL = """
import json, sys, pika
password, port, exchange, queue, count = sys.argv[1:]
credentials = pika.PlainCredentials("publisher", password)
parameters = pika.ConnectionParameters(
    "127.0.0.1", int(port), credentials=credentials, blocked_connection_timeout=2
)
confirmed = 0
try:
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        persistent = pika.BasicProperties(delivery_mode=2)
        while confirmed < int(count):
            channel.basic_publish(exchange, queue, bytes(1_000_000), persistent, mandatory=True)
            confirmed += 1
except pika.exceptions.ConnectionBlockedTimeout:
    pass
print(json.dumps(confirmed))
"""


@dataclass
class Filled:
    """What became of a fill without end."""

    first: int
    until_alarm: int
    ready: float
    found: int


def fill(stack: Stack, count: int) -> int:
    names = (stack.vars["stack_exchange"], stack.vars["stack_queue"])
    port = str(stack.vars["rabbitmq_amqp_port"])
    told: int = stack.python(FILL, stack.password("publisher"), port, *names, str(count))
    return told


def ctl(stack: Stack, *args: str) -> str:
    return stack.docker("exec", stack.container("rabbitmq"), "rabbitmqctl", "--quiet", *args)


def count(stack: Stack) -> int:
    """Return the messages in the queue, as its leader knows them; 0 while it has none."""
    lines = ctl(stack, "list_queues", "--silent", "name", "messages").splitlines()
    return int(dict(line.split() for line in lines).get(stack.vars["stack_queue"], 0))


def alarmed(stack: Stack) -> bool:
    told = stack.http("rabbitmq_metrics_port", "/metrics").text
    return "rabbitmq_alarms_memory_used_watermark 1" in told.splitlines()


def kill(stack: Stack) -> None:
    # From the host: docker kill counts as a manual stop, after which nothing restarts.
    pid = stack.inspect("rabbitmq")["State"]["Pid"]
    stack.run("kill -9 %s", str(pid))
    eventually(lambda: stack.inspect("rabbitmq")["State"]["Pid"] not in (0, pid), 30, "it restarts")


@pytest.fixture(scope="module")
def filled(stack: Stack):
    """Fill the broker until its alarm, kill it, and empty the queue in the end."""
    stack.wait_until_ready()
    ctl(stack, "purge_queue", stack.vars["stack_queue"])
    # More than RabbitMQ's own write-ahead log, which was too much to be read again.
    first = fill(stack, 600)
    # As on a disk that falls behind: the log is written, and nothing is moved from it to the queue.
    ctl(stack, "eval", "ok = sys:suspend(ra_log_segment_writer).")
    until_alarm = fill(stack, 1500)
    kill(stack)
    ready = stack.wait_until_ready(60)
    confirmed = first + until_alarm
    # One more was sent when the alarm rose, and may have been taken in.
    eventually(lambda: count(stack) >= confirmed, 60, f"{confirmed} messages are there")
    yield Filled(first, until_alarm, ready, count(stack))
    ctl(stack, "purge_queue", stack.vars["stack_queue"])


def test_what_nobody_receives_is_taken_in_beyond_the_memory(filled: Filled) -> None:
    assert filled.first == 600


def test_a_slow_disk_raises_the_alarm_before_the_log_is_too_long(filled: Filled) -> None:
    assert 100 < filled.until_alarm < 1500


def test_a_full_broker_that_is_killed_comes_back_with_every_message(filled: Filled) -> None:
    print(f"{filled.found} messages, ready {filled.ready:.1f} s later")
    assert filled.found - filled.first - filled.until_alarm in (0, 1)


def test_the_alarm_ends_when_the_queue_is_empty(stack: Stack, filled: Filled) -> None:
    ctl(stack, "purge_queue", stack.vars["stack_queue"])
    eventually(lambda: not alarmed(stack), 30, f"no alarm after {filled.found} messages")
    eventually(lambda: stack.send("after").status == 201, 10, "the publisher takes messages")
    assert stack.receive().text == "after\n"


def test_the_broker_may_open_as_many_files_as_the_engine_allows(stack: Stack) -> None:
    pid = stack.inspect("rabbitmq")["State"]["Pid"]
    limits = stack.run("cat /proc/%s/limits", str(pid)).splitlines()
    (line,) = (line.split() for line in limits if line.startswith("Max open files"))
    image = stack.inspect("rabbitmq")["Config"]["Image"]
    shell = ("run", "--rm", "--entrypoint", "bash", image, "-c", "ulimit -H -n")
    allowed = int(stack.docker(*shell))
    assert line[3:5] == [str(min(allowed, stack.vars["rabbitmq_open_files"]))] * 2
