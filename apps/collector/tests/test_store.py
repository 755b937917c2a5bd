"""What the chunks promise: the lines are in them, and come into their file once, whole."""

import os
import time
from pathlib import Path

import msgpack
import pytest
from collector import store as store_module
from collector.config import Buffer, FileMatch, Pattern
from collector.store import Key, Refused, Store, read_meta

DAY = 1795478400  # 2026-11-24
KEY: Key = ("rabbitmq", DAY)


def match(folder: Path, chunk: int = 1000, total: int = 10_000) -> FileMatch:
    buffer = Buffer(True, f"{folder}/buffer.*.log", 60, chunk, total, 0.05)
    return FileMatch(Pattern("rabbitmq alerts"), f"{folder}/${{tag}}.%Y%m%d", "%S", buffer)


def chunks(folder: Path, state: str) -> list[Path]:
    return sorted(folder.glob(f"buffer.{state}*.log"))


def target(folder: Path, tag: str = "rabbitmq") -> Path:
    return folder / f"{tag}.20261124.log"


def test_lines_wait_in_a_staged_chunk_with_fluentds_meta(tmp_path: Path) -> None:
    Store(match(tmp_path)).write(KEY, [b"one\n", b"two\n"])
    (chunk,) = chunks(tmp_path, "b")
    assert chunk.read_bytes() == b"one\ntwo\n"
    raw = chunk.with_name(chunk.name + ".meta").read_bytes()
    assert raw[:2] == b"\xc1\x00"
    assert int.from_bytes(raw[2:6], "big") == len(raw) - 6
    meta = msgpack.unpackb(raw[6:])
    assert list(meta) == ["timekey", "tag", "variables", "seq", "id", "s", "c", "m"]
    assert (meta["timekey"], meta["tag"], meta["variables"], meta["seq"]) == (
        DAY,
        "rabbitmq",
        None,
        0,
    )
    assert chunk.name == f"buffer.b{meta['id'].hex()}.log"
    assert len(meta["id"]) == 16
    assert meta["s"] > 0
    assert abs(meta["c"] - time.time()) < 60


def test_a_flush_appends_to_the_days_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(match(tmp_path))
    target(tmp_path).write_bytes(b"zero\n")
    store.write(KEY, [b"one\n"])
    store.write(("alerts", DAY), [b"two\n"])
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"zero\none\n"
    assert target(tmp_path, "alerts").read_bytes() == b"two\n"
    assert target(tmp_path, "alerts").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    store = Store(match(tmp_path))
    for line in b"one\n", b"two\n":
        store.write(KEY, [line])
        store.flush_all()
        assert target(tmp_path).read_bytes() == line
        target(tmp_path).unlink()


def test_a_full_chunk_is_flushed_before_its_time(tmp_path: Path) -> None:
    store = Store(match(tmp_path, chunk=10))
    store.write(KEY, [b"12345678\n"])
    store.write(KEY, [b"9\n"])
    assert target(tmp_path).read_bytes() == b"12345678\n"


def test_the_next_start_takes_up_what_was_staged_or_queued(tmp_path: Path) -> None:
    target(tmp_path).mkdir()
    first = Store(match(tmp_path))
    first.write(KEY, [b"queued\n"])
    first.flush_all()
    first.write(KEY, [b"staged\n"])
    assert len(chunks(tmp_path, "q")) == len(chunks(tmp_path, "b")) == 1
    target(tmp_path).rmdir()
    Store(match(tmp_path)).tick()
    assert target(tmp_path).read_bytes() == b"queued\nstaged\n"
    assert list(tmp_path.iterdir()) == [target(tmp_path)]


def test_a_half_line_at_a_chunks_end_is_cut_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Store(match(tmp_path)).write(KEY, [b"one\n"])
    with chunks(tmp_path, "b")[0].open("ab") as file:
        file.write(b"x" * (3 << 20))
    Store(match(tmp_path)).tick()
    assert target(tmp_path).read_bytes() == b"one\n"
    assert "cut 3145728 bytes of an unfinished line" in capfd.readouterr().out


@pytest.mark.parametrize(
    "broken", [None, b"", b"\xc1\x00\x00\x00\x00\x63", b"\xc1\x00\x00\x00\x00\x01\x80"]
)
def test_a_chunk_without_a_good_meta_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], broken: bytes | None
) -> None:
    first = Store(match(tmp_path))
    first.write(KEY, [b"bad\n"])
    (bad,) = chunks(tmp_path, "b")
    meta = bad.with_name(bad.name + ".meta")
    if broken is None:
        meta.unlink()
    else:
        meta.write_bytes(broken)
    first.write(("alerts", DAY), [b"good\n"])
    capfd.readouterr()
    Store(match(tmp_path)).tick()
    assert target(tmp_path, "alerts").read_bytes() == b"good\n"
    assert (tmp_path / f"broken.{bad.name}").read_bytes() == b"bad\n"
    assert chunks(tmp_path, "?") == []
    assert capfd.readouterr().out.count("set a broken chunk aside") == 1


def test_a_meta_cannot_name_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    Store(match(folder)).write(("../evil", DAY), [b"x\n"])
    Store(match(folder)).tick()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert len(list(folder.glob("broken.*.log"))) == 1


