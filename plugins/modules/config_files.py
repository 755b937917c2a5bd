"""Make a folder have exactly the files of a container's configuration, by one call."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: config_files
short_description: Make a folder have exactly these files
description: >-
  Makes the folders, writes each file that differs whole or not at all, and then removes all else
  in the folder. All belongs to the user who runs it and to one group: folders have 0750, files
  0640. One call takes as long as one file of ansible.builtin.copy.
author: The authors of message-broker-stack
attributes:
  check_mode: {support: full}
  diff_mode: {support: full, description: "Of a secret, only that it is written."}
options:
  folder: {type: path, required: true, description: The folder; what it is in exists.}
  gid: {type: int, required: true, description: Number of the group that may read it.}
  files: {type: dict, default: {}, description: Text of each file by its path in the folder.}
  secrets:
    type: dict
    default: {}
    description: Likewise, of files that no output may show. They are written after the others.
"""

EXAMPLES = r"""
- message_broker.stack.config_files:
    folder: /etc/message-broker-stack/broker/fluentd
    gid: 10001
    files: {fluent.conf: "…", scripts/prune.sh: "…"}
    secrets: {password: "{{ fluentd_password }}"}
"""

RETURN = r"""
paths: {type: list, returned: success, description: "What was made, written or removed, in order."}
"""

FOLDER = 0o750
FILE = 0o640


class Changes:
    """What is changed on the host, told as Ansible's result; in check mode it is only told."""

    def __init__(self, module: AnsibleModule) -> None:
        """Begin with nothing."""
        self._module = module
        self._owner = (os.geteuid(), int(module.params["gid"]))
        self.paths: list[str] = []
        self.diff: list[dict[str, str]] = []

    def make(self, folder: Path) -> None:
        """Make folder, or give it its owner and mode."""
        if folder.is_dir() and self._is_owned(folder, FOLDER):
            return
        if self._told(folder, {"prepared": f"{folder}: a folder\n"}):
            if not folder.is_dir():
                self._clear(folder)
                folder.mkdir(FOLDER)
            self._own(folder, FOLDER)

    def write(self, path: Path, text: str, *, secret: bool) -> None:
        """Have text in the file path, which takes the place of whatever else is there."""
        there = path.is_file() and not path.is_symlink()
        before = path.read_bytes() if there else b""
        same = there and before == text.encode()
        if same and self._is_owned(path, FILE):
            return
        diff = {"prepared": f"{path}: {'owner and mode' if same else 'a secret'}\n"}
        if not same and not secret:
            diff = {"before": before.decode(errors="replace"), "after": text}
            diff |= {"before_header": str(path), "after_header": str(path)}
        if self._told(path, diff):
            if not there:
                self._clear(path)
            if not same:
                handle, new = tempfile.mkstemp(dir=self._module.tmpdir)
                with os.fdopen(handle, "wb") as file:
                    file.write(text.encode())
                self._module.atomic_move(new, str(path))
            self._own(path, FILE)

    def remove(self, path: Path) -> None:
        """Remove path with all that is in it."""
        if self._told(path, {"prepared": f"{path}: removed\n"}):
            self._clear(path)

    def _told(self, path: Path, diff: dict[str, str]) -> bool:
        """Tell that path is changed; return whether it really is to be."""
        self.paths.append(str(path))
        self.diff.append(diff)
        return not self._module.check_mode

    def _is_owned(self, path: Path, mode: int) -> bool:
        found = path.stat()
        return (found.st_uid, found.st_gid) == self._owner and found.st_mode & 0o7777 == mode

    def _own(self, path: Path, mode: int) -> None:
        os.chown(path, *self._owner)
        path.chmod(mode)

    def _clear(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def surplus(folder: Path, wanted: set[Path]) -> list[Path]:
    """Return what is in folder, at every depth, and is not wanted; no link is followed."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        there = [Path(parent, name) for name in folders + files]
        found += [path for path in there if path not in wanted]
        folders[:] = [name for name in folders if Path(parent, name) in wanted]
    return found


def main() -> None:
    """Answer Ansible."""
    texts: dict[str, Any] = {"type": "dict", "default": {}}
    module = AnsibleModule(
        {
            "folder": {"type": "path", "required": True},
            "gid": {"type": "int", "required": True},
            "files": texts,
            "secrets": texts | {"no_log": True},
        },
        supports_check_mode=True,
        # The host's own log needs no files.
        no_log=True,
    )
    folder = Path(module.params["folder"])
    secrets = module.params["secrets"]
    files = {folder / path: text for path, text in (module.params["files"] | secrets).items()}
    folders = {folder / parent for path in files for parent in path.relative_to(folder).parents}
    changes = Changes(module)
    for path in sorted(folders):
        changes.make(path)
    for path, text in files.items():
        changes.write(path, text, secret=str(path.relative_to(folder)) in secrets)
    for path in surplus(folder, folders | files.keys()):
        changes.remove(path)
    module.exit_json(changed=bool(changes.paths), paths=changes.paths, diff=changes.diff)


if __name__ == "__main__":
    main()
