"""The publisher's routes: a 201 means that the broker has every message of the request."""

from collections.abc import Sequence
from typing import Protocol

from common import events
from door.call import Answer, Call, Routes, json_answer
from door.topology import Topology
from door.web import equip
from flask import Flask, Response
from prometheus_client import Counter
from werkzeug.exceptions import abort

from publisher import payload
from publisher.broker import Unconfirmed
from publisher.message import Message, Target
from publisher.payload import MAX_SHORT
from publisher.settings import Settings

DROPPED = Counter(
    "topic_messages_dropped", "Messages of a topic that matched no subscription", ["topic"]
)

WELCOME = """\
POST a message to /data, as the form field `message` or as JSON {"message": "..."}:

    curl --data-urlencode 'message=Hello' http://HOST:PORT/data
    curl --json '{"message": "Hello"}' http://HOST:PORT/data

any bytes to /messages, and many messages to /batch, one JSON string a line:

    curl --data-binary @picture.png --header 'Content-Type: image/png' http://HOST:PORT/messages
    printf '"one"\\n"two"\\n' | curl --data-binary @- http://HOST:PORT/batch

Other queues are at /queues/<queue>/messages and /queues/<queue>/batch, and topics at
/topics/<topic>/messages?key=<routing key> and /topics/<topic>/batch?key=<routing key>.

201 means that the broker has it; 503 that it may not: send it again later. /openapi.json says all.
"""


class Broker(Protocol):
    """What the routes need of a broker."""

    @property
    def up(self) -> bool:
        """Whether a message can be published now."""

    def publish(self, messages: Sequence[Message], target: Target) -> int:
        """Return once the broker confirmed all of messages; Unconfirmed otherwise.

        It returns how many of them match no subscription of a topic.
        """


def create_app(settings: Settings, broker: Broker, sink: events.Sink | None = None) -> Flask:
    """Return the app that publishes to broker, by default with the collector of settings."""
    if sink is None:
        sink = events.start("publisher", settings.events.host, settings.events.port)
    app = Flask("publisher", static_folder=None)
    topology = Topology(settings.queue, settings.queues_file)
    door = Publisher(settings, broker, topology)

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    routes: Routes = {
        ("POST", "/data"): door.data,
        ("POST", "/messages"): door.message,
        ("POST", "/batch"): door.batch,
        ("POST", "/queues/{queue}/messages"): door.message,
        ("POST", "/queues/{queue}/batch"): door.batch,
        ("POST", "/topics/{topic}/messages"): door.topic_message,
        ("POST", "/topics/{topic}/batch"): door.topic_batch,
    }
    equip(app, broker, sink, topology, routes, settings.http.names)
    return app


class Publisher:
    """What the door answers to each request."""

    def __init__(self, settings: Settings, broker: Broker, topology: Topology) -> None:
        """Publish to the queues and topics of topology, by broker."""
        self._settings = settings
        self._broker = broker
        self._topology = topology
        # Told as 0 until the first one.
        for topic in topology.topics:
            DROPPED.labels(topic)

    def data(self, call: Call) -> Answer:
        """Send the text of a form or of JSON to the default queue.

        As in the original, parameters of the query are ignored.
        """
        target = self._target(call)
        text, message = payload.text_message(call, self._settings.max_message_bytes)
        self._publish(call, message, target)
        return json_answer(201, {"Message sent": text})

    def message(self, call: Call) -> Answer:
        """Send the body, whatever it is, to a queue."""
        target = self._queue(call)
        message = payload.raw_message(call, self._settings.max_message_bytes)
        self._publish(call, message, target)
        return json_answer(201, {"id": message.id}, [("Message-Id", message.id)])

    def batch(self, call: Call) -> Answer:
        """Send a message for each line to a queue."""
        sent, _ = self._publish_batch(call, self._queue(call))
        return json_answer(201, {"sent": sent})

    def topic_message(self, call: Call) -> Answer:
        """Send the body to every queue whose subscription matches the key."""
        target = self._topic(call)
        message = payload.raw_message(call, self._settings.max_message_bytes)
        stored = not self._publish(call, message, target)
        body = {"id": message.id, "stored": stored}
        return json_answer(201 if stored else 200, body, [("Message-Id", message.id)])

    def topic_batch(self, call: Call) -> Answer:
        """Send a message for each line to every queue whose subscription matches the key."""
        sent, dropped = self._publish_batch(call, self._topic(call))
        stored = sent - dropped
        return json_answer(201 if stored else 200, {"sent": sent, "stored": stored})

    def _queue(self, call: Call) -> Target:
        call.query()
        return self._target(call)

    def _target(self, call: Call) -> Target:
        queue = self._topology.queue(call.name)
        call.by.check("send", queue)
        call.event.fields |= {"event": "publish", "queue": queue}
        return Target(self._settings.exchange, queue)

    def _topic(self, call: Call) -> Target:
        key = call.query("key").get("key")
        topic = self._topology.topic(call.name)
        if not key or not key.isascii() or len(key) > MAX_SHORT:
            example = "?key=order.created"
            abort(400, f"Say the routing key, of 1 to {MAX_SHORT} ASCII characters: {example}")
        call.by.check("send", topic)
        call.event.fields |= {"event": "publish", "topic": topic, "key": key}
        return Target(topic, key, topic=True)

    def _publish(self, call: Call, message: Message, target: Target) -> int:
        # Here, as the event of a message that the broker may not have needs its id most.
        call.event.fields["message_id"] = message.id
        return self._told(call, target, self._broker.publish([message], target))

    def _publish_batch(self, call: Call, target: Target) -> tuple[int, int]:
        """Return how many messages were sent, and how many of them a topic dropped."""
        sending = payload.batch(call, self._settings)
        call.event.fields["messages"] = len(sending)
        try:
            dropped = self._broker.publish(sending, target)
        except Unconfirmed as error:
            call.event.fields["certain"] = error.certain
            error.details = {"certain": error.certain}
            raise
        return len(sending), self._told(call, target, dropped)

    def _told(self, call: Call, target: Target, dropped: int) -> int:
        """Return dropped, which event and metrics are told."""
        if dropped:
            call.event.fields["dropped"] = dropped
            DROPPED.labels(target.exchange).inc(dropped)
        return dropped
