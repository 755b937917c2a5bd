"""The subscriber's routes: messages for whoever asks, taken off the queue once they have them."""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import gevent
from common import events
from door import BrokerUnavailable
from door.access import RIGHTS
from door.call import Answer, Call, json_answer
from door.memory import Memory
from door.topology import Topology
from door.web import equip
from flask import Flask, Response
from gevent.lock import BoundedSemaphore
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import abort
from werkzeug.http import parse_accept_header

from subscriber.broker import LARGEST_MESSAGE, Broker
from subscriber.dead import Dead
from subscriber.delivery import Delivery
from subscriber.elsewhere import ROOM, Elsewhere
from subscriber.handover import SENDS_NO_MORE, Handover, shows
from subscriber.leases import Leases
from subscriber.overview import Overview
from subscriber.parcel import JSON, LINES, TEXT, Parcel, lines
from subscriber.queue import Queue
from subscriber.settings import Settings

WELCOME = """\
GET /receive takes the next message off the queue:

    curl http://HOST:PORT/receive
    curl 'http://HOST:PORT/receive?wait=20&max=100'

With ?ack=manual it comes with a receipt and is yours for a while: POST /ack takes it off the queue.
GET /dead shows what was given up, and POST /dead/redrive sends it back. /openapi.json says all.
Each other queue has the same: GET /queues/QUEUE/messages, POST /queues/QUEUE/ack and so on.
GET /queues shows which there are.
"""
EMPTY = b"No message available\n"
NO_STORE = ("Cache-Control", "no-store")
MAX_MESSAGES = 10_000
MAX_WAIT = 20
MAX_REQUEST = 1024 * 1024
MAX_IDS = 1000
# Messages, and bytes of them as JSON, that a peek shows; they are held until they are received.
MAX_PEEKED = 100
MAX_PEEKED_BYTES = 1024 * 1024
MAX_ID = 255
# Most bytes of memory that one byte of JSON takes once it is parsed; `{},` is the worst case.
PARSED = 24
# Bytes of memory that the overview's part for one queue takes.
TOLD = 2048
# Responses with many messages that are made at a time: each may take MAX_BATCH_BYTES.
MAX_BATCHES = 3


def create_app(
    broker: Broker,
    settings: Settings,
    memory: Memory,
    sink: events.Sink | None = None,
    watch: bool = False,
) -> Flask:
    """Return the app that hands out broker's messages, by default with settings' collector.

    With watch it looks at the queues while nobody asks, so that it knows how old messages are.
    Raises ConfigError when the file of the queues cannot be read.
    """
    if sink is None:
        sink = events.start("subscriber", settings.events.host, settings.events.port)
    app = Flask("subscriber", static_folder=None)
    topology = Topology(settings.queue, settings.queues_file)
    door = Subscriber(broker, settings, memory, topology)
    routes = {
        ("GET", "/receive"): door.receive,
        ("POST", "/ack"): door.ack,
        ("POST", "/reject"): door.reject,
        ("POST", "/extend"): door.extend,
        ("GET", "/dead"): door.look,
        ("POST", "/dead/redrive"): door.redrive,
        ("GET", "/queues"): door.overview,
        ("GET", "/queues/{queue}/messages"): door.receive,
        ("DELETE", "/queues/{queue}/messages"): door.purge,
        ("GET", "/queues/{queue}/messages/peek"): door.peek,
        ("POST", "/queues/{queue}/ack"): door.ack,
        ("POST", "/queues/{queue}/reject"): door.reject,
        ("POST", "/queues/{queue}/extend"): door.extend,
        ("GET", "/queues/{queue}/dead"): door.look,
        ("DELETE", "/queues/{queue}/dead"): door.delete,
        ("POST", "/queues/{queue}/dead/redrive"): door.redrive,
    }
    equip(app, broker, sink, topology, routes, settings.http.names)
    if watch:
        gevent.spawn(door.watch)

    @app.get("/")
    def welcome() -> Response:
        return Response(WELCOME, mimetype="text/plain")

    return app


