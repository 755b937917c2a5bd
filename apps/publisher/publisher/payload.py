"""What a request says: messages in forms, in JSON, in lines of JSON, or as they are.

What a body becomes while it is read is bounded, or asked for, before it is read; and nothing here
keeps other requests waiting for long.
"""

import json
import os
import time
from codecs import BOM_UTF8
from collections.abc import Iterator
from io import BytesIO
from typing import NoReturn
from urllib.parse import unquote_to_bytes

import orjson
from common.events import REQUEST_ID
from door.access import CLIENT_HEADER
from door.call import PIECE, SHORT, Call
from door.server import give_way
from werkzeug.exceptions import RequestEntityTooLarge, abort
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Field, File, MultipartDecoder, NeedData, State

from publisher.message import Message
from publisher.settings import Settings

# Bounds the work that a hostile form can cause.
MAX_FIELDS = 100
MAX_LINES = 10_000
# Bytes beside the message: of a body, of a form's field without its value, and of a line.
WRAPPING = 64 * 1024
MAX_NAME = 3 * len("message")
MAX_LINE_EXTRA = 4096
# Bytes of an id, a content type or a header's name: AMQP has one byte for their length.
MAX_SHORT = 255
# Bytes of memory for each byte of a JSON body: as text and its value, where a character has one
# byte, and where each of them has four.
NARROW, WIDE = 3, 9
# Bytes of memory for each byte of JSON outside of strings (`[0],` becomes a list of 88 bytes), and
# of a part's headers.
NESTED = 40
# Bytes of a message's object and its id.
MESSAGE = 512
# Bytes of lines, LINE for each of them besides, that are read in one turn (some milliseconds).
TURN, LINE = 256 * 1024, 1024
# Bytes of JSON that can neither be nested too deeply for json.loads nor have too long a number.
SIMPLE = 1024
# By a random digit, the one with its lower two bits that says the variant of a UUID.
VARIANT = {f"{digit:x}": "89ab"[digit & 3] for digit in range(16)}
# The names in a line that is an object.
NAMES = {"message", "id"}
MISSING = object()
FORM = "application/x-www-form-urlencoded"
# What JSON writes with one or two bytes.
PLAIN = bytes([*range(0x20, 0x7F), *b"\b\f\n\r\t"])


def uuids(count: int) -> Iterator[str]:
    """Yield count UUIDs of version 7 (RFC 9562): they sort behind those of earlier calls."""
    now = f"{time.time_ns() // 1_000_000:012x}"
    random = os.urandom(10 * count).hex()
    for start in range(0, len(random), 20):
        digits = random[start : start + 20]
        rest = f"7{digits[:3]}-{VARIANT[digits[3]]}{digits[4:7]}-{digits[7:19]}"
        yield f"{now[:8]}-{now[8:]}-{rest}"


def uuid7() -> str:
    """Return one of them."""
    return next(uuids(1))


def text_message(call: Call, limit: int) -> tuple[str, Message]:
    """Return the text of a form or a JSON object, unchanged, and the message that it becomes.

    Aborts with 400, 413 or 415 when there is none, or when it has more than limit bytes; raises
    OutOfMemory. Memory is held for the text, the message, and the text as JSON.
    """
    kind, options = _media_type(call)
    _refuse_encoded(call)
    # A byte takes up to 3 percent-encoded and 6 in JSON (\u0000), and there is some wrapping.
    if kind == FORM:
        text = _from_form(call, call.read(3 * limit + WRAPPING))
    elif kind == "multipart/form-data":
        text = _from_multipart(call, call.read(limit + WRAPPING), options.get("boundary", ""))
    elif kind == "application/json" or (kind.startswith("application/") and kind[-5:] == "+json"):
        text = _from_json(call, call.read(6 * limit + WRAPPING))
    else:
        abort(415, "Send a form, or JSON as application/json.")
    if text is MISSING:
        abort(400, "Payload is missing parameter 'message'.")
    if not isinstance(text, str):
        abort(400, "Parameter 'message' must be a string.")
    try:
        body = text.encode()
    except UnicodeEncodeError:
        abort(400, "The message has a lone surrogate, which UTF-8 cannot carry.")
    if len(body) > limit:
        abort(413, f"The message has {len(body)} bytes in UTF-8; at most {limit} are taken.")
    _hold_echo(call, body)
    return text, Message(body, uuid7(), headers=_origin(call))


