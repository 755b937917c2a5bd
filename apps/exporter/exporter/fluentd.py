"""Asking Fluentd's monitor_agent, and what a scrape tells of its answer.

Fields are those of Fluentd 1.19.3 (lib/fluent/plugin/in_monitor_agent.rb, `statistics` of output.rb
and buffer.rb). Families are those of fluent-plugin-prometheus 2.2 and gauges as there (lib/fluent/
plugin/in_prometheus_output_monitor.rb), with the label plugin_category of its
in_prometheus_monitor.rb besides.
"""

from collections.abc import Iterator

import aiohttp

from exporter.broker import NoAnswer, answer
from exporter.families import Record, Table, decode, records
from exporter.text import Family, label_text

# Bytes of an answer: a plugin takes less than a thousand.
MOST = 1 << 20

LABELS = ("plugin_id", "plugin_category", "type")
OUTPUT: Table = {
    "retry_count": (
        "retry_count",
        "Failed tries to write a chunk, and refused events, since Fluentd started.",
    ),
    "buffer_total_queued_size": ("buffer_total_bytes", "Bytes in the buffer."),
    "buffer_queue_length": ("buffer_queue_length", "Chunks that wait to be written."),
    "buffer_available_buffer_space_ratios": (
        "buffer_available_space_ratio",
        "Per cent of the buffer's limit that are free.",
    ),
    "emit_records": ("emit_records", "Events put into the buffer since Fluentd started."),
    "write_count": ("write_count", "Tries to write a chunk, done or not, since Fluentd started."),
}


class Fluentd:
    """One monitor_agent, with the connections to it."""

    def __init__(self, url: str, seconds: int) -> None:
        """Connect to nothing yet; url is http://HOST:PORT, a scrape lasts so many seconds."""
        self._url = f"{url}/api/plugins.json"
        self._seconds = seconds
        # Its own, as the broker's has the password. The times are Broker's.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ttl_dns_cache=1),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def get(self, deadline: float) -> bytes:
        """Return the answer, whole by deadline in the loop's time; NoAnswer."""
        body = bytearray()
        async with answer(self._session, self._url, deadline, self._seconds) as response:
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > MOST:
                    raise NoAnswer(f"the answer has more than {MOST} bytes")
        return bytes(body)


def plugins_in(body: bytes) -> list[Record]:
    """Return the output plugins that have a buffer; ShapeError when body tells of no plugins."""
    found = decode(body)
    plugins = records(found.get("plugins") if isinstance(found, dict) else None, ["plugin_id"])
    return [
        plugin
        for plugin in plugins
        if plugin.text("plugin_category") == "output" and "buffer_queue_length" in plugin.numbers
    ]


def plugin_families(plugins: list[Record], up: bool) -> Iterator[Family]:
    """Yield what is told of plugins, and whether Fluentd answered."""
    text = "1 if Fluentd told of its plugins."
    yield Family("fluentd_up", text, [("", up)])
    # Each once, whatever it answers: Prometheus wants no sample twice.
    rows = {tuple(plugin.text(name) for name in LABELS): plugin.numbers for plugin in plugins}
    for field, (name, text) in OUTPUT.items():
        samples = [
            (label_text(dict(zip(LABELS, labels, strict=True))), numbers[field])
            for labels, numbers in rows.items()
            if field in numbers
        ]
        yield Family(f"fluentd_output_status_{name}", text, samples)
