"""Certificates: which are to be made, what is wrong with given ones, and until when they last."""

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

# What the container of one certificate reads: text by path.
Files = dict[str, str]
# The stack's own files: text by name.
Texts = Mapping[str, str]
Certificates = list[x509.Certificate]

# Once the CA has less than this, a next one must be there; with less than a third of it, it signs
# no more.
CA_REST = timedelta(days=90)
LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
# What ends in a number is an address that was misspelt.
NAME = re.compile(rf"({LABEL}\.)*(?![0-9]+\Z){LABEL}")
CA_FILES = ("tls_ca", "tls_ca_next", "tls_ca_former")
DOCKER = re.compile(r"docker.*|br-[0-9a-f]{12}|veth.*")
ROTATE = 'make ca ARGS="-e ca={}"'


class TlsError(ValueError):
    """A file cannot be used; says why, and what to do."""


# --- names


def alternative(name: object) -> str:
    """Return name as certificates have it, DNS:a.example or IP:192.0.2.1; "" if it is neither."""
    text = str(name).lower()
    try:
        return f"IP:{ipaddress.ip_address(text)}"
    except ValueError:
        return f"DNS:{text}" if NAME.fullmatch(text) and len(text) < 254 else ""


def alternatives(names: Iterable[object]) -> set[str]:
    """Return names as certificates have them, without what no certificate has."""
    return {alternative(name) for name in names} - {"", "IP:0.0.0.0"}


def _reached(names: Iterable[object]) -> set[str]:
    """Return names as certificates have them; those of loopback only where no address is else."""
    known = alternatives(names)
    addresses = [one.removeprefix("IP:") for one in map(alternative, names) if one[:3] == "IP:"]
    local = {f"IP:{one}" for one in addresses if ipaddress.ip_address(one).is_loopback}
    return known | {"DNS:localhost"} if len(local) == len({*addresses}) else known - local


def tls_bad_names(names: Iterable[object]) -> list[str]:
    """Return those of names that are neither the name of a host nor an address of one."""
    return [str(name) for name in names if not alternatives([name])]


def tls_addresses(facts: Mapping[str, Any]) -> list[str]:
    """Return the IPv4 addresses that facts tell of the host, without those of Docker's bridges.

    These come and go with networks, and each time certificates would be made anew.
    """
    own = [name for name in facts.get("interfaces", []) if not DOCKER.fullmatch(name)]
    told = [facts.get(name.replace("-", "_"), {}) for name in own]
    every = [[one.get("ipv4", {}), *one.get("ipv4_secondaries", [])] for one in told]
    return [part["address"] for parts in every for part in parts if "address" in part]


# --- what the stack makes


def is_ca_file(name: str) -> bool:
    """Return whether name is a file of the CA, and not of a host, whatever that is called."""
    return name.removesuffix(".pem").removesuffix("_key") in CA_FILES


def tls_texts(folder: str, host: str = "") -> dict[str, str]:
    """Return the CA's files in folder and those of host (of every host without one), by names."""
    return {
        path.name: path.read_text(errors="replace")
        for path in sorted(Path(folder).glob("tls_*.pem"))
        if is_ca_file(path.name) or path.name.startswith(f"tls_{host}_" if host else "tls_")
    }


def tls_leads(hostvars: Mapping[str, Mapping[str, Any]], hosts: Iterable[str], host: str) -> bool:
    """Return whether host is the first of hosts that have its CA, by the fact __tls_home."""
    home = hostvars[host]["__tls_home"]
    return next(one for one in hosts if hostvars[one].get("__tls_home") == home) == host


