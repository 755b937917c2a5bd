"""What the broker tells of all queues, by its management API."""

import json
import logging
import time
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import gevent
from door import BrokerUnavailable
from door.memory import MIB, Memory, OutOfMemory
from door.settings import BrokerSettings
from door.topology import Topology
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore
from prometheus_client import Gauge

from subscriber.age import Counts, History
from subscriber.settings import Settings

log = logging.getLogger(__name__)

OLDEST = Gauge(
    "queue_oldest_message_age_seconds",
    "Seconds since the oldest message that waits in a queue of the list came into it",
    ["queue"],
)
# What takes messages off a queue for good, once they were handed out.
TAKEN = ("ack", "get_no_ack", "deliver_no_ack")
# A queue's limits, and what is limited.
LIMITS = {"max-length": "messages_ready", "max-length-bytes": "message_bytes_ready"}
COLUMNS = (
    "name",
    "messages_ready",
    "messages_unacknowledged",
    "message_bytes_ready",
    "message_stats.publish",
    "message_stats.publish_details.rate",
    "message_stats.deliver_get_details.rate",
    *(f"message_stats.{way}" for way in TAKEN),
    *(f"effective_policy_definition.{limit}" for limit in LIMITS),
)
PATH = f"/api/queues/%2F?columns={','.join(COLUMNS)}"
# Share of its limit under which a queue that was full takes messages again.
# Source: LOW_LIMIT of RabbitMQ's deps/rabbit/src/rabbit_fifo.hrl
FULL = 0.8
# Seconds between two looks at the queues while nobody asks.
WATCH = 10.0
# Seconds for which an answer is everybody's.
KEPT = 1.0
# Bytes of the largest answer that is read: about 13,000 queues, dead ones included.
LARGEST = 4 * MIB
# Most bytes of memory that a byte of the broker's answer takes once it is parsed.
PARSED = 8


