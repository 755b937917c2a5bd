# mypy: disable-error-code=no-untyped-call
"""The dead queue: a look that uses nothing up, the way back, and the end of single messages."""

import math
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

from door.amqp import Channel, Link
from gevent.lock import BoundedSemaphore

from subscriber.channel import own_channel
from subscriber.delivery import Delivery, text
from subscriber.resend import Resend, deliveries
from subscriber.settings import Settings


class Dead:
    """The given-up messages of a queue; one request at a time, so that looks keep their order."""

    def __init__(self, broker: Link, queue: str, settings: Settings) -> None:
        """Reach the dead queue of queue by broker's connection."""
        self._broker = broker
        self._exchange, self._user = settings.exchange, settings.broker.user
        self._origin, self._queue = queue, f"{queue}.dead"
        self._timeout = settings.receive_timeout
        self._turn = BoundedSemaphore()

    def look(self, most: int, room: int) -> list[Delivery]:
        """Return no more than most messages, of room bytes as JSON; all stay, in their order."""
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
        """Send no more than most messages back to the queue that they came from; return how many.

        Each is published anew, and leaves the dead queue once the broker has confirmed it. The
        broker's own way, a reject, would depend on policies, and RabbitMQ 4.3 would go on counting
        the message's returns. Raises BrokerUnavailable when one is not taken: it stays.
        """
        with self._channel() as channel:
            return self._send_back(channel, self._deliveries(channel, most))

    def redrive_ids(self, ids: Set[str]) -> int:
        """Send all messages whose id is in ids back, as redrive() does; return how many."""
        with self._channel() as channel:
            return self._send_back(channel, self._chosen(channel, ids))

    def delete_ids(self, ids: Set[str]) -> int:
        """Take all messages whose id is in ids off the dead queue for good; return how many."""
        count = 0
        with self._channel() as channel:
            for delivery in self._chosen(channel, ids):
                channel.basic_ack(delivery.tag)
                count += 1
        return count

    def _send_back(self, channel: Channel, deliveries: Iterable[Delivery]) -> int:
        resend = Resend(channel, self._exchange, self._origin, self._user, self._timeout)
        return resend.send(deliveries)

    @contextmanager
    def _channel(self) -> Iterator[Channel]:
        """Open a channel for one request, when it is its turn."""
        with self._turn, own_channel(self._broker, self._timeout, "the dead queue") as channel:
            yield channel

    def _deliveries(self, channel: Channel, most: float) -> Iterator[Delivery]:
        """Get messages, up to most, and no more than there were at first."""
        return deliveries(self._broker, channel, self._queue, self._timeout, most)

    def _chosen(self, channel: Channel, ids: Set[str]) -> Iterator[Delivery]:
        """Go once through the whole queue, for those whose id is in ids; the others stay.

        Nothing is kept of the others: the broker has them until the end, and keeps their order.
        """
        for delivery in self._deliveries(channel, math.inf):
            if text(delivery.properties.message_id) in ids:
                yield delivery
        channel.basic_nack(0, multiple=True, requeue=True)
