"""One scrape of the broker, of Fluentd and of certificates, for each GET of /metrics."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from aiohttp import web

from exporter import __version__
from exporter.broker import Broker, NoAnswer
from exporter.certificates import Seen, certificate_families, look
from exporter.families import Families, Origin, Record, ShapeError, parse
from exporter.fluentd import Fluentd, plugin_families, plugins_in
from exporter.settings import Settings
from exporter.text import Family, label_text, written

STARTED = time.time()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WELCOME = """<!doctype html>
<html lang="en">
<title>RabbitMQ exporter</title>
<h1>RabbitMQ exporter</h1>
<p><a href="/metrics">Metrics</a></p>
</html>
"""

log = logging.getLogger("exporter")


@dataclass
class Answer:
    """What came of asking for one module, or Fluentd."""

    records: list[Record] = field(default_factory=list)
    # Why nothing came; empty when all is well.
    failure: str = ""
    seconds: float = 0


class Scrape:
    """The metrics of one scrape."""

    def __init__(
        self,
        settings: Settings,
        origin: Origin | None,
        answers: dict[str, Answer],
        fluentd: Answer | None,
        certificates: list[Seen],
    ) -> None:
        """Tell of answers under the labels of origin; None: no broker was ever seen.

        fluentd is None when it was not asked.
        """
        self._settings = settings
        self._origin = origin
        self._answers = answers
        self._fluentd = fluentd
        self._certificates = certificates

    @property
    def up(self) -> bool:
        """Whether every module was answered."""
        return not any(answer.failure for answer in self._answers.values())

    def families(self) -> Iterator[Family]:
        """Yield the families, without those of modules that failed."""
        cluster, node = (self._origin.cluster, self._origin.node) if self._origin else ("", "")
        labels = {"cluster": cluster, "node": node}
        modules = [
            (label_text(labels | {"module": name}), answer)
            for name, answer in self._answers.items()
        ]
        text = "1 if the scrape had every module."
        yield Family("rabbitmq_up", text, [(label_text(labels), self.up)])
        ups = [(module, float(not answer.failure)) for module, answer in modules]
        yield Family("rabbitmq_module_up", "1 if the scrape had this module.", ups)
        build = label_text({"version": __version__, "revision": "", "branch": "", "builddate": ""})
        text = "1; the labels tell the version."
        yield Family("rabbitmq_exporter_build_info", text, [(build, 1)])
        text = "When this process was started, in seconds since 1970."
        yield Family("process_start_time_seconds", text, [("", STARTED)])
        if self._origin:
            durations = [(module, answer.seconds) for module, answer in modules]
            text = "Seconds from the question to its answer."
            yield Family("rabbitmq_module_scrape_duration_seconds", text, durations)
            families = Families(self._settings, self._origin)
            for module, answer in self._answers.items():
                if not answer.failure:
                    yield from families.of(module, answer.records)
        if self._fluentd:
            yield from plugin_families(self._fluentd.records, not self._fluentd.failure)
        yield from certificate_families(self._certificates)


class Exporter:
    """Asks the broker, Fluentd and TLS ports, and remembers what the next failure needs."""

    def __init__(self, settings: Settings, broker: Broker, fluentd: Fluentd | None) -> None:
        """Ask nothing yet."""
        self._settings = settings
        self._broker = broker
        self._fluentd = fluentd
        self._origin: Origin | None = None
        self._failures: dict[str, str] = {}
        # As the last scrape found the broker, and well before the first.
        self.up = True

    async def scrape(self) -> bytes:
        """Return the metrics in Prometheus' text format, from answers that came just now."""
        deadline = asyncio.get_running_loop().time() + self._settings.timeout
        overview = asyncio.create_task(self._ask("overview", deadline))
        names = ["overview", *self._settings.modules]
        others = [self._module(name, deadline, overview) for name in self._settings.modules]
        if self._fluentd:
            names.append("fluentd")
            others.append(_answer(self._fluentd.get(deadline), plugins_in))
        looking = asyncio.create_task(look(self._settings, deadline))
        answers = await asyncio.gather(overview, *others)
        certificates = await looking
        named = dict(zip(names, answers, strict=True))
        for name, answer in named.items():
            self._tell(name, answer.failure)
        for seen in certificates:
            self._tell(f"TLS of {seen.target}", seen.failure)
        told = named.pop("fluentd", None)
        scrape = Scrape(self._settings, self._seen(named["overview"]), named, told, certificates)
        self.up = scrape.up
        # Thousands of queues take a second, in which others want their answers, too.
        return await asyncio.to_thread(lambda: written(scrape.families()))

    def _seen(self, overview: Answer) -> Origin | None:
        """Return where overview came from, or the last one that came."""
        if overview.records:
            self._origin = Origin.of(overview.records[0])
        return self._origin

    async def _module(self, name: str, deadline: float, overview: asyncio.Task[Answer]) -> Answer:
        """Ask for name, but for no queues if the broker has too many of them."""
        limit = self._settings.max_queues
        if name == "queue" and limit:
            origin = self._seen(await overview)
            if origin and origin.queues > limit:
                return Answer()
        return await self._ask(name, deadline)

    async def _ask(self, module: str, deadline: float) -> Answer:
        return await _answer(self._broker.get(module, deadline), partial(parse, module))

    def _tell(self, module: str, failure: str) -> None:
        """Log what changed: one line for each new failure of module, and one for its end."""
        if failure == self._failures.get(module, ""):
            return
        self._failures[module] = failure
        if failure:
            log.warning("%s: %s", module, failure)
        else:
            log.info("%s: answered again", module)


async def _answer(question: Awaitable[bytes], parse: Callable[[bytes], list[Record]]) -> Answer:
    """Return what parse makes of question's bytes."""
    started = time.perf_counter()
    answer = Answer()
    try:
        answer.records = await asyncio.to_thread(parse, await question)
    except (NoAnswer, ShapeError) as error:
        answer.failure = str(error)
    answer.seconds = time.perf_counter() - started
    return answer


async def create_app(settings: Settings) -> web.Application:
    """Return the exporter's HTTP server; ConfigError when a file for TLS cannot be used."""
    broker = Broker(settings)
    fluentd = Fluentd(settings.fluentd_url, settings.timeout) if settings.fluentd_url else None
    exporter = Exporter(settings, broker, fluentd)

    async def welcome(_: web.Request) -> web.Response:
        return web.Response(text=WELCOME, content_type="text/html")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await exporter.scrape(), headers={"Content-Type": CONTENT_TYPE})

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if exporter.up else 504)

    async def close(_: web.Application) -> None:
        await broker.close()
        if fluentd:
            await fluentd.close()

    app = web.Application()
    app.add_routes(
        [web.get("/", welcome), web.get("/metrics", metrics), web.get("/health", health)]
    )
    app.on_cleanup.append(close)
    return app
