# mypy: disable-error-code=no-untyped-call
"""The HTTP server of a door: gevent's pywsgi with limits, and a graceful end.

A request costs a greenlet, not a thread, so that slow clients and long polls keep nobody waiting.
"""

import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from http import HTTPStatus
from typing import Any, Protocol
from uuid import uuid4

import gevent
from gevent.event import Event
from gevent.pywsgi import Input, WSGIHandler, WSGIServer

log = logging.getLogger(__name__)

# Where the client's socket is in the WSGI environment.
SOCKET = "door.socket"

# Clients at a time; more wait in the listening socket's queue.
MAX_CLIENTS = 8000
# Lines and bytes of a request's headers.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
# Seconds a client may take for its next request, to send all of its headers or all of its body
# (door.web), and to read its whole response.
CLIENT_TIMEOUT = 30
# Bytes of a response that the system may take before the client did. Left to itself it takes
# megabytes, and a message would count as written before its client has seen any of it.
SEND_BUFFER = 65536
# Seconds a refused client gets to read why, while what it still sends is thrown away.
LINGER = 2
# Seconds running requests get to finish after SIGTERM.
DRAIN_TIMEOUT = 5
# Seconds between the end of a worker and its successor's start.
RESPAWN_DELAY = 0.5

HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\0-\x08\n-\x1f\x7f]*)\r?\n")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_CHUNK_LINE = 256
ONCE = ("content-length", "content-type", "transfer-encoding", "host", "authorization")


class Application(Protocol):
    """A WSGI application (PEP 3333)."""

    def __call__(self, environ: dict[str, Any], start_response: Any, /) -> Any:
        """Answer one request."""


class Connection(Protocol):
    """A door's connection to the broker."""

    def start(self) -> None:
        """Connect in the background."""

    def finish(self) -> None:
        """Let no request wait for what is still to come."""

    def stop(self) -> None:
        """Close once all is settled."""


class Refused(OSError):  # noqa: N818 - an answer, not a fault
    """A request that does not reach the application; the client is told status and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        """Refuse with status, for the reason why."""
        super().__init__(why)
        self.status = status


TOO_SLOW = Refused(HTTPStatus.REQUEST_TIMEOUT, "The headers took too long.")


class Headers:
    """A request's headers: what pywsgi asks of email.message, read in a fraction of its time."""

    status = ""

    def __init__(self, rfile: Any, _seekable: int) -> None:
        """Read from rfile up to the empty line; raises Refused."""
        self.headers: list[str] = []
        self._values: dict[str, str] = {}
        room = MAX_HEADER_BYTES
        while (line := rfile.readline(room + 1)) not in (b"\r\n", b"\n"):
            room -= len(line)
            if room < 0 or len(self.headers) == MAX_HEADERS:
                raise Refused(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes are taken.",
                )
            match = HEADER.fullmatch(line)
            if match is None:
                raise Refused(HTTPStatus.BAD_REQUEST, "A header cannot be read.")
            name, value = match[1].decode().lower(), match[2].decode("latin-1").strip(" \t")
            if name in self._values and name in ONCE:
                raise Refused(HTTPStatus.BAD_REQUEST, f"The header {name} comes twice.")
            self._values[name] = value
            self.headers.append(f"{name}: {value}")
        self._check_length()
        self.typeheader = self.get("content-type")

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of the header name, in whatever case."""
        return self._values.get(name.lower(), default)

    getheader = get

    def __delitem__(self, name: str) -> None:
        """Forget the header name."""
        del self._values[name]

    def _check_length(self) -> None:
        """Refuse what two programs could read differently (RFC 9112, section 6)."""
        encoding, length = self.get("transfer-encoding"), self.get("content-length")
        if encoding is not None and encoding.lower() != "chunked":
            raise Refused(HTTPStatus.NOT_IMPLEMENTED, "Of transfer encodings, chunked is known.")
        if encoding is not None and length is not None:
            raise Refused(HTTPStatus.BAD_REQUEST, "A chunked body has no Content-Length.")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length is not a number.")


class Body(Input):
    """A request's body; pywsgi would read to its end what the application did not want."""

    __slots__ = ()

    @property
    def unread(self) -> bool:
        """Whether a part of it is still to come."""
        if self.chunked_input:
            return bool(self.chunk_length != 0)
        return bool(self.position < (self.content_length or 0))

    def _discard(self) -> None:
        pass

    def _chunked_read(self, length: int | None = None, _use_readline: bool = False) -> bytes:
        """Read at most length bytes of chunks (RFC 9112, section 7.1); raises OSError.

        pywsgi reads their sizes byte by byte, so that the smallest of them take all its time.
        chunk_length is what is left of a chunk, less than 0 before its size and 0 at the end.
        """
        self._send_100_continue()
        body = bytearray()
        while self.chunk_length and (length is None or len(body) < length):
            if self.chunk_length < 0:
                size = CHUNK_SIZE.fullmatch(self.rfile.readline(MAX_CHUNK_LINE))
                if size is None:
                    raise OSError("A chunk's size cannot be read.")
                self.chunk_length = int(size[1], 16) or self._trailers()
                continue
            wanted = self.chunk_length if length is None else length - len(body)
            piece = self.rfile.read(min(wanted, self.chunk_length))
            body += piece
            self.chunk_length -= len(piece)
            if not piece or (not self.chunk_length and self.rfile.readline(3) != b"\r\n"):
                self.chunk_length = -1
                raise OSError("A chunk does not end.")
            self.chunk_length = self.chunk_length or -1
        return bytes(body)

    def _trailers(self) -> int:
        """Read what follows the last chunk; 0."""
        for _ in range(MAX_HEADERS):
            if self.rfile.readline(MAX_CHUNK_LINE) in (b"\r\n", b""):
                return 0
        raise OSError("The trailers do not end.")


