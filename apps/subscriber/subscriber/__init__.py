"""The subscriber: hands a queue's messages out over HTTP, in order, acknowledged once written."""

from subscriber.app import create_app

__all__ = ["create_app"]
