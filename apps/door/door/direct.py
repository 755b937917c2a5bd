"""The routes of a door, answered without Flask, which takes half of a request's time."""

import logging
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from common.events import REQUEST_ID, Event, Sink
from werkzeug.exceptions import HTTPException, InternalServerError

from door import BrokerUnavailable, metrics
from door.browsers import Browsers, letting_read
from door.call import Call, Route, Routes, failed
from door.server import Application
from door.topology import Topology

log = logging.getLogger(__name__)

# Where the WSGI environment says why a request is refused.
FAULT = "door.fault"

NAME = re.compile(r"\{\w+\}")
STATUS = {status.value: f"{status.value} {status.phrase.upper()}" for status in HTTPStatus}


class Table:
    """Finds the route of a request."""

    def __init__(self, routes: Routes) -> None:
        """Find each of routes."""
        self._plain = {key: route for key, route in routes.items() if "{" not in key[1]}
        self._named = {
            (method, NAME.sub("*", path)): (route, path)
            for (method, path), route in routes.items()
            if "{" in path
        }

    def find(self, method: str, path: str) -> tuple[Route, str, str] | None:
        """Return the route of a request, the path as the routes have it, and the name in it."""
        route = self._plain.get((method, path))
        if route:
            return route, path, ""
        parts = path.split("/", 3)
        if len(parts) < 4 or not parts[2]:
            return None
        found = self._named.get((method, f"/{parts[1]}/*/{parts[3]}"))
        # WSGI has the bytes of a path as Latin-1 (PEP 3333).
        return (*found, parts[2].encode("latin-1").decode(errors="replace")) if found else None


class Direct:
    """A WSGI application in front of Flask's.

    Flask answers requests that are refused, those whose credentials are wrong, and those for none
    of the routes.
    """

    def __init__(
        self,
        flask: Application,
        routes: Routes,
        sink: Sink | None,
        topology: Topology,
        browsers: Browsers,
    ) -> None:
        """Answer routes, and let flask answer the rest."""
        self._flask = flask
        self._table = Table(routes)
        self._sink = sink
        self._topology = topology
        self._browsers = browsers

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer one request."""
        lists = self._topology.lists
        if lists.origins and environ.get("HTTP_ORIGIN") in lists.origins:
            start_response = letting_read(environ["HTTP_ORIGIN"], start_response)
        if fault := self._browsers.fault(environ, lists):
            environ[FAULT] = fault
            return self._flask(environ, start_response)  # type: ignore[no-any-return]
        found = self._table.find(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        by = lists.access.client(environ.get("HTTP_AUTHORIZATION"))
        if found is None or by is None:
            return self._flask(environ, start_response)  # type: ignore[no-any-return]
        route, path, name = found
        event = Event(self._sink, environ.get("HTTP_X_REQUEST_ID"))
        if by.name:
            event.fields["client"] = by.name
        try:
            answer = route(Call(environ, event, name, by))
        except (BrokerUnavailable, HTTPException) as error:
            answer = failed(error, event)
        except Exception:
            log.exception("%s failed", path)
            answer = failed(InternalServerError(), event)
        metrics.count(path, answer.status, event.busy, by.name)
        if not event.deferred:
            event.tell(answer.status)
        start_response(STATUS[answer.status], [*answer.headers, (REQUEST_ID, event.request_id)])
        return answer.body
