"""What the broker tells of all queues, by its management API."""

import json
import time
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import gevent
from door import BrokerUnavailable
from door.memory import MIB, Memory
from door.settings import BrokerSettings
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from subscriber.settings import Settings

COLUMNS = (
    "name",
    "messages_ready",
    "messages_unacknowledged",
    "message_stats.publish_details.rate",
    "message_stats.deliver_get_details.rate",
)
PATH = f"/api/queues/%2F?columns={','.join(COLUMNS)}"
# Seconds for which an answer is everybody's.
KEPT = 1.0
# Bytes of the largest answer that is read: about 20,000 queues, dead ones included.
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

    @property
    def messages(self) -> int | None:
        """All that it has."""
        if self.ready is None or self.unacknowledged is None:
            return None
        return self.ready + self.unacknowledged


class Overview:
    """Counts and rates of queues; what was last told, or went wrong, is kept for a moment."""

    def __init__(self, settings: Settings, memory: Memory) -> None:
        """Ask where settings say; memory is held while an answer is read."""
        self._management: Management | None = None
        if url := settings.management_url:
            self._management = Management(url, settings.broker, settings.receive_timeout)
        self._memory = memory
        self._turn = BoundedSemaphore()
        self._states: dict[str, State] = {}
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
                "rates": {"in": state.coming, "out": state.going},
            }
            for name in names
        ]

    def _latest(self, management: Management) -> dict[str, State]:
        """Return what is kept, or ask for it anew; the others wait for the same answer."""
        with self._turn:
            if time.monotonic() >= self._until:
                try:
                    self._states, self._fault = self._read(management.ask()), ""
                except BrokerUnavailable as error:
                    self._fault = str(error)
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


def read_state(row: dict[str, Any]) -> State:
    """Return what row tells of a queue; a new queue has no rates yet, and may have no counts.

    RabbitMQ tells an object of which no column was asked for as `[]`.
    """
    stats = row.get("message_stats") or {}
    coming, going = (
        (stats.get(f"{kind}_details") or {}).get("rate") or 0 for kind in ("publish", "deliver_get")
    )
    return State(row.get("messages_ready"), row.get("messages_unacknowledged"), coming, going)
