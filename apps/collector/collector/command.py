"""The exec input: each line that a command prints, at every interval, is an event."""

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process

from collector import log
from collector.config import ExecSource
from collector.events import Batch, Malformed, Router, now
from collector.store import Refused

# Bytes of a run's output that are kept.
_MOST_OUTPUT = 1 << 20


async def _head(stream: asyncio.StreamReader) -> bytes:
    """Read stream to its end and return its first _MOST_OUTPUT bytes."""
    kept = b""
    while piece := await stream.read(65536):
        kept += piece[: _MOST_OUTPUT - len(kept)]
    return kept


def _kill(process: Process) -> None:
    # Its whole group: the shell's children hold the pipes open.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _start(source: ExecSource) -> Process:
    """Start the command in a group of its own.

    Python cancelled in the middle of it would leave the command's children, and wait for ever.
    """
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            "sh", "-c", source.command,
            stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True,
        )
    )  # fmt: skip
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        process = await starting
        _kill(process)
        await process.wait()
        raise


async def _run(source: ExecSource) -> bytes:
    """Run the command once and return what it printed; say in one line how it failed."""
    process = await _start(source)
    assert process.stdout  # noqa: S101 - for the type checker
    assert process.stderr  # noqa: S101
    try:
        async with asyncio.timeout(source.run_interval):
            output, errors, status = await asyncio.gather(
                _head(process.stdout), _head(process.stderr), process.wait()
            )
    except TimeoutError:
        log.error(f"{source.command!r} was killed: it took more than {source.run_interval:g} s")
        return b""
    finally:
        _kill(process)
        await process.wait()
    if status or errors:
        said = errors.decode(errors="replace").strip() or "nothing"
        log.error(f"{source.command!r} ended with status {status} and said: {said}")
    return output


async def repeat(source: ExecSource, router: Router) -> None:
    """Run source's command at every interval, never two at a time, until cancelled."""
    while True:
        # Fluentd too waits before the first run.
        await asyncio.sleep(source.run_interval)
        try:
            output = await _run(source)
            moment = now()
            lines = output.decode("utf-8", "surrogateescape").splitlines()
            batch = Batch(router)
            batch.add(source.tag, [(*moment, {"message": line}) for line in lines])
            batch.write()
        except (OSError, Malformed, Refused) as error:
            log.error(f"{source.command!r}: {error}")
