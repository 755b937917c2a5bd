"""What the forward input takes, acknowledges and refuses, on a connection that is made of paper."""

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from collector import forward as forward_module
from collector.config import DAY, Buffer, FileMatch, Pattern
from collector.events import Router
from collector.forward import Forward
from collector.limits import Limits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONGEST = 1 << 20
NOON = 1795521600  # 2026-11-24T12:00:00Z
TIME = msgpack.ExtType(0, struct.pack(">II", NOON, 821_000_000))
FORMAT = "%Y-%m-%dT%H:%M:%S.%3N%:z"
EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Wire(asyncio.Transport):
    """A connection whose other end is the test."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 4711), "socket": self})
        self.written = b""
        self.closed = False

    def setsockopt(self, *_: int) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0


class Peer:
    """A client of one connection, and the folder that its events come into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        buffer = Buffer(True, f"{folder}/buffer.*.log", 60, 1 << 24, 1 << 26, 1)
        named = FileMatch(Pattern("rabbitmq"), f"{folder}/${{tag}}.%Y%m%d", FORMAT, buffer)
        buffer = Buffer(False, f"{folder}/other.*.log", 60, 1 << 24, 1 << 26, 1)
        other = FileMatch(Pattern("**"), f"{folder}/other.%Y%m%d", FORMAT, buffer)
        self.router = Router([named, other])
        self.limits = Limits(2 * LONGEST)
        self.connect()

    def connect(self) -> None:
        self.wire = Wire()
        self.forward = Forward(self.router, self.limits, LONGEST)
        self.forward.connection_made(self.wire)

    def send(self, *data: bytes) -> list[Any]:
        """Send data piece by piece and return the acknowledgements of all so far."""
        for piece in data:
            self.forward.data_received(piece)
        unpacker = msgpack.Unpacker(unicode_errors="surrogateescape")
        unpacker.feed(self.wire.written)
        return list(unpacker)

    def clear(self) -> None:
        """Make the folder empty for the next example."""
        for store in self.router.stores:
            store.close()
        for path in self.folder.iterdir():
            path.unlink()

    def lines(self) -> list[bytes]:
        """Return the lines of all staged chunks."""
        chunks = sorted(self.folder.glob("*.b*.log"))
        return [line for chunk in chunks for line in chunk.read_bytes().split(b"\n")[:-1]]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "now", lambda: (NOON, 0))


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    return Peer(tmp_path)


def pack(*message: Any) -> bytes:
    return msgpack.packb(message, use_bin_type=True)


PACKED = msgpack.packb([NOON, {"n": 1}]) + msgpack.packb([TIME, {"n": 2}])


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (pack("rabbitmq", NOON, {"n": 1}, {"chunk": "c"}), 1),
        (pack("rabbitmq", TIME, {"n": 1}, {"chunk": "c"}), 1),
        (pack("rabbitmq", [[NOON, {"n": 1}], [TIME, {"n": 2}]], {"chunk": "c"}), 2),
        (pack("rabbitmq", PACKED, {"chunk": "c", "size": 2, "compressed": "text"}), 2),
        (msgpack.packb(["rabbitmq", PACKED, {"chunk": "c"}], use_bin_type=False), 2),
        (pack("rabbitmq", [], {"chunk": "c"}), 0),
        (pack("rabbitmq", b"", {"chunk": "c"}), 0),
    ],
)
def test_every_mode_is_taken_and_acknowledged(peer: Peer, message: bytes, count: int) -> None:
    assert peer.send(message) == [{"ack": "c"}]
    assert len(peer.lines()) == count
    assert not peer.wire.closed


def test_a_line_is_time_tag_and_compact_json(peer: Peer) -> None:
    peer.send(pack("rabbitmq", TIME, {"log": 'a/"b"\tKäse', "n": 1.5, "none": None}))
    assert peer.lines() == [
        b"2026-11-24T12:00:00.821+00:00\trabbitmq\t"
        + '{"log":"a/\\"b\\"\\tKäse","n":1.5,"none":null}'.encode()
    ]


