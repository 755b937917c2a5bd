"""Filters of the log files."""

from collections.abc import Mapping, Sequence
from typing import Any


def fluentd_lines(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """Return the log lines of hosts in order of time, each with its host behind the time.

    A host's lines are the output of the command that it registered as __logs.
    """
    # splitlines() would end a line at characters that are left as they are in JSON.
    found = [
        (*line.partition("\t")[::2], host)
        for host in hosts
        for line in hostvars[host]["__logs"]["stdout"].split("\n")
        if line
    ]
    found.sort(key=lambda line: line[0])
    lines = [f"{time}\t{host}\t{rest}" for time, rest, host in found]
    return "\n".join(lines) or "There are no such lines."


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"fluentd_lines": fluentd_lines}
