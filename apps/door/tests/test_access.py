import json
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from common.environment import ConfigError
from door.access import ANYBODY, Access
from door.topology import Topology
from werkzeug.exceptions import Forbidden


def listed(name: str, *tokens: str, **rights: list[str]) -> dict[str, Any]:
    """Return a client as the file tells it."""
    hashes = [sha256(token.encode()).hexdigest() for token in tokens]
    return {"name": name, "tokens": hashes, "send": [], "receive": [], "manage": [], **rights}


def basic(login: str, scheme: str = "Basic") -> str:
    return f"{scheme} {b64encode(login.encode()).decode()}"


SHOP = listed("shop", "t0ken", "n\u00e4chster", send=["orders"])
ACCESS = Access([SHOP, listed("cook", "0ther")])


@pytest.mark.parametrize(
    "header",
    [
        *("Bearer t0ken", "bearer t0ken", "BEARER t0ken", "Bearer  t0ken"),
        *(basic("shop:t0ken", scheme) for scheme in ("Basic", "basic", "BASIC")),
        basic("shop:n\u00e4chster"),
    ],
)
def test_a_client_enters_by_each_of_its_tokens(header: str) -> None:
    for _ in range(2):
        client = ACCESS.client(header)
        assert client is not None
        assert client.name == "shop"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Basic",
        "Bearer",
        "Bearer ",
        "t0ken",
        "Bearer t0kem",
        "Bearer t0ke",
        "Bearer t0kenn",
        "Bearer T0KEN",
        "Basic t0ken",
        "Bearer \u00e4",
        "Bearer \u2603",
        f"Bearer {sha256(b't0ken').hexdigest()}",
        basic("shop:t0kem"),
        basic("shop:"),
        basic("shop"),
        basic("cook:t0ken"),
        basic(":t0ken"),
        basic("shop:t0ken", "Bearer"),
        "Digest t0ken",
    ],
)
def test_nobody_else_does(header: str | None) -> None:
    for _ in range(2):
        assert ACCESS.client(header) is None


def test_without_clients_everybody_may_do_everything() -> None:
    for header in None, "", "Bearer x":
        assert Access().client(header) is ANYBODY
    ANYBODY.check("manage", "orders")


def test_a_client_without_a_token_does_not_let_everybody_in() -> None:
    for header in None, "Bearer ", "Bearer x", basic("shop:"):
        assert Access([listed("shop")]).client(header) is None


def test_a_right_is_for_the_names_of_its_list() -> None:
    client = ACCESS.client("Bearer t0ken")
    assert client is not None
    client.check("send", "orders")
    for right, name in ("send", "takeaway"), ("receive", "orders"), ("manage", "orders"):
        with pytest.raises(Forbidden, match=f"'shop' has no right to {right}: '{name}'"):
            client.check(right, name)


def test_the_header_that_a_client_sends_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access([SHOP])
    client = access.client("Bearer t0ken")
    monkeypatch.setattr("door.access.sha256", None)
    assert access.client("Bearer t0ken") is client


def test_the_file_names_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("door.topology.LOOK", 0)
    file = tmp_path / "queues.json"
    told: dict[str, Any] = {"queues": ["orders"], "topics": [], "clients": [SHOP]}
    file.write_text(json.dumps(told))
    topology = Topology("orders", file)
    assert topology.lists.access.client("Bearer t0ken") is not None
    assert topology.lists.access.client("Bearer 0ther") is None
    told["clients"] = [listed("shop", "0ther")]
    (tmp_path / "new").write_text(json.dumps(told))
    (tmp_path / "new").rename(file)
    assert topology.lists.access.client("Bearer t0ken") is None
    assert topology.lists.access.client("Bearer 0ther") is not None


@pytest.mark.parametrize("clients", [[{}], [{"name": "shop"}], 1, [1]])
def test_a_file_with_bad_clients_cannot_be_read(tmp_path: Path, clients: object) -> None:
    file = tmp_path / "queues.json"
    file.write_text(json.dumps({"queues": [], "topics": [], "clients": clients}))
    with pytest.raises(ConfigError, match=r"queues\.json cannot be read"):
        Topology("orders", file)
