"""What tests of the repository use: rendered templates, and tools that only an image has."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted(ROOT.glob("roles/*/templates/**/*.j2"))


@dataclass
class Rendered:
    """Two renderings with one folder of passwords, each the texts by container/name."""

    secrets: Path
    first: dict[str, str]
    second: dict[str, str]


def playbook(name: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run tests/name.yml by Ansible on the inventory of this host, with these variables."""
    command = [".venv/bin/ansible-playbook", "--inventory=inventory/local.yml"]
    return subprocess.run(
        [*command, f"--extra-vars={json.dumps(variables)}", f"tests/{name}.yml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )


def render(folder: Path, **variables: object) -> dict[str, str]:
    """Render every template by Ansible, with the inventory's variables and these.

    Passwords are made and kept in folder/secrets.
    """
    target = folder / "rendered.json"
    values = {
        "stack_secrets_dir": str(folder / "secrets"),
        "render_to": str(target),
        "render_templates": [str(path) for path in TEMPLATES],
        **variables,
    }
    done = playbook("render", **values)
    if done.returncode != 0:
        pytest.fail("\n".join(done.stdout.splitlines()[-40:]) + done.stderr, pytrace=False)
    # roles/fluentd/templates/fluentd/fluent.conf.j2 is fluentd/fluent.conf
    texts: dict[str, str] = json.loads(target.read_text())
    return {
        path.partition("/templates/")[2].removesuffix(".j2"): text for path, text in texts.items()
    }


def run_in(image: str, files: Mapping[str, str], script: str) -> subprocess.CompletedProcess[str]:
    """Run script by the image's sh, in a folder with these files (path to text), without network.

    stderr is in stdout.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(text.encode()), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    run = ["docker", "run", "--rm", "--interactive", "--network=none", "--tmpfs=/tmp"]
    done = subprocess.run(
        [*run, "--workdir=/tmp", "--entrypoint=sh", image, "-c", f"tar -x && {script}"],
        input=packed.getvalue(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=60,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode())
