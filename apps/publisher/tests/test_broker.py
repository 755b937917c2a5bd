# mypy: disable-error-code=no-untyped-call
"""The Broker's promises, with a stub for pika's connection and channel: every event at will."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from door.metrics import BROKER_UP
from gevent import Greenlet
from pika.exceptions import (
    ChannelClosedByBroker,
    ChannelWrongStateError,
    ConnectionWrongStateError,
    StreamLostError,
)
from pika.frame import Method, decode_frame
from pika.spec import FRAME_END_SIZE, FRAME_HEADER_SIZE, Basic, BasicProperties
from pika.spec import Connection as ConnectionMethods
from publisher.broker import MAX_FLUSH, WINDOW, Broker, Unconfirmed
from publisher.message import Message, Target
from publisher.settings import Settings

DEADLINE = 3  # seconds any promise may take


def frames(data: bytes) -> Iterator[Any]:
    """Read frames as pika does."""
    start = 0
    while start < len(data):
        size = FRAME_HEADER_SIZE + int.from_bytes(data[start + 3 : start + 7]) + FRAME_END_SIZE
        yield decode_frame(data[start : start + size])[1]
        start += size


class Connection:
    """Opens channels, unless it is slow, and closes those that publish to a missing exchange."""

    params = SimpleNamespace(frame_max=131072)

    def __init__(self) -> None:
        self.cut_because: Exception | None = None
        self.unwritten = 0
        # How many messages left in each piece, and the bodies of all.
        self.pieces: list[int] = []
        self.bodies: list[bytes] = []
        self.main = Channel(self)
        # The channel that is opened first, made beforehand.
        self.first = Channel(self)
        self.channels: list[Channel] = []
        self.slow = self.broken = False
        self.missing: set[str] = set()

    def channel(self, on_open_callback: Callable[[Any], None]) -> "Channel":
        if self.broken:
            raise ConnectionWrongStateError("closed")
        channel = Channel(self) if self.channels else self.first
        self.channels.append(channel)
        channel.on_open = on_open_callback
        if not self.slow:
            gevent.get_hub().loop.run_callback(channel.open)
        return channel

    def of(self, exchange: str) -> "Channel":
        """Return the newest channel that published to exchange, and to no other."""
        channel = [one for one in self.channels if any(exchange == m[0] for m in one.published)][-1]
        assert {message[0] for message in channel.published} == {exchange}
        return channel

    @contextmanager
    def joined(self) -> Iterator[None]:
        before = len(self.bodies)
        yield
        self.pieces.append(len(self.bodies) - before)

    def publish(self, channel: "Channel", data: bytes) -> None:
        found = list(frames(data))
        while found:
            method, header = found.pop(0).method, found.pop(0)
            body = b""
            while len(body) < header.body_size:
                body += found.pop(0).fragment
            channel.publish(method, body, header.properties)

    def add_on_connection_blocked_callback(self, callback: Any) -> None:
        self._blocked = callback

    def add_on_connection_unblocked_callback(self, callback: Any) -> None:
        self._unblocked = callback

    def cut(self, reason: Exception) -> None:
        self.cut_because = reason

    def block(self) -> None:
        self._blocked(self, Method(0, ConnectionMethods.Blocked("low on memory")))

    def unblock(self) -> None:
        self._unblocked(self, Method(0, ConnectionMethods.Unblocked()))


class Channel:
    """Keeps what Broker sends; the test answers in the broker's place."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel_number = 1
        self.published: list[tuple[str, str, bytes, BasicProperties, bool]] = []
        self.broken = self.closed = False

    def open(self) -> None:
        self.on_open(self)
        self.confirms_on(None)

    def add_on_close_callback(self, callback: Any) -> None:
        self._on_close = callback

    def add_on_return_callback(self, callback: Any) -> None:
        self._returned = callback

    def confirm_delivery(self, ack_nack_callback: Any, callback: Callable[[Any], None]) -> None:
        self._confirmed = ack_nack_callback
        self.confirms_on = callback

    def publish(self, method: Basic.Publish, body: bytes, properties: BasicProperties) -> None:
        if self.broken or self.closed:
            raise ChannelWrongStateError("closed")
        message = method.exchange, method.routing_key, body, properties, method.mandatory
        self.published.append(message)
        self.connection.bodies.append(body)
        if method.exchange in self.connection.missing:
            gevent.get_hub().loop.run_callback(self.refuse, f"no exchange '{method.exchange}'")

    def refuse(self, text: str, code: int = 404) -> None:
        """Close as the broker does, once."""
        if not self.closed:
            self.closed = True
            self._on_close(self, ChannelClosedByBroker(code, text))

    def close(self) -> None:
        if self.closed:
            raise ChannelWrongStateError("closed")
        self.closed = True

    @property
    def bodies(self) -> list[bytes]:
        return [message[2] for message in self.published]

    def ack(self, tag: int, multiple: bool = False) -> None:
        self._confirmed(Method(1, Basic.Ack(tag, multiple)))

    def nack(self, tag: int, multiple: bool = False) -> None:
        self._confirmed(Method(1, Basic.Nack(tag, multiple)))

    def return_(self, tag: int) -> None:
        exchange, key, body, properties, _ = self.published[tag - 1]
        self._returned(self, Basic.Return(312, "NO_ROUTE", exchange, key), properties, body)