def raw_message(call: Call, limit: int) -> Message:
    """Return the request's body as a message, with its type, encoding, id and X- headers.

    Aborts with 400 when one of them does not fit into AMQP, and with 413 over limit bytes.
    """
    message_id = call.header("Message-Id") or uuid7()
    content_type = call.header("Content-Type") or None
    encoding = call.header("Content-Encoding") or None
    headers = {
        name[5:].replace("_", "-").title(): value.encode("latin-1").decode(errors="replace")
        for name, value in call.environ.items()
        if name.startswith("HTTP_X_")
    }
    given = {"Message-Id": message_id, "Content-Type": content_type, "Content-Encoding": encoding}
    for name, value in given.items():
        if value and (not value.isascii() or len(value) > MAX_SHORT):
            abort(400, f"{name} must be ASCII, of {MAX_SHORT} characters at most.")
    if any(len(name) > MAX_SHORT for name in headers):
        abort(400, f"The name of a header must have {MAX_SHORT} characters at most.")
    headers.pop(CLIENT_HEADER, None)
    headers |= _origin(call)
    return Message(call.read(limit), message_id, content_type, headers, encoding)


def batch(call: Call, settings: Settings) -> list[Message]:
    """Return the messages of lines of JSON; aborts with 400, 413 or 415, naming the line.

    Raises OutOfMemory. Memory is held for the messages, and for the line that takes most while it
    is read.
    """
    _refuse_encoded(call)
    body = call.read(settings.max_batch_bytes).removeprefix(BOM_UTF8).rstrip()
    if not body:
        abort(400, "The body has no line.")
    count = body.count(b"\n") + 1
    if count > MAX_LINES:
        abort(413, f"The body has {count} lines; at most {MAX_LINES} are taken.")
    call.hold(len(body) + MESSAGE * count)
    headers = _origin(call)
    limit = settings.max_message_bytes
    ids = uuids(count)
    messages, held, done = [], 0, 0
    # BytesIO shares body, and a list of its lines would be another copy.
    for number, line in enumerate(BytesIO(body), 1):
        done += LINE + len(line)
        if done > TURN:
            give_way()
            done = 0
        if len(line) > MAX_LINE_EXTRA:
            _check_line(number, line, limit)
            if (room := _json_room(line)) > held:
                call.hold(room - held)
                held = room
        messages.append(_line(number, line.strip(), limit, headers, ids))
    return messages


def _origin(call: Call) -> dict[str, str]:
    """Return the headers that tell where a message is from; no client can set them itself."""
    headers = {REQUEST_ID: call.event.request_id}
    if call.by.name:
        headers[CLIENT_HEADER] = call.by.name
    return headers


def _media_type(call: Call) -> tuple[str, dict[str, str]]:
    """Return the request's media type in lower case and its parameters."""
    value = call.header("Content-Type") or ""
    if value == FORM:  # what most clients send word for word
        return FORM, {}
    kind, options = parse_options_header(value)
    return kind.lower(), options


def _refuse_encoded(call: Call) -> None:
    encoding = (call.header("Content-Encoding") or "identity").strip().lower()
    if encoding != "identity":
        abort(415, f"The body is sent as {encoding[:50]}; send it unencoded.")


def _hold_echo(call: Call, body: bytes) -> None:
    """Hold memory for the answer, which has the message as JSON, while it is made and sent."""
    if len(body) > SHORT:
        escaped = len(body.translate(None, PLAIN))
        call.hold(3 * (len(body) + 5 * escaped))


def _check_line(number: int, line: bytes, limit: int) -> None:
    """Refuse a long line that is no message: it could take seconds and hundreds of megabytes."""
    line = line.strip()
    room = 6 * limit if line.startswith((b'"', b"{")) else 0
    if len(line) > room + MAX_LINE_EXTRA or _outside(line, MAX_LINE_EXTRA) > MAX_LINE_EXTRA:
        _bad_line(number, f"is not JSON of a message of at most {limit} bytes")


def _loads(line: bytes) -> object:
    """Return what line says, but for very large numbers; raises ValueError or RecursionError.

    orjson takes a tenth of the time, and refuses some of what json.loads takes. Short lines that
    it takes are none that json.loads refuses, and it needs no memory worth counting for them.
    """
    if len(line) > SIMPLE:
        return json.loads(line.decode())
    try:
        return orjson.loads(line)
    except ValueError:
        return json.loads(line.decode())


def _line(
    number: int, line: bytes, limit: int, headers: dict[str, str], ids: Iterator[str]
) -> Message:
    if not line:
        _bad_line(number, "is empty")
    try:
        value = _loads(line)
    except (ValueError, RecursionError):
        _bad_line(number, "is not JSON in UTF-8")
    message_id = None
    if isinstance(value, dict):
        if not value.keys() <= NAMES:
            _bad_line(number, "has another name than 'message' and 'id'")
        message_id = value.get("id")
        value = value.get("message")
    if not isinstance(value, str):
        _bad_line(number, "is no string and has no string 'message'")
    if message_id is None:
        message_id = next(ids)
    elif not isinstance(message_id, str) or not 0 < len(message_id) <= MAX_SHORT:
        _bad_line(number, f"has an 'id' that is no string of 1 to {MAX_SHORT} characters")
    elif not message_id.isascii():
        _bad_line(number, "has an 'id' that is not ASCII")
    try:
        body = value.encode()
    except UnicodeEncodeError:
        _bad_line(number, "has a lone surrogate, which UTF-8 cannot carry")
    if len(body) > limit:
        _bad_line(number, f"has a message of {len(body)} bytes; at most {limit} are taken")
    return Message(body, message_id, "text/plain", headers)


