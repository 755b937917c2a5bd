"""Browsers send what pages have them send: which of these requests a door takes.

Any page can have a browser send a request to a door that the browser reaches, some of them (GET
/receive is one) without asking the door before. Other programs send none of the headers that tell
of pages, so they notice nothing but the check of Host: that stops a page whose own name was made to
lead to the door (DNS rebinding), for which the door is no foreign origin.
"""

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

from door.call import OPEN
from door.topology import Lists

# Names that every door has on its own host.
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
PORT = re.compile(r":[0-9]*\Z")

# What a page of the list may send and read (https://fetch.spec.whatwg.org/#http-cors-protocol).
METHODS = "DELETE, GET, POST"
SENT = "Authorization, Content-Encoding, Content-Type, Message-Id, X-Request-Id"
TOLD = "Allow, Message-Id, Retry-After, WWW-Authenticate, X-Receipt, X-Request-Id"
OWN_HEADER = re.compile(r"x-[a-z0-9-]{1,100}", re.IGNORECASE)
# Seconds a browser remembers what it may send.
MAX_AGE = 600


class Browsers:
    """Which requests come from pages that may use a door."""

    def __init__(self, names: Collection[str] = ()) -> None:
        """Let requests to names in, and to LOCAL; to any name without names."""
        self._names = LOCAL.union(map(str.lower, names)) if names else None

    def fault(self, environ: dict[str, Any], lists: Lists) -> str | None:
        """Return why the request of a WSGI environment is refused; None when it is not."""
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None:
            if origin in lists.origins:
                return None
            place = origin.lower().partition("://")[2]  # nothing of `null`
            if not place or place != environ.get("HTTP_HOST", "").lower():
                return f"Pages of the origin {origin[:200]!r} may not use this door."
        if environ.get("HTTP_SEC_FETCH_SITE") == "cross-site":
            return "Pages of other sites may not use this door."
        # With clients a page needs a token; a browser sends none that it got under another name.
        if self._names and lists.access.open and environ["PATH_INFO"] not in OPEN:
            # A request without Host, of HTTP/1.0, is no browser's.
            host = environ.get("HTTP_HOST", "localhost")
            if _name(host) not in self._names:
                return f"This door is not called {host[:200]!r}."
        return None


@lru_cache(maxsize=32)
def _name(host: str) -> str:
    """Return the name in a header Host."""
    return PORT.sub("", host).lower()


def letting_read(origin: str, start_response: Callable[..., Any]) -> Callable[..., Any]:
    """Return a start_response whose answers pages of origin may read."""
    headers = [
        ("Access-Control-Allow-Origin", origin),
        ("Access-Control-Expose-Headers", TOLD),
        ("Vary", "Origin"),
    ]

    def start(status: str, own: list[tuple[str, str]], *error: Any) -> Any:
        return start_response(status, [*own, *headers], *error)

    return start


def may_send(environ: dict[str, Any], lists: Lists) -> list[tuple[str, str]] | None:
    """Return what a browser that asks is told of what its page may send; None: it does not ask."""
    asks = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    if environ["REQUEST_METHOD"] != "OPTIONS" or not asks:
        return None
    if environ.get("HTTP_ORIGIN") not in lists.origins:
        return None
    # Every header X-… may travel with a message.
    wanted = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "").split(",")
    own = [name.strip() for name in wanted if OWN_HEADER.fullmatch(name.strip())]
    return [
        ("Access-Control-Allow-Methods", METHODS),
        ("Access-Control-Allow-Headers", ", ".join([SENT, *own])),
        ("Access-Control-Max-Age", str(MAX_AGE)),
    ]
