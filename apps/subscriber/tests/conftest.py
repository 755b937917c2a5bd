"""RabbitMQ in memory at the other end of pika's own connection; tests say when it is heard."""

import socketserver
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import Mock

import gevent
import pika
import pytest
from door.amqp import JoinedConnection, Link
from door.memory import Memory
from pika import frame, spec
from pika.adapters.utils.nbio_interface import AbstractIOServices
from pika.spec import Basic, BasicProperties, Channel, Confirm, Connection
from subscriber.broker import Broker
from subscriber.queue import Queue as ServedQueue
from subscriber.settings import Settings


@dataclass(eq=False)
class Message:
    body: bytes
    properties: BasicProperties = field(default_factory=BasicProperties)
    redelivered: bool = False


class Queue(list[Message]):
    """What can be had, the next one first; what is given back goes before all others."""

    returned = 0

    def take(self) -> Message:
        self.returned = max(0, self.returned - 1)
        return self.pop(0)

    def give_back(self, message: Message) -> None:
        message.redelivered = True
        self.insert(self.returned, message)
        self.returned += 1


class Rabbit:
    """The queues of a broker, and what it finds fault with."""

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        # Where a queue's arguments send what is rejected.
        self.dead_letter: dict[str, str] = {}
        # By exchange and routing key.
        self.bindings: dict[tuple[str, str], str] = {}
        self.add("takeaway")
        # Queues that answer no get.
        self.slow: set[str] = set()
        # Exchanges that the user may not write to.
        self.forbidden: set[str] = set()
        # Whether queues take nothing more in.
        self.full = False
        self.acked: list[bytes] = []
        self.faults: list[str] = []
        # How often somebody was told that a queue is empty.
        self.empties = 0
        self.peers: list[Peer] = []

    def publish(self, *bodies: bytes, queue: str = "takeaway") -> None:
        self.queues[queue].extend(map(Message, bodies))
        self.push()

    def push(self) -> None:
        """Bring the consumers what there is."""
        for peer in self.peers:
            peer.push()

    def bodies(self, queue: str = "takeaway") -> list[bytes]:
        return [message.body for message in self.queues[queue]]

    def add(self, *names: str) -> None:
        """Have queues of names, each with its dead queue."""
        for name in names:
            dead = f"{name}.dead"
            self.queues |= {name: Queue(), dead: Queue()}
            self.dead_letter |= {name: dead, dead: name}
            self.bindings["takeaway-in", name] = name

    def connect(self, link: Link, queue: ServedQueue | None = None) -> "Wire":
        """Bring link a connection, on which nothing is heard of later answers before answer().

        queue's channel is open, and what it took to open it is not among what was sent.
        """
        wire = Wire(self, link._connected)
        wire.answer()
        assert link.up
        if queue:
            queue.open()
            wire.answer()
            wire.writes.clear()
        return wire


@dataclass(eq=False)
class Consumer:
    channel: int
    tag: str
    queue: str
    prefetch: int


@dataclass
class Unsettled:
    queue: str
    message: Message
    consumer: Consumer | None


