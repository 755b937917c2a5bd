"""The archives of `make backup`: pack, check, unpack.

An archive is a gzipped tar. Its first member, manifest.json, says whose it is and names every other
member in order, with size and SHA-256; nothing else is in it, and nothing but regular files. All of
it is streamed: memory is bounded whatever an archive claims to be. The data are tars themselves,
which root unpacks: nothing but plain files and folders may be in them. Needs Python's own library
only.
"""

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

FORMAT = "message-broker-stack backup"
VERSION = 1

MANIFEST = "manifest.json"
MANIFEST_MAX = 1 << 20
# The volumes by the name of their container, and the folder of what is remembered about them.
DATA = ("rabbitmq.tar", "prometheus.tar", "alertmanager.tar", "state.tar")
REQUIRED = ("definitions.json", *DATA)
SECRET = re.compile(r"secrets/[A-Za-z0-9_][A-Za-z0-9_.-]{0,90}")
# A host's certificates, which any run makes anew: they are left out.
RENEWED = re.compile(r"secrets/tls_.+_(front|rabbitmq|prometheus|alertmanager)(_key)?\.pem")
# The CA that clients trust, and all files of it.
CA = "secrets/tls_ca.pem"
OF_CA = re.compile(r"secrets/tls_ca(_next|_former)?(_key)?\.pem")
# A certificate, and in it the moment from which it is good, which the one follows at which it ends.
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([^-]*)-----END")
BEGAN = re.compile(rb"\x17\x0d(\d{12})Z[\x17\x18]")

BLOCK = 512
CHUNK = 1 << 20
# tar ends with two empty blocks, and fills up its last record of twenty.
PADDING_MAX = 21 * BLOCK


class ArchiveError(Exception):
    """What is wrong with an archive, or with what is to go into one."""


class Reader:
    """One pass over an archive, from its beginning to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        """Begin at the first byte of the unpacked stream."""
        self.stream = stream

    def read(self, size: int) -> bytes:
        """Return size bytes, at most CHUNK."""
        try:
            data = self.stream.read(size)
        except EOFError:
            data = b""
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ArchiveError(f"is damaged, or no archive of `make backup`: {error}") from error
        if len(data) < size:
            raise ArchiveError("is cut off")
        return data

    def header(self) -> tarfile.TarInfo:
        """Return the next member's header: one block, so that nothing long is read before it."""
        try:
            member = tarfile.TarInfo.frombuf(self.read(BLOCK), "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise ArchiveError(f"is no archive of `make backup`: {error}") from error
        if member.type != tarfile.REGTYPE:
            raise ArchiveError(f"has {member.name!r} in it, which is no regular file")
        return member

    def content(self, size: int, write: Callable[[bytes], object]) -> None:
        """Hand the size bytes of a member to write."""
        left = size
        while left:
            data = self.read(min(left, CHUNK))
            write(data)
            left -= len(data)
        self.read(-size % BLOCK)

    def end(self) -> None:
        """Refuse whatever comes but the end; it is there that gzip compares its checksum."""
        try:
            rest = self.stream.read(PADDING_MAX)
        except EOFError:
            rest = b""
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ArchiveError(f"is damaged: {error}") from error
        if len(rest) < 2 * BLOCK:
            raise ArchiveError("is cut off")
        if any(rest) or len(rest) == PADDING_MAX:
            raise ArchiveError("has something behind its end")


class Data:
    """A tar of data, as GNU tar --sparse makes it, piece by piece."""

    def __init__(self, name: str) -> None:
        """Begin before the first piece."""
        self._name = name
        self._rest = bytearray()
        # Bytes of the current member that are still to come, whether its map of holes goes on, and
        # what a GNU long name is being collected in.
        self._left = 0
        self._holes = False
        self._long: bytearray | None = None
        self._path = ""

    def take(self, data: bytes) -> None:
        """Look at the next piece; raises ArchiveError."""
        self._rest += data
        start = 0
        while len(self._rest) - start >= BLOCK:
            block = bytes(self._rest[start : start + BLOCK])
            if self._left and self._long is None and not self._holes:
                whole = min(self._left, len(self._rest) - start) // BLOCK * BLOCK
                start += max(whole, BLOCK)
                self._left = max(0, self._left - max(whole, BLOCK))
                continue
            start += BLOCK
            self._block(block)
        del self._rest[:start]

    def _block(self, block: bytes) -> None:
        """Read a header, or what belongs to one."""
        if self._holes:
            self._holes = block[504] != 0
        elif self._long is not None:
            self._long += block[: self._left]
            self._left = max(0, self._left - BLOCK)
            if not self._left:
                self._path = self._long.rstrip(b"\0").decode(errors="replace")
                self._long = None
        elif any(block):
            self._header(block)

    def _header(self, block: bytes) -> None:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            raise ArchiveError(f"has a {self._name} that is no tar: {error}") from error
        path, self._path = self._path or member.name, ""
        self._left = member.size
        if member.type == tarfile.GNUTYPE_LONGNAME and member.size < 2 * 4096:
            self._long = bytearray()
            return
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.GNUTYPE_SPARSE)
        if not (plain or member.type == tarfile.DIRTYPE) or member.mode & 0o6000:
            raise ArchiveError(
                f"has {path!r} in its {self._name}, which is no plain file and no folder"
            )
        if path.startswith("/") or ".." in path.split("/"):
            raise ArchiveError(f"has {path!r} in its {self._name}, which leads elsewhere")
        self._holes = member.type == tarfile.GNUTYPE_SPARSE and block[482] != 0


