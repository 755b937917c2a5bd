"""What every HTTP door does besides its own routes: errors, health, metrics and events."""

import json
import os
import time
from pathlib import Path
from typing import IO, NoReturn, Protocol

from flask import Flask, Response, abort, g, request
from gevent import Timeout, sleep
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
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, RequestTimeout, ServiceUnavailable, Unauthorized

from door import BrokerUnavailable
from door.events import REQUEST_ID, Event, Sink
from door.server import CLIENT_TIMEOUT
from door.settings import Access

# Seconds a client should wait before it asks again while the broker is away.
RETRY_AFTER = 1
# Asked every few seconds, by who needs no credentials, and of no interest as an event.
OPEN = ("/healthz", "/metrics")
# Bytes of all the bodies that one process holds at a time, and from which size one counts.
MAX_BODIES = 32 * 1024 * 1024
LARGE_BODY = 64 * 1024

REQUESTS = Counter("http_requests", "HTTP requests answered", ["route", "status"])
DURATION = Histogram(
    "http_request_duration_seconds",
    "Time from a request's arrival to its answer, without what it asked to wait",
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


class _Bodies:
    """What the bodies take that this process holds, so that many large ones do not end it."""

    held = 0


def equip(app: Flask, broker: Broker, events: Sink | None, access: Access) -> None:
    """Give app `/healthz`, `/metrics` and `/openapi.json`, and what its requests have in common.

    Who has no access gets 401, but for health and metrics. Requests are counted and told. An
    error is `{"message": "<what is wrong>"}`: the caller's fault is 4xx, BrokerUnavailable is
    503 with `Retry-After`. Each response names its request in `X-Request-Id`; each request but
    those of health and metrics is told to events, unless its event is deferred. The description
    is openapi.json in app's package.
    """

    @app.before_request
    def begin() -> None:
        g.event = Event(events, request.headers.get(REQUEST_ID))
        g.held = 0
        if request.path not in OPEN and not access.allows(request.headers.get("Authorization")):
            raise Unauthorized(
                "Credentials are missing or wrong.",
                www_authenticate=[
                    WWWAuthenticate("basic", {"realm": app.name}),
                    WWWAuthenticate("bearer"),
                ],
            )

    @app.teardown_request
    def release(_error: BaseException | None) -> None:
        _Bodies.held -= g.get("held", 0)

    description = (Path(app.root_path) / "openapi.json").read_bytes()

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(description, mimetype="application/json")

    app.after_request(_end)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(BrokerUnavailable, _broker_unavailable)
    app.add_url_rule("/metrics", view_func=metrics)

    @app.get("/healthz")
    def healthz() -> Response:
        up = broker.up
        status = 503 if "ready" in request.args and not up else 200
        response = json_response(status, {"broker": "up" if up else "down"})
        if status == 503:
            response.headers["Retry-After"] = str(RETRY_AFTER)
        return response


def read_body(limit: int) -> bytes:
    """Return the whole body of the request, of at most limit bytes.

    Aborts with 413 when it is larger (unread, where its length is told), with 408 when it takes
    more than CLIENT_TIMEOUT seconds, and with 503 when this process holds too many large ones.
    """
    length = request.content_length
    if length is not None and length > limit:
        _too_large(limit)
    if length is None and "HTTP_TRANSFER_ENCODING" not in request.environ:
        return b""
    expected = limit if length is None else length
    if expected > LARGE_BODY:
        if _Bodies.held + expected > max(MAX_BODIES, limit):
            busy = ServiceUnavailable("Too many large requests at a time.")
            busy.retry_after = RETRY_AFTER
            raise busy
        g.held = expected
        _Bodies.held += expected
    late = RequestTimeout(f"The body took more than {CLIENT_TIMEOUT} s.")
    try:
        with Timeout(CLIENT_TIMEOUT, late):
            source = request.environ["wsgi.input"]
            body: bytes = source.read(length) if length is not None else _chunks(source, limit)
    except TimeoutError:
        raise late from None
    except OSError:  # it ended early, or its chunks cannot be told apart
        abort(400, "The body is not whole.")
    if length is None and len(body) > limit:
        _too_large(limit)
    return body


def _chunks(source: IO[bytes], limit: int) -> bytes:
    """Read a body of unknown length, and no more of it than shows that it exceeds limit.

    The smallest chunks cost the server the most: others get a turn between few of them.
    """
    body = bytearray()
    while len(body) <= limit and (piece := source.read(4096)):
        body += piece
        sleep(0)
    return bytes(body)


def _too_large(limit: int) -> NoReturn:
    abort(413, f"The body has more than {limit} bytes.")


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


def count(route: str, status: int, event: Event) -> None:
    """Count a request whose answer begins now."""
    REQUESTS.labels(route, status).inc()
    DURATION.labels(route).observe(time.perf_counter() - event.started - event.waited)


def _end(response: Response) -> Response:
    event = current_event()
    count(request.url_rule.rule if request.url_rule else "none", response.status_code, event)
    response.headers[REQUEST_ID] = event.request_id
    if not event.deferred and request.path not in OPEN:
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
    response = json_response(503, {"message": str(error), **error.details})
    response.headers["Retry-After"] = str(RETRY_AFTER)
    return response
