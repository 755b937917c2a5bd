"""The environment's promises."""

import time
from pathlib import Path

import pytest
from common.environment import LAST_WORDS, ConfigError, Environment, leave


@pytest.mark.parametrize("variables", [{}, {"NAME": ""}])
def test_a_text_without_value_or_default_stops_the_start(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="NAME must be set"):
        Environment(variables).text("NAME")


def test_a_default_stands_in_for_what_is_not_set() -> None:
    assert Environment({}).text("NAME", "x") == "x"
    assert Environment({}).number("N", 7, 1, 9) == 7


@pytest.mark.parametrize("raw", ["abc", "", "1.5", "0", "10"])
def test_a_bad_number_stops_the_start_by_name_and_value(raw: str) -> None:
    with pytest.raises(ConfigError, match=f"^N must be .*{raw}"):
        Environment({"N": raw}).number("N", 7, 1, 9)


@pytest.mark.parametrize("raw", ["1", "9"])
def test_a_number_may_be_at_its_bounds(raw: str) -> None:
    assert Environment({"N": raw}).number("N", 7, 1, 9) == int(raw)


def test_a_secret_comes_from_the_variable_or_its_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(" s3cret \n\n", encoding="utf-8")
    assert Environment({"S": "direct"}).secret("S") == "direct"
    assert Environment({"S_FILE": str(path)}).secret("S") == " s3cret \n"


def test_a_secret_set_twice_stops_the_start_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="S and S_FILE") as caught:
        Environment({"S": "s3cret", "S_FILE": "/x"}).secret("S")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff"])
def test_a_useless_secret_file_stops_the_start_by_name(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"S_FILE={path}"):
        Environment({"S_FILE": str(path)}).secret("S")


@pytest.mark.parametrize(("text", "status", "said"), [("x: no", 1, "x: no\n"), ("", 0, "")])
def test_who_leaves_says_why_and_leaves_time_to_take_it(
    capfd: pytest.CaptureFixture[str], text: str, status: int, said: str
) -> None:
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        leave(text)
    assert (end.value.code, capfd.readouterr().err) == (status, said)
    assert time.monotonic() - started >= LAST_WORDS


@pytest.mark.parametrize(
    ("variables", "value"), [({}, False), ({"F": "true"}, True), ({"F": "false"}, False)]
)
def test_a_flag_is_true_or_false(variables: dict[str, str], value: bool) -> None:
    assert Environment(variables).flag("F") is value


@pytest.mark.parametrize("raw", ["", "True", "yes", "1"])
def test_a_bad_flag_stops_the_start_by_name_and_value(raw: str) -> None:
    with pytest.raises(ConfigError, match=f"F must be true or false, got {raw!r}"):
        Environment({"F": raw}).flag("F")
