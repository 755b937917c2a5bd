"""What the module host_info sees, asked as Ansible asks a module."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

MODULE = Path(__file__).parents[1] / "plugins/modules/host_info.py"
ANSWERS: dict[str, Any] = {
    "/info": {"DockerRootDir": "/var/lib/none", "MemTotal": 1},
    "/containers/json?all=1": [{"Names": ["/broker-rabbitmq"]}],
    "/volumes": {"Volumes": None},
    "/networks": [{"Name": "bridge"}],
    "/images/json": [{"RepoTags": ["broker/rabbitmq:1"], "RepoDigests": None}],
}
LISTS = ("containers", "volumes", "networks", "images", "files")


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def look(**options: object) -> dict[str, Any]:
        folders = {f"{name}_dir": str(tmp_path / name) for name in ("config", "state")}
        args = folders | {"gid": 0, "socket": str(tmp_path / "engine")} | options
        done = subprocess.run(
            [sys.executable, MODULE],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": args}),
            env={"DOCKER_HOST": "tcp://elsewhere", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return look


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Answers of an engine, by path; another path is an error of its own."""
    answers = dict(ANSWERS)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 500)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path, "broken")).encode())

        def log_message(self, *_: object) -> None: ...

        def address_string(self) -> str:
            return "unix"

    with UnixStreamServer(str(tmp_path / "engine"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answers
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("engine")
def test_what_an_engine_has_is_told(look: Callable[..., dict[str, Any]]) -> None:
    found = look()
    assert found["engine"] == ANSWERS["/info"]
    assert found["containers"] == ANSWERS["/containers/json?all=1"]
    assert found["volumes"] == []
    assert found["networks"] == ANSWERS["/networks"]
    assert found["images"] == ANSWERS["/images/json"]


def test_an_engine_that_fails_is_named(
    look: Callable[..., dict[str, Any]], engine: dict[str, Any]
) -> None:
    del engine["/volumes"]
    found = look()
    assert found["failed"]
    assert 'does not tell what it has: /volumes: 500 "broken"' in found["msg"]


def test_a_bare_host_has_nothing(look: Callable[..., dict[str, Any]]) -> None:
    found = look(gid=4242424)
    assert found["engine"] == found["records"] == {}
    assert [found[name] for name in LISTS] == [[]] * len(LISTS)
    assert found["group"] == ""
    assert found["endpoints"] == ["tcp://elsewhere"]
    assert found["free_gib"] > 0
    assert found["requests"] is True


def test_a_socket_without_an_engine_is_none(
    look: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "engine"))
    assert look()["engine"] == {}


def test_files_and_records_are_told_as_they_are(
    look: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "config/one"
    folder.mkdir(parents=True)
    (folder / "a.conf").write_text("text\n")
    (folder / "a.conf").chmod(0o640)
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/x.version").write_text("4.0.5 a:1\nmore\n")
    found = look()
    files = {item["path"].removeprefix(f"{tmp_path}/"): item for item in found["files"]}
    assert files.keys() == {"config", "state", "config/one", "config/one/a.conf", "config/one/link"}
    told = files["config/one/a.conf"]
    assert told["checksum"] == sha256(b"text\n").hexdigest()
    assert (told["mode"], told["isreg"], told["isdir"]) == ("0640", True, False)
    assert files["config/one"]["isdir"]
    assert not files["config/one/link"]["isdir"]
    assert found["records"] == {"x.version": "4.0.5 a:1"}
    assert found["group"] == "root"
