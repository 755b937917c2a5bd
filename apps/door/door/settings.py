"""What every door is told by its environment: the broker, the collector and the lists."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.environment import Environment

from door import topology
from door.memory import MIB


@dataclass(frozen=True)
class BrokerSettings:
    """Where the broker is and who logs in."""

    host: str = "localhost"
    port: int = 5672
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    # Seconds between heartbeats; a silent broker is given up after twice that.
    heartbeat: int = 10

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read RABBITMQ_HOST, _PORT, _USER, _PASSWORD or _PASSWORD_FILE, and _HEARTBEAT."""
        return cls(
            host=env.text("RABBITMQ_HOST", cls.host),
            port=env.number("RABBITMQ_PORT", cls.port, 1, 65535),
            user=env.text("RABBITMQ_USER"),
            password=env.secret("RABBITMQ_PASSWORD"),
            heartbeat=env.number("RABBITMQ_HEARTBEAT", cls.heartbeat, 1, 600),
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
