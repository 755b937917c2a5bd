"""Serve the publisher until SIGTERM: `python3 -m publisher`."""

from typing import TYPE_CHECKING

from common.environment import ConfigError, Environment, leave
from door.memory import Memory
from door.server import Application, serve

from publisher.settings import Settings

if TYPE_CHECKING:
    from publisher.broker import Broker


def main() -> None:
    """Check the settings, then serve in as many processes as they say."""
    try:
        settings = Settings.read(Environment())
    except ConfigError as error:
        leave(f"publisher: {error}")

    def make(_memory: Memory) -> tuple[Application, "Broker"]:
        # Not before: the first process would count in the metrics as one that never connects.
        from publisher.app import create_app
        from publisher.broker import Broker

        broker = Broker(settings)
        return create_app(settings, broker), broker

    serve(
        "publisher",
        make,
        settings.port,
        settings.memory,
        settings.workers,
        fronted=settings.http.fronted,
    )
    leave()


if __name__ == "__main__":
    main()
