"""The three hosts of the scenario cluster."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import testinfra
from conftest import CA, Guarded, eventually, variables

HOSTS = ("broker1", "broker2", "broker3")
QUEUE = variables()["stack_queue"]


def outside(*command: str) -> str:
    """Run docker on the machine that carries the hosts."""
    done = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {command}: {done.stderr}"
    return done.stdout.strip()


@dataclass
class Cluster:
    """The hosts by name."""

    hosts: dict[str, Guarded]

    @property
    def first(self) -> Guarded:
        return next(iter(self.hosts.values()))

    def address(self, host: str) -> str:
        """Return the host's address in the network of all hosts."""
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return outside("inspect", "--format", form, self.machine(host))

    def machine(self, host: str) -> str:
        """Return the container that stands for the host."""
        return str(self.hosts[host].vars["ansible_host"])

    def api(self, path: str) -> Any:
        """Return what the first broker that answers says; None where none does."""
        answers = (host.api(path) for host in self.hosts.values())
        return next((answer.json for answer in answers if answer.status == 200), None)

    def ready(self) -> bool:
        return all(host.ready() for host in self.hosts.values())

    def whole(self) -> bool:
        """Return whether every queue has a member on each host, and all of them run."""
        told = self.api("/queues?columns=name,online")
        return bool(told) and all(len(queue["online"]) == 3 for queue in told)

    def wait_until_whole(self, timeout: float = 120) -> float:
        return eventually(
            lambda: self.ready() and self.whole(), timeout, "all doors and members are there"
        )

    def leader(self) -> str:
        """Return the host whose node leads the queue; the management API may tell an old one."""
        ask = ("rabbitmq-queues", "--silent", "--formatter=json", "quorum_status", QUEUE)
        told = self.first.docker("exec", self.first.container("rabbitmq"), *ask)
        (leader,) = (
            member["Node Name"].removeprefix("rabbit@")
            for member in json.loads(told)
            if member["Raft State"] == "leader"
        )
        return str(leader)


def of_hosts(names: Iterable[str] = HOSTS) -> Cluster:
    """Return the hosts of these names; each has the CA from then on."""
    hosts = {}
    for name in names:
        told = variables(name)
        host = Guarded(testinfra.get_host(f"docker://{told['ansible_host']}"), told)
        host.run("echo %s > %s", (host.secrets / "tls_ca.pem").read_text(), CA)
        hosts[name] = host
    return Cluster(hosts)
