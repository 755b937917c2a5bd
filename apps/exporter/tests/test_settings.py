"""What the exporter promises of its environment."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from common.environment import ConfigError
from exporter import __version__
from exporter.settings import Settings, Target

APP = Path(__file__).parents[1]


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((APP / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_an_empty_environment_gives_the_original_s_defaults() -> None:
    settings = Settings.read({})
    assert settings.url == "http://127.0.0.1:15672"
    assert (settings.user, settings.password) == ("guest", "guest")
    assert (settings.address, settings.port) == ("", 9419)
    assert (settings.timeout, settings.max_queues) == (30, 0)
    assert settings.fluentd_url is None
    assert (settings.tls_targets, settings.tls_ca_file) == ((), None)
    assert sorted(settings.modules) == ["exchange", "node", "queue"]
    assert settings == Settings.read(dict.fromkeys(["RABBIT_URL", "FLUENTD_URL", "CAFILE"], ""))
    assert settings == Settings.read({"RABBIT_CAPABILITIES": "no_sort,bert"})


def test_every_variable_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("  s3cret\r\n")
    settings = Settings.read(
        {
            "RABBIT_URL": "https://[::1]:15671/prefix/",
            "FLUENTD_URL": "http://fluentd:24220/",
            "TLS_TARGETS": "front=front:5000, web-1=[::1]:443",
            "TLS_CA_FILE": "cas",
            "RABBIT_USER": "monitor",
            "RABBIT_PASSWORD_FILE": str(secret),
            "RABBIT_CONNECTION": "loadbalancer",
            "RABBIT_EXPORTERS": "queue, overview,queue,connections",
            "RABBIT_TIMEOUT": "5",
            "MAX_QUEUES": "10",
            "PUBLISH_ADDR": "[::1]",
            "PUBLISH_PORT": "9000",
            "OUTPUT_FORMAT": "JSON",
            "LOG_LEVEL": "WARN",
            "EXCLUDE_METRICS": "messages_ready, message_stats.publish",
            "CAFILE": "ca",
            "CERTFILE": "cert",
            "KEYFILE": "key",
            "SKIPVERIFY": "TRUE",
        }
    )
    assert settings == Settings(
        url="https://[::1]:15671/prefix",
        fluentd_url="http://fluentd:24220",
        tls_targets=(Target("front", "front", 5000), Target("web-1", "::1", 443)),
        tls_ca_file="cas",
        user="monitor",
        password="s3cret",
        loadbalancer=True,
        modules=("queue", "connections"),
        timeout=5,
        max_queues=10,
        address="::1",
        port=9000,
        json_log=True,
        log_level=30,
        exclude=frozenset({"messages_ready", "message_stats.publish"}),
        ca_file="ca",
        cert_file="cert",
        key_file="key",
        verify=False,
    )


FILTERS = [f"{kind}_{what}" for kind in ("INCLUDE", "SKIP") for what in ("QUEUES", "EXCHANGES")]
BAD = [
    *[("RABBIT_URL", url) for url in ["broker:15672", "ftp://broker", "http://", "http://b:0"]],
    *[("RABBIT_URL", url) for url in ["http://b:99999", "http://a b", "http://b/?x=1"]],
    *[("FLUENTD_URL", url) for url in ["fluentd:24220", "https://f", "http://", "http://f:0"]],
    *[("FLUENTD_URL", url) for url in ["http://f:99999", "http://a b", "http://f/?x=1"]],
    *[("TLS_TARGETS", f"a=a:1,{bad}") for bad in ["b", "b:1", "b=b", "=b:1", "b=:1", "b=b:0"]],
    *[("TLS_TARGETS", f"a=a:1,{bad}") for bad in ["b=b:65536", "b=b:x", "b=b:1:1", "a=b:1"]],
    ("RABBIT_USER", "a:b"),
    ("RABBIT_USER_FILE", "/nowhere"),
    ("RABBIT_PASSWORD_FILE", "/nowhere"),
    ("RABBIT_CONNECTION", "indirect"),
    *[("RABBIT_EXPORTERS", name) for name in ["shovel", "federation", "memory", "aliveness"]],
    ("RABBIT_EXPORTERS", "queue,queues"),
    *[("RABBIT_TIMEOUT", value) for value in ["0", "-1", "soon", "3601"]],
    *[("MAX_QUEUES", value) for value in ["-1", "many"]],
    *[("PUBLISH_PORT", value) for value in ["0", "65536", "http"]],
    ("OUTPUT_FORMAT", "xml"),
    ("LOG_LEVEL", "loud"),
    ("SKIPVERIFY", "maybe"),
    ("CERTFILE", "x"),
    ("KEYFILE", "x"),
    *[(name, "(") for name in [*FILTERS, "INCLUDE_VHOST", "SKIP_VHOST"]],
    ("INCLUDE_QUEUES", "[[:alpha:]]"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_stops_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Settings.read({name: value})
    last = value.split(",")[-1]
    assert (
        name.endswith("_URL") or last in str(caught.value) or "need each other" in str(caught.value)
    )


@pytest.mark.parametrize("files", [{"CAFILE": "{}"}, {"CERTFILE": "{}", "KEYFILE": "{}"}])
def test_a_bad_file_for_tls_stops_the_start_by_name(tmp_path: Path, files: dict[str, str]) -> None:
    bad = tmp_path / "pem"
    bad.write_text("nonsense")
    for path in [str(bad), "/nowhere"]:
        with pytest.raises(ConfigError, match=next(iter(files))):
            Settings.read(dict.fromkeys(files, path)).tls()


def test_no_error_and_no_repr_shows_a_secret(tmp_path: Path) -> None:
    assert "s3cret" not in repr(Settings.read({"RABBIT_PASSWORD": "s3cret"}))
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    for bad in [
        {"RABBIT_URL": "http://guest:s3cret@broker"},
        {"RABBIT_URL": "guest:s3cret@broker"},
        {"RABBIT_URL": "http://guest:s3cret"},
        {"FLUENTD_URL": "http://guest:s3cret@fluentd:24220"},
        {"RABBIT_PASSWORD": "s3cret", "RABBIT_PASSWORD_FILE": str(empty)},
        {"RABBIT_PASSWORD_FILE": str(empty)},
    ]:
        with pytest.raises(ConfigError, match=next(iter(bad))) as caught:
            Settings.read(bad)
        assert "s3cret" not in str(caught.value)


def test_a_login_in_the_url_is_refused_with_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"^RABBIT_URL .*RABBIT_USER, RABBIT_PASSWORD$"):
        Settings.read({"RABBIT_URL": "http://guest:s3cret@broker:15672"})


def check(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{APP.parent / 'common'}:{APP}", "PATH": os.environ["PATH"]}
    # -S: without what is installed.
    command = [sys.executable, "-S", "-m", "exporter.settings"]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=False
    )


def test_the_check_needs_nothing_installed_and_no_file() -> None:
    done = check(RABBIT_PASSWORD_FILE="/run/secrets/x", RABBIT_USER_FILE="/x", CAFILE="/ca.pem")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_check_tells_of_a_bad_value_in_one_line() -> None:
    for variables, said in [
        ({"INCLUDE_QUEUES": "("}, "INCLUDE_QUEUES is no regular expression: "),
        ({"FLUENTD_URL": "fluentd"}, "FLUENTD_URL must be http://HOST:PORT"),
    ]:
        done = check(**variables)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"exporter: {said}")
        assert done.stderr.count("\n") == 1
