"""Requests that come by the thousand, answered without Flask, which takes half of their time."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from werkzeug.exceptions import HTTPException, InternalServerError

from door import BrokerUnavailable
from door.events import REQUEST_ID, Event, Sink
from door.server import Application
from door.settings import Access
from door.web import RETRY_AFTER, count

log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
Answer = tuple[int, Headers, Iterable[bytes]]
Route = Callable[[dict[str, Any], Event], Answer | None]
STATUS = {status.value: f"{status.value} {status.phrase.upper()}" for status in HTTPStatus}


class Direct:
    """A WSGI application in front of Flask's, for the usual form of some of its routes.

    By method and path, a route gets environment and event, and returns status, headers and body;
    or None, having changed nothing, for what is Flask's to answer, as are queries and credentials
    that are wrong. The answers are the same.
    """

    def __init__(
        self,
        flask: Application,
        routes: Mapping[tuple[str, str], Route],
        sink: Sink | None,
        access: Access,
    ) -> None:
        """Put routes in front of flask."""
        self._flask = flask
        self._routes = routes
        self._sink = sink
        self._access = access

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer one request."""
        path = environ["PATH_INFO"]
        route = self._routes.get((environ["REQUEST_METHOD"], path))
        if (
            route is None
            or environ["QUERY_STRING"]
            or not self._access.allows(environ.get("HTTP_AUTHORIZATION"))
        ):
            return self._flask(environ, start_response)  # type: ignore[no-any-return]
        event = Event(self._sink, environ.get("HTTP_X_REQUEST_ID"))
        try:
            answer = route(environ, event)
        except BrokerUnavailable as error:
            event.fields["reason"] = str(error)
            answer = json_answer(503, {"message": str(error)}, [("Retry-After", str(RETRY_AFTER))])
        except HTTPException as error:
            answer = _failed(event, error)
        except Exception:
            log.exception("%s failed", path)
            answer = _failed(event, InternalServerError())
        if answer is None:
            return self._flask(environ, start_response)  # type: ignore[no-any-return]
        status, headers, body = answer
        count(path, status, event)
        if not event.deferred:
            event.tell(status)
        start_response(STATUS[status], [*headers, (REQUEST_ID, event.request_id)])
        return body


def _failed(event: Event, error: HTTPException) -> Answer:
    event.fields["reason"] = error.description
    return json_answer(error.code or 500, {"message": error.description})


def json_answer(status: int, body: object, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return body as JSON with status."""
    data = json.dumps(body).encode()
    own = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    return status, [*own, *headers], [data]
