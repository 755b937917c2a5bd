"""What Broker promises, with a stub for pika's channel and connection; no network."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gevent
import pytest
from door import BrokerUnavailable
from gevent import Greenlet
from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError
from pika.spec import Basic, BasicProperties
from subscriber.broker import Broker, Delivery, Settings


class Connection:
    def __init__(self) -> None:
        self.cut_because: Exception | None = None

    def _terminate_stream(self, reason: Exception) -> None:
        self.cut_because = reason


class Channel:
    """Keeps what Broker sends; the test answers in the broker's place."""

    def __init__(self) -> None:
        self.connection = Connection()
        self.gets = 0
        self.acked: list[int] = []
        self.broken = False
        self._on_message: Callable[..., None] | None = None
        self._tag = 0

    def add_callback(self, callback: Any, replies: Any, one_shot: bool) -> None:
        assert replies == [Basic.GetEmpty]
        assert not one_shot
        self._on_empty = callback

    def add_on_close_callback(self, callback: Any) -> None:
        self.on_close = callback

    def basic_get(self, queue: str, callback: Callable[..., None]) -> None:
        assert queue == "takeaway"
        assert self._on_message is None, "pika allows one outstanding basic.get"
        if self.broken:
            raise ChannelWrongStateError("closed")
        self._on_message = callback
        self.gets += 1

    def basic_ack(self, tag: int) -> None:
        if self.broken:
            raise ChannelWrongStateError("closed")
        self.acked.append(tag)

    def answer(self, body: bytes) -> None:
        assert self._on_message is not None, "nothing was asked"
        callback, self._on_message = self._on_message, None
        self._tag += 1
        properties = BasicProperties(message_id=f"id-{self._tag}")  # type: ignore[no-untyped-call]
        callback(self, Basic.GetOk(delivery_tag=self._tag), properties, body)

    def answer_empty(self) -> None:
        self._on_message = None
        self._on_empty(None)


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def broker(channel: Channel) -> Iterator[Broker]:
    broker = Broker(Settings())
    broker.opened(channel)
    yield broker
    broker.lost("the test is over")


def ask(broker: Broker) -> Greenlet:
    """Start a request; on return it waits or has its answer."""
    request = gevent.spawn(broker.get)
    gevent.idle()
    return request


def result(request: Greenlet) -> Delivery | None:
    return request.get(timeout=2)


def body(request: Greenlet) -> bytes | None:
    delivery = result(request)
    return delivery and delivery.body


def take(broker: Broker, channel: Channel, text: bytes) -> Delivery:
    request = ask(broker)
    channel.answer(text)
    delivery = result(request)
    assert delivery is not None
    return delivery


def impatient(broker: Broker) -> Broker:
    broker._settings = replace(broker._settings, receive_timeout=0.02)
    return broker


def test_requests_get_messages_in_the_order_of_asking(broker: Broker, channel: Channel) -> None:
    requests = [ask(broker) for _ in range(3)]
    for text in b"a", b"b", b"c":
        channel.answer(text)
    assert [body(request) for request in requests] == [b"a", b"b", b"c"]
    assert channel.gets == 3


def test_one_empty_answer_serves_all_who_waited_when_it_was_asked(
    broker: Broker, channel: Channel
) -> None:
    first = ask(broker)
    early = [ask(broker), ask(broker)]
    channel.answer_empty()
    assert result(first) is None
    channel.answer_empty()
    assert [result(request) for request in early] == [None, None]
    assert channel.gets == 2


def test_a_request_is_not_told_empty_by_an_answer_to_an_earlier_question(
    broker: Broker, channel: Channel
) -> None:
    early, late = ask(broker), ask(broker)
    channel.answer_empty()
    assert result(early) is None
    assert not late.ready()
    channel.answer(b"new")
    assert body(late) == b"new"


def test_released_messages_go_first_and_sorted(broker: Broker, channel: Channel) -> None:
    a, b, c = (take(broker, channel, text) for text in (b"a", b"b", b"c"))
    for delivery in b, c, a:
        broker.release(delivery)
    assert [body(ask(broker)) for _ in range(3)] == [b"a", b"b", b"c"]
    assert channel.gets == 3, "a held message needs no basic.get"


