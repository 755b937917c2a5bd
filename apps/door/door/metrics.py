"""A door's metrics, summed over all workers of its container."""

import os
import time
from functools import cache

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from door.shared import DIRECTORY

REQUESTS = Counter("http_requests", "HTTP requests answered", ["route", "status"])
DURATION = Histogram(
    "http_request_duration_seconds",
    "Time from a request's arrival to its answer, without what it asked to wait",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CLIENT_REQUESTS = Counter(
    "client_requests", "HTTP requests of a client of the list", ["client", "status"]
)
BROKER_UP = Gauge(
    "broker_up",
    "1 while every worker of this door holds an open connection to the broker",
    multiprocess_mode="livemin",
)
# Of several workers the newest's: one that is replaced over and over is seen, too. Of a single
# process prometheus_client itself tells it.
if DIRECTORY in os.environ:
    START = Gauge(
        "process_start_time_seconds",
        "When the newest worker of this door was started, in seconds since 1970",
        multiprocess_mode="livemax",
        registry=None,
    )
    START.set(time.time())
CONTENT_TYPE = CONTENT_TYPE_LATEST


@cache
def broker_own() -> Gauge:
    """Return the gauge of a door that knows several brokers; without them there is none."""
    return Gauge(
        "broker_own",
        "1 while every worker of this door uses, or used last, the broker of its own host",
        multiprocess_mode="livemin",
    )


def count(route: str, status: int, seconds: float, client: str = "") -> None:
    """Count a request of route, by client, whose answer begins now, after seconds."""
    counters, duration = _children(route, status, client)
    for counter in counters:
        counter.inc()
    duration.observe(seconds)


@cache  # of few routes, statuses and clients: to look them up takes as long as to count
def _children(route: str, status: int, client: str) -> tuple[list[Counter], Histogram]:
    counters = [REQUESTS.labels(route, status)]
    if client:
        counters.append(CLIENT_REQUESTS.labels(client, status))
    return counters, DURATION.labels(route)


def text() -> bytes:
    """Return the metrics in Prometheus' text format."""
    registry = REGISTRY
    if DIRECTORY in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
