"""What is held for the next request, and is not kept from other programs for it."""

import json
import time
from urllib.parse import quote

import gevent
from door import BrokerUnavailable

from subscriber.line import Line
from subscriber.overview import Management
from subscriber.settings import Settings
from subscriber.settle import Settler

# Seconds between two looks whether messages are still held, and whether another consumes the queue.
LOOK = 5.0
# Seconds for which a message is held or leased at most: RabbitMQ closes the channel of one that is
# unsettled for 1,800.
LONGEST = 1700
PATH = "/api/queues/%2F/{}?columns=consumer_details.channel_details.user"


class Consumers:
    """Consumers of a queue that are other programs.

    The management API tells them, up to 5 seconds late. AMQP does not: for the count of a passive
    queue.declare, each message that was got and is not settled is a consumer, too.
    Source: query_stat in deps/rabbit/src/rabbit_fifo.erl of RabbitMQ, seen with 4.0.5
    """

    def __init__(self, queue: str, settings: Settings) -> None:
        """Ask for queue where settings say; without a management API nobody is known."""
        self._user = settings.broker.user
        self._management: Management | None = None
        if url := settings.management_url:
            path = PATH.format(quote(queue, ""))
            self._management = Management(url, settings.broker, settings.receive_timeout, path)

    def any(self) -> bool:
        """Whether there is one, by its user; False while that is not told."""
        if self._management is None:
            return False
        try:
            told = json.loads(self._management.ask())["consumer_details"]
            # Without details where the channel has just gone, and then maybe as [].
            users = [(one.get("channel_details") or {}).get("user") for one in told]
        except (BrokerUnavailable, ValueError, TypeError, KeyError, AttributeError):
            return False
        return any(user != self._user for user in users)


class Held:
    """Gives what a line holds back to its queue once another program consumes that.

    The broker takes what is held for on its way to a client, and brings it to nobody else. So it
    goes back, too, before the broker closes the channel because of it.
    """

    def __init__(self, line: Line, settler: Settler, consumers: Consumers) -> None:
        """Give line's messages back by settler, when there are consumers."""
        self._line = line
        self._settler = settler
        self._consumers = consumers
        self._keeper: gevent.Greenlet | None = None

    def watch(self) -> None:
        """Begin to look after the line, or go on."""
        if self._keeper is None:
            self._keeper = gevent.spawn(self._keep)

    def _keep(self) -> None:
        while True:
            gevent.sleep(LOOK)
            first = self._line.first
            if first and (first.came + LONGEST < time.monotonic() or self._consumers.any()):
                self._give_back()

    def _give_back(self) -> None:
        held = self._line.give_up()
        self._settler.give_back(held)
        for delivery in held:
            delivery.close()
