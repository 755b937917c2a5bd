"""Filters that the role monitoring computes with."""

from collections.abc import Mapping
from typing import Any


def monitoring_scrapes(containers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return Prometheus' scrape_configs for the containers of the catalogue.

    Source: https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config
    """
    return [
        {
            "job_name": scrape.get("job", name),
            **({"metrics_path": scrape["path"]} if "path" in scrape else {}),
            **({"params": scrape["params"]} if "params" in scrape else {}),
            "static_configs": [{"targets": [f"{name}:{scrape['port']}"]}],
        }
        for name, container in containers.items()
        for scrape in container.get("scrapes", [])
    ]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"monitoring_scrapes": monitoring_scrapes}
