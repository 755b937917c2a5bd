"""The subscriber's routes, and the response that acknowledges its message once written."""

import errno
import select
from collections.abc import Iterator
from socket import socket

from door import events
from door.web import current_event, equip
from flask import Flask, Response, request
from pika.spec import BasicProperties
from werkzeug.exceptions import MethodNotAllowed

from subscriber.broker import Broker, Delivery, Settings

# Where the server puts the client's socket into the WSGI environment.
SOCKET = "subscriber.socket"

WELCOME = "Welcome. GET /receive takes the next message off the queue.\n"
EMPTY = "No message available\n"
HUNG_UP = "the client hung up"


class Handover(Iterator[bytes]):
    """One message as a response body; every way it can end settles the delivery and is told.

    PEP 3333 calls close() after success and failure alike. Only the step after the last chunk
    tells them apart: pywsgi asks for it once `sendall` returned. A generator would not do, as
    the finally of one that never started does not run.
    """

    def __init__(
        self, broker: Broker, delivery: Delivery, client: socket | None, event: events.Event
    ) -> None:
        """Hand delivery to client (None: nobody to look at, as in a test); event is told then."""
        event.deferred = True
        self._event = event
        self._broker = broker
        self._delivery = delivery
        self._client = client
        self._given = False
        self._settled = False

    def __next__(self) -> bytes:
        """Return the body; when asked for more, acknowledge and stop.

        Raises ConnectionResetError when the client is known to have gone without its message.
        """
        if not self._given:
            # The system would take a small body even for a client that left while it waited.
            self._check_client(select.POLLRDHUP)
            self._given = True
            return self._delivery.body + b"\n"
        # A client that read everything may have closed by now; a reset is one that did not.
        self._check_client(select.POLLERR)
        if not self._settled:
            self._settled = True
            self._broker.ack(self._delivery)
            self._event.tell(200)
        raise StopIteration

    def close(self) -> None:
        """Release the message unless it was acknowledged."""
        if not self._settled:
            self._settled = True
            self._broker.release(self._delivery)
            self._event.fields["reason"] = HUNG_UP
            self._event.tell(200, level="warning")

    def _check_client(self, sign: int) -> None:
        if self._client is not None:
            poll = select.poll()
            poll.register(self._client.fileno(), sign)
            if any(seen & (sign | select.POLLERR) for _, seen in poll.poll(0)):
                raise ConnectionResetError(errno.ECONNRESET, HUNG_UP)


def create_app(broker: Broker, settings: Settings, sink: events.Sink | None = None) -> Flask:
    """Return the WSGI app that hands out broker's messages, by default with a collector."""
    if sink is None:
        sink = events.start("subscriber", settings.events)
    app = Flask(__name__)
    equip(app, broker, sink)

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
        delivery = broker.get()
        if delivery is None:
            response = Response(EMPTY, mimetype="text/plain")
        else:
            event.fields |= origin(delivery.properties)
            body = Handover(broker, delivery, request.environ.get(SOCKET), event)
            # Passed through, so that nothing stands between the server and the body's steps.
            response = Response(body, mimetype="text/plain", direct_passthrough=True)
            response.content_length = len(delivery.body) + 1
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def origin(properties: BasicProperties) -> dict[str, events.Value]:
    """Return what a message tells of itself; any program may have published it, with anything."""
    # pika gives bytes for an id that is not UTF-8.
    message_id = properties.message_id
    return {
        "message_id": message_id if isinstance(message_id, str) and message_id else None,
        "publish_request_id": events.good_id((properties.headers or {}).get(events.REQUEST_ID)),
    }
