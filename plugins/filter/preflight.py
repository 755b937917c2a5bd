"""Filters that the role preflight computes with."""

import os
import socket
from pathlib import Path
from typing import Any

PROGRAM = "ansible"


def preflight_owner(what: str) -> str:
    """Return who does what: "make up by process 4711 on controller".

    A template is read in a child of the process that runs the playbook.
    """
    return f"{what} by process {os.getppid()} on {socket.gethostname()}"


def preflight_gone(owner: str) -> bool:
    """Return whether owner was this very run, or another one on this machine that has ended."""
    process, _, machine = owner.rpartition(" by process ")[2].partition(" on ")
    if machine != socket.gethostname() or not process.isdigit():
        return False
    if int(process) == os.getppid():
        return True
    try:
        return PROGRAM not in Path("/proc", process, "cmdline").read_text(errors="replace")
    except OSError:
        return True


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"preflight_owner": preflight_owner, "preflight_gone": preflight_gone}