@dataclass(frozen=True, slots=True)
class Counter:
    """What is handed out of one queue."""

    queue: Queue
    leases: Leases
    dead: Dead

    def ack(self, receipts: list[str]) -> int:
        """Take leased messages off the queue; how many. Raises Gone."""
        taken = self.leases.take(receipts)
        self.queue.ack(taken)
        return len(taken)

    def reject(self, receipts: list[str], requeue: bool) -> int:
        """Give leased messages back, to the queue or to the dead ones; how many. Raises Gone."""
        taken = self.leases.take(receipts)
        self.queue.reject(taken, requeue)
        return len(taken)


class Subscriber:
    """What the door answers to each request."""

    def __init__(
        self, broker: Broker, settings: Settings, memory: Memory, topology: Topology
    ) -> None:
        """Answer with broker's messages of the queues of topology."""
        self._broker = broker
        self._settings = settings
        self._memory = memory
        self._topology = topology
        # One that was removed from the file stays, for what was leased.
        self._counters: dict[str, Counter] = {}
        self._batches = BoundedSemaphore(MAX_BATCHES)
        self._elsewhere = Elsewhere(settings.cluster)
        self._overview = Overview(settings, memory, topology)

    def receive(self, call: Call) -> Answer:
        """Hand over the next message, or many."""
        call.event.fields["event"] = "receive"
        counter = self._counter(call)
        query = call.query("max", "wait", "ack")
        most = number(query, "max", 1, MAX_MESSAGES, absent=0)
        wait = number(query, "wait", 0, MAX_WAIT, absent=0)
        ack = query.get("ack", "auto")
        if ack not in ("auto", "manual"):
            abort(400, "ack must be auto or manual.")
        kind = choose(call.header("Accept"), many=most > 0)
        asked = time.perf_counter()
        deliveries = counter.queue.get(wait=wait, address=call.client.address)
        if wait:
            call.event.waited = time.perf_counter() - asked
        if not deliveries:
            return nothing(kind)
        done = nobody_waits
        if most > 1:
            deliveries = self._more(call, counter.queue, deliveries, most)
            done = self._batches.release
        leases = counter.leases if ack == "manual" else None
        parcel = Parcel(deliveries, kind, counter.queue, leases, done)
        many = {"messages": len(deliveries)}
        call.event.fields |= many if kind == LINES else deliveries[0].origin
        return Answer(200, parcel.headers, Handover(parcel, call.client.socket, call.event))

    def _counter(self, call: Call, right: str = "receive") -> Counter:
        """Return what hands out the queue that call names.

        Aborts with 404 without such a queue, and with 403 for a client that has no right to it.
        """
        name = self._topology.queue(call.name)
        call.event.fields["queue"] = name
        call.by.check(right, name)
        counter = self._counters.get(name)
        if counter is None:
            queue = self._broker.queue(name)
            seconds, door = self._settings.lease_seconds, self._settings.cluster.name
            leases = Leases(queue, seconds, self._memory, door)
            counter = Counter(queue, leases, Dead(self._broker, name, self._settings))
            self._counters[name] = counter
        return counter

    def _more(
        self, call: Call, queue: Queue, deliveries: list[Delivery], most: int
    ) -> list[Delivery]:
        """Return deliveries and what else there is, most in all; takes one of the batches."""
        self._batches.acquire()
        try:
            room = self._settings.max_batch_bytes - deliveries[0].size
            # More for a client that may have left would keep them from the others.
            if room > 0 and not shows(call.client.socket, SENDS_NO_MORE):
                more = queue.get(most - 1, room, address=call.client.address)
                deliveries = deliveries + more
        except BaseException:
            self._batches.release()
            queue.release(deliveries)
            raise
        return deliveries

    def peek(self, call: Call) -> Answer:
        """Show the next messages, and leave them for who receives."""
        call.event.fields["event"] = "peek"
        queue = self._counter(call, "manage").queue
        most = number(call.query("max"), "max", 1, MAX_PEEKED, absent=1)
        room = min(MAX_PEEKED_BYTES, self._settings.max_batch_bytes)
        with self._batches:
            found = queue.peek(most, room, call.client.address)
        # The message itself may be received, and give its memory back, before this is written.
        call.hold(sum(one.weight for one in found))
        call.event.fields["messages"] = len(found)
        return show(found)

    def ack(self, call: Call) -> Answer:
        """Take leased messages off the queue."""
        counter = self._counter(call)
        receipts, _ = read_receipts(call, {"receipt", "receipts"})
        count = self._elsewhere.settle(call, counter.leases, receipts, counter.ack)
        return json_answer(200, {"acknowledged": count})

    def reject(self, call: Call) -> Answer:
        """Give leased messages back."""
        counter = self._counter(call)
        receipts, requeue = read_receipts(call, {"receipt", "receipts", "requeue"})
        here = partial(counter.reject, requeue=requeue)
        more = {"requeue": requeue}
        count = self._elsewhere.settle(call, counter.leases, receipts, here, more)
        return json_answer(200, {"rejected": count})

    def extend(self, call: Call) -> Answer:
        """Let leases last for longer."""
        leases = self._counter(call).leases
        receipts, _ = read_receipts(call, {"receipt", "receipts"})
        count = self._elsewhere.settle(call, leases, receipts, leases.extend)
        return json_answer(200, {"extended": count})

    def look(self, call: Call) -> Answer:
        """Show messages of the dead queue."""
        dead = self._counter(call, "manage").dead
        most = number(call.query("max"), "max", 1, MAX_MESSAGES, absent=1)
        grant = call.client.grant
        before = grant.amount
        # The last message that is read may be one that does not fit.
        grant.add(self._settings.max_batch_bytes + LARGEST_MESSAGE)
        with self._batches:
            found = dead.look(most, self._settings.max_batch_bytes)
        grant.resize(before + sum(one.weight for one in found))
        return show(found)

    def redrive(self, call: Call) -> Answer:
        """Send messages of the dead queue back to where they came from: the oldest, or by ids."""
        dead = self._counter(call, "manage").dead
        query = call.query("max")
        most = number(query, "max", 1, MAX_MESSAGES, absent=MAX_MESSAGES)
        raw = call.read(MAX_REQUEST)
        if not raw:
            return json_answer(200, {"redriven": dead.redrive(most)})
        if query:
            abort(400, "Give ?max or 'ids', not both.")
        return json_answer(200, {"redriven": dead.redrive_ids(read_ids(call, raw))})

    def delete(self, call: Call) -> Answer:
        """Take messages off the dead queue for good, by ids."""
        call.event.fields["event"] = "delete"
        dead = self._counter(call, "manage").dead
        call.query()
        count = dead.delete_ids(read_ids(call, call.read(MAX_REQUEST)))
        call.event.fields["messages"] = count
        return json_answer(200, {"deleted": count})

    def purge(self, call: Call) -> Answer:
        """Drop all messages that wait in the queue."""
        call.event.fields["event"] = "purge"
        queue = self._counter(call, "manage").queue
        name = call.name
        if call.query("confirm").get("confirm") != name:
            abort(400, f"This drops all messages that wait in {name!r}: write ?confirm={name}.")
        count = queue.purge()
        call.event.fields["messages"] = count
        return json_answer(200, {"purged": count})

    def overview(self, call: Call) -> Answer:
        """Tell of the queues that the client may use."""
        call.query()
        names = [
            name
            for name in sorted(self._topology.queues)
            if any(call.by.may(right, name) for right in RIGHTS)
        ]
        call.hold(TOLD * len(names))
        try:
            return json_answer(200, {"queues": self._overview.tell(names)})
        except BrokerUnavailable:
            # The brokers of other hosts know as much.
            answer = self._elsewhere.look(call, ROOM + TOLD * len(names))
            if answer is None:
                raise
            return answer

    def watch(self) -> None:
        """Look at the queues now and then, for ever."""
        self._overview.watch()


