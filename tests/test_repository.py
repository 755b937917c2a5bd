"""The tree is what its own map says, and ties nobody to a place that only some can reach."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# The role stack has nothing but the values that the others share.
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.name != "stack")
REQUIREMENTS = sorted([*ROOT.glob("requirements*.txt"), *ROOT.glob("apps/*/requirements.txt")])
role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def tracked() -> list[Path]:
    """Return the files that git has or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def found(pattern: str) -> list[str]:
    """Return the lines of the tracked files in which pattern is found, with their places."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_file_names_the_place_that_packages_come_from() -> None:
    # Whoever has a mirror has told the tools; a written place goes past it.
    hosts = "|".join(["pypi", "pythonhosted", "npmjs", "rubygems", "hex", "crates"])
    assert found(rf"//([\w-]+\.)*({hosts})\.\w+") == []
    assert found(r"(?<!\w)--(index-url|extra-index-url|find-links|trusted-host)\b") == []


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_requirement_has_one_version_and_its_hashes(path: Path) -> None:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    requirements = [line for line in text.splitlines() if line.strip()]
    assert requirements
    pinned = r"[\w.-]+(\[[\w,]+\])?==[\w.+!]+( ; [^:]+?)?( +--hash=sha256:[0-9a-f]{64})+ *"
    assert [line for line in requirements if not re.fullmatch(pinned, line)] == []


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("molecule/*/molecule.yml")), ids=lambda path: path.parent.name
)
def test_a_scenario_leaves_k_to_the_user_and_names_tests_that_are_there(path: Path) -> None:
    verifier = yaml.safe_load(path.read_text())["verifier"]
    # It comes after the -k of PYTEST_ADDOPTS, and the last one counts.
    assert "k" not in verifier.get("options", {})
    # Molecule says nothing of one that is missing.
    named = verifier.get("additional_files_or_dirs", [])
    assert [name for name in named if not (path.parent / name).is_file()] == []


def test_every_app_has_requirements() -> None:
    apps = {path.parent for path in ROOT.glob("apps/*/Dockerfile")}
    assert apps
    assert apps <= {path.parent for path in REQUIREMENTS}


def imported(module: Path) -> set[str]:
    """Return the top-level modules that module imports."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    names = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("app", ["collector", "exporter", "publisher", "subscriber"])
def test_an_image_has_each_app_that_its_program_imports(app: str) -> None:
    catalogue = yaml.safe_load((ROOT / "roles/stack/vars/main.yml").read_text())
    containers = catalogue["stack_catalogue"]
    contexts = containers.get(app, containers["fluentd"])["image"]["contexts"]
    parts = {Path(context).name for context in contexts}
    copied = re.findall(
        r"^COPY (\w+)/ /app/\1/$", (ROOT / f"apps/{app}/Dockerfile").read_text(), re.M
    )
    assert set(copied) == parts
    ours = {path.name for path in (ROOT / "apps").iterdir()}
    modules = [path for part in parts for path in ROOT.glob(f"apps/{part}/{part}/*.py")]
    assert ours & set().union(*map(imported, modules)) <= parts


def test_only_what_speaks_amqp_imports_pika() -> None:
    modules = [path for path in ROOT.glob("apps/*/**/*.py") if "tests" not in path.parts]
    importing = {path.name for path in modules if "pika" in imported(path)}
    assert importing == {"amqp.py", "read.py", "wire.py"}


@role
def test_a_role_has_tasks_defaults_and_specs(role: Path) -> None:
    assert (role / "tasks/main.yml").is_file()
    assert (role / "meta/argument_specs.yml").is_file()
    assert (role / "defaults/main.yml").is_file() != (role / "defaults/main").is_dir()


@role
def test_templates_and_defaults_are_named_as_the_task_file_of_their_container(role: Path) -> None:
    folders = [path for path in role.glob("templates/*") if path.is_dir()]
    assert folders == list(role.glob("templates/*"))
    named = {path.stem for path in [*folders, *role.glob("defaults/main/*.yml")]}
    assert named <= {path.stem for path in role.glob("tasks/*.yml")}


def test_every_preflight_is_asked() -> None:
    values = yaml.safe_load((ROOT / "roles/preflight/defaults/main.yml").read_text())
    written = {path.parents[1].name for path in ROOT.glob("roles/*/tasks/preflight.yml")}
    assert set(values["preflight_checked"]) == written


def test_every_image_has_a_version() -> None:
    values = {
        name: value
        for role in ROLES
        for path in [*role.glob("defaults/main.yml"), *role.glob("defaults/main/*.yml")]
        for name, value in yaml.safe_load(path.read_text()).items()
        if name.endswith("_image") and value
    }
    assert values
    loose = re.compile(r"(?!.*:latest$)[^:]+(:\d+)?[^:]*:[\w.-]+")
    assert {name for name, value in values.items() if not loose.fullmatch(value)} == set()


def test_every_relative_link_leads_to_a_file() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in tracked()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_pattern_of_a_value_ends_where_the_value_does() -> None:
    # $ matches before a last newline, too.
    loose = found(r"""(pattern: |match\(|'match', )['"].*\$['"]""")
    assert [line for line in loose if line.startswith(("roles/", "playbooks/"))] == []


def test_the_patch_that_adds_an_eighth_container_fits(tmp_path: Path) -> None:
    # git itself passes by what is outside of the folder in which it runs.
    (tmp_path / "tree").mkdir()
    patch = ROOT / "tests/bare/echo.patch"
    for name in re.findall(r"^--- a/(.+)$", patch.read_text(), re.MULTILINE):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text((ROOT / name).read_text())
    command = ["git", "apply", "--check", patch]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path / "tree"
    )
    assert done.returncode == 0, done.stderr
