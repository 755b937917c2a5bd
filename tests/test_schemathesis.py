"""The doors answer as their descriptions say, whatever they are asked."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import pytest
import schemathesis
from door import BrokerUnavailable
from door.access import RIGHTS
from door.memory import Memory
from flask import Flask
from pika.spec import BasicProperties
from publisher.app import create_app as create_publisher
from publisher.broker import Unconfirmed
from publisher.message import Message, Target
from publisher.settings import Settings as PublisherSettings
from subscriber.app import create_app as create_subscriber
from subscriber.delivery import Delivery
from subscriber.settings import Settings as SubscriberSettings

# What the fakes decide. Each request seeds it, so that one that failed fails again.
CHANCE = Random()
LOGIN = {"Authorization": "Bearer secret"}

BODIES = [b"", b"hello\n", "\u2603\0".encode(), b"\xff\0", b"x" * 1000]
TEXTS = [None, "", "text/plain", b"\xff"]
HEADERS: list[Mapping[Any, Any] | None] = [
    None,
    {"X-Request-Id": "mine", "X-Name": "\u2603"},
    {"list": [1, 2.5, True, None, {b"\xff": b"\xff"}]},
]

# Every check is on; these say which answers are no finding.
CHECKS = {
    # The broker is away now and then.
    "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]},
    # A receipt that was made up is gone, and so is a queue; another is for other clients.
    "positive_data_acceptance": {"expected-statuses": ["2xx", "403", "404", "410", "503"]},
    "negative_data_rejection": {"expected-statuses": ["400", "403", "404", "413", "415", "503"]},
}
# What is put into a path: names that are served, and one that is not.
NAMES = {"Queue": ["takeaway", "orders", "nowhere"], "Topic": ["events", "nowhere"]}
FOLDER = Path(mkdtemp())


class Publishing:
    """A broker to publish to."""

    @property
    def up(self) -> bool:
        return CHANCE.random() < 0.5

    def publish(self, messages: Sequence[Message], target: Target) -> int:
        if CHANCE.random() < 0.1:
            raise Unconfirmed("The broker is away.", CHANCE.randrange(len(messages)))
        return CHANCE.choice((0, len(messages))) if target.topic else 0


class Queue:
    """A broker to receive from; what waits there, alive or dead, is a matter of chance."""

    channel: Any = None

    def __init__(self, *_: object) -> None:
        self.tags = 0
        self.unsettled: set[int] = set()

    @property
    def up(self) -> bool:
        return CHANCE.random() < 0.5

    def queue(self, _name: str) -> "Queue":
        return self

    def get(self, want: int = 1, *_: object, **__: object) -> list[Delivery]:
        if CHANCE.random() < 0.1:
            raise BrokerUnavailable("The broker is away.")
        return [self.message() for _ in range(min(want, CHANCE.randrange(4)))]

    look = peek = get

    def redrive(self, most: int) -> int:
        return len(self.get(most))

    def redrive_ids(self, ids: Set[str]) -> int:
        return len(self.get(len(ids)))

    delete_ids = redrive_ids

    def purge(self) -> int:
        return len(self.get(9))

    def message(self) -> Delivery:
        self.tags += 1
        self.unsettled.add(self.tags)
        properties = BasicProperties(
            message_id=CHANCE.choice(TEXTS),
            content_type=CHANCE.choice(TEXTS),
            headers=CHANCE.choice(HEADERS),
        )
        again = CHANCE.random() < 0.5
        return Delivery(self.tags, CHANCE.choice(BODIES), properties, self.channel, again)

    def holds(self, delivery: Delivery) -> bool:
        return delivery.tag in self.unsettled

    def ack(self, deliveries: Sequence[Delivery], requeue: bool = True) -> None:  # noqa: ARG002
        self.unsettled -= {one.tag for one in deliveries}

    release = reject = ack


class Overview:
    """What is told of the queues is a matter of chance."""

    def __init__(self, *_: object) -> None:
        pass

    def tell(self, names: Iterable[str]) -> list[dict[str, object]]:
        if CHANCE.random() < 0.1:
            raise BrokerUnavailable("The management API is away.")
        counts = dict.fromkeys(("ready", "unacknowledged", "dead"), CHANCE.choice((None, 0, 7)))
        told = {"oldest": CHANCE.choice((None, 0, 7.5))}
        told |= {"rates": {"in": CHANCE.choice((0, 0.5)), "out": 0}}
        return [{"name": name, **counts, **told} for name in names]


@pytest.fixture(scope="module", autouse=True)
def _dead_by_chance() -> Iterator[None]:
    """Let the doors, which make it for the first request to a queue, have a fake dead queue."""
    with mock.patch("subscriber.app.Dead", Queue):
        yield


def door(name: str, *accepted: str) -> Flask:
    """Return a door that takes these tokens, or anybody, with a fake in the broker's place."""
    queues = FOLDER / f"{bool(accepted)}.json"
    tokens = [sha256(token.encode()).hexdigest() for token in accepted]
    client = {"name": "me", "tokens": tokens, **{one: ["takeaway", "events"] for one in RIGHTS}}
    lists = {
        "queues": ["takeaway", "orders"],
        "topics": ["events"],
        "clients": [client] if accepted else [],
    }
    queues.write_text(json.dumps(lists))
    if name == "publisher":
        settings = PublisherSettings(queues_file=queues)
        return create_publisher(settings, Publishing())
    broker: Any = Queue()
    with mock.patch("subscriber.app.Overview", Overview):
        return create_subscriber(broker, SubscriberSettings(queues_file=queues), Memory(2**40))


