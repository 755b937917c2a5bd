"""Filters that several roles compute with."""

from collections.abc import Sequence
from typing import Any


def stack_url(address: str, port: object, tls: bool, names: Sequence[str] = ()) -> str:
    """Return the URL by which users reach port, published on address of their host.

    With TLS that is the first one of names, the certificates' names that the user gave.
    """
    host = "localhost" if address in ("127.0.0.1", "0.0.0.0") else address
    if tls and names:
        host = names[0]
    return f"{'https' if tls else 'http'}://{host}:{port}"


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"stack_url": stack_url}
