"""The files in which the workers of a door keep their metrics, so that each tells those of all.

A worker has a slot, whose files it takes over from its predecessor: restarts leave none behind.
They are allocated before prometheus_client maps them: a page of a full file system that is not
there ends the process by SIGBUS.
"""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
# prometheus_client's names for the kinds of metrics that a door has.
KINDS = ("counter", "histogram", "gauge_livemin", "gauge_livemax")
# Bytes of a file: several times what the routes and statuses of a door take.
SIZE = 128 * 1024


def claim(slot: int) -> None:
    """Keep this process's metrics in the files of slot, or in its own memory where they fail.

    Call it before the first metric is made. Without DIRECTORY in the environment, metrics are in
    the process's memory anyway.
    """
    if DIRECTORY not in os.environ:
        return
    try:
        for kind in KINDS:
            with Path(os.environ[DIRECTORY], f"{kind}_{slot}.db").open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, SIZE)
    except OSError as error:
        log.warning("The metrics of this worker are told by itself alone: %s", error)
        del os.environ[DIRECTORY]
        return
    from prometheus_client import values

    values.ValueClass = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        process_identifier=lambda: slot
    )


def forget(slot: int) -> None:
    """Drop whether the worker of slot, which ended, was connected; its counters stay.

    So does its start time, which the next worker replaces: it may not go back in between.
    """
    if DIRECTORY in os.environ:
        Path(os.environ[DIRECTORY], f"gauge_livemin_{slot}.db").unlink(missing_ok=True)
