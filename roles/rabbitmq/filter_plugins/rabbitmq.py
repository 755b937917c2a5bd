"""Jinja filters of the role rabbitmq."""

import base64
import hashlib
from collections.abc import Callable


def rabbitmq_password_hash(password: str, user: str) -> str:
    """Return password as RabbitMQ's rabbit_password_hashing_sha256.

    That is base64(salt + sha256(salt + password)). The 4-byte salt comes from user and password, so
    that the same pair gives the same text at every run.
    Source: https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = hashlib.sha256(f"{user}\0{password}".encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filters by name."""
        return {"rabbitmq_password_hash": rabbitmq_password_hash}
