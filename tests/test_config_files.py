"""What the module config_files makes of a folder, asked as Ansible asks a module."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[1] / "plugins/modules/config_files.py"
FILES = {"main.conf": "a\n", "rules/one.yml": "b\n"}
SECRETS = {"password": "hidden", "tls/key.pem": "covered"}
HIDDEN = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
Write = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "x"


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Write:
    def write(*, check: bool = False, **options: object) -> dict[str, Any]:
        told = {"_ansible_check_mode": check, "_ansible_remote_tmp": str(tmp_path / "tmp")}
        args = {"folder": str(folder), "gid": os.getgid(), "files": FILES, "secrets": SECRETS}
        done = subprocess.run(
            [sys.executable, MODULE],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": args | options | told}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr
        assert not any(text in done.stdout for text in SECRETS.values())
        found: dict[str, Any] = json.loads(done.stdout)
        paths = [Path(path).relative_to(folder) for path in found.get("paths", ())]
        return found | {"paths": [str(path) for path in paths]}

    return write


def texts(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def written(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def test_a_folder_is_made_with_its_files_and_the_secrets_last(write: Write, folder: Path) -> None:
    told = write()
    assert told["changed"]
    assert told["paths"] == [".", "rules", "tls", *FILES, *SECRETS]
    assert texts(folder) == FILES | SECRETS
    modes = {path.stat().st_mode & 0o7777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert {path.stat().st_mode & 0o7777 for path in (folder, folder / "rules")} == {0o750}


def test_what_is_right_stays_as_it_is(write: Write, folder: Path) -> None:
    write()
    before = written(folder / "main.conf")
    told = write()
    assert (told["changed"], told["paths"], told["diff"]) == (False, [], [])
    assert written(folder / "main.conf") == before


def test_only_what_differs_is_written(write: Write, folder: Path) -> None:
    write()
    before = written(folder / "main.conf")
    told = write(files={**FILES, "rules/one.yml": "c\n"})
    assert told["paths"] == ["rules/one.yml"]
    path = str(folder / "rules/one.yml")
    expected = {"before": "b\n", "after": "c\n", "before_header": path, "after_header": path}
    assert told["diff"] == [expected]
    assert texts(folder)["rules/one.yml"] == "c\n"
    assert written(folder / "main.conf") == before


def test_a_file_is_replaced_and_not_changed_in_its_place(write: Write, folder: Path) -> None:
    write()
    with (folder / "main.conf").open() as opened:
        write(files={**FILES, "main.conf": "longer than before\n"})
        assert opened.read() == "a\n"


def test_of_a_secret_nothing_is_shown(write: Write, folder: Path) -> None:
    write()
    (folder / "password").write_text("the old one")
    told = write()
    assert told["diff"] == [{"prepared": f"{folder}/password: a secret\n"}]
    assert set(told["invocation"]["module_args"]["secrets"].values()) == {HIDDEN}


def test_modes_are_set_where_texts_are_right(write: Write, folder: Path) -> None:
    write()
    (folder / "main.conf").chmod(0o666)
    (folder / "rules").chmod(0o700)
    assert write()["paths"] == ["rules", "main.conf"]
    assert (folder / "main.conf").stat().st_mode & 0o7777 == 0o640
    assert (folder / "rules").stat().st_mode & 0o7777 == 0o750


def test_what_is_none_of_them_is_removed(write: Write, folder: Path, tmp_path: Path) -> None:
    write()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (folder / "rules/old").mkdir()
    (folder / "rules/old/one.yml").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert write()["paths"] == ["link", "rules/old"]
    assert texts(folder) == FILES | SECRETS
    assert (tmp_path / "elsewhere/kept").exists()


def test_what_lies_in_the_place_of_a_file_gives_way(
    write: Write, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_text("a\n")
    folder.mkdir()
    (folder / "main.conf").symlink_to(tmp_path / "elsewhere")
    (folder / "rules").touch()
    (folder / "password/in").mkdir(parents=True)
    write()
    assert texts(folder) == FILES | SECRETS
    assert not (folder / "main.conf").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "a\n"
    assert not write()["changed"]


def test_check_mode_tells_and_changes_nothing(write: Write, folder: Path) -> None:
    assert write(check=True)["paths"] == [".", "rules", "tls", *FILES, *SECRETS]
    assert not folder.exists()
    write()
    (folder / "old").touch()
    told = write(check=True, files={"main.conf": "other\n"})
    assert told["paths"] == ["main.conf", "rules", "old"]
    assert texts(folder) == FILES | SECRETS | {"old": ""}