def test_a_kill_between_the_renames_of_chunk_and_meta_loses_nothing(tmp_path: Path) -> None:
    Store(match(tmp_path)).write(KEY, [b"one\n"])
    (chunk,) = chunks(tmp_path, "b")
    chunk.rename(tmp_path / chunk.name.replace("buffer.b", "buffer.q"))
    Store(match(tmp_path)).tick()
    assert target(tmp_path).read_bytes() == b"one\n"
    assert list(tmp_path.iterdir()) == [target(tmp_path)]


def test_a_kill_in_the_middle_of_a_flush_joins_no_lines(tmp_path: Path) -> None:
    store = Store(match(tmp_path))
    store.write(KEY, [b"one\n", b"two\n"])
    target(tmp_path).write_bytes(b"one\ntw")
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"one\ntw\none\ntwo\n"


def test_chunks_of_another_output_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"buffer-other.b{'0' * 32}.log"
    other.write_bytes(b"x\n")
    Store(match(tmp_path)).tick()
    assert list(tmp_path.iterdir()) == [other]


def test_a_target_that_cannot_be_written_is_tried_again_in_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target(tmp_path).mkdir()
    store = Store(match(tmp_path))
    for line in b"one\n", b"two\n":
        store.write(KEY, [line])
        store.flush_all()
    store.write(("alerts", DAY), [b"free\n"])
    store.flush_all()
    assert target(tmp_path, "alerts").read_bytes() == b"free\n"
    target(tmp_path).rmdir()
    deadline = time.monotonic() + 5
    while not target(tmp_path).exists() and time.monotonic() < deadline:
        store.tick()
    assert target(tmp_path).read_bytes() == b"one\ntwo\n"
    out = capfd.readouterr().out
    assert "Is a directory" in out
    assert "can be written again" in out


def test_a_flush_that_fails_half_way_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(match(tmp_path))
    store.write(KEY, [b"one\n"])
    target(tmp_path).write_bytes(b"zero\n")
    whole = store_module.write_all

    def half(file: int, data: bytes, _: int | None = None) -> None:
        os.write(file, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_all", half)
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"zero\n"
    monkeypatch.setattr(store_module, "write_all", whole)
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"zero\none\n"


def test_lines_that_the_disk_refuses_are_not_in_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(match(tmp_path))
    store.write(KEY, [b"one\n"])
    pwrite = os.pwrite
    calls = iter([lambda f, d, p: pwrite(f, d[:2], p), lambda *_: 1 / 0])

    def full(file: int, data: bytes, position: int) -> int:
        try:
            return next(calls)(file, data, position)
        except ZeroDivisionError:
            raise OSError(28, "No space left on device") from None

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused, match="No space left"):
        store.write(KEY, [b"two\n"])
    monkeypatch.undo()
    assert chunks(tmp_path, "b")[0].read_bytes() == b"one\n"
    store.write(KEY, [b"three\n"])
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"one\nthree\n"


def test_a_full_buffer_refuses_until_it_can_be_flushed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target(tmp_path).mkdir()
    store = Store(match(tmp_path, chunk=10, total=20))
    store.write(KEY, [b"12345678\n"])
    store.write(KEY, [b"2345678\n"])
    for _ in range(3):
        with pytest.raises(Refused, match="total_limit_size"):
            store.write(KEY, [b"345678\n"])
    assert capfd.readouterr().out.count("are refused") == 1
    target(tmp_path).rmdir()
    store.flush_all()
    store.write(KEY, [b"345678\n"])
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"12345678\n2345678\n345678\n"


def test_many_days_take_few_files(tmp_path: Path) -> None:
    store = Store(match(tmp_path, total=1 << 20))
    before = len(os.listdir("/proc/self/fd"))
    for day in range(1000):
        store.write(("rabbitmq", day * 86400), [b"x\n"])
    assert len(os.listdir("/proc/self/fd")) - before <= store_module.MOST_STAGED
    store.flush_all()
    assert len(list(tmp_path.glob("rabbitmq.*.log"))) == 1000


def test_many_days_that_cannot_be_written_make_a_bounded_number_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = store_module.MOST_STAGED + 10
    monkeypatch.setattr(store_module, "MOST_CHUNKS", most)
    store = Store(match(tmp_path, total=1 << 20))
    for day in range(most):
        (tmp_path / time.strftime("rabbitmq.%Y%m%d.log", time.gmtime(day * 86400))).mkdir()
        store.write(("rabbitmq", day * 86400), [b"x\n"])
    with pytest.raises(Refused, match=f"{most} chunks"):
        store.write(KEY, [b"x\n"])
    assert len(chunks(tmp_path, "?")) == most


def test_a_staged_chunk_that_somebody_deletes_is_not_lost(tmp_path: Path) -> None:
    store = Store(match(tmp_path))
    store.write(KEY, [b"one\n"])
    for path in tmp_path.iterdir():
        path.unlink()
    store.flush_all()
    assert target(tmp_path).read_bytes() == b"one\n"


def test_a_queued_chunks_meta_has_the_number_of_its_lines(tmp_path: Path) -> None:
    target(tmp_path).mkdir()
    store = Store(match(tmp_path))
    store.write(KEY, [b"one\n"] * 200)
    store.flush_all()
    (chunk,) = chunks(tmp_path, "q")
    assert read_meta(chunk.with_name(chunk.name + ".meta"))["s"] == 200