def test_the_acknowledgement_follows_the_lines(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(peer.wire, "write", lambda _: seen.append(len(peer.lines())))
    peer.send(pack("rabbitmq", NOON, {}, {"chunk": "a"}) + pack("x", NOON, {}, {"chunk": "b"}))
    assert seen == [2]


@pytest.mark.parametrize("time", [0, 1, NOON - 31 * DAY, NOON + 31 * DAY, 2**32 - 1])
def test_a_time_far_from_now_is_now(peer: Peer, time: int) -> None:
    peer.send(pack("rabbitmq", time, {}))
    assert peer.lines()[0].startswith(b"2026-11-24T12:00:00.000+00:00\t")


def test_a_time_of_last_week_is_kept(peer: Peer) -> None:
    peer.send(pack("rabbitmq", NOON - 7 * DAY, {}))
    assert peer.lines()[0].startswith(b"2026-11-17T12:00:00.000+00:00\t")


@pytest.mark.parametrize("message", [b"\xc0", b"\x91\xa1x"])
def test_a_heartbeat_is_ignored(peer: Peer, message: bytes) -> None:
    assert peer.send(message, pack("rabbitmq", NOON, {}, {"chunk": "c"})) == [{"ack": "c"}]


def test_bytes_that_are_no_utf8_become_readable(peer: Peer) -> None:
    peer.send(b"\x93\xa8rabbitmq\x01\x82\xa1a\xa4\xc3\xa4\xff\xfe\xc4\x01\xfd\xc4\x01\xfc")
    assert peer.lines()[0].decode().endswith('{"a":"ä\ufffd\ufffd","\ufffd":"\ufffd"}')


@pytest.mark.parametrize(
    ("record", "json_text"),
    [
        ({"x": float("nan")}, '{"x":"nan"}'),
        ({"x": [float("-inf"), {"y": b"z"}]}, '{"x":["-inf",{"y":"z"}]}'),
        ({2: 1, None: 3, False: 4}, '{"2":1,"null":3,"false":4}'),
        ({b"k": 1}, '{"k":1}'),
        ({"t": TIME}, f'{{"t":{NOON}}}'),
        ({"u": 2**64 - 1}, '{"u":18446744073709551615}'),
    ],
)
def test_odd_values_become_json(peer: Peer, record: Any, json_text: str) -> None:
    peer.send(pack("rabbitmq", NOON, record))
    assert peer.lines()[0].split(b"\t")[2].decode() == json_text


@pytest.mark.parametrize("tag", ["", "../../x", "x" * 10_000, "\0", "a\nb\tc", "rabbitmq\n", "/"])
def test_a_tag_names_no_file_and_forges_no_line(peer: Peer, tag: str) -> None:
    peer.send(pack(tag, NOON, {"n": 1}))
    (line,) = peer.lines()
    _, written, record = line.decode().split("\t")
    assert record == '{"n":1}'
    assert written == json.dumps(tag)[1:-1].replace("\\n", "\\u000a").replace("\\t", "\\u0009")
    for store in peer.router.stores:
        store.flush_all()
    assert [path.name for path in peer.folder.iterdir()] == ["other.20261124.log"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b'["rabbitmq",1,{}]', "JSON text"),
        (b'{"x":1}', "JSON text"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP"),
        (b"\x16\x03\x01\x02\x00\x01", "TLS"),
        (b"\xc1", "begin with 0xc1"),
        (b"\x93\xa1x\x01\xc1", "no msgpack"),
        (b"\x05", "begin with 0x05"),
        (b"\x81\xa1x\x01", "begin with 0x81"),
        (pack("x", 1.5, {}), "a time that is neither"),
        (pack("x", -1, {}), "a time that is neither"),
        (pack("x", 2**32, {}), "a time that is neither"),
        (pack("x", True, {}), "a time that is neither"),
        (pack("x", msgpack.ExtType(0, b"1234567"), {}), "no EventTime"),
        (pack("x", msgpack.ExtType(0, b"\xff" * 8), {}), "no EventTime"),
        (pack("x", msgpack.ExtType(1, b"12345678"), {}), "a time that is neither"),
        (pack("x", 1, "record"), "a record that is no map"),
        (pack("x", 1), "without a record"),
        (pack(7, 1, {}), "a tag that is no text"),
        (pack("x", 1, {}, {}, 5), "5 parts"),
        (pack("x", 1, {}, "option"), "an option that is no map"),
        (pack("x", 1, {}, {"chunk": 7}), "a chunk that is no text"),
        (pack("x", 1, {}, {"chunk": "c" * 300}), "a chunk that is no text"),
        (pack("x", [[1, {}], [1]]), "an entry"),
        (pack("x", [1]), "an entry"),
        (pack("x", b"\x92\x01"), "cut or no msgpack"),
        (pack("x", b"\xc1"), "cut or no msgpack"),
        (pack("x", PACKED, {"compressed": "gzip"}), "compressed"),
        (b"\x93\xa1x\x01" + b"\x91" * 5000, "nested too deep"),
        (b"\x93\xa1x\x01\x81\x80\x01", "cannot be unpacked"),
        (pack("x" * 20_000, 1, {}), "a tag of more than"),
        (b"\xdb\x40\0\0\0abc", "begin with 0xdb"),
        (b"\xdd\x40\0\0\0abc", "announces|no msgpack"),
        (b"\x93\xdb\x40\0\0\0abc", "announces 1073741824"),
        (b"\x92\xa1x\xc6\x40\0\0\0abc", "announces 1073741824"),
        (b"\x92\xa1x\xdd\x40\0\0\0abc", "announces 1073741824"),
        (pack("x", 1, {"x": "y" * LONGEST}), "more than 1048576 bytes"),
        (pack("x", 1, {"x": "y" * 2 * LONGEST})[:-1], "more than 1048576 bytes"),
        (pack("x", [[1, {"x": [[]] * 900_000}]]), "1000000 values"),
        (pack("x" * 16_000, [[1, {}]] * 10_000), "bytes of lines"),
    ],
)
def test_everything_else_is_one_clear_line_and_a_closed_connection(
    peer: Peer, capfd: pytest.CaptureFixture[str], message: bytes, reason: str
) -> None:
    good = pack("rabbitmq", NOON, {}, {"chunk": "good"})
    assert peer.send(good + message, good) == [{"ack": "good"}]
    assert peer.wire.closed
    assert len(peer.lines()) == 1
    peer.forward.connection_lost(None)
    (line,) = capfd.readouterr().out.splitlines()
    assert "closed 192.0.2.1:4711" in line
    assert any(part in line for part in reason.split("|"))


