"""An archive is restored only when it is whole, and as it was packed."""

import base64
import gzip
import hashlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PROGRAM = Path(__file__).parents[1] / "roles/backup/files/archive.py"
ABOUT = {"stack_name": "broker", "host": "broker1", "node": "rabbit@broker1", "time": "now"}


def data(*members: tuple[str, bytes, bytes, int]) -> bytes:
    """Return a tar as the role makes of a folder: of members by name, kind, content and mode."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content, mode in (("./", tarfile.DIRTYPE, b"", 0o755), *members):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.size = kind, mode, len(content)
            entry.linkname = "x" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


def plain(name: str, content: bytes) -> tuple[str, bytes, bytes, int]:
    return name, tarfile.REGTYPE, content, 0o640


CONTENTS = {
    "definitions.json": b"{}",
    "rabbitmq.tar": data(plain("./log", bytes(range(256)) * 40), plain("./" + "x" * 200, b"y")),
    "prometheus.tar": data(plain("./wal", b"p" * 512)),
    "alertmanager.tar": b"",
    "state.tar": data(plain("./version", b"s" * 513)),
    "secrets/rabbitmq_admin": b"secret\n",
    "secrets/salt": b"salt\n",
}


@pytest.fixture(scope="module")
def archives() -> Any:
    spec = importlib.util.spec_from_file_location("archive", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Return an archive that the program has packed."""
    for name, content in CONTENTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    archive = tmp_path / "broker.tar.gz"
    done = run("pack", archive, tmp_path, tmp_path / "secrets", about=ABOUT)
    assert done.returncode == 0, done.stderr
    return archive