def tls_ca_faults(texts: Texts) -> list[str]:
    """Return why the CA in texts cannot sign; nothing where there is none yet."""
    if "tls_ca.pem" not in texts:
        return []
    if "tls_ca_key.pem" not in texts:
        return [
            "tls_ca_key.pem, the key of the CA, is missing; bring it back from an archive of "
            "`make backup`. Or remove tls_ca.pem: the next run makes a CA that clients do not know."
        ]
    try:
        ca, key = chain_of(texts["tls_ca.pem"])[0], key_of(texts["tls_ca_key.pem"])
    except TlsError as error:
        return [f"tls_ca.pem or tls_ca_key.pem {error}; bring both back from an archive."]
    if not belongs(key, ca):
        return [
            "tls_ca_key.pem is not the key of tls_ca.pem. If tls_ca_next.pem is there, "
            f"`{ROTATE.format('use')}` was broken off: run it again. Else bring both back from an "
            "archive."
        ]
    rest, there = ca.not_valid_after_utc - now(), "tls_ca_next.pem" in texts
    if rest < CA_REST and not there:
        return [f"The CA ends on {day(ca)}; make the next one: `{ROTATE.format('next')}`."]
    if rest < CA_REST / 3:
        return [f"The CA ends on {day(ca)}; take the next one: `{ROTATE.format('use')}`."]
    return []


