"""What the subscriber is told by its environment."""

import re
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

URL = re.compile(r"http://([\w.-]+|\[[0-9a-f:.]+\])(:(?P<port>\d{1,5}))?/?", re.I | re.A)


@dataclass(frozen=True)
class Settings:
    """Which queue is handed out, and for how long."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    events: EventSettings = field(default_factory=EventSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
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
        QUEUES_FILE, PORT, RECEIVE_TIMEOUT, LEASE_SECONDS, MAX_BATCH_BYTES, MEMORY_LIMIT.
        """
        return cls(
            broker=BrokerSettings.read(env),
            events=EventSettings.read(env),
            http=HttpSettings.read(env),
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


def read_management_url(env: Environment) -> str | None:
    """Read RABBITMQ_MANAGEMENT_URL, if it is set; ConfigError by name."""
    url = env.optional("RABBITMQ_MANAGEMENT_URL")
    if url is None:
        return None
    found = URL.fullmatch(url)
    if not found or not 1 <= int(found["port"] or 80) <= 65535:
        raise ConfigError(f"RABBITMQ_MANAGEMENT_URL must be http://HOST:PORT, got {url!r}")
    return url
