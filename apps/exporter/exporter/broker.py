"""Asking RabbitMQ's management API."""

import asyncio
from base64 import b64encode

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


class BrokerFailure(Exception):  # noqa: N818 - a state of the broker, not a fault
    """The broker gave no answer that could be used; the text says why, in one line."""


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

        Raises BrokerFailure.
        """
        try:
            async with asyncio.timeout_at(deadline):
                url = f"{self._settings.url}/api/{PATHS[module]}"
                async with self._session.get(url) as response:
                    if response.status != 200:
                        raise BrokerFailure(f"HTTP {response.status}")
                    return await response.read()
        except TimeoutError:
            raise BrokerFailure(f"no answer within {self._settings.timeout} s") from None
        except aiohttp.ClientPayloadError:
            raise BrokerFailure("the answer broke off") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise BrokerFailure(" ".join(str(error).split()) or type(error).__name__) from None
