"""Filters that the role backup computes with."""

from collections.abc import Iterable, Mapping
from typing import Any

# What the engine tells of a container: GET /containers/json.
Container = Mapping[str, Any]


def backup_running(services: Iterable[str], containers: Mapping[str, Container]) -> list[str]:
    """Return the services whose container runs."""
    return [name for name in services if containers.get(name, {}).get("State") == "running"]


def backup_volumes(services: Iterable[str], containers: Mapping[str, Container]) -> dict[str, str]:
    """Return the path on the host of each service's volume."""
    return {
        name: mount["Source"]
        for name in services
        for mount in containers.get(name, {}).get("Mounts", [])
        if mount["Type"] == "volume" and f"/{mount['Name']}" in containers[name]["Names"]
    }


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "backup_running": backup_running,
            "backup_volumes": backup_volumes,
        }
