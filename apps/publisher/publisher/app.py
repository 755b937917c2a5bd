"""The publisher's routes: a 201 means that the broker has every message of the request."""

from collections.abc import Sequence
from typing import Protocol

from common import events
from door.call import Answer, Call, Routes, json_answer
from door.web import equip
from flask import Flask, Response

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
        sink = events.start("publisher", settings.events.host, settings.events.port)
    app = Flask("publisher", static_folder=None)

    def begin(call: Call) -> None:
        call.event.fields |= {"event": "publish", "queue": settings.routing_key}

    def publish(call: Call, message: Message) -> None:
        # Here, as the event of a message that the broker may not have needs its id most.
        call.event.fields["message_id"] = message.id
        broker.publish([message])

    def data(call: Call) -> Answer:
        begin(call)
        text, message = payload.text_message(call, settings.max_message_bytes)
        publish(call, message)
        return json_answer(201, {"Message sent": text})

    def messages(call: Call) -> Answer:
        begin(call)
        message = payload.raw_message(call, settings.max_message_bytes)
        publish(call, message)
        return json_answer(201, {"id": message.id}, [("Message-Id", message.id)])

    def batch(call: Call) -> Answer:
        begin(call)
        sending = payload.batch(call, settings)
        call.event.fields["messages"] = len(sending)
        try:
            broker.publish(sending)
        except Unconfirmed as error:
            call.event.fields["certain"] = error.certain
            error.details = {"certain": error.certain}
            raise
        return json_answer(201, {"sent": len(sending)})

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    routes: Routes = {
        ("POST", "/data"): data,
        ("POST", "/messages"): messages,
        ("POST", "/batch"): batch,
    }
    equip(app, broker, sink, settings.access, routes)
    return app
