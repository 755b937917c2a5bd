"""What every door is told by its environment: the brokers, the collector and the lists."""

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.environment import ConfigError, Environment

from door import topology
from door.memory import MIB

ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-f:.]+\]):(?P<port>\d{1,5})", re.I | re.A)


@dataclass(frozen=True)
class BrokerSettings:
    """Where the brokers are and who logs in."""

    host: str = "localhost"
    port: int = 5672
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    # Seconds between heartbeats; a silent broker is given up after twice that.
    heartbeat: int = 10
    # Host and port of other hosts' brokers, by TLS, in the order in which they are tried.
    others: tuple[tuple[str, int], ...] = ()
    # Path of the certificates, as PEM, by which they must prove their names.
    ca_file: str | None = None

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Return host and port of every broker, the own host's first."""
        return (self.host, self.port), *self.others

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read the environment; ConfigError by name.

        RABBITMQ_HOST, _PORT, _USER, _PASSWORD or _PASSWORD_FILE, _HEARTBEAT and _OTHERS, and with
        those CA_FILE.
        """
        others = read_others(env)
        return cls(
            host=env.text("RABBITMQ_HOST", cls.host),
            port=env.number("RABBITMQ_PORT", cls.port, 1, 65535),
            user=env.text("RABBITMQ_USER"),
            password=env.secret("RABBITMQ_PASSWORD"),
            # Where there is another broker, it is worth knowing sooner that one is silent.
            heartbeat=env.number("RABBITMQ_HEARTBEAT", 5 if others else cls.heartbeat, 1, 600),
            others=others,
            ca_file=read_ca_file(env) if others else None,
        )


@dataclass(frozen=True)
class EventSettings:
    """Where the events of requests go."""

    # None: nowhere, for development.
    host: str | None = None
    port: int = 24224

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read FLUENTD_HOST and FLUENTD_PORT; ConfigError by name."""
        return cls(
            host=env.optional("FLUENTD_HOST"),
            port=env.number("FLUENTD_PORT", cls.port, 1, 65535),
        )


@dataclass(frozen=True)
class HttpSettings:
    """How clients come to the door."""

    # The door's own names, as headers Host have them; none: whatever they say.
    names: frozenset[str] = frozenset()
    # Whether all come by a proxy that tells in X-Forwarded-For who they are.
    fronted: bool = False

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read HOST_NAMES, separated by commas, and TRUST_FORWARDED; ConfigError by name."""
        names = [name.strip() for name in (env.optional("HOST_NAMES") or "").split(",")]
        return cls(
            # An address of IPv6 stands in brackets there.
            names=frozenset(f"[{n}]" if ":" in n and n[0] != "[" else n for n in names if n),
            fronted=env.flag("TRUST_FORWARDED"),
        )


def read_others(env: Environment) -> tuple[tuple[str, int], ...]:
    """Read RABBITMQ_OTHERS, HOST:PORT separated by commas, if it is set; ConfigError by name."""
    raw = env.optional("RABBITMQ_OTHERS")
    if raw is None:
        return ()
    found = [ADDRESS.fullmatch(one) for one in raw.split(",")]
    others = [(one["host"].strip("[]"), int(one["port"])) for one in found if one]
    if len(others) < len(found) or not all(1 <= port <= 65535 for _, port in others):
        wanted = "HOST:PORT, separated by commas"
        raise ConfigError(f"RABBITMQ_OTHERS must be {wanted}, got {raw!r}")
    if len(set(others)) < len(others):
        raise ConfigError(f"RABBITMQ_OTHERS names a broker twice: {raw!r}")
    return tuple(others)


def read_ca_file(env: Environment) -> str:
    """Read CA_FILE, the path of a file that has certificates; ConfigError by name."""
    path = env.text("CA_FILE")
    try:
        context = ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigError(f"CA_FILE={path} has no certificates: {error}") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise ConfigError(f"CA_FILE={path} has no certificate of a CA")
    return path


def read_memory(env: Environment) -> int:
    """Read MEMORY_LIMIT, the bytes of the container; ConfigError by name."""
    return env.number("MEMORY_LIMIT", 512 * MIB, 128 * MIB, 1024 * 1024 * MIB)


def read_queues_file(env: Environment) -> Path | None:
    """Read QUEUES_FILE, the path of a file that can be read, if it is set; ConfigError by name."""
    path = env.optional("QUEUES_FILE")
    if path is None:
        return None
    topology.read(Path(path))
    return Path(path)
