# mypy: disable-error-code=no-untyped-call
"""The dead queue: a look that uses nothing up, the way back, and the end of single messages."""

import copy
import math
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

from door import BrokerUnavailable
from door.access import DOORS
from door.amqp import (
    PERSISTENT_DELIVERY_MODE,
    AMQPError,
    Basic,
    BasicProperties,
    Channel,
    Link,
)
from gevent.lock import BoundedSemaphore
from gevent.queue import Empty, SimpleQueue

from subscriber.channel import Answers, own_channel
from subscriber.delivery import Delivery, text
from subscriber.settings import Settings

# Headers in which the broker keeps a message's past: how often it was returned, and why it died.
PAST = {"x-death", "x-delivery-count", "x-acquired-count"}
PAST |= {
    f"x-{end}-death-{told}" for end in ("first", "last") for told in ("queue", "reason", "exchange")
}


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
        count = 0
        confirms: SimpleQueue = SimpleQueue()
        channel.confirm_delivery(lambda answer: confirms.put(answer.method))
        channel.add_on_return_callback(lambda _channel, *returned: confirms.put(returned[0]))
        channel.add_on_close_callback(lambda _channel, reason: confirms.put(reason))
        for delivery in deliveries:
            try:
                channel.basic_publish(
                    self._exchange,
                    self._origin,
                    delivery.body,
                    anew(delivery.properties, self._user),
                    mandatory=True,
                )
                answer = confirms.get(timeout=self._timeout)
            except (AMQPError, Empty, RecursionError) as error:
                answer = error
            if not isinstance(answer, Basic.Ack):
                raise BrokerUnavailable(
                    f"the queue took {count} messages back, and not the next: {answer!r}"
                )
            channel.basic_ack(delivery.tag)
            count += 1
        return count

    @contextmanager
    def _channel(self) -> Iterator[Channel]:
        """Open a channel for one request, when it is its turn."""
        with self._turn, own_channel(self._broker, self._timeout, "the dead queue") as channel:
            yield channel

    def _deliveries(self, channel: Channel, most: float) -> Iterator[Delivery]:
        """Get messages, up to most, and no more than there were at first."""
        answers = Answers(channel, self._timeout)
        channel.add_callback(lambda _: answers.put(None), [Basic.GetEmpty], one_shot=False)

        def get() -> None:
            channel.basic_get(self._queue, lambda _channel, *got: answers.put(got))

        left = most
        while left > 0:
            answer = answers.to(get)
            if answer is None:
                return
            self._broker.alive()
            method, properties, body = answer
            if method.delivery_tag == 1:
                left = min(most, method.message_count + 1)
            left -= 1
            yield Delivery(method.delivery_tag, body, properties, channel, method.redelivered)

    def _chosen(self, channel: Channel, ids: Set[str]) -> Iterator[Delivery]:
        """Go once through the whole queue, for those whose id is in ids; the others stay.

        Nothing is kept of the others: the broker has them until the end, and keeps their order.
        """
        for delivery in self._deliveries(channel, math.inf):
            if text(delivery.properties.message_id) in ids:
                yield delivery
        channel.basic_nack(0, multiple=True, requeue=True)


def anew(properties: BasicProperties, user: str) -> BasicProperties:
    """Return properties without what the broker would take for the past of another message.

    The broker refuses a message that bears another name than its user's, so that of a door becomes
    user, and another one goes.
    Source: https://www.rabbitmq.com/docs/validated-user-id
    """
    fresh = copy.copy(properties)
    if properties.headers:
        fresh.headers = {
            name: value for name, value in properties.headers.items() if name not in PAST
        }
    fresh.user_id = user if properties.user_id in DOORS else None
    fresh.delivery_mode = PERSISTENT_DELIVERY_MODE
    return fresh