class Management:
    """The broker's management API, asked one question at a time."""

    def __init__(self, url: str, broker: BrokerSettings, timeout: float, path: str = PATH) -> None:
        """Ask for path at url as broker's user; an answer is overdue after timeout seconds."""
        self._path = path
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        # surrogateescape: the bytes of the environment, UTF-8 or not.
        login = f"{broker.user}:{broker.password}".encode("utf-8", "surrogateescape")
        self._headers = {"Authorization": f"Basic {b64encode(login).decode()}"}
        self._timeout = timeout
        self._question: AsyncResult | None = None

    def ask(self) -> bytes:
        """Return what is told, as JSON; raises BrokerUnavailable.

        A question that is overdue is waited for again before the next one is asked: its thread
        cannot be stopped.
        """
        if self._question is None or self._question.ready():
            self._question = gevent.get_hub().threadpool.spawn(self._read)
        try:
            answer = self._question.get(timeout=self._timeout)
        except gevent.Timeout:
            answer = TimeoutError("timed out")
        if isinstance(answer, Exception):
            raise BrokerUnavailable(f"RabbitMQ's management API cannot be used: {answer}")
        return bytes(answer)

    def _read(self) -> bytes | Exception:
        """Ask, in a thread of its own. What gevent would print of an error is returned."""
        connection = HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("GET", self._path, headers=self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                return HTTPException(f"HTTP {answer.status}")
            body = answer.read(LARGEST + 1)
            return body if len(body) <= LARGEST else HTTPException(f"more than {LARGEST} bytes")
        except (OSError, HTTPException) as error:
            return error
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class State:
    """What is told of a queue: messages, and messages a second. None: it is not told."""

    ready: int | None = None
    unacknowledged: int | None = None
    coming: float = 0
    going: float = 0
    # All that were ever published into it, also those that it refused.
    published: int = 0
    # All that were taken off it by those who received them.
    taken: int = 0
    # Whether it may refuse messages.
    full: bool = False

    @property
    def messages(self) -> int | None:
        """All that it has."""
        if self.ready is None or self.unacknowledged is None:
            return None
        return self.ready + self.unacknowledged


class Overview:
    """Counts, rates and ages of queues; what was last told, or went wrong, is kept for a moment."""

    def __init__(self, settings: Settings, memory: Memory, topology: Topology) -> None:
        """Ask where settings say; memory is held while an answer is read.

        The ages are those of the queues of topology.
        """
        self._management: Management | None = None
        if url := settings.management_url:
            self._management = Management(url, settings.broker, settings.receive_timeout)
        self._memory = memory
        self._topology = topology
        self._turn = BoundedSemaphore()
        self._states: dict[str, State] = {}
        self._histories: dict[str, History] = {}
        self._ages: dict[str, float] = {}
        self._fault = ""
        self._until = 0.0

    def tell(self, names: Iterable[str]) -> list[dict[str, object]]:
        """Return what there is to say of the queues of names; raises BrokerUnavailable."""
        if self._management is None:
            raise BrokerUnavailable(
                "The door is not told where RabbitMQ's management API is: set "
                "RABBITMQ_MANAGEMENT_URL."
            )
        states = self._latest(self._management)
        return [
            {
                "name": name,
                "ready": (state := states.get(name, State())).ready,
                "unacknowledged": state.unacknowledged,
                "dead": states.get(f"{name}.dead", State()).messages,
                "oldest": round(self._ages[name], 1) if name in self._ages else None,
                "rates": {"in": state.coming, "out": state.going},
            }
            for name in names
        ]

    def watch(self) -> None:
        """Look at the queues now and then, for ever: their ages come from what they were before.

        Each new reason why they cannot be seen is logged once.
        """
        told = ""
        while self._management:
            fault = ""
            try:
                self._latest(self._management)
            except (BrokerUnavailable, OutOfMemory) as error:
                fault = str(error)
            if fault and fault != told:
                log.warning("How old messages are is not known: %s", fault)
            told = fault
            gevent.sleep(WATCH)

    def _latest(self, management: Management) -> dict[str, State]:
        """Return what is kept, or ask for it anew; the others wait for the same answer."""
        with self._turn:
            if time.monotonic() >= self._until:
                try:
                    self._states, self._fault = self._read(management.ask()), ""
                except BrokerUnavailable as error:
                    self._states, self._fault = {}, str(error)
                self._note(self._states)
                self._until = time.monotonic() + KEPT
            if self._fault:
                raise BrokerUnavailable(self._fault)
            return self._states

    def _read(self, raw: bytes) -> dict[str, State]:
        with self._memory.grant() as grant:
            grant.add(PARSED * len(raw))
            try:
                return {str(row["name"]): read_state(row) for row in json.loads(raw)}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise BrokerUnavailable(
                    "RabbitMQ's management API cannot be used: its answer makes no sense"
                ) from None

    def _note(self, states: dict[str, State]) -> None:
        """Work out the ages anew; a queue that is not in states has none for now."""
        now = time.monotonic()
        old, self._histories, self._ages = self._histories, {}, {}
        OLDEST.clear()
        for name in self._topology.queues:
            history = self._histories[name] = old.get(name) or History()
            state, dead = states.get(name, State()), states.get(f"{name}.dead", State())
            if state.ready is None:
                continue
            # What expires or is given up is in the dead queue, or was taken off that.
            kept = sum((state.messages or 0, state.taken, dead.messages or 0, dead.taken))
            counts = Counts(state.ready, state.published, kept, state.full)
            self._ages[name] = history.note(now, counts)
            OLDEST.labels(name).set(self._ages[name])


def read_state(row: dict[str, Any]) -> State:
    """Return what row tells of a queue; a new queue has no rates yet, and may have no counts.

    RabbitMQ tells an object of which no column was asked for as `[]`.
    """
    stats = row.get("message_stats") or {}
    coming, going = (
        (stats.get(f"{kind}_details") or {}).get("rate") or 0 for kind in ("publish", "deliver_get")
    )
    limits = row.get("effective_policy_definition") or {}
    return State(
        row.get("messages_ready"),
        row.get("messages_unacknowledged"),
        coming,
        going,
        published=int(stats.get("publish") or 0),
        taken=sum(int(stats.get(way) or 0) for way in TAKEN),
        full=any(
            (row.get(count) or 0) > FULL * limits[limit]
            for limit, count in LIMITS.items()
            if limit in limits
        ),
    )
