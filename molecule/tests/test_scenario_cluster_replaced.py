"""What changes which hosts there are: the last tests, as the others know three."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import HOSTS, QUEUE, of_hosts, outside
from conftest import INVENTORY
from load import LONG_PAUSE, PUBLISHER, SUBSCRIBER, load

GONE, NEW = HOSTS[-1], (*HOSTS[:-1], "broker4")


@pytest.fixture(scope="module")
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
    with load(of_hosts(HOSTS[:-1]), f"{GONE} replaced by {NEW[-1]}", pause=LONG_PAUSE) as clients:
        done = after.first.playbook("site", "--extra-vars", forget, inventory=inventory)
        assert done.returncode == 0, done.stdout[-3000:]
        after.wait_until_whole()
    assert clients.stall() <= 3
    members = {tuple(sorted(queue["members"])) for queue in after.api("/queues?columns=members")}
    assert members == {tuple(f"rabbit@{name}" for name in NEW)}


def test_a_backup_is_taken_while_the_doors_serve_and_comes_back(inventory: Path) -> None:
    cluster = of_hosts(NEW)
    first, wanted = cluster.first, [str(number) for number in range(1000)]
    lines = "\n".join(map(json.dumps, wanted))
    sent = first.http(PUBLISHER, f"/queues/{QUEUE}/batch", "--data-binary", lines)
    assert sent.json == {"sent": len(wanted)}
    with load(cluster, "backup", "audit", LONG_PAUSE) as clients:
        done = first.playbook("backup", inventory=inventory)
        assert done.returncode == 0, done.stdout[-3000:]
    assert clients.stall() <= 3
    done = first.playbook("clean", inventory=inventory)
    assert done.returncode == 0, done.stdout[-3000:]
    # Onto one host, which could grow again.
    back = {"backup_file": str(next(INVENTORY.glob("backups/*.tar.gz"))), "stack_nodes": NEW[:1]}
    more = (f"--limit={NEW[0]}", "--extra-vars", json.dumps(back))
    done = first.playbook("restore", *more, inventory=inventory)
    assert done.returncode == 0, done.stdout[-3000:]
    got = first.http(SUBSCRIBER, f"/queues/{QUEUE}/messages?max=1000&wait=5")
    assert [json.loads(line)["body"] for line in got.text.splitlines()] == wanted
