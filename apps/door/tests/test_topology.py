import json
import logging
import time
from hashlib import sha256
from pathlib import Path

import pytest
from common.environment import ConfigError
from door import topology
from door.topology import Topology
from werkzeug.exceptions import NotFound

TWO = '{"queues": ["takeaway", "orders"], "topics": ["events"]}'


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "LOOK", 0)


def replace(path: Path, text: str) -> None:
    """Write path anew as Ansible does: under another name, then renamed."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "queues.json"
    file.write_text(TWO)
    return file


def test_without_a_file_there_is_the_default_queue_alone() -> None:
    alone = Topology("takeaway")
    assert (alone.queue(""), alone.queue("takeaway")) == ("takeaway", "takeaway")
    with pytest.raises(NotFound, match="There is no queue 'orders'"):
        alone.queue("orders")
    with pytest.raises(NotFound, match="There is no topic 'takeaway'"):
        alone.topic("takeaway")


def test_the_file_names_queues_and_topics(path: Path) -> None:
    both = Topology("takeaway", path)
    assert (both.queue("orders"), both.topic("events")) == ("orders", "events")
    assert both.queues == {"takeaway", "orders"}
    with pytest.raises(NotFound):
        both.queue("events")


def test_a_replaced_file_is_read_again(path: Path) -> None:
    changing = Topology("takeaway", path)
    replace(path, '{"queues": ["takeaway", "new"], "topics": []}')
    assert changing.queue("new") == "new"
    for gone in lambda: changing.queue("orders"), lambda: changing.topic("events"):
        with pytest.raises(NotFound):
            gone()


CLIENT = {"name": "me", "tokens": [], "send": [], "receive": [], "manage": []}
ORIGINS = ["https://app.example.com"]
READERS = [{"name": "prometheus", "tokens": [sha256(b"secret").hexdigest()]}]


def test_the_file_names_who_sees_metrics_and_whose_pages_come(path: Path) -> None:
    told = {"queues": [], "topics": [], "readers": READERS, "origins": ORIGINS}
    replace(path, json.dumps({**told, "clients": [CLIENT]}))
    topology = Topology("takeaway", path)
    assert topology.lists.origins == set(ORIGINS)
    assert topology.lists.readers.client("Bearer secret")
    assert topology.lists.readers.client(None) is None
    replace(path, json.dumps({**told, "clients": []}))
    assert topology.lists.origins == frozenset(), "whoever has no clients has no pages"
    replace(path, json.dumps({"queues": [], "topics": []}))
    assert topology.lists.readers.client(None), "without readers everybody sees metrics"


def test_the_file_is_looked_at_once_in_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "LOOK", 60)
    changing = Topology("takeaway", path)
    assert changing.queue("orders") == "orders"
    replace(path, '{"queues": ["takeaway"], "topics": []}')
    assert changing.queue("orders") == "orders"
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(NotFound):
        changing.queue("orders")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"queues": ["a"]}',
        '{"queues": [1], "topics": []}',
        '{"queues": [], "topics": [], "origins": [1]}',
        '{"queues": [], "topics": [], "readers": [{}]}',
    ],
)
def test_a_bad_file_stops_the_start_and_later_changes_nothing(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    changing = Topology("takeaway", path)
    replace(path, text)
    with caplog.at_level(logging.WARNING):
        assert changing.queue("orders") == "orders"
    assert "stay as they are" in caplog.text
    with pytest.raises(ConfigError, match=r"QUEUES_FILE=.*queues\.json cannot be read"):
        Topology("takeaway", path)


def test_a_file_that_is_gone_changes_nothing(path: Path) -> None:
    changing = Topology("takeaway", path)
    path.unlink()
    assert changing.queue("orders") == "orders"
