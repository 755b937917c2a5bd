"""The monitor_agent input: GET /api/plugins.json tells how the outputs that have a buffer do.

The shape is that of Fluentd 1.19.3 (lib/fluent/plugin/in_monitor_agent.rb), which tells of the
other plugins besides, and of some more numbers.
"""

import json

import h11

from collector.http_input import Rejected, Server, path_of
from collector.limits import Limits
from collector.store import Store


class MonitorAgent(Server):
    """The server of a source that tells of stores."""

    def __init__(self, stores: list[Store], limits: Limits) -> None:
        """Tell of what stores has at the time of the question; a question has no body."""
        super().__init__(limits, longest=0)
        self._stores = stores

    def check(self, request: h11.Request) -> str:
        """Return the path, the only one that there is."""
        path, query = path_of(request)
        if path != "/api/plugins.json":
            raise Rejected(404, "only /api/plugins.json is known here")
        if request.method != b"GET":
            raise Rejected(405, "only GET is known here", ("Allow", "GET"))
        if query:
            raise Rejected(400, "no parameters are known here")
        return path

    def answer(self, asked: str, body: bytes) -> bytes:  # noqa: ARG002 - there is one question
        """Return the numbers of each store."""
        plugins = [
            {
                "plugin_id": store.id,
                "plugin_category": "output",
                "type": "file",
                "output_plugin": True,
                **store.statistics(),
            }
            for store in self._stores
        ]
        return json.dumps({"plugins": plugins}).encode()
