"""What every HTTP door does besides its own routes: access, errors, health, metrics and events."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from common.events import REQUEST_ID, Event, Sink
from flask import Flask, Response, g, request
from werkzeug.datastructures import Headers, WWWAuthenticate
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, Unauthorized

from door import BrokerUnavailable, metrics
from door.browsers import Browsers, may_send
from door.call import OPEN, Answer, Routes, failed, json_answer
from door.direct import FAULT, Direct
from door.memory import RETRY_AFTER
from door.topology import Topology


class Broker(Protocol):
    """What health needs to know of a door's connection to the broker."""

    @property
    def up(self) -> bool:
        """Whether the connection is open and usable now."""


def equip(
    app: Flask,
    broker: Broker,
    events: Sink | None,
    topology: Topology,
    routes: Routes,
    names: Collection[str] = (),
) -> None:
    """Give app its routes, `/healthz`, `/metrics` and `/openapi.json`.

    Flask answers the last three, and requests for none of routes, which are Direct's. What pages
    have a browser send gets 403, but from pages of the list; names are the door's own, as Browsers
    says. Who has no access gets 401: to metrics readers have it, where there are any, and to health
    everybody. Requests are counted and told. An error is
    `{"message": "<what is wrong>"}`: the caller's fault is 4xx, the broker's 503 with
    `Retry-After`. Each response names its request in `X-Request-Id`; each request but those of
    health and metrics is told to events, unless its event is deferred. The description is
    openapi.json in app's package.
    """

    @app.before_request
    def begin() -> Response | None:
        g.event = Event(events, request.headers.get(REQUEST_ID))
        if fault := request.environ.get(FAULT):
            raise Forbidden(fault)
        lists = topology.lists
        told = may_send(request.environ, lists)
        if told is not None:
            return _response(Answer(204, told, []))
        access = lists.readers if request.path == "/metrics" else lists.access
        authorization = request.headers.get("Authorization")
        if request.path != "/healthz" and not access.client(authorization):
            raise stranger(app.name)
        return None

    description = (Path(app.root_path) / "openapi.json").read_bytes()

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(description, mimetype="application/json")

    @app.get("/metrics")
    def tell_metrics() -> Response:
        return Response(metrics.text(), content_type=metrics.CONTENT_TYPE)

    @app.get("/healthz")
    def healthz() -> Response:
        up = broker.up
        status = 503 if "ready" in request.args and not up else 200
        retry = [("Retry-After", str(RETRY_AFTER))] if status == 503 else []
        return _response(json_answer(status, {"broker": "up" if up else "down"}, retry))

    for method, path in routes:
        rule = path.replace("{", "<").replace("}", ">")
        others = [known for known, place in routes if place == path]
        app.add_url_rule(rule, f"{method} {path}", _other_method(others), methods=[method])
    app.after_request(_end)
    app.register_error_handler(HTTPException, _failed)
    app.register_error_handler(BrokerUnavailable, _failed)
    app.wsgi_app = Direct(  # type: ignore[method-assign]
        app.wsgi_app, routes, events, topology, Browsers(names)
    )


def stranger(realm: str) -> Unauthorized:
    """Return the 401 of the door realm."""
    return Unauthorized(
        "Credentials are missing or wrong.",
        www_authenticate=[WWWAuthenticate("basic", {"realm": realm}), WWWAuthenticate("bearer")],
    )


def _other_method(methods: list[str]) -> Callable[..., Response]:
    """Return what Flask calls for a route of methods: only HEAD gets there, Direct has the rest."""

    def view(**_name: str) -> Response:
        # An answer to HEAD would have to take a message off the queue to tell its size.
        raise MethodNotAllowed(methods)

    return view


def _response(answer: Answer) -> Response:
    # Passed through, so that nothing stands between the server and the body's steps.
    response = Response(answer.body, answer.status, direct_passthrough=True)
    response.headers = Headers(answer.headers)
    return response


def _event() -> Event:
    event: Event = g.event
    return event


def _end(response: Response) -> Response:
    event = _event()
    route = request.url_rule.rule if request.url_rule else "none"
    route = route.replace("<", "{").replace(">", "}")
    metrics.count(route, response.status_code, event.busy)
    response.headers[REQUEST_ID] = event.request_id
    if not event.deferred and request.path not in OPEN:
        if "event" not in event.fields:
            event.fields |= {"event": "request", "method": request.method, "path": request.path}
        event.tell(response.status_code)
    return response


def _failed(error: BrokerUnavailable | HTTPException) -> Response:
    return _response(failed(error, _event()))