@pytest.mark.parametrize("depth", [10, 500, 990, 1015])
def test_a_deep_record_is_taken_or_refused(peer: Peer, depth: int) -> None:
    record = b"\x81\xa1x" + b"\x91" * depth + b"\xc0"
    acks = peer.send(b"\x94\xa1x\x01" + record + msgpack.packb({"chunk": "c"}))
    assert len(acks) == len(peer.lines()) == (not peer.wire.closed)


def test_a_full_store_acknowledges_nothing_and_closes(peer: Peer) -> None:
    for path in peer.folder.iterdir():
        path.unlink()
    peer.folder.rmdir()
    peer.folder.write_text("in the way")
    assert peer.send(pack("rabbitmq", NOON, {}, {"chunk": "c"})) == []
    assert peer.wire.closed
    peer.folder.unlink()
    peer.connect()
    assert peer.send(pack("rabbitmq", NOON, {}, {"chunk": "c"})) == [{"ack": "c"}]


def test_unfinished_messages_of_all_clients_are_bounded(
    peer: Peer, capfd: pytest.CaptureFixture[str]
) -> None:
    start = b"\x93\xa8rabbitmq\x01\x81\xa1x\xdb\x00\x0f\x00\x00"
    wires = []
    for size in 900_000, 500_000, 600_000, 400_000:
        peer.connect()
        peer.send(start, b"y" * size)
        wires.append(peer.wire)
    assert [wire.closed for wire in wires] == [True, False, False, False]
    assert capfd.readouterr().out.count("unfinished messages of all clients") == 1


def test_a_message_that_does_not_end_in_time_is_refused(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    peer.send(pack("rabbitmq", NOON, {}, {"chunk": "c"})[:-1])
    peer.limits.tick()
    assert not peer.wire.closed
    monkeypatch.setattr("collector.limits.PATIENCE", -1.0)
    peer.limits.tick()
    assert peer.wire.closed
    assert "did not end within" in capfd.readouterr().out


def test_there_is_a_most_of_connections(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    peer.limits.most_clients = 1
    peer.connect()
    assert peer.wire.closed
    assert "there are 1 connections already" in capfd.readouterr().out


SIMPLE = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
)
RECORDS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        SIMPLE, lambda kids: st.lists(kids) | st.dictionaries(st.text(), kids), max_leaves=8
    ),
    max_size=5,
)


@EXAMPLES
@given(
    records=st.lists(RECORDS, max_size=4),
    tag=st.text(max_size=20),
    packed=st.booleans(),
    cuts=st.lists(st.integers(1, 200), max_size=5),
)
def test_what_was_sent_comes_out_however_it_is_cut(
    tmp_path: Path, records: list[Any], tag: str, packed: bool, cuts: list[int]
) -> None:
    peer = Peer(tmp_path)
    entries: Any = [[NOON, record] for record in records]
    if packed:
        entries = b"".join(msgpack.packb(entry) for entry in entries)
    data = pack(tag, entries, {"chunk": "c"})
    at = 0
    for cut in cuts:
        peer.send(data[at : at + cut])
        at += cut
    assert peer.send(data[at:]) == [{"ack": "c"}]
    lines = peer.lines()
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        _, _, text = line.decode("utf-8", "surrogateescape").split("\t")
        assert json.loads(text).keys() == record.keys()
        for key, value in record.items():
            if isinstance(value, int | str | None):
                assert json.loads(text)[key] == value
    peer.clear()


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4),
    st.binary(),
)
def test_any_bytes_end_in_an_acknowledgement_or_one_line(
    tmp_path: Path, changes: list[tuple[int, int]], noise: bytes
) -> None:
    peer = Peer(tmp_path)
    data = bytearray(
        pack("rabbitmq", TIME, {"log": "x", "n": [1, {"y": 2.5}]}, {"chunk": "c"})
        + pack("rabbitmq", PACKED, {"chunk": "d"})
        + pack("x", [[NOON, {}]], {"chunk": "e"})
    )
    for at, byte in changes:
        data[at % len(data)] = byte
    said: list[str] = []
    refuse = peer.forward.refuse
    peer.forward.refuse = lambda reason: (said.append(reason), refuse(reason))[1]  # type: ignore[method-assign]
    peer.send(bytes(data), noise)
    assert len(said) == peer.wire.closed
    peer.clear()


