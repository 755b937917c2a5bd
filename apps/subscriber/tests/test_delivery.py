"""A message as JSON, whatever another program put into it."""

import json
import math
import struct
from base64 import b64decode
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from door.amqp import decode_value
from hypothesis import given, settings
from hypothesis import strategies as st
from pika.spec import BasicProperties
from subscriber.delivery import PIECE, Delivery

NOTHING = {
    "id": None,
    "body": "",
    "encoding": "utf-8",
    "content_type": None,
    "headers": {},
    "redelivered": False,
}


def delivery(body: bytes = b"", redelivered: bool = False, **properties: Any) -> Delivery:
    channel: Any = None
    return Delivery(1, body, BasicProperties(**properties), channel, redelivered)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (delivery(), {}),
        (delivery("Käse ☃\n\0".encode()), {"body": "Käse ☃\n\0"}),
        (delivery(b"\xff\0"), {"body": "/wA=", "encoding": "base64"}),
        (delivery(b"\xed\xa0\x80"), {"body": "7aCA", "encoding": "base64"}),
        (delivery(redelivered=True), {"redelivered": True}),
        (delivery(message_id="m", content_type="a/b"), {"id": "m", "content_type": "a/b"}),
        (delivery(message_id="", content_type=""), {}),
        (delivery(message_id=b"\xff", content_type=b"\xff"), {}),
        (delivery(headers={"a": 1}), {"headers": {"a": 1}}),
        (delivery(headers={b"\xff": 1, "": 2}), {"headers": {"ÿ": 1, "": 2}}),
    ],
)
def test_a_message_is_one_line_of_json(message: Delivery, told: dict[str, Any]) -> None:
    line = b"".join(message.line())
    assert line.count(b"\n") == 1
    assert json.loads(line) == NOTHING | told
    assert json.loads(b"".join(message.line("r"))) == NOTHING | told | {"receipt": "r"}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1.5, 1.5),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (-(2**63), -(2**63)),
        ("ä", "ä"),
        (b"ab", "ab"),
        (None, None),
        (Decimal("1.50"), "1.50"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02 03:04:05+00:00"),
        ([], []),
        ({}, {}),
        ({"a": {"b": [b"\xff", None, {"c": Decimal(1)}]}}, {"a": {"b": ["ÿ", None, {"c": "1"}]}}),
    ],
)
def test_headers_keep_their_values_and_what_json_lacks_becomes_text(value: Any, told: Any) -> None:
    assert json.loads(b"".join(delivery(headers={"h": value}).line()))["headers"] == {"h": told}


@pytest.mark.parametrize(
    ("encoded", "told"),
    [
        (b"t\1", True),
        (b"b\xff", -1),
        (b"B\xff", 255),
        (b"s\xff\xff", -1),
        (b"U\xff\xff", -1),
        (b"u\xff\xff", 65535),
        (b"I" + b"\xff" * 4, -1),
        (b"i" + b"\xff" * 4, 2**32 - 1),
        (b"l" + b"\xff" * 8, -1),
        (b"L" + b"\xff" * 8, -1),
        (b"f" + struct.pack(">f", 2), 2),
        (b"d" + struct.pack(">d", 2), 2),
        (b"d" + struct.pack(">d", 1.5), 1.5),
        (b"D\2" + struct.pack(">i", 150), "1.50"),
        (b"S\0\0\0\2\xc3\xa4", "ä"),
        (b"S\0\0\0\1\xff", "ÿ"),
        (b"x\0\0\0\1\xff", "ÿ"),
        (b"T" + struct.pack(">Q", 0), "1970-01-01 00:00:00+00:00"),
        (b"A\0\0\0\3t\1V", [True, None]),
        (b"F\0\0\0\4\1at\0", {"a": False}),
        (b"V", None),
    ],
)
def test_each_type_of_amqp_can_be_told(encoded: bytes, told: Any) -> None:
    value, _ = decode_value(encoded, 0)
    assert json.loads(b"".join(delivery(headers={"h": value}).line()))["headers"] == {"h": told}


@pytest.mark.parametrize("depth", [100, 400])
def test_headers_of_any_depth_that_pika_reads_can_be_told(depth: int) -> None:
    encoded = b"V"
    for _ in range(depth):
        encoded = b"F" + struct.pack(">I", len(encoded) + 1) + b"\0" + encoded
    value, _ = decode_value(encoded, 0)
    told = json.loads(b"".join(delivery(headers={"h": value}).line()))
    assert str(told["headers"]) == str({"h": value})


def test_headers_that_are_nested_too_deeply_are_left_out() -> None:
    headers: dict[str, Any] = {}
    for _ in range(2000):
        headers = {"": headers}
    told = json.loads(b"".join(delivery(b"a", headers=headers).line()))
    assert (told["body"], told["headers"]) == ("a", {})


