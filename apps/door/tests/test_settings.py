"""The promises of the settings that the doors share."""

from pathlib import Path

import pytest
from common.environment import ConfigError, Environment
from door.settings import BrokerSettings, EventSettings, HttpSettings, read_queues_file

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


def test_events_go_nowhere_until_a_collector_is_named() -> None:
    assert EventSettings.read(Environment({})) == EventSettings(None, 24224)
    env = {"FLUENTD_HOST": "fluentd", "FLUENTD_PORT": "1"}
    assert EventSettings.read(Environment(env)) == EventSettings("fluentd", 1)


@pytest.mark.parametrize(("name", "value"), [("FLUENTD_HOST", ""), ("FLUENTD_PORT", "x")])
def test_a_bad_collector_stops_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EventSettings.read(Environment({name: value}))


def test_a_door_has_no_names_and_no_proxy_until_it_is_told() -> None:
    assert HttpSettings.read(Environment({})) == HttpSettings(frozenset(), fronted=False)
    env = {"HOST_NAMES": "publisher, 192.0.2.1,2001:db8::1,[::2],", "TRUST_FORWARDED": "true"}
    names = frozenset(["publisher", "192.0.2.1", "[2001:db8::1]", "[::2]"])
    assert HttpSettings.read(Environment(env)) == HttpSettings(names, fronted=True)


@pytest.mark.parametrize(("name", "value"), [("HOST_NAMES", ""), ("TRUST_FORWARDED", "yes")])
def test_bad_names_and_a_bad_proxy_stop_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        HttpSettings.read(Environment({name: value}))


def test_the_lists_are_in_a_file_that_can_be_read(tmp_path: Path) -> None:
    assert read_queues_file(Environment({})) is None
    file = tmp_path / "queues.json"
    env = Environment({"QUEUES_FILE": str(file)})
    with pytest.raises(ConfigError, match="QUEUES_FILE"):
        read_queues_file(env)
    file.write_text('{"queues": [], "topics": []}')
    assert read_queues_file(env) == file
