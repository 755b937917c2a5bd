"""Look once at all that the roles must know of a Docker host before they change it."""

import grp
import http.client
import importlib.util
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: host_info
short_description: What a Docker host has
description: Asks the engine by its API, which needs no library, and looks at the stack's own files.
author: The authors of message-broker-stack
attributes:
  check_mode: {support: full, description: It changes nothing.}
options:
  config_dir: {type: path, required: true, description: Folder of the configurations.}
  state_dir: {type: path, required: true, description: Folder of what is remembered about the data.}
  gid: {type: int, required: true, description: A group's number.}
  socket: {type: path, default: /var/run/docker.sock, description: Where the engine listens.}
"""

EXAMPLES = r"""
- message_broker.stack.host_info:
    config_dir: /etc/message-broker-stack/broker
    state_dir: /var/lib/message-broker-stack/broker
    gid: 10001
"""

RETURN = r"""
engine: {type: dict, returned: always, description: GET /info; empty where no engine answers.}
containers: {type: list, returned: always, description: "GET /containers/json?all=1."}
volumes: {type: list, returned: always, description: Volumes of GET /volumes.}
images: {type: list, returned: always, description: GET /images/json.}
networks: {type: list, returned: always, description: GET /networks.}
endpoints:
  type: list
  returned: always
  description: Addresses of the engine that the command docker asks, by its context and DOCKER_HOST.
free_gib: {type: int, returned: always, description: GiB free where the engine keeps its data.}
files:
  type: list
  returned: always
  description: >-
    Both folders and all in config_dir, with path, mode ("0640"), uid, gid, isdir, isreg and, of a
    file, checksum (SHA-256).
records: {type: dict, returned: always, description: First line of each file in state_dir by name.}
group: {type: str, returned: always, description: "Name of the group gid; empty: there is none."}
requests: {type: bool, returned: always, description: Whether Python has the library requests.}
"""


class Engine(http.client.HTTPConnection):
    """A connection to the engine's API; no library is needed."""

    def __init__(self, path: str) -> None:
        """Prepare to ask the engine at path."""
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def get(self, path: str) -> Any:
        """Return what the engine tells of path; OSError where none answers."""
        self.request("GET", path)
        response = self.getresponse()
        body = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"{path}: {response.status} {body.decode()}")
        return json.loads(body)


def engine_info(path: str) -> dict[str, Any]:
    """Return what the engine at path has."""
    engine = Engine(path)
    try:
        info = engine.get("/info")
    except OSError:
        return {"engine": {}, "containers": [], "volumes": [], "networks": [], "images": []}
    return {
        "engine": info,
        "containers": engine.get("/containers/json?all=1"),
        "volumes": engine.get("/volumes")["Volumes"] or [],
        "networks": engine.get("/networks"),
        "images": engine.get("/images/json"),
    }


def described(module: AnsibleModule, path: Path) -> dict[str, Any]:
    """Return what is compared with the file that is wanted at path."""
    found = path.lstat()
    isreg = stat.S_ISREG(found.st_mode)
    return {
        "path": str(path),
        "mode": f"{stat.S_IMODE(found.st_mode):04o}",
        "uid": found.st_uid,
        "gid": found.st_gid,
        "isdir": stat.S_ISDIR(found.st_mode),
        "isreg": isreg,
        "checksum": module.sha256(path) if isreg else None,
    }


def below(folder: Path) -> Iterator[Path]:
    """Return all that is in folder, at every depth; no link is followed."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in folders + files)


def records(folder: Path) -> dict[str, str]:
    """Return the first line of each file in folder, by its name."""
    return {
        path.name: path.read_text().partition("\n")[0]
        for path in folder.glob("*")
        if path.is_file()
    }


def free_gib(path: Path) -> int:
    """Return the GiB that are free in path, or in what is above it where it is missing."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize // 2**30


def endpoints(module: AnsibleModule) -> list[str]:
    """Return the addresses of the engine that the command docker would ask."""
    found = [os.environ.get("DOCKER_HOST", "")]
    docker = module.get_bin_path("docker")
    if docker:
        command = [docker, "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
        found.append(module.run_command(command)[1].strip())
    return [address for address in found if address]


def group(gid: int) -> str:
    """Return the name of the group gid, or nothing."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def main() -> None:
    """Answer Ansible."""
    path = {"type": "path", "required": True}
    module = AnsibleModule(
        {
            "config_dir": path,
            "state_dir": path,
            "gid": {"type": "int", "required": True},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    config, state = Path(module.params["config_dir"]), Path(module.params["state_dir"])
    try:
        found = engine_info(module.params["socket"])
    except http.client.HTTPException as error:
        module.fail_json(
            msg=f"The engine at {module.params['socket']} does not tell what it has: {error}"
        )
    there = [path for path in (config, state, *below(config)) if os.path.lexists(path)]
    module.exit_json(
        **found,
        endpoints=endpoints(module),
        free_gib=free_gib(Path(found["engine"].get("DockerRootDir", "/var/lib"))),
        files=[described(module, path) for path in there],
        records=records(state),
        group=group(module.params["gid"]),
        requests=importlib.util.find_spec("requests") is not None,
    )


if __name__ == "__main__":
    main()
