"""The promises of the settings that the doors share."""

from pathlib import Path

import pytest
from common.environment import ConfigError, Environment
from door.settings import BrokerSettings, EventSettings, HttpSettings, read_queues_file
from small_broker import certified

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


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    certified(folder)
    return folder / "ca.pem"


def test_the_own_broker_is_alone_until_others_are_named(ca_file: Path) -> None:
    settings = BrokerSettings.read(Environment({**LOGIN, "CA_FILE": "missing"}))
    assert settings == BrokerSettings(user="waiter", password="s3cret")
    assert settings.addresses == (("localhost", 5672),)
    assert settings.heartbeat == 10
    env = {**LOGIN, "RABBITMQ_OTHERS": "h2:5671,[2001:db8::1]:1", "CA_FILE": str(ca_file)}
    settings = BrokerSettings.read(Environment(env))
    assert settings.addresses == (("localhost", 5672), ("h2", 5671), ("2001:db8::1", 1))
    assert settings.ca_file == str(ca_file)
    assert settings.heartbeat == 5
    env["RABBITMQ_HEARTBEAT"] = "7"
    assert BrokerSettings.read(Environment(env)).heartbeat == 7


@pytest.mark.parametrize(
    "others",
    [
        "",
        "h2",
        "h2:",
        ":1",
        "h2:0",
        "h2:65536",
        "h2:1,",
        "h2:1, h3:1",
        "h2:x",
        "2001::1:1",
        "amqps://h2:1",
        "h2:1,h2:1",
    ],
)
def test_bad_brokers_stop_the_start_by_name(ca_file: Path, others: str) -> None:
    env = {**LOGIN, "RABBITMQ_OTHERS": others, "CA_FILE": str(ca_file)}
    with pytest.raises(ConfigError, match="RABBITMQ_OTHERS"):
        BrokerSettings.read(Environment(env))


@pytest.mark.parametrize("file", [None, "", "missing.pem", "empty.pem", "text.pem", "server.pem"])
def test_other_brokers_need_a_file_with_certificates(ca_file: Path, file: str | None) -> None:
    (ca_file.parent / "empty.pem").write_bytes(b"")
    (ca_file.parent / "text.pem").write_text("no certificate")
    env = {**LOGIN, "RABBITMQ_OTHERS": "h2:5671"}
    if file is not None:
        env["CA_FILE"] = str(ca_file.parent / file) if file else ""
    with pytest.raises(ConfigError, match="CA_FILE"):
        BrokerSettings.read(Environment(env))


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
