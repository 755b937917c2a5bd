"""Who may use a door, and what each client may do."""

from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from werkzeug.exceptions import abort

# What a client may do with a queue, or with a topic: send alone.
RIGHTS = ("send", "receive", "manage")
# The header of a message that names its client, as the publisher has it. Only a message that the
# broker knows to be of one of DOORS, its users, is to be believed: AMQP clients write any header,
# but no other user_id than their own (https://www.rabbitmq.com/docs/validated-user-id).
CLIENT_HEADER = "X-Client"
DOORS = ("publisher", "subscriber")
# Values of the header Authorization that were let in, kept so that they are read once each.
MAX_KNOWN = 10_000


@dataclass(frozen=True)
class Client:
    """A client of the list and its rights: names of queues and topics by right."""

    # Empty: whoever comes, where there is no list.
    name: str = ""
    rights: Mapping[str, frozenset[str]] | None = None

    def may(self, right: str, name: str) -> bool:
        """Whether the client has right, which is one of RIGHTS, for name."""
        return self.rights is None or name in self.rights[right]

    def check(self, right: str, name: str) -> None:
        """Abort with 403 unless the client has right, which is one of RIGHTS, for name."""
        if not self.may(right, name):
            abort(403, f"The client {self.name!r} has no right to {right}: {name!r}.")


ANYBODY = Client()


class Access:
    """The clients that may enter, or everybody; a door knows only hashes of their tokens."""

    def __init__(self, clients: Iterable[Mapping[str, Any]] = ()) -> None:
        """Let clients enter; without any, everybody. Raises KeyError and TypeError.

        One is `{"name": "shop", "tokens": ["<SHA-256, in hexadecimal>"], "send": ["orders"]}`, with
        a list for each of RIGHTS.
        """
        self._by_token: dict[str, Client] = {}
        self._known: dict[str | None, Client] = {}
        # Whether everybody may enter.
        self.open = True
        for one in clients:
            self.open = False  # also where it has no token: nobody gets in for want of one
            rights = {right: frozenset(one[right]) for right in RIGHTS}
            client = Client(one["name"], rights)
            self._by_token.update((token, client) for token in one["tokens"])

    def client(self, authorization: str | None) -> Client | None:
        """Return who sends this header Authorization; None for a stranger.

        It has the token as bearer, or name and token as basic (RFC 6750, RFC 7617).
        """
        if self.open:
            return ANYBODY
        known = self._known.get(authorization)
        if known is None and authorization:
            known = self._read(authorization)
            if known and len(self._known) < MAX_KNOWN:
                self._known[authorization] = known
        return known

    def _read(self, authorization: str) -> Client | None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return self._of_token(given.strip().encode())
        if scheme.lower() != "basic":
            return None
        try:
            name, _, token = b64decode(given.strip(), validate=True).partition(b":")
        except ValueError:
            return None
        client = self._of_token(token)
        return client if client and client.name.encode() == name else None

    def _of_token(self, token: bytes) -> Client | None:
        # Who does not know a token learns nothing from the time in which its hash is not found.
        return self._by_token.get(sha256(token).hexdigest())
