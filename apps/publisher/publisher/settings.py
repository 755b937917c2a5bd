"""What the publisher is told by its environment."""

from dataclasses import dataclass, field
from typing import Self

from door.environment import Environment
from door.settings import BrokerSettings, EventSettings


@dataclass(frozen=True)
class Settings:
    """Where messages go, how large they may be and how long a confirm may take."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    events: EventSettings = field(default_factory=EventSettings)
    exchange: str = "takeaway-in"
    routing_key: str = "takeaway"
    # Bytes of a message in UTF-8; RabbitMQ itself takes no more than 16 MiB.
    max_message_bytes: int = 1024 * 1024
    # Seconds to wait for the broker's confirm; under 5, the time in which a POST must be answered.
    confirm_timeout: float = 4

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read RABBITMQ_*, FLUENTD_*, MAX_MESSAGE_BYTES, CONFIRM_TIMEOUT; ConfigError by name."""
        return cls(
            broker=BrokerSettings.read(env),
            events=EventSettings.read(env),
            exchange=env.text("RABBITMQ_EXCHANGE", cls.exchange),
            routing_key=env.text("RABBITMQ_ROUTING_KEY", cls.routing_key),
            max_message_bytes=env.number(
                "MAX_MESSAGE_BYTES", cls.max_message_bytes, 1, 16 * 1024 * 1024
            ),
            confirm_timeout=env.number("CONFIRM_TIMEOUT", int(cls.confirm_timeout), 1, 4),
        )