def open_(broker: Broker) -> Channel:
    """Connect broker; return the channel that its first request will open."""
    connection = Connection()
    main: Any = connection.main
    broker.opened(main)
    assert broker.up
    return connection.first


Make = Callable[..., tuple[Broker, Channel]]
QUEUE = Target("takeaway-in", "takeaway")
TOPIC = Target("events", "order.created", topic=True)


@pytest.fixture
def make() -> Iterator[Make]:
    brokers = []

    def make(timeout: float = DEADLINE) -> tuple[Broker, Channel]:
        broker = Broker(Settings(confirm_timeout=timeout))
        brokers.append(broker)
        return broker, open_(broker)

    yield make
    for broker in brokers:
        broker.lost("the test is over")


def message(body: bytes) -> Message:
    return Message(body, f"id of {body[:20]!r}")


def send(broker: Broker, *bodies: bytes, to: Target = QUEUE) -> Greenlet:
    """Start a request that publishes bodies; on return all is sent or it has failed."""
    request = gevent.spawn(broker.publish, [message(body) for body in bodies], to)
    gevent.idle()
    return request


def done(*requests: Greenlet) -> bool:
    """Let requests end well; others raise."""
    for request in requests:
        assert not request.get(timeout=DEADLINE), "a topic dropped some"
    return True


def fails(request: Greenlet, match: str) -> int:
    """Let request fail with match, and return how many of its messages are certain."""
    with pytest.raises(Unconfirmed, match=match) as caught:
        request.get(timeout=DEADLINE)
    return caught.value.certain


def test_publish_returns_only_after_the_confirm(make: Make) -> None:
    broker, channel = make()
    full = Message(b"pizza", "mine", "image/png", {"X-Request-Id": "r", "X-Table": "7"})
    request = gevent.spawn(broker.publish, [full], QUEUE)
    gevent.idle()
    assert not request.ready()
    channel.ack(1)
    assert done(request)
    exchange, key, body, properties, mandatory = channel.published[0]
    assert (exchange, key, body, mandatory) == ("takeaway-in", "takeaway", b"pizza", True)
    assert (properties.message_id, properties.content_type) == ("mine", "image/png")
    assert properties.delivery_mode == 2
    assert properties.headers == {"X-Request-Id": "r", "X-Table": "7"}


def test_the_broker_vouches_for_the_name_of_a_client_and_only_then(make: Make) -> None:
    broker, channel = make()
    for headers in {"X-Client": "shop"}, {"X-Table": "7"}:
        gevent.spawn(broker.publish, [Message(b"", "id", headers=headers)], QUEUE)
        gevent.idle()
    users = [properties.user_id for _, _, _, properties, _ in channel.published]
    assert users == [Settings().broker.user, None]


def test_a_multiple_ack_confirms_all_up_to_it_and_no_more(make: Make) -> None:
    broker, channel = make()
    requests = [send(broker, b"%d" % number) for number in range(4)]
    channel.ack(3, multiple=True)
    assert done(*requests[:3])
    assert not requests[3].ready()
    channel.ack(4)
    assert done(requests[3])


def test_a_single_ack_confirms_its_own_message(make: Make) -> None:
    broker, channel = make()
    requests = [send(broker, b"%d" % number) for number in range(3)]
    channel.ack(2)
    assert done(requests[1])
    assert not requests[0].ready()
    channel.ack(3, multiple=True)
    assert done(*requests)


def test_nacked_messages_fail_and_no_other_does(make: Make) -> None:
    broker, channel = make()
    requests = [send(broker, b"%d" % number) for number in range(5)]
    channel.ack(1)
    channel.nack(3, multiple=True)
    channel.nack(4)
    channel.ack(5)
    for request in requests[1:4]:
        assert fails(request, "refused the message") == 0
    assert done(requests[0], requests[4])


