"""Filters that the role apps computes with."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


def apps_queues(queues: Iterable[Mapping[str, Any]], topics: Iterable[Mapping[str, Any]]) -> str:
    """Return the JSON by which the doors know the names of queues and topics."""
    lists = {"queues": queues, "topics": topics}
    return json.dumps({kind: sorted(str(one["name"]) for one in lists[kind]) for kind in lists})


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"apps_queues": apps_queues}