class Peer:
    """The broker's end of one connection, for the part of AMQP 0-9-1 that a subscriber uses."""

    def __init__(self, rabbit: Rabbit, send: Callable[[bytes], object]) -> None:
        # Methods that it does not take.
        self.deaf: tuple[type, ...] = ()
        self._rabbit = rabbit
        self._send = send
        self._data = b""
        self._tags: dict[int, int] = defaultdict(int)
        self._prefetch: dict[int, int] = defaultdict(int)
        self._consumers: list[Consumer] = []
        # Channels that it has closed, and that the client may not know yet.
        self.closing: set[int] = set()
        # What is being published, by channel; the number of the last that was, where confirmed.
        self._publishing: dict[int, tuple[Any, Message]] = {}
        self._published: dict[int, int] = {}
        # By channel and tag.
        self.unsettled: dict[int, dict[int, Unsettled]] = defaultdict(dict)
        rabbit.peers.append(self)

    def feed(self, data: bytes) -> list[Any]:
        """Do what the client says in data; return it as methods."""
        methods = []
        self._data += data
        while self._data:
            size, one = frame.decode_frame(self._data)
            if one is None:
                break
            self._data = self._data[size:]
            method = getattr(one, "method", one)
            methods.append(method)
            if not isinstance(method, self.deaf):
                self._do(getattr(one, "channel_number", 0), method)
        return methods

    def end(self) -> None:
        """Give back what the connection had; forget the connection."""
        self._rabbit.peers.remove(self)
        for channel in list(self.unsettled):
            self._give_back(channel)
        self._rabbit.push()

    def push(self) -> None:
        """Bring consumers what they may have."""
        for consumer in self._consumers:
            queue = self._rabbit.queues[consumer.queue]
            unsettled = self.unsettled[consumer.channel].values()
            while queue and not 0 < consumer.prefetch <= sum(
                one.consumer is consumer for one in unsettled
            ):
                self._hand_out(consumer.channel, consumer.queue, consumer)

    def _do(self, number: int, method: Any) -> None:
        match method:
            case frame.ProtocolHeader():
                able = {"publisher_confirms": True, "basic.nack": True}
                self.say(0, Connection.Start(server_properties={"capabilities": able}))
            case Connection.StartOk():
                self.say(0, Connection.Tune(2047, 131072, 0))
            case Connection.Open():
                self.say(0, Connection.OpenOk())
            case Connection.Close():
                self.say(0, Connection.CloseOk())
            case Channel.Open():
                self._tags[number] = self._prefetch[number] = 0
                self.say(number, Channel.OpenOk())
            case Channel.CloseOk():
                self.closing.discard(number)
            case _ if number in self.closing:
                pass  # what was sent before the close was heard
            case Channel.Close():
                self.say(number, Channel.CloseOk())
                self._give_back(number)
            case (
                Basic.Get(queue=name) | Basic.Consume(queue=name) | spec.Queue.Purge(queue=name)
            ) if name not in self._rabbit.queues:
                self.close(number, 404, f"NOT_FOUND - no queue '{name}'")
            case spec.Queue.Purge(queue=name):
                queue = self._rabbit.queues[name]
                self.say(number, spec.Queue.PurgeOk(len(queue)))
                queue.clear()
                queue.returned = 0
            case Basic.Get(queue=name) if name in self._rabbit.slow:
                pass
            case Basic.Get(queue=name):
                if self._rabbit.queues[name]:
                    self._hand_out(number, name, None)
                else:
                    self._rabbit.empties += 1
                    self.say(number, Basic.GetEmpty())
            case Basic.Qos(prefetch_count=count):
                self._prefetch[number] = count
                self.say(number, Basic.QosOk())
            case Basic.Consume(queue=name, consumer_tag=tag):
                self._consumers.append(Consumer(number, tag, name, self._prefetch[number]))
                self.say(number, Basic.ConsumeOk(tag))
            case Basic.Cancel(consumer_tag=tag):
                self._consumers = [one for one in self._consumers if one.tag != tag]
                self.say(number, Basic.CancelOk(tag))
            case Basic.Ack(delivery_tag=tag, multiple=multiple):
                for one in self._settle(number, tag, multiple):
                    self._rabbit.acked.append(one.message.body)
            case Basic.Nack(delivery_tag=tag, multiple=multiple):
                for one in self._settle(number, tag, multiple):
                    self._rabbit.queues[one.queue].give_back(one.message)
            case Basic.Reject(delivery_tag=tag, requeue=requeue):
                for one in self._settle(number, tag, False):
                    if requeue:
                        self._rabbit.queues[one.queue].give_back(one.message)
                    else:
                        target = self._rabbit.dead_letter[one.queue]
                        self._rabbit.queues[target].append(one.message)
            case Confirm.Select():
                self._published[number] = 0
            case Basic.Publish():
                self._publishing[number] = method, Message(b"")
            case frame.Header(properties=properties, body_size=size):
                publish, _ = self._publishing[number]
                self._publishing[number] = publish, Message(b"", properties)
                if size == 0:
                    self._take_in(number)
            case frame.Body(fragment=fragment):
                self._publishing[number][1].body += fragment
                self._take_in(number)
        self._rabbit.push()

    def _take_in(self, number: int) -> None:
        publish, message = self._publishing.pop(number)
        if publish.exchange in self._rabbit.forbidden:
            self.close(number, 403, "ACCESS_REFUSED")
            return
        self._published[number] += 1
        name = self._rabbit.bindings.get((publish.exchange, publish.routing_key))
        if name is None:
            returned = Basic.Return(312, "NO_ROUTE", publish.exchange, publish.routing_key)
            self._send_content(number, returned, message)
        elif self._rabbit.full:
            self.say(number, Basic.Nack(self._published[number]))
            return
        else:
            self._rabbit.queues[name].append(message)
        self.say(number, Basic.Ack(self._published[number]))

    def _hand_out(self, number: int, name: str, consumer: Consumer | None) -> None:
        queue = self._rabbit.queues[name]
        message = queue.take()
        self._tags[number] += 1
        tag = self._tags[number]
        self.unsettled[number][tag] = Unsettled(name, message, consumer)
        method: Any = Basic.GetOk(tag, message.redelivered, "", name, len(queue))
        if consumer:
            method = Basic.Deliver(consumer.tag, tag, message.redelivered, "", name)
        self._send_content(number, method, message)

    def _send_content(self, number: int, method: Any, message: Message) -> None:
        frames = [frame.Method(number, method)]
        frames.append(frame.Header(number, len(message.body), message.properties))
        if message.body:
            frames.append(frame.Body(number, message.body))
        self._send(b"".join(one.marshal() for one in frames))

    def _settle(self, number: int, tag: int, multiple: bool) -> list[Unsettled]:
        unsettled = self.unsettled[number]
        tags = [one for one in unsettled if one <= tag or tag == 0] if multiple else [tag]
        # RabbitMQ closes the channel for a tag that it does not know.
        if (tag or not multiple) and tag not in unsettled:
            self._rabbit.faults.append(f"unknown delivery tag {tag}")
            self.close(number, 406, f"PRECONDITION_FAILED - unknown delivery tag {tag}")
            return []
        return [unsettled.pop(one) for one in tags]

    def close(self, number: int, code: int, text: str) -> None:
        """Close a channel of the client's, unless it is closed."""
        if number in self.closing:
            return
        self.closing.add(number)
        self.say(number, Channel.Close(code, text, 60, 0))
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        self._consumers = [one for one in self._consumers if one.channel != number]
        for one in self.unsettled.pop(number, {}).values():
            self._rabbit.queues[one.queue].give_back(one.message)

    def say(self, number: int, method: Any) -> None:
        """Send method on a channel."""
        self._send(frame.Method(number, method).marshal())


