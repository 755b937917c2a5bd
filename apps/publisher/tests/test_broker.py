# mypy: disable-error-code=no-untyped-call
"""The Broker's promises, with a stub for pika's connection and channel: every event at will."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from door.metrics import BROKER_UP
from gevent import Greenlet
from pika.exceptions import ChannelWrongStateError, StreamLostError
from pika.frame import Method
from pika.spec import Basic, BasicProperties
from pika.spec import Connection as ConnectionMethods
from publisher.broker import Broker, Message, Target, Unconfirmed
from publisher.settings import Settings

DEADLINE = 3  # seconds any promise may take


class Connection:
    def __init__(self) -> None:
        self.cut_because: Exception | None = None
        self.unwritten = 0
        # How many messages left in each piece.
        self.pieces: list[int] = []
        self.channel = Channel(self)

    @contextmanager
    def joined(self) -> Iterator[None]:
        before = len(self.channel.published)
        yield
        self.pieces.append(len(self.channel.published) - before)

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
        self.published: list[tuple[str, str, bytes, BasicProperties, bool]] = []
        self.broken = False

    def add_on_return_callback(self, callback: Any) -> None:
        self._returned = callback

    def confirm_delivery(self, ack_nack_callback: Any, callback: Callable[[Any], None]) -> None:
        self._confirmed = ack_nack_callback
        self.confirms_on = callback

    def basic_publish(
        self, exchange: str, key: str, body: bytes, properties: BasicProperties, mandatory: bool
    ) -> None:
        if self.broken:
            raise ChannelWrongStateError("closed")
        self.published.append((exchange, key, body, properties, mandatory))

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


def open_(broker: Broker) -> Any:
    channel: Any = Connection().channel
    broker.opened(channel)
    assert not broker.up, "confirms are not on yet"
    channel.confirms_on(None)
    assert broker.up
    return channel


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
    return Message(body, f"id of {body!r}")


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
    assert not broker._returned, "nothing is remembered for ever"


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
    channel.ack(3, multiple=True)
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
    assert (first.bodies, second[0].bodies) == ([], [b"pizza"])


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
        broker._signs += 1  # as a confirm of another one: not silent
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
    channel.ack(7)
    channel.nack(8, multiple=True)
    request = send(broker, b"pizza")
    channel.ack(1)
    channel.ack(1)
    assert done(request)


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
    bodies = [b"%d" % number for number in range(1234)]
    request = gevent.spawn(broker.publish, [message(body) for body in bodies], QUEUE)
    while not channel.published:
        gevent.sleep(0)
    assert len(channel.published) == 500, "others run before the rest is sent"
    behind = send(broker, b"behind")
    confirm_all(channel)
    assert done(request, behind)
    # One flush was due already when it came.
    assert channel.bodies.index(b"behind") in (500, 1000)
    assert [body for body in channel.bodies if body != b"behind"] == bodies
    assert max(channel.connection.pieces) == 500


def test_batches_delay_a_message_of_another_by_at_most_one_flush(make: Make) -> None:
    broker, channel = make()
    pieces = channel.connection.pieces
    came: dict[bytes, int] = {}

    def single(body: bytes) -> None:
        came[body] = len(pieces)
        broker.publish([message(body)], QUEUE)

    batch = [message(b"")] * 10_000
    requests = [gevent.spawn(broker.publish, batch, QUEUE) for _ in range(6)]
    while not all(request.ready() for request in requests[:6]):
        assert len(pieces) < 1000
        requests.append(gevent.spawn(single, b"single %d" % len(requests)))
        gevent.sleep(0)
        channel.ack(len(channel.published), multiple=True)
    confirm_all(channel)
    assert done(*requests)
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
    batch = gevent.spawn(broker.publish, [message(b"")] * 1000, QUEUE)
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
        ([b""] * 5000, 1000, 1000),
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
