"""HAProxy, as its image has it, takes the front's configuration and does what it says."""

import json
from base64 import b64encode
from pathlib import Path

import pytest
from support import Rendered, render, run_in

CERTIFICATE = """
mkdir tls
openssl ecparam -name prime256v1 -genkey -noout -out key
openssl req -x509 -new -key key -subj /CN=x -out cert
cat cert key > tls/server.pem
"""
# Run it, and wait until it listens.
START = """
haproxy -f haproxy.cfg >log 2>&1 &
until bash -c 'exec 3<>/dev/tcp/127.0.0.1/8405' 2>/dev/null; do sleep 0.1; done
"""
# Send the request in the file $2 to the port $1 and show the answer.
ASK = """
ask() { bash -c 'exec 3<>/dev/tcp/127.0.0.1/$0; cat "$1" >&3; timeout 20 cat <&3' "$1" "$2"; }
"""


def files(folder: Path, rendered: Rendered, **variables: object) -> dict[str, str]:
    """Return the front's files, where run_in puts them."""
    values = {"__front_path": "/tmp", "stack_secrets_dir": str(rendered.secrets), **variables}
    return {"haproxy.cfg": render(folder, **values)["front/haproxy.cfg"], "loaded": "this one"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rendered: Rendered) -> dict[str, str]:
    return files(tmp_path_factory.mktemp("plain"), rendered)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory, rendered: Rendered) -> dict[str, str]:
    return files(tmp_path_factory.mktemp("tls"), rendered, stack_tls="own")


def request(path: str, *headers: str) -> str:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""])


def ask(image: str, texts: dict[str, str], port: int, text: str) -> tuple[int, str, str]:
    """Return status, headers and body of the answer at port."""
    done = run_in(image, {**texts, "request": text}, f"{{ {START}{ASK}ask {port} request; }}")
    assert done.stdout.startswith("HTTP/1.1 "), done.stdout
    head, _, body = done.stdout.partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_haproxy_takes_the_configuration(
    images: dict[str, str], request: pytest.FixtureRequest, kind: str
) -> None:
    texts = request.getfixturevalue(kind)
    done = run_in(images["front"], texts, f"{{ {CERTIFICATE}haproxy -c -f haproxy.cfg; }}")
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("port", [9149, 15692])
def test_who_reads_metrics_logs_in(
    images: dict[str, str], plain: dict[str, str], rendered: Rendered, port: int
) -> None:
    def login(user: str, password: str) -> str:
        return f"Authorization: Basic {b64encode(f'{user}:{password}'.encode()).decode()}"

    right = (rendered.secrets / "monitoring").read_text().strip()
    for headers in ([], [login("monitoring", f"{right}x")], [login("prometheus", right)]):
        status, head, body = ask(images["front"], plain, port, request("/metrics", *headers))
        assert status == 401
        assert 'www-authenticate: basic realm="monitoring"' in head
        assert json.loads(body).keys() == {"message"}
    # Let in, and told that nobody is there.
    header = login("monitoring", right)
    assert ask(images["front"], plain, port, request("/metrics", header))[0] == 503


def test_a_door_that_is_not_there_is_503_in_the_doors_shape(
    images: dict[str, str], plain: dict[str, str]
) -> None:
    asked = request("/receive", "X-Request-Id: mine-1")
    status, head, body = ask(images["front"], plain, 5001, asked)
    assert status == 503
    assert "retry-after: 2" in head
    assert "x-request-id: mine-1" in head
    assert "content-type: application/json" in head
    assert json.loads(body).keys() == {"message"}


def test_it_tells_which_files_it_has_loaded(images: dict[str, str], plain: dict[str, str]) -> None:
    assert ask(images["front"], plain, 8405, request("/healthz"))[::2] == (200, "this one")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("-tls1_2 -alpn h2,http/1.1", "ALPN protocol: h2"),
        ("-tls1_3 -alpn http/1.1", "ALPN protocol: http/1.1"),
        ("-tls1_1 -cipher ALL:@SECLEVEL=0", "alert protocol version"),
        ("-tls1_2 -cipher AES128-GCM-SHA256", "alert handshake failure"),
    ],
)
def test_it_speaks_tls_from_1_2_with_forward_secrecy_only(
    images: dict[str, str], tls: dict[str, str], option: str, told: str
) -> None:
    connect = f"openssl s_client -connect 127.0.0.1:5000 {option} </dev/null"
    done = run_in(images["front"], tls, f"{{ {CERTIFICATE}{START}{connect}; }}")
    assert told in done.stdout
