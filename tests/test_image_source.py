"""Where images come from is chosen once, and never by a registry's failure that passes.

The engine of this host asks a registry that this test is.
"""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import playbook

# The smallest image that an engine takes for one: a list of none of which it asks more.
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
ENTRY = {
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "size": 1,
    "digest": f"sha256:{'0' * 64}",
    "platform": {"architecture": "amd64", "os": "linux"},
}
IMAGE = json.dumps({"schemaVersion": 2, "mediaType": LIST, "manifests": [ENTRY]}).encode()
DIGEST = f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"
# By the distribution specification.
CODES = {404: "MANIFEST_UNKNOWN", 429: "TOOMANYREQUESTS"}

# How a registry answers one time after the other, the last for ever. A text: with a page, not JSON.
CASES: dict[str, list[int | str]] = {
    "has it": [200],
    "has it not": [404],
    "is at its limit once": [429, 200],
    "is at its limit": [429],
    "is at its limit, as a page tells": ["429"],
    "is unwell": [503],
}


@contextmanager
def registry(answers: list[int | str]) -> Iterator[int]:
    """Answer whoever asks on the port that is returned."""
    times = -1

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal times
            # Each time begins with the question whether a registry is there.
            times += self.path == "/v2/"
            answer = answers[min(times, len(answers) - 1)]
            kind, body = "application/json", b"{}"
            if answer == 200 and self.path != "/v2/":
                kind, body = LIST, IMAGE
            elif isinstance(answer, str):
                kind, body = "text/html", b"<html>"
            elif answer != 200:
                error = {"code": CODES.get(answer, "UNKNOWN"), "message": "not now"}
                body = json.dumps({"errors": [error]}).encode()
            self.send_response(int(answer))
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", DIGEST)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@dataclass
class Choice:
    """What a run chose, if any, and what it said."""

    recorded: str
    returncode: int
    said: str


def choose(folder: Path, port: int) -> Choice:
    """Let the role choose by a registry on this port."""
    values = {
        "stack_secrets_dir": str(folder),
        "image_debian": f"127.0.0.1:{port}/debian:trixie-slim",
    }
    done = playbook("source", **values)
    record = folder / "image_source"
    recorded = record.read_text().strip() if record.exists() else ""
    return Choice(recorded, done.returncode, " ".join((done.stdout + done.stderr).split()))


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Choice]:
    """Return what came of each of CASES, of which most is waiting, and of a port without any."""

    folder = tmp_path_factory.mktemp("choices")

    def try_case(name: str) -> Choice:
        with registry(CASES[name]) as port:
            return choose(folder / name, port)

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(try_case, CASES), strict=True))


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("has it", "registry"),
        ("has it not", "build"),
        ("is at its limit once", "registry"),
    ],
)
def test_a_registry_s_answer_chooses_and_one_that_passes_is_waited_for(
    choices: dict[str, Choice], case: str, source: str
) -> None:
    assert choices[case].returncode == 0, choices[case].said[-2000:]
    assert choices[case].recorded == source
    assert ("RETRYING" in choices[case].said) == (len(CASES[case]) > 1)


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("is at its limit", "toomanyrequests"),
        ("is at its limit, as a page tells", "429"),
        ("is unwell", "503 Service Unavailable"),
    ],
)
def test_a_failure_that_lasts_stops_the_run_says_what_to_do_and_chooses_nothing(
    choices: dict[str, Choice], case: str, word: str
) -> None:
    assert choices[case].returncode != 0
    assert word in choices[case].said
    assert "set image_source to build" in choices[case].said
    assert choices[case].recorded == ""


def test_without_a_registry_it_builds_at_once(tmp_path: Path) -> None:
    with registry([200]) as port:
        pass
    choice = choose(tmp_path, port)
    assert (choice.recorded, choice.returncode) == ("build", 0)
    assert "RETRYING" not in choice.said
