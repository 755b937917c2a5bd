"""Filters that the role monitoring computes with."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

# Where Alertmanager has its secrets in the container.
SECRETS = "/etc/alertmanager/secrets"
# Source: https://prometheus.io/docs/prometheus/latest/querying/basics/#float-literals-and-time-durations
DURATION = re.compile(
    r"(?=[0-9])(?!0+[a-z])(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?", re.ASCII
)
NUMBER = re.compile(r"[0-9]+([.][0-9]+)?")


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


def monitoring_files(paths: Iterable[str], texts: Iterable[str], folder: str) -> dict[str, str]:
    """Return the texts of paths by the paths that the files get: folder/name."""
    return {
        f"{folder}/{PurePosixPath(path).name}": text
        for path, text in zip(paths, texts, strict=True)
    }


def monitoring_secrets(secrets: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets' texts by their paths in Alertmanager's folder."""
    return {f"secrets/{name}": text for name, text in secrets.items()}


def monitoring_missing_secrets(receivers: object, secrets: Mapping[str, str]) -> list[str]:
    """Return the files that receivers read (`…_file`) and that are none of secrets.

    What the image has below /etc/ssl/ is there.
    """
    read = re.findall(r'"\w+_file": "([^"]*)"', json.dumps(receivers))
    there = {f"{SECRETS}/{name}" for name, text in secrets.items() if text}
    return [path for path in read if not path.startswith("/etc/ssl/") and path not in there]


def monitoring_bad_values(
    given: Mapping[str, object], known: Mapping[str, object], names: Iterable[str] = ()
) -> list[str]:
    """Return what of an alert's given values cannot be used: unknown names, and wrong values.

    Thresholds are for queues of names and for their dead queues.
    """
    forms = dict.fromkeys(("for", "keep", "within"), DURATION)
    forms |= dict.fromkeys(("above", "hours"), NUMBER)
    unknown = [name for name in given if name not in known]
    wrong = [
        str(given[name])
        for name in forms
        if name in given and not forms[name].fullmatch(str(given[name]))
    ]
    queues = given.get("queues", {})
    if not isinstance(queues, Mapping):
        return [*unknown, *wrong, str(queues)]
    there = {f"{name}{end}" for name in names for end in ("", ".dead")}
    unknown += [str(queue) for queue in queues if "queues" in known and queue not in there]
    wrong += [str(above) for above in queues.values() if not NUMBER.fullmatch(str(above))]
    return unknown + wrong


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "monitoring_bad_values": monitoring_bad_values,
            "monitoring_files": monitoring_files,
            "monitoring_missing_secrets": monitoring_missing_secrets,
            "monitoring_scrapes": monitoring_scrapes,
            "monitoring_secrets": monitoring_secrets,
        }
