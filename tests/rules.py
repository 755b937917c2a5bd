"""Reads Prometheus' rules."""

import re

WORDS = {"and", "or", "unless", "offset", "count", "max", "min", "sum"}


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics that an expression of a rule reads."""
    if name := re.search(r'__name__=~"\((\w+)\|(\w+)\)(\w+)"', expression):
        return {name[1] + name[3], name[2] + name[3]}
    bare = re.sub(r"\{.*?\}|\[.*?\]|\b(by|without|on) \(.*?\)", "", expression)
    return set(re.findall(r"(?<!\w)[a-z]\w*\b(?!\()", bare)) - WORDS
