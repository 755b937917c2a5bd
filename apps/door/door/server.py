# mypy: disable-error-code=no-untyped-call
"""The HTTP server of a door: gevent's StreamServer, with limits, and a graceful end.

A request costs a greenlet, not a thread, so that slow clients and long polls keep nobody waiting.
With gevent's pywsgi a request takes a third longer than with Handler. Body and Server replace parts
of gevent, some of them private; each says why. The test test_gevent_calls_what_is_replaced fails
when another gevent no longer calls one of them.
"""

import ctypes
import errno
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from secrets import token_hex
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote

import gevent
from gevent.event import Event
from gevent.pywsgi import MAX_REQUEST_LINE, Input, format_date_time
from gevent.server import StreamServer
from werkzeug.exceptions import InternalServerError

from door import shared
from door.clients import CONNECTION, Arrivals, Clients
from door.memory import RETRY_AFTER, Grant, Memory, OutOfMemory

log = logging.getLogger(__name__)

# Where the client is in the WSGI environment (door.call.Client).
CLIENT = "door.client"

# Lines and bytes of a request's headers.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
# Bytes of headers that a connection's own memory has room for, and how many times their bytes
# longer ones take: as lines, as a dictionary, and in the WSGI environment.
SMALL_HEADERS, HEADER_COPIES = 2048, 4
# Clients that the system may accept for this program, and that may then wait for their turn. The
# system lets further ones try again, which takes them a second.
BACKLOG = 4096
# A worker accepts one client at a time, so that the workers share them; while more than MANY wait,
# it accepts MANY at a time.
MANY = 64
# Seconds a client may take for its next request, to send all of its headers, or a part of its body
# (door.call), and to read its whole response.
CLIENT_TIMEOUT = 30
# Bytes of a response that the system may hold for a client. By default it holds megabytes, and a
# message would count as written before its client has seen any of it.
SEND_BUFFER = 65536
# Seconds a client for whom there is no room gets to take that answer.
REFUSAL_TIMEOUT = 0.1
# Seconds a refused client gets to read why, while what it still sends is thrown away.
LINGER = 2
# Seconds running requests get to finish after SIGTERM, and those that still come by connections
# that are open; without any for QUIET seconds, nobody is expected to send one.
DRAIN_TIMEOUT = 5
QUIET = 1.0
# Seconds in which a client whose connection the system has begun to take completes it.
HANDSHAKE = 0.05
# Seconds a new worker waits for its connection to the broker before it takes clients, who would be
# answered 503 while another worker, or a moment later this one, has what they want. A proxy in
# front tries again where it is refused, so it may wait for longer.
CONNECT_WAIT = 1.0
FRONTED_CONNECT_WAIT = 10.0
# Seconds between the end of a worker and its successor's start.
RESPAWN_DELAY = 0.5

# Bytes of an answer that are joined with its headers, so that they leave in one piece.
JOINED = 64 * 1024

# A program of the classic packet filter (Linux: Documentation/networking/filter.rst) that drops
# requests for a connection, and nothing else: A = the flags; is A & (SYN | ACK) SYN?
NO_NEWCOMERS = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in [
        (0x30, 0, 0, 13),  # A = the byte 13 of the TCP header
        (0x54, 0, 0, 0x12),  # A &= SYN | ACK
        (0x15, 0, 1, 0x02),  # if A is not SYN, skip the next one
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFFFFFF),  # keep it
    ]
)
SO_ATTACH_FILTER = 26

# Of struct tcp_info, the field tcpi_unacked: of a listening socket, the clients in its queue.
ACCEPTED = struct.Struct("=24xL")

