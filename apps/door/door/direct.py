"""The routes of a door, answered without Flask, which takes half of a request's time."""

import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from common.events import REQUEST_ID, Event, Sink
from werkzeug.exceptions import HTTPException, InternalServerError

from door import BrokerUnavailable, metrics
from door.call import Call, Routes, failed
from door.server import Application
from door.settings import Access

log = logging.getLogger(__name__)

STATUS = {status.value: f"{status.value} {status.phrase.upper()}" for status in HTTPStatus}


class Direct:
    """A WSGI application in front of Flask's.

    Flask answers requests whose credentials are wrong, and those for none of the routes.
    """

    def __init__(
        self, flask: Application, routes: Routes, sink: Sink | None, access: Access
    ) -> None:
        """Answer routes, and let flask answer the rest."""
        self._flask = flask
        self._routes = routes
        self._sink = sink
        self._access = access

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer one request."""
        path = environ["PATH_INFO"]
        route = self._routes.get((environ["REQUEST_METHOD"], path))
        if route is None or not self._access.allows(environ.get("HTTP_AUTHORIZATION")):
            return self._flask(environ, start_response)  # type: ignore[no-any-return]
        event = Event(self._sink, environ.get("HTTP_X_REQUEST_ID"))
        try:
            answer = route(Call(environ, event))
        except (BrokerUnavailable, HTTPException) as error:
            answer = failed(error, event)
        except Exception:
            log.exception("%s failed", path)
            answer = failed(InternalServerError(), event)
        metrics.count(path, answer.status, event.busy)
        if not event.deferred:
            event.tell(answer.status)
        start_response(STATUS[answer.status], [*answer.headers, (REQUEST_ID, event.request_id)])
        return answer.body
