"""The environment, read once and typed; a bad value stops the start by name."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

# Seconds in which Docker's driver takes a few lines.
LAST_WORDS = 0.5


class ConfigError(ValueError):
    """A variable of the environment is missing or has a value that cannot be used."""


def leave(text: str = "") -> NoReturn:
    """End the process: with status 1 when there is a text to say, else with 0.

    What Docker's driver still holds when a container ends is not in the log files, so it gets
    LAST_WORDS seconds.
    """
    if text:
        print(text, file=sys.stderr, flush=True)
    time.sleep(LAST_WORDS)
    sys.exit(1 if text else 0)


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

    def has_secret(self, name: str) -> bool:
        """Return whether the secret name, or a file with it, is set."""
        return name in self._variables or f"{name}_FILE" in self._variables

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

    def flag(self, name: str) -> bool:
        """Return whether name is true; it may be false or not set; ConfigError otherwise."""
        value = self._variables.get(name, "false")
        if value not in ("true", "false"):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
        return value == "true"

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
