"""Serve until SIGTERM: `python3 -m exporter`."""

import asyncio
import json
import logging
import os
import signal
from datetime import UTC, datetime

from aiohttp import web
from common.environment import ConfigError, leave

from exporter import __version__
from exporter.app import create_app
from exporter.settings import Settings

# Seconds running scrapes get to finish after SIGTERM.
DRAIN_TIMEOUT = 0.5

log = logging.getLogger("exporter")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the names that the original's logger uses."""

    def format(self, record: logging.LogRecord) -> str:
        """Return record as JSON."""
        line = {
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds"),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(settings: Settings) -> None:
    """Log to stderr as settings say."""
    handler = logging.StreamHandler()
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(JsonFormatter() if settings.json_log else logging.Formatter(text))
    logging.basicConfig(level=settings.log_level, handlers=[handler])


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; ConfigError when a file or an address cannot be used."""
    stop = asyncio.Event()
    # A container's first process has no default action for signals.
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        await create_app(settings), access_log=None, shutdown_timeout=DRAIN_TIMEOUT
    )
    await runner.setup()
    try:
        address = f"{settings.address}:{settings.port}"
        try:
            await web.TCPSite(runner, settings.address or None, settings.port).start()
        except OSError as error:
            raise ConfigError(f"PUBLISH_ADDR:PUBLISH_PORT={address}: {error}") from None
        log.info("exporter %s listens on %s and asks %s", __version__, address, settings.url)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve what the environment says."""
    try:
        settings = Settings.read(os.environ)
        configure_log(settings)
        asyncio.run(serve(settings))
    except ConfigError as error:
        leave(f"exporter: {error}")
    leave()


if __name__ == "__main__":
    main()
