"""The promises of the settings that the doors share."""

from base64 import b64encode
from pathlib import Path

import pytest
from common.environment import ConfigError, Environment
from door.settings import Access, BrokerSettings, EventSettings

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


BASIC = {"HTTP_USER": "waiter", "HTTP_PASSWORD": "ta:käse"}
BEARER = {"HTTP_TOKEN": "t0ken"}


def basic(login: str, scheme: str = "Basic") -> str:
    return f"{scheme} {b64encode(login.encode()).decode()}"


GOOD_BASIC = [basic("waiter:ta:käse", scheme) for scheme in ("Basic", "basic", "BASIC")]
GOOD_BEARER = ["Bearer t0ken", "bearer t0ken", "BEARER t0ken", "Bearer  t0ken"]
BAD = [
    None,
    "",
    "Basic",
    "Bearer",
    "Bearer ",
    "t0ken",
    "Bearer t0kem",
    "Bearer t0ke",
    "Bearer t0kenn",
    "Bearer T0KEN",
    "Basic t0ken",
    "Bearer ä",
    basic("waiter:ta:kase"),
    basic("waiter:"),
    basic("waiter"),
    basic("cook:ta:käse"),
    basic("waiter:ta:käse", "Bearer"),
]


@pytest.mark.parametrize(
    ("variables", "good", "bad"),
    [
        (BASIC, GOOD_BASIC, [*BAD, *GOOD_BEARER]),
        (BEARER, GOOD_BEARER, [*BAD, *GOOD_BASIC]),
        ({**BASIC, **BEARER}, GOOD_BASIC + GOOD_BEARER, BAD),
        ({}, [*BAD, *GOOD_BASIC, *GOOD_BEARER], []),
    ],
    ids=["basic", "bearer", "both", "none"],
)
def test_who_knows_one_of_the_secrets_may_enter_and_nobody_else(
    variables: dict[str, str], good: list[str | None], bad: list[str | None]
) -> None:
    access = Access.read(Environment(variables))
    assert [header for header in good if not access.allows(header)] == []
    assert [header for header in bad if access.allows(header)] == []


def test_the_secrets_of_the_doors_may_be_in_files_and_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    (tmp_path / "token").write_text("t0ken\n")
    access = Access.read(
        Environment(
            {
                "HTTP_USER": "waiter",
                "HTTP_PASSWORD_FILE": str(tmp_path / "password"),
                "HTTP_TOKEN_FILE": str(tmp_path / "token"),
            }
        )
    )
    for header in basic("waiter:s3cret"), "Bearer t0ken":
        assert access.allows(header)
        assert header not in repr(access)
    assert not access.allows(None)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"HTTP_USER": "waiter"}, "HTTP_PASSWORD"),
        ({"HTTP_USER": "waiter", "HTTP_PASSWORD": ""}, "HTTP_PASSWORD"),
        ({"HTTP_USER": "", "HTTP_PASSWORD": "x"}, "HTTP_USER"),
        ({"HTTP_TOKEN": ""}, "HTTP_TOKEN"),
        ({"HTTP_TOKEN_FILE": "/nowhere"}, "HTTP_TOKEN_FILE"),
        ({"HTTP_TOKEN": "x", "HTTP_TOKEN_FILE": "/nowhere"}, "HTTP_TOKEN_FILE"),
        ({"HTTP_USER": "waiter", "HTTP_PASSWORD_FILE": "/nowhere"}, "HTTP_PASSWORD_FILE"),
        ({"HTTP_PASSWORD": "x"}, "HTTP_USER"),
        ({"HTTP_PASSWORD_FILE": "/nowhere"}, "HTTP_USER"),
        ({"HTTP_PASSWORD": "x", "HTTP_TOKEN": "x"}, "HTTP_USER"),
    ],
)
def test_half_a_login_stops_the_start_by_name(variables: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Access.read(Environment(variables))
