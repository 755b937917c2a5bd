# mypy: disable-error-code=no-untyped-call
"""The way of messages from one queue to another: published anew, and taken off once confirmed."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

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
from gevent.queue import Empty, SimpleQueue

from subscriber.channel import Answers
from subscriber.delivery import Delivery, Handle

# Headers in which the broker keeps a message's past: how often it was returned, and why it died.
PAST = {"x-death", "x-delivery-count", "x-acquired-count"}
PAST |= {
    f"x-{end}-death-{told}" for end in ("first", "last") for told in ("queue", "reason", "exchange")
}
# Bytes of bodies that may wait for their confirms: a single message may have more.
WINDOW_BYTES = 1024 * 1024


class Resend:
    """Sends messages to a queue, and takes each off its own once the broker has confirmed it."""

    def __init__(
        self, channel: Channel, exchange: str, queue: str, user: str, timeout: float
    ) -> None:
        """Publish by channel, as user, to exchange for queue; a confirm takes timeout seconds."""
        self._channel = channel
        self._exchange, self._queue, self._user = exchange, queue, user
        self._timeout = timeout
        self._count = self._published = self._bytes = 0
        # What was published and not confirmed, by the numbers that the confirms bear.
        self._waiting: dict[int, Handle] = {}
        self._answers: SimpleQueue = SimpleQueue()
        channel.confirm_delivery(lambda answer: self._answers.put(answer.method))
        channel.add_on_return_callback(lambda _channel, *returned: self._answers.put(returned[0]))
        channel.add_on_close_callback(lambda _channel, reason: self._answers.put(reason))

    def send(self, deliveries: Iterable[Delivery], window: int = 1) -> int:
        """Send deliveries, in their order; return how many.

        After each window messages, or WINDOW_BYTES, it waits for the confirms. Raises
        BrokerUnavailable when one is not taken: it stays in its queue, and those behind it but for
        the ones of its window that were confirmed.
        """
        for delivery in deliveries:
            self._publish(delivery)
            if len(self._waiting) == window or self._bytes >= WINDOW_BYTES:
                self._settle()
        self._settle()
        return self._count

    def _publish(self, delivery: Delivery) -> None:
        try:
            self._channel.basic_publish(
                self._exchange,
                self._queue,
                delivery.body,
                anew(delivery.properties, self._user),
                mandatory=True,
            )
        except (AMQPError, RecursionError) as error:
            self._settle(error)
        self._published += 1
        self._bytes += len(delivery.body)
        self._waiting[self._published] = delivery.handle

    def _settle(self, failure: object = None) -> None:
        """Wait for the confirms, and acknowledge what they are of; failure is known already.

        A message that no queue takes comes back without a number, and is confirmed then. So none of
        those that wait with it is acknowledged: the others are in both queues.
        """
        confirmed: list[Handle] = []
        while self._waiting:
            answer = self._next()
            if isinstance(answer, Basic.Ack):
                confirmed += self._answered(answer)
            elif isinstance(answer, Basic.Nack):
                self._answered(answer)
                failure = failure or answer
            elif isinstance(answer, Basic.Return):
                failure = answer
            else:
                failure = failure or answer
                break
        if not isinstance(failure, Basic.Return):
            for one in confirmed:
                one.channel.basic_ack(one.tag)
            self._count += len(confirmed)
        self._bytes = 0
        if failure:
            raise BrokerUnavailable(
                f"the queue took {self._count} messages, and not the next: {self._plain(failure)}"
            )

    def _plain(self, failure: object) -> str:
        if isinstance(failure, Basic.Nack):
            return "it is full, or cannot write now (Basic.Nack)"
        if isinstance(failure, Basic.Return):
            bound = f"bound to the exchange {self._exchange!r}"
            return f"no queue {self._queue!r} is {bound} ({failure.reply_text})"
        return "no confirm came in time" if isinstance(failure, Empty) else repr(failure)

    def _next(self) -> Any:
        try:
            return self._answers.get(timeout=self._timeout)
        except Empty as error:
            return error

    def _answered(self, answer: Basic.Ack | Basic.Nack) -> list[Handle]:
        """Return what answer is about; that waits no longer."""
        last = answer.delivery_tag
        numbers = [one for one in self._waiting if one <= last] if answer.multiple else [last]
        return [self._waiting.pop(number) for number in numbers]


def deliveries(
    link: Link, channel: Channel, queue: str, timeout: float, most: float
) -> Iterator[Delivery]:
    """Get messages of queue, up to most, and no more than there were at first.

    Raises BrokerUnavailable when an answer takes more than timeout seconds.
    """
    answers = Answers(channel, timeout)
    channel.add_callback(lambda _: answers.put(None), [Basic.GetEmpty], one_shot=False)

    def get() -> None:
        channel.basic_get(queue, lambda _channel, *got: answers.put(got))

    left = most
    while left > 0:
        answer = answers.to(get)
        if answer is None:
            return
        link.alive()
        method, properties, body = answer
        if method.delivery_tag == 1:
            left = min(most, method.message_count + 1)
        left -= 1
        yield Delivery(method.delivery_tag, body, properties, channel, method.redelivered)


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
