"""HAProxy, as its image has it, takes the front's configuration and does what it says."""

import json
import re
from base64 import b64encode
from pathlib import Path

import pytest
import yaml
from support import ROOT, Rendered, render, run_in

# Of this host, and of the others of a cluster.
CERTIFICATE = """
mkdir tls
openssl ecparam -name prime256v1 -genkey -noout -out key
openssl req -x509 -new -key key -subj /CN=x -addext subjectAltName=DNS:h2,DNS:h3 -out cert
cat cert key > tls/server.pem
cp cert tls/ca.pem
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


# How the role speaks to HAProxy.
DRAIN = yaml.safe_load((ROOT / "roles/front/vars/main.yml").read_text())["__front_ask"]

# The loopback addresses at which the tests have other hosts' fronts.
OTHERS = [{"name": "h2", "address": "127.0.0.2"}, {"name": "h3", "address": "127.0.0.3"}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, rendered: Rendered) -> dict[str, str]:
    """Return the front's files on the first of three hosts; its own doors are at 127.0.0.9."""
    values = {"stack_tls": "own", "stack_nodes": ["h1", "h2", "h3"], "stack_others": OTHERS}
    values |= {"apps_publisher_port": 6000, "apps_subscriber_port": 6001}
    texts = files(tmp_path_factory.mktemp("cluster"), rendered, **values)
    own = re.sub(r" (publisher|subscriber):5", " 127.0.0.9:7", texts["haproxy.cfg"])
    return texts | {"haproxy.cfg": own}


def service(name: str, bind: str, does: str = "") -> str:
    """Return what has HAProxy tell, as name at bind, which of a request's headers came."""
    told = "front=%[req.hdr(Stack-Front)] for=%[req.hdr(X-Forwarded-For)] host=%[req.hdr(Host)]"
    return f"""
frontend {name}
  mode http
  timeout client 9s
  bind {bind}
  {does}
  http-request return status 200 content-type text/plain lf-string "{name} {told}"
"""


OTHER_FRONTS = "".join(
    service(one["name"], f"{one['address']}:6000 ssl crt tls/server.pem") for one in OTHERS
)
# Run the own door; ask the front for a path, with a header, from an address: status and body in a
# line; and have the front use its own doors or not, as the role does.
STEPS = f"""
own() {{ haproxy -f own.cfg & own=$!; }}
ask() {{
  printf '%s\\r\\n' "GET $1 HTTP/1.1" Host:\\ h1:5000 Connection:\\ close "${{2:-A: b}}" '' |
  timeout 25 openssl s_client -quiet -bind ${{3:-127.0.0.1}}:0 -connect 127.0.0.1:5000 2>/dev/null |
  sed -n '1s/^[^ ]* \\([0-9]*\\).*/\\1/p;$p' | paste -s -d ' '
}}
until_told() {{
  found=$1; shift
  for try in $(seq 99); do ask "${{@:-/}}" | grep -q "$found" && return; sleep 0.1; done
}}
drain() {{ bash -c '{DRAIN[-1]}' "set server any_publisher/own_ready state $1" >/dev/null; }}
{CERTIFICATE}haproxy -f others.cfg &
"""


def told(image: str, texts: dict[str, str], script: str, own: str = "") -> list[str]:
    """Return the lines that script prints on the first of three hosts; own is what its door does.

    It runs once the front is there and the others answer; the own door runs from `own` on.
    """
    texts = texts | {"others.cfg": OTHER_FRONTS, "own.cfg": service("own", "127.0.0.9:7000", own)}
    done = run_in(image, texts, f"{{ {STEPS}{START}{script}\n}} 2>/dev/null")
    return done.stdout.splitlines()


def request(path: str, *headers: str) -> str:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""])


def ask(image: str, texts: dict[str, str], port: int, text: str) -> tuple[int, str, str]:
    """Return status, headers and body of the answer at port."""
    done = run_in(image, {**texts, "request": text}, f"{{ {START}{ASK}ask {port} request; }}")
    assert done.stdout.startswith("HTTP/1.1 "), done.stdout
    head, _, body = done.stdout.partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


@pytest.mark.parametrize("kind", ["plain", "tls", "cluster"])
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


