# mypy: disable-error-code=no-untyped-call
"""What bench/doors.py compares the doors with, each in a process of its own.

`no-op` and `original` serve PORT; `raw SECONDS` publishes, and prints how many messages and how
many a second; `depth` prints how many are in the queue, and `fill N` brings it to at least N, or
empties it when N is 0. RABBITMQ_HOST, RABBITMQ_PORT and RABBITMQ_PASSWORD name the broker.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import pika
from flask import Flask, request
from pika.adapters.select_connection import SelectConnection

EXCHANGE, QUEUE = "takeaway-in", "takeaway"
BODY = b"x" * 100
PERSISTENT = pika.BasicProperties(delivery_mode=2)
IN_FLIGHT = 256


def parameters() -> pika.ConnectionParameters:
    """Return how to reach the broker."""
    host, port, password = (os.environ[f"RABBITMQ_{name}"] for name in ("HOST", "PORT", "PASSWORD"))
    login = pika.PlainCredentials("admin", password)
    return pika.ConnectionParameters(host, int(port), credentials=login)


def serve_no_op() -> None:
    """Serve a Flask app that only reads the body, by the doors' own server."""
    from door.memory import MIB
    from door.server import serve

    app = Flask("no-op")
    app.add_url_rule("/healthz", view_func=lambda: "")

    @app.post("/data")
    def take() -> tuple[bytes, int]:
        # Unread, it would cost the connection.
        return request.get_data()[:0], 201

    calls = dict.fromkeys(["start", "finish", "stop"], lambda: None)
    nowhere: Any = SimpleNamespace(up=True, **calls)
    port, workers = int(os.environ["PORT"]), int(os.environ["WORKERS"])
    serve("no-op", lambda _memory: (app, nowhere), port, 512 * MIB, workers)


def serve_original() -> None:
    """Serve an app of the original's design by Flask's threaded development server, as it was.

    Each request has a connection of its own and declares the queue; nothing is confirmed.
    """
    app = Flask("original")
    app.add_url_rule("/healthz", view_func=lambda: "")

    @contextmanager
    def channel() -> Iterator[Any]:
        connection = pika.BlockingConnection(parameters())
        channel = connection.channel()
        channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        yield channel
        connection.close()

    @app.post("/data")
    def publish() -> tuple[dict[str, str], int]:
        message = request.form["message"]
        with channel() as opened:
            opened.basic_publish(EXCHANGE, QUEUE, message, PERSISTENT)
        return {"Message sent": message}, 201

    @app.get("/receive")
    def receive() -> str:
        with channel() as opened:
            _, _, body = opened.basic_get(QUEUE, auto_ack=True)
        return "No message available\n" if body is None else f"{body.decode()}\n"

    app.run(port=int(os.environ["PORT"]), threaded=True)


def publish_raw(seconds: float, most: float = math.inf) -> int:
    """Publish by pika's public API, IN_FLIGHT on the way; return how many were confirmed.

    Publishing ends after so many seconds or messages, and then waits for the last confirm.
    """
    sent, end = 0, time.monotonic() + seconds
    # Delivery tags in the order of publishing, so that a multiple confirm is a prefix.
    waiting: dict[int, None] = {}

    def opened(channel: Any) -> None:
        channel.confirm_delivery(lambda frame: confirmed(channel, frame.method))
        publish(channel)

    def publish(channel: Any) -> None:
        nonlocal sent
        while len(waiting) < IN_FLIGHT and sent < most and time.monotonic() < end:
            channel.basic_publish(EXCHANGE, QUEUE, BODY, PERSISTENT)
            sent += 1
            waiting[sent] = None
        if not waiting:
            channel.connection.ioloop.stop()

    def confirmed(channel: Any, method: Any) -> None:
        if method.NAME != "Basic.Ack":
            sys.exit(f"the broker refused a message: {method}")
        tag = method.delivery_tag
        for done in list(takewhile(lambda one: one <= tag, waiting)) if method.multiple else [tag]:
            del waiting[done]
        publish(channel)

    def connected(connection: SelectConnection) -> None:
        connection.channel(on_open_callback=opened)

    def failed(_connection: SelectConnection, reason: object) -> None:
        sys.exit(f"the connection to the broker failed: {reason!r}")

    SelectConnection(
        parameters(),
        on_open_callback=connected,
        on_open_error_callback=failed,
        on_close_callback=failed,
    ).ioloop.start()
    return sent


def depth(purge: bool = False) -> int:
    """Return how many messages are in the queue, and empty it before if told so."""
    with pika.BlockingConnection(parameters()) as connection:
        channel = connection.channel()
        if purge:
            channel.queue_purge(QUEUE)
        return int(channel.queue_declare(QUEUE, passive=True).method.message_count)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["no-op"]:
            serve_no_op()
        case ["original"]:
            serve_original()
        case ["raw", seconds]:
            started = time.monotonic()
            count = publish_raw(float(seconds))
            print(json.dumps({"rate": count / (time.monotonic() - started), "messages": count}))
        case ["depth"]:
            print(depth())
        case ["fill", messages]:
            if (missing := int(messages) - depth(purge=messages == "0")) > 0:
                publish_raw(math.inf, missing)
        case _:
            sys.exit(__doc__)