@pytest.mark.parametrize("multiple", [False, True])
def test_a_returned_message_fails_though_acked_and_no_other_does(
    make: Make, multiple: bool
) -> None:
    broker, channel = make()
    requests = [send(broker, b"%d" % number) for number in range(3)]
    channel.return_(2)
    if multiple:
        channel.ack(3, multiple=True)
    else:
        for tag in 3, 2, 1:
            channel.ack(tag)
    assert fails(requests[1], r"no queue.*312 NO_ROUTE") == 0
    assert done(requests[0], requests[2])


def test_of_messages_with_one_id_on_their_way_all_count_as_returned_and_no_later_one(
    make: Make,
) -> None:
    broker, channel = make()
    requests = [send(broker, b"twin"), send(broker, b"twin")]
    channel.return_(2)
    channel.ack(2, multiple=True)
    for request in requests:
        fails(request, "no queue")
    later = send(broker, b"twin")
    channel.ack(3)
    assert done(later)
    assert not broker._outlets[QUEUE.exchange]._returned, "nothing is remembered for ever"


def test_a_topic_drops_what_no_queue_takes_and_confirms_the_rest(make: Make) -> None:
    broker, channel = make()
    some, none = send(broker, b"1", b"2", b"3", to=TOPIC), send(broker, b"4", to=TOPIC)
    for tag in 2, 4:
        channel.return_(tag)
    channel.ack(4, multiple=True)
    assert (some.get(timeout=DEADLINE), none.get(timeout=DEADLINE)) == (1, 1)
    assert {message[:2] for message in channel.published} == {("events", "order.created")}


def test_what_a_topic_drops_is_no_other_target_s(make: Make) -> None:
    broker, channel = make()
    dropped, queued = send(broker, b"twin", to=TOPIC), send(broker, b"twin")
    other = send(broker, b"twin", to=TOPIC._replace(key="order.paid"))
    channel.return_(1)
    channel.connection.of("takeaway-in").ack(1)
    channel.ack(2, multiple=True)
    assert dropped.get(timeout=DEADLINE) == 1
    assert done(queued, other)


def test_a_nack_fails_a_topic_s_message_as_a_queue_s(make: Make) -> None:
    broker, channel = make()
    request = send(broker, b"1", to=TOPIC)
    channel.nack(1)
    fails(request, "refused the message")


def test_a_returned_message_s_second_attempt_does_not_fail_for_the_first(make: Make) -> None:
    broker, channel = make()
    slow = send(broker, b"slow")
    first = send(broker, b"again")
    channel.return_(2)
    channel.ack(2)
    fails(first, "no queue")
    second = send(broker, b"again")
    channel.ack(3)
    assert done(second)
    channel.ack(1)
    assert done(slow)


def test_publish_fails_at_once_while_not_connected(make: Make) -> None:
    broker, channel = make()
    broker.lost("gone")
    for one in broker, Broker(Settings()):
        assert not one.up
        assert fails(send(one, b"pizza"), r"not connected.*not published") == 0
    assert channel.bodies == []


def test_a_lost_connection_fails_who_waits_and_the_next_one_starts_anew(make: Make) -> None:
    broker, first = make()
    kept, lost = send(broker, b"kept"), send(broker, b"lost")
    first.ack(1)
    assert done(kept)
    broker.lost(StreamLostError("reset by peer"))
    fails(lost, "lost.*unknown")
    second = open_(broker)
    again = send(broker, b"pizza")
    second.ack(1, multiple=True)  # its tags start anew
    assert done(again)
    assert (first.bodies, second.bodies) == ([b"kept", b"lost"], [b"pizza"])


def test_a_message_that_was_not_sent_before_the_loss_is_sent_by_nobody(make: Make) -> None:
    broker, first = make()
    before = send(broker, b"before")
    first.ack(1)
    assert done(before)
    second = []

    def renew() -> None:
        broker.lost(StreamLostError("reset by peer"))
        second.append(open_(broker))

    request = gevent.spawn(broker.publish, [message(b"unlucky")], QUEUE)
    gevent.spawn(renew)  # before the flush, which is due in the same turn of the loop
    fails(request, "lost.*not published")
    again = send(broker, b"pizza")
    second[0].ack(1)
    assert done(again)
    assert (first.bodies, second[0].bodies) == ([b"before"], [b"pizza"])