def nobody_waits() -> None:
    """Do nothing at the end of a response that is no batch."""


def choose(accept: str | None, many: bool) -> str:
    """Return the first kind of answer that a client's Accept prefers, by RFC 9110, 12.5.1.

    Aborts with 406 when it takes none. Parameters as charset make no difference.
    """
    if not accept or accept == "*/*":
        return LINES if many else TEXT
    offered = {LINES: LINES, JSON: LINES} if many else {"text/plain": TEXT, JSON: JSON}
    given = [(kind.partition(";")[0].strip(), q) for kind, q in parse_accept_header(accept)]
    found = MIMEAccept(given).best_match(offered)
    if found is None:
        abort(406, f"Accept has none of what can be given: {', '.join(offered)}.")
    return offered[found]


def nothing(kind: str) -> Answer:
    """Answer that no message is there."""
    if kind != TEXT:
        return Answer(204, [NO_STORE], [])
    headers = [("Content-Type", TEXT), ("Content-Length", str(len(EMPTY))), NO_STORE]
    return Answer(200, headers, [EMPTY])


def show(found: Collection[Delivery]) -> Answer:
    """Answer what was found, without receipts."""
    if not found:
        return nothing(LINES)
    length = sum(one.length() for one in found)
    headers = [("Content-Type", LINES), ("Content-Length", str(length)), NO_STORE]
    return Answer(200, headers, lines((one, None) for one in found))


