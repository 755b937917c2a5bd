"""The subscriber's routes: messages for whoever asks, taken off the queue once they have them."""

import json
import time
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from door import events
from door.direct import Answer, Direct, Headers, Route
from door.server import SOCKET
from door.web import current_event, equip, json_response, read_body
from flask import Flask, Response, abort, request
from gevent.lock import BoundedSemaphore
from werkzeug.exceptions import MethodNotAllowed

from subscriber.broker import Broker
from subscriber.dead import Dead
from subscriber.delivery import Delivery
from subscriber.handover import Handover, has_left
from subscriber.leases import Gone, Leases
from subscriber.settings import Settings

WELCOME = """\
GET /receive takes the next message off the queue:

    curl http://HOST:PORT/receive
    curl 'http://HOST:PORT/receive?wait=20&max=100'

With ?ack=manual it comes with a receipt and is yours for a while: POST /ack takes it off the queue.
GET /dead shows what was given up, and POST /dead/redrive sends it back. /openapi.json says all.
"""
EMPTY = b"No message available\n"
TEXT = "text/plain; charset=utf-8"
NO_STORE = ("Cache-Control", "no-store")
MAX_MESSAGES = 10_000
MAX_WAIT = 20
MAX_REQUEST = 1024 * 1024
# Responses with many messages that are made at a time: each may take MAX_BATCH_BYTES.
MAX_BATCHES = 3


def create_app(broker: Broker, settings: Settings, sink: events.Sink | None = None) -> Flask:
    """Return the app that hands out broker's messages, by default with settings' collector."""
    if sink is None:
        sink = events.start("subscriber", settings.events)
    app = Flask("subscriber", static_folder=None)
    equip(app, broker, sink, settings.access)
    leases = Leases(broker, settings.lease_seconds)
    dead = Dead(broker, settings)
    batches = BoundedSemaphore(MAX_BATCHES)

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    @app.get("/receive")
    def receive() -> Response:
        # Flask would answer HEAD by running this, and a message would be lost.
        if request.method == "HEAD":
            raise MethodNotAllowed(["GET"])
        event = current_event()
        event.fields |= {"event": "receive", "queue": settings.queue}
        most = argument("max", 1, MAX_MESSAGES, absent=0)
        wait = argument("wait", 0, MAX_WAIT, absent=0)
        lease = request.args.get("ack", "auto") == "manual"
        if request.args.get("ack", "auto") not in ("auto", "manual"):
            abort(400, "ack must be auto or manual.")
        as_json = most > 0 or request.accept_mimetypes.best == "application/json"

        asked = time.perf_counter()
        deliveries = broker.get(wait=wait)
        if wait:
            event.waited = time.perf_counter() - asked
        if not deliveries:
            return nothing(as_json)
        many = most > 1
        if many:
            batches.acquire()
        try:
            room = settings.max_batch_bytes - deliveries[0].size if many else 0
            # More for a client that left while it waited would keep them from the others.
            if room > 0 and not has_left(request.environ.get(SOCKET)):
                deliveries += broker.get(most - 1, room)
        except BaseException:
            if many:
                batches.release()
            broker.release(deliveries)
            raise
        release = batches.release if many else None
        headers, body = hand_over(
            request.environ, event, deliveries, as_json, most > 0, lease, release
        )
        # Passed through, so that nothing stands between the server and the body's steps.
        return Response(body, headers=headers, direct_passthrough=True)

    def hand_over(
        environ: dict[str, Any],
        event: events.Event,
        deliveries: list[Delivery],
        as_json: bool = False,
        lines: bool = False,
        lease: bool = False,
        release: Callable[[], None] | None = None,
    ) -> tuple[Headers, Handover]:
        receipts = [leases.grant(one) for one in deliveries] if lease else []

        def settle(written: bool) -> None:
            if release is not None:
                release()
            if not written:
                leases.forget(receipts)
                broker.release(deliveries)
            elif not lease:
                broker.ack(deliveries)

        try:
            if as_json:
                pairs = zip_longest(deliveries, receipts)
                body = b"".join([one.line(receipt) for one, receipt in pairs])
                kind = "application/x-ndjson" if lines else "application/json"
            else:
                body, kind = deliveries[0].body + b"\n", TEXT
            event.fields |= {"messages": len(deliveries)} if lines else deliveries[0].origin
            headers = [("Content-Type", kind), ("Content-Length", str(len(body))), NO_STORE]
            if lease and not as_json:
                headers.append(("X-Receipt", receipts[0]))
            return headers, Handover(body, environ.get(SOCKET), event, settle)
        except BaseException:
            settle(False)
            raise

    def direct_receive(environ: dict[str, Any], event: events.Event) -> Answer | None:
        if environ.get("HTTP_ACCEPT", "*/*") != "*/*":
            return None
        event.fields |= {"event": "receive", "queue": settings.queue}
        if deliveries := broker.get():
            headers, body = hand_over(environ, event, deliveries)
            return 200, headers, body
        return 200, [("Content-Type", TEXT), ("Content-Length", str(len(EMPTY))), NO_STORE], [EMPTY]

    @app.post("/ack")
    def ack() -> Response:
        taken = leases.take(read_receipts({"receipt", "receipts"})[0])
        broker.ack(taken)
        return json_response(200, {"acknowledged": len(taken)})

    @app.post("/reject")
    def reject() -> Response:
        receipts, requeue = read_receipts({"receipt", "receipts", "requeue"})
        taken = leases.take(receipts)
        broker.reject(taken, requeue)
        return json_response(200, {"rejected": len(taken)})

    @app.post("/extend")
    def extend() -> Response:
        count = leases.extend(read_receipts({"receipt", "receipts"})[0])
        return json_response(200, {"extended": count})

    @app.get("/dead")
    def look() -> Response:
        most = argument("max", 1, MAX_MESSAGES, absent=1)
        with batches:
            lines = [one.line() for one in dead.look(most, settings.max_batch_bytes)]
            if not lines:
                return nothing(True)
            headers = [("Content-Type", "application/x-ndjson"), NO_STORE]
            return Response(b"".join(lines), headers=headers)

    @app.post("/dead/redrive")
    def redrive() -> Response:
        most = argument("max", 1, MAX_MESSAGES, absent=MAX_MESSAGES)
        return json_response(200, {"redriven": dead.redrive(most)})

    @app.errorhandler(Gone)
    def gone(error: Gone) -> Response:
        current_event().fields["reason"] = str(error)
        return json_response(410, {"message": str(error), "gone": list(error.receipts)})

    routes: dict[tuple[str, str], Route] = {("GET", "/receive"): direct_receive}
    app.wsgi_app = Direct(app.wsgi_app, routes, sink, settings.access)  # type: ignore[method-assign]
    return app


