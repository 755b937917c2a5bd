"""What the exporter promises of the certificates that TLS ports serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from exporter.certificates import not_after
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Exporter, Loop, Scraped

NOW = datetime.now(UTC).replace(microsecond=0)
ENDS = "tls_certificate_not_after_timestamp_seconds"


@dataclass
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


def days(number: float) -> datetime:
    return NOW + timedelta(days=number)


def issue(
    name: str,
    issuer: Issued | None = None,
    *,
    ca: bool = False,
    begins: datetime | None = None,
    ends: datetime | None = None,
) -> Issued:
    """Return what issuer signs, or what signs itself: good for 50 days unless told otherwise."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins or days(-100))
        .not_valid_after(ends or days(50))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return Issued(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


@pytest.fixture(scope="module")
def ca() -> Issued:
    return issue("CA", ca=True, ends=days(3000))


class Server:
    """Speaks TLS on a port of its own with the last chain that it was given."""

    def __init__(self, loop: Loop, folder: Path, port: int) -> None:
        self._file = folder / "server.pem"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._loop = loop
        self.goodbyes = 0
        self._server = loop.run(
            asyncio.start_server(self._serve, "127.0.0.1", port, ssl=self._context)
        )

    def show(self, *chain: Issued) -> None:
        key = chain[0].key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        self._file.write_bytes(key + b"".join(one.pem for one in chain))
        self._context.load_cert_chain(self._file)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The end by the protocol's own word is no error.
        if await reader.read() == b"":
            self.goodbyes += 1
        writer.close()

    def stop(self) -> None:
        self._loop.loop.call_soon_threadsafe(self._server.close)


@pytest.fixture
def closed() -> int:
    """Return a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def server(loop: Loop, tmp_path: Path, closed: int) -> Iterator[Server]:
    server = Server(loop, tmp_path, closed)
    yield server
    server.stop()


@pytest.fixture
def watch(
    export: Callable[..., Exporter], tmp_path: Path, closed: int, ca: Issued
) -> Callable[..., Exporter]:
    """Start an exporter that watches the server and trusts the CA, unless told otherwise."""
    (tmp_path / "ca.pem").write_bytes(ca.pem)
    usual = {"TLS_TARGETS": f"a=127.0.0.1:{closed}", "TLS_CA_FILE": str(tmp_path / "ca.pem")}
    return lambda **variables: export(**usual | variables)


def told(scraped: Scraped) -> tuple[float | None, float | None]:
    """Return whether a client gets through, and when the certificate ends."""
    return scraped.value("tls_handshake_up", target="a"), scraped.value(ENDS, target="a")


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("TLS of ")]


def test_a_certificate_of_the_ca_is_told_with_its_end(
    server: Server, watch: Callable[..., Exporter], ca: Issued
) -> None:
    server.show(issue("right", ca, ends=days(6)))
    scraped = watch().scrape()
    assert told(scraped) == (1, days(6).timestamp())
    assert {scraped.types[name] for name in ("tls_handshake_up", ENDS)} == {"gauge"}
    assert scraped.value("rabbitmq_up", cluster="rabbit@broker1", node="rabbit@broker1") == 1


def test_without_targets_nothing_is_told(export: Callable[..., Exporter]) -> None:
    assert not [name for name in export().scrape().types if name.startswith("tls_")]


@pytest.mark.parametrize(
    ("begins", "ends", "reason"),
    [
        (days(-100), days(-1), "certificate has expired"),
        (days(1), days(50), "certificate is not yet valid"),
    ],
)
def test_a_certificate_out_of_its_time_is_told_and_why(
    server: Server,
    watch: Callable[..., Exporter],
    ca: Issued,
    caplog: pytest.LogCaptureFixture,
    begins: datetime,
    ends: datetime,
    reason: str,
) -> None:
    server.show(issue("late", ca, begins=begins, ends=ends))
    assert told(watch().scrape()) == (0, ends.timestamp())
    assert reasons(caplog) == [f"TLS of a: {reason}"]


def test_a_certificate_of_another_ca_is_told_and_why(
    server: Server, watch: Callable[..., Exporter], caplog: pytest.LogCaptureFixture
) -> None:
    other = issue("other CA", ca=True)
    server.show(issue("stranger", other, ends=days(9)))
    assert told(watch().scrape()) == (0, days(9).timestamp())
    assert reasons(caplog) == ["TLS of a: unable to get local issuer certificate"]


def test_without_a_ca_file_the_system_is_trusted_and_so_not_this_certificate(
    server: Server, watch: Callable[..., Exporter], ca: Issued
) -> None:
    server.show(issue("right", ca))
    assert told(watch(TLS_CA_FILE="").scrape()) == (0, days(50).timestamp())


def test_the_first_end_of_a_chain_counts(
    server: Server, watch: Callable[..., Exporter], ca: Issued
) -> None:
    between = issue("intermediate", ca, ca=True, ends=days(5))
    server.show(issue("right", between), between)
    assert told(watch().scrape()) == (1, days(5).timestamp())


def test_the_first_end_of_a_chain_that_is_not_trusted_counts_too(
    server: Server, watch: Callable[..., Exporter]
) -> None:
    between = issue("intermediate", issue("other CA", ca=True), ca=True, ends=days(5))
    server.show(issue("right", between), between)
    assert told(watch().scrape()) == (0, days(5).timestamp())


def test_the_end_of_the_ca_itself_counts_though_no_server_shows_it(
    server: Server, watch: Callable[..., Exporter], tmp_path: Path
) -> None:
    old = issue("old CA", ca=True, ends=days(4))
    server.show(issue("right", old))
    exporter = watch()
    (tmp_path / "ca.pem").write_bytes(old.pem)
    assert told(exporter.scrape()) == (1, days(4).timestamp())


def test_a_ca_that_is_trusted_beside_and_signed_nothing_here_may_end(
    server: Server, watch: Callable[..., Exporter], tmp_path: Path, ca: Issued
) -> None:
    server.show(issue("right", ca))
    exporter = watch()
    old = issue("old CA", ca=True, ends=days(-1))
    (tmp_path / "ca.pem").write_bytes(old.pem + ca.pem)
    assert told(exporter.scrape()) == (1, days(50).timestamp())


def test_an_intermediate_ca_may_be_what_is_trusted(
    server: Server, watch: Callable[..., Exporter], tmp_path: Path, ca: Issued
) -> None:
    between = issue("intermediate", ca, ca=True)
    server.show(issue("right", between, ends=days(40)))
    exporter = watch()
    (tmp_path / "ca.pem").write_bytes(between.pem)
    assert told(exporter.scrape()) == (1, days(40).timestamp())


def test_a_new_certificate_and_a_new_ca_count_at_the_next_scrape(
    server: Server,
    watch: Callable[..., Exporter],
    tmp_path: Path,
    ca: Issued,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    exporter = watch()
    server.show(issue("right", ca, ends=days(6)))
    assert told(exporter.scrape()) == (1, days(6).timestamp())
    new = issue("new CA", ca=True)
    server.show(issue("right", new, ends=days(40)))
    assert told(exporter.scrape()) == (0, days(40).timestamp())
    (tmp_path / "ca.pem").write_bytes(ca.pem + new.pem)
    assert told(exporter.scrape()) == (1, days(40).timestamp())
    assert reasons(caplog)[-1] == "TLS of a: answered again"


@pytest.mark.parametrize("text", [None, "", "nonsense"])
def test_a_file_of_cas_that_cannot_be_used_is_told_and_hides_no_end(
    server: Server,
    watch: Callable[..., Exporter],
    tmp_path: Path,
    ca: Issued,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
) -> None:
    server.show(issue("right", ca))
    exporter = watch()
    file = tmp_path / "ca.pem"
    file.unlink() if text is None else file.write_text(text)
    assert told(exporter.scrape()) == (0, days(50).timestamp())
    [reason] = reasons(caplog)
    assert reason.startswith(f"TLS of a: TLS_CA_FILE={file} cannot be used: ")


def test_a_port_that_is_closed_is_told_and_why(
    watch: Callable[..., Exporter], caplog: pytest.LogCaptureFixture
) -> None:
    # Bound, so that no other program listens there meanwhile.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        exporter = watch(TLS_TARGETS=f"a=127.0.0.1:{held.getsockname()[1]}")
        for _ in range(2):
            assert told(exporter.scrape()) == (0, None)
    [reason] = reasons(caplog)
    assert "Connect call failed" in reason


def test_a_port_that_speaks_another_language_is_told_and_why(
    loop: Loop, watch: Callable[..., Exporter], closed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = loop.run(asyncio.start_server(plain, "127.0.0.1", closed))
    assert told(watch().scrape()) == (0, None)
    loop.loop.call_soon_threadsafe(server.close)
    [reason] = reasons(caplog)
    assert "wrong version number" in reason.lower()


def test_ports_that_are_silent_cost_one_time_out_and_hide_nothing(
    server: Server,
    watch: Callable[..., Exporter],
    closed: int,
    ca: Issued,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.show(issue("right", ca))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        targets = ",".join(f"s{n}=127.0.0.1:{port}" for n in range(5))
        exporter = watch(TLS_TARGETS=f"{targets},a=127.0.0.1:{closed}", RABBIT_TIMEOUT="1")
        start = time.monotonic()
        scraped = exporter.scrape()
        assert 0.9 < time.monotonic() - start < 2
    assert told(scraped) == (1, days(50).timestamp())
    assert [scraped.value("tls_handshake_up", target=f"s{n}") for n in range(5)] == [0] * 5
    assert scraped.labels(ENDS) == [{"target": "a"}]
    assert set(scraped.modules().values()) == {1}
    assert reasons(caplog) == [f"TLS of s{n}: no TLS within 1 s" for n in range(5)]


def test_a_server_sees_no_connection_that_breaks_off(
    server: Server, watch: Callable[..., Exporter], ca: Issued
) -> None:
    server.show(issue("right", ca))
    exporter = watch()
    for _ in range(3):
        exporter.scrape()
    deadline = time.monotonic() + 5
    while server.goodbyes < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.goodbyes == 3


CERTIFICATE = issue("any")


@pytest.mark.parametrize(
    "ends",
    # Two digits of the year up to 2049, then four.
    [datetime(y, 12, 31, 23, 59, 59, tzinfo=UTC) for y in (1970, 1999, 2000, 2049, 2050, 9999)],
)
def test_the_end_of_a_certificate_is_read(ends: datetime) -> None:
    certificate = issue("x" * 60, begins=datetime(1960, 1, 1, tzinfo=UTC), ends=ends)
    assert not_after(certificate.der) == ends.timestamp()


@given(st.integers(0, 200), st.binary(max_size=20))
def test_what_is_no_certificate_is_a_value_error_at_most(place: int, other: bytes) -> None:
    der = CERTIFICATE.der
    with contextlib.suppress(ValueError):
        not_after(der[:place] + other + der[place + len(other) :])
    with pytest.raises(ValueError, match=r"."):
        not_after(other)