class Handler(WSGIHandler):
    """One client's connection."""

    MessageClass = Headers
    wsgi_input: Any
    status: Any
    response_headers: Any
    # A slow client is not an error of this program; a time-out has no errno but this text.
    ignored_socket_errors: Any = (*WSGIHandler.ignored_socket_errors, "timed out")

    def handle(self) -> None:
        """Serve the client's requests, one after the other."""
        self.socket.settimeout(CLIENT_TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle()

    def read_requestline(self) -> str:
        """Read the first line of a request."""
        with self._time_limit(b"\n"):
            return str(super().read_requestline())

    def read_request(self, raw_requestline: str) -> bool:
        """Read the request's headers; raises ValueError or Refused."""
        if raw_requestline.count(" ") != 2:
            raise Refused(HTTPStatus.BAD_REQUEST, "The request line is not METHOD TARGET VERSION.")
        with self._time_limit(b"\r\n\r\n"):
            return bool(super().read_request(raw_requestline))

    def get_environ(self) -> dict[str, Any]:
        """Return the WSGI environment with the client's socket in it."""
        environ: dict[str, Any] = super().get_environ()
        environ[SOCKET] = self.socket
        body = self.wsgi_input
        self.wsgi_input = Body(body.rfile, body.content_length, body.socket, body.chunked_input)
        environ["wsgi.input"] = self.wsgi_input
        return environ

    def handle_one_response(self) -> None:
        """Answer one request, the connection's last one when the server is stopping."""
        self.server.running += 1
        try:
            super().handle_one_response()
            if self.wsgi_input.unread:
                self.close_connection = True
                self._linger()
        finally:
            self.server.running -= 1
            self.close_connection = self.close_connection or self.server.closed

    def handle_one_request(self) -> Any:
        """Serve one request; what pywsgi refuses by itself is told as the rest is."""
        result = super().handle_one_request()
        if isinstance(result, tuple) and result[0] == "414":
            why = Refused(HTTPStatus.REQUEST_URI_TOO_LONG, "The request line is too long.")
            return self._handle_client_error(why)
        return result

    def log_request(self) -> None:
        """Log nothing: the door's events tell of its requests."""

    def _write_with_headers(self, data: bytes) -> None:
        """Send headers and what comes with them in one piece, where pywsgi sends two."""
        self.headers_sent = True
        self.finalize_headers()
        lines = [b"HTTP/1.1 " + self.status]
        lines += [b"%b: %b" % header for header in self.response_headers]
        head = b"\r\n".join([*lines, b"\r\n"])
        if self.response_use_chunked:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + data)

    def _time_limit(self, end: bytes) -> AbstractContextManager[object]:
        """Limit the time until end arrives; where it is there, no timer has to be started."""
        if end in self.rfile.peek():
            return nullcontext()
        return gevent.Timeout(CLIENT_TIMEOUT, TOO_SLOW)

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes]:
        """Tell the client what was wrong with its request, in the doors' own shape."""
        if isinstance(ex, TimeoutError):
            ex = TOO_SLOW
        status = ex.status if isinstance(ex, Refused) else HTTPStatus.BAD_REQUEST
        body = json.dumps({"message": str(ex)}).encode()
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {uuid4().hex}\r\n"
            "Connection: close\r\n\r\n"
        )
        log.info("Refused a request: %s", str(ex)[:200])
        with suppress(OSError):
            self.socket.sendall(head.encode() + body)
        self._linger()
        self.close_connection = True
        return str(int(status)), b""

    def _linger(self) -> None:
        """Read on for a while: closing before would reset the connection and take the answer."""
        with suppress(OSError), gevent.Timeout(LINGER, False):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                gevent.sleep(0)


