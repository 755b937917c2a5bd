"""What the stack survives."""

import time

import pytest
from conftest import SERVICES, Stack, eventually


@pytest.fixture
def three_messages(stack: Stack, empty_queue: None):  # noqa: ARG001 - a mark has no effect on it
    """Three messages that must still be there, in order, after the test."""
    for number in range(3):
        assert stack.send(f"kept {number}").status == 201
    yield
    stack.wait_until_ready(90)
    assert [stack.receive().text for _ in range(4)] == [
        "kept 0\n",
        "kept 1\n",
        "kept 2\n",
        "No message available\n",
    ]


@pytest.mark.usefixtures("three_messages")
def test_a_stopped_broker_is_503_within_5_seconds_and_back_within_30(stack: Stack) -> None:
    before = stack.starts()
    stack.docker("stop", stack.container("rabbitmq"))
    for ask in lambda: stack.send("unknown"), stack.receive:
        start = time.monotonic()
        answer = ask()
        assert time.monotonic() - start < 5
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json["message"]
    for port in "apps_publisher_port", "apps_subscriber_port":
        assert stack.http(port, "/healthz").json["broker"] == "down"
        assert stack.http(port, "/healthz?ready").status == 503
    stack.docker("start", stack.container("rabbitmq"))
    seconds = stack.wait_until_ready(30)
    print(f"ready {seconds:.1f} s after docker start")
    after = stack.starts()
    assert {name for name in before if before[name] != after[name]} == {stack.container("rabbitmq")}


@pytest.mark.usefixtures("three_messages")
@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_main_process_comes_back(stack: Stack, service: str) -> None:
    # From the host: docker kill counts as a manual stop, after which nothing restarts.
    pid = stack.inspect(service)["State"]["Pid"]
    stack.run("kill -9 %s", str(pid))
    eventually(
        lambda: stack.inspect(service)["State"]["Pid"] not in (0, pid), 30, f"{service} runs again"
    )
    print(f"{service}: ready {stack.wait_until_ready(60):.1f} s later")


@pytest.mark.usefixtures("three_messages")
def test_a_killed_worker_comes_back_alone(stack: Stack) -> None:
    before = stack.starts()
    pid = stack.inspect("publisher")["State"]["Pid"]

    def workers() -> set[str]:
        return set(stack.run("cat /proc/%s/task/%s/children", str(pid), str(pid)).split())

    def connections() -> int:
        logs = stack.run("docker logs %s 2>&1", stack.container("publisher"))
        return logs.count("Connected to the broker")

    old, known = workers(), connections()
    assert len(old) == stack.vars["apps_publisher_workers"]
    killed = old.pop()
    stack.run("kill -9 %s", killed)
    eventually(lambda: killed not in workers() and len(workers()) == 2, 20, "a new worker runs")
    eventually(lambda: connections() == known + 1, 30, "it is connected")
    assert old < workers()
    assert stack.starts() == before


@pytest.mark.usefixtures("three_messages")
def test_messages_survive_the_engines_restart(stack: Stack) -> None:
    before = stack.starts()
    stack.run("kill $(cat /run/docker.pid)")
    eventually(lambda: restarted(stack, before), 90, "the engine brought every container back")


@pytest.mark.usefixtures("three_messages")
def test_messages_survive_the_hosts_restart(stack: Stack) -> None:
    before = stack.starts()
    stack.host.backend.run_local("docker restart --time 20 %s", stack.vars["ansible_host"])
    eventually(lambda: restarted(stack, before), 90, "the host brought every container back")
    # /tmp was emptied: the folder of the logs was made anew before the engine could do it, as root.
    assert stack.run("stat --format %%u %s", stack.vars["fluentd_log_dir"]).strip() == "999"


def restarted(stack: Stack, before: dict[str, str]) -> bool:
    if stack.host.run("docker ps").rc != 0:
        return False
    after = stack.starts()
    running = stack.docker("ps", "--format", "{{.Names}}").split()
    return all(after[name] != before[name] and name in running for name in before)