def test_a_message_released_while_a_request_waits_goes_to_it_instead_of_empty(
    broker: Broker, channel: Channel
) -> None:
    delivery = take(broker, channel, b"a")
    waiting = ask(broker)
    broker.release(delivery)
    channel.answer_empty()
    assert body(waiting) == b"a"


def test_a_message_that_comes_for_a_request_served_otherwise_is_held(
    broker: Broker, channel: Channel
) -> None:
    delivery = take(broker, channel, b"a")
    waiting = ask(broker)
    broker.release(delivery)
    channel.answer(b"b")
    assert body(waiting) == b"a"
    assert body(ask(broker)) == b"b"


def test_a_message_that_comes_for_a_request_that_gave_up_is_held(
    broker: Broker, channel: Channel
) -> None:
    quitter = ask(impatient(broker))
    broker._settings = Settings()  # its wait was short, the broker's silence is not yet long
    with pytest.raises(BrokerUnavailable):
        result(quitter)
    channel.answer(b"a")
    assert body(ask(broker)) == b"a"
    assert channel.gets == 1


def test_a_silent_broker_is_given_up_and_fails_every_request(
    broker: Broker, channel: Channel
) -> None:
    requests = [gevent.spawn(impatient(broker).get) for _ in range(100)]
    for request in requests:
        with pytest.raises(BrokerUnavailable):
            result(request)
    assert not broker.up
    assert channel.connection.cut_because is not None


def test_a_lost_connection_fails_who_waits_and_then_everybody_at_once(
    broker: Broker, channel: Channel
) -> None:
    requests = [ask(broker), ask(broker)]
    broker.lost("gone")
    for request in requests:
        with pytest.raises(BrokerUnavailable, match="gone"):
            result(request)
    with pytest.raises(BrokerUnavailable):
        broker.get()
    assert channel.gets == 1


def test_a_delivery_of_a_lost_connection_is_neither_acknowledged_nor_held(
    broker: Broker, channel: Channel
) -> None:
    written, unwritten, held = (take(broker, channel, text) for text in (b"a", b"b", b"c"))
    broker.release(held)
    broker.lost("gone")
    renewed = Channel()
    broker.opened(renewed)
    broker.ack(written)
    broker.release(unwritten)
    request = ask(broker)
    assert renewed.gets == 1, "nothing old is held"
    renewed.answer(b"a")
    assert body(request) == b"a"
    assert channel.acked == renewed.acked == []


def test_an_acknowledgement_names_its_own_message(broker: Broker, channel: Channel) -> None:
    take(broker, channel, b"a")
    broker.ack(take(broker, channel, b"b"))
    assert channel.acked == [2]


def test_a_channel_that_cannot_be_written_to_is_given_up(broker: Broker, channel: Channel) -> None:
    channel.broken = True
    with pytest.raises(BrokerUnavailable):
        result(ask(broker))
    assert isinstance(channel.connection.cut_because, ChannelWrongStateError)


def test_a_missing_queue_is_the_reason_that_requests_get(broker: Broker, channel: Channel) -> None:
    request = ask(broker)
    channel.on_close(channel, ChannelClosedByBroker(404, "no queue"))
    with pytest.raises(BrokerUnavailable, match="no queue"):
        result(request)
    assert not broker.up
    assert channel.connection.cut_because is not None


def test_any_exception_while_connecting_is_followed_by_another_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subscriber.broker.FIRST_RETRY", 0.001)
    broker = Broker(Settings())
    attempts = iter([OSError("no such host"), RuntimeError("a bug"), None])

    def attempt() -> Exception:
        error = next(attempts)
        if error:
            raise error
        broker._stopping = True
        return OSError("the end")

    monkeypatch.setattr(broker, "_hold_connection", attempt)
    broker.start()
    assert broker._keeper is not None
    broker._keeper.get(timeout=2)
    assert next(attempts, "none left") == "none left"
