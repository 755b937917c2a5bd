"""Chunks on disk: events wait in them as finished lines until they are appended to their file.

Names and contents are those of Fluentd's file buffer (Fluentd 1.19, lib/fluent/plugin/buffer/
file_chunk.rb; what was seen of it: `buffer.b<id>.log` is staged, it takes lines; `buffer.q<id>.log`
is queued, it waits to be flushed; beside each is its `.meta`), so either program takes up what
the other left behind.
"""

import contextlib
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from collector import log
from collector.config import FileMatch

# Chunks that take lines at a time, one open file each: a sender chooses tags' days.
MOST_STAGED = 32
# Chunks on disk: as many small files as a failing target may cause.
MOST_CHUNKS = 512
# Seconds until the first new try of a flush that failed; doubled up to retry_max_interval.
FIRST_RETRY = 1.0
_PIECE = 1 << 20
_META_HEAD = b"\xc1\x00"

# The tag (None: the buffer is not by tag) and the day's first second.
Key = tuple[str | None, int]


class Refused(Exception):  # noqa: N818 - a state of the store, not a fault
    """The store cannot take the events now: it is full, or the disk refuses them."""


def write_all(file: int, data: bytes | memoryview, position: int | None = None) -> None:
    """Write all of data, at position or at the file's own; OSError when that does not work."""
    rest = memoryview(data)
    while rest:
        if position is None:
            done = os.write(file, rest)
        else:
            done = os.pwrite(file, rest, position)
            position += done
        rest = rest[done:]


@dataclass
class Chunk:
    """A chunk and its .meta; the id is 16 bytes, size in bytes, times in seconds since 1970."""

    path: Path
    id: bytes
    key: Key
    size: int
    records: int
    created: int
    modified: int
    # Its open file, as long as it takes lines.
    file: int = -1
    # time.monotonic() when it must be flushed.
    due: float = 0.0

    @property
    def meta(self) -> Path:
        """Return the path of its .meta."""
        return self.path.with_name(self.path.name + ".meta")

    def write_meta(self) -> None:
        """Write its .meta; `s`, the number of lines, is never 0: Fluentd drops an empty chunk."""
        tag, timekey = self.key
        body = msgpack.packb(
            {
                "timekey": timekey,
                "tag": tag,
                "variables": None,
                "seq": 0,
                "id": self.id,
                "s": max(self.records, 1),
                "c": self.created,
                "m": self.modified,
            }
        )
        file = os.open(self.meta, os.O_WRONLY | os.O_CREAT, 0o640)
        try:
            write_all(file, _META_HEAD + len(body).to_bytes(4, "big") + body)
        finally:
            os.close(file)


def read_meta(path: Path) -> dict[str, Any]:
    """Return what a .meta says; ValueError or OSError when it is not one."""
    data = path.read_bytes()
    length = int.from_bytes(data[2:6], "big")
    if data[:2] != _META_HEAD or length > len(data) - 6:
        raise ValueError("its .meta is cut or of another kind")
    # A .meta may be longer than its length says: it is written over, never cut.
    meta = msgpack.unpackb(data[6 : 6 + length], raw=False)
    if not isinstance(meta, dict):
        raise ValueError("its .meta is no map")
    for name in "timekey", "c", "m":
        if type(meta.get(name)) is not int or not 0 <= meta[name] < 2**40:
            raise ValueError(f"its .meta has no {name}")
    return meta


