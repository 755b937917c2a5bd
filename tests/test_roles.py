"""A role's argument specs say the same as its defaults, and say something about every option."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(
    path.parents[1] for path in Path(__file__).parents[1].glob("roles/*/meta/argument_specs.yml")
)
role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def default_files(role: Path) -> list[Path]:
    return sorted([*role.glob("defaults/main.yml"), *role.glob("defaults/main/*.yml")])


def defaults(role: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in default_files(role):
        values = yaml.safe_load(path.read_text()) or {}
        assert not merged.keys() & values.keys(), f"{path} repeats a default of another file"
        merged |= values
    return merged


def entries(role: Path) -> dict[str, dict[str, Any]]:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return {name: entry["options"] for name, entry in specs.items()}


def is_literal(value: object) -> bool:
    return "{{" not in str(value)


@role
def test_every_default_is_an_option(role: Path) -> None:
    assert defaults(role).keys() - entries(role)["main"].keys() == set()


@role
def test_every_option_is_either_required_or_has_a_default(role: Path) -> None:
    options = entries(role)["main"]
    required = {name for name, option in options.items() if option.get("required")}
    assert required | defaults(role).keys() == options.keys()
    assert required & defaults(role).keys() == set()


@role
def test_the_specs_show_the_defaults_as_they_are(role: Path) -> None:
    written = {name: value for name, value in defaults(role).items() if is_literal(value)}
    options = entries(role)["main"]
    shown = {name: option["default"] for name, option in options.items() if "default" in option}
    assert shown == written
    # 1 == True == 1.0 in Python, but not for who reads them.
    assert {name: type(value) for name, value in shown.items()} == {
        name: type(value) for name, value in written.items()
    }


def test_what_several_roles_are_given_has_one_type_and_the_same_parts() -> None:
    shapes: dict[str, list[Any]] = {}
    for path in ROLES:
        for name, option in entries(path)["main"].items():
            parts = {key: option.get(key) for key in ("type", "elements", "options")}
            shapes.setdefault(name, []).append(parts)
    assert {name for name, found in shapes.items() if found[1:] != found[:-1]} == set()


@role
def test_every_option_is_described(role: Path) -> None:
    bare = {
        f"{entry}: {name}"
        for entry, options in entries(role).items()
        for name, option in options.items()
        if not str(option.get("description") or "").strip()
    }
    assert bare == set()


@role
def test_what_must_be_given_is_a_commented_line_of_the_defaults(role: Path) -> None:
    text = "\n".join(path.read_text() for path in default_files(role))
    own = {
        name
        for name, option in entries(role)["main"].items()
        if option.get("required") and name.startswith(f"{role.name}_")
    }
    assert own == {name for name in own if re.search(rf"^# {name}:", text, re.MULTILINE)}


@role
def test_every_entry_of_the_specs_is_a_task_file(role: Path) -> None:
    # Ansible looks for an entry by the file's name: a misspelt one is never asked.
    assert [name for name in entries(role) if not (role / f"tasks/{name}.yml").exists()] == []


@role
def test_an_option_is_the_same_in_every_entry(role: Path) -> None:
    every = entries(role)
    for name, options in every.items():
        for key in options.keys() & every["main"].keys():
            assert options[key] == every["main"][key], f"{name}: {key}"
