"""Serve the subscriber until SIGTERM: `python3 -m subscriber`."""

import sys

from door.environment import ConfigError, Environment
from door.server import Application, serve

from subscriber.app import create_app
from subscriber.broker import Broker
from subscriber.settings import Settings


def main() -> None:
    """Serve in one process: what one request gave back, the next must be able to get."""
    try:
        settings = Settings.read(Environment())
    except ConfigError as error:
        sys.exit(f"subscriber: {error}")

    def make() -> tuple[Application, Broker]:
        broker = Broker(settings)
        return create_app(broker, settings), broker

    serve("subscriber", make, settings.port)


if __name__ == "__main__":
    main()