def described(name: str, examples: int, *accepted: str) -> schemathesis.BaseSchema:
    """Return what a door says of itself, to be tried with examples besides the bounds."""
    generation = {"deterministic": True, "max-examples": examples, "database": "none"}
    config = schemathesis.Config.from_dict({"seed": 1, "generation": generation, "checks": CHECKS})
    app = door(name, *accepted)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app, config=config, headers=LOGIN)
    for place, names in NAMES.items():
        if place in schema.raw_schema["components"]["parameters"]:
            schema.raw_schema["components"]["parameters"][place]["schema"]["enum"] = names
    if accepted:
        # Of this door, credentials are no option.
        schema.raw_schema["security"].remove({})
    return schema


@schemathesis.serializer("application/x-ndjson")
def as_lines(_context: object, value: object) -> bytes:
    """Write an array as lines, and what is no array as what is no JSON."""
    if isinstance(value, list):
        return b"".join(json.dumps(one).encode() + b"\n" for one in value)
    return f"<{value}>".encode()


@schemathesis.deserializer("application/x-ndjson")
def from_lines(_context: object, response: schemathesis.Response) -> list[Any]:
    *lines, end = response.content.split(b"\n")
    assert end == b""
    return [json.loads(line) for line in lines]


def described_exactly(
    _context: object, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check what holds for each answer, and that none of a route hides behind its 4XX."""
    assert response.headers["x-request-id"]
    if response.status_code >= 400 and case.path != "/healthz":
        assert response.headers["content-type"] == ["application/json"]
        assert isinstance(json.loads(response.content)["message"], str)
    if case.method.lower() == case.operation.method:
        assert str(response.status_code) in case.operation.definition.raw["responses"]


def receive_some(case: schemathesis.Case) -> list[str]:
    """Return the receipts of a few messages, or of none."""
    client = case.operation.app.test_client()
    answer = client.get("/receive?ack=manual&max=3", headers=LOGIN)
    lines = answer.data.splitlines() if answer.status_code == 200 else []
    return [json.loads(line)["receipt"] for line in lines]


def make_possible(case: schemathesis.Case) -> None:
    """Change what no schema can exclude: a name that is not the path's, and ids with a number."""
    if "confirm" in case.query:
        case.query["confirm"] = case.path_parameters["queue"]
    if case.path.endswith("/redrive") and isinstance(case.body, dict):
        case.query.pop("max", None)


@schemathesis.pytest.parametrize(
    publisher=described("publisher", 30),
    subscriber=described("subscriber", 30),
    guarded_publisher=described("publisher", 5, "secret"),
    guarded_subscriber=described("subscriber", 5, "secret"),
)
def test_a_door_answers_as_it_says(case: schemathesis.Case) -> None:
    asked = [case.method, case.path, case.query, dict(case.headers), case.body]
    CHANCE.seed(json.dumps(asked, default=lambda one: type(one).__name__))
    takes_receipts = case.path.endswith(("/ack", "/reject", "/extend"))
    if takes_receipts and case.meta.generation.mode.is_positive and CHANCE.random() < 0.5:
        if "queue" in case.path_parameters:
            case.path_parameters["queue"] = "takeaway"
        case.body = {"receipts": receive_some(case)}
    if case.meta.generation.mode.is_positive:
        make_possible(case)
    case.call_and_validate(headers=LOGIN, additional_checks=[described_exactly])


@pytest.mark.parametrize("name", ["publisher", "subscriber"])
def test_a_door_describes_its_routes_and_no_others(name: str) -> None:
    app = door(name)
    paths = app.test_client().get("/openapi.json").get_json()["paths"]
    told = {
        (path, method.upper())
        for path, item in paths.items()
        for method in item.keys() - {"parameters"}
    }
    # HEAD and OPTIONS are Flask's.
    served = {
        (rule.rule.replace("<", "{").replace(">", "}"), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert told == served


def test_what_the_doors_share_they_describe_alike() -> None:
    one, other = (
        {"paths": told["paths"], **told["components"]}
        for told in (
            door(name).test_client().get("/openapi.json").get_json()
            for name in ("publisher", "subscriber")
        )
    )
    for kind in one.keys() & other.keys():
        shared = (one[kind].keys() & other[kind].keys()) - {"/", "/queues/{queue}/messages"}
        assert shared
        assert {name: one[kind][name] for name in shared} == {
            name: other[kind][name] for name in shared
        }
