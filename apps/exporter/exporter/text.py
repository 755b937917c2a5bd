"""Prometheus' text format 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/.

prometheus_client writes a thing's labels anew for each of its numbers, which is most of the work
for a thousand queues.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter"]
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@dataclass(frozen=True)
class Family:
    """A metric with its samples: labels as label_text gives them, and the number."""

    name: str
    help: str
    samples: list[tuple[str, float]]
    type: Kind = "gauge"


def label_text(labels: Mapping[str, str]) -> str:
    """Return labels as they stand between a sample's name and its number."""
    if not labels:
        return ""
    pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()]
    return "{" + ",".join(pairs) + "}"


def written(families: Iterable[Family]) -> bytes:
    """Return the families that have samples; their help is one line without a backslash."""
    lines: list[str] = []
    for family in families:
        name = family.name
        if family.samples:
            lines += f"# HELP {name} {family.help}\n", f"# TYPE {name} {family.type}\n"
            lines += [f"{name}{labels} {float(n)}\n" for labels, n in family.samples]
    return "".join(lines).encode()
