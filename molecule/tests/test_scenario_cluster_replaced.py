"""A new host in place of one that is gone for good: the last test, as the others know three."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import HOSTS, of_hosts, outside
from conftest import INVENTORY
from load import load

GONE, NEW = HOSTS[-1], (*HOSTS[:-1], "broker4")


@pytest.fixture
def inventory() -> Iterator[Path]:
    """Return an inventory beside the scenario's own, with the new host."""
    hosts: dict[str, dict[str, str]] = {name: {} for name in NEW}
    file = INVENTORY / "replaced.yml"
    file.write_text(yaml.safe_dump({"brokers": {"hosts": hosts}, "clustered": {"hosts": hosts}}))
    yield file
    file.unlink()


def test_a_host_is_replaced(inventory: Path) -> None:
    before, after = of_hosts(), of_hosts(NEW)
    before.wait_until_whole()
    outside("kill", before.machine(GONE))
    forget = json.dumps({"rabbitmq_forget_nodes": [GONE]})
    with load(of_hosts(HOSTS[:-1]), f"{GONE} replaced by {NEW[-1]}") as clients:
        done = after.first.playbook("site", "--extra-vars", forget, inventory=inventory)
        assert done.returncode == 0, done.stdout[-3000:]
        after.wait_until_whole()
    assert clients.stall() <= 3
    members = {tuple(sorted(queue["members"])) for queue in after.api("/queues?columns=members")}
    assert members == {tuple(f"rabbit@{name}" for name in NEW)}
