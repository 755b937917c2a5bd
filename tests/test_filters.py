"""What the role rabbitmq computes: hashes that RabbitMQ verifies, what it has lost, and bounds."""

import base64
import copy
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[1] / "roles/rabbitmq/filter_plugins/rabbitmq.py"


@pytest.fixture(scope="module")
def filters() -> Any:
    spec = importlib.util.spec_from_file_location("rabbitmq_filters", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()


@pytest.fixture(scope="module")
def hashed(filters: Any) -> Any:
    return filters["rabbitmq_password_hash"]


def verifies(text: str, password: str) -> bool:
    """Do what the broker does when somebody logs in: rabbit_password_hashing_sha256."""
    raw = base64.b64decode(text, validate=True)
    return len(raw) == 36 and hashlib.sha256(raw[:4] + password.encode()).digest() == raw[4:]


def test_the_verification_agrees_with_rabbitmq_s_documentation() -> None:
    # https://www.rabbitmq.com/docs/passwords#computing-password-hash, salt 908D C60A
    documented = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert base64.b64decode(documented)[:4] == bytes.fromhex("908DC60A")
    assert verifies(documented, "test12")
    assert not verifies(documented, "test13")


@pytest.mark.parametrize("password", ["test12", "", "pässwörd 🍕", "x" * 1000])
def test_a_hash_is_one_that_the_broker_verifies(hashed: Any, password: str) -> None:
    assert verifies(hashed(password, "admin"), password)


def test_a_hash_is_the_same_at_every_run(hashed: Any) -> None:
    assert hashed("test12", "admin") == hashed("test12", "admin")


def test_users_with_one_password_do_not_share_a_hash(hashed: Any) -> None:
    assert hashed("test12", "admin") != hashed("test12", "monitor")


def test_another_password_brings_another_salt(hashed: Any) -> None:
    assert hashed("test12", "admin")[:5] != hashed("test13", "admin")[:5]


@pytest.mark.parametrize(
    ("memory", "size"),
    [(512 << 20, 32 << 20), (1 << 30, 64 << 20), (8 << 30, 512 << 20), (64 << 30, 512 << 20)],
)
def test_the_write_ahead_log_is_a_share_of_the_memory_for_every_version(
    filters: Any, memory: int, size: int
) -> None:
    # Until 4.2 the quorum queues take the value of ra, since 4.3 that of rabbit.
    words = filters["rabbitmq_erlang_args"](memory).split()
    assert words == [
        *("-ra", "wal_max_size_bytes", str(size)),
        *("-rabbit", "quorum_wal_max_size_bytes", str(size)),
    ]


WANTED: dict[str, Any] = {
    "users": [{"name": "monitor", "password_hash": "aGFzaA==", "tags": ["monitoring"]}],
    "vhosts": [{"name": "/"}],
    "permissions": [{"user": "monitor", "vhost": "/", "read": "^$"}],
    "queues": [{"name": "takeaway", "vhost": "/", "arguments": {"x-queue-type": "quorum"}}],
    "bindings": [{"source": "in", "vhost": "/", "destination": "takeaway", "arguments": {}}],
}
NAMES = ["users monitor", "vhosts /", "permissions monitor", "queues takeaway", "bindings takeaway"]


@pytest.fixture
def found() -> Any:
    """What a broker answers that has all of WANTED, and more."""
    answer = copy.deepcopy(WANTED) | {"rabbitmq_version": "4.0.5", "parameters": []}
    answer["users"][0]["limits"] = {}
    answer["queues"].insert(0, {"name": "another", "vhost": "/"})
    return answer


def test_nothing_is_missing_where_all_is_there(filters: Any, found: Any) -> None:
    found["queues"][1]["arguments"] = {"x-queue-type": "classic"}
    assert filters["rabbitmq_missing"](WANTED, found) == []


def test_a_policy_of_an_older_version_is_missing_and_its_queue_without_arguments_is_not(
    filters: Any, found: Any
) -> None:
    wanted = WANTED | {"policies": [{"name": "dead-letter", "vhost": "/", "priority": 1000}]}
    found["policies"] = [{"name": "dead-letter", "vhost": "/", "priority": 0}]
    found["queues"][1]["arguments"] = {}
    assert filters["rabbitmq_missing"](wanted, found) == ["policies dead-letter"]


def test_a_broker_that_tells_nothing_lacks_all(filters: Any) -> None:
    assert filters["rabbitmq_missing"](WANTED, {}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_was_removed_is_missing(filters: Any, found: Any, name: str) -> None:
    found[name.split()[0]].pop()
    assert filters["rabbitmq_missing"](WANTED, found) == [name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("users monitor", {"password_hash": "b3RoZXI="}),
        ("users monitor", {"tags": []}),
        ("permissions monitor", {"read": ".*"}),
        ("queues takeaway", {"vhost": "another"}),
    ],
)
def test_what_was_changed_is_missing(
    filters: Any, found: Any, name: str, change: dict[str, Any]
) -> None:
    found[name.split()[0]][-1] |= change
    assert filters["rabbitmq_missing"](WANTED, found) == [name]
