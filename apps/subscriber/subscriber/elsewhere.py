"""What doors of other hosts know better: receipts that they gave, and what their brokers tell."""

import errno
import json
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from http import client as http
from pathlib import Path
from select import POLLIN
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any
from urllib.parse import quote, urlsplit

import gevent
import gevent.socket
import gevent.ssl
from common.events import REQUEST_ID
from door.call import Answer, Call
from door.clients import CONNECTION
from door.memory import RETRY_AFTER
from door.web import stranger
from gevent.lock import BoundedSemaphore
from prometheus_client import Counter
from werkzeug.exceptions import Forbidden, HTTPException, ServiceUnavailable

from subscriber.handover import GONE, SENDS_NO_MORE, shows
from subscriber.leases import Gone, Leases
from subscriber.settings import ClusterSettings

log = logging.getLogger(__name__)

PASSED_ON = Counter(
    "passed_on_requests",
    "Requests that were passed on to doors of other hosts",
    ["door", "status"],
)

# A front leaves a request with this header to the door of its own host. Fronts set it, too.
HOP = "X-Stack-Hop"
# A door passes nothing on that came with this header, which doors alone set: so nothing circles.
DOOR = "X-Stack-Door"
# Seconds until somebody is there, and until all that a request passes on is answered.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 3.0, 25.0
# Seconds until the next door is asked what any of them may know; a door asks its broker for 4.
LOOK_TIMEOUT = 6.0
# Connections to one door at a time. Further requests wait, as each is done within milliseconds.
PLACES = 8
# Seconds for which a connection is kept for the next request; a front keeps it for 30.
KEPT = 10.0
# Seconds for which nobody is looked for again where nobody was.
ABSENT = 1.0
# What the system says where nobody is, besides that the time is over.
NOBODY = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)
# Bytes that an answer may have besides the receipts that were sent.
ROOM = 4096
# Most bytes of memory that a byte of what is sent takes, with the answer once it is parsed.
PARSED = 24


class Absent(Exception):  # noqa: N818 - a state of a door, not a fault
    """Nobody is there; nothing was sent."""


class Late(Exception):  # noqa: N818 - a state of a door, not a fault
    """The answer does not come in time."""


class Unknown(ServiceUnavailable):
    """What a door did with the receipts that it gave is not known: 503 with Retry-After."""

    def __init__(self, name: str, fault: str) -> None:
        """Say that the door of name does not tell, because of fault."""
        super().__init__(
            f"The door of {name!r}, which gave some of the receipts, cannot be asked ({fault}); "
            "what became of these is unknown.",
            retry_after=RETRY_AFTER,
        )


class Door:
    """Another host's door, asked over HTTPS by a few connections that are kept for a moment."""

    def __init__(self, url: str, ca_file: Path) -> None:
        """Ask at url those whom the CAs of ca_file know; it is read anew for each connection."""
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 443
        self._ca_file = ca_file
        self._places = BoundedSemaphore(PLACES)
        self._idle: list[tuple[float, http.HTTPConnection]] = []
        # Why nobody is there, and until when that is taken for granted.
        self._absent, self._until = "", 0.0

    def ask(
        self, path: str, body: bytes, headers: Mapping[str, str], room: int = ROOM
    ) -> tuple[int, bytes]:
        """Return the answer's status and body, which may have room bytes more than was sent.

        Without a body to send it is a GET. Raises Absent, OSError and http.HTTPException.
        """
        with self._places:
            connection = self._kept() or self._connect()
            try:
                connection.request("POST" if body else "GET", path, body or None, headers)
                answer = connection.getresponse()
                limit = len(body) + room
                told = answer.read(limit + 1)
                if len(told) > limit:
                    raise http.HTTPException(f"its answer has more than {limit} bytes")
            except BaseException:
                connection.close()
                raise
            if answer.will_close:
                connection.close()
            else:
                self._idle.append((time.monotonic(), connection))
            return answer.status, told

    def _kept(self) -> http.HTTPConnection | None:
        """Return a connection that is open and has nothing to tell."""
        while self._idle:
            since, connection = self._idle.pop()
            fresh = time.monotonic() - since < KEPT
            if fresh and not shows(connection.sock, POLLIN | GONE | SENDS_NO_MORE):
                return connection
            connection.close()
        return None

    def _connect(self) -> http.HTTPConnection:
        if time.monotonic() < self._until:
            raise Absent(self._absent)
        try:
            sock = gevent.socket.create_connection((self._host, self._port), CONNECT_TIMEOUT)
        except OSError as error:
            if not isinstance(error, TimeoutError) and error.errno not in NOBODY:
                raise
            self._absent, self._until = str(error), time.monotonic() + ABSENT
            raise Absent(self._absent) from None
        try:
            sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            # As other programs do: a CA in the file need be no root.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.load_verify_locations(self._ca_file)
            # gevent would leave it open where the handshake is cut short.
            sock = context.wrap_socket(
                sock, server_hostname=self._host, do_handshake_on_connect=False
            )
            sock.do_handshake()
            sock.settimeout(None)  # whoever asks has a limit for all of it
        except BaseException:
            sock.close()
            raise
        connection = http.HTTPConnection(self._host, self._port)
        connection.sock = sock
        return connection