def number(query: dict[str, str], name: str, least: int, most: int, absent: int) -> int:
    """Return the whole number in query's name, or absent; aborts with 400 out of bounds."""
    raw = query.get(name)
    if raw is None:
        return absent
    if not (raw.isascii() and raw.isdigit() and len(raw) < 9 and least <= int(raw) <= most):
        abort(400, f"{name} must be a whole number from {least} to {most}.")
    return int(raw)


def read_receipts(call: Call, names: set[str]) -> tuple[list[str], bool]:
    """Return the receipts of the request's JSON and its `requeue`; aborts with 400 otherwise."""
    call.query()
    body = read_object(call, call.read(MAX_REQUEST), names)
    if {"receipt", "receipts"} <= body.keys():
        abort(400, "Give 'receipts' or 'receipt', not both.")
    receipts = body.get("receipts", [body["receipt"]] if "receipt" in body else None)
    if not isinstance(receipts, list) or not all(isinstance(one, str) for one in receipts):
        abort(400, "Give 'receipts', a list of strings, or 'receipt', a string.")
    requeue = body.get("requeue", True)
    if not isinstance(requeue, bool):
        abort(400, "'requeue' must be true or false.")
    return receipts, requeue


def read_ids(call: Call, raw: bytes) -> set[str]:
    """Return the ids of messages in raw, the request's body; aborts with 400 without any."""
    ids = read_object(call, raw, {"ids"}).get("ids")
    if (
        not isinstance(ids, list)
        or not 1 <= len(ids) <= MAX_IDS
        or not all(isinstance(one, str) and 1 <= len(one) <= MAX_ID for one in ids)
    ):
        abort(
            400, f"Give 'ids', a list of 1 to {MAX_IDS} strings of 1 to {MAX_ID} characters each."
        )
    return set(ids)


def read_object(call: Call, raw: bytes, names: set[str]) -> dict[str, Any]:
    """Return raw, the request's body, as an object without other names; aborts with 400."""
    call.hold(PARSED * len(raw))
    try:
        body = json.loads(raw.decode())
    except (ValueError, RecursionError):
        abort(400, "The body is not JSON in UTF-8.")
    if not isinstance(body, dict) or not body.keys() <= names:
        abort(
            400, f"The JSON must be an object with no other names than {', '.join(sorted(names))}."
        )
    return body
