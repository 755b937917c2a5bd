# mypy: disable-error-code=no-untyped-call
"""A small broker at the other end of pika's own connection, and certificates for its TLS."""

from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gevent import ssl
from gevent.event import Event
from gevent.server import StreamServer
from pika.frame import Body, Heartbeat, Method, ProtocolHeader, decode_frame
from pika.spec import Basic, Confirm
from pika.spec import Channel as ChannelMethods
from pika.spec import Connection as ConnectionMethods


class SmallBroker:
    """Opens connections and channels, and confirms messages; what else it is told it keeps."""

    def __init__(self, tls: ssl.SSLContext | None = None, frame_max: int = 131072) -> None:
        self.port = 0
        self.methods: list[object] = []
        # What it confirmed.
        self.bodies: list[bytes] = []
        # Whether it takes messages that it does not confirm, as one without a majority.
        self.alone = False
        # Not set while it accepts connections and is silent.
        self.awake = Event()
        self.awake.set()
        self._tls = {"ssl_context": tls} if tls else {}
        self._clients: list[Any] = []
        self._replies = {
            ConnectionMethods.StartOk: ConnectionMethods.Tune(9, frame_max, 0),
            ConnectionMethods.Open: ConnectionMethods.OpenOk(),
            ConnectionMethods.Close: ConnectionMethods.CloseOk(),
            ChannelMethods.Open: ChannelMethods.OpenOk(),
            ChannelMethods.Close: ChannelMethods.CloseOk(),
            Basic.Qos: Basic.QosOk(),
            Confirm.Select: Confirm.SelectOk(),
        }

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    def begin(self) -> None:
        self._server = StreamServer(("127.0.0.1", self.port), self._serve, **self._tls)
        self._server.start()
        self.port = self._server.server_port

    def end(self) -> None:
        """Accept nobody and cut everybody."""
        self._server.stop(timeout=0)
        self.cut()

    def cut(self) -> None:
        while self._clients:
            with suppress(OSError):  # it ended by itself
                self._clients.pop().shutdown(SHUT_RDWR)

    def send(self, channel: int, method: Any) -> None:
        for client in self._clients:
            client.sendall(Method(channel, method).marshal())

    def told(self, kind: type) -> int:
        """Return how many methods of kind it was told."""
        return sum(isinstance(method, kind) for method in self.methods)

    def _serve(self, client: Any, _address: object) -> None:
        self._clients.append(client)
        with suppress(OSError):  # it was cut
            self._hear(client)
        if client in self._clients:
            self._clients.remove(client)

    def _hear(self, client: Any) -> None:
        data = b""
        published: dict[int, int] = defaultdict(int)
        while received := client.recv(65536):
            self.awake.wait()
            data += received
            while (decoded := decode_frame(data))[1] is not None:
                size, frame = decoded
                data = data[size:]
                method = getattr(frame, "method", None)
                self.methods.append(method)
                reply: Any = self._replies.get(type(method))
                channel = getattr(frame, "channel_number", 0)
                if isinstance(frame, ProtocolHeader):
                    able = {"capabilities": {"publisher_confirms": True, "basic.nack": True}}
                    reply = ConnectionMethods.Start(0, 9, able, b"PLAIN", b"en_US")
                elif isinstance(frame, Heartbeat):
                    client.sendall(frame.marshal())
                elif isinstance(frame, Body) and not self.alone:
                    self.bodies.append(frame.fragment)
                    published[channel] += 1
                    reply = Basic.Ack(published[channel])
                if reply:
                    client.sendall(Method(channel, reply).marshal())


def certified(folder: Path, name: str = "localhost") -> ssl.SSLContext:
    """Return what a server of name needs; the certificate of the CA is in folder/ca.pem."""
    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in ("CA", name)]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
    pems = []
    for key, subject in zip(keys, names, strict=True):
        public, is_ca = key.public_key(), key is keys[0]
        builder = (
            x509.CertificateBuilder(names[0], subject, public, x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(identifier, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        )
        pem = builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        pems.append(pem)
    (folder / "ca.pem").write_bytes(pems[0])
    private = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.pem").write_bytes(private + pems[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context
