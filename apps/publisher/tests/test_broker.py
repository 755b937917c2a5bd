"""The Broker's promises, against a stub of pika: no network, and every event at will."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from door import BrokerUnavailable
from door.web import BROKER_UP
from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker, StreamLostError
from pika.frame import Method
from pika.spec import Basic, BasicProperties, Connection
from publisher.broker import Broker
from publisher.settings import Settings

DEADLINE = 3  # seconds any promise may take


def ids(body: bytes) -> tuple[str, str]:
    """Return body's message id and request id."""
    return f"message {body!r}", f"request {body!r}"


def eventually(condition: Callable[[], bool]) -> None:
    """Poll condition until it holds; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)


class StubLoop:
    def __init__(self) -> None:
        self.callbacks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.running = True
        self.wakeups = 0

    def start(self) -> None:
        while self.running:
            self.callbacks.get()()

    def stop(self) -> None:
        self.running = False

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        self.wakeups += 1
        self.callbacks.put(callback)

    def close(self) -> None:
        pass


class StubConnection:
    """A connection and its only channel; `do` lets the broker act in the I/O thread."""

    def __init__(self, opened: Any, closed: Any) -> None:
        self.ioloop = StubLoop()
        self.connection = self
        self.is_open = True
        self._transport = None
        self.published: list[tuple[str, str, bytes, BasicProperties, bool]] = []
        self._closed = closed
        self.ioloop.callbacks.put(lambda: opened(self))

    def channel(self, on_open_callback: Any) -> None:
        on_open_callback(self)

    def add_on_connection_blocked_callback(self, callback: Any) -> None:
        self._blocked = callback

    def add_on_connection_unblocked_callback(self, callback: Any) -> None:
        self._unblocked = callback

    def add_on_close_callback(self, callback: Any) -> None:
        self._channel_closed = callback

    def add_on_return_callback(self, callback: Any) -> None:
        self._returned = callback

    def confirm_delivery(self, ack_nack_callback: Any, callback: Any) -> None:
        self._confirmed = ack_nack_callback
        callback(None)

    def basic_publish(
        self, exchange: str, key: str, body: bytes, properties: BasicProperties, mandatory: bool
    ) -> None:
        self.published.append((exchange, key, body, properties, mandatory))

    def close(self) -> None:
        self.is_open = False
        self._closed(self, AMQPConnectionError("closed by the client"))

    @property
    def bodies(self) -> list[bytes]:
        return [message[2] for message in self.published]

    def do(self, action: Callable[[], None]) -> None:
        self.ioloop.callbacks.put(action)

    def ack(self, tag: int, multiple: bool = False) -> None:
        self.do(lambda: self._confirmed(Method(1, Basic.Ack(tag, multiple))))

    def nack(self, tag: int) -> None:
        self.do(lambda: self._confirmed(Method(1, Basic.Nack(tag))))

    def return_(self, tag: int) -> None:
        _, key, body, properties, _ = self.published[tag - 1]
        method = Basic.Return(312, "NO_ROUTE", "", key)
        self.do(lambda: self._returned(self, method, properties, body))

    def block(self) -> None:
        self.do(lambda: self._blocked(self, Method(0, Connection.Blocked("low on memory"))))

    def unblock(self) -> None:
        self.do(lambda: self._unblocked(self, Method(0, Connection.Unblocked())))

    def close_channel(self) -> None:
        error = ChannelClosedByBroker(404, "NOT_FOUND - no exchange")
        self.do(lambda: self._channel_closed(self, error))

    def lose(self) -> None:
        self.is_open = False
        self.do(lambda: self._closed(self, StreamLostError("reset by peer")))


class Stub:
    """The network: hands out connections, or the troubles put before them."""

    def __init__(self) -> None:
        self.connections: list[StubConnection] = []
        self.troubles: list[str] = []
        self.over = False
        self.parked = threading.Event()

    def connect(
        self,
        _parameters: object,
        on_open_callback: Any,
        on_open_error_callback: Any,
        on_close_callback: Any,
    ) -> StubConnection:
        if self.over:
            self.parked.set()
            threading.Event().wait()  # parks the I/O thread, which nothing may end
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble == "raises":
            raise OSError("too many open files")
        opened = on_open_callback
        if trouble == "refused":
            error = AMQPConnectionError("refused")

            def opened(connection: StubConnection) -> None:
                on_open_error_callback(connection, error)

        connection = StubConnection(opened, on_close_callback)
        if trouble == "bug":
            connection.do(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        self.connections.append(connection)
        return connection

    @property
    def last(self) -> StubConnection:
        return self.connections[-1]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr("publisher.broker.FIRST_DELAY", 0.02)
    stub = Stub()
    yield stub
    stub.over = True
    for connection in stub.connections:
        connection.do(connection.ioloop.stop)
    # Or its last words would be in the next test's log.
    assert stub.parked.wait(DEADLINE)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


def make(stub: Stub, timeout: float = DEADLINE) -> Broker:
    broker = Broker(Settings(confirm_timeout=timeout), stub.connect)  # type: ignore[arg-type]
    eventually(lambda: broker.up)
    return broker


def send(pool: ThreadPoolExecutor, broker: Broker, connection: StubConnection, body: bytes) -> Any:
    """Publish body in a thread of its own and return its future once the broker has seen it."""
    future: Future[None] = pool.submit(broker.publish, body, *ids(body))
    eventually(lambda: body in connection.bodies or future.done())
    return future


def test_publish_returns_only_after_the_confirm(stub: Stub, pool: ThreadPoolExecutor) -> None:
    broker = make(stub)
    future = send(pool, broker, stub.last, b"pizza")
    assert not future.done()
    stub.last.ack(1)
    assert future.result(DEADLINE) is None
    exchange, key, body, properties, mandatory = stub.last.published[0]
    assert (exchange, key, body, mandatory) == ("takeaway-in", "takeaway", b"pizza", True)
    assert (properties.delivery_mode, properties.content_type) == (2, "text/plain")
    message_id, request_id = ids(b"pizza")
    assert properties.message_id == message_id
    assert properties.headers == {"X-Request-Id": request_id}


def test_a_multiple_ack_confirms_all_up_to_it_and_no_more(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub)
    futures = [send(pool, broker, stub.last, b"%d" % i) for i in range(4)]
    stub.last.ack(3, multiple=True)
    assert [future.result(DEADLINE) for future in futures[:3]] == [None] * 3
    assert not futures[3].done()
    stub.last.ack(4)
    assert futures[3].result(DEADLINE) is None


def test_a_nacked_message_fails(stub: Stub, pool: ThreadPoolExecutor) -> None:
    broker = make(stub)
    future = send(pool, broker, stub.last, b"pizza")
    stub.last.nack(1)
    with pytest.raises(BrokerUnavailable, match="refused"):
        future.result(DEADLINE)


def test_a_returned_message_fails_though_acked_and_no_other_does(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub)
    futures = [send(pool, broker, stub.last, b"%d" % i) for i in range(3)]
    stub.last.return_(2)
    stub.last.ack(3, multiple=True)
    with pytest.raises(BrokerUnavailable, match=r"no queue.*312 NO_ROUTE"):
        futures[1].result(DEADLINE)
    assert futures[0].result(DEADLINE) is futures[2].result(DEADLINE) is None


def test_publish_fails_at_once_while_not_connected(stub: Stub) -> None:
    stub.troubles = ["refused"] * 9
    broker = Broker(Settings(), stub.connect)  # type: ignore[arg-type]
    eventually(lambda: len(stub.connections) > 0)
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"not connected.*not published"):
        broker.publish(b"pizza", *ids(b"pizza"))
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize("event", ["close_channel", "lose"])
def test_a_lost_channel_or_connection_fails_who_waits_and_is_renewed(
    stub: Stub, pool: ThreadPoolExecutor, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broker = make(stub)
    first = stub.last
    kept = send(pool, broker, first, b"kept")
    first.ack(1)
    assert kept.result(DEADLINE) is None
    future = send(pool, broker, first, b"lost")
    getattr(first, event)()
    with pytest.raises(BrokerUnavailable, match="unknown"):
        future.result(DEADLINE)
    eventually(lambda: len(stub.connections) == 2 and broker.up)
    again = send(pool, broker, stub.last, b"pizza")
    stub.last.ack(1, multiple=True)  # its tags start anew
    assert again.result(DEADLINE) is None
    assert (first.bodies, stub.last.bodies) == ([b"kept", b"lost"], [b"pizza"])
    lines = [record.getMessage() for record in caplog.records]
    reason = {"close_channel": "404", "lose": "reset by peer"}[event]
    assert [reason in line for line in lines] == [False, True, False]


def test_a_blocking_broker_fails_who_waits_and_who_comes_until_it_unblocks(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub)
    waiting = send(pool, broker, stub.last, b"waiting")
    stub.last.block()
    with pytest.raises(BrokerUnavailable, match=r"blocks.*unknown"):
        waiting.result(DEADLINE)
    assert not broker.up
    assert BROKER_UP._value.get() == 0
    with pytest.raises(BrokerUnavailable, match=r"blocks.*not published"):
        broker.publish(b"coming", *ids(b"coming"))
    stub.last.unblock()
    eventually(lambda: broker.up)
    assert BROKER_UP._value.get() == 1
    again = send(pool, broker, stub.last, b"pizza")
    stub.last.ack(2, multiple=True)  # the late confirm of the first one with it
    assert again.result(DEADLINE) is None
    assert stub.last.bodies == [b"waiting", b"pizza"]
    assert len(stub.connections) == 1


def test_a_message_whose_request_gave_up_is_not_sent_later(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub, timeout=0.5)
    first = send(pool, broker, stub.last, b"first")
    confirm, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        confirm.wait(DEADLINE)
        stub.last._confirmed(Method(1, Basic.Ack(1)))  # not silent: the connection stays
        go_on.wait(DEADLINE)

    wakeups = stub.last.ioloop.wakeups
    stub.last.do(busy)
    late = pool.submit(broker.publish, b"late", *ids(b"late"))
    eventually(lambda: stub.last.ioloop.wakeups > wakeups)
    confirm.set()
    assert first.result(DEADLINE) is None
    with pytest.raises(BrokerUnavailable, match="no confirm"):
        late.result(DEADLINE)
    go_on.set()
    last = send(pool, broker, stub.last, b"last")
    stub.last.ack(2)
    assert last.result(DEADLINE) is None
    assert stub.last.bodies == [b"first", b"last"]
    assert len(stub.connections) == 1


def test_a_silent_connection_fails_all_at_the_first_time_out_and_is_renewed(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub, timeout=0.4)
    silent = stub.last
    stub.troubles = ["refused"] * 99
    started = time.monotonic()
    first = send(pool, broker, silent, b"first")
    eventually(lambda: time.monotonic() > started + 0.2)
    second = send(pool, broker, silent, b"second")
    with pytest.raises(BrokerUnavailable, match=r"no confirm.*unknown"):
        first.result(DEADLINE)
    with pytest.raises(BrokerUnavailable, match=r"was lost.*unknown"):
        second.result(DEADLINE)
    # Who comes next, from behind busy threads, does not wait for a time-out of his own.
    with pytest.raises(BrokerUnavailable, match="not connected"):
        broker.publish(b"next", *ids(b"next"))
    stub.troubles.clear()
    eventually(lambda: broker.up)
    assert stub.last is not silent
    assert stub.last.bodies == []


def test_a_time_out_while_others_are_confirmed_keeps_the_connection(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub, timeout=0.2)
    slow = send(pool, broker, stub.last, b"slow")
    fast = send(pool, broker, stub.last, b"fast")
    stub.last.ack(2)
    assert fast.result(DEADLINE) is None
    with pytest.raises(BrokerUnavailable, match=r"no confirm in 0\.2 s"):
        slow.result(DEADLINE)
    assert broker.up
    assert len(stub.connections) == 1


@pytest.mark.parametrize("trouble", ["refused", "raises", "bug"])
def test_the_broker_reconnects_whatever_happens(
    stub: Stub, pool: ThreadPoolExecutor, trouble: str
) -> None:
    stub.troubles = [trouble, trouble]
    broker = Broker(Settings(), stub.connect)  # type: ignore[arg-type]
    eventually(lambda: not stub.troubles and broker.up)
    future = send(pool, broker, stub.last, b"pizza")
    stub.last.ack(1)
    assert future.result(DEADLINE) is None


def test_a_wake_up_lost_with_its_connection_does_not_keep_later_messages(
    stub: Stub, pool: ThreadPoolExecutor
) -> None:
    broker = make(stub)
    first = stub.last
    hold = threading.Event()
    first.do(lambda: hold.wait(DEADLINE) and None)
    first.lose()
    wakeups = first.ioloop.wakeups
    future = pool.submit(broker.publish, b"unlucky", *ids(b"unlucky"))
    eventually(lambda: first.ioloop.wakeups > wakeups)
    hold.set()
    with pytest.raises(BrokerUnavailable, match="not published"):
        future.result(DEADLINE)
    eventually(lambda: len(stub.connections) == 2 and broker.up)
    again = send(pool, broker, stub.last, b"pizza")
    stub.last.ack(1)
    assert again.result(DEADLINE) is None
    assert first.bodies == []


def test_many_requests_need_one_wake_up(stub: Stub, pool: ThreadPoolExecutor) -> None:
    broker = make(stub)
    hold = threading.Event()
    stub.last.do(lambda: hold.wait(DEADLINE) and None)
    futures = [pool.submit(broker.publish, b"%d" % i, *ids(b"%d" % i)) for i in range(10)]
    eventually(lambda: len(broker._outbox) == 10)
    hold.set()
    eventually(lambda: len(stub.last.published) == 10)
    stub.last.ack(10, multiple=True)
    assert [future.result(DEADLINE) for future in futures] == [None] * 10
    assert stub.last.ioloop.wakeups == 1
