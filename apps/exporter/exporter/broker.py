"""Asking RabbitMQ's management API."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from exporter.settings import Settings

# Where each module's data are.
PATHS = {
    "overview": "overview",
    "connections": "connections",
    "exchange": "exchanges",
    "node": "nodes",
    "queue": "queues",
}


class NoAnswer(Exception):  # noqa: N818 - a state of who is asked, not a fault
    """There was no answer that could be used; the text says why, in one line."""


@asynccontextmanager
async def answer(
    session: aiohttp.ClientSession, url: str, deadline: float, seconds: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask url; it and what is done with its answer end by deadline in the loop's time.

    Raises NoAnswer, which calls the deadline one of so many seconds.
    """
    try:
        async with asyncio.timeout_at(deadline), session.get(url) as response:
            if response.status != 200:
                raise NoAnswer(f"HTTP {response.status}")
            yield response
    except TimeoutError:
        raise NoAnswer(f"no answer within {seconds} s") from None
    except aiohttp.ClientPayloadError:
        raise NoAnswer("the answer broke off") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise NoAnswer(" ".join(str(error).split()) or type(error).__name__) from None


class Broker:
    """The management API of one broker, with the connections to it."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet; ConfigError when a file for TLS cannot be used."""
        self._settings = settings
        # surrogateescape: the bytes of the environment, UTF-8 or not.
        login = f"{settings.user}:{settings.password}".encode("utf-8", "surrogateescape")
        self._session = aiohttp.ClientSession(
            # A broker that comes back may have another address.
            connector=aiohttp.TCPConnector(ssl=settings.tls(), ttl_dns_cache=1),
            headers={
                "Accept": "application/json",
                "Authorization": f"Basic {b64encode(login).decode()}",
            },
            # A scrape's deadline bounds what aiohttp does for it.
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def get(self, module: str, deadline: float) -> bytes:
        """Return the answer for module, whole by deadline in the loop's time.

        Raises NoAnswer.
        """
        url = f"{self._settings.url}/api/{PATHS[module]}"
        async with answer(self._session, url, deadline, self._settings.timeout) as response:
            return await response.read()
