"""Filters that the role tls computes with; what they do is in plugin_utils/tls.py."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

HOME = "ansible_collections.message_broker.stack.plugins.plugin_utils.tls"
NAMES = (
    "tls_addresses",
    "tls_bad_names",
    "tls_ca_faults",
    "tls_due",
    "tls_given",
    "tls_given_faults",
    "tls_given_name",
    "tls_held",
    "tls_leads",
    "tls_own",
    "tls_shown",
    "tls_texts",
    "tls_until",
)


def _late(name: str) -> Callable[..., Any]:
    """Return the filter of this name, whose module is imported when it is used.

    Each task reads every file of filters anew, and cryptography takes 30 ms.
    """

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(HOME), name)(*args, **options)

    return call


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {name: _late(name) for name in NAMES}
