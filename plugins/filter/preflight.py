"""Filters that the role preflight computes with."""

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.message_broker.stack.plugins.plugin_utils.stack import is_own

PROGRAM = "ansible"
# What the engine tells of a container or a volume: GET /containers/json, GET /volumes.
Item = Mapping[str, Any]


def preflight_own(containers: Iterable[Item], stack: str) -> dict[str, Item]:
    """Return the containers that carry the stack's label, by their names in the catalogue."""
    return {
        container["Names"][0].removeprefix(f"/{stack}-"): container
        for container in containers
        if is_own(container, stack)
    }


def preflight_foreign(
    names: Iterable[str], stack: str, containers: Iterable[Item], volumes: Iterable[Item]
) -> list[str]:
    """Return what has the name of one of the stack's containers, but not the stack's label."""
    wanted = {f"{stack}-{name}" for name in names}
    return [
        *(
            f"{name[1:]} (container of image {container['Image']})"
            for container in containers
            for name in container["Names"]
            if name[1:] in wanted and not is_own(container, stack)
        ),
        *(
            f"{volume['Name']} (volume at {volume['Mountpoint']})"
            for volume in volumes
            if volume["Name"] in wanted and not is_own(volume, stack)
        ),
    ]


def preflight_there(host: Mapping[str, Iterable[Item]], stack: str) -> list[str]:
    """Return what of host, which is what host_info tells, carries the stack's label."""
    containers = [item for item in host["containers"] if is_own(item, stack)]
    return [
        *(f"container {item['Names'][0].removeprefix('/')}" for item in containers),
        *(f"volume {item['Name']}" for item in host["volumes"] if is_own(item, stack)),
    ]


def preflight_unknown(names: Iterable[str], folder: str) -> list[str]:
    """Return those of names that begin like the options of a role in folder, and are none."""
    roles = tuple(f"{role.name}_" for role in Path(folder).iterdir())
    options: set[str] = set()
    for path in Path(folder).glob("*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            options |= entry["options"].keys()
    return [name for name in names if name.startswith(roles) and name not in options]


def preflight_useless(files: Iterable[Item]) -> list[str]:
    """Return the paths of password files that no run could use: empty, locked, or another user's.

    files is what ansible.builtin.find returns on this machine.
    """
    return [
        file["path"]
        for file in files
        if file["size"] == 0 or file["path"].endswith(".lockfile") or file["uid"] != os.getuid()
    ]


def preflight_twice(ports: Mapping[str, str]) -> list[str]:
    """Return what of ports, by their variables, is there twice: "a_port and b_port are 5000"."""
    names: dict[str, list[str]] = {}
    for name, port in ports.items():
        names.setdefault(port, []).append(name)
    return [f"{' and '.join(same)} are {port}" for port, same in names.items() if len(same) > 1]


def preflight_not_held(
    ports: Mapping[str, str], containers: Mapping[str, Item], own: Mapping[str, Item]
) -> dict[str, str]:
    """Return those of ports, by their variables, that neither their container nor the front has.

    containers is the catalogue; own are the stack's containers that the host has.
    """
    held = {
        (variable, str(published.get("PublicPort")))
        for name, container in containers.items()
        for variable in container["ports"]
        for holder in (name, "front")
        for published in own.get(holder, {}).get("Ports", [])
    }
    return {variable: port for variable, port in ports.items() if (variable, port) not in held}


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
        return {
            "preflight_useless": preflight_useless,
            "preflight_unknown": preflight_unknown,
            "preflight_own": preflight_own,
            "preflight_foreign": preflight_foreign,
            "preflight_there": preflight_there,
            "preflight_twice": preflight_twice,
            "preflight_not_held": preflight_not_held,
            "preflight_owner": preflight_owner,
            "preflight_gone": preflight_gone,
        }