def read(archive: Path, into: Path | None = None) -> dict[str, Any]:
    """Return the manifest once the whole archive is as it says; write the members into a folder."""
    if archive.stat().st_size == 0:
        raise ArchiveError("is empty")
    with gzip.open(archive) as stream:
        reader = Reader(cast(BinaryIO, stream))
        first = reader.header()
        if first.name != MANIFEST:
            raise ArchiveError(
                f"is no archive of `make backup`: it begins with {first.name!r}, not {MANIFEST}"
            )
        if first.size > MANIFEST_MAX:
            raise ArchiveError(f"has a manifest of {first.size} bytes; {MANIFEST_MAX} are the most")
        text = bytearray()
        reader.content(first.size, text.extend)
        manifest = judge(bytes(text))
        if into:
            room(into, sum(member["size"] for member in manifest["members"]))
        for expected in manifest["members"]:
            compare(reader, expected, into)
        reader.end()
    return manifest


def judge(text: bytes) -> dict[str, Any]:
    """Return the manifest, all of whose fields are there and of their types."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"has a manifest that is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArchiveError(f"has a manifest of another format; it must be {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ArchiveError(
            f"has the format {manifest.get('version')!r:.20}; this version of the project reads "
            f"{VERSION}: restore with the version that made it"
        )
    for name in ("stack_name", "host", "node", "time"):
        if not isinstance(manifest.get(name), str):
            raise ArchiveError(f"has a manifest without {name}")
    # The hosts of a cluster.
    nodes = manifest.get("nodes", [])
    if not isinstance(nodes, list) or not all(isinstance(name, str) for name in nodes):
        raise ArchiveError("has a manifest whose nodes are no list of names")
    members = manifest.get("members")
    if not isinstance(members, list) or not all(map(well_formed, members)):
        raise ArchiveError("has a manifest whose members are not as `make backup` writes them")
    names = [member["name"] for member in members]
    if tuple(names[: len(REQUIRED)]) != REQUIRED or len(set(names)) != len(names):
        raise ArchiveError(f"names other members than {', '.join(REQUIRED)} and secrets/…")
    return manifest


def well_formed(member: object) -> bool:
    """Tell whether a member has a name that may be written, a size and a SHA-256."""
    return (
        isinstance(member, dict)
        and member.keys() == {"name", "size", "sha256"}
        and isinstance(member["name"], str)
        and (member["name"] in REQUIRED or SECRET.fullmatch(member["name"]) is not None)
        and type(member["size"]) is int
        and member["size"] >= 0
        and isinstance(member["sha256"], str)
    )


def compare(reader: Reader, expected: dict[str, Any], into: Path | None) -> None:
    """Read the next member, which must be what the manifest says; write it into a folder."""
    found = reader.header()
    name: str = expected["name"]
    if (found.name, found.size) != (name, expected["size"]):
        raise ArchiveError(
            f"has {found.name!r} of {found.size} bytes where its manifest says {name!r} of "
            f"{expected['size']} bytes"
        )
    path = into / name if into else Path(os.devnull)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256()
    data = Data(name) if name in DATA else None
    ca = bytearray()
    with create(path) if into else path.open("wb") as file:

        def take(piece: bytes) -> None:
            if data:
                data.take(piece)
            if name == CA and len(ca) < CHUNK:
                ca.extend(piece)
            digest.update(piece)
            file.write(piece)

        reader.content(found.size, take)
    if digest.hexdigest() != expected["sha256"]:
        raise ArchiveError(f"has a {name} that is not what was packed: its SHA-256 differs")
    if name == CA:
        expected["began"] = began(bytes(ca))


def create(path: Path) -> BinaryIO:
    """Open a new file that nobody else may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def room(folder: Path, size: int) -> None:
    """Refuse a disk that is too small before it is full."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ArchiveError(f"needs {size >> 20} MiB in {folder}, which has {free >> 20} MiB free")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(folder: Path, secrets: Path, archive: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write an archive of a folder and the secrets; it gets its name once it is whole."""
    files = {name: folder / name for name in REQUIRED}
    for path in sorted(secrets.iterdir()) if secrets.exists() else []:
        if RENEWED.fullmatch(f"secrets/{path.name}"):
            continue
        files[f"secrets/{path.name}"] = path
        if not SECRET.fullmatch(f"secrets/{path.name}") or not path.is_file():
            raise ArchiveError(f"cannot take {path}: it is no file, or its name is not of letters")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "members": [
            {"name": name, "size": path.stat().st_size, "sha256": digest_of(path)}
            for name, path in files.items()
        ],
    }
    text = folder / MANIFEST
    text.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    new = folder / "new.tar.gz"
    with (
        create(new) as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, path in {MANIFEST: text, **files}.items():
            add(tar, name, path)
    # What was written is read once before anybody relies on it.
    read(new)
    with new.open("rb") as raw:
        os.fsync(raw.fileno())
    new.rename(archive)
    return manifest


def add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Add a file, without whose it was."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = path.stat().st_size, 0o600, int(time.time())
    with path.open("rb") as file:
        tar.addfile(member, file)


def began(text: bytes) -> str:
    """Return since when the certificate in text is good, as 261128090322; "" if that is unknown."""
    try:
        pem = PEM.search(text)
        found = BEGAN.search(base64.b64decode(pem[1])) if pem else None
    except ValueError:
        return ""
    return found[1].decode() if found else ""


def stays(manifest: dict[str, Any], secrets: Path) -> bool:
    """Tell whether the CA that is here stays: it is the archive's, or has followed it.

    One that has followed is newer and lies beside passwords of the archive; a run that was refused
    on a new controller leaves one alone.
    """
    ours = secrets / CA.removeprefix("secrets/")
    theirs = next((one for one in manifest["members"] if one["name"] == CA), None)
    if theirs is None or not ours.exists():
        return False
    if digest_of(ours) == theirs["sha256"]:
        return True
    names = [one["name"].removeprefix("secrets/") for one in manifest["members"]]
    beside = any((secrets / name).exists() for name in names if not name.startswith("tls_"))
    return beside and began(ours.read_bytes()) >= theirs["began"]


def written(manifest: dict[str, Any], secrets: Path) -> list[str]:
    """Return the secrets that a restore writes: not those of a CA where one stays."""
    left = [RENEWED, OF_CA] if stays(manifest, secrets) else [RENEWED]
    return [
        member["name"].removeprefix("secrets/")
        for member in manifest["members"]
        if member["name"] not in REQUIRED
        and not any(names.fullmatch(member["name"]) for names in left)
    ]


def differing(manifest: dict[str, Any], secrets: Path) -> list[str]:
    """Return those of the written secrets that exist already with other contents."""
    sums = {member["name"]: member["sha256"] for member in manifest["members"]}
    return [
        name
        for name in written(manifest, secrets)
        if (secrets / name).exists() and digest_of(secrets / name) != sums[f"secrets/{name}"]
    ]


def main(arguments: Iterable[str] | None = None) -> int:
    """Do what the command line says; print JSON, or what is wrong with the archive."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("pack", "check", "unpack"):
        one = commands.add_parser(command)
        one.add_argument("archive", type=Path)
        if command != "check":
            one.add_argument("folder", type=Path)
        if command != "unpack":
            one.add_argument("secrets", type=Path)
    given = parser.parse_args(None if arguments is None else list(arguments))
    try:
        if given.command == "pack":
            manifest = pack(given.folder, given.secrets, given.archive, json.load(sys.stdin))
        else:
            manifest = read(given.archive, given.folder if given.command == "unpack" else None)
        if given.command == "check":
            manifest["written"] = written(manifest, given.secrets)
            manifest["differing"] = differing(manifest, given.secrets)
    except ArchiveError as error:
        print(f"{given.archive} {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{given.archive} cannot be used: {error}", file=sys.stderr)
        return 1
    archive = {"path": str(given.archive), "size": given.archive.stat().st_size}
    # By a hash without salt, whoever sees the answer could tell whether a guess is right.
    for member in manifest["members"]:
        del member["sha256"]
    print(json.dumps(manifest | {"archive": archive}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
