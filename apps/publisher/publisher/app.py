"""The publisher's routes: a 201 means that the broker has every message of the request."""

from collections.abc import Sequence
from typing import Any, Protocol

from door import events
from door.direct import Answer, Direct, Route, json_answer
from door.web import current_event, equip, json_response, read_body
from flask import Flask, Response, request

from publisher import payload
from publisher.broker import Message, Unconfirmed
from publisher.settings import Settings

WELCOME = """\
POST a message to /data, as the form field `message` or as JSON {"message": "..."}:

    curl --data-urlencode 'message=Hello' http://HOST:PORT/data
    curl --json '{"message": "Hello"}' http://HOST:PORT/data

any bytes to /messages, and many messages to /batch, one JSON string a line:

    curl --data-binary @picture.png --header 'Content-Type: image/png' http://HOST:PORT/messages
    printf '"one"\\n"two"\\n' | curl --data-binary @- http://HOST:PORT/batch

201 means that the broker has it; 503 that it may not: send it again later. /openapi.json says all.
"""


class Publisher(Protocol):
    """What the routes need of a broker."""

    @property
    def up(self) -> bool:
        """Whether a message can be published now."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Return once the broker confirmed all of messages; Unconfirmed otherwise."""


def create_app(settings: Settings, broker: Publisher, sink: events.Sink | None = None) -> Flask:
    """Return the app that publishes to broker, by default with the collector of settings."""
    if sink is None:
        sink = events.start("publisher", settings.events)
    app = Flask("publisher", static_folder=None)
    equip(app, broker, sink, settings.access)

    def begin(event: events.Event) -> events.Event:
        event.fields |= {"event": "publish", "queue": settings.routing_key}
        return event

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    @app.post("/data")
    def data() -> Response:
        event = begin(current_event())
        text, message = payload.text_message(request, settings.max_message_bytes, event.request_id)
        # Here, as the event of a message that the broker may not have needs its id most.
        event.fields["message_id"] = message.id
        broker.publish([message])
        return json_response(201, {"Message sent": text})

    @app.post("/messages")
    def messages() -> Response:
        event = begin(current_event())
        message = payload.raw_message(request, settings.max_message_bytes, event.request_id)
        event.fields["message_id"] = message.id
        broker.publish([message])
        response = json_response(201, {"id": message.id})
        response.headers["Message-Id"] = message.id
        return response

    @app.post("/batch")
    def batch() -> Response:
        event = begin(current_event())
        sending = payload.batch(read_body(settings.max_batch_bytes), settings, event.request_id)
        event.fields["messages"] = len(sending)
        try:
            broker.publish(sending)
        except Unconfirmed as error:
            event.fields["certain"] = error.certain
            error.details = {"certain": error.certain}
            raise
        return json_response(201, {"sent": len(sending)})

    def direct_data(environ: dict[str, Any], event: events.Event) -> Answer | None:
        begin(event)
        text = payload.plain_form(environ, settings.max_message_bytes)
        if text is None:
            return None
        message = Message(
            text.encode(), payload.uuid7(), headers={events.REQUEST_ID: event.request_id}
        )
        event.fields["message_id"] = message.id
        broker.publish([message])
        return json_answer(201, {"Message sent": text})

    routes: dict[tuple[str, str], Route] = {("POST", "/data"): direct_data}
    app.wsgi_app = Direct(app.wsgi_app, routes, sink, settings.access)  # type: ignore[method-assign]
    return app