def tls_due(
    texts: Texts,
    host: str,
    containers: Mapping[str, Iterable[str]],
    names: Iterable[object],
    days: int,
    peers: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the certificates of host that must be made, each with why and what it shall have.

    containers has the names of each one in its network; names are those of the host. A
    certificate lasts days, or as long as the CA, and is due with a third of that left. Those of
    peers also show it to each other as clients.
    """
    ca = chain_of(texts["tls_ca.pem"])[0] if "tls_ca.pem" in texts else None
    known = set(names)
    due = []
    for container, aliases in containers.items():
        wanted, peer = alternatives([*known, *aliases]), container in peers
        name, rest = f"tls_{host}_{container}", timedelta(days=int(days)) / 3
        why = _why_due(texts, name, wanted, ca, rest, peer=peer)
        if why:
            end = now() + timedelta(days=int(days))
            last = min(end, ca.not_valid_after_utc) if ca else end
            until = f"{last:%Y%m%d%H%M%SZ}"
            usages = ["serverAuth", "clientAuth"] if peer else ["serverAuth"]
            one = {"container": container, "names": sorted(wanted), "until": until, "why": why}
            due.append({**one, "usages": usages})
    return due


def _why_due(
    texts: Texts,
    name: str,
    wanted: set[str],
    ca: x509.Certificate | None,
    rest: timedelta,
    *,
    peer: bool,
) -> str:
    if f"{name}.pem" not in texts or f"{name}_key.pem" not in texts or ca is None:
        return "is missing"
    try:
        certificate, key = chain_of(texts[f"{name}.pem"])[0], key_of(texts[f"{name}_key.pem"])
    except TlsError as error:
        return str(error)
    has = _names_of(certificate)
    if not belongs(key, certificate):
        return "has the key of another"
    if not signed(certificate, ca):
        return "was signed by another CA"
    if not wanted <= has:
        return f"lacks names ({', '.join(sorted(wanted - has))})"
    if peer and ExtendedKeyUsageOID.CLIENT_AUTH not in _usages_of(certificate):
        return "is not a client's as well"
    end = certificate.not_valid_after_utc
    # A new one would not last longer than the CA either.
    is_due = end - now() < rest and end < ca.not_valid_after_utc
    return f"ends on {day(certificate)}" if is_due else ""


def tls_own(texts: Texts, host: str, containers: Iterable[str]) -> dict[str, Files]:
    """Return by container the files that it reads; in check mode some may be empty yet."""
    trusted = "".join(one["pem"] for one in tls_trusted(texts))
    return {
        container: {
            "tls/server.pem": texts.get(f"tls_{host}_{container}.pem", "")
            + texts.get(f"tls_{host}_{container}_key.pem", ""),
            "tls/ca.pem": trusted,
        }
        for container in containers
    }


def tls_trusted(texts: Texts) -> list[dict[str, str]]:
    """Return the CAs that clients must trust, each with its file, what it does, until and pem."""
    does = {"tls_ca.pem": "signs", "tls_ca_next.pem": "next", "tls_ca_former.pem": "former"}
    return [
        {"file": name, "does": what, "until": tls_until(texts[name]), "pem": texts[name]}
        for name, what in does.items()
        if name in texts
    ]


def tls_shown(
    given: Mapping[str, str], tls: str, secrets: str, folder: str
) -> list[dict[str, str]]:
    """Return what tls_trusted does, with whole paths: of the CA given by files, or of the own."""
    if tls == "files":
        text = _read(folder, given["ca"])
        path = str(Path(folder, Path(given["ca"]).expanduser()))
        return [{"file": path, "does": "signs", "until": tls_until(text), "pem": text}]
    return [{**one, "file": f"{secrets}/{one['file']}"} for one in tls_trusted(tls_texts(secrets))]


def tls_held(texts: Texts, change: str, tls: str) -> str:
    """Return why the CA in texts cannot change: next, use or forget; "" if it can.

    texts are the files of every host.
    """
    if change not in ("next", "use", "forget"):
        return "write next, use or forget."
    if tls != "own":
        return f"stack_tls is {tls}; change what stack_tls_ca_file has."
    ca, following, former = (texts.get(f"tls_ca{part}.pem") for part in ("", "_next", "_former"))
    if ca is None:
        return "there is no CA yet; `make up` makes the first one."
    if change == "next" and following:
        return f"the next CA is there since an earlier run; `{ROTATE.format('use')}` takes it."
    if change == "use" and (not following or "tls_ca_next_key.pem" not in texts):
        return f"there is no next CA; `{ROTATE.format('next')}` makes it."
    # Both are the same where this was broken off.
    if change == "use" and former and ca not in (former, following):
        return f"there is a former CA still; `{ROTATE.format('forget')}` first."
    if change == "forget" and not former:
        return "there is no former CA."
    signer = chain_of(former)[0] if change == "forget" and former else None
    old = [name for name in texts if signer and _is_signed(name, texts[name], signer)]
    if old:
        return (
            f"{', '.join(old)}: the former CA signed these; `make up` makes them anew. Remove "
            "those of hosts that are gone."
        )
    return ""


def _is_signed(name: str, text: str, signer: x509.Certificate) -> bool:
    if is_ca_file(name) or name.endswith("_key.pem"):
        return False
    try:
        return signed(chain_of(text)[0], signer)
    except TlsError:
        return False


def tls_until(text: str) -> str:
    """Return the day on which the first certificate in text (PEM) ends: 2027-02-26; "" without."""
    if "BEGIN CERTIFICATE" not in text:
        return ""
    return min(day(one) for one in chain_of(text))


# --- what the user gives


def tls_given(files: Mapping[str, str], folder: str, containers: Iterable[str]) -> dict[str, Files]:
    """Return by container the files that it reads, as PEM and PKCS #8 without anything else.

    files are the paths of certificate, key and ca, from folder.
    """
    text = {kind: _read(folder, path) for kind, path in files.items()}
    key = key_of(text["key"]).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    given = {
        "tls/server.pem": _pem(chain_of(text["certificate"])) + key.decode(),
        "tls/ca.pem": _pem([one for one in chain_of(text["ca"]) if is_ca(one)]),
    }
    return {container: dict(given) for container in containers}


def tls_given_name(files: Mapping[str, str], folder: str, names: Iterable[object]) -> str:
    """Return the first of names that the certificate of files, paths from folder, is for."""
    has = _names_of(chain_of(_read(folder, files["certificate"]))[0])
    covered = (name for name in map(alternative, names) if _covers(has, name))
    return next(covered, "").partition(":")[2]


def tls_given_faults(
    files: Mapping[str, str], folder: str, names: Sequence[object], reached: Sequence[object]
) -> list[str]:
    """Return what is wrong with the files that tls_given would read.

    names are the user's stack_tls_names, reached the other names by which users know the host.
    """
    parts: dict[str, Any] = {}
    faults = []
    for kind, path in files.items():
        try:
            text = _read(folder, path, secret=kind == "key")
            parts[kind] = key_of(text) if kind == "key" else chain_of(text)
        except TlsError as error:
            faults.append(f"{_named(kind, path)} {error}")
    if faults:
        return faults
    chain, key, ca = parts["certificate"], parts["key"], parts["ca"]
    where = _named("certificate", files["certificate"])
    faults = _key_faults(where, _named("key", files["key"]), chain, key)
    if not faults:
        roots = [one for one in ca if is_ca(one)]
        faults = [
            *_leaf_faults(where, chain[0]),
            *_time_faults(where, chain),
            *_chain_faults(where, _named("ca", files["ca"]), chain, roots),
            *_name_faults(where, chain[0], names, reached),
        ]
    return faults or _client_faults(where, chain, roots, alternatives(names) | _reached(reached))


def _named(kind: str, path: str) -> str:
    return f"stack_tls_{kind}_file is {path or 'empty'}:"


def _read(folder: str, path: str, secret: bool = False) -> str:
    """Return the text of path, from folder; a secret must be its owner's alone."""
    if not path:
        raise TlsError("name the file, from the inventory's folder or as a whole path.")
    file = Path(folder, Path(path).expanduser())
    try:
        if not file.is_file():
            raise FileNotFoundError(2, "it is no file")
        if secret and file.stat().st_mode & 0o077:
            raise TlsError(
                f"its mode {file.stat().st_mode & 0o777:04o} lets others read the key; run chmod "
                "600 on it, and take another key if others had access."
            )
        return file.read_text(errors="replace")
    except OSError as error:
        raise TlsError(
            f"cannot be read ({error.strerror}); write its right path, and let the user who runs "
            "this read it."
        ) from error


def _key_faults(where: str, key_where: str, chain: Certificates, key: PrivateKeyTypes) -> list[str]:
    if belongs(key, chain[0]):
        return []
    for number, one in enumerate(chain, 1):
        if belongs(key, one):
            return [
                f"{where} the first certificate is {subject(chain[0])}, and the one of the key, "
                f"{subject(one)}, is number {number}; write that one first, then each one that "
                "signed the one before."
            ]
    return [
        f"{key_where} it is not the key of {subject(chain[0])}, the first certificate in "
        "stack_tls_certificate_file; name the key with which that was asked for."
    ]


def _leaf_faults(where: str, leaf: x509.Certificate) -> list[str]:
    faults = []
    if is_ca(leaf):
        faults.append(
            f"{where} {subject(leaf)} is a CA itself; let it sign a certificate for the hosts, or "
            "set stack_tls to own, which does."
        )
    servers = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if not servers & _usages_of(leaf):
        faults.append(
            f"{where} {subject(leaf)} is not for servers; ask for one with the extended key usage "
            "serverAuth."
        )
    return faults


def _time_faults(where: str, chain: Certificates) -> list[str]:
    faults = []
    for one in chain:
        if one.not_valid_after_utc < now():
            faults.append(f"{where} {subject(one)} ended on {day(one)}; renew it.")
        elif one.not_valid_after_utc - now() < timedelta(days=1):
            faults.append(
                f"{where} {subject(one)} ends within a day, at {one.not_valid_after_utc:%H:%M} UTC;"
                " renew it."
            )
        if one.not_valid_before_utc > now():
            begin = f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            faults.append(
                f"{where} {subject(one)} is not valid before {begin}; wait, or set the clock of "
                "this machine."
            )
    return faults


def _chain_faults(where: str, ca_where: str, chain: Certificates, roots: Certificates) -> list[str]:
    if not roots:
        return [
            f"{ca_where} there is no certificate of a CA in it; name the file of the CA at the end "
            "of the chain."
        ]
    for one, signer in pairwise(chain):
        if signed(one, signer):
            continue
        if any(signed(one, other) for other in chain):
            return [
                f"{where} after {subject(one)} comes {subject(signer)}, which did not sign it; "
                "write each certificate before the one that signed it."
            ]
        return [_unsigned(where, one)]
    last = chain[-1]
    anchors = [root for root in roots if root == last or signed(last, root)]
    if not anchors:
        return [_unsigned(where, last)]
    # Of a CA that was renewed, the file may have both.
    late = [_time_faults(ca_where, [root]) for root in anchors]
    return [] if [] in late else late[0]


def _unsigned(where: str, one: x509.Certificate) -> str:
    return (
        f"{where} {one.issuer.rfc4514_string()}, which signed {subject(one)}, is neither next in "
        "it nor in stack_tls_ca_file; add its certificate after that one, or to the CA's file."
    )


def _name_faults(
    where: str, leaf: x509.Certificate, names: Sequence[object], reached: Sequence[object]
) -> list[str]:
    has = _names_of(leaf)
    says = f"{where} {subject(leaf)} is for {', '.join(sorted(has)) or 'no name'}"
    lacks = [str(name) for name in names if not _covers(has, alternative(name))]
    if lacks:
        return [
            f"{says}, not for {', '.join(lacks)} of stack_tls_names; ask for one that is, or remove"
            " what no client uses."
        ]
    known = alternatives(names) | _reached(reached)
    if not any(_covers(has, name) for name in known):
        told = ", ".join(sorted(name.partition(":")[2] for name in known))
        return [
            f"{says}, and the host is known as {told}; ask for a certificate with one of these as "
            "subjectAltName, or write the names that clients use into stack_tls_names."
        ]
    return []


def _client_faults(
    where: str, chain: Certificates, roots: Certificates, names: set[str]
) -> list[str]:
    """Ask as a client would, for what is rarer: limits of a CA, signatures that are too weak."""
    # cryptography has policies since version 45.
    if not hasattr(verification, "ExtensionPolicy"):
        return []
    # Without them it asks for what public CAs promise, such as an authority's key identifier.
    any_one = verification.ExtensionPolicy.permit_all()
    any_ca = any_one.require_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, None)
    any_leaf = any_one.require_present(
        x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None
    )
    builder = verification.PolicyBuilder().store(verification.Store(roots))
    builder = builder.extension_policies(ca_policy=any_ca, ee_policy=any_leaf)
    name = next(one for one in sorted(names) if _covers(_names_of(chain[0]), one))
    kind, _, text = name.partition(":")
    wanted = x509.IPAddress(ipaddress.ip_address(text)) if kind == "IP" else x509.DNSName(text)
    try:
        builder.build_server_verifier(wanted).verify(chain[0], chain[1:])
    except verification.VerificationError as error:
        return [f"{where} clients would refuse it for {text}: {error}"]
    return []


