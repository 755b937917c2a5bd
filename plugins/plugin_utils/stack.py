"""What of an engine belongs to a stack."""

from collections.abc import Mapping
from typing import Any


def is_own(item: Mapping[str, Any], stack: str) -> bool:
    """Return whether a container or volume, as the engine tells it, carries the stack's label."""
    return (item.get("Labels") or {}).get("message-broker-stack") == stack
