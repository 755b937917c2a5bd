"""`make find` and `make logs` of several hosts: what each has, in order of time."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOSTS = ["h1", "h2", "h3"]
# \u2028 ends a line for Python, not in a log file.
BODY = '{"request_id":"order-7","log":"a.*b $HOME {{ 7*7 }} $(shell date) \'; date \u2028 --help"}'


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Return an inventory of three hosts, each a folder of logs on this machine."""
    now = datetime.now(UTC)
    for number, host in enumerate(HOSTS):
        (tmp_path / host).mkdir()
        log = tmp_path / host / f"publisher.{now:%Y%m%d}.log"
        lines = [f"{now:%F}T23:00:0{n}.{9 - number}00+00:00\tpublisher\t{BODY}\n" for n in range(2)]
        log.write_text("".join(lines))
    (tmp_path / "h2/rabbitmq.20260101.112233.log").write_text("2026-01-01T\trabbitmq\torder-7 axb")
    (tmp_path / "h2/rabbitmq.notes").write_text("order-7")
    brokers = {
        "hosts": {host: {"fluentd_log_dir": str(tmp_path / host)} for host in HOSTS},
        "vars": {
            "ansible_connection": "local",
            "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "ansible_become": False,
        },
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"brokers": brokers}))
    return tmp_path / "hosts.yml"


def make(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    command = ["make", "--old-file=.venv/.run", *arguments]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "PATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def shown(told: subprocess.CompletedProcess[str]) -> list[tuple[str, ...]]:
    """Return time, host and service of each line."""
    assert told.returncode == 0, told.stdout + told.stderr
    lines = [line.split() for line in told.stdout.split("\n")]
    return [(*line[:3],) for line in lines if len(line) > 1 and line[1] in HOSTS]


@pytest.mark.parametrize(
    "text", ["order-7", "a.*b", "$HOME {{ 7*7 }} $(shell date) '; date", "--help", "$(ID)"]
)
def test_a_text_is_found_on_every_host_and_is_nothing_but_text(inventory: Path, text: str) -> None:
    lines = shown(make("find", f"INVENTORY={inventory}", f"ID={text}"))
    today = [line for line in lines if line[2] == "publisher"]
    assert len(today) == (0 if text == "$(ID)" else 6)
    assert [host for _, host, _ in today] == ["h3", "h2", "h1"] * (len(today) // 3)
    assert lines == sorted(lines)
    others = [line for line in lines if line not in today]
    assert others == ([("2026-01-01T", "h2", "rabbitmq")] if text == "order-7" else [])


@pytest.mark.parametrize("text", ["", "order-7\norder-8", "x" * 256])
def test_what_is_no_text_of_a_line_is_refused(inventory: Path, text: str) -> None:
    told = make("find", f"INVENTORY={inventory}", f"ID={text}")
    assert told.returncode != 0
    assert ("has several lines" if text else "make find ID=order-7") in told.stdout + told.stderr


def test_the_last_lines_of_several_hosts_are_shown_with_their_hosts(inventory: Path) -> None:
    lines = shown(make("logs", f"INVENTORY={inventory}"))
    assert [host for _, host, _ in lines] == ["h3", "h2", "h1"] * 2
    assert shown(make("logs", f"INVENTORY={inventory}", "S=rabbitmq")) == []


def test_one_host_s_files_are_followed(inventory: Path) -> None:
    hosts = yaml.safe_load(inventory.read_text())
    hosts["brokers"]["hosts"] = {"h1": None}
    inventory.write_text(yaml.safe_dump(hosts))
    docker = inventory.parent / "docker"
    docker.write_text("#!/bin/sh\necho asked for $4 >&2; exit 1")
    docker.chmod(0o755)
    for one in f"INVENTORY={inventory}", "INVENTORY=inventory/local.yml":
        told = make("logs", one, "STACK=orders", path=f"{docker.parent}:{os.environ['PATH']}")
        assert "asked for orders-fluentd" in told.stderr
        assert "PLAY" not in told.stdout
