# mypy: disable-error-code=no-untyped-call
"""The HTTP server of a door: gevent's pywsgi with limits, and a graceful end.

A request costs a greenlet, not a thread, so that slow clients and long polls keep nobody waiting.
Body, Handler and Server replace parts of pywsgi, some of them private; each says why. The test
test_gevent_calls_what_is_replaced fails when another gevent no longer calls one of them.
"""

import ctypes
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
from http import HTTPStatus
from secrets import token_hex
from typing import Any, Protocol

import gevent
from gevent.event import Event
from gevent.pywsgi import Input, WSGIHandler, WSGIServer

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

HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\0-\x08\n-\x1f\x7f]*)\r?\n")
# http://host:port of a target in absolute form (RFC 9112, section 3.2.2).
AUTHORITY = re.compile(r"^https?://[^/?#]+", re.IGNORECASE)
LENGTH = re.compile(r"[0-9]{1,1000}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_CHUNK_LINE = 256
ONCE = ("content-length", "content-type", "transfer-encoding", "host", "authorization")


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


class Headers:
    """A request's headers: what pywsgi asks of email.message, read in a fraction of its time."""

    status = ""

    def __init__(self, rfile: Any, _seekable: int) -> None:
        """Read from rfile up to the empty line; raises Refused."""
        self.headers: list[str] = []
        self._values: dict[str, str] = {}
        self.size = 0
        while (line := rfile.readline(MAX_HEADER_BYTES - self.size + 1)) not in (b"\r\n", b"\n"):
            self.size += len(line)
            if self.size > MAX_HEADER_BYTES or len(self.headers) == MAX_HEADERS:
                raise Refused(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes are taken.",
                )
            # A line without an end may be long, and the pattern is slow: it is not tried.
            match = HEADER.fullmatch(line) if line.endswith(b"\n") else None
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
        if length is not None and not LENGTH.fullmatch(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length is not a number of bytes.")


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
        """Read nothing: handle_one_response ends the connection where a part is unread."""

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
    """One client's connection, and what door.call knows of its client."""

    MessageClass = Headers
    wsgi_input: Any
    path: Any
    status: Any
    response_headers: Any
    # gevent logs other errors as this program's. A time-out has this text in place of an errno.
    ignored_socket_errors: Any = (*WSGIHandler.ignored_socket_errors, "timed out")

    def __init__(self, sock: Any, address: Any, server: Any, grant: Grant) -> None:
        """Take the client of sock, which comes from address, and hold its memory by grant."""
        super().__init__(sock, address, server)
        self._peer = self.address = str(address[0]) if address else ""
        self.grant = grant
        self.let_go = False
        self._writing = False

    def handle(self) -> None:
        """Serve the client's requests, one after the other."""
        self.socket.settimeout(CLIENT_TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle()

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

    def read_requestline(self) -> str:
        """Read the first line of a request; an empty one before it is skipped (RFC 9112, 2.2)."""
        self.server.clients.idle.begin(self)
        # A line that is there already needs no timer.
        if b"\n" in self.rfile.peek():
            return self._read_line()
        with gevent.Timeout(CLIENT_TIMEOUT, TOO_SLOW):
            return self._read_line()

    def _read_line(self) -> str:
        line = str(super().read_requestline())
        return str(super().read_requestline()) if line in ("\r\n", "\n") else line

    def read_request(self, raw_requestline: str) -> bool:
        """Read the request's headers; raises ValueError or Refused."""
        if raw_requestline.count(" ") != 2:
            raise Refused(HTTPStatus.BAD_REQUEST, "The request line is not METHOD TARGET VERSION.")
        if b"\r\n\r\n" in self.rfile.peek():
            super().read_request(raw_requestline)
        else:
            self._read_slowly(raw_requestline)
        self.server.clients.idle.end(self)
        if self.headers.size > SMALL_HEADERS:
            self.grant.resize(CONNECTION + HEADER_COPIES * self.headers.size)
        if self.request_version == "HTTP/1.1" and self.headers.get("host") is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "A request of HTTP/1.1 has the header Host.")
        if not self.path.startswith("/"):
            self.path = AUTHORITY.sub("", self.path, count=1) or "/"
        return True

    def _read_slowly(self, raw_requestline: str) -> None:
        """Read headers that come by and by, within the time limit and holding memory for most."""
        self.grant.add_now(HEADER_COPIES * MAX_HEADER_BYTES)
        with gevent.Timeout(CLIENT_TIMEOUT, TOO_SLOW):
            super().read_request(raw_requestline)
        self.grant.resize(CONNECTION)

    def get_environ(self) -> dict[str, Any]:
        """Return the WSGI environment with the client in it."""
        environ: dict[str, Any] = super().get_environ()
        if self.server.fronted:
            # Nothing for the application, which sends headers X-… with a message.
            told = environ.pop("HTTP_X_FORWARDED_FOR", "")
            self.address = told.rpartition(",")[2].strip() or self._peer
        environ[CLIENT] = self
        body = self.wsgi_input
        self.wsgi_input = Body(body.rfile, body.content_length, body.socket, body.chunked_input)
        environ["wsgi.input"] = self.wsgi_input
        return environ

    def handle_one_response(self) -> None:
        """Answer one request; the connection ends afterwards where the answer says so."""
        self.server.running += 1
        try:
            super().handle_one_response()
            if self.wsgi_input.unread:
                self.close_connection = True
                self._linger()
        finally:
            self.server.running -= 1
            if self.server.draining:
                self.server.answered = time.monotonic()
            self.grant.resize(CONNECTION)

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
        # A proxy, told nothing, would send its next request while the connection is closed.
        if self.close_connection or self.server.draining or self.wsgi_input.unread:
            self.close_connection = True
            others = [pair for pair in self.response_headers if pair[0].lower() != b"connection"]
            self.response_headers = [*others, (b"Connection", b"close")]
        lines = [b"HTTP/1.1 " + self.status]
        lines += [b"%b: %b" % header for header in self.response_headers]
        head = b"\r\n".join([*lines, b"\r\n"])
        if self.response_use_chunked or len(data) > JOINED:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + data)

    def _sendall(self, data: bytes) -> None:
        """Send data; a client who does not take them at once is waited for, and may be let go."""
        try:
            sent = os.write(self.socket.fileno(), data)
        except OSError:  # there is no room now, or sendall tells what it is
            sent = 0
        if sent < len(data):
            self._writing = True
            with self.waiting:
                super()._sendall(memoryview(data)[sent:])
            self._writing = False

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes]:
        """Tell the client what was wrong with its request, in the doors' own shape."""
        if isinstance(ex, TimeoutError):
            ex = TOO_SLOW
        if self.let_go or isinstance(ex, OutOfMemory):
            ex = BUSY
        self.server.clients.idle.end(self)
        self.grant.resize(CONNECTION)
        status = self._tell(ex)
        if not self.let_go:  # nothing more of it is read then
            self._linger()
        self.close_connection = True
        return str(int(status)), b""

    def _tell(self, ex: Exception) -> HTTPStatus:
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
        return status

    def _linger(self) -> None:
        """Read on for a while: closing before would reset the connection and take the answer."""
        with suppress(OSError), gevent.Timeout(LINGER, False), self.waiting:
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                gevent.sleep(0)


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


class Server(WSGIServer):
    """The HTTP server of one process, which counts the requests that it is answering."""

    handler_class: Any = Handler
    running = 0
    # Whether it takes nobody new, and when it answered the last request since.
    draining = False
    answered = 0.0

    def __init__(
        self,
        listener: socket.socket,
        application: Any,
        memory: Memory,
        fronted: bool = False,
        **kw: Any,
    ) -> None:
        """Serve application to the clients of listener, within memory.

        If they are fronted, all come by a proxy that says whose requests it brings
        (X-Forwarded-For), and that shares the connections out among its own clients.
        """
        super().__init__(listener, application, **kw)
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
        log=None,
        error_log=logging.getLogger("door.http"),
        # Else the server asks the DNS for its own name before it starts.
        environ={"SERVER_NAME": name, "wsgi.multiprocess": slot is not None},
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
