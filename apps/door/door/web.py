"""What every HTTP door does besides its own routes: errors, health, metrics and events."""

import json
import os
import time
from pathlib import Path
from typing import Protocol

from flask import Flask, Response, g, request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from werkzeug.exceptions import HTTPException

from door import BrokerUnavailable
from door.events import REQUEST_ID, Event, Sink

# Seconds a client should wait before it asks again while the broker is away.
RETRY_AFTER = 1
# Asked every few seconds, and never by whom an event would interest.
WITHOUT_EVENT = ("/healthz", "/metrics")

REQUESTS = Counter("http_requests", "HTTP requests answered", ["route", "status"])
DURATION = Histogram(
    "http_request_duration_seconds",
    "Time from a request's arrival to its answer",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
BROKER_UP = Gauge(
    "broker_up",
    "1 while every worker of this door holds an open connection to the broker",
    multiprocess_mode="livemin",
)


class Broker(Protocol):
    """What health needs to know of a door's connection to the broker."""

    @property
    def up(self) -> bool:
        """Whether the connection is open and usable now."""


def json_response(status: int, body: object) -> Response:
    """Return body as JSON with status."""
    return Response(json.dumps(body), status, mimetype="application/json")


def equip(app: Flask, broker: Broker, events: Sink | None) -> None:
    """Give app `/healthz` and `/metrics`, count and tell its requests, and make errors JSON.

    An error is `{"message": "<what is wrong>"}`: the caller's fault is 4xx, BrokerUnavailable
    is 503 with `Retry-After`. Each response names its request in `X-Request-Id`; each request
    but those of health and metrics is told to events, unless its event is deferred.
    """

    @app.before_request
    def begin_event() -> None:
        g.event = Event(events, request.headers.get(REQUEST_ID))

    app.after_request(_end)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(BrokerUnavailable, _broker_unavailable)
    app.add_url_rule("/metrics", view_func=metrics)

    @app.get("/healthz")
    def healthz() -> Response:
        up = broker.up
        status = 503 if "ready" in request.args and not up else 200
        return json_response(status, {"broker": "up" if up else "down"})


def metrics() -> Response:
    """Answer Prometheus' text format, summed over all workers of this container."""
    registry = REGISTRY
    if directory := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _forget_dead_workers(Path(directory))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _forget_dead_workers(directory: Path) -> None:
    """Drop the gauges of workers that ended without a word; counters stay in the sums."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]


def current_event() -> Event:
    """Return the event of the request that is being answered."""
    event: Event = g.event
    return event


def _end(response: Response) -> Response:
    event = current_event()
    route = request.url_rule.rule if request.url_rule else "none"
    REQUESTS.labels(route, response.status_code).inc()
    DURATION.labels(route).observe(time.perf_counter() - event.started)
    response.headers[REQUEST_ID] = event.request_id
    if not event.deferred and request.path not in WITHOUT_EVENT:
        if "event" not in event.fields:
            event.fields |= {"event": "request", "method": request.method, "path": request.path}
        event.tell(response.status_code)
    return response


def _http_error(error: HTTPException) -> Response:
    # A route that knows better than the answer what may be told has said so.
    current_event().fields.setdefault("reason", error.description)
    original = error.get_response()  # its headers matter: Allow with a 405
    body = json.dumps({"message": error.description})
    return Response(body, original.status_code, original.headers, content_type="application/json")


def _broker_unavailable(error: BrokerUnavailable) -> Response:
    current_event().fields["reason"] = str(error)
    response = json_response(503, {"message": str(error)})
    response.headers["Retry-After"] = str(RETRY_AFTER)
    return response
