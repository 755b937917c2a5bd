"""One connection to the broker, shared by all queues and every request of this process."""

import time

import gevent
from door.amqp import SETTLE, Channel, Link
from door.clients import CONNECTION, SHARE
from door.memory import Memory

from subscriber.queue import Queue
from subscriber.settings import Settings
from subscriber.shared import Polls, Shared

# Bytes of the largest message that RabbitMQ takes by default. Room for one is no part of the
# Memory: a single get must be possible while that is nearly full, as small messages are then.
LARGEST_MESSAGE = 16 * 1024 * 1024
# Share of the connections that may be long polls: others must be answered, too.
POLLS = 0.75


class Broker(Link):
    """The connection, and its queues by their names; each has a channel of its own.

    The main channel serves no queue: that it is open says that the broker can be used.
    """

    def __init__(self, settings: Settings, memory: Memory) -> None:
        """Prepare for settings, to hold messages in memory; nothing connects before start()."""
        super().__init__(settings.broker, "subscriber")
        self._settings = settings
        polls = Polls(int(memory.size * SHARE * POLLS) // CONNECTION)
        self._shared = Shared(memory, polls)
        self._queues: dict[str, Queue] = {}
        self._finishing = False

    def queue(self, name: str) -> Queue:
        """Return the queue of name, always the same; the broker need not know it."""
        queue = self._queues.get(name)
        if queue is None:
            queue = Queue(name, self, self._settings, self._shared)
            self._queues[name] = queue
            if self._finishing:
                queue.finish()
        return queue

    def lost(self, reason: object) -> None:
        """Forget what the connection brought, as the broker requeues it; fail who waits."""
        super().lost(reason)
        for queue in self._queues.values():
            queue.lost(f"the broker was lost: {reason}")

    @property
    def idle(self) -> bool:
        """Whether no message is held, leased or on its way."""
        return super().idle and all(queue.idle for queue in self._queues.values())

    def pause(self) -> bool:
        """Fetch nothing until resume(); False while a message is leased, or held for some time."""
        queues = self._queues.values()
        if any(queue.keeps_some for queue in queues):
            return False
        for queue in queues:
            queue.pause()
        return True

    def resume(self) -> None:
        """Fetch what is wanted."""
        for queue in self._queues.values():
            queue.resume()

    def move(self, channel: Channel) -> None:
        """Go on by the connection of channel; who waits for a message does not notice."""
        self.ready(channel)
        for queue in self._queues.values():
            queue.moved()

    def finish(self) -> None:
        """Let nobody wait any longer for messages that are still to come."""
        self._finishing = True
        for queue in self._queues.values():
            queue.finish()

    def stop(self) -> None:
        """Close the connection once the broker had time to take the acknowledgements."""
        queues = self._queues.values()
        for queue in queues:
            queue.end_burst()
        with gevent.Timeout(SETTLE, False):
            while any(queue.bursting for queue in queues):
                gevent.sleep(0.01)
        for queue in queues:
            queue.settle()
        told = max((queue.told for queue in queues), default=0.0)
        gevent.sleep(max(0.0, told + SETTLE - time.monotonic()))
        super().stop()