class Store:
    """The chunks of one match. It is used by one thread, so each file has one writer."""

    def __init__(self, match: FileMatch) -> None:
        """Take up what an earlier run left in the folder."""
        self._match = match
        self._folder = Path(match.buffer.path).parent
        self._prefix, self._suffix = Path(match.buffer.path).name.split(".*.")
        self._staged: dict[Key, Chunk] = {}
        self._queue: deque[Chunk] = deque()
        # Target: when to try again (time.monotonic()), and the seconds waited for that.
        self._retries: dict[Path, tuple[float, float]] = {}
        self._total = 0
        # Since the start: lines taken, tries to flush a chunk, and what went wrong in either.
        self._records = self._tries = self._errors = 0
        self._seldom = log.Seldom()
        try:
            self._take_up()
        except OSError as error:
            log.error(f"cannot look for chunks left in {self._folder}: {error}")

    # --- what was left behind ------------------------------------------------------------------

    def _take_up(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(
            rf"{re.escape(self._prefix)}\.([bq])([0-9a-f]{{32}})\.{re.escape(self._suffix)}"
        )
        names = sorted(os.listdir(self._folder))
        found = []
        for name in names:
            if parts := pattern.fullmatch(name):
                path = self._folder / name
                try:
                    chunk = self._restore(path, parts[1], bytes.fromhex(parts[2]))
                except (ValueError, OSError, msgpack.UnpackException) as error:
                    self._set_aside(path, error)
                else:
                    found += [chunk] if chunk else []
        for name in names:
            # Its chunk was flushed; the last run ended before it removed this.
            path = self._folder / name
            if pattern.fullmatch(name.removesuffix(".meta")) and name.endswith(".meta"):
                chunk_path = path.with_name(name.removesuffix(".meta"))
                if not chunk_path.exists():
                    path.unlink(missing_ok=True)
        # An id begins with the time of its making.
        found.sort(key=lambda chunk: chunk.id)
        self._queue.extend(found)
        self._total = sum(chunk.size for chunk in found)
        if found:
            log.info(f"took up {len(found)} chunks of {self._total} bytes in {self._folder}")

    def _restore(self, path: Path, state: str, chunk_id: bytes) -> Chunk | None:
        """Return the chunk in path, queued; None when it was empty and is removed."""
        size = _whole_lines(path)
        chunk = Chunk(path, chunk_id, (None, 0), size, 1, 0, 0)
        if not size:
            path.unlink()
            chunk.meta.unlink(missing_ok=True)
            return None
        staged = self._path("b", chunk_id)
        if state == "q" and not chunk.meta.exists():
            # The last run ended between the two renames of _enqueue.
            staged_meta = staged.with_name(staged.name + ".meta")
            if staged_meta.exists():
                staged_meta.rename(chunk.meta)
        meta = read_meta(chunk.meta)
        tag = meta.get("tag")
        if self._match.buffer.by_tag:
            # The tag becomes part of a path: it must be one that the match names.
            if not isinstance(tag, str) or not self._match.pattern.matches(tag):
                raise ValueError("its .meta has a tag of another match")
        else:
            tag = None
        chunk.key = (tag, meta["timekey"])
        chunk.created, chunk.modified = meta["c"], meta["m"]
        self._target(chunk)
        if state == "b":
            self._rename(chunk)
        return chunk

    def _set_aside(self, path: Path, error: Exception) -> None:
        """Rename a chunk that cannot be used, so that nothing of it is lost."""
        aside = path.with_name(f"broken.{path.name}")
        log.error(f"set a broken chunk aside as {aside}: {error or type(error).__name__}")
        try:
            path.rename(aside)
            meta = path.with_name(path.name + ".meta")
            if meta.exists():
                meta.rename(aside.with_name(aside.name + ".meta"))
        except OSError as failure:
            log.error(f"cannot set {path} aside: {failure}")

    # --- taking lines --------------------------------------------------------------------------

    def write(self, key: Key, lines: list[bytes]) -> None:
        """Put lines into the staged chunk of key: once this returns they survive a kill -9.

        Raises Refused when they cannot be taken; none of them is then in the chunk.
        """
        data = b"".join(lines)
        limits = self._match.buffer
        chunk = self._staged.get(key)
        try:
            # A full one, or one that somebody removed: a kill would take its bytes along.
            if chunk and (
                chunk.size + len(data) > limits.chunk_limit_size or not _is_linked(chunk.file)
            ):
                self._enqueue(chunk)
                self.flush()
                chunk = None
            if self._total + len(data) > limits.total_limit_size:
                raise Refused(f"its chunks have {self._total} bytes, near total_limit_size")
            if chunk is None:
                chunk = self._stage(key)
            try:
                write_all(chunk.file, data, chunk.size)
            except OSError:
                os.ftruncate(chunk.file, chunk.size)
                raise
        except (Refused, OSError) as error:
            self._errors += 1
            self._seldom.warn(f"events for {self._match.path} are refused: {error}")
            raise Refused(str(error)) from None
        chunk.size += len(data)
        chunk.records += len(lines)
        chunk.modified = int(time.time())
        self._total += len(data)
        self._records += len(lines)

    def _stage(self, key: Key) -> Chunk:
        if len(self._staged) >= MOST_STAGED:
            self._enqueue(next(iter(self._staged.values())))
            self.flush()
        if len(self._staged) + len(self._queue) >= MOST_CHUNKS:
            raise Refused(f"there are {MOST_CHUNKS} chunks already")
        # As Fluentd's ids: microseconds, then what makes it unique.
        chunk_id = (time.time_ns() // 1000 << 12).to_bytes(8, "big") + os.urandom(8)
        now = int(time.time())
        chunk = Chunk(self._path("b", chunk_id), chunk_id, key, 0, 0, now, now)
        chunk.due = time.monotonic() + self._match.buffer.flush_interval
        self._folder.mkdir(parents=True, exist_ok=True)
        chunk.file = os.open(chunk.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            chunk.write_meta()
        except OSError:
            os.close(chunk.file)
            chunk.path.unlink(missing_ok=True)
            chunk.meta.unlink(missing_ok=True)
            raise
        self._staged[key] = chunk
        return chunk

    def _path(self, state: str, chunk_id: bytes) -> Path:
        return self._folder / f"{self._prefix}.{state}{chunk_id.hex()}.{self._suffix}"

    # --- flushing ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Flush what has waited for flush_interval; called several times a second."""
        now = time.monotonic()
        for chunk in [chunk for chunk in self._staged.values() if chunk.due <= now]:
            self._enqueue_if_possible(chunk)
        self.flush()

    def flush_all(self) -> None:
        """Flush every chunk now, also those that wait for their next try."""
        for chunk in list(self._staged.values()):
            self._enqueue_if_possible(chunk)
        self._retries = {path: (0.0, wait) for path, (_, wait) in self._retries.items()}
        self.flush()

    def flush(self) -> None:
        """Append the queued chunks to their files, in order; one that fails waits for a retry."""
        waiting: deque[Chunk] = deque()
        # The later chunks of a file stay behind its earlier ones.
        behind: set[Path] = set()
        while self._queue:
            chunk = self._queue.popleft()
            target = self._target(chunk)
            due, wait = self._retries.get(target, (0.0, 0.0))
            if target in behind or due > time.monotonic():
                behind.add(target)
                waiting.append(chunk)
                continue
            self._tries += 1
            try:
                self._append(chunk, target)
            except OSError as error:
                self._errors += 1
                if _names(error, chunk.path) and self._folder.is_dir():
                    log.error(f"{chunk.path} was removed, its {chunk.size} bytes are lost")
                    self._total -= chunk.size
                    continue
                longest = self._match.buffer.retry_max_interval
                wait = min(wait * 2 or FIRST_RETRY, longest)
                self._retries[target] = (time.monotonic() + wait, wait)
                log.warn(f"cannot write {target}, next try in {wait:g} s: {error}")
                behind.add(target)
                waiting.append(chunk)
            else:
                self._total -= chunk.size
                if self._retries.pop(target, None):
                    log.info(f"{target} can be written again")
        self._queue = waiting

    def _enqueue_if_possible(self, chunk: Chunk) -> None:
        try:
            self._enqueue(chunk)
        except OSError as error:
            self._seldom.warn(f"cannot queue {chunk.path}: {error}")

    def _enqueue(self, chunk: Chunk) -> None:
        """Close a staged chunk and queue it; OSError leaves it staged."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            chunk.write_meta()
        except OSError as error:
            # The old .meta only has an older number of lines.
            self._seldom.warn(f"cannot write {chunk.meta}: {error}")
        if not _is_linked(chunk.file):
            # Somebody removed the file; what was acknowledged is still in the open one.
            chunk.path.write_bytes(os.pread(chunk.file, chunk.size, 0))
        self._rename(chunk)
        del self._staged[chunk.key]
        self._queue.append(chunk)
        os.close(chunk.file)

    def _rename(self, chunk: Chunk) -> None:
        queued, meta = self._path("q", chunk.id), chunk.meta
        chunk.path.rename(queued)
        chunk.path = queued
        meta.rename(chunk.meta)

    def _target(self, chunk: Chunk) -> Path:
        tag, timekey = chunk.key
        day = time.strftime("%Y%m%d", time.gmtime(timekey))
        path = self._match.path.replace("${tag}", tag or "")
        return Path(path.replace("%Y%m%d", day) + ".log")

    def _append(self, chunk: Chunk, target: Path) -> None:
        """Append chunk to target and remove it; OSError leaves target as it was."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with chunk.path.open("rb", buffering=0) as source:
            # Opened for each flush: somebody may rename or delete it in between.
            file = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                before = os.fstat(file).st_size
                try:
                    # A kill in the middle of this left half a line; the next must not join it.
                    if before and os.pread(file, 1, before - 1) != b"\n":
                        write_all(file, b"\n")
                    while piece := source.read(_PIECE):
                        write_all(file, piece)
                    # Within the try: a chunk that stays would be appended again and again.
                    chunk.path.unlink()
                except OSError:
                    os.ftruncate(file, before)
                    raise
            finally:
                os.close(file)
        # What stays is removed at the next start.
        with contextlib.suppress(OSError):
            chunk.meta.unlink()

    # --- what became of it ---------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Return the match's @id, or a name that lasts as long as the process, as Fluentd's."""
        return self._match.id or f"object:{id(self):x}"

    def statistics(self) -> dict[str, float]:
        """Return numbers with the names and meanings of Fluentd's output.rb and buffer.rb.

        So write_count is of tries, done or not, and retry_count has what was refused besides the
        tries that failed. Sizes are in bytes, buffer_available_buffer_space_ratios in percent.
        """
        staged = sum(chunk.size for chunk in self._staged.values())
        free = 1 - self._total / self._match.buffer.total_limit_size
        return {
            "retry_count": self._errors,
            "emit_records": self._records,
            "write_count": self._tries,
            "buffer_stage_length": len(self._staged),
            "buffer_stage_byte_size": staged,
            "buffer_queue_length": len(self._queue),
            "buffer_queue_byte_size": self._total - staged,
            "buffer_total_queued_size": self._total,
            "buffer_available_buffer_space_ratios": round(100 * free, 1),
        }

    def close(self) -> None:
        """Flush, and say what cannot be flushed."""
        self.flush_all()
        for chunk in self._staged.values():
            fate = "stay for the next start" if _is_linked(chunk.file) else "are lost"
            log.error(f"cannot flush {chunk.path}: its {chunk.size} bytes {fate}")
            os.close(chunk.file)
        self._staged.clear()
        left = len(self._queue)
        if left:
            log.warn(f"{left} chunks for {self._match.path} stay for the next start")


def _is_linked(file: int) -> bool:
    """Return whether the open file still has a name."""
    return os.fstat(file).st_nlink > 0


def _names(error: OSError, path: Path) -> bool:
    """Return whether error says that path is not there."""
    return isinstance(error, FileNotFoundError) and str(error.filename) == str(path)


def _whole_lines(path: Path) -> int:
    """Cut off the half line at the end of the file (it was never acknowledged); return its size."""
    with path.open("rb+") as file:
        size = position = file.seek(0, os.SEEK_END)
        kept = 0
        while position and not kept:
            start = max(0, position - _PIECE)
            file.seek(start)
            kept = file.read(position - start).rfind(b"\n") + 1
            kept += start if kept else 0
            position = start
        if kept < size:
            log.warn(f"cut {size - kept} bytes of an unfinished line off {path}")
            file.truncate(kept)
        return kept
