"""Takes messages over HTTP and publishes them, confirmed, to RabbitMQ."""

from publisher.app import create_app

__all__ = ["create_app"]