def test_who_is_refused_by_the_own_door_goes_to_another_host_at_once_and_comes_back(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    script = """
    own; until_told own; ask /x; kill -9 $own; wait $own
    date +%s%3N; for n in 1 2 3 4; do ask /x; done; date +%s%3N
    own; until_told own; echo again
    """
    first, begun, *others, ended, again = told(images["front"], cluster, script)
    assert first == "200 own front=broker1 for=127.0.0.1 host=h1:5000"
    assert {line.split()[1] for line in others} == {"h2", "h3"}
    assert {line.partition("front=")[2] for line in others} == {
        "broker1 for=127.0.0.1 host=h1:5000"
    }
    assert int(ended) - int(begun) < 3000
    assert again == "again"


def test_what_a_door_took_is_not_sent_to_another(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    # It reads a request, and closes the connection without an answer.
    dies = "http-request reject if !{ path /healthz }"
    script = "own; until_told 502; for n in 1 2 3; do ask /x; done"
    answers = told(images["front"], cluster, script, own=dies)
    assert [line.split()[0] for line in answers] == ["502"] * 3


@pytest.mark.parametrize(
    ("path", "header"),
    [("/x", "X-Stack-Hop: h2"), ("/x", "Stack-Front: h2"), ("/metrics", "A: b")],
)
def test_what_came_from_another_host_goes_no_further_and_metrics_do_not_either(
    images: dict[str, str], cluster: dict[str, str], path: str, header: str
) -> None:
    script = f"""
    until_told h3; ask {path} '{header}'
    own; until_told ^200.own {path} '{header}'; echo there
    """
    away, there = told(images["front"], cluster, script)
    assert away.startswith("503 ")
    assert there == "there"


def test_a_host_without_doors_passes_requests_on(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    # Of its own doors such a host has addresses at which nobody is.
    nobody = re.sub("127.0.0.9:700.", "127.0.0.1:1", cluster["haproxy.cfg"])
    script = "until_told h2; for n in 1 2 3 4; do ask /x; done; drain maint; drain ready; ask /x"
    answers = told(images["front"], cluster | {"haproxy.cfg": nobody}, script)
    assert {line.split()[0] for line in answers} == {"200"}
    assert {line.split()[1] for line in answers} == {"h2", "h3"}


def test_another_front_hears_whether_the_own_door_takes_requests(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    health = "ask /healthz 'Stack-Front: h2'"
    script = f"""
    until_told h3; {health}; own; until_told ^200 /healthz 'Stack-Front: h2'; {health}
    drain maint; {health}; ask /x; drain ready; until_told own; {health}
    """
    answers = [line.split()[:2] for line in told(images["front"], cluster, script)]
    assert [status for status, *_ in answers] == ["503", "200", "503", "200", "200"]
    assert answers[3][1] in {"h2", "h3"}


def test_only_from_another_host_the_client_is_who_its_front_says_and_is_not_counted_again(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    few = {"haproxy.cfg": cluster["haproxy.cfg"].replace("req_rate gt 10000", "req_rate gt 3")}
    asked = "for n in 1 2 3 4 5 6; do ask /x 'X-Forwarded-For: 198.51.100.7' {}; done"
    script = f"own; sleep 2; {asked.format('127.0.0.2')}; {asked.format('127.0.0.4')}"
    answers = told(images["front"], cluster | few, script)
    assert {line.split()[3] for line in answers[:6]} == {"for=198.51.100.7"}
    assert {line.split()[3] for line in answers[6:9]} == {"for=127.0.0.4"}
    assert "429" in {line.split()[0] for line in answers[9:]}


def test_another_host_is_used_only_with_a_certificate_that_names_it(
    images: dict[str, str], cluster: dict[str, str]
) -> None:
    foreign = cluster["haproxy.cfg"].replace("verifyhost h3", "verifyhost h4")
    script = "until_told h2; for n in 1 2 3 4; do ask /x; done"
    answers = told(images["front"], cluster | {"haproxy.cfg": foreign}, script)
    assert [line.split()[1] for line in answers] == ["h2"] * 4


def test_one_host_has_nothing_of_a_cluster(plain: dict[str, str], tls: dict[str, str]) -> None:
    for texts in (plain, tls):
        assert not re.search("any_|Stack-|peer|stats socket|ca-file", texts["haproxy.cfg"])
