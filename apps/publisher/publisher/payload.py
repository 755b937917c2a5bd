"""What a request says: messages in forms, in JSON, in lines of JSON, or as they are."""

import json
import os
import time
import uuid
from io import BytesIO
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from door.events import REQUEST_ID
from door.server import Body
from door.web import current_event, read_body
from flask import Request, abort
from werkzeug.formparser import FormDataParser

from publisher.broker import Message
from publisher.settings import Settings

# Bounds the work that a hostile form can cause.
MAX_FIELDS = 100
MAX_LINES = 10_000
# Bytes of a line beside its message.
MAX_LINE_EXTRA = 4096
# Bytes beside the message.
WRAPPING = 64 * 1024
# Bytes of an id, a content type or a header's name: AMQP has one byte for their length.
MAX_SHORT = 255
MISSING = object()
FORM = "application/x-www-form-urlencoded"
# Bytes that the server reads at a time together with the headers.
SHORT_FORM = 4096


def uuid7() -> str:
    """Return a UUID of version 7 (RFC 9562): later ones sort behind earlier ones."""
    value = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) & ~(0b11 << 62) | 7 << 76 | 0b10 << 62
    return str(uuid.UUID(int=value))


def plain_form(environ: dict[str, Any], limit: int) -> str | None:
    """Return the text of a short urlencoded form that has arrived whole; None for all else.

    What is not returned stays where it is, in door.server's input.
    """
    source = environ["wsgi.input"]
    length = int(environ.get("CONTENT_LENGTH") or 0)
    usual = environ.get("CONTENT_TYPE") == FORM and "HTTP_EXPECT" not in environ
    if not usual or not 0 < length < SHORT_FORM or not isinstance(source, Body):
        return None
    try:
        body = source.rfile.peek()[:length]
    except TimeoutError:
        abort(408, "The body took too long.")
    except OSError:
        return None
    if len(body) < length:
        return None
    try:
        text = _form_field(body)
    except ValueError:
        return None
    if text is None or len(text) * 4 > limit:
        return None
    source.read()  # type: ignore[no-untyped-call]
    return text


def text_message(request: Request, limit: int, request_id: str) -> tuple[str, Message]:
    """Return the text of a form or a JSON object, unchanged, and the message that it becomes.

    Aborts with 400, 413 or 415 when there is none, or when it has more than limit bytes.
    """
    # A byte takes up to 3 percent-encoded and 6 in JSON (\u0000), and there is some wrapping.
    if request.mimetype == FORM:
        text = _from_form(read_body(3 * limit + WRAPPING), limit)
    elif request.mimetype == "multipart/form-data":
        text = _from_multipart(read_body(limit + WRAPPING), request)
    elif request.is_json:
        text = _from_json(read_body(6 * limit + WRAPPING))
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
    return text, Message(body, uuid7(), headers={REQUEST_ID: request_id})


def raw_message(request: Request, limit: int, request_id: str) -> Message:
    """Return the request's body as a message, with its content type, id and X- headers.

    Aborts with 400 when one of them does not fit into AMQP, and with 413 over limit bytes.
    """
    message_id = request.headers.get("Message-Id") or uuid7()
    content_type = request.headers.get("Content-Type")
    headers = {
        name: value.encode("latin-1").decode(errors="replace")
        for name, value in request.headers
        if name.startswith("X-")
    }
    for name, value in {"Message-Id": message_id, "Content-Type": content_type or ""}.items():
        if not value.isascii() or len(value) > MAX_SHORT:
            abort(400, f"{name} must be ASCII, of {MAX_SHORT} characters at most.")
    if any(len(name) > MAX_SHORT for name in headers):
        abort(400, f"The name of a header must have {MAX_SHORT} characters at most.")
    return Message(read_body(limit), message_id, content_type, headers | {REQUEST_ID: request_id})


def batch(body: bytes, settings: Settings, request_id: str) -> list[Message]:
    """Return the messages of lines of JSON; aborts with 400 or 413, naming the line."""
    count = body.count(b"\n") + (not body.endswith(b"\n"))
    if count > MAX_LINES:
        abort(413, f"The body has {count} lines; at most {MAX_LINES} are taken.")
    lines = body.removesuffix(b"\n").split(b"\n")
    if not body:
        abort(400, "The body has no line.")
    headers = {REQUEST_ID: request_id}
    limit = settings.max_message_bytes
    return [_line(number, line, limit, headers) for number, line in enumerate(lines, 1)]


def _line(number: int, line: bytes, limit: int, headers: dict[str, str]) -> Message:
    # What no message needs could take seconds and hundreds of megabytes to read.
    line = line.strip()
    room = 6 * limit if line.startswith((b'"', b"{")) else 0
    if len(line) > room + MAX_LINE_EXTRA:
        _bad_line(number, f"is not JSON of a message of at most {limit} bytes")
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        _bad_line(number, "is not JSON in UTF-8")
    message_id = None
    if isinstance(value, dict):
        unknown = value.keys() - {"message", "id"}
        if unknown:
            _bad_line(number, "has another name than 'message' and 'id'")
        message_id = value.get("id")
        value = value.get("message")
    if not isinstance(value, str):
        _bad_line(number, "is no string and has no string 'message'")
    if message_id is None:
        message_id = uuid7()
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
    return Message(body, message_id, headers=headers)


def _bad_line(number: int, what: str) -> NoReturn:
    abort(400, f"Line {number} {what}. Nothing was sent.")


def _from_form(body: bytes, limit: int) -> object:
    """Read an urlencoded form; Flask's own parser takes a third of the request's time."""
    # What is no message of this size would keep everybody else waiting for seconds.
    if body.count(b"%") > limit + WRAPPING:
        abort(413)
    try:
        text = _form_field(body)
    except UnicodeDecodeError:
        abort(400, "The form is not UTF-8.")
    except ValueError:
        abort(400, f"The form has more than {MAX_FIELDS} fields.")
    return MISSING if text is None else text


def _form_field(body: bytes) -> str | None:
    """Return the first `message` of an urlencoded form, None without one; raises ValueError."""
    fields = parse_qsl(
        body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
    )
    return next((value for name, value in fields if name == "message"), None)


def _from_multipart(body: bytes, request: Request) -> object:
    parser = FormDataParser(max_form_memory_size=len(body), max_form_parts=MAX_FIELDS)
    form = parser.parse(BytesIO(body), request.mimetype, len(body), request.mimetype_params)[1]
    text = form.get("message")
    if text is None:
        return MISSING
    # werkzeug puts U+FFFD for what it cannot decode; a real one is in the body as it is.
    if "\ufffd" in text and text.encode() not in body:
        abort(400, "The form is not UTF-8.")
    return text


def _from_json(body: bytes) -> object:
    try:
        value = json.loads(body.decode())
    # Nesting that is too deep is a RecursionError, all else a ValueError.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            # It quotes a byte of the body, which is for the client only.
            current_event().fields["reason"] = "The body is not UTF-8."
        abort(400, f"The body is not JSON in UTF-8: {error}")
    if not isinstance(value, dict):
        abort(400, "The JSON must be an object.")
    return value.get("message", MISSING)
