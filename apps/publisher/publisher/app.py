"""The publisher's HTTP door: `POST /data` answers 201 once the broker has the message."""

import json
import logging
import uuid
from typing import Protocol
from urllib.parse import parse_qsl

from door import events
from door.environment import Environment
from door.web import current_event, equip, json_response
from flask import Flask, Request, Response, abort, request

from publisher.broker import Broker
from publisher.settings import Settings

WELCOME = """\
POST a message to /data, as the form field `message` or as JSON {"message": "..."}:

    curl --data-urlencode 'message=Hello' http://HOST:PORT/data
    curl --json '{"message": "Hello"}' http://HOST:PORT/data

201 means that the broker has it; 503 that it may not: send it again later.
"""
# Bounds the work that a hostile form can cause.
MAX_FIELDS = 100
MISSING = object()


class Publisher(Protocol):
    """What the routes need of a broker."""

    @property
    def up(self) -> bool:
        """Whether a message can be published now."""

    def publish(self, body: bytes, message_id: str, request_id: str) -> None:
        """Return once the broker confirmed body; BrokerUnavailable otherwise."""


def create_app(
    settings: Settings | None = None,
    broker: Publisher | None = None,
    sink: events.Sink | None = None,
) -> Flask:
    """Return the app, by default with the environment's settings, a broker and a collector."""
    settings = settings or Settings.read(Environment())
    if broker is None:
        logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")
        # The Broker logs what matters of it, in one line an event.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        broker = Broker(settings)
    if sink is None:
        sink = events.start("publisher", settings.events)
    limit = settings.max_message_bytes

    app = Flask("publisher", static_folder=None)
    # A byte takes up to 6 in JSON (\u0000) and 3 percent-encoded, and there is some wrapping.
    app.config["MAX_CONTENT_LENGTH"] = 6 * limit + 64 * 1024
    app.config["MAX_FORM_MEMORY_SIZE"] = app.config["MAX_CONTENT_LENGTH"]
    app.config["MAX_FORM_PARTS"] = MAX_FIELDS
    equip(app, broker, sink)

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    @app.post("/data")
    def publish() -> Response:
        event = current_event()
        event.fields |= {"event": "publish", "queue": settings.routing_key}
        message = read_message(request)
        try:
            body = message.encode()
        except UnicodeEncodeError:
            abort(400, "The message has a lone surrogate, which UTF-8 cannot carry.")
        if len(body) > limit:
            abort(413, f"The message has {len(body)} bytes in UTF-8; at most {limit} are taken.")
        # Here, as the event of a message that the broker may not have needs its id most.
        message_id = event.fields["message_id"] = str(uuid.uuid4())
        broker.publish(body, message_id, event.request_id)
        return json_response(201, {"Message sent": message})

    return app


def read_message(request: Request) -> str:
    """Return the request's message, unchanged; aborts with 400, 413 or 415 otherwise."""
    if request.mimetype == "application/x-www-form-urlencoded":
        message = _from_form(request)
    elif request.mimetype == "multipart/form-data":
        message = _from_multipart(request)
    elif request.is_json:
        message = _from_json(request)
    else:
        abort(415, "Send a form, or JSON as application/json.")
    if message is MISSING:
        abort(400, "Payload is missing parameter 'message'.")
    if not isinstance(message, str):
        abort(400, "Parameter 'message' must be a string.")
    return message


def _body(request: Request) -> bytes:
    """Return the whole body; one with a length over the limit is refused unread, by Flask."""
    body = request.get_data()
    # A chunked one has no length to refuse: werkzeug cuts it off at the limit and says nothing.
    if request.max_content_length and len(body) >= request.max_content_length:
        abort(413)
    return body


def _from_form(request: Request) -> object:
    """Read an urlencoded form; Flask's own parser takes a third of the request's time."""
    try:
        fields = parse_qsl(
            _body(request).decode(),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except UnicodeDecodeError:
        abort(400, "The form is not UTF-8.")
    except ValueError:
        abort(400, f"The form has more than {MAX_FIELDS} fields.")
    return next((value for name, value in fields if name == "message"), MISSING)


def _from_multipart(request: Request) -> object:
    raw = _body(request)
    message = request.form.get("message")
    if message is None:
        return MISSING
    # Flask puts U+FFFD for what it cannot decode; a real one is in the body as it is.
    if "\ufffd" in message and message.encode() not in raw:
        abort(400, "The form is not UTF-8.")
    return message


def _from_json(request: Request) -> object:
    try:
        body = json.loads(_body(request).decode())
    # Nesting that is too deep is a RecursionError, all else a ValueError.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            # It quotes a byte of the body, which is for the client only.
            current_event().fields["reason"] = "The body is not UTF-8."
        abort(400, f"The body is not JSON in UTF-8: {error}")
    if not isinstance(body, dict):
        abort(400, "The JSON must be an object.")
    return body.get("message", MISSING)
