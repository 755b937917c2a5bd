"""Hands RabbitMQ's messages out over HTTP and takes them off the queue once they are written."""
