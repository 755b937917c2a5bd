"""Move what waits in one queue to the end of another: `python3 -m subscriber.move OLD NEW`.

It runs beside the subscriber, in its container. A message is in both queues for the moment between
its confirm and its acknowledgement: whoever is killed then leaves it in both.
"""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import gevent
from common.environment import ConfigError, Environment, leave
from door import BrokerUnavailable
from door.amqp import SETTLE, AMQPError, Channel, Link
from door.settings import BrokerSettings
from gevent.event import AsyncResult

from subscriber.channel import own_channel
from subscriber.resend import Resend, deliveries
from subscriber.settings import Settings

# Seconds that the broker has for one answer. Nobody waits for this program at a door.
TIMEOUT = 30.0
# Messages that may wait for their confirms.
WINDOW = 100


class Once(Link):
    """A connection that is made once: who waits for it is told why it cannot be."""

    def __init__(self, settings: BrokerSettings) -> None:
        """Prepare to connect with settings."""
        # What it reads and writes is bound to one connection.
        super().__init__(replace(settings, others=()), "move")
        self._settings = settings
        self._made = AsyncResult()

    def connect(self) -> None:
        """Wait until the connection is made; BrokerUnavailable when it cannot be."""
        self.start()
        reason = "no answer in time"
        with gevent.Timeout(TIMEOUT, False):
            reason = self._made.get()
        if reason:
            user = self._settings.user
            raise BrokerUnavailable(f"no connection to the broker as {user}: {reason}")

    def ready(self, channel: Channel) -> None:
        """Let the one who waits go on."""
        super().ready(channel)
        self._made.set("")

    def lost(self, reason: object) -> None:
        """Tell the one who waits why."""
        super().lost(reason)
        self._made.set(repr(reason))


@contextmanager
def connected(settings: BrokerSettings) -> Iterator[Link]:
    """Connect, and close the connection at the end."""
    link = Once(settings)
    try:
        link.connect()
        yield link
    finally:
        with suppress(AMQPError):  # it has just ended
            link.stop()


def move(settings: Settings, reader: BrokerSettings, old: str, new: str) -> int:
    """Move as many messages as old has now to new, in their order; return how many.

    They are read as reader's user, and written as that of settings. Raises BrokerUnavailable.
    """
    with (
        connected(reader) as source,
        connected(settings.broker) as target,
        own_channel(source, TIMEOUT, f"the queue {old!r}") as getting,
        own_channel(target, TIMEOUT, f"the exchange {settings.exchange!r}") as publishing,
    ):
        resend = Resend(publishing, settings.exchange, new, settings.broker.user, TIMEOUT)
        try:
            return resend.send(deliveries(source, getting, old, TIMEOUT, math.inf), WINDOW)
        finally:
            # So that the broker takes the last acknowledgements.
            gevent.sleep(SETTLE)


def main() -> None:
    """Move, and say how many messages; a failure is one line, and status 1."""
    if len(sys.argv) != 3:
        leave("usage: python3 -m subscriber.move OLD NEW")
    old, new = sys.argv[1:]
    # What fails is told once, at the end.
    logging.disable()
    # Should the container's memory not suffice, this program is to end, and not the subscriber.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        environment = Environment()
        settings = Settings.read(environment)
        reader = replace(
            settings.broker,
            user=environment.text("READER_USER"),
            password=environment.secret("READER_PASSWORD"),
        )
        count = move(settings, reader, old, new)
    except (ConfigError, BrokerUnavailable) as error:
        leave(f"{old} to {new}: {error}")
    print(f"moved {count} messages from {old} to {new}")


if __name__ == "__main__":
    main()
