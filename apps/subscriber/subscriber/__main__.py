"""Serve the subscriber until SIGTERM: `python3 -m subscriber`."""

from common.environment import ConfigError, Environment, leave
from door.memory import Memory
from door.server import Application, serve

from subscriber.app import create_app
from subscriber.broker import LARGEST_MESSAGE, Broker
from subscriber.settings import Settings


def main() -> None:
    """Serve in one process: what one request gave back, the next must be able to get."""
    try:
        settings = Settings.read(Environment())
    except ConfigError as error:
        leave(f"subscriber: {error}")

    def make(memory: Memory) -> tuple[Application, Broker]:
        broker = Broker(settings, memory)
        return create_app(broker, settings, memory, watch=True), broker

    # A message is there as frames and as a body for a moment.
    serve(
        "subscriber",
        make,
        settings.port,
        settings.memory_limit,
        reserve=2 * LARGEST_MESSAGE,
        fronted=settings.http.fronted,
    )
    leave()


if __name__ == "__main__":
    main()
