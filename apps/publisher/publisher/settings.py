"""What the publisher is told by its environment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.environment import Environment
from door.memory import MIB
from door.settings import (
    BrokerSettings,
    EventSettings,
    HttpSettings,
    read_memory,
    read_queues_file,
)


@dataclass(frozen=True)
class Settings:
    """Where messages go, how large they may be and how long a confirm may take."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    events: EventSettings = field(default_factory=EventSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    exchange: str = "takeaway-in"
    # The default queue.
    queue: str = "takeaway"
    # Names all queues, topics and clients; None: there is the default queue alone, for everybody.
    queues_file: Path | None = None
    port: int = 5000
    # Processes, each with a connection to the broker.
    workers: int = 2
    # Bytes of memory that all of them have.
    memory: int = 512 * MIB
    # Bytes of a message (as UTF-8 where it is text); RabbitMQ itself takes no more than 16 MiB.
    max_message_bytes: int = MIB
    # Bytes of a whole batch.
    max_batch_bytes: int = 16 * MIB
    # Seconds to wait for the broker's confirm; under 5, the time in which a POST must be answered.
    confirm_timeout: float = 4

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read the environment; ConfigError by name.

        RABBITMQ_*, FLUENTD_*, HOST_NAMES, TRUST_FORWARDED, QUEUES_FILE, PORT, WORKERS,
        MEMORY_LIMIT, MAX_MESSAGE_BYTES, MAX_BATCH_BYTES and CONFIRM_TIMEOUT.
        """
        return cls(
            broker=BrokerSettings.read(env),
            events=EventSettings.read(env),
            http=HttpSettings.read(env),
            exchange=env.text("RABBITMQ_EXCHANGE", cls.exchange),
            queue=env.text("RABBITMQ_QUEUE", cls.queue),
            queues_file=read_queues_file(env),
            port=env.number("PORT", cls.port, 1, 65535),
            workers=env.number("WORKERS", cls.workers, 1, 99),
            memory=read_memory(env),
            max_message_bytes=env.number("MAX_MESSAGE_BYTES", cls.max_message_bytes, 1, 16 * MIB),
            max_batch_bytes=env.number("MAX_BATCH_BYTES", cls.max_batch_bytes, 1, 64 * MIB),
            confirm_timeout=env.number("CONFIRM_TIMEOUT", int(cls.confirm_timeout), 1, 4),
        )
