"""The environment, read once and typed; a bad value stops the start by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pika


class ConfigError(ValueError):
    """A variable of the environment is missing or has a value that cannot be used."""


class Environment:
    """Typed access to environment variables; every error names the variable and its value."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        """Read from variables, by default the process's environment."""
        self._variables = os.environ if variables is None else variables

    def text(self, name: str, default: str | None = None) -> str:
        """Return the text of name; ConfigError when it is empty or there is no default."""
        value = self._variables.get(name, default)
        if not value:
            raise ConfigError(f"{name} must be set")
        return value

    def optional(self, name: str) -> str | None:
        """Return the text of name, None when it is not set; ConfigError when it is empty."""
        return self.text(name) if name in self._variables else None

    def number(self, name: str, default: int, minimum: int, maximum: int) -> int:
        """Return the whole number in name, from minimum to maximum; ConfigError otherwise."""
        raw = self._variables.get(name, str(default))
        try:
            value = int(raw)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {raw!r}") from None
        if not minimum <= value <= maximum:
            raise ConfigError(f"{name} must be from {minimum} to {maximum}, got {value}")
        return value

    def secret(self, name: str) -> str:
        """Return the secret in the file that {name}_FILE names, else in name.

        One newline at the file's end is dropped. ConfigError when both are set or neither is,
        or when the file cannot be read; the secret itself is in no error.
        """
        path = self._variables.get(f"{name}_FILE")
        if path and self._variables.get(name):
            raise ConfigError(f"{name} and {name}_FILE exclude each other; set one of them")
        if not path:
            return self.text(name)
        try:
            secret = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}_FILE={path} cannot be read: {error}") from None
        if not secret:
            raise ConfigError(f"{name}_FILE={path} is empty")
        return secret


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

    def parameters(self, name: str) -> pika.ConnectionParameters:
        """Return pika's parameters for one attempt to connect, shown to operators as name."""
        return pika.ConnectionParameters(
            host=self.host,
            port=self.port,
            credentials=pika.PlainCredentials(self.user, self.password),
            heartbeat=self.heartbeat,
            connection_attempts=1,
            socket_timeout=3,
            stack_timeout=4,
            client_properties={"connection_name": name},
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
