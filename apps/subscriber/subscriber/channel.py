# mypy: disable-error-code=no-untyped-call
"""A channel of its own for what one request asks of the broker."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from door import BrokerUnavailable
from door.amqp import AMQPError, Channel, Link
from gevent.event import Event
from gevent.queue import Empty, SimpleQueue


@contextmanager
def own_channel(link: Link, timeout: float, what: str) -> Iterator[Channel]:
    """Open a channel to reach what; once it is closed, the broker has done all it was told.

    Raises BrokerUnavailable, also when an answer takes more than timeout seconds.
    """
    main = link.channel
    if main is None:
        raise BrokerUnavailable("not connected to the broker")
    opened, closed = Event(), Event()
    link.borrowed += 1
    try:
        channel = main.connection.channel(on_open_callback=lambda _: opened.set())
        channel.add_on_close_callback(lambda _channel, _reason: closed.set())
        if not opened.wait(timeout):
            late = BrokerUnavailable("the broker opened no channel in time")
            silent = link.heard < time.monotonic() - timeout
            # A newer connection is not to blame.
            if silent and link.channel is main:
                link.drop(late)
            elif not channel.is_closed:
                channel.close()
            raise late
        yield channel
    except AMQPError as error:
        raise BrokerUnavailable(f"{what} cannot be reached: {error!r}") from None
    finally:
        link.borrowed -= 1
        if opened.is_set():
            if channel.is_open:
                channel.close()
            closed.wait(timeout)


class Answers:
    """What the broker answers on a channel."""

    def __init__(self, channel: Channel, timeout: float) -> None:
        """Hear what is put() here by channel's callbacks, each within timeout seconds."""
        self._heard: SimpleQueue = SimpleQueue()
        self._timeout = timeout
        channel.add_on_close_callback(lambda _channel, reason: self.put(reason))

    def put(self, answer: object) -> None:
        """Hear answer."""
        self._heard.put(answer)

    def to(self, question: Callable[[], object]) -> Any:
        """Ask question and return what is heard next; BrokerUnavailable without an answer."""
        try:
            question()
            answer = self._heard.get(timeout=self._timeout)
        except (AMQPError, Empty) as error:
            raise BrokerUnavailable(f"the broker did not answer: {error!r}") from None
        if isinstance(answer, Exception):
            raise BrokerUnavailable(f"the channel was closed: {answer!r}")
        return answer
