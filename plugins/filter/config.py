"""Filters that the role config computes with."""

import base64
import hashlib
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any


def config_changes(
    files: Mapping[str, str], found: Iterable[Mapping[str, Any]], folder: str, gid: int
) -> dict[str, list[str]]:
    """Return what must be done so that folder has exactly files, text by path, for root and gid.

    found is what the host has: the files that host_info tells. Told are paths in folder: the
    folders to create ("" is folder itself), the files to write, and what to remove.
    """
    have = {
        str(PurePosixPath(item["path"]).relative_to(folder)): item
        for item in found
        if PurePosixPath(item["path"]).is_relative_to(folder)
    }
    folders = sorted({str(parent) for path in files for parent in PurePosixPath(path).parents})

    def right(path: str, kind: str, mode: str) -> bool:
        item: Mapping[str, Any] = have.get(path, {})
        told = (item.get("mode"), item.get("uid"), item.get("gid"))
        return bool(item.get(kind)) and told == (mode, 0, int(gid))

    def same(path: str) -> bool:
        told: str = have[path]["checksum"]
        return told == hashlib.sha256(files[path].encode()).hexdigest()

    return {
        "folders": [path.removeprefix(".") for path in folders if not right(path, "isdir", "0750")],
        "write": [path for path in files if not (right(path, "isreg", "0640") and same(path))],
        "remove": [path for path in have if path not in folders and path not in files],
    }


def config_script(files: Mapping[str, str], folder: str, command: str) -> str:
    """Return a script for sh that makes files, text by path, in folder, and does command there."""
    lines = ["exec 2>&1", f"cd {shlex.quote(folder)}"]
    for path, text in files.items():
        lines.append(f"mkdir -p {shlex.quote(str(PurePosixPath(path).parent))}")
        encoded = base64.b64encode(text.encode()).decode()
        lines.append(f"echo {encoded} | base64 -d > {shlex.quote(path)}")
    return "\n".join([*lines, command, ""])


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"config_changes": config_changes, "config_script": config_script}
