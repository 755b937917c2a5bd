"""Take events until SIGTERM: `python3 -m collector`, with the command line of `fluentd`."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from collector import log
from collector.command import repeat
from collector.config import (
    Config,
    ConfigError,
    ExecSource,
    ForwardSource,
    HttpSource,
    MonitorSource,
    Source,
    load,
)
from collector.events import Router
from collector.forward import Forward
from collector.http_input import HttpInput
from collector.limits import Limits
from collector.monitor import MonitorAgent
from collector.store import Store

# Seconds between two looks at what is due.
_TICK = 0.25
# Seconds that clients get after SIGTERM for what is on its way already.
_DRAIN = 0.3
# Bytes of unfinished messages of all clients.
_MOST_PARTIAL = 16 << 20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("fluentd", description="message-broker-stack's collector")
    parser.add_argument("-c", "--config", type=Path, default=Path("/fluentd/etc/fluent.conf"))
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and end")
    return parser.parse_args()


async def serve(config: Config) -> None:
    """Take events until SIGTERM or SIGINT; OSError when a port is taken."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unexpected)
    stop = asyncio.Event()
    # A container's first process has no default action for signals.
    for number in signal.SIGTERM, signal.SIGINT:
        loop.add_signal_handler(number, stop.set)
    routers: dict[str, Router] = {}
    stores: list[Store] = []
    longest = max(
        (one.chunk_size_limit for one in config.sources if isinstance(one, ForwardSource)),
        default=1,
    )
    bodies = (one.body_size_limit for one in config.sources if isinstance(one, HttpSource))
    limits = Limits(most_partial=max(_MOST_PARTIAL, 2 * longest, *bodies))

    def flush() -> None:
        log.info("SIGUSR1: flushing now")
        for store in stores:
            store.flush_all()

    loop.add_signal_handler(signal.SIGUSR1, flush)
    # The ports first: who holds them works in the folder, too, and its chunks are its own.
    servers = [
        await _bind(source, routers, stores, limits)
        for source in config.sources
        if not isinstance(source, ExecSource)
    ]
    routers |= {label: Router(matches) for label, matches in config.matches.items()}
    stores += [store for router in routers.values() for store in router.stores]
    for server in servers:
        await server.start_serving()
    tasks = [
        asyncio.create_task(repeat(source, routers[source.label]))
        for source in config.sources
        if isinstance(source, ExecSource)
    ]
    log.info(f"at most {limits.most_clients} connections (from the limit of open files)")
    log.info("collector worker is now running")

    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK):
                await stop.wait()
        limits.tick()
        for router in routers.values():
            router.write_given_up()
        for store in stores:
            store.tick()

    log.info("stopping")
    for server in servers:
        server.close()
    for task in tasks:
        task.cancel()
    await asyncio.sleep(_DRAIN)
    for client in list(limits.clients):
        client.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    for router in routers.values():
        router.write_given_up(patience=0)
    for store in stores:
        store.close()
    log.info("stopped")


async def _bind(
    source: Source, routers: dict[str, Router], stores: list[Store], limits: Limits
) -> asyncio.Server:
    """Bind source's port; routers and stores are filled before its server starts."""
    label = source.label
    if isinstance(source, MonitorSource):
        kind = "GET /api/plugins.json"
        server = await asyncio.start_server(
            MonitorAgent(stores, limits).serve, source.bind, source.port, start_serving=False
        )
    elif isinstance(source, HttpSource):
        kind, longest = "HTTP", source.body_size_limit
        server = await asyncio.start_server(
            lambda reader, writer: HttpInput(routers[label], limits, longest).serve(reader, writer),
            source.bind,
            source.port,
            backlog=1024,
            start_serving=False,
        )
    else:
        assert isinstance(source, ForwardSource)  # noqa: S101 - for the type checker
        kind, longest = "the forward protocol", source.chunk_size_limit
        server = await asyncio.get_running_loop().create_server(
            lambda: Forward(routers[label], limits, longest),
            source.bind,
            source.port,
            backlog=1024,
            start_serving=False,
        )
    log.info(f"listening for {kind} on {source.bind}:{source.port}")
    return server


def _unexpected(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if not isinstance(error, ConnectionError | TimeoutError):
        log.error(f"{context['message']}: {error!r}")


def main() -> int:
    """Return the exit status: 1 when the configuration or a port cannot be used."""
    arguments = _arguments()
    # Who reads slowly gets less of the log; a terminal keeps its mode.
    if not sys.stdout.isatty():
        os.set_blocking(sys.stdout.fileno(), False)
    log.info("this is message-broker-stack's collector, not Fluentd")
    try:
        config = load(arguments.config)
    except ConfigError as error:
        log.error(f"config error: {error}")
        return 1
    if arguments.dry_run:
        log.info("finished dry run mode")
        return 0
    try:
        asyncio.run(serve(config))
    except OSError as error:
        log.error(f"cannot start: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