class Elsewhere:
    """Settles receipts where they were given, and looks where somebody knows."""

    def __init__(self, settings: ClusterSettings) -> None:
        """Know the doors of settings; without any, all receipts are taken for this door's."""
        self._name = settings.name
        self._doors = {name: Door(url, settings.ca_file) for name, url in settings.doors.items()}
        # The last fault of each door that has one.
        self._faults: dict[str, str] = {}

    def settle(
        self,
        call: Call,
        leases: Leases,
        receipts: list[str],
        here: Callable[[list[str]], int],
        more: Mapping[str, object] | None = None,
    ) -> int:
        """Settle receipts of call, those of leases by here; return how many. Others get more, too.

        Each door settles all of its own, or none. First it is seen that all of here can be settled,
        and they get the time for it; one other door after the other follows, and here comes last.
        Raises Gone, Unknown, Unauthorized and Forbidden for the first that does not settle its own:
        `done` has the receipts of the doors before it, and to those after it nothing was done.
        """
        own, others = self._sort(call, receipts)
        if not others:
            return here(receipts)
        call.event.fields["passed_on"] = ",".join(others)
        leases.extend(own)
        done: list[str] = []
        try:
            with gevent.Timeout(ANSWER_TIMEOUT, Late(f"no answer within {ANSWER_TIMEOUT:g} s")):
                for name, some in others.items():
                    self._pass_on(call, name, some, more or {})
                    done += some
            return here(own) + len(done)
        except HTTPException as error:
            if done:
                error.details = {  # type: ignore[attr-defined]
                    **getattr(error, "details", {}),
                    "done": done,
                }
            raise

    def look(self, call: Call, room: int) -> Answer | None:
        """Answer call as the first other door that answers 200, with at most room bytes.

        None where none does, and for what a door has passed on.
        """
        if call.header(DOOR) is not None:
            return None
        for name, door in self._doors.items():
            call.hold(CONNECTION)
            call.event.fields["passed_on"] = name
            status, fault = 503, ""
            try:
                with gevent.Timeout(LOOK_TIMEOUT, Late(f"no answer within {LOOK_TIMEOUT:g} s")):
                    status, told = door.ask(path_of(call), b"", self._headers(call), room)
            except (Absent, Late, OSError, http.HTTPException) as error:
                fault = str(error) or type(error).__name__
            PASSED_ON.labels(name, status).inc()
            self._note(name, fault)
            if status == 200:
                headers = [("Content-Type", "application/json"), ("Content-Length", str(len(told)))]
                return Answer(200, headers, [told])
        return None

    def _sort(self, call: Call, receipts: list[str]) -> tuple[list[str], dict[str, list[str]]]:
        """Return the receipts that are to be settled here, and those of other doors by name."""
        own: list[str] = []
        others: dict[str, list[str]] = {}
        if not self._doors or call.header(DOOR) is not None:
            return receipts, others
        for receipt in dict.fromkeys(receipts):
            name = receipt.partition(".")[0]
            (others.setdefault(name, []) if name in self._doors else own).append(receipt)
        return own, others

    def _pass_on(
        self, call: Call, name: str, receipts: list[str], more: Mapping[str, object]
    ) -> None:
        """Have receipts settled by the door of name, or raise what it answers."""
        body = json.dumps({"receipts": receipts, **more}).encode()
        gone: list[str] = []
        fault = ""
        try:
            call.hold(CONNECTION + PARSED * len(body))
            status, told = self._doors[name].ask(path_of(call), body, self._headers(call))
            if status == 410:
                gone = read_gone(told, receipts)
            elif status not in (200, 401, 403):
                status, fault = 503, f"HTTP {status}"
        except Absent as error:
            status, gone, fault = 410, receipts, str(error)
        except (Late, OSError, http.HTTPException, ValueError) as error:
            status, fault = 503, str(error) or type(error).__name__
        PASSED_ON.labels(name, status).inc()
        self._note(name, fault)
        if status == 503:
            raise Unknown(name, fault)
        if gone:
            raise Gone(gone)
        if status == 401:
            raise stranger("subscriber")
        if status == 403:
            raise Forbidden(f"The door of {name!r}, which gave some of the receipts, answers 403.")

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {
            HOP: self._name,
            DOOR: self._name,
            REQUEST_ID: call.event.request_id,
            "Content-Type": "application/json",
        }
        if authorization := call.header("Authorization"):
            headers["Authorization"] = authorization
        return headers

    def _note(self, name: str, fault: str) -> None:
        """Log each new fault of a door once."""
        if fault and fault != self._faults.get(name):
            log.warning("The door of %s cannot be asked: %s", name, fault)
        self._faults[name] = fault


def path_of(call: Call) -> str:
    """Return the path of call as it is written; WSGI has its bytes as Latin-1 (PEP 3333)."""
    return quote(call.environ["PATH_INFO"].encode("latin-1"))


def read_gone(told: bytes, receipts: list[str]) -> list[str]:
    """Return which of receipts are gone, as a door's 410 tells; ValueError when it names none."""
    try:
        named: Any = set(json.loads(told)["gone"])
    except (ValueError, TypeError, KeyError, RecursionError):
        named = set()
    gone = [receipt for receipt in receipts if receipt in named]
    if not gone:
        raise ValueError("its answer makes no sense")
    return gone
