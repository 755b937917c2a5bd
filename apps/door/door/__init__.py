"""What the publisher and the subscriber share: server, connection, settings, errors and events."""

from collections.abc import Mapping


class BrokerUnavailable(Exception):  # noqa: N818 - a state of the broker, not a fault
    """The broker is away, blocked or silent; what became of the request is unknown."""

    # What the client gets to know besides.
    details: Mapping[str, int] = {}
