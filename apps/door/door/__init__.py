"""What the publisher and the subscriber share: settings, errors, health, metrics and events."""


class BrokerUnavailable(Exception):  # noqa: N818 - a state of the broker, not a fault
    """The broker is away, blocked or silent; what became of the request is unknown."""