def _bad_line(number: int, what: str) -> NoReturn:
    abort(400, f"Line {number} {what}. Nothing was sent.")


def _from_form(call: Call, body: bytes) -> object:
    """Return the first `message` of an urlencoded form; other fields are not decoded."""
    if body.count(b"&") >= MAX_FIELDS:
        abort(400, f"The form has more than {MAX_FIELDS} fields.")
    if len(body) > SHORT:
        call.hold(2 * len(body))  # as bytes and as text; _unquoted needs little more
    for field in body.split(b"&"):
        name, _, value = field.partition(b"=")
        if len(name) <= MAX_NAME and unquote_to_bytes(name) == b"message":
            return _form_text(b"".join(_unquoted(value.replace(b"+", b" "))))
    if body.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
        abort(400, "The body looks like JSON; send it with Content-Type: application/json.")
    return MISSING


def _unquoted(value: bytes) -> Iterator[bytes]:
    """Decode percent-escapes, each of which takes 64 bytes meanwhile: piece by piece, in turns."""
    start = 0
    while len(value) - start > PIECE:
        end = start + PIECE
        escape = value.find(b"%", end - 2, end)  # one that the cut would halve
        end = end if escape < 0 else escape
        yield unquote_to_bytes(value[start:end])
        start = end
        give_way()
    yield unquote_to_bytes(value[start:])


def _form_text(value: bytes | bytearray) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        abort(400, "The form is not UTF-8.")


def _from_multipart(call: Call, body: bytes, boundary: str) -> object:
    """Return the first part `message` of a form, a field or a file; others are thrown away."""
    # The part, as bytes that grow and as text; and headers, which wait for their end.
    call.hold(3 * len(body) + NESTED * min(len(body), WRAPPING + PIECE))
    text: bytearray | None = None
    wanted = False
    try:
        for event in _parts(body, boundary.encode("ascii")):
            if isinstance(event, Field | File):
                wanted = text is None and event.name == "message"
                text = bytearray() if wanted else text
            elif isinstance(event, Data) and wanted and text is not None:
                text += event.data
    except ValueError:
        abort(400, "The form cannot be read: it is not as its Content-Type says.")
    except RequestEntityTooLarge:
        abort(413, f"The form has more than {MAX_FIELDS} fields, or {WRAPPING} bytes around one.")
    return MISSING if text is None else _form_text(text)


def _parts(body: bytes, boundary: bytes) -> Iterator[object]:
    """Yield werkzeug's events of a form; raises ValueError, and RequestEntityTooLarge."""
    if not boundary:
        raise ValueError("There is no boundary.")
    # What waits in the decoder is a part's headers, or less than a boundary.
    decoder = MultipartDecoder(boundary, WRAPPING + PIECE, max_parts=MAX_FIELDS)
    for start in range(0, len(body), PIECE):
        decoder.receive_data(body[start : start + PIECE])
        while not isinstance(event := decoder.next_event(), NeedData):
            yield event
        if decoder.state is State.EPILOGUE:
            return
        give_way()
    raise ValueError("The form does not end.")


def _from_json(call: Call, body: bytes) -> object:
    """Return what the member `message` of a JSON object is."""
    body = body.removeprefix(BOM_UTF8)
    if len(body) > SHORT:
        if _outside(body, WRAPPING) > WRAPPING:
            abort(413, f"The JSON has more than {WRAPPING} bytes outside of its strings.")
        call.hold(_json_room(body))
    fault = None
    try:
        value = json.loads(body.decode())
    except UnicodeDecodeError as error:
        fault = f"its byte {error.start + 1} is not UTF-8."
    except json.JSONDecodeError as error:
        fault = f"it cannot be read from line {error.lineno}, column {error.colno} on."
    except RecursionError:
        fault = "it is nested too deeply."
    except ValueError:
        fault = "it has a number that is too long."
    if fault:
        abort(400, f"The body is not JSON in UTF-8: {fault}")
    if not isinstance(value, dict):
        abort(400, "The JSON must be an object.")
    return value.get("message", MISSING)


def _json_room(body: bytes) -> int:
    """Return the bytes that JSON takes while it is read, besides its own."""
    narrow = body.isascii() and b"\\u" not in body
    return (NARROW if narrow else WIDE) * len(body) + NESTED * min(len(body), WRAPPING)


def _outside(body: bytes, most: int) -> int:
    """Return how many bytes of JSON are neither in strings nor white, or something over most.

    Linear in time whatever the bytes are.
    """
    # Of escapes only these two could hide where a string ends.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, b" \t\r\n")
    if plain.count(b'"') > 2 * most:  # between two strings there is always a byte
        return most + 1
    return sum(map(len, plain.split(b'"')[::2]))
