"""One request and its answer, as a door's routes see them: whether Flask read it or not."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from socket import socket
from typing import IO, Any, NoReturn, Protocol
from urllib.parse import parse_qsl

from common.events import Event
from gevent import Timeout
from werkzeug.exceptions import HTTPException, RequestTimeout, abort

from door import BrokerUnavailable, access
from door.access import ANYBODY
from door.memory import RETRY_AFTER, Grant, Memory, OutOfMemory
from door.server import CLIENT, CLIENT_TIMEOUT, Body, give_way

# Bytes that are read at a time; and that must arrive within CLIENT_TIMEOUT seconds, unless the
# body ends before.
PIECE = 64 * 1024
PACE = 4 * PIECE
# Bytes of a body that mostly arrives together with its headers.
SHORT = 4096
MAX_PARAMETERS = 20
# Health and metrics: asked every few seconds by programs, and of no interest as an event.
OPEN = ("/healthz", "/metrics")

Headers = list[tuple[str, str]]


class Client(Protocol):
    """What the server knows of the client of a request."""

    @property
    def address(self) -> str:
        """Where it is; empty where that is unknown."""

    @property
    def socket(self) -> socket | None:
        """Its connection; None where there is none, as in a test."""

    @property
    def grant(self) -> Grant:
        """The memory held for its request; taken back once that is answered."""

    @property
    def waiting(self) -> AbstractContextManager[object]:
        """While it is entered, the server waits for the client, and may let it go."""

    @property
    def let_go(self) -> bool:
        """Whether the client was let go: what it has not sent yet will not come."""


class _Nobody:
    """The client of a request that came without the server."""

    address = ""
    socket = None
    waiting = nullcontext()
    let_go = False

    def __init__(self) -> None:
        self.grant = Memory(2**40).grant()


@dataclass(slots=True)
class Answer:
    """A response: status, headers, and the pieces of its body."""

    status: int
    headers: Headers
    body: Iterable[bytes]


class Call:
    """One request, and the event that tells of it."""

    __slots__ = ("by", "client", "environ", "event", "name")

    def __init__(
        self, environ: dict[str, Any], event: Event, name: str = "", by: access.Client = ANYBODY
    ) -> None:
        """Wrap the request of a WSGI environment, which comes by a client of the list.

        name is what its path has for a {name}.
        """
        self.by = by
        self.environ = environ
        self.event = event
        self.name = name
        self.client: Client = environ.get(CLIENT) or _Nobody()

    def header(self, name: str) -> str | None:
        """Return the value of the header name, in whatever case; None without one."""
        key = name.upper().replace("-", "_")
        value: str | None = self.environ.get(
            key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        )
        return value

    def query(self, *names: str) -> dict[str, str]:
        """Return the query's parameters; aborts with 400 on one that is not in names, or twice."""
        raw = self.environ["QUERY_STRING"]
        if not raw:
            return {}
        try:
            pairs = parse_qsl(raw, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
        except ValueError:
            abort(400, f"The query has more than {MAX_PARAMETERS} parameters.")
        found: dict[str, str] = {}
        for name, value in pairs:
            if name not in names:
                known = f"known here: {', '.join(names)}" if names else "none is known here"
                abort(400, f"The query has a parameter {name[:50]!r}; {known}.")
            if name in found:
                abort(400, f"The query has the parameter {name} twice.")
            found[name] = value
        return found

    def hold(self, amount: int) -> None:
        """Hold amount bytes of memory more for this request; raises OutOfMemory."""
        self.client.grant.add(amount)

    def read(self, limit: int) -> bytes:
        """Return the whole body, of at most limit bytes; memory is held for what has arrived.

        Aborts with 413 when it is larger (unread, where its length is told), with 408 when PACE
        bytes take longer than CLIENT_TIMEOUT seconds, and with 400 when it is not whole; raises
        OutOfMemory.
        """
        length = int(self.environ.get("CONTENT_LENGTH") or 0)
        if length > limit:
            _too_large(limit)
        source = self.environ["wsgi.input"]
        chunked = "HTTP_TRANSFER_ENCODING" in self.environ
        if not length and not chunked:
            return b""
        try:
            if length <= SHORT and self._arrived(source, length):
                return source.read(length)  # type: ignore[no-any-return]
            body = b"".join(self._pieces(source, limit + 1 if chunked else length, chunked))
        except TimeoutError:
            raise _late() from None
        except OSError:  # it ended early, or its chunks cannot be told apart
            if self.client.let_go:
                raise OutOfMemory from None
            abort(400, "The body is not whole.")
        if chunked and len(body) > limit:
            _too_large(limit)
        return body

    def _arrived(self, source: IO[bytes], length: int) -> bool:
        """Whether so many bytes of the body are here already: then no timer is needed."""
        if not isinstance(source, Body) or "HTTP_EXPECT" in self.environ or not length:
            return False
        with self.client.waiting:
            return len(source.rfile.peek()) >= length

    def _pieces(self, source: IO[bytes], most: int, chunked: bool) -> Iterator[bytes]:
        """Read no more than most bytes, holding memory for each piece before it is read.

        The smallest chunks cost the server the most: others get a turn between few of them.
        """
        left, size = most, 4096 if chunked else PIECE
        while left > 0:
            paced = min(left, PACE)
            with Timeout(CLIENT_TIMEOUT, _late()):
                while paced > 0:
                    wanted = min(paced, size)
                    self.hold(wanted)
                    with self.client.waiting:
                        piece = source.read(wanted)
                    if not piece:
                        return
                    paced -= len(piece)
                    left -= len(piece)
                    yield piece
                    if chunked:
                        give_way()


Route = Callable[[Call], Answer]
# By method and path; a path is words, as /data, or has a name in it, as /queues/{queue}/messages.
Routes = Mapping[tuple[str, str], Route]


def json_answer(status: int, body: object, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return body as JSON with status."""
    data = json.dumps(body).encode()
    own = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    return Answer(status, [*own, *headers], [data])


def failed(error: BrokerUnavailable | HTTPException, event: Event) -> Answer:
    """Return the answer that tells of error, and tell event its reason.

    It is `{"message": "<what is wrong>"}` and the error's details: the caller's fault is 4xx,
    BrokerUnavailable is 503 with Retry-After.
    """
    details = getattr(error, "details", {})
    if isinstance(error, HTTPException):
        status, message = error.code or 500, error.description
        # Its headers matter: Allow with a 405, WWW-Authenticate with a 401.
        own = [pair for pair in error.get_headers() if pair[0] != "Content-Type"]
    else:
        status, message, own = 503, str(error), [("Retry-After", str(RETRY_AFTER))]
    # A route that knows better than the answer what may be told has said so.
    event.fields.setdefault("reason", message)
    return json_answer(status, {"message": message, **details}, own)


def _late() -> RequestTimeout:
    return RequestTimeout(
        f"The body is too slow: {PACE} bytes, or all of it, must come in {CLIENT_TIMEOUT} s."
    )


def _too_large(limit: int) -> NoReturn:
    abort(413, f"The body has more than {limit} bytes.")
