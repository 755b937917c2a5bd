# mypy: disable-error-code=no-untyped-call
"""The dead queue: a look that uses nothing up, and the way back."""

from collections.abc import Iterator
from contextlib import contextmanager

from door import BrokerUnavailable
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.queue import Empty, SimpleQueue
from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.spec import Basic

from subscriber.broker import Broker
from subscriber.delivery import Delivery
from subscriber.settings import Settings


class Dead:
    """Messages that were given up; one request at a time, so that looks keep their order."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        """Reach the dead queue by broker's connection."""
        self._broker = broker
        self._queue = f"{settings.queue}.dead"
        self._timeout = settings.receive_timeout
        self._turn = BoundedSemaphore()

    def look(self, most: int, room: int) -> list[Delivery]:
        """Return at most most messages, of room bytes as JSON; all stay, in their order."""
        seen: list[Delivery] = []
        with self._channel() as channel:
            left = room
            for delivery in self._deliveries(channel, most):
                left -= delivery.size
                if seen and left < 0:
                    break
                seen.append(delivery)
            # Of this queue the broker counts no deliveries.
            channel.basic_nack(0, multiple=True, requeue=True)
        return seen

    def redrive(self, most: int) -> int:
        """Send at most most messages back to the queue that they came from; how many.

        The dead queue's own policy does it: what is rejected there goes back.
        """
        count = 0
        with self._channel() as channel:
            for delivery in self._deliveries(channel, most):
                channel.basic_reject(delivery.tag, requeue=False)
                count += 1
        return count

    @contextmanager
    def _channel(self) -> Iterator[Channel]:
        """Open a channel for one request; once it is closed, the broker has done all it was told.

        Raises BrokerUnavailable.
        """
        with self._turn:
            main = self._broker.channel
            if main is None:
                raise BrokerUnavailable("not connected to the broker")
            opened, closed = Event(), Event()
            try:
                channel = main.connection.channel(on_open_callback=lambda _: opened.set())
                channel.add_on_close_callback(lambda _channel, _reason: closed.set())
                if not opened.wait(self._timeout):
                    late = BrokerUnavailable("the broker opened no channel in time")
                    # A newer connection is not to blame.
                    if self._broker.channel is main:
                        self._broker.drop(late)
                    raise late
                yield channel
            except AMQPError as error:
                raise BrokerUnavailable(f"the dead queue cannot be reached: {error!r}") from None
            finally:
                if opened.is_set():
                    if channel.is_open:
                        channel.close()
                    closed.wait(self._timeout)

    def _deliveries(self, channel: Channel, most: int) -> Iterator[Delivery]:
        """Get messages, at most most, and no more than there were at first."""
        answers: SimpleQueue = SimpleQueue()
        channel.add_callback(lambda _: answers.put(None), [Basic.GetEmpty], one_shot=False)
        channel.add_on_close_callback(lambda _channel, reason: answers.put(reason))
        left = most
        while left > 0:
            try:
                channel.basic_get(self._queue, lambda _channel, *got: answers.put(got))
                answer = answers.get(timeout=self._timeout)
            except (AMQPError, Empty) as error:
                raise BrokerUnavailable(f"the broker did not answer: {error!r}") from None
            if answer is None:
                return
            if isinstance(answer, Exception):
                raise BrokerUnavailable(f"the channel was closed: {answer!r}")
            method, properties, body = answer
            if method.delivery_tag == 1:
                left = min(most, method.message_count + 1)
            left -= 1
            yield Delivery(method.delivery_tag, body, properties, channel, method.redelivered)
