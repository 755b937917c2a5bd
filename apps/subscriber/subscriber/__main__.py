# mypy: disable-error-code=no-untyped-call
"""Serve the subscriber until SIGTERM: `python3 -m subscriber`."""

import logging
import signal
import sys
from http.client import HTTPException
from socket import IPPROTO_TCP, SO_SNDBUF, SOL_SOCKET, TCP_NODELAY
from typing import Any

import gevent
from door.environment import ConfigError, Environment
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer

from subscriber.app import SOCKET, create_app
from subscriber.broker import Broker, Settings

# Clients at a time; more wait in the listening socket's queue.
MAX_CLIENTS = 1000
# Seconds a client may take for its next piece of request, or to read its whole response.
# The size of its headers is bounded by http.client: 100 lines of 64 KiB.
CLIENT_TIMEOUT = 30
# Bytes of a response that the system may take before the client did. Left to itself it takes
# megabytes, and a message would count as written before its client has seen any of it.
SEND_BUFFER = 65536
# Seconds running requests get to finish after SIGTERM.
DRAIN_TIMEOUT = 5


class Handler(WSGIHandler):
    """One client's connection."""

    # A slow client is not an error of this program; a time-out has no errno but this text.
    ignored_socket_errors: Any = (*WSGIHandler.ignored_socket_errors, "timed out")

    def handle(self) -> None:
        """Serve the client's requests, one after the other."""
        self.socket.settimeout(CLIENT_TIMEOUT)
        self.socket.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER)
        # Headers and body are two writes: the second would wait 40 ms for the client's word on
        # the first.
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        super().handle()

    def read_request(self, raw_requestline: str) -> bool:
        """Read the request's headers; ValueError makes pywsgi answer 400 with one log line."""
        try:
            return bool(super().read_request(raw_requestline))
        except (OSError, HTTPException) as error:
            raise ValueError(repr(error)) from None

    def get_environ(self) -> dict[str, Any]:
        """Return the WSGI environment with the client's socket in it."""
        return {**super().get_environ(), SOCKET: self.socket}

    def handle_one_response(self) -> None:
        """Answer one request, the connection's last one when the server is stopping."""
        self.server.running += 1
        try:
            super().handle_one_response()
        finally:
            self.server.running -= 1
            self.close_connection = self.close_connection or self.server.closed


class Server(WSGIServer):
    """The HTTP server, which counts the requests that it is answering."""

    handler_class = Handler
    running = 0

    def drain(self) -> None:
        """Accept nothing more and wait, at most DRAIN_TIMEOUT seconds, for running requests."""
        self.close()
        with gevent.Timeout(DRAIN_TIMEOUT, False):
            while self.running:
                gevent.sleep(0.01)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # pika reports each failure in several lines; the broker's module has one for each.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        settings = Settings.read(Environment())
    except ConfigError as error:
        sys.exit(f"subscriber: {error}")
    broker = Broker(settings)
    server = Server(
        ("0.0.0.0", settings.port),
        create_app(broker, settings),
        spawn=MAX_CLIENTS,
        log=None,
        error_log=logging.getLogger("subscriber.http"),
        # Else the server asks the DNS for its own name before it starts.
        environ={"SERVER_NAME": "subscriber"},
    )
    stop = Event()
    # A container's first process has no default action for signals.
    for number in signal.SIGTERM, signal.SIGINT:
        gevent.signal_handler(number, stop.set)
    broker.start()
    server.start()
    stop.wait()
    server.drain()
    broker.stop()


if __name__ == "__main__":
    main()
