"""RabbitMQ's management API as Prometheus metrics, named as kbudde/rabbitmq_exporter names them."""

__version__ = "0.1.0"
