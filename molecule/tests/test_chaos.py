"""What holds while everything is killed, clients hang up, or the broker's memory runs short."""

import json
from typing import Any

import pytest
from conftest import PROJECT, Stack

# Sets the broker's watermark below what it uses and puts it back; prints how a client's requests,
# over one connection to each door, were answered meanwhile, with the seconds that each took.
ALARM = """
import http.client, json, subprocess, sys, threading, time
broker, usual, load, *ports = sys.argv[1:]
metrics, publisher, subscriber = map(int, ports)

def connect(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=20)

def ask(door, method, path, body=None):
    start = time.monotonic()
    form = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
    door.request(method, path, body, form)
    answer = door.getresponse()
    text = answer.read().decode()
    return answer.status, time.monotonic() - start, text

def send(door):
    return ask(door, "POST", "/data", "message=alarm")[:2]

def set_watermark(value):
    command = ["rabbitmqctl", "--quiet", "set_vm_memory_high_watermark", "absolute", value]
    subprocess.run(["docker", "exec", broker, *command], check=True)

def until(true, seconds):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start

def alarmed():
    told = ask(connect(metrics), "GET", "/metrics")[2].splitlines()
    return "rabbitmq_alarms_memory_used_watermark 1" in told

def keep_sending():
    door = connect(publisher)
    while not over.is_set():
        if send(door)[0] != 201:
            time.sleep(0.1)

over = threading.Event()
door, receiver = connect(publisher), connect(subscriber)
before = [send(door) for _ in range(20)]
threads = [threading.Thread(target=keep_sending, daemon=True) for _ in range(int(load))]
for thread in threads:
    thread.start()
try:
    set_watermark("10MB")
    until(alarmed, 10)
    during = [send(door) for _ in range(20)]
    received = [ask(receiver, "GET", "/receive") for _ in range(20)]
finally:
    set_watermark(usual)
back = until(lambda: send(door)[0] == 201, 20)
over.set()
for thread in threads:
    thread.join()
print(json.dumps({"before": before, "during": during, "received": received, "back": back}))
"""

pytestmark = pytest.mark.usefixtures("empty_queue")


def chaos(stack: Stack, *options: str) -> Any:
    """Run tests/chaos.py on the host and return what came of it."""
    script = (PROJECT / "tests/chaos.py").read_text()
    args = ["--stack", stack.name, "--queue", stack.vars["stack_queue"], *options]
    for door in "publisher", "subscriber":
        args += [f"--{door}", f"http://127.0.0.1:{stack.vars[f'apps_{door}_port']}"]
    result = stack.host.run("python3 -c %s" + " %s" * len(args), script, *args)
    print(result.stdout)
    assert result.rc in (0, 1), result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


# Where the clients send, and the queues in which each of their messages must arrive.
WAYS = (
    "/data={default}",
    "/messages={default}",
    "/queues/orders/messages=orders",
    "/topics/events/messages?key=order.created=orders,audit",
)


def test_no_message_is_lost_or_out_of_order_whatever_is_killed(stack: Stack) -> None:
    ways = [way.format(default=stack.vars["stack_queue"]) for way in WAYS]
    to = [arg for way in ways for arg in ("--to", way)]
    told = chaos(stack, "--messages", "4000", "--clients", "8", "--rounds", "2", *to)
    assert told["problems"] == []
    assert len(told["recoveries"]) == 10
    assert max(blow["seconds"] for blow in told["recoveries"]) < 60
    # The load went on: what fails in an outage is one message a client and second.
    assert told["confirmed"] > 0.5 * told["sent"]
    assert told["sent"] == 4000


def test_no_message_is_lost_or_out_of_order_when_clients_hang_up(stack: Stack) -> None:
    told = chaos(stack, "--hangups", "200", "--clients", "8")
    assert told["problems"] == []
    # A quarter reads nothing; of the others most must have been in mid-response.
    assert told["answers"]["200"] > 100


def test_no_input_ends_a_process_or_keeps_others_waiting(stack: Stack) -> None:
    for name in "chaos.py", "abuse.py":
        script = (PROJECT / "tests" / name).read_text()
        stack.run("mkdir -p /tmp/abuse && printf %%s %s > /tmp/abuse/%s", script, name)
    args = ["--stack", stack.name, "--queue", stack.vars["stack_queue"], "--short"]
    for door in "publisher", "subscriber":
        args += [f"--{door}", f"http://127.0.0.1:{stack.vars[f'apps_{door}_port']}"]
    # Beside this, the machine does other work.
    args += ["--within", "10"]
    result = stack.host.run("python3 /tmp/abuse/abuse.py" + " %s" * len(args), *args)
    print(result.stdout)
    assert result.rc in (0, 1), result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1])["problems"] == []


@pytest.mark.parametrize("load", [0, 4], ids=["idle", "load"])
def test_a_memory_alarm_is_503_at_once_and_ends_with_the_alarm(stack: Stack, load: int) -> None:
    ports = ("rabbitmq_metrics_port", "apps_publisher_port", "apps_subscriber_port")
    told = stack.python(
        ALARM,
        stack.container("rabbitmq"),
        stack.watermark(),
        str(load),
        *(str(stack.vars[port]) for port in ports),
    )
    assert {status for status, _ in told["before"]} == {201}
    assert {status for status, _ in told["during"]} == {503}
    # A connection that publishes nothing hears of the alarm only after its next message.
    first, *later = [seconds for _, seconds in told["during"]]
    print(f"503 after {first:.3f} s, then {max(later):.3f} s; 201 {told['back']:.2f} s afterwards")
    assert first < 5
    assert max(later) < 0.1
    assert {(status, text) for status, _, text in told["received"]} == {(200, "alarm\n")}
    assert told["back"] < 5
