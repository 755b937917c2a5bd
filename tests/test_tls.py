"""Certificates: given ones are checked, own ones made, renewed, and their CA changed."""

import base64
import importlib.util
import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from support import ROOT

DAY = timedelta(days=1)
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@pytest.fixture(scope="module")
def filters() -> Any:
    spec = importlib.util.spec_from_file_location("tls_filters", ROOT / "plugins/filter/tls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()


@dataclass
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def key_pem(self) -> str:
        return self.key.private_bytes(serialization.Encoding.PEM, PKCS8, PLAIN).decode()


def pair(
    name: str,
    signer: Pair | None = None,
    *,
    ca: bool = False,
    names: tuple[str, ...] = (),
    start: float = -1,
    days: float = 60,
    usage: x509.ObjectIdentifier | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
    key: Key | None = None,
) -> Pair:
    """Return a certificate, signed by itself without a signer, that lasts from start to days."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(signer.certificate.subject if signer else named)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start * DAY)
        .not_valid_after(now + days * DAY)
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName(list(map(general, names))), False
        )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
    for extension in extensions:
        builder = builder.add_extension(extension, True)
    return Pair(builder.sign(signer.key if signer else key, hashes.SHA256()), key)


def general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@dataclass
class Given:
    """A user's files: a root, a CA that it signed, and a certificate that that one signed."""

    filters: Any
    folder: Path

    def __post_init__(self) -> None:
        self.root = pair("root", ca=True)
        self.middle = pair("middle", self.root, ca=True)
        self.leaf = pair("leaf", self.middle, names=("broker.example.com", "192.0.2.10"))
        self.write()

    def write(self, leaf: Pair | None = None, chain: list[Pair] | None = None) -> None:
        """Write the files; a leaf stands in the place of the usual one, a chain of both."""
        self.leaf = leaf or self.leaf
        text = "".join(one.pem for one in chain or [self.leaf, self.middle])
        (self.folder / "certificate.pem").write_text(text)
        (self.folder / "key.pem").write_text(self.leaf.key_pem)
        (self.folder / "key.pem").chmod(0o600)
        (self.folder / "ca.pem").write_text(self.root.pem)

    def faults(self, names: tuple[str, ...] = (), **paths: str) -> str:
        files = {kind: f"{kind}.pem" for kind in ("certificate", "key", "ca")} | paths
        reached = ("broker1", "192.0.2.10", "0.0.0.0", "127.0.0.1")
        found = self.filters["tls_given_faults"](files, str(self.folder), names, reached)
        return " ".join(found)


@pytest.fixture
def given(filters: Any, tmp_path: Path) -> Given:
    return Given(filters, tmp_path)


def test_good_files_have_no_faults(given: Given) -> None:
    assert given.faults() == ""
    assert given.faults(names=("broker.example.com",)) == ""
    assert given.faults(certificate=str(given.folder / "certificate.pem")) == ""
    # The root may be sent, too; a client that has it does not mind.
    given.write(chain=[given.leaf, given.middle, given.root])
    assert given.faults() == ""


def test_every_container_gets_what_the_files_have_and_no_more(given: Given) -> None:
    text = (given.folder / "certificate.pem").read_text()
    (given.folder / "certificate.pem").write_text(f"Subject: leaf\r\n{text}")
    traditional = serialization.PrivateFormat.TraditionalOpenSSL
    key = given.leaf.key.private_bytes(serialization.Encoding.PEM, traditional, PLAIN)
    (given.folder / "key.pem").write_bytes(
        b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + key
    )
    (given.folder / "ca.pem").write_text(given.leaf.pem + given.root.pem)
    assert given.faults() == ""
    files = {kind: f"{kind}.pem" for kind in ("certificate", "key", "ca")}
    taken = given.filters["tls_given"](files, str(given.folder), ["front", "rabbitmq"])
    assert taken["front"] == taken["rabbitmq"]
    assert taken["front"] == {
        "tls/server.pem": text + given.leaf.key_pem,
        "tls/ca.pem": given.root.pem,
    }


@pytest.mark.parametrize("kind", ["certificate", "key", "ca"])
def test_a_file_that_cannot_be_read_is_named(
    given: Given, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"stack_tls_{kind}_file is empty: name the file" in given.faults(**{kind: ""})
    said = given.faults(**{kind: "nowhere.pem"})
    assert f"stack_tls_{kind}_file is nowhere.pem: cannot be read (it is no file)" in said
    # Not waited for.
    os.mkfifo(given.folder / "pipe")
    assert "it is no file" in given.faults(**{kind: "pipe"})
    (given.folder / f"{kind}.pem").write_text("junk")
    said = given.faults()
    assert f"stack_tls_{kind}_file is {kind}.pem: holds no " in said
    assert "in PEM; `openssl" in said

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert f"stack_tls_{kind}_file is {kind}.pem: cannot be read (Permission den" in given.faults()


def test_a_certificate_that_is_only_half_one_is_none(given: Given) -> None:
    (given.folder / "certificate.pem").write_text(
        given.leaf.pem + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    assert "stack_tls_certificate_file is certificate.pem: holds no cert" in given.faults()
    (given.folder / "certificate.pem").write_bytes(b"\xff\x00" + os.urandom(100))
    assert "stack_tls_certificate_file is certificate.pem: holds no cert" in given.faults()


def test_a_certificate_whose_extensions_cannot_be_read_is_none(given: Given) -> None:
    junk = x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"junk")
    given.write(pair("leaf", given.middle, names=("broker1",), extensions=(junk,)))
    assert "stack_tls_certificate_file is certificate.pem: holds no cert" in given.faults()


def test_a_key_with_a_password_is_refused(given: Given) -> None:
    sealed = serialization.BestAvailableEncryption(b"secret")
    key = given.leaf.key.private_bytes(serialization.Encoding.PEM, PKCS8, sealed)
    (given.folder / "key.pem").write_bytes(key)
    assert "stack_tls_key_file is key.pem: the key has a password" in given.faults()


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(given: Given, mode: int) -> None:
    (given.folder / "key.pem").chmod(mode)
    assert f"its mode {mode:04o} lets others read the key; run chmod 600" in given.faults()


def test_a_key_of_another_is_refused(given: Given) -> None:
    (given.folder / "key.pem").write_text(pair("other").key_pem)
    assert "stack_tls_key_file is key.pem: it is not the key of CN=leaf" in given.faults()
    rsa_key = pair("other", key=rsa.generate_private_key(65537, 2048))
    (given.folder / "key.pem").write_text(rsa_key.key_pem)
    assert "it is not the key of CN=leaf" in given.faults()


def test_the_certificate_comes_first(given: Given) -> None:
    given.write(chain=[given.middle, given.leaf])
    assert "the first certificate is CN=middle, and the one of the key, CN=leaf, is number 2" in (
        given.faults()
    )


def test_a_chain_is_in_order_and_whole(given: Given) -> None:
    lower = pair("lower", given.middle, ca=True)
    leaf = pair("leaf", lower, names=("192.0.2.10",))
    given.write(leaf, [leaf, lower, given.middle])
    assert given.faults() == ""
    given.write(leaf, [leaf, given.middle, lower])
    assert "after CN=leaf comes CN=middle, which did not sign it" in given.faults()
    for chain, signer, lacking in (
        ([leaf], "CN=lower", "CN=leaf"),
        ([leaf, lower], "CN=middle", "CN=lower"),
        ([leaf, given.middle], "CN=lower", "CN=leaf"),
    ):
        given.write(leaf, chain)
        assert f"{signer}, which signed {lacking}, is neither next in it nor in" in given.faults()


def test_a_chain_that_leads_to_another_ca_is_refused(given: Given) -> None:
    # Of the same name, but not the one that signed.
    (given.folder / "ca.pem").write_text(pair("root", ca=True).pem)
    assert "CN=root, which signed CN=middle, is neither next in it nor in" in given.faults()
    (given.folder / "ca.pem").write_text(pair("root", ca=True).pem + given.root.pem)
    assert given.faults() == ""


def test_what_signed_must_be_a_ca(given: Given) -> None:
    (given.folder / "ca.pem").write_text(given.leaf.pem)
    assert "stack_tls_ca_file is ca.pem: there is no certificate of a CA in it" in given.faults()
    false = pair("false", given.middle, names=("x",))
    leaf = pair("leaf", false, names=("192.0.2.10",))
    given.write(leaf, [leaf, false, given.middle])
    assert "CN=false, which signed CN=leaf, is neither" in given.faults()


def test_a_ca_that_has_ended_is_refused_unless_it_was_renewed(given: Given) -> None:
    old = pair("root", ca=True, start=-9, days=-1, key=given.root.key)
    (given.folder / "ca.pem").write_text(old.pem)
    assert "stack_tls_ca_file is ca.pem: CN=root ended on" in given.faults()
    (given.folder / "ca.pem").write_text(old.pem + given.root.pem)
    assert given.faults() == ""


@pytest.mark.parametrize(
    ("start", "days", "says"),
    [
        (-9, -1, "CN=leaf ended on"),
        (1, 9, "CN=leaf is not valid before"),
        (-9, 0.9, "CN=leaf ends within a day"),
    ],
)
def test_a_certificate_is_valid_now_and_tomorrow(
    given: Given, start: float, days: float, says: str
) -> None:
    given.write(pair("leaf", given.middle, names=("192.0.2.10",), start=start, days=days))
    assert says in given.faults()


def test_what_is_in_the_chain_is_valid_too(given: Given) -> None:
    middle = pair("middle", given.root, ca=True, start=-9, days=-1, key=given.middle.key)
    given.write(chain=[given.leaf, middle])
    assert "CN=middle ended on" in given.faults()


def test_a_certificate_is_a_server_s(given: Given) -> None:
    given.write(pair("leaf", given.middle, names=("192.0.2.10",), ca=True))
    assert "CN=leaf is a CA itself" in given.faults()
    for usage, says in (
        (ExtendedKeyUsageOID.CLIENT_AUTH, "CN=leaf is not for servers"),
        (ExtendedKeyUsageOID.SERVER_AUTH, ""),
        (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, ""),
    ):
        given.write(pair("leaf", given.middle, names=("192.0.2.10",), usage=usage))
        assert says in given.faults()
        assert bool(says) == bool(given.faults())


@pytest.mark.parametrize(
    ("has", "names", "says"),
    [
        (("192.0.2.10",), (), ""),
        (("BROKER1",), (), ""),
        (("a.example",), (), "is for DNS:a.example, and the host is known as 192.0.2.10, broker1;"),
        ((), (), "is for no name, and the host is known as"),
        # 0.0.0.0 is nobody's.
        (("0.0.0.0",), (), "is for IP:0.0.0.0, and the host"),
        (("a.example",), ("a.example",), ""),
        (("*.example",), ("a.example",), ""),
        (("*.example",), ("a.b.example",), "not for a.b.example of stack_tls_names"),
        (("*.example",), ("example",), "not for example of stack_tls_names"),
        (("192.0.2.10",), ("a.example",), "not for a.example of stack_tls_names"),
        (("2001:db8::1", "broker1"), ("2001:DB8:0::1",), ""),
    ],
)
def test_names_are_those_that_clients_use(
    given: Given, has: tuple[str, ...], names: tuple[str, ...], says: str
) -> None:
    given.write(pair("leaf", given.middle, names=has))
    assert says in given.faults(names)
    assert bool(says) == bool(given.faults(names))


def test_loopback_is_enough_only_where_nothing_else_is_open(given: Given) -> None:
    files = {kind: f"{kind}.pem" for kind in ("certificate", "key", "ca")}
    given.write(pair("leaf", given.middle, names=("localhost",)))

    def faults(*reached: str) -> list[str]:
        told: list[str] = given.filters["tls_given_faults"](files, str(given.folder), [], reached)
        return told

    assert faults("broker1", "127.0.0.1", "127.0.0.1") == []
    assert "is known as broker1;" in faults("broker1", "0.0.0.0", "127.0.0.1")[0]
    assert "is known as 192.0.2.1, broker1;" in faults("broker1", "127.0.0.1", "192.0.2.1")[0]


def test_what_only_a_client_sees_is_told(given: Given) -> None:
    limits = x509.NameConstraints([x509.DNSName("other.example")], None)
    given.middle = pair("middle", given.root, ca=True, extensions=(limits,))
    given.write(pair("leaf", given.middle, names=("broker1",)))
    assert "clients would refuse it for broker1: " in given.faults()


def test_several_faults_are_told_at_once(given: Given) -> None:
    given.write(pair("leaf", given.middle, names=("a.example",), days=-0.5))
    said = given.faults()
    assert "ended on" in said
    assert "the host is known as" in said
    (given.folder / "ca.pem").unlink()
    assert "stack_tls_key_file is empty" in given.faults(key="")
    assert "stack_tls_ca_file is ca.pem" in given.faults(key="")


def test_names_of_hosts_and_addresses_are_told_from_others(filters: Any) -> None:
    good = ["a", "a.example.com", "A-1.example", "under_score", "192.0.2.1", "2001:db8::1", "1a"]
    bad = ["", "a b", "*.example.com", "-a", "a-", "a..b", "192.0.2.300", "ä.example", "a" * 64]
    bad += ["http://a", "a:5000", "a.example.com.", 7, "a\n", ".".join(["a" * 60] * 5)]
    assert filters["tls_bad_names"]([*good, *bad]) == list(map(str, bad))


def test_addresses_are_the_host_s_own_and_not_docker_s(filters: Any) -> None:
    facts = {
        "interfaces": ["lo", "eth0", "docker0", "br-0123456789ab", "br-lan", "wg0", "gone"],
        "lo": {"ipv4": {"address": "127.0.0.1"}},
        "eth0": {
            "ipv4": {"address": "192.0.2.10"},
            "ipv4_secondaries": [{"address": "192.0.2.11"}],
        },
        "docker0": {"ipv4": {"address": "172.17.0.1"}},
        "br_0123456789ab": {"ipv4": {"address": "172.18.0.1"}},
        "br_lan": {"ipv4": {"address": "192.0.2.12"}},
        "wg0": {},
    }
    own = ["127.0.0.1", "192.0.2.10", "192.0.2.11", "192.0.2.12"]
    assert filters["tls_addresses"](facts) == own
    assert filters["tls_addresses"]({}) == []


CONTAINERS = {"front": ["front", "publisher"], "rabbitmq": ["rabbitmq"]}
NAMES = ["broker1", "broker1", "0.0.0.0", "not a name", "192.0.2.10"]
FRONT = ["DNS:broker1", "DNS:front", "DNS:publisher", "IP:192.0.2.10"]


class Own:
    """The stack's own files, of the host broker1."""

    def __init__(self, filters: Any) -> None:
        self.filters = filters
        self.ca = pair("ca", ca=True, days=3650)
        self.texts = {"tls_ca.pem": self.ca.pem, "tls_ca_key.pem": self.ca.key_pem}
        self.put("front", self.leaf())
        self.put("rabbitmq", pair("b", self.ca, names=("broker1", "rabbitmq", "192.0.2.10")))

    def leaf(self, signer: Pair | None = None, days: float = 60) -> Pair:
        names = tuple(name.partition(":")[2] for name in FRONT)
        return pair("f", signer or self.ca, names=names, days=days)

    def put(self, container: str, one: Pair) -> None:
        self.texts[f"tls_broker1_{container}.pem"] = one.pem
        self.texts[f"tls_broker1_{container}_key.pem"] = one.key_pem

    def due(self, days: int = 90, peers: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = self.filters["tls_due"](
            self.texts, "broker1", CONTAINERS, NAMES, days, peers
        )
        return told

    def why(self) -> dict[str, str]:
        return {one["container"]: one["why"] for one in self.due()}


@pytest.fixture
def own(filters: Any) -> Own:
    return Own(filters)


def test_certificates_that_are_right_are_not_made_again(own: Own) -> None:
    assert own.due() == []


def test_what_others_meet_as_a_client_says_so(own: Own) -> None:
    [due] = own.due(peers=("rabbitmq",))
    assert (due["container"], due["why"]) == ("rabbitmq", "is not a client's as well")
    assert due["usages"] == ["serverAuth", "clientAuth"]
    names = ("broker1", "rabbitmq", "192.0.2.10")
    client = ExtendedKeyUsageOID.CLIENT_AUTH
    own.put("rabbitmq", pair("b", own.ca, names=names, usage=client))
    assert own.due(peers=("rabbitmq",)) == []


def test_what_is_missing_is_due(own: Own) -> None:
    del own.texts["tls_broker1_front_key.pem"]
    [due] = own.due()
    assert (due["container"], due["why"], due["names"]) == ("front", "is missing", FRONT)
    last = datetime.strptime(due["until"], "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    assert timedelta(0) <= datetime.now(UTC) + 90 * DAY - last < timedelta(minutes=1)
    own.texts.clear()
    assert [one["container"] for one in own.due()] == ["front", "rabbitmq"]


def test_a_certificate_with_less_than_a_third_is_due(own: Own) -> None:
    own.put("front", own.leaf(days=30.01))
    assert own.due() == []
    assert [one["container"] for one in own.due(days=91)] == ["front"]
    own.put("front", own.leaf(days=29.99))
    assert "ends on 2" in own.why()["front"]


def test_a_certificate_of_other_names_ca_or_key_is_due(own: Own) -> None:
    own.put("front", pair("f", own.ca, names=("broker1", "front", "192.0.2.10", "old")))
    # A name that nobody needs any more goes with the next one.
    assert own.why() == {"front": "lacks names (DNS:publisher)"}
    own.put("front", own.leaf(pair("ca", ca=True)))
    assert own.why() == {"front": "was signed by another CA"}
    own.put("front", own.leaf())
    own.texts["tls_broker1_front_key.pem"] = own.ca.key_pem
    assert own.why() == {"front": "has the key of another"}
    own.texts["tls_broker1_front.pem"] = "junk"
    assert "holds no certificates" in own.why()["front"]


def test_a_certificate_does_not_outlive_its_ca(own: Own) -> None:
    own.ca = pair("ca", ca=True, days=70)
    own.texts["tls_ca.pem"] = own.ca.pem
    assert {one["until"] for one in own.due()} == {
        f"{own.ca.certificate.not_valid_after_utc:%Y%m%d%H%M%SZ}"
    }


def test_a_host_s_files_are_none_of_the_ca_s(filters: Any, tmp_path: Path) -> None:
    for name in ("ca", "ca_key", "ca_next", "ca_former", "cassandra1_front", "other_front"):
        (tmp_path / f"tls_{name}.pem").write_text("x")
    ca = {"tls_ca.pem", "tls_ca_key.pem", "tls_ca_next.pem", "tls_ca_former.pem"}
    assert filters["tls_texts"](str(tmp_path), "other").keys() == ca | {"tls_other_front.pem"}
    assert filters["tls_texts"](str(tmp_path), "cassandra1").keys() == ca | {
        "tls_cassandra1_front.pem"
    }


def test_the_first_host_with_a_ca_makes_it(filters: Any) -> None:
    hosts = {name: {"__tls_home": home} for name, home in zip("abc", "xyx", strict=True)}
    every = {"plain": {}, **hosts}
    leads = [host for host in hosts if filters["tls_leads"](every, every, host)]
    assert leads == ["a", "b"]


def test_a_container_gets_its_own_key_and_every_ca(own: Own) -> None:
    own.texts["tls_ca_next.pem"] = pair("next", ca=True).pem
    files = own.filters["tls_own"](own.texts, "broker1", CONTAINERS)
    for container in "front", "rabbitmq":
        ends = ("", "_key")
        pair_of = "".join(own.texts[f"tls_broker1_{container}{end}.pem"] for end in ends)
        assert files[container]["tls/server.pem"] == pair_of
    trusted = own.texts["tls_ca.pem"] + own.texts["tls_ca_next.pem"]
    assert {one["tls/ca.pem"] for one in files.values()} == {trusted}


def test_a_ca_that_cannot_sign_is_refused(own: Own) -> None:
    def faults() -> str:
        return " ".join(own.filters["tls_ca_faults"](own.texts))

    assert faults() == ""
    own.texts["tls_ca_key.pem"] = pair("x").key_pem
    assert "tls_ca_key.pem is not the key of tls_ca.pem" in faults()
    own.texts["tls_ca_key.pem"] = "junk"
    assert "holds no private key" in faults()
    del own.texts["tls_ca_key.pem"]
    assert "the key of the CA, is missing" in faults()
    for days, alone, beside in ((91, "", ""), (89, "ca=next", ""), (29, "ca=next", "ca=use")):
        ca = pair("ca", ca=True, days=days)
        own.texts = {"tls_ca.pem": ca.pem, "tls_ca_key.pem": ca.key_pem}
        assert alone in faults()
        assert bool(alone) == bool(faults())
        own.texts["tls_ca_next.pem"] = own.ca.pem
        assert beside in faults()
        assert bool(beside) == bool(faults())
    own.texts.clear()
    assert faults() == ""


def test_a_change_of_the_ca_that_does_not_fit_is_refused(own: Own) -> None:
    following, old = pair("next", ca=True), pair("former", ca=True)

    def held(change: str, tls: str = "own", **texts: str | None) -> str:
        named = {f"tls_{name}.pem": text for name, text in texts.items()}
        every = {name: text for name, text in (own.texts | named).items() if text}
        told: str = own.filters["tls_held"](every, change, tls)
        return told

    both: dict[str, str | None] = {"ca_next": following.pem, "ca_next_key": following.key_pem}
    assert held("later") == "write next, use or forget."
    assert "stack_tls is files;" in held("next", "files")
    assert "there is no CA yet" in held("next", ca=None)
    assert held("next") == ""
    assert "is there since an earlier run" in held("next", **both)
    # A key alone was broken off.
    assert held("next", ca_next_key=following.key_pem) == ""
    assert "there is no next CA" in held("use")
    assert held("use", **both) == ""
    assert "there is a former CA still" in held("use", **both, ca_former=old.pem)
    assert "there is no former CA" in held("forget")
    assert held("forget", ca_former=old.pem) == ""
    used = {"ca_former": old.pem, "broker2_front": own.leaf(old).pem, "broker3_front": "junk"}
    assert held("forget", **used).startswith("tls_broker2_front.pem: the former CA signed")


def test_a_change_that_was_broken_off_goes_on(own: Own) -> None:
    following = pair("next", ca=True)
    started = own.texts | {
        "tls_ca_next.pem": following.pem,
        "tls_ca_next_key.pem": following.key_pem,
        "tls_ca_former.pem": own.ca.pem,
    }
    for done in ({}, {"tls_ca.pem": following.pem}):
        assert own.filters["tls_held"](started | done, "use", "own") == ""
    said = own.filters["tls_ca_faults"](started | {"tls_ca.pem": following.pem})
    assert "-e ca=use" in said[0]


def test_the_first_end_of_what_is_there_is_told(own: Own) -> None:
    until = own.filters["tls_until"]
    short = pair("x", days=3)
    assert until(own.ca.pem + short.pem) == f"{datetime.now(UTC) + 3 * DAY:%Y-%m-%d}"
    assert until(own.ca.key_pem) == ""
    assert until("") == ""


# --- the role

MARK = "tls_files="


@dataclass
class Stack:
    """An inventory in a folder: a host without TLS, and after it one with a CA."""

    folder: Path

    def __post_init__(self) -> None:
        variables = {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "stack_tls": "own",
            "stack_tls_names": ["broker.example.com"],
            "stack_secrets_dir": str(self.folder / "secrets"),
        }
        hosts = {"plain": {"stack_tls": False}, "broker1": {}}
        inventory = {"brokers": {"hosts": hosts, "vars": variables}}
        (self.folder / "hosts.json").write_text(json.dumps(inventory))
        tasks = [
            {"ansible.builtin.include_role": {"name": "tls", "tasks_from": "preflight"}},
            {"ansible.builtin.debug": {"msg": f"{MARK}{{{{ tls_files | to_json | b64encode }}}}"}},
        ]
        self.told: list[Any] = []
        play = {"hosts": "brokers", "gather_facts": False, "tasks": tasks}
        (self.folder / "up.yml").write_text(json.dumps([play]))

    def run(self, *options: str) -> str:
        """Run Ansible; return what it printed."""
        # One container each: every certificate takes a second.
        few = json.dumps({"__tls_containers": {"front": ["front"]}})
        inventory = f"--inventory={self.folder}/hosts.json"
        done = subprocess.run(
            [".venv/bin/ansible-playbook", inventory, f"--extra-vars={few}", *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "LC_ALL": "C.UTF-8", "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PRIVATE KEY" not in done.stdout
        told = re.findall(rf"{MARK}([\w+/=]+)", done.stdout)
        self.told = [json.loads(base64.b64decode(one)) for one in told]
        return done.stdout

    def up(self, change: str = "", *options: str) -> str:
        """Change the CA, if so, and have the preflight."""
        before = [f"--extra-vars=ca={change}", "playbooks/ca.yml"] if change else []
        return self.run(*options, *before, str(self.folder / "up.yml"))

    def texts(self) -> Mapping[str, str]:
        return {path.name: path.read_text() for path in self.folder.glob("secrets/*")}

    def given(self) -> dict[str, str]:
        """Return what the role gave to the front."""
        given: dict[str, str] = next(told["front"] for told in self.told if told)
        return given

    def trusted(self, ca: str) -> bool:
        """Return whether a client that trusts ca (PEM) takes the front's certificate."""
        (self.folder / "trusted.pem").write_text(ca)
        (self.folder / "shown.pem").write_text(self.given()["tls/server.pem"])
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
        command += ["-verify_hostname", "broker.example.com", "-verify_ip", "127.0.0.1"]
        done = subprocess.run(
            [*command, "-CAfile", "trusted.pem", "shown.pem"],
            cwd=self.folder,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0


def test_own_certificates_are_made_renewed_and_their_ca_changed(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    assert "a new one is made" in stack.up("", "--check")
    assert stack.texts() == {}

    # Twice in one run.
    first, second = stack.up("", str(tmp_path / "up.yml")).split("PLAY [")[1:3]
    assert "changed: " in first
    assert "changed: " not in second
    made = stack.texts()
    names = {f"tls_{name}.pem" for name in ("ca", "ca_key", "broker1_front", "broker1_front_key")}
    assert made.keys() == names
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("secrets/*")} == {0o600}
    assert {} in stack.told
    old = stack.given()["tls/ca.pem"]
    assert old == made["tls_ca.pem"]
    assert stack.trusted(old)

    # Both are trusted before the next one signs. Meanwhile the certificate comes to its end.
    ca_key = serialization.load_pem_private_key(made["tls_ca_key.pem"].encode(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = Pair(x509.load_pem_x509_certificate(old.encode()), ca_key)
    known = ("broker1", "front", "localhost", "127.0.0.1", "::1", "broker.example.com")
    late = pair("late", ca, days=29.9, names=known)
    (tmp_path / "secrets/tls_broker1_front.pem").write_text(late.pem)
    (tmp_path / "secrets/tls_broker1_front_key.pem").write_text(late.key_pem)
    assert "The certificate of front on broker1 ends on" in stack.up("next")
    both = stack.given()["tls/ca.pem"]
    assert both == old + stack.texts()["tls_ca_next.pem"]
    assert late.pem not in stack.given()["tls/server.pem"]
    assert made["tls_broker1_front.pem"] not in stack.given()["tls/server.pem"]
    assert stack.trusted(old)

    stack.up("use")
    new = stack.texts()["tls_ca.pem"]
    assert old + new == both
    assert stack.texts().keys() == names | {"tls_ca_former.pem"}
    assert stack.given()["tls/ca.pem"] == new + old
    assert [stack.trusted(one) for one in (both, new, old)] == [True, True, False]

    used = stack.texts()
    assert "changed=1" in stack.up("forget")
    assert stack.texts() == {name: used[name] for name in names}
    assert stack.given()["tls/ca.pem"] == new
