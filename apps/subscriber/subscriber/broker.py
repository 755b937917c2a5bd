"""One connection to the broker, shared by every request of this process."""

import heapq
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Self

import gevent
from door import BrokerUnavailable
from door.environment import Environment
from door.settings import BrokerSettings, EventSettings
from door.web import BROKER_UP
from gevent.event import AsyncResult
from pika.adapters.gevent_connection import GeventConnection
from pika.channel import Channel
from pika.connection import Connection
from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.spec import Basic, BasicProperties

LOG = logging.getLogger(__name__)

# Seconds between two attempts to connect: doubled from the first to the last.
FIRST_RETRY, LAST_RETRY = 0.2, 2.0
# Seconds the connection stays open after the last acknowledgement. A quorum queue takes them
# behind the channel's back: closing at once left 267 of 300 acknowledged messages in the queue,
# a second left none. AMQP has no answer to an acknowledgement that could be waited for.
SETTLE = 1.0


@dataclass(frozen=True)
class Settings:
    """What the subscriber reads from its environment."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    events: EventSettings = field(default_factory=EventSettings)
    queue: str = "takeaway"
    port: int = 5001
    # Seconds a request waits for the broker's answer.
    receive_timeout: int = 4

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read RABBITMQ_*, FLUENTD_*, PORT and RECEIVE_TIMEOUT; ConfigError by name."""
        return cls(
            broker=BrokerSettings.read(env),
            events=EventSettings.read(env),
            queue=env.text("RABBITMQ_QUEUE", cls.queue),
            port=env.number("PORT", cls.port, 1, 65535),
            receive_timeout=env.number("RECEIVE_TIMEOUT", cls.receive_timeout, 1, 4),
        )


