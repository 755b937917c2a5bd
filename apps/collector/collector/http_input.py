"""The HTTP input: POST /a/b with a JSON object, or an array of them, is an event of the tag a.b."""

import asyncio
import json
from typing import Any, NoReturn

import h11

from collector import log
from collector.events import Batch, Malformed, Router, now
from collector.forward import peer_of
from collector.limits import Limits
from collector.store import Refused

# Seconds a client may take for a whole request, and between two of them.
_PATIENCE = 30.0
_PIECE = 65536
# Values in one body; each takes a hundred bytes of memory however few it took in the body.
_MOST_VALUES = 100_000


class Rejected(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is answered with an error's status."""

    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        """Answer status and reason with headers besides."""
        super().__init__(reason)
        self.status = status
        self.headers = headers


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def records(body: bytes) -> list[dict[str, Any]]:
    """Return the records in body, a JSON object or an array of objects; Rejected otherwise."""
    if sum(map(body.count, (b"{", b"[", b","))) > _MOST_VALUES:
        raise Rejected(413, f"the body has more than {_MOST_VALUES} values")
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        # The text of the error may quote the body.
        raise Rejected(400, "the body is no JSON in UTF-8") from None
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(record, dict) for record in found):
        raise Rejected(400, "the body is neither a JSON object nor an array of objects")
    return found


class Server:
    """The HTTP server of one source."""

    def __init__(self, limits: Limits, longest: int) -> None:
        """Take bodies of at most longest bytes."""
        self._limits = limits
        self._longest = longest

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until its end."""
        connection = Connection(reader, writer, self._limits, self._longest)
        try:
            if self._limits.enter(connection, connection.peer):
                while await connection.exchange(self):
                    pass
        except (OSError, h11.LocalProtocolError):
            # It has gone, or does not read its answers: what waits for it would wait for ever.
            connection.refused = True
        finally:
            self._limits.leave(connection)
            writer.transport.abort() if connection.refused else writer.close()

    def check(self, request: h11.Request) -> str:
        """Return what the request's head asks for; Rejected when it is not to be taken."""
        raise NotImplementedError

    def answer(self, asked: str, body: bytes) -> bytes:
        """Return the answer, JSON or nothing, to what check returned; Rejected."""
        raise NotImplementedError


class HttpInput(Server):
    """The server of a source that takes events."""

    def __init__(self, router: Router, limits: Limits, longest: int) -> None:
        """Take bodies of at most longest bytes for router."""
        super().__init__(limits, longest)
        self._router = router

    def check(self, request: h11.Request) -> str:
        """Return the tag."""
        headers = dict(request.headers)
        path, query = path_of(request)
        if request.method != b"POST":
            raise Rejected(405, "only POST is known here", ("Allow", "POST"))
        tag = ".".join(path.removeprefix("/").split("/"))
        if not path.startswith("/") or not tag:
            raise Rejected(404, "the path must be the tag, as /alerts")
        if query:
            raise Rejected(400, "no parameters are known here")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        coding = headers.get(b"content-encoding", b"identity")
        if kind != b"application/json" or coding != b"identity":
            raise Rejected(415, "only application/json, not compressed, is known here")
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            raise Rejected(411, "the request needs a Content-Length")
        return tag

    def answer(self, asked: str, body: bytes) -> bytes:
        """Put the body's events into the staged chunk."""
        batch = Batch(self._router)
        moment = now()
        try:
            batch.add(asked, [(*moment, record) for record in records(body)])
            batch.write()
        except Malformed as error:
            raise Rejected(400, str(error)) from None
        except Refused as error:
            # Alertmanager tries again after a 5xx.
            raise Rejected(503, str(error), ("Retry-After", "5")) from None
        return b""


class Connection:
    """One client."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: Limits,
        longest: int,
    ) -> None:
        """Talk over reader and writer."""
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._longest = longest
        self._http = h11.Connection(h11.SERVER)
        self.peer = peer_of(writer.transport)
        self.refused = False

    def refuse(self, reason: str) -> None:
        """Say the reason in one line and end the connection."""
        log.warn(f"closed {self.peer} (HTTP): {reason}")
        self.refused = True
        self._writer.transport.abort()

    def close(self) -> None:
        """End the connection."""
        self._writer.close()

    async def exchange(self, server: Server) -> bool:
        """Answer one request by server; return whether another may follow."""
        try:
            try:
                async with asyncio.timeout(_PATIENCE):
                    request = await self._event()
                    if not isinstance(request, h11.Request):
                        return False  # the client has closed
                    asked = server.check(request)
                    body = await self._body(request)
                answer = server.answer(asked, body)
            except h11.RemoteProtocolError as error:
                raise Rejected(error.error_status_hint, str(error)) from None
        except TimeoutError:
            # trailing_data: what has come of a head without its end.
            if self._http.their_state is not h11.IDLE or self._http.trailing_data[0]:
                self.refuse(f"its request did not end within {_PATIENCE:g} s")
            return False
        except Rejected as error:
            log.warn(f"answered {error.status} to {self.peer} (HTTP): {error}")
            text = f"{error.status} {log.visible(str(error))}\n".encode()
            await self._answer(error.status, text, *error.headers)
        else:
            kind = "application/json" if answer else "text/plain"
            await self._answer(200, answer, kind=kind)
        finally:
            self._limits.hold(self, 0)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                self._writer.write(self._http.send(go_on) or b"")
            self._http.receive_data(await self._reader.read(_PIECE))
            if self.refused:
                # What had come before that must count no more.
                raise ConnectionAbortedError
        return event

    async def _body(self, request: h11.Request) -> bytes:
        headers = dict(request.headers)
        if int(headers.get(b"content-length", b"0")) > self._longest:
            raise Rejected(413, f"the body has more than {self._longest} bytes")
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > self._longest:
                raise Rejected(413, f"the body has more than {self._longest} bytes")
            self._limits.hold(self, len(body))
        return bytes(body)

    async def _answer(
        self, status: int, body: bytes, *headers: tuple[str, str], kind: str = "text/plain"
    ) -> None:
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        fields = [("Content-Type", kind), ("Content-Length", str(len(body))), *headers]
        if self._http.their_state is not h11.DONE:
            # What is left of the request is not read.
            fields.append(("Connection", "close"))
        for event in (
            h11.Response(status_code=status, headers=fields),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self._writer.write(self._http.send(event) or b"")
        async with asyncio.timeout(_PATIENCE):
            await self._writer.drain()


def path_of(request: h11.Request) -> tuple[str, str]:
    """Return the target's path and what follows its question mark."""
    path, _, query = request.target.decode("ascii").partition("?")
    return path, query