class Stream(JoinedConnection):
    """pika's connection, to which the test brings the stream."""

    def _adapter_connect_stream(self) -> None:
        pass


class Wire:
    """The way between pika and a Peer, which takes all at once and is heard at will."""

    def __init__(self, rabbit: Rabbit, on_open: Callable[[Any], object]) -> None:
        # What was sent, by calls of the system.
        self.writes: list[list[Any]] = []
        # Whether answers are heard a turn later.
        self.prompt = False
        self.cut = False
        # What pika has not heard yet.
        self.answers: deque[bytes] = deque()
        self.peer = Peer(rabbit, self.answers.append)
        self.connection: Any = Stream(
            pika.ConnectionParameters(heartbeat=0),
            on_open_callback=on_open,
            custom_ioloop=Mock(AbstractIOServices),
        )
        self.connection._proto_connection_made(self)

    def sent(self, kind: type) -> list[list[Any]]:
        """Return the methods of kind, by calls of the system."""
        found = [[one for one in write if isinstance(one, kind)] for write in self.writes]
        return [some for some in found if some]

    def answer(self, count: int = 10_000) -> None:
        """Let pika hear count answers, each in a turn of its own, or all until none is left."""
        gevent.idle()
        while self.answers and count:
            count -= 1
            self.connection._proto_data_received(self.answers.popleft())
            gevent.idle()

    def lose(self, error: Exception | None = None) -> None:
        """End the stream."""
        if self.connection._transport:
            self.answers.clear()
            self.peer.end()
            self.connection._proto_connection_lost(error or OSError("reset"))

    # What follows is pika's transport.

    def write(self, data: bytes) -> None:
        self.writes.append(self.peer.feed(data))
        if self.prompt:
            gevent.spawn(self.answer)

    def abort(self) -> None:
        self.cut = True
        gevent.spawn(self.lose)


def asked(wire: Wire) -> list[int]:
    """Return for how many messages each basic.get and each consumer asked."""
    found = []
    for method in [one for write in wire.writes for one in write]:
        if isinstance(method, Basic.Qos):
            prefetch = method.prefetch_count
        elif isinstance(method, Basic.Get | Basic.Consume):
            found.append(1 if isinstance(method, Basic.Get) else prefetch)
    return found


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """Serve GET, by answer's status and body, as RabbitMQ's management API; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_callback_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when a callback of the event loop does, which else is only printed."""
    failures = []

    def handle(context: object, kind: type, error: object, _trace: object) -> None:
        # A greenlet's failure is its test's to look at.
        if not isinstance(context, gevent.Greenlet):
            failures.append((kind, error))

    monkeypatch.setattr(gevent.get_hub(), "handle_error", handle)
    yield
    assert failures == []


@pytest.fixture
def rabbit() -> Iterator[Rabbit]:
    rabbit = Rabbit()
    yield rabbit
    assert rabbit.faults == []


@pytest.fixture
def receive_timeout() -> float:
    return Settings.receive_timeout


@pytest.fixture
def broker(receive_timeout: float) -> Iterator[Broker]:
    broker = Broker(Settings(receive_timeout=receive_timeout), Memory(2**40))
    yield broker
    broker.lost("the test is over")


@pytest.fixture
def queue(broker: Broker) -> ServedQueue:
    return broker.queue("takeaway")


@pytest.fixture
def wire(rabbit: Rabbit, broker: Broker, queue: ServedQueue) -> Wire:
    return rabbit.connect(broker, queue)


@pytest.fixture
def rabbit_port(rabbit: Rabbit) -> Iterator[int]:
    """Let rabbit listen; for programs of their own."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            peer = Peer(rabbit, self.request.sendall)
            while data := self.request.recv(65536):
                peer.feed(data)
            peer.end()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Events(list[dict[str, Any]]):
    def emit(self, _label: str | None, data: Mapping[str, Any]) -> bool:
        self.append(dict(data))
        return True


@pytest.fixture
def events() -> Events:
    return Events()
