"""The subscriber's routes, and the response that acknowledges its message once written."""

import errno
import select
from collections.abc import Iterator
from socket import socket

from door.web import equip
from flask import Flask, Response, request
from werkzeug.exceptions import MethodNotAllowed

from subscriber.broker import Broker, Delivery

# Where the server puts the client's socket into the WSGI environment.
SOCKET = "subscriber.socket"

WELCOME = "Welcome. GET /receive takes the next message off the queue.\n"
EMPTY = "No message available\n"


class Handover(Iterator[bytes]):
    """One message as a response body; every way it can end settles the delivery.

    PEP 3333 calls close() after success and failure alike. Only the step after the last chunk
    tells them apart: pywsgi asks for it once `sendall` returned. A generator would not do, as
    the finally of one that never started does not run.
    """

    def __init__(self, broker: Broker, delivery: Delivery, client: socket | None) -> None:
        """Hand delivery to client (None: nobody to look at, as in a test)."""
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
        raise StopIteration

    def close(self) -> None:
        """Release the message unless it was acknowledged."""
        if not self._settled:
            self._settled = True
            self._broker.release(self._delivery)

    def _check_client(self, sign: int) -> None:
        if self._client is not None:
            poll = select.poll()
            poll.register(self._client.fileno(), sign)
            if any(events & (sign | select.POLLERR) for _, events in poll.poll(0)):
                raise ConnectionResetError(errno.ECONNRESET, "the client hung up")


def create_app(broker: Broker) -> Flask:
    """Return the WSGI app that hands out broker's messages."""
    app = Flask(__name__)
    equip(app, broker)

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    @app.get("/receive")
    def receive() -> Response:
        # Flask would answer HEAD by running this, and a message would be lost.
        if request.method == "HEAD":
            raise MethodNotAllowed(["GET"])
        delivery = broker.get()
        if delivery is None:
            response = Response(EMPTY, mimetype="text/plain")
        else:
            body = Handover(broker, delivery, request.environ.get(SOCKET))
            # Passed through, so that nothing stands between the server and the body's steps.
            response = Response(body, mimetype="text/plain", direct_passthrough=True)
            response.content_length = len(delivery.body) + 1
        response.headers["Cache-Control"] = "no-store"
        return response

    return app
