"""The response that settles its messages once it is written."""

import errno
import select
from collections.abc import Callable, Iterator
from socket import socket

from door import events

HUNG_UP = "the client hung up"


class Handover(Iterator[bytes]):
    """Messages as a response body; every way it can end settles them and is told.

    PEP 3333 calls close() after success and failure alike. Only the step after the last chunk
    tells them apart: pywsgi asks for it once `sendall` returned. A generator would not do, as
    the finally of one that never started does not run.
    """

    def __init__(
        self,
        body: bytes,
        client: socket | None,
        event: events.Event,
        settle: Callable[[bool], object],
    ) -> None:
        """Hand body to client (None: nobody to look at, as in a test).

        At the end settle gets to know whether it was written, and event is told.
        """
        event.deferred = True
        self._body = body
        self._client = client
        self._event = event
        self._settle = settle
        self._given = False
        self._settled = False

    def __next__(self) -> bytes:
        """Return the body; when asked for more, take it for written and stop.

        Raises ConnectionResetError when the client is known to have gone without its messages.
        """
        if not self._given:
            # The system would take a small body even for a client that left while it waited.
            self._check_client(select.POLLRDHUP | select.POLLERR)
            self._given = True
            return self._body
        # A client that read everything may have closed by now; a reset is one that did not.
        self._check_client(select.POLLERR)
        if not self._settled:
            self._settled = True
            self._settle(True)
            self._event.tell(200)
        raise StopIteration

    def close(self) -> None:
        """Have the messages handed to the next client unless they were written."""
        if not self._settled:
            self._settled = True
            self._settle(False)
            self._event.fields["reason"] = HUNG_UP
            self._event.tell(200, level="warning")

    def _check_client(self, signs: int) -> None:
        if has_left(self._client, signs):
            raise ConnectionResetError(errno.ECONNRESET, HUNG_UP)


def has_left(client: socket | None, signs: int = select.POLLRDHUP | select.POLLERR) -> bool:
    """Whether client shows one of signs (of poll(2)) of having closed the connection."""
    if client is None:
        return False
    poll = select.poll()
    poll.register(client.fileno(), signs)
    return any(seen & signs for _, seen in poll.poll(0))
