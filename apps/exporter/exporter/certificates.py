"""The certificates that TLS ports serve, and whether a client that trusts the CAs gets through.

Each scrape asks anew and reads the CAs anew, so that what was renewed counts at once. No name is
checked: the ports are asked by their names in the stack's network, which are in no certificate of
the user's own.
"""

import asyncio
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from exporter.settings import Settings, Target
from exporter.text import Family, label_text

# Tags of DER, https://www.itu.int/rec/T-REC-X.690.
UTC_TIME = 0x17
VERSION = 0xA0


@dataclass(frozen=True)
class Seen:
    """What came of asking one target."""

    target: str
    # When the first certificate of its chain ends, in seconds since 1970; None: it showed none.
    ends: float | None = None
    # Why a client does not get through; empty when it does.
    failure: str = ""


def certificate_families(seen: list[Seen]) -> Iterator[Family]:
    """Yield what is told of the targets."""
    rows = [(label_text({"target": one.target}), one) for one in seen]
    text = "1 if a client that trusts the CAs gets through."
    ups = [(labels, float(not one.failure)) for labels, one in rows]
    yield Family("tls_handshake_up", text, ups)
    text = "When the first certificate of the chain ends, in seconds since 1970."
    ends = [(labels, one.ends) for labels, one in rows if one.ends is not None]
    yield Family("tls_certificate_not_after_timestamp_seconds", text, ends)


async def look(settings: Settings, deadline: float) -> list[Seen]:
    """Ask all targets at the same time, until deadline in the loop's time."""
    if not settings.tls_targets:
        return []
    trusting = await asyncio.to_thread(_trusting, settings.tls_ca_file)
    return await asyncio.gather(
        *(_look(target, trusting, deadline, settings.timeout) for target in settings.tls_targets)
    )


def not_after(certificate: bytes) -> float:
    """Return when a certificate (DER) ends, in seconds since 1970; ValueError when it has no such.

    Python decodes only certificates that it trusts. Source: RFC 5280, 4.1 and 4.1.2.5.
    """
    try:
        [(_, whole)] = _elements(certificate)
        signed = next(_elements(whole))[1]
        # The version is left out in those of version 1.
        fields = [content for tag, content in _elements(signed) if tag != VERSION]
        _serial, _algorithm, _issuer, validity, *_ = fields
        _, (tag, content) = _elements(validity)
    except (IndexError, StopIteration) as error:
        raise ValueError("it is no certificate") from error
    text = content.decode("ascii")
    if tag == UTC_TIME:
        text = ("20" if text < "5" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element of DER in data."""
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        # More than 127 bytes: the number of the bytes that say how many.
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        yield tag, data[at : at + length]
        at += length


def _trusting(ca_file: str | None) -> ssl.SSLContext | str:
    """Return how to trust what ca_file, or else the system, trusts; why not, when it cannot be.

    As other programs do: a CA in the file need be no root.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        if ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca_file)
    except OSError as error:
        return f"TLS_CA_FILE={ca_file} cannot be used: {error}"
    return context


def _accepting() -> ssl.SSLContext:
    """Return how to take any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _look(
    target: Target, trusting: ssl.SSLContext | str, deadline: float, seconds: int
) -> Seen:
    """Ask target, a second time where it cannot be trusted: what it serves is told all the same."""
    failure = ""
    try:
        async with asyncio.timeout_at(deadline):
            if isinstance(trusting, str):
                failure = trusting
            else:
                try:
                    return Seen(target.name, await _ends(target, trusting))
                except ssl.SSLCertVerificationError as error:
                    failure = error.verify_message
            return Seen(target.name, await _ends(target, _accepting()), failure)
    except TimeoutError:
        return Seen(target.name, None, failure or f"no TLS within {seconds} s")
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return Seen(target.name, None, failure or text)


async def _ends(target: Target, context: ssl.SSLContext) -> float:
    """Return when the first certificate of target's chain ends, by a handshake of its own."""
    _, writer = await asyncio.open_connection(
        target.host, target.port, ssl=context, ssl_shutdown_timeout=1
    )
    try:
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return min(map(not_after, _chain(tls, context.verify_mode != ssl.CERT_NONE)))
    finally:
        # It says goodbye, which takes nobody's time here: servers log what breaks off.
        writer.close()


def _chain(tls: ssl.SSLObject, verified: bool) -> list[bytes]:
    """Return the chain that was trusted, with the CA, or the one that was served."""
    if sys.version_info < (3, 13):
        # The image has Python 3.13; this is what its methods do.
        raw = tls._sslobj  # type: ignore[attr-defined]
        chain = raw.get_verified_chain() if verified else raw.get_unverified_chain()
        return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in chain]
    return tls.get_verified_chain() if verified else tls.get_unverified_chain()