class Server(WSGIServer):
    """The HTTP server of one process, which counts the requests that it is answering."""

    handler_class = Handler
    running = 0

    def drain(self) -> None:
        """Accept nothing more and wait, at most DRAIN_TIMEOUT seconds, for running requests."""
        self.close()
        with gevent.Timeout(DRAIN_TIMEOUT, False):
            while self.running:
                gevent.sleep(0.01)


def serve(
    name: str, make: Callable[[], tuple[Application, Connection]], port: int, workers: int = 1
) -> None:
    """Serve the application that make returns, in workers processes, until SIGTERM or SIGINT.

    make is called in each process, and is the first there to import what must not be shared.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # pika reports each failure in several lines; the Link has one for each.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.create_server(("0.0.0.0", port), backlog=1024)
    listener.setblocking(False)
    if workers == 1:
        _work(name, make, listener)
    else:
        _supervise(lambda: _work(name, make, listener, many=True), workers)


def _work(
    name: str,
    make: Callable[[], tuple[Application, Connection]],
    listener: socket.socket,
    many: bool = False,
) -> None:
    application, connection = make()
    server = Server(
        listener,
        application,
        spawn=MAX_CLIENTS,
        log=None,
        error_log=logging.getLogger("door.http"),
        # Else the server asks the DNS for its own name before it starts. One process of many
        # takes one client at a time, so that they share them.
        environ={"SERVER_NAME": name, "wsgi.multiprocess": many},
    )
    stop = Event()
    # A container's first process has no default action for signals.
    for number in signal.SIGTERM, signal.SIGINT:
        gevent.signal_handler(number, stop.set)
    connection.start()
    server.start()
    stop.wait()
    connection.finish()
    server.drain()
    connection.stop()


def _supervise(work: Callable[[], None], count: int) -> None:
    """Keep count processes that do work, until SIGTERM or SIGINT, which each of them gets."""
    workers: set[int] = set()
    signals = {signal.SIGTERM, signal.SIGINT}
    stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in signals:
        signal.signal(number, stop)
    while workers or not stopping:
        # Else a signal between the fork and the note of it would miss a worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        while not stopping and len(workers) < count:
            pid = os.fork()
            if pid == 0:
                for number in signals:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                work()
                sys.exit()
            workers.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        pid, status = os.wait()
        workers.discard(pid)
        if not stopping:
            log.warning("Worker %d ended with %d", pid, os.waitstatus_to_exitcode(status))
            time.sleep(RESPAWN_DELAY)