def test_a_channel_that_cannot_be_written_to_is_given_up(make: Make) -> None:
    broker, channel = make()
    channel.broken = True
    requests = [gevent.spawn(broker.publish, [message(b"pizza")], QUEUE) for _ in range(3)]
    for request in requests:
        fails(request, "lost")
    assert isinstance(channel.connection.cut_because, ChannelWrongStateError)
    assert not broker.up


def test_a_blocking_broker_fails_who_waits_and_who_comes_until_it_unblocks(make: Make) -> None:
    broker, channel = make()
    waiting = send(broker, b"waiting")
    channel.connection.block()
    fails(waiting, "blocks.*unknown")
    assert not broker.up
    assert BROKER_UP._value.get() == 0
    fails(send(broker, b"coming"), r"blocks.*not published")
    channel.connection.unblock()
    assert broker.up
    assert BROKER_UP._value.get() == 1
    again = send(broker, b"pizza")
    channel.ack(2, multiple=True)  # the late confirm of the first one with it
    assert done(again)
    assert channel.bodies == [b"waiting", b"pizza"]
    assert channel.connection.cut_because is None


def test_a_new_connection_is_not_blocked_by_what_the_lost_one_was_told(make: Make) -> None:
    broker, channel = make()
    channel.connection.block()
    broker.lost("gone")
    channel = open_(broker)
    request = send(broker, b"pizza")
    channel.ack(1)
    assert done(request)


def test_an_unblocked_broker_that_is_away_is_not_up(make: Make) -> None:
    broker, channel = make()
    channel.connection.block()
    broker.lost("gone")
    channel.connection.unblock()
    assert not broker.up
    assert BROKER_UP._value.get() == 0


