"""What the subscriber is told by its environment."""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.environment import ConfigError, Environment
from door.memory import MIB
from door.settings import (
    BrokerSettings,
    EventSettings,
    HttpSettings,
    read_memory,
    read_queues_file,
)

# A host's name in the inventory, as receipts begin with it.
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.I | re.A)
DOOR = re.compile(r"https://([\w.-]+|\[[0-9a-f:.]+\])(:(?P<port>\d{1,5}))?/?", re.I | re.A)
URL = re.compile(r"http://([\w.-]+|\[[0-9a-f:.]+\])(:(?P<port>\d{1,5}))?/?", re.I | re.A)
PORTS = range(1, 65536)


@dataclass(frozen=True)
class ClusterSettings:
    """Which other doors there are; a single host has none."""

    # With which this door's receipts begin; empty: with nothing.
    name: str = ""
    # Where the doors of other hosts are, by their names.
    doors: Mapping[str, str] = field(default_factory=dict)
    # The CAs by which they are known.
    ca_file: Path = Path()

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read HOST_NAME, OTHER_DOORS (`h2=https://h2:5001,…`), CA_FILE; ConfigError by name."""
        name = env.optional("HOST_NAME") or ""
        if name and not NAME.fullmatch(name):
            raise ConfigError(f"HOST_NAME must be letters, digits and dashes, got {name!r}")
        told = env.optional("OTHER_DOORS")
        if told is None:
            return cls(name)
        if not name:
            raise ConfigError("HOST_NAME must be set, as OTHER_DOORS is")
        doors: dict[str, str] = {}
        for one in told.split(","):
            other, _, url = one.strip().partition("=")
            found = DOOR.fullmatch(url)
            if not NAME.fullmatch(other) or not found or int(found["port"] or 443) not in PORTS:
                raise ConfigError(f"OTHER_DOORS must be NAME=https://HOST:PORT,…, got {one!r}")
            if other == name or other in doors:
                raise ConfigError(f"OTHER_DOORS must have other doors, once each, got {one!r}")
            doors[other] = url
        return cls(name, doors, read_ca_file(env))


@dataclass(frozen=True)
class Settings:
    """Which queue is handed out, and for how long."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    events: EventSettings = field(default_factory=EventSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    # Exchange for redriven messages; the routing key is the name of the queue.
    exchange: str = "takeaway-in"
    # The default queue.
    queue: str = "takeaway"
    # Names all queues and clients; None: there is the default queue alone, for everybody.
    queues_file: Path | None = None
    # Where RabbitMQ's management API is: http://HOST:PORT. None: nobody asks it.
    management_url: str | None = None
    port: int = 5001
    # Seconds a request waits for the broker's answer.
    receive_timeout: float = 4
    # Seconds a message is leased by ?ack=manual; the broker takes it back after half an hour.
    lease_seconds: int = 60
    # Bytes of a response with many messages; a single larger message comes alone.
    max_batch_bytes: int = 16 * MIB
    # Bytes of the container.
    memory_limit: int = 512 * MIB

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read the environment; ConfigError by name.

        RABBITMQ_* (with RABBITMQ_MANAGEMENT_URL), FLUENTD_*, HOST_NAMES, TRUST_FORWARDED,
        HOST_NAME, OTHER_DOORS, CA_FILE, QUEUES_FILE, PORT, RECEIVE_TIMEOUT, LEASE_SECONDS,
        MAX_BATCH_BYTES, MEMORY_LIMIT.
        """
        return cls(
            broker=BrokerSettings.read(env),
            events=EventSettings.read(env),
            http=HttpSettings.read(env),
            cluster=ClusterSettings.read(env),
            exchange=env.text("RABBITMQ_EXCHANGE", cls.exchange),
            queue=env.text("RABBITMQ_QUEUE", cls.queue),
            queues_file=read_queues_file(env),
            management_url=read_management_url(env),
            port=env.number("PORT", cls.port, 1, 65535),
            receive_timeout=env.number("RECEIVE_TIMEOUT", int(cls.receive_timeout), 1, 4),
            lease_seconds=env.number("LEASE_SECONDS", cls.lease_seconds, 1, 1499),
            max_batch_bytes=env.number("MAX_BATCH_BYTES", cls.max_batch_bytes, 1, 64 * MIB),
            memory_limit=read_memory(env),
        )


def read_ca_file(env: Environment) -> Path:
    """Read CA_FILE, the path of PEM certificates that can be used; ConfigError by name."""
    path = env.text("CA_FILE")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ConfigError(f"CA_FILE={path} cannot be used: {error}") from None
    return Path(path)


def read_management_url(env: Environment) -> str | None:
    """Read RABBITMQ_MANAGEMENT_URL, if it is set; ConfigError by name."""
    url = env.optional("RABBITMQ_MANAGEMENT_URL")
    if url is None:
        return None
    found = URL.fullmatch(url)
    if not found or int(found["port"] or 80) not in PORTS:
        raise ConfigError(f"RABBITMQ_MANAGEMENT_URL must be http://HOST:PORT, got {url!r}")
    return url
