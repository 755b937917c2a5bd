"""The response that settles its messages once it is written."""

import errno
import fcntl
import select
import struct
import termios
import time
from collections.abc import Iterator
from socket import socket

import gevent
from common import events

from subscriber.parcel import Parcel

HUNG_UP = "the client hung up"
# Signs of poll(2): the connection is gone; and the client sends no more, which may be all it
# means (a half-closed connection), or may be the first sign of a close.
GONE, SENDS_NO_MORE = select.POLLERR | select.POLLHUP, select.POLLRDHUP
# Seconds in which the system of a client that sends no more must have taken all, and between two
# looks whether it has.
DELIVERY_TIMEOUT, LOOK = 1.0, 0.005


class Handover(Iterator[bytes]):
    """A parcel as a response body; every way it can end settles it and is told.

    PEP 3333 calls close() after success and failure alike. Only the step after the last piece
    tells them apart: the server asks for it once `sendall` returned. A generator would not do, as
    the finally of one that never started does not run.
    """

    def __init__(self, parcel: Parcel, client: socket | None, event: events.Event) -> None:
        """Hand parcel to client (None: nobody to look at, as in a test); event is told the end."""
        event.deferred = True
        self._parcel = parcel
        self._pieces = iter(parcel.pieces())
        self._client = client
        self._event = event
        self._begun = self._settled = self._doubtful = False

    def __next__(self) -> bytes:
        """Return the next piece; when asked for more than all, take it for written and stop.

        Raises ConnectionResetError when the client is known to have gone without its messages.
        """
        if not self._begun:
            self._begun = True
            self._doubtful = shows(self._client, GONE | SENDS_NO_MORE)
            if self._doubtful:
                self._check_client()
        try:
            return next(self._pieces)
        except StopIteration:
            self._end()
            raise

    def close(self) -> None:
        """Have the messages handed to the next client unless they were written."""
        if not self._settled:
            self._settled = True
            self._parcel.settle(False)
            self._event.fields["reason"] = HUNG_UP
            self._event.tell(200, level="warning")

    def _end(self) -> None:
        # A client that read everything may have closed by now; a reset is one that did not.
        if self._doubtful and self._client is not None:
            wait_until_taken(self._client)
        self._check_client()
        if not self._settled:
            self._settled = True
            self._parcel.settle(True)
            self._event.tell(200)

    def _check_client(self) -> None:
        if shows(self._client, GONE):
            raise ConnectionResetError(errno.ECONNRESET, HUNG_UP)


def shows(client: socket | None, signs: int) -> bool:
    """Whether client shows one of signs."""
    if client is None:
        return False
    poll = select.poll()
    poll.register(client.fileno(), signs)
    return any(seen & signs for _, seen in poll.poll(0))


def wait_until_taken(client: socket) -> None:
    """Wait until the client's system has taken all that was sent; raises ConnectionResetError.

    The system takes a small body also for a client that has closed; what tells is the reset with
    which that client's own system answers it (tcp(7), SIOCOUTQ).
    """
    end = time.monotonic() + DELIVERY_TIMEOUT
    while _untaken(client):
        if time.monotonic() > end or shows(client, GONE):
            raise ConnectionResetError(errno.ECONNRESET, HUNG_UP)
        gevent.sleep(LOOK)


def _untaken(client: socket) -> int:
    answer = fcntl.ioctl(client.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])