VERSIONS = ("HTTP/1.0", "HTTP/1.1")
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
CONTROL = re.compile(r"[\0-\x08\n-\x1f\x7f]")
# http://host:port of a target in absolute form (RFC 9112, section 3.2.2).
AUTHORITY = re.compile(r"^https?://[^/?#]+", re.IGNORECASE)
LENGTH = re.compile(r"[0-9]{1,1000}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_CHUNK_LINE = 256
# As the WSGI environment has them.
ONCE = {"CONTENT_LENGTH", "CONTENT_TYPE"}
ONCE |= {f"HTTP_{name}" for name in ("TRANSFER_ENCODING", "HOST", "AUTHORIZATION")}
# Characters of a header's name that is kept once it was read: most clients send the same ones.
MAX_KEPT = 64
# Of errors, those of a client that is gone. A time-out has this text in place of an errno.
GONE = (errno.EPIPE, errno.ECONNRESET, "timed out")


class Application(Protocol):
    """A WSGI application (PEP 3333)."""

    def __call__(self, environ: dict[str, Any], start_response: Any, /) -> Any:
        """Answer one request."""


class Connection(Protocol):
    """A door's connection to the broker."""

    @property
    def up(self) -> bool:
        """Whether it can be used now."""

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
BUSY = Refused(HTTPStatus.SERVICE_UNAVAILABLE, OutOfMemory().description)
FAILED = Refused(HTTPStatus.INTERNAL_SERVER_ERROR, InternalServerError.description)


def deny(why: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> NoReturn:
    """Refuse a request."""
    raise Refused(status, why)


def read_head(lines: list[str], environ: dict[str, Any]) -> int:
    """Tell environ, a WSGI environment, of a request's line and headers; raises Refused.

    Returns how many characters the headers have.
    """
    line, *headers = lines
    words = line.split(" ")
    if len(words) != 3 or "" in words or CONTROL.search(line):
        deny("The request line is not METHOD TARGET VERSION.")
    environ["REQUEST_METHOD"], target, environ["SERVER_PROTOCOL"] = words
    if words[2] not in VERSIONS:
        deny("Of HTTP's versions, 1.0 and 1.1 are known.")
    if len(headers) > MAX_HEADERS:
        too_many()
    size = 2 * len(headers)
    for header in headers:
        size += len(header)
        name, colon, value = header.partition(":")
        key = (read_name if len(name) < MAX_KEPT else read_name.__wrapped__)(name)
        # isprintable() is the faster one, and false for some text that is no control character.
        if not (colon and key) or not (value.isprintable() or not CONTROL.search(value)):
            deny("A header cannot be read.")
        value = value.strip(" \t")
        if key in environ:
            if key in ONCE:
                deny(f"The header {name.lower()} comes twice.")
            value = f"{environ[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
        environ[key] = value
    environ.pop("HTTP_", None)
    if not target.startswith("/"):
        target = AUTHORITY.sub("", target, count=1) or "/"
    path, _, environ["QUERY_STRING"] = target.partition("?")
    environ["PATH_INFO"] = unquote(path, "latin-1")
    check_head(environ)
    return size


@lru_cache(maxsize=256)
def read_name(name: str) -> str:
    """Return how the WSGI environment has the header name; empty where it cannot be one.

    What has a `_` could pass for another name that has a `-`: it is HTTP_, which is thrown away.
    """
    if not TOKEN.fullmatch(name):
        return ""
    if "_" in name:
        return "HTTP_"
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def check_head(environ: dict[str, Any]) -> None:
    """Refuse what two programs could read differently (RFC 9112, sections 3.2 and 6)."""
    encoding, length = environ.get("HTTP_TRANSFER_ENCODING"), environ.get("CONTENT_LENGTH")
    if encoding is not None and encoding.lower() != "chunked":
        deny("Of transfer encodings, chunked is known.", HTTPStatus.NOT_IMPLEMENTED)
    if encoding is not None and length is not None:
        deny("A chunked body has no Content-Length.")
    if length is not None and not LENGTH.fullmatch(length):
        deny("Content-Length is not a number of bytes.")
    if environ["SERVER_PROTOCOL"] == "HTTP/1.1" and "HTTP_HOST" not in environ:
        deny("A request of HTTP/1.1 has the header Host.")


def too_many() -> NoReturn:
    """Refuse headers over the limits."""
    deny(
        f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes are taken.",
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    )


def give_way() -> None:
    """Let all others have a turn, in the middle of what takes long.

    After sleep(0) gevent would go on with whoever else called that, up to 1,000 times, before it
    looks what has arrived. The priority is above that of what arrives, which would else come first
    for ever.
    """
    gevent.idle(1)


@lru_cache(maxsize=1)
def date(seconds: int) -> str:
    """Return a time as the header Date has it."""
    return str(format_date_time(seconds), "ascii")


class Body(Input):
    """A request's body."""

    __slots__ = ()

    @property
    def unread(self) -> bool:
        """Whether a part of it is still to come."""
        if self.chunked_input:
            return bool(self.chunk_length != 0)
        return bool(self.position < (self.content_length or 0))

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


class Handler:
    """One client's connection, and what door.call knows of its client."""

    # Of the request that is being answered: its body, and whether it is of HTTP/1.0; the answer's
    # head, whether it tells where the answer ends, whether it was sent, and whether the connection
    # ends behind the answer.
    _body: Body
    _head = ""
    _old = _sized = _begun = _last = False

    def __init__(self, sock: Any, address: Any, server: "Server", grant: Grant) -> None:
        """Take the client of sock, which comes from address, and hold its memory by grant."""
        self.socket = sock
        self.rfile = sock.makefile("rb", -1)
        self.server = server
        self._peer = self.address = str(address[0]) if address else ""
        self.grant = grant
        self.let_go = False
        self._writing = False

    def handle(self) -> None:
        """Serve the client's requests, one after the other."""
        self.socket.settimeout(CLIENT_TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while self._serve():
                pass
        finally:
            with suppress(OSError):  # what is left unread would reset the connection
                os.read(self.socket.fileno(), 16384)
            self.rfile.close()
            self.socket.close()

    def refuse(self) -> None:
        """Tell the client at once that there is no room for it."""
        self.socket.settimeout(REFUSAL_TIMEOUT)
        self._tell(BUSY)
        with suppress(OSError):  # what is left unread would reset the connection
            self.socket.recv(65536)

    @property
    def waiting(self) -> "Handler":
        """A block in which the server waits for the client's bytes, or until it takes ours."""
        return self

    def __enter__(self) -> None:
        """Begin to wait."""
        self.server.clients.slow.begin(self)

    def __exit__(self, *_error: object) -> None:
        """Wait no more."""
        self.server.clients.slow.end(self)

    def let(self) -> int:
        """Let the client go: wait neither for its bytes any longer, nor until it takes ours."""
        self.let_go = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR if self._writing else socket.SHUT_RD)
        return self.grant.amount

    def _serve(self) -> bool:
        """Answer one request; whether there may be another one."""
        self.server.clients.idle.begin(self)
        try:
            lines = self._read_lines()
            if not lines:
                return False
            environ = self.server.environ.copy()
            size = read_head(lines, environ)
            self.server.clients.idle.end(self)
            if size > SMALL_HEADERS:
                self.grant.resize(CONNECTION + HEADER_COPIES * size)
        except (OSError, OutOfMemory) as error:
            self._refuse(error)
            return False
        self._complete(environ)
        self._answer(environ)
        return not self._last

    def _read_lines(self) -> list[str]:
        """Read the lines of a request's head, without their ends; none where no request comes."""
        try:
            arrived = self.rfile.peek()
        except OSError:
            return []
        # Here already, it needs no timer.
        end = arrived.find(b"\r\n\r\n")
        if end < 0 or arrived.count(b"\n", 0, end) != arrived.count(b"\r\n", 0, end):
            return self._read_slowly()
        # An empty line before a request is skipped (RFC 9112, 2.2).
        head = self.rfile.read(end + 4)[:end].removeprefix(b"\r\n")
        return head.decode("latin-1").split("\r\n")  # type: ignore[no-any-return]

    def _read_slowly(self) -> list[str]:
        """Read a head that comes by and by, within the time limit and holding memory for most."""
        with gevent.Timeout(CLIENT_TIMEOUT, TOO_SLOW):
            try:
                line = self.rfile.readline(MAX_REQUEST_LINE)
                if line in (b"\r\n", b"\n"):
                    line = self.rfile.readline(MAX_REQUEST_LINE)
            except OSError:
                return []
            if not line:
                return []
            if len(line) == MAX_REQUEST_LINE:
                deny("The request line is too long.", HTTPStatus.REQUEST_URI_TOO_LONG)
            lines, size = [without_end(line)], 0
            if lines[0].count(" ") != 2:  # what is no HTTP may have no further lines
                read_head(lines, {})
            self.grant.add_now(HEADER_COPIES * MAX_HEADER_BYTES)
            while line := self.rfile.readline(MAX_HEADER_BYTES - size + 1):
                if line in (b"\r\n", b"\n"):
                    break
                size += len(line)
                if size > MAX_HEADER_BYTES or len(lines) > MAX_HEADERS:
                    too_many()
                lines.append(without_end(line))
            else:
                deny("A header cannot be read.")
        self.grant.resize(CONNECTION)
        return lines

    def _complete(self, environ: dict[str, Any]) -> None:
        """Tell environ, which has the request's head, of its body and client."""
        wish = environ.get("HTTP_CONNECTION", "").lower()
        old = environ["SERVER_PROTOCOL"] == "HTTP/1.0"
        self._last = wish != "keep-alive" if old else wish == "close"
        self._old = old
        self.address = environ["REMOTE_ADDR"] = self._peer
        if self.server.fronted:
            # Nothing for the application, which sends headers X-… with a message.
            told = environ.pop("HTTP_X_FORWARDED_FOR", "")
            self.address = told.rpartition(",")[2].strip() or self._peer
        length = environ.get("CONTENT_LENGTH")
        waits = self.socket if environ.get("HTTP_EXPECT") == "100-continue" else None
        chunked = "HTTP_TRANSFER_ENCODING" in environ
        self._body = Body(self.rfile, int(length) if length else None, waits, chunked)
        environ["wsgi.input"] = self._body
        environ[CLIENT] = self

    def _answer(self, environ: dict[str, Any]) -> None:
        """Answer one request."""
        server = self.server
        server.running += 1
        self._head, self._begun = "", False
        try:
            self._run(environ)
        except Exception as error:
            self._last = True
            if not (isinstance(error, OSError) and error.args and error.args[0] in GONE):
                log.exception("A request failed")
                if not self._begun:
                    self._tell(FAILED)
        finally:
            server.running -= 1
            if server.draining:
                server.answered = time.monotonic()
            self.grant.resize(CONNECTION)
        if self._body.unread:
            self._last = True
            self._linger()

    def _run(self, environ: dict[str, Any]) -> None:
        """Have the application answer; its answer is closed however that ends (PEP 3333)."""
        answer = self.server.application(environ, self._start)
        try:
            if not self._head:
                raise ValueError("There is no head: start_response was not called.")
            if not self._sized and isinstance(answer, list):
                self._head += f"\r\nContent-Length: {sum(map(len, answer))}"
            elif not self._sized:
                self._last = True
            for piece in answer:
                if piece:
                    (self._sendall if self._begun else self._begin)(piece)
            if not self._begun:
                self._begin(b"")
        finally:
            if hasattr(answer, "close"):
                answer.close()

    def _start(self, status: str, headers: list[tuple[str, str]], error: Any = None) -> None:
        """Take the head of an answer: WSGI's start_response, without its write()."""
        if error and self._begun:
            raise error[1]
        lines = [f"{name}: {value}" for name, value in headers]
        self._head = head = "\r\n".join([f"HTTP/1.1 {status}", *lines])
        if head.count("\n") != len(lines) or head.count("\r") != len(lines):
            raise ValueError(f"A header has several lines: {headers}")
        self._sized = "\r\ncontent-length:" in head.lower() or status[:3] in ("204", "304")

    def _begin(self, data: bytes) -> None:
        """Send headers and what comes with them in one piece."""
        self._begun = True
        head = self._head
        # A proxy, told nothing, would send its next request while the connection is closed.
        if self._last or self.server.draining or self._body.unread:
            self._last = True
            head += "\r\nConnection: close"
        elif self._old:
            head += "\r\nConnection: keep-alive"
        sent = f"{head}\r\nDate: {date(int(time.time()))}\r\n\r\n".encode("latin-1")
        if len(data) > JOINED:
            self._sendall(sent)
            self._sendall(data)
        else:
            self._sendall(sent + data)

    def _sendall(self, data: bytes) -> None:
        """Send data; a client who does not take them at once is waited for, and may be let go."""
        try:
            sent = os.write(self.socket.fileno(), data)
        except OSError:  # there is no room now, or sendall tells what it is
            sent = 0
        if sent < len(data):
            self._writing = True
            with self.waiting:
                self.socket.sendall(memoryview(data)[sent:])
            self._writing = False

    def _refuse(self, error: Exception) -> None:
        """Tell the client what was wrong with its request, in the doors' own shape."""
        if isinstance(error, TimeoutError):
            error = TOO_SLOW
        if self.let_go or isinstance(error, OutOfMemory):
            error = BUSY
        self.server.clients.idle.end(self)
        self.grant.resize(CONNECTION)
        self._tell(error)
        if not self.let_go:  # nothing more of it is read then
            self._linger()

    def _tell(self, ex: Exception) -> None:
        """Send the answer that says why a request does not reach the application."""
        status = ex.status if isinstance(ex, Refused) else HTTPStatus.BAD_REQUEST
        body = json.dumps({"message": str(ex)}).encode()
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {token_hex(16)}\r\n"
            + (f"Retry-After: {RETRY_AFTER}\r\n" if ex is BUSY else "")
            + "Connection: close\r\n\r\n"
        )
        self.server.refusals.tell(str(ex)[:200])
        with suppress(OSError):
            self.socket.sendall(head.encode() + body)

    def _linger(self) -> None:
        """Read on for a while: closing before would reset the connection and take the answer."""
        with suppress(OSError), gevent.Timeout(LINGER, False), self.waiting:
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                give_way()


class Refusals:
    """Tells of refused requests, in one line a second at most."""

    def __init__(self) -> None:
        """Begin without any."""
        self._untold = 0
        self._told = 0.0

    def tell(self, why: str) -> None:
        """Tell that a request was refused, for the reason why, and of those since the last line."""
        self._untold += 1
        now = time.monotonic()
        if now - self._told >= 1:
            log.info("Refused requests: %d, the last one: %s", self._untold, why)
            self._untold, self._told = 0, now


def without_end(line: bytes) -> str:
    """Return a line of a request's head, whatever its end."""
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("latin-1")


class Server(StreamServer):
    """The HTTP server of one process, which counts the requests that it is answering."""

    running = 0
    # Whether it takes nobody new, and when it answered the last request since.
    draining = False
    answered = 0.0

    def __init__(
        self,
        listener: socket.socket,
        application: Application,
        memory: Memory,
        fronted: bool = False,
        name: str = "door",
        workers: bool = False,
    ) -> None:
        """Serve application, called name, to the clients of listener, within memory.

        If they are fronted, all come by a proxy that says whose requests it brings
        (X-Forwarded-For), and that shares the connections out among its own clients. With workers,
        other processes serve it, too.
        """
        super().__init__(listener)
        self.application = application
        # What the WSGI environments of all requests have (PEP 3333).
        self.environ: dict[str, Any] = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": name,
            "SERVER_PORT": str(self.address[1]),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": workers,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.fronted = fronted
        self.clients = Clients(memory, files // 2, fronted)
        self.refusals = Refusals()
        self._arrivals = Arrivals(min(BACKLOG, files // 4))
        self._arrived = Event()

    def start(self) -> None:
        """Accept clients, and serve them in turns."""
        super().start()
        gevent.spawn(self._take_turns)

    def _do_read(self) -> None:
        """Accept one client, or many."""
        self.max_accept = MANY if self._waiting() > MANY else 1
        super()._do_read()

    def _waiting(self) -> int:
        """Return how many clients the system has accepted for this program (tcp(7), TCP_INFO)."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACCEPTED.size)
        return int(ACCEPTED.unpack(info)[0])

    def do_handle(self, sock: Any, address: Any) -> None:
        """Have a client wait for its turn; all of a proxy's have one address."""
        if self.fronted:
            super().do_handle(sock, address)
            return
        crowded = self._arrivals.add(address[0] if address else "", (sock, address))
        if crowded is not None:
            crowded[0].close()
        self._arrived.set()

    def _take_turns(self) -> None:
        """Serve who has come, one of each address after the other."""
        while self._arrived.wait():
            turn = self._arrivals.turn()
            if not turn:
                self._arrived.clear()
            for client in turn:
                super().do_handle(*client)
            gevent.sleep(0)

    def handle(self, sock: Any, address: Any) -> None:
        """Serve one client, or tell it that there are too many."""
        with self.clients.memory.grant() as grant:
            handler = Handler(sock, address, self, grant)
            if not self.clients.enter(grant):
                handler.refuse()
                return
            try:
                handler.handle()
            finally:
                self.clients.leave(handler)

    def drain(self) -> None:
        """Take nobody new and answer who is connected, for at most DRAIN_TIMEOUT seconds.

        It ends once nobody is expected to send a request: a proxy may be about to send one by any
        connection that it holds open, and would lose it if that was closed.
        """
        self.draining, self.answered = True, time.monotonic()
        with gevent.Timeout(DRAIN_TIMEOUT, False):
            gevent.sleep(HANDSHAKE)
            while self._waiting() or self._arrivals:
                gevent.sleep(0.01)
            self.close()
            while self.running or (self.clients and time.monotonic() < self.answered + QUIET):
                gevent.sleep(0.01)
            self.clients.part()
            while self.running:
                gevent.sleep(0.01)
        self.close()


Make = Callable[[Memory], tuple[Application, Connection]]


def serve(
    name: str,
    make: Make,
    port: int,
    limit: int,
    workers: int = 1,
    reserve: int = 0,
    fronted: bool = False,
) -> None:
    """Serve the application that make returns, in workers processes, until SIGTERM or SIGINT.

    limit is the container's memory in bytes. Each worker calls make with its share of it, less
    reserve bytes. Metrics are imported in make: a fork would share them between the workers. What
    fronted means, Server says.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Connections are refused until a worker listens.
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.setblocking(False)
    memory = Memory.of(limit, workers, reserve)

    def work(slot: int | None = None) -> None:
        _work(name, make, listener, memory, slot, fronted)

    if workers == 1:
        work()
    else:
        _supervise(work, workers, listener)


def _work(
    name: str,
    make: Make,
    listener: socket.socket,
    memory: Memory,
    slot: int | None,
    fronted: bool,
) -> None:
    if slot is not None:
        shared.claim(slot)
    application, connection = make(memory)
    server = Server(
        listener,
        application,
        memory,
        fronted,
        name,
        slot is not None,
    )
    stop = Event()
    # A container's first process has no default action for signals.
    for number in signal.SIGTERM, signal.SIGINT:
        gevent.signal_handler(number, stop.set)
    connection.start()
    with gevent.Timeout(FRONTED_CONNECT_WAIT if fronted else CONNECT_WAIT, False):
        while not (connection.up or stop.is_set()):
            gevent.sleep(0.01)
    # Of several workers, the first; for the others it changes nothing.
    listener.listen(BACKLOG)
    server.start()
    stop.wait()
    if slot is None:
        _refuse_newcomers(listener)
    connection.finish()
    server.drain()
    connection.stop()


def _refuse_newcomers(listener: socket.socket) -> None:
    """Have the system drop requests for a connection to listener, whose owners will close it.

    Else one that is completed between the last look at those that wait, and the close, would be
    reset together with the request that its client has sent by then. The clients ask again within
    a second, when they are refused.
    """
    program = ctypes.create_string_buffer(NO_NEWCOMERS)
    told = struct.pack("HP", len(NO_NEWCOMERS) // 8, ctypes.addressof(program))
    with suppress(OSError):  # it was closed by an earlier signal
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, told)


def _supervise(work: Callable[[int], None], count: int, listener: socket.socket) -> None:
    """Keep a process that does work in each of count slots, until SIGTERM or SIGINT.

    Each of them gets the signal. They alone are to hold listener then.
    """
    workers: dict[int, int] = {}
    signals = {signal.SIGTERM, signal.SIGINT}
    stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        _refuse_newcomers(listener)
        listener.close()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in signals:
        signal.signal(number, stop)
    while workers or not stopping:
        # A signal between the fork and its entry in workers would miss that worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for slot in set(range(count)).difference(workers.values()):
            if stopping:
                break
            pid = os.fork()
            if pid == 0:
                for number in signals:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                work(slot)
                sys.exit()
            workers[pid] = slot
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        pid, status = os.wait()
        shared.forget(workers.pop(pid))
        if not stopping:
            log.warning("Worker %d ended with %d", pid, os.waitstatus_to_exitcode(status))
            time.sleep(RESPAWN_DELAY)
