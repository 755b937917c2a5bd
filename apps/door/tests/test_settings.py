"""The environment's promises."""

from pathlib import Path

import pytest
from door.settings import BrokerSettings, ConfigError, Environment, EventSettings

LOGIN = {"RABBITMQ_USER": "waiter", "RABBITMQ_PASSWORD": "s3cret"}


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


def test_the_login_is_required() -> None:
    for name in LOGIN:
        rest = {key: value for key, value in LOGIN.items() if key != name}
        with pytest.raises(ConfigError, match=name):
            BrokerSettings.read(Environment(rest))


def test_the_password_is_not_shown() -> None:
    settings = BrokerSettings.read(Environment(LOGIN))
    assert settings.password == "s3cret"
    assert "s3cret" not in repr(settings)


def test_parameters_carry_every_setting_and_the_connection_s_name() -> None:
    env = {**LOGIN, "RABBITMQ_HOST": "h", "RABBITMQ_PORT": "1", "RABBITMQ_HEARTBEAT": "3"}
    parameters = BrokerSettings.read(Environment(env)).parameters("publisher")
    assert (parameters.host, parameters.port, parameters.heartbeat) == ("h", 1, 3)
    assert parameters.credentials.username == "waiter"
    assert parameters.credentials.password == "s3cret"
    assert parameters.client_properties == {"connection_name": "publisher"}


def test_events_go_nowhere_until_a_collector_is_named() -> None:
    assert EventSettings.read(Environment({})) == EventSettings(None, 24224)
    env = {"FLUENTD_HOST": "fluentd", "FLUENTD_PORT": "1"}
    assert EventSettings.read(Environment(env)) == EventSettings("fluentd", 1)


@pytest.mark.parametrize(("name", "value"), [("FLUENTD_HOST", ""), ("FLUENTD_PORT", "x")])
def test_a_bad_collector_stops_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EventSettings.read(Environment({name: value}))
