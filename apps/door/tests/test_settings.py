"""The promises of the settings that the doors share."""

import pytest
from door.environment import ConfigError, Environment
from door.settings import BrokerSettings, EventSettings

LOGIN = {"RABBITMQ_USER": "waiter", "RABBITMQ_PASSWORD": "s3cret"}


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
