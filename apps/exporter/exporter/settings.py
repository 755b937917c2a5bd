"""What the exporter is told by its environment, under the names of kbudde/rabbitmq_exporter.

FLUENTD_URL, TLS_TARGETS and TLS_CA_FILE are not among those: they are this exporter's own.

`python3 -m exporter.settings` checks it with nothing installed, and without the files that it
names: they need not be on the machine that checks.
"""

import logging
import os
import re
import ssl
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from common.environment import ConfigError, Environment

MODULES = ("connections", "exchange", "node", "overview", "queue")
# The levels of the original's logger.
LOG_LEVELS = {
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
_HOST = r"([\w.-]+|\[[0-9a-f:.]+\])"
_URL = re.compile(rf"https?://{_HOST}(:(?P<port>\d+))?(/[^\s?#@]*)?", re.I)
_TARGET = re.compile(rf"(?P<name>[\w.-]+)=(?P<host>{_HOST}):(?P<port>\d+)", re.I)


@dataclass(frozen=True)
class Filter:
    """Which names are taken: patterns may match anywhere in a name, as Go's MatchString."""

    include: re.Pattern[str] = re.compile("")
    # Matches only the empty name.
    skip: re.Pattern[str] = re.compile(r"\A\Z")

    @classmethod
    def read(cls, env: Environment, what: str) -> Self:
        """Read INCLUDE_{what} and SKIP_{what}; ConfigError by name."""
        return cls(
            _pattern(env, f"INCLUDE_{what}", cls.include), _pattern(env, f"SKIP_{what}", cls.skip)
        )

    def takes(self, name: str) -> bool:
        """Return whether name is included and not skipped."""
        return bool(self.include.search(name)) and not self.skip.search(name)


class Target(NamedTuple):
    """A port whose certificate is watched."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Settings:
    """Where the broker's API is, what is taken from it and where that is published."""

    url: str = "http://127.0.0.1:15672"
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    # The broker is reached through a load balancer, so `self` would say nothing of a node.
    loadbalancer: bool = False
    # Of Fluentd's monitor_agent; None: it is not asked.
    fluentd_url: str | None = None
    tls_targets: tuple[Target, ...] = ()
    # The CAs that their clients trust; None: those of the system.
    tls_ca_file: str | None = None
    # Besides the overview, which is always asked.
    modules: tuple[str, ...] = ("exchange", "node", "queue")
    # Seconds that a whole scrape waits for the broker, Fluentd and certificates.
    timeout: int = 30
    # With more queues than this no queue is told; 0: no limit.
    max_queues: int = 0
    # Empty: every address.
    address: str = ""
    port: int = 9419
    json_log: bool = False
    log_level: int = logging.INFO
    queues: Filter = field(default_factory=Filter)
    exchanges: Filter = field(default_factory=Filter)
    vhosts: Filter = field(default_factory=Filter)
    # Fields of the API whose families are left out.
    exclude: frozenset[str] = frozenset()
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True

    @classmethod
    def read(cls, variables: Mapping[str, str], *, with_files: bool = True) -> Self:
        """Read RABBIT_*, FLUENTD_URL, TLS_*, PUBLISH_* and the rest; ConfigError by name.

        An empty value counts as none. Without with_files no login is read from a file: it is
        empty then.
        """
        env = Environment({name: value for name, value in variables.items() if value})
        cert_file, key_file = env.optional("CERTFILE"), env.optional("KEYFILE")
        if (cert_file is None) != (key_file is None):
            raise ConfigError("CERTFILE and KEYFILE need each other; set both or neither")
        user = _login(env, "RABBIT_USER", cls.user, with_files)
        if ":" in user:
            raise ConfigError(f"RABBIT_USER must have no colon, got {user!r}")
        connection = _choice(env, "RABBIT_CONNECTION", "direct", "loadbalancer")
        return cls(
            url=_url(env, cls.url),
            user=user,
            password=_login(env, "RABBIT_PASSWORD", "guest", with_files),
            fluentd_url=_fluentd_url(env),
            tls_targets=_targets(env),
            tls_ca_file=env.optional("TLS_CA_FILE"),
            loadbalancer=connection == "loadbalancer",
            modules=_modules(env, cls.modules),
            timeout=env.number("RABBIT_TIMEOUT", cls.timeout, 1, 3600),
            max_queues=env.number("MAX_QUEUES", cls.max_queues, 0, 10**9),
            address=(env.optional("PUBLISH_ADDR") or "").strip("[]"),
            port=env.number("PUBLISH_PORT", cls.port, 1, 65535),
            json_log=_choice(env, "OUTPUT_FORMAT", "tty", "json") == "json",
            log_level=LOG_LEVELS[_choice(env, "LOG_LEVEL", "info", *LOG_LEVELS)],
            queues=Filter.read(env, "QUEUES"),
            exchanges=Filter.read(env, "EXCHANGES"),
            vhosts=Filter.read(env, "VHOST"),
            exclude=frozenset(_items(env, "EXCLUDE_METRICS")),
            ca_file=env.optional("CAFILE"),
            cert_file=cert_file,
            key_file=key_file,
            verify=_choice(env, "SKIPVERIFY", "false", "0", "true", "1") in ("false", "0"),
        )

    def tls(self) -> ssl.SSLContext:
        """Return how to trust a broker at https://; ConfigError when a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ConfigError(f"CAFILE={self.ca_file} cannot be used: {error}") from None
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file:
            try:
                # A key with a pass phrase would ask the terminal for it.
                context.load_cert_chain(self.cert_file, self.key_file, password="")
            except OSError as error:
                files = f"CERTFILE={self.cert_file} with KEYFILE={self.key_file}"
                raise ConfigError(f"{files} cannot be used: {error}") from None
        return context


def _url(env: Environment, default: str) -> str:
    """Return RABBIT_URL without a slash at its end; no error has it, as it may hold a password."""
    url = env.text("RABBIT_URL", default)
    if "@" in url:
        raise ConfigError("RABBIT_URL must have no login in it; set RABBIT_USER, RABBIT_PASSWORD")
    if not _is_url(url):
        raise ConfigError("RABBIT_URL must be http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/")


def _fluentd_url(env: Environment) -> str | None:
    """Return FLUENTD_URL without a slash at its end; no error has it, as it may hold a password."""
    url = env.optional("FLUENTD_URL")
    if url is None:
        return None
    if not url.lower().startswith("http:") or not _is_url(url):
        raise ConfigError("FLUENTD_URL must be http://HOST:PORT, of Fluentd's monitor_agent")
    return url.rstrip("/")


def _is_url(url: str) -> bool:
    match = _URL.fullmatch(url)
    return bool(match and 1 <= int(match["port"] or 80) <= 65535)


def _targets(env: Environment) -> tuple[Target, ...]:
    """Return the targets in TLS_TARGETS, each written NAME=HOST:PORT and named once."""
    targets: dict[str, Target] = {}
    for text in _items(env, "TLS_TARGETS"):
        match = _TARGET.fullmatch(text)
        if not match or match["name"] in targets or not 1 <= int(match["port"]) <= 65535:
            raise ConfigError(f"TLS_TARGETS must be of NAME=HOST:PORT, each once, got {text!r}")
        name, host = match["name"], match["host"].strip("[]")
        targets[name] = Target(name, host, int(match["port"]))
    return tuple(targets.values())


def _login(env: Environment, name: str, default: str, with_files: bool) -> str:
    """Return name or the text in the file {name}_FILE, there without the white space around it."""
    path = env.optional(f"{name}_FILE")
    if path is None:
        return env.text(name, default)
    if not with_files and env.optional(name) is None:
        return ""
    login = env.secret(name).strip()
    if not login:
        raise ConfigError(f"{name}_FILE={path} is empty")
    return login


def _choice(env: Environment, name: str, default: str, *others: str) -> str:
    """Return name's value in lower case, which is the default or one of the others."""
    value = env.text(name, default)
    choices = dict.fromkeys((default, *others))
    if value.lower() not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value.lower()


def _items(env: Environment, name: str) -> list[str]:
    """Return the words between name's commas."""
    return [word.strip() for word in (env.optional(name) or "").split(",") if word.strip()]


def _modules(env: Environment, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modules of RABBIT_EXPORTERS, each once and without the overview."""
    names = _items(env, "RABBIT_EXPORTERS") if env.optional("RABBIT_EXPORTERS") else default
    for name in names:
        if name not in MODULES:
            raise ConfigError(f"RABBIT_EXPORTERS must be of {', '.join(MODULES)}, got {name!r}")
    return tuple(name for name in dict.fromkeys(names) if name != "overview")


def _pattern(env: Environment, name: str, default: re.Pattern[str]) -> re.Pattern[str]:
    """Return the regular expression in name."""
    raw = env.optional(name)
    if raw is None:
        return default
    try:
        with warnings.catch_warnings():
            # What another engine knows and Python only warns of, such as [[:alpha:]].
            warnings.simplefilter("error")
            return re.compile(raw)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ConfigError(f"{name} is no regular expression: {raw!r}: {error}") from None


if __name__ == "__main__":
    try:
        Settings.read(os.environ, with_files=False)
    except ConfigError as error:
        sys.exit(f"exporter: {error}")