def nothing(as_json: bool) -> Response:
    """Answer that no message is there."""
    response = Response(EMPTY, mimetype="text/plain")
    if as_json:
        response = Response(status=204)
        del response.headers["Content-Type"]
    response.headers["Cache-Control"] = "no-store"
    return response


def argument(name: str, least: int, most: int, absent: int) -> int:
    """Return the whole number in the query's name, or absent; aborts with 400 out of bounds."""
    raw = request.args.get(name)
    if raw is None:
        return absent
    if not (raw.isascii() and raw.isdigit() and len(raw) < 9 and least <= int(raw) <= most):
        abort(400, f"{name} must be a whole number from {least} to {most}.")
    return int(raw)


def read_receipts(names: set[str]) -> tuple[list[str], bool]:
    """Return the receipts of the request's JSON and its `requeue`; aborts with 400 otherwise."""
    try:
        body = json.loads(read_body(MAX_REQUEST).decode())
    except (ValueError, RecursionError):
        abort(400, "The body is not JSON in UTF-8.")
    if not isinstance(body, dict) or not body.keys() <= names:
        abort(
            400, f"The JSON must be an object with no other names than {', '.join(sorted(names))}."
        )
    if {"receipt", "receipts"} <= body.keys():
        abort(400, "Give 'receipts' or 'receipt', not both.")
    receipts = body.get("receipts", [body["receipt"]] if "receipt" in body else None)
    if not isinstance(receipts, list) or not all(isinstance(one, str) for one in receipts):
        abort(400, "Give 'receipts', a list of strings, or 'receipt', a string.")
    requeue = body.get("requeue", True)
    if not isinstance(requeue, bool):
        abort(400, "'requeue' must be true or false.")
    return receipts, requeue