def test_a_message_whose_request_gave_up_is_not_sent_later(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, channel = make(timeout=0.05)
    with monkeypatch.context() as stalled:
        stalled.setattr(broker, "_flush_soon", lambda: None)
        late = send(broker, b"late")
        broker.alive()  # as a confirm of another one: not silent
        fails(late, r"no confirm in 0\.05 s.*not published")
    last = send(broker, b"last")
    channel.ack(1)
    assert done(last)
    assert channel.bodies == [b"last"]
    assert channel.connection.cut_because is None


def test_a_silent_connection_fails_all_at_the_first_time_out_and_is_renewed(make: Make) -> None:
    broker, channel = make(timeout=0.4)
    first = send(broker, b"first")
    gevent.sleep(0.1)
    second = send(broker, b"second")
    fails(first, r"no confirm.*unknown")
    fails(second, r"was lost.*unknown")
    assert "no confirm" in str(channel.connection.cut_because)
    fails(send(broker, b"next"), "not connected")


def test_a_time_out_while_others_are_confirmed_keeps_the_connection(make: Make) -> None:
    broker, channel = make(timeout=0.1)
    slow, fast = send(broker, b"slow"), send(broker, b"fast")
    channel.ack(2)
    assert done(fast)
    fails(slow, r"no confirm in 0\.1 s")
    assert broker.up
    assert channel.connection.cut_because is None


def test_a_confirm_that_nobody_waits_for_does_no_harm(make: Make) -> None:
    broker, channel = make()
    first = send(broker, b"first")
    channel.ack(1)
    channel.ack(7)
    channel.nack(8, multiple=True)
    request = send(broker, b"pizza")
    channel.ack(2)
    channel.ack(2)
    assert done(first, request)


def test_the_requests_of_one_turn_leave_in_one_piece_and_in_their_order(make: Make) -> None:
    broker, channel = make()
    requests = [gevent.spawn(broker.publish, [message(b"%d" % one)], QUEUE) for one in range(10)]
    gevent.idle()
    assert channel.bodies == [b"%d" % one for one in range(10)]
    assert channel.connection.pieces == [10]
    channel.ack(10, multiple=True)
    assert done(*requests)


def confirm_all(channel: Channel) -> None:
    """Confirm what is sent until nothing more is."""
    sent = -1
    while sent != len(channel.published):
        sent = len(channel.published)
        channel.ack(sent, multiple=True)
        gevent.idle()


def test_a_large_batch_leaves_in_order_and_in_pieces_between_which_others_run(make: Make) -> None:
    broker, channel = make()
    bodies = [b"%d" % number for number in range(3 * MAX_FLUSH)]
    request = gevent.spawn(broker.publish, [message(body) for body in bodies], QUEUE)
    while not channel.published:
        gevent.sleep(0)
    assert len(channel.published) == MAX_FLUSH, "others run before the rest is sent"
    behind = send(broker, b"behind")
    confirm_all(channel)
    assert done(request, behind)
    # One flush was due already when it came.
    assert channel.bodies.index(b"behind") in (MAX_FLUSH, 2 * MAX_FLUSH)
    assert [body for body in channel.bodies if body != b"behind"] == bodies
    assert max(channel.connection.pieces) == MAX_FLUSH


def test_batches_delay_a_message_of_another_by_at_most_one_flush(make: Make) -> None:
    broker, channel = make()
    opener = send(broker, b"opener")
    pieces = channel.connection.pieces
    came: dict[bytes, int] = {}

    def single(body: bytes) -> None:
        came[body] = len(pieces)
        broker.publish([message(body)], QUEUE)

    batch = [message(b"")] * 12 * MAX_FLUSH
    requests = [gevent.spawn(broker.publish, batch, QUEUE) for _ in range(6)]
    while not all(request.ready() for request in requests[:6]):
        assert len(pieces) < 1000
        requests.append(gevent.spawn(single, b"single %d" % len(requests)))
        gevent.sleep(0)
        channel.ack(len(channel.published), multiple=True)
    confirm_all(channel)
    assert done(opener, *requests)
    sent, start = {}, 0
    for number, size in enumerate(pieces):
        sent.update(dict.fromkeys(channel.bodies[start : start + size], number))
        start += size
    assert len(came) > 50
    assert {body: sent[body] for body in came} == came


@pytest.mark.parametrize(
    ("new", "body"), [(600, b"single"), (5, b"x" * 2_000_000)], ids=["many", "large"]
)
def test_batches_go_on_while_new_messages_fill_every_flush(
    make: Make, new: int, body: bytes
) -> None:
    broker, channel = make()
    batch = gevent.spawn(broker.publish, [message(b"")] * 2 * MAX_FLUSH, QUEUE)
    gevent.sleep(0)
    singles: list[Greenlet] = []
    while not batch.ready():
        assert len(channel.connection.pieces) < 10
        singles += [gevent.spawn(broker.publish, [message(body)], QUEUE) for _ in range(new)]
        gevent.sleep(0)
        channel.ack(len(channel.published), multiple=True)
    confirm_all(channel)
    assert done(batch, *singles)


@pytest.mark.parametrize(
    ("bodies", "least", "most"),
    [
        ([b""] * 5 * WINDOW, WINDOW, WINDOW),
        ([b"x" * 1_000_000] * 20, 8, 9),
        # Larger than every bound, and sent all the same.
        ([b"x" * 16_000_000] * 3, 1, 1),
    ],
    ids=["messages", "bytes", "largest"],
)
def test_so_much_and_no_more_waits_for_confirms(
    make: Make, bodies: list[bytes], least: int, most: int
) -> None:
    broker, channel = make()
    request = send(broker, *bodies)
    assert least <= len(channel.published) <= most
    channel.ack(1)
    gevent.idle()
    assert least + 1 <= len(channel.published) <= most + 1, "each confirm makes room"
    confirm_all(channel)
    assert done(request)
    assert channel.bodies == bodies


def test_nothing_is_written_while_the_broker_does_not_read(make: Make) -> None:
    broker, channel = make()
    first = send(broker, b"first")
    channel.connection.unwritten = 2 * 1024 * 1024
    second = send(broker, b"second")
    assert channel.bodies == [b"first"]
    channel.connection.unwritten = 0
    channel.ack(1)
    gevent.idle()
    channel.ack(2)
    assert done(first, second)


def test_what_waits_for_its_turn_counts_as_not_published_when_the_broker_is_silent(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.WINDOW", 2)
    broker, channel = make(timeout=0.3)
    first, behind = send(broker, b"1", b"2"), send(broker, b"3")
    fails(first, "no confirm.*unknown")
    fails(behind, "lost.*not published")
    assert channel.bodies == [b"1", b"2"]


def test_a_batch_whose_sent_part_is_confirmed_tells_that_the_rest_was_not_published(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.WINDOW", 2)
    broker, channel = make()
    request = send(broker, b"1", b"2", b"3")
    channel.connection.unwritten = 2 * 1024 * 1024
    channel.ack(2, multiple=True)
    gevent.idle()
    channel.connection.block()
    assert fails(request, "blocks.*not published") == 2


Do = Callable[[Broker, Channel], None]


def lose(broker: Broker, _channel: Channel) -> None:
    broker.lost(StreamLostError("reset by peer"))


def block(_broker: Broker, channel: Channel) -> None:
    channel.connection.block()


def ack(tag: int, multiple: bool = False) -> Do:
    return lambda _, channel: channel.ack(tag, multiple)


def nack(tag: int, multiple: bool = False) -> Do:
    return lambda _, channel: channel.nack(tag, multiple)


def return_(tag: int) -> Do:
    return lambda _, channel: channel.return_(tag)


@pytest.mark.parametrize(
    ("events", "reason", "certain"),
    [
        ([lose], "lost.*unknown", 0),
        ([ack(1), ack(2), lose], "lost.*unknown", 2),
        ([ack(2, multiple=True), ack(4), lose], "lost.*unknown", 2),
        ([ack(5), ack(4), ack(3), ack(2), lose], "lost.*unknown", 0),
        ([ack(4, multiple=True), lose], "lost.*unknown", 4),
        ([ack(3), block], "blocks.*unknown", 0),
        ([ack(1), block], "blocks.*unknown", 1),
        ([ack(2, multiple=True), nack(3), ack(5, multiple=True)], "refused", 2),
        ([nack(1), ack(5, multiple=True)], "refused", 0),
        ([ack(4, multiple=True), nack(5)], "refused", 4),
        ([ack(1), nack(5, multiple=True)], "refused", 1),
        ([return_(2), ack(5, multiple=True)], "no queue", 1),
        ([return_(2), nack(1), ack(5, multiple=True)], "refused", 0),
        ([ack(1), nack(2), lose], "refused", 1),
    ],
)
def test_a_failed_batch_tells_how_many_of_its_first_messages_are_certain(
    make: Make, events: list[Do], reason: str, certain: int
) -> None:
    broker, channel = make()
    request = send(broker, *(b"%d" % number for number in range(5)))
    for event in events:
        assert not request.ready()
        event(broker, channel)
    assert fails(request, reason) == certain


def test_the_rest_of_a_batch_that_failed_is_not_sent(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.MAX_FLUSH", 2)
    broker, channel = make()
    request = gevent.spawn(broker.publish, [message(b"%d" % number) for number in range(9)], QUEUE)
    while not channel.published:
        gevent.sleep(0)
    channel.ack(2, multiple=True)
    channel.connection.block()
    assert fails(request, "blocks") >= 2
    channel.connection.unblock()
    sent = len(channel.published)
    assert sent < 9
    last = send(broker, b"last")
    assert channel.bodies[sent:] == [b"last"]
    channel.ack(sent + 1, multiple=True)
    assert done(last)


def test_a_batch_that_makes_progress_outlives_the_time_out(make: Make) -> None:
    broker, channel = make(timeout=0.3)
    request = send(broker, *(b"%d" % number for number in range(5)))
    for tag in range(1, 6):
        assert not request.ready()
        gevent.sleep(0.1)
        channel.ack(tag)
    assert done(request)


@pytest.mark.parametrize("others", [False, True])
def test_a_batch_without_progress_fails_by_the_time_out_with_what_is_certain(
    make: Make, others: bool
) -> None:
    broker, channel = make(timeout=0.3)
    request = send(broker, b"1", b"2", b"3")
    channel.ack(1)
    gevent.sleep(0.35)
    assert not request.ready(), "the first one was confirmed meanwhile"
    if others:
        other = send(broker, b"other")
        channel.ack(4)
        assert done(other)
    assert fails(request, "no confirm.*unknown") == 1
    assert (channel.connection.cut_because is None) == others


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of exchanges."""
    return [line for line in caplog.messages if "exchange" in line]


def test_a_missing_exchange_fails_its_own_requests_only(make: Make) -> None:
    broker, channel = make()
    connection = channel.connection
    waiting = send(broker, b"waiting")
    connection.missing = {"events"}
    broken = [
        gevent.spawn(broker.publish, [message(body), message(b"")], TOPIC) for body in (b"1", b"2")
    ]
    for request in broken:
        assert fails(request, r"closed the channel \(404 no exchange 'events'\).*unknown") == 0
    new = send(broker, b"new")
    broken.append(send(broker, b"3", to=TOPIC))
    channel.ack(2, multiple=True)
    assert done(waiting, new)
    fails(broken[2], "closed the channel.*unknown")
    assert broker.up
    assert (channel.closed, connection.cut_because) == (False, None)
    connection.missing = set()
    again = send(broker, b"again", to=TOPIC)
    connection.of("events").ack(1)
    assert done(again)
    assert len(connection.channels) == 4, "one of the default exchange, three of the topic"


def test_a_missing_default_exchange_fails_no_topic_s_requests(make: Make) -> None:
    broker, channel = make()
    channel.connection.missing = {"takeaway-in"}
    topic = send(broker, b"topic", to=TOPIC)
    fails(send(broker, b"queue"), "closed the channel")
    channel.connection.of("events").ack(1)
    assert done(topic)
    assert channel.connection.cut_because is None


def test_what_is_unsent_when_its_channel_is_closed_counts_as_not_published(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.WINDOW", 3)
    broker, channel = make()
    begun, fresh = send(broker, b"1", b"2", b"3", b"4"), send(broker, b"5")
    other = send(broker, b"6", to=TOPIC)
    channel.ack(1)
    channel.refuse("access refused", 403)
    assert fails(begun, r"403 access refused.*unknown") == 1
    fails(fresh, "403.*not published")
    gevent.idle()
    channel.connection.of("events").ack(1)
    assert done(other)
    assert channel.connection.bodies == [b"1", b"2", b"3", b"6"], "there is room for the other"


def test_late_events_of_a_closed_channel_do_not_touch_the_next_one(make: Make) -> None:
    broker, old = make()
    first = send(broker, b"old")
    old.refuse("gone")
    fails(first, "gone")
    request = send(broker, b"new")
    old.ack(1)
    old._on_close(old, ChannelClosedByBroker(404, "gone"))
    gevent.idle()
    assert not request.ready()
    behind = send(broker, b"behind")
    _, new = old.connection.channels
    new.ack(2, multiple=True)
    assert done(request, behind)


@pytest.mark.parametrize("window", ["WINDOW", "WINDOW_BYTES"])
@pytest.mark.parametrize("lost", [False, True], ids=["channel", "connection"])
def test_what_was_in_flight_on_what_is_closed_takes_no_room(
    make: Make, monkeypatch: pytest.MonkeyPatch, lost: bool, window: str
) -> None:
    monkeypatch.setattr(f"publisher.broker.{window}", 2)
    broker, channel = make()
    first = send(broker, b"1", b"2")
    if lost:
        broker.lost("gone")
        channel = open_(broker)
    else:
        channel.refuse("gone")
    fails(first, "unknown")
    second = send(broker, b"3", b"4")
    channel = channel.connection.of("takeaway-in")
    assert channel.bodies == [b"3", b"4"]
    channel.ack(2, multiple=True)
    assert done(second)


@pytest.mark.parametrize("refused", [False, True])
def test_answers_of_one_exchange_settle_no_other_s_messages(make: Make, refused: bool) -> None:
    broker, channel = make()
    queued, topic = send(broker, b"twin"), send(broker, b"twin", to=TOPIC._replace(key="takeaway"))
    other = channel.connection.of("events")
    if refused:
        channel.nack(1, multiple=True)
    else:
        channel.return_(1)
        channel.ack(1, multiple=True)
    gevent.idle()
    assert not topic.ready()
    other.ack(1)
    assert topic.get(timeout=DEADLINE) == 0, "it is not dropped"
    fails(queued, "refused" if refused else "no queue")


def test_requests_wait_while_their_channel_opens_and_others_go_on(make: Make) -> None:
    broker, channel = make()
    connection = channel.connection
    before = send(broker, b"before")
    connection.slow = True
    early = [send(broker, b"%d" % number, to=TOPIC) for number in range(3)]
    behind = send(broker, b"behind")
    channel.ack(2, multiple=True)
    assert done(before, behind)
    topic = connection.channels[1]
    topic.open()
    early.append(send(broker, b"3", to=TOPIC))
    assert topic.bodies == [b"0", b"1", b"2", b"3"]
    topic.ack(4, multiple=True)
    assert done(*early)
    assert len(connection.channels) == 2


def test_nothing_is_sent_before_confirms_are_on(make: Make) -> None:
    broker, channel = make()
    channel.connection.slow = True
    request = send(broker, b"pizza")
    channel.on_open(channel)
    gevent.idle()
    assert channel.bodies == []
    channel.confirms_on(None)
    gevent.idle()
    channel.ack(1)
    assert done(request)


Event = Callable[[Broker, Connection], None]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (lambda broker, _: broker.lost("gone"), "lost.*not published"),
        (lambda _, connection: connection.block(), "blocks.*not published"),
        (lambda _, connection: connection.first.refuse("no"), "closed the ch.*not published"),
    ],
    ids=["lost", "blocked", "refused"],
)
def test_what_ends_the_opening_of_a_channel_fails_who_waits_for_it(
    make: Make, event: Event, reason: str
) -> None:
    broker, channel = make()
    channel.connection.slow = True
    request = send(broker, b"pizza")
    event(broker, channel.connection)
    fails(request, reason)
    assert channel.bodies == []


def test_a_channel_that_does_not_open_is_renewed_and_the_connection_kept(make: Make) -> None:
    broker, channel = make(timeout=0.2)
    connection = channel.connection
    connection.slow = True
    topic = send(broker, b"topic", to=TOPIC)
    connection.slow = False
    default = send(broker, b"default")
    connection.of("takeaway-in").ack(1)
    assert done(default)
    fails(topic, "no confirm.*not published")
    assert channel.closed
    again = send(broker, b"again", to=TOPIC)
    connection.of("events").ack(1)
    assert done(again)
    assert connection.cut_because is None


def test_a_channel_without_confirms_is_renewed_and_leaves_its_room_to_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.WINDOW", 2)
    broker, channel = make(timeout=0.2)
    connection = channel.connection
    default = send(broker, b"default")
    topic = send(broker, b"stuck", to=TOPIC)
    channel.ack(1)
    assert done(default)
    stuck = connection.of("events")
    fails(topic, "no confirm.*unknown")
    assert (stuck.closed, channel.closed, connection.cut_because) == (True, False, None)
    both = send(broker, b"1", b"2")
    channel.ack(3, multiple=True)
    assert done(both)


def test_a_connection_that_opens_no_channel_fails_the_request(make: Make) -> None:
    broker, channel = make()
    channel.connection.broken = True
    assert fails(send(broker, b"pizza"), "opens no channel.*not published") == 0


def test_requests_of_all_exchanges_take_turns_in_the_same_pieces(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.broker.MAX_FLUSH", 20)
    broker, channel = make()
    connection = channel.connection
    openers = [send(broker, b"q"), send(broker, b"t", to=TOPIC)]
    channel.ack(1)
    connection.of("events").ack(1)
    assert done(*openers)
    connection.pieces.clear()
    connection.bodies.clear()
    batches = [
        gevent.spawn(broker.publish, [message(b"t%d" % number) for number in range(50)], TOPIC),
        gevent.spawn(broker.publish, [message(b"q%d" % number) for number in range(50)], QUEUE),
    ]
    gevent.idle()
    assert connection.pieces == [20] * 5
    for start in range(0, 100, 20):
        assert len({body[:1] for body in connection.bodies[start : start + 20]}) == 2
    for one in channel, connection.of("events"):
        assert one.bodies[1:] == sorted(one.bodies[1:], key=lambda body: int(body[1:]))
        one.ack(51, multiple=True)
    assert done(*batches)


def test_the_window_is_one_for_all_exchanges(make: Make) -> None:
    broker, channel = make()
    connection = channel.connection
    requests = [
        gevent.spawn(broker.publish, [message(b"")] * (WINDOW - 50), target)
        for target in (QUEUE, TOPIC)
    ]
    gevent.idle()
    assert len(connection.bodies) == WINDOW
    topic = connection.of("events")
    confirmed = len(topic.published)
    topic.ack(confirmed, multiple=True)
    gevent.idle()
    assert len(connection.bodies) == WINDOW + confirmed
    for _ in range(3):
        confirm_all(channel)
        confirm_all(topic)
    assert done(*requests)


def test_who_waits_is_sent_although_a_closed_channel_left_much_unwritten(make: Make) -> None:
    broker, channel = make()
    connection = channel.connection
    topic = send(broker, b"large", to=TOPIC)
    connection.unwritten = 2 * 1024 * 1024
    waiting = send(broker, b"waiting")
    connection.of("events").refuse("gone")
    fails(topic, "gone")
    gevent.idle()
    assert connection.bodies == [b"large"]
    connection.unwritten = 0
    gevent.sleep(0.1)
    connection.of("takeaway-in").ack(1)
    assert done(waiting)


def test_a_missing_exchange_is_logged_once_for_each_reason(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    broker, channel = make()
    connection = channel.connection
    connection.missing = {"events"}
    for _ in range(3):
        fails(send(broker, b"pizza", to=TOPIC), "closed the channel")
    line = "Requests to exchange 'events' failed: The broker closed the channel"
    expected = [f"{line} (404 no exchange 'events')"]
    assert lines(caplog) == expected
    connection.missing = set()
    good = send(broker, b"good", to=TOPIC)
    connection.of("events").ack(1)
    assert done(good)
    connection.missing = {"events"}
    for _ in range(3):
        fails(send(broker, b"pizza", to=TOPIC), "closed the channel")
    assert lines(caplog) == 2 * expected, "it had come back"
