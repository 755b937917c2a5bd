"""Bad input stops the run before anything changed; what ran before goes on running."""

import json
from concurrent.futures import Future

import pytest
from conftest import Stack
from refusals import CASES, state


@pytest.fixture
def open_password(stack: Stack):
    """A password file that others can read."""
    file = stack.secrets / "rabbitmq_monitor"
    file.chmod(0o644)
    yield
    file.chmod(0o600)


@pytest.fixture
def record(stack: Stack):
    """The record of what opened the data, as it was before the test."""
    file = f"/var/lib/message-broker-stack/{stack.name}/rabbitmq.version"
    before = stack.run("cat %s", file).strip()
    yield file
    stack.run("echo %s > %s", before, file)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: json.dumps(CASES[case][0]))
def test_a_bad_variable_is_refused_by_name(refusals: Future[dict[str, str]], case: int) -> None:
    text = " ".join(refusals.result()[f"case{case}"].replace("\\n", " ").split())
    assert [word for word in CASES[case][1] if word not in text] == [], text


@pytest.mark.usefixtures("open_password")
def test_a_password_file_that_others_can_read_stops_the_run(stack: Stack) -> None:
    refused(stack, ["rabbitmq_monitor", "0644", "chmod 600"])


def test_data_of_a_newer_broker_stop_the_run(stack: Stack, record: str) -> None:
    stack.run("echo 99.1.0 rabbit@broker1 > %s", record)
    words = ["99.1.0", f"{stack.name}-rabbitmq", "older version", "rabbitmq_image"]
    only_rabbitmq = ("--tags", "rabbitmq", "--extra-vars", '{"preflight_checked": ["rabbitmq"]}')
    refused(stack, words, *only_rabbitmq)


def refused(stack: Stack, words: list[str], *args: str) -> None:
    """Check that the run stops, says words, and leaves all as it was."""
    before = state(stack)
    run = stack.playbook("site", *args)
    # Ansible wraps long messages.
    said = " ".join(run.stdout.split())
    assert run.returncode != 0, run.stdout[-3000:]
    assert [word for word in words if word not in said] == [], run.stdout[-3000:]
    assert "changed=0" in said
    assert state(stack) == before
    assert stack.ready()