@dataclass(frozen=True, order=True)
class Delivery:
    """A message that the broker handed out and waits to have acknowledged."""

    tag: int
    body: bytes = field(compare=False, repr=False)
    properties: BasicProperties = field(compare=False, repr=False)
    # A tag means something only on its own channel: on a later one it is another message's.
    channel: Channel = field(compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Waiter:
    """A request that waits for a delivery, None (the queue is empty) or an error."""

    number: int
    answer: AsyncResult = field(default_factory=AsyncResult)


class Broker:
    """Messages of one queue, in the order of sending, for requests in the order of asking.

    Nothing is ever requeued, as the broker counts that towards the delivery limit: a message
    that its request could not write is held here and goes out before the queue's next one.
    Callers are greenlets of one thread; pika's callbacks run in gevent's hub and never block.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepare for settings; nothing connects before start()."""
        self._settings = settings
        self._channel: Channel | None = None
        # A heap; while it holds anything nobody waits, because requests take from it first.
        self._held: list[Delivery] = []
        self._waiting: deque[Waiter] = deque()
        self._arrived = 0
        # When basic.get was sent and the last Waiter.number it speaks for; None: none is out.
        self._asked: tuple[float, int] | None = None
        self._last_ack = 0.0
        self._retry = FIRST_RETRY
        self._keeper: gevent.Greenlet | None = None
        self._stopping = False
        self._logged = ""
        # The first connection's, kept because every new one would leave a pipe open.
        self._ioloop: Any = None

    @property
    def up(self) -> bool:
        """Whether a channel is open now."""
        return self._channel is not None

    def get(self) -> Delivery | None:
        """Return the next message, which ack() or release() must follow; None: queue empty.

        Raises BrokerUnavailable at once when not connected, when the connection is lost
        while waiting, and when no answer comes within receive_timeout seconds.
        """
        if self._channel is None:
            raise BrokerUnavailable("not connected to the broker")
        if self._held:
            return heapq.heappop(self._held)
        self._arrived += 1
        waiter = Waiter(self._arrived)
        self._waiting.append(waiter)
        self._ask()
        waiter.answer.wait(self._settings.receive_timeout)
        if not waiter.answer.ready():
            self._waiting.remove(waiter)
            self._drop_if_silent()
            raise BrokerUnavailable("the broker did not answer in time")
        delivery: Delivery | None = waiter.answer.get()
        return delivery

    def ack(self, delivery: Delivery) -> None:
        """Take delivery off the queue; nothing when its connection is gone (it comes again)."""
        if delivery.channel is not self._channel:
            return
        try:
            self._channel.basic_ack(delivery.tag)
            self._last_ack = time.monotonic()
        except AMQPError as error:
            self._drop(error)

    def release(self, delivery: Delivery) -> None:
        """Hand delivery to the next request; nothing when its connection is gone."""
        if delivery.channel is self._channel:
            self._hand_out(delivery)

    def start(self) -> None:
        """Connect in the background, and again for as long as it takes whenever that is lost."""
        self._keeper = gevent.spawn(self._keep_connected)

    def stop(self) -> None:
        """Close the connection once the broker had time to take the acknowledgements."""
        gevent.sleep(max(0.0, self._last_ack + SETTLE - time.monotonic()))
        self._stopping = True
        if self._channel is not None:
            self._channel.connection.close()
        if self._keeper is not None:
            self._keeper.join(timeout=1)

    def _open_channel(self, connection: Connection) -> None:
        connection.channel(on_open_callback=self.opened)

    def opened(self, channel: Channel) -> None:
        """Use channel, which was just opened."""
        self._channel, self._logged = channel, ""
        channel.add_callback(self._on_empty, [Basic.GetEmpty], one_shot=False)
        channel.add_on_close_callback(self._on_channel_closed)
        BROKER_UP.set(1)
        LOG.info("Connected to %s:%d", self._settings.broker.host, self._settings.broker.port)

    def lost(self, reason: object) -> None:
        """Forget what the connection brought, as the broker requeues it; fail who waits."""
        self._channel, self._asked = None, None
        self._held.clear()
        BROKER_UP.set(0)
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.answer.set_exception(BrokerUnavailable(f"the broker was lost: {reason}"))

    def _ask(self) -> None:
        """Send basic.get for whoever waits; pika allows one a channel at a time."""
        if self._channel is None or self._asked or not self._waiting:
            return
        self._asked = time.monotonic(), self._waiting[-1].number
        try:
            self._channel.basic_get(self._settings.queue, self._on_message)
        except AMQPError as error:
            self._drop(error)

    def _on_message(
        self, channel: Channel, method: Basic.GetOk, properties: BasicProperties, body: bytes
    ) -> None:
        if channel is self._channel:
            self._asked, self._retry = None, FIRST_RETRY
            self._hand_out(Delivery(method.delivery_tag, body, properties, channel))
            self._ask()

    def _on_empty(self, _frame: object) -> None:
        if self._asked is None:
            return
        # Who came after the question may have come after a new message, too: ask again for them.
        (_, last), self._asked, self._retry = self._asked, None, FIRST_RETRY
        while self._waiting and self._waiting[0].number <= last:
            self._waiting.popleft().answer.set(None)
        self._ask()

    def _hand_out(self, delivery: Delivery) -> None:
        if self._waiting:
            self._waiting.popleft().answer.set(delivery)
        else:
            heapq.heappush(self._held, delivery)

    def _on_channel_closed(self, channel: Channel, reason: Exception) -> None:
        # The queue is missing or forbidden; the connection's own end is reported elsewhere.
        if channel is self._channel and isinstance(reason, ChannelClosedByBroker):
            self._drop(reason)

    def _drop_if_silent(self) -> None:
        """Renew the connection when an answer is overdue, not when the line is merely long."""
        # A little less than the time-out, as the two clocks need not agree.
        overdue = 0.9 * self._settings.receive_timeout
        if self._asked and time.monotonic() - self._asked[0] > overdue:
            self._drop(BrokerUnavailable("the broker did not answer basic.get in time"))

    def _drop(self, reason: Exception) -> None:
        """Cut the connection, without the closing handshake that a silent broker never ends."""
        if self._channel is not None:
            connection = self._channel.connection
            self.lost(reason)
            # pika's heartbeat checker does the same; there is no public way.
            connection._terminate_stream(reason)

    def _keep_connected(self) -> None:
        while not self._stopping:
            try:
                reason = self._hold_connection()
            except Exception as error:  # whatever it was, the answer is the next attempt
                reason = error
            self.lost(reason)
            # One line for each loss and each new reason, not for each attempt.
            if repr(reason) != self._logged and not self._stopping:
                self._logged = repr(reason)
                LOG.warning("No connection to the broker: %s", self._logged)
            gevent.sleep(self._retry)
            self._retry = min(2 * self._retry, LAST_RETRY)

    def _hold_connection(self) -> Exception:
        """Connect, wait until the connection has ended, and return why it did."""
        ended = AsyncResult()
        connection = GeventConnection(
            self._settings.broker.parameters("subscriber"),
            on_open_callback=self._open_channel,
            on_open_error_callback=lambda _connection, reason: ended.set(reason),
            on_close_callback=lambda _connection, reason: ended.set(reason),
            custom_ioloop=self._ioloop,
        )
        self._ioloop = connection.ioloop
        reason: Exception = ended.get()
        return reason