# --- what both need


def chain_of(text: str) -> Certificates:
    """Return the certificates in text (PEM), at least one."""
    try:
        chain = x509.load_pem_x509_certificates(text.encode())
        # These are read when they are asked for.
        return [one for one in chain if one.extensions is not None and one.public_key()]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsError(
            "holds no certificates in PEM; `openssl x509 -inform der` makes that of DER, `openssl "
            "pkcs12 -nokeys` of PKCS #12."
        ) from error


def key_of(text: str) -> PrivateKeyTypes:
    """Return the private key in text (PEM)."""
    try:
        return serialization.load_pem_private_key(text.encode(), None)
    except TypeError as error:
        raise TlsError(
            "the key has a password; write it without one, mode 0600: `openssl pkey -in … -out …`."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsError(
            "holds no private key in PEM; `openssl pkey` makes that of DER, `openssl pkcs12 "
            "-nocerts -noenc` of PKCS #12."
        ) from error


def belongs(key: PrivateKeyTypes, certificate: x509.Certificate) -> bool:
    """Return whether key is the certificate's."""
    return key.public_key() == certificate.public_key()


def signed(certificate: x509.Certificate, signer: x509.Certificate) -> bool:
    """Return whether signer, a CA, signed the certificate."""
    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return is_ca(signer)


def is_ca(certificate: x509.Certificate) -> bool:
    """Return whether the certificate says that it is a CA's."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def subject(certificate: x509.Certificate) -> str:
    """Return whose certificate it is: CN=broker1.example."""
    return certificate.subject.rfc4514_string() or "a certificate without subject"


def day(certificate: x509.Certificate) -> str:
    """Return the day on which the certificate ends."""
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def now() -> datetime:
    """Return the time, with its zone."""
    return datetime.now(UTC)


def _names_of(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {
        *(f"DNS:{name.lower()}" for name in names.get_values_for_type(x509.DNSName)),
        *(f"IP:{address}" for address in names.get_values_for_type(x509.IPAddress)),
    }


def _usages_of(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    """Return what the certificate's key may be used for; any use where it does not say."""
    try:
        return {*certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value}
    except x509.ExtensionNotFound:
        return {ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}


def _covers(has: set[str], name: str) -> bool:
    kind, _, rest = name.partition(":")
    return name in has or (kind == "DNS" and f"DNS:*.{rest.partition('.')[2]}" in has)


def _pem(chain: Certificates) -> str:
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in chain)