def test_the_most_values_fit_a_legitimate_message(peer: Peer) -> None:
    record = {f"key{number}": "value" for number in range(4)}
    message = pack("rabbitmq", [[NOON, record]] * 18_000, {"chunk": "c"})
    assert LONGEST * 0.8 < len(message) < LONGEST
    assert peer.send(message) == [{"ack": "c"}]
    assert forward_module.MOST_VALUES == 1_000_000


def part(line: str, ordinal: int, text: str, last: bool = False, container: str = "c") -> bytes:
    record = {
        "log": text,
        "container_id": container,
        "partial_message": "true",
        "partial_id": line,
        "partial_ordinal": str(ordinal),
        "partial_last": "true" if last else "false",
    }
    return pack("app", TIME, record, {"chunk": f"{line}{ordinal}"})


def logs(peer: Peer) -> list[str]:
    records = [json.loads(line.split(b"\t", 2)[2]) for line in peer.lines()]
    assert not [name for one in records for name in one if name.startswith("partial_")]
    return [one["log"] for one in records]


def test_a_line_that_docker_cut_is_one_again_beside_those_of_others(peer: Peer) -> None:
    acks = peer.send(
        part("x", 1, "a" * 16384),
        part("y", 1, "1" * 16384, container="d"),
        part("x", 2, "b" * 16384),
        pack("app", TIME, {"log": "short", "container_id": "c"}, {"chunk": "short"}),
        part("y", 2, "2", last=True, container="d"),
        # As after an acknowledgement that was lost.
        part("x", 2, "b" * 16384),
        part("x", 3, "c", last=True),
    )
    assert [one["ack"] for one in acks] == ["x1", "y1", "x2", "short", "y2", "x2", "x3"]
    x, y = "a" * 16384 + "b" * 16384 + "c", "1" * 16384 + "2"
    assert logs(peer) == ["short", y, x]
    assert peer.lines()[2].startswith(b"2026-11-24T12:00:00.821+00:00\tapp\t")


def test_a_last_part_that_is_refused_may_come_again(peer: Peer) -> None:
    peer.send(part("x", 1, "a"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collector.store.MOST_CHUNKS", 0)
        assert peer.send(part("x", 2, "b", last=True)) == [{"ack": "x1"}]
    assert peer.wire.closed
    peer.connect()
    assert peer.send(part("x", 2, "b", last=True)) == [{"ack": "x2"}]
    assert logs(peer) == ["ab"]
    peer.router.write_given_up(patience=0)
    assert logs(peer) == ["ab"]


def test_a_line_whose_last_part_does_not_come_is_written_with_what_there_is(peer: Peer) -> None:
    peer.send(part("x", 1, "a"), part("x", 2, "b"))
    peer.router.write_given_up()
    assert logs(peer) == []
    peer.router.write_given_up(patience=0)
    assert logs(peer) == ["ab"]


def test_an_endless_line_is_written_in_long_pieces(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collector.parts.LONGEST_LINE", 3)
    peer.send(*(part("x", ordinal, str(ordinal)) for ordinal in range(1, 9)))
    assert logs(peer) == ["123", "456"]


def test_beyond_the_memory_for_unfinished_lines_parts_are_written_as_they_come(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collector.parts.MOST_HELD", 10)
    peer.send(part("x", 1, "a" * 8), part("y", 1, "b" * 8), part("x", 2, "c", last=True))
    found = [json.loads(line.split(b"\t", 2)[2]) for line in peer.lines()]
    assert [one["log"] for one in found] == ["b" * 8, "a" * 8 + "c"]
    assert found[0]["partial_id"] == "y"


@pytest.mark.parametrize(
    "change",
    [
        {"partial_ordinal": 1},
        {"partial_ordinal": "-1"},
        {"partial_ordinal": "1" * 5000},
        {"log": None},
        {"partial_message": True},
    ],
)
def test_what_only_resembles_a_part_is_written_as_it_is(peer: Peer, change: dict[str, Any]) -> None:
    record = {"log": "a", "partial_message": "true", "partial_ordinal": "1"} | change
    peer.send(pack("app", TIME, record))
    assert [json.loads(line.split(b"\t", 2)[2]) for line in peer.lines()] == [record]
