"""Takes messages over HTTP and publishes them, confirmed, to RabbitMQ."""