RECEIPT = "r" * 22


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.binary() | st.text().map(str.encode),
    st.none() | st.text() | st.binary(),
    st.dictionaries(st.text(), st.text() | st.binary() | st.integers() | st.none(), max_size=3),
    st.booleans(),
)
def test_the_size_bounds_the_line(
    body: bytes, message_id: Any, headers: dict[str, Any], redelivered: bool
) -> None:
    one = delivery(body, redelivered, message_id=message_id, headers=headers)
    assert one.length() <= one.length(RECEIPT) <= one.size
    for receipt in None, RECEIPT:
        assert len(b"".join(one.line(receipt))) == one.length(receipt)


def plain(value: Any) -> Any:
    """Return value as json.dumps takes it."""
    match value:
        case dict():
            return {plain(name): plain(inner) for name, inner in value.items()}
        case list():
            return [plain(inner) for inner in value]
        case bytes():
            return value.decode("latin-1")
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
    return str(value)


# With lone surrogates, which RabbitMQ does not check a text for.
anything = st.text(st.characters(exclude_categories=[]), max_size=20)
odd = anything | st.sampled_from(["\x85", "a\u2028\u2029", "\ud800", '\\"\x7f\x00\n\t\b\f\r'])
values = st.recursive(
    odd | st.binary(max_size=9) | st.integers() | st.floats() | st.booleans() | st.none(),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(odd, one, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    odd.map(lambda text: text.encode(errors="ignore")),
    st.fixed_dictionaries({}, optional=dict.fromkeys(["message_id", "content_type", "type"], odd)),
    st.none() | st.dictionaries(odd, values, max_size=3),
    st.none() | st.integers(0, 9),
)
def test_each_byte_of_a_line_is_as_json_dumps_has_it(
    body: bytes, texts: dict[str, str], headers: dict[str, Any] | None, priority: int | None
) -> None:
    one = delivery(body, headers=headers, priority=priority, **texts)
    members: dict[str, Any] = {"id": texts.get("message_id") or None, "body": body.decode()}
    members |= {"encoding": "utf-8", "content_type": texts.get("content_type") or None}
    members |= {"type": texts["type"]} if texts.get("type") else {}
    members |= {} if priority is None else {"priority": priority}
    members |= {"headers": plain(headers or {}), "redelivered": False}
    told = json.dumps(members, ensure_ascii=False)
    for end in "\x85\u2028\u2029":
        told = told.replace(end, f"\\u{ord(end):04x}")
    assert b"".join(one.line()) == told.encode(errors="backslashreplace") + b"\n"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"x" * 200_001, "utf-8"),
        (("\u2603\x85\u2028" + "ä" * 40).encode() * 3000, "utf-8"),
        (b'"\n' * 20_000, "utf-8"),
        (b"\0" * 65_536, "utf-8"),
        (b"\0" * 65_537, "base64"),
        (b'"' * 200_000, "base64"),
        (b"x" * 200_000 + b"\xff", "base64"),
        (b"x" * 200_000 + b"\xe2\x98", "base64"),
    ],
)
def test_a_large_body_is_told_in_the_shorter_form_and_in_pieces(body: bytes, encoding: str) -> None:
    one = delivery(body)
    pieces = list(one.line())
    told = json.loads(b"".join(pieces))
    assert told["encoding"] == encoding
    assert (b64decode(told["body"]) if encoding == "base64" else told["body"].encode()) == body
    assert sum(map(len, pieces)) == one.length() < one.size
    assert all(len(piece) < 6 * PIECE + 500 for piece in pieces)


def test_a_line_ends_nowhere_else() -> None:
    ends = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    line = b"".join(delivery(ends.encode(), headers={ends: ends}).line()).decode()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["body"] == ends


def test_each_property_that_is_set_is_told() -> None:
    names = ["correlation_id", "reply_to", "type", "app_id", "user_id", "content_encoding"]
    told: dict[str, Any] = {name: f"a {name}" for name in names}
    told |= {"expiration": "60000", "timestamp": 1_700_000_000, "priority": 0}
    assert json.loads(b"".join(delivery(**told).line())) == NOTHING | told
    # pika gives bytes for what is not UTF-8.
    bad = dict.fromkeys(names, b"\xff")
    assert json.loads(b"".join(delivery(**bad).line())) == NOTHING


@pytest.mark.parametrize("name", ["X-Client", "x-client", "X-CLIENT"])
def test_a_client_is_named_by_the_doors_alone(name: str) -> None:
    headers = {name: "shop", "X-Other": "x"}
    for user, told in ("publisher", headers), ("subscriber", headers), (None, {"X-Other": "x"}):
        line = json.loads(b"".join(delivery(headers=headers, user_id=user).line()))
        assert line["headers"] == told
    # A client of AMQP, which can take no other name than its own.
    line = json.loads(b"".join(delivery(headers=headers, user_id="cook").line()))
    assert (line["headers"], line["user_id"]) == ({"X-Other": "x"}, "cook")


def test_a_message_weighs_what_its_body_and_its_headers_take() -> None:
    def nested(depth: int) -> Any:
        return {"a": nested(depth - 1)} if depth else "x" * 1000

    light = delivery().weight
    assert delivery(b"x" * 5000).weight == light + 5000
    assert delivery(headers={"h": ["y"] * 1000}).weight > light + 8000
    assert delivery(headers=nested(200)).weight > light + 200 * 184
