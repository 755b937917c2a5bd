"""Filters that the role config computes with."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any


def config_differs(
    files: Mapping[str, str], found: Iterable[Mapping[str, Any]], folder: str, gid: int
) -> bool:
    """Return whether folder has something else than exactly files, text by path, for root and gid.

    found is what the host has: the files that host_info tells.
    """
    have = {
        str(PurePosixPath(item["path"]).relative_to(folder)): item
        for item in found
        if PurePosixPath(item["path"]).is_relative_to(folder)
    }
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}

    def right(path: str, kind: str, mode: str) -> bool:
        told = (have[path]["mode"], have[path]["uid"], have[path]["gid"])
        return have[path][kind] and told == (mode, 0, int(gid))

    def same(path: str) -> bool:
        told: str = have[path]["checksum"]
        return told == hashlib.sha256(files[path].encode()).hexdigest()

    return not (
        have.keys() == folders | files.keys()
        and all(right(path, "isdir", "0750") for path in folders)
        and all(right(path, "isreg", "0640") and same(path) for path in files)
    )


def config_hash(files: Mapping[str, str], salt: str, reread: Iterable[str] = ()) -> str:
    """Return SHA-256 of files, text by path, without those that a container reads again by itself.

    The salt is secret: without it, the hash would tell whether a guess of a password is right.
    """
    held = {path: text for path, text in files.items() if path not in reread}
    return hashlib.sha256((salt + json.dumps(held, sort_keys=True)).encode()).hexdigest()


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
        return {
            "config_differs": config_differs,
            "config_hash": config_hash,
            "config_script": config_script,
        }