@pytest.fixture
def refused(archives: Any, tmp_path: Path) -> Callable[[bytes], str]:
    """Return a function that says why these bytes are no archive; it fails when they are one."""
    path = tmp_path / "refused.tar.gz"

    def why(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(archives.ArchiveError) as error:
            archives.read(path)
        return str(error.value)

    return why


def run(command: str, *paths: Path, about: object = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), command, *map(str, paths)],
        input=json.dumps(about),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def tarred(members: list[tuple[str, bytes]], change: Callable[[str], str] = str) -> bytes:
    """Return a gzipped tar of members, each under the name that change makes of its own."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(change(name))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


def manifest(contents: dict[str, bytes], /, **changed: object) -> tuple[str, bytes]:
    listed = [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    head = {"format": "message-broker-stack backup", "version": 1, **ABOUT, "members": listed}
    return "manifest.json", json.dumps(head | changed).encode()


def test_what_was_packed_comes_back(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    done = run("unpack", packed, folder)
    assert done.returncode == 0, done.stderr
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(folder)): path.read_bytes() for path in files} == CONTENTS
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (folder / "secrets").stat().st_mode & 0o777 == 0o700


def test_an_archive_is_its_owner_s_alone_and_says_whose_it_is(packed: Path, tmp_path: Path) -> None:
    assert packed.stat().st_mode & 0o777 == 0o600
    with tarfile.open(packed) as tar:
        names = tar.getnames()
    assert names == ["manifest.json", *CONTENTS]
    said = json.loads(run("check", packed, tmp_path / "secrets").stdout)
    assert {name: said[name] for name in ABOUT} == ABOUT
    assert [member["name"] for member in said["members"]] == list(CONTENTS)
    assert said["differing"] == []
    # What is said may be shown, and a password's hash is what a guess can be compared with.
    assert "sha256" not in str(said)


def test_the_archive_of_these_tests_is_one(archives: Any, tmp_path: Path) -> None:
    # Each of the refusals below differs from this one in one thing.
    good = tmp_path / "good.tar.gz"
    good.write_bytes(tarred([manifest(CONTENTS), *CONTENTS.items()]))
    assert archives.read(good)["stack_name"] == "broker"


def test_secrets_that_differ_are_named(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "salt").write_text("another\n")
    (other / "rabbitmq_admin").write_bytes(CONTENTS["secrets/rabbitmq_admin"])
    (other / "unknown").write_text("stays\n")
    assert json.loads(run("check", packed, other).stdout)["differing"] == ["salt"]


def authority(began: str) -> bytes:
    """Return what looks like a CA that is good from a moment on."""
    times = b"\x17\x0d" + began.encode() + b"Z\x18\x0f20500101000000Z"
    text = base64.encodebytes(b"\x30\x82" + times + b"key" * 50).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n".encode()


@pytest.fixture
def with_ca(tmp_path: Path) -> Path:
    """Return an archive with a CA, the next one, and certificates of a host beside them."""
    files = CONTENTS | {
        "secrets/tls_ca.pem": authority("260601000000"),
        "secrets/tls_ca_key.pem": b"its key",
        "secrets/tls_ca_next.pem": authority("270601000000"),
        "secrets/tls_broker1.example.com_front.pem": b"certificate",
        "secrets/tls_broker1.example.com_front_key.pem": b"key",
        "secrets/tls_a_prometheus_alertmanager.pem": b"certificate",
        "secrets/tls_rabbitmq_rabbitmq_key.pem": b"key",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    archive = tmp_path / "broker.tar.gz"
    done = run("pack", archive, tmp_path, tmp_path / "secrets", about=ABOUT)
    assert done.returncode == 0, done.stderr
    return archive


def checked(archive: Path, secrets: Path) -> tuple[list[str], list[str]]:
    done = run("check", archive, secrets)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return said["written"], said["differing"]


OF_CA = ["tls_ca.pem", "tls_ca_key.pem", "tls_ca_next.pem"]


def test_certificates_of_hosts_are_left_out(with_ca: Path, tmp_path: Path) -> None:
    with tarfile.open(with_ca) as tar:
        packed = [name for name in tar.getnames() if "tls_" in name]
    assert packed == [f"secrets/{name}" for name in OF_CA]
    assert checked(with_ca, tmp_path / "new") == (["rabbitmq_admin", "salt", *OF_CA], [])


def test_certificates_of_hosts_in_an_archive_are_not_written_and_not_compared(
    tmp_path: Path,
) -> None:
    archive, name = tmp_path / "earlier.tar.gz", "tls_broker1_front.pem"
    members = CONTENTS | {f"secrets/{name}": b"former"}
    archive.write_bytes(tarred([manifest(members), *members.items()]))
    (tmp_path / name).write_bytes(b"renewed")
    assert checked(archive, tmp_path) == (["rabbitmq_admin", "salt"], [])


@pytest.mark.parametrize(
    ("ours", "beside", "stays", "differing"),
    [
        # The archive's own: what became of the next one meanwhile stays, too.
        (authority("260601000000"), False, True, []),
        # After `make ca`, beside the passwords.
        (authority("270601000000"), True, True, []),
        # Left by a run that was refused on a new machine.
        (authority("270601000000"), False, False, OF_CA),
        # From before the last `make ca`, or no certificate.
        (authority("250601000000"), True, False, OF_CA),
        (b"nothing", True, False, OF_CA),
        (b"-----BEGIN CERTIFICATE-----\nA\n-----END", True, False, OF_CA),
    ],
)
def test_a_ca_that_followed_the_archive_s_stays_and_any_other_is_refused(
    with_ca: Path, tmp_path: Path, ours: bytes, beside: bool, stays: bool, differing: list[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "tls_ca.pem").write_bytes(ours)
    (here / "tls_ca_key.pem").write_bytes(b"our key")
    (here / "tls_ca_next.pem").write_bytes(authority("280601000000"))
    if beside:
        (here / "salt").write_bytes(CONTENTS["secrets/salt"])
    expected = ["rabbitmq_admin", "salt"] + ([] if stays else OF_CA)
    assert checked(with_ca, here) == (expected, differing)


def test_since_when_a_ca_is_good_is_read_of_real_ones(archives: Any) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker CA 20261128090322")])
    for year in 2036, 2056:
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(datetime(2026, 11, 27, 9, 3, 22, tzinfo=UTC))
            .not_valid_after(datetime(year, 11, 28, tzinfo=UTC))
            .sign(key, hashes.SHA256())
        )
        pem = made.public_bytes(serialization.Encoding.PEM)
        assert archives.began(b"a comment\n" + pem) == "261127090322"


def test_restore_looks_with_every_preflight_but_that_which_makes_a_ca() -> None:
    roles = PROGRAM.parents[2]
    every = yaml.safe_load((roles / "preflight/defaults/main.yml").read_text())["preflight_checked"]
    looked = yaml.safe_load((roles / "backup/vars/main.yml").read_text())["__backup_looked"]
    assert looked == [role for role in every if role != "tls"]


def test_an_archive_that_is_cut_off_anywhere_is_refused(
    packed: Path, refused: Callable[[bytes], str]
) -> None:
    whole = packed.read_bytes()
    said = {refused(whole[:length]) for length in range(len(whole))}
    # One byte is not yet the two by which gzip is known.
    one_byte = refused(whole[:1])
    assert "Not a gzipped file" in one_byte
    assert said == {"is empty", one_byte, "is cut off"}


def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(
    archives: Any, packed: Path, tmp_path: Path
) -> None:
    whole, good, accepted = packed.read_bytes(), archives.read(packed), 0
    broken = tmp_path / "broken.tar.gz"
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        broken.write_bytes(changed)
        try:
            assert archives.read(broken) == good
        except archives.ArchiveError:
            continue
        accepted += 1
    # gzip's header has six bytes that nobody reads, and "as before" can be said in two ways.
    assert accepted < 6 + len(whole) // 100


def test_a_changed_member_is_refused_though_gzip_is_content(
    refused: Callable[[bytes], str],
) -> None:
    changed = CONTENTS | {"rabbitmq.tar": CONTENTS["rabbitmq.tar"].replace(b"abc", b"abd", 1)}
    assert "a rabbitmq.tar that is not what was packed" in refused(
        tarred([manifest(CONTENTS), *changed.items()])
    )
    longer = CONTENTS | {"state.tar": b"s" * 514}
    assert "'state.tar' of 514 bytes where" in refused(
        tarred([manifest(CONTENTS), *longer.items()])
    )


def test_an_archive_in_another_order_is_refused(refused: Callable[[bytes], str]) -> None:
    members = list(CONTENTS.items())
    assert "begins with 'definitions.json'" in refused(tarred([*members, manifest(CONTENTS)]))
    swapped = [manifest(CONTENTS), members[1], members[0], *members[2:]]
    assert "'rabbitmq.tar' of 20480 bytes where its manifest says" in refused(tarred(swapped))


def test_a_member_that_is_missing_or_added_is_refused(refused: Callable[[bytes], str]) -> None:
    members = list(CONTENTS.items())
    assert "end of file" in refused(tarred([manifest(CONTENTS), *members[:-1]]))
    added = tarred([manifest(CONTENTS), *members, ("secrets/more", b"")])
    assert refused(added) == "has something behind its end"
    whole = tarred([manifest(CONTENTS), *members])
    assert refused(whole + whole) == "has something behind its end"
    assert "names other members" in refused(
        tarred([manifest(dict(members[1:])), *members[1:]]),
    )


def test_foreign_archives_are_refused(refused: Callable[[bytes], str]) -> None:
    assert "begins with 'README.md'" in refused(tarred([("README.md", b"hi")]))
    assert "is no archive" in refused(gzip.compress(b"text " * 1000))
    assert "is damaged, or no archive" in refused(b"PK\3\4" + b"text " * 1000)
    assert "is no archive" in refused(tarred([]))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../passwd", "secrets/../../passwd", "secrets/.hidden", "secrets/a/b", "other"],
)
def test_a_name_that_leads_elsewhere_is_refused(refused: Callable[[bytes], str], name: str) -> None:
    members = CONTENTS | {name: b"x"}
    assert "members are not as" in refused(tarred([manifest(members), *members.items()]))
    # Neither is it enough that the manifest has a good one.
    wrong = tarred(
        [manifest(CONTENTS), *CONTENTS.items()],
        lambda known: name if known == "secrets/salt" else known,
    )
    assert "where its manifest says 'secrets/salt'" in refused(wrong)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
def test_whatever_is_no_regular_file_is_refused(
    refused: Callable[[bytes], str], kind: bytes
) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        name, content = manifest(CONTENTS)
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("definitions.json")
        entry.type, entry.linkname = kind, "/etc/passwd"
        tar.addfile(entry)
    assert "which is no regular file" in refused(raw.getvalue())


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (("./su", tarfile.REGTYPE, b"x", 0o4755), "'./su' in its rabbitmq.tar"),
        (("./sg", tarfile.DIRTYPE, b"", 0o2755), "'./sg' in its rabbitmq.tar"),
        (("./disk", tarfile.BLKTYPE, b"", 0o600), "no plain file and no folder"),
        (("./link", tarfile.SYMTYPE, b"", 0o600), "no plain file and no folder"),
        (("./hard", tarfile.LNKTYPE, b"", 0o600), "no plain file and no folder"),
        (("./pipe", tarfile.FIFOTYPE, b"", 0o600), "no plain file and no folder"),
        (("./" + "y" * 300, tarfile.SYMTYPE, b"", 0o600), "yyy' in its rabbitmq.tar"),
        (("/etc/cron.d/x", tarfile.REGTYPE, b"x", 0o600), "leads elsewhere"),
        (("./a/../../x", tarfile.REGTYPE, b"x", 0o600), "leads elsewhere"),
        (("../" + "z" * 300, tarfile.REGTYPE, b"x", 0o600), "leads elsewhere"),
    ],
)
def test_data_are_plain_files_and_folders(
    refused: Callable[[bytes], str], member: tuple[str, bytes, bytes, int], said: str
) -> None:
    # Behind another one, whose content looks like a header.
    inner = data(plain("./first", data(plain("./x", b"x" * 5000))), member)
    members = CONTENTS | {"rabbitmq.tar": inner}
    assert said in refused(tarred([manifest(members), *members.items()]))


def test_what_gnu_tar_makes_of_any_folder_of_data_is_taken(archives: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (folder / "deep" / ("d" * 120) / ("e" * 120) / "file").write_bytes(os.urandom(3000))
    (folder / "empty").touch()
    with (folder / "holes").open("wb") as file:
        for place in range(60):
            file.seek(place * 1_000_000)
            file.write(b"x" * 5000)
    packed = tmp_path / "data.tar"
    command = ["tar", "--create", "--sparse", "--numeric-owner", f"--file={packed}"]
    subprocess.run([*command, f"--directory={folder}", "."], check=True)
    content = packed.read_bytes()
    assert content.count(b"./holes") == 1
    for size in (1, 511, 512, 10_000, len(content)):
        reader = archives.Data("rabbitmq.tar")
        for start in range(0, len(content), size):
            reader.take(content[start : start + size])
    members = CONTENTS | {"rabbitmq.tar": content}
    (tmp_path / "good.tar.gz").write_bytes(tarred([manifest(members), *members.items()]))
    archives.read(tmp_path / "good.tar.gz")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "other"}, "another format"),
        ({"version": 2}, "has the format 2; this version of the project reads 1"),
        ({"node": None}, "without node"),
        ({"nodes": "broker1"}, "whose nodes are no list"),
        ({"nodes": [1]}, "whose nodes are no list"),
        ({"members": {}}, "members are not as"),
        ({"members": [{"name": "definitions.json", "size": -1, "sha256": ""}]}, "members are not"),
        ({"members": [{"name": "definitions.json", "size": True, "sha256": ""}]}, "members are"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_manifest_of_another_shape_is_refused(
    refused: Callable[[bytes], str], changed: dict[str, object], said: str
) -> None:
    assert said in refused(tarred([manifest(CONTENTS, **changed), *CONTENTS.items()]))


def test_a_manifest_that_is_no_json_is_refused(refused: Callable[[bytes], str]) -> None:
    for text in (b"", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000):
        assert "has a manifest" in refused(tarred([("manifest.json", text)]))


def test_sizes_beyond_all_bounds_need_no_memory(tmp_path: Path) -> None:
    # A manifest, and a member, of 8 TiB: tar writes so large a number in a form of its own.
    huge = 1 << 43
    listed = [{"name": name, "size": huge, "sha256": "0"} for name in list(CONTENTS)[:5]]
    name, text = manifest({}, members=listed)
    for entries in [
        ((name, huge, b""),),
        ((name, len(text), text), ("definitions.json", huge, b"")),
    ]:
        raw = io.BytesIO()
        for entry_name, size, content in entries:
            entry = tarfile.TarInfo(entry_name)
            entry.size = size
            raw.write(entry.tobuf(tarfile.GNU_FORMAT))
            raw.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
        archive = tmp_path / "huge.tar.gz"
        # 300 MiB of nothing follow, packed in 300 kB.
        archive.write_bytes(gzip.compress(raw.getvalue()) + gzip.compress(bytes(1 << 20)) * 300)
        done = subprocess.run(
            [sys.executable, str(PROGRAM), "check", str(archive), str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20)),
        )
        assert done.returncode == 1
        assert "bytes; 1048576 are the most" in done.stderr or "is cut off" in done.stderr
        done = run("unpack", archive, tmp_path)
        assert done.returncode == 1
        assert "are the most" in done.stderr or "MiB free" in done.stderr


def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    done = run("check", tmp_path / "nowhere.tar.gz", tmp_path)
    assert done.returncode == 1
    assert "nowhere.tar.gz cannot be used: " in done.stderr


def test_secrets_that_cannot_be_named_are_not_packed_by_half(packed: Path, tmp_path: Path) -> None:
    packed.unlink()
    (tmp_path / "secrets/folder").mkdir()
    done = run("pack", packed, tmp_path, tmp_path / "secrets", about=ABOUT)
    assert done.returncode == 1
    assert "cannot take" in done.stderr
    assert not packed.exists()


def test_an_archive_that_cannot_be_read_back_gets_no_name(
    archives: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.unlink()
    (tmp_path / "new.tar.gz").unlink(missing_ok=True)
    # As if the disk gave back something else than it was given.
    monkeypatch.setattr(archives, "digest_of", lambda _: "0" * 64)
    with pytest.raises(archives.ArchiveError, match="not what was packed"):
        archives.pack(tmp_path, tmp_path / "secrets", packed, ABOUT)
    assert not packed.exists()
