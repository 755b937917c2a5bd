# mypy: disable-error-code=no-untyped-call
"""What the connection to the broker promises; real pika against a small broker that obeys."""

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import error, pack

import door.amqp
import gevent
import pika.data
import pytest
from common.environment import Environment
from door.amqp import JoinedConnection, Link, parameters
from door.metrics import BROKER_UP
from door.settings import BrokerSettings
from pika.adapters.gevent_connection import GeventConnection
from pika.channel import Channel
from pika.exceptions import (
    ChannelClosedByBroker,
    ChannelWrongStateError,
    StreamLostError,
    UnsupportedAMQPFieldException,
)
from pika.frame import Heartbeat, Method, decode_frame
from pika.spec import Channel as ChannelMethods
from pika.spec import Connection as ConnectionMethods
from small_broker import SmallBroker

DEADLINE = 3  # seconds any promise may take


def eventually(condition: Callable[[], bool]) -> None:
    """Let greenlets run until condition holds; fail after DEADLINE seconds."""
    with gevent.Timeout(DEADLINE):
        while not condition():
            gevent.sleep(0.005)


class WatchedLink(Link):
    """Notes what it is told, and may have a bug."""

    bugs = 0

    def __init__(self, port: int) -> None:
        super().__init__(BrokerSettings(host="127.0.0.1", port=port), "waiter")
        self.reasons: list[object] = []

    def opened(self, channel: Channel) -> None:
        if self.bugs:
            self.bugs -= 1
            raise ZeroDivisionError("a bug")
        super().opened(channel)

    def lost(self, reason: object) -> None:
        super().lost(reason)
        self.reasons.append(reason)


@pytest.fixture
def broker() -> Iterator[SmallBroker]:
    broker = SmallBroker()
    broker.begin()
    yield broker
    broker.end()


@pytest.fixture
def link(broker: SmallBroker, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedLink]:
    monkeypatch.setattr("door.amqp.FIRST_RETRY", 0.01)
    monkeypatch.setattr("door.amqp.LAST_RETRY", 0.02)
    link = WatchedLink(broker.port)
    link.start()
    yield link
    link.stop()
    assert link._keeper is not None
    assert link._keeper.ready()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return what pika's own connection is given to send from now on."""
    sent: list[bytes] = []
    emit = GeventConnection._adapter_emit_data

    def keep_and_emit(self: GeventConnection, data: bytes) -> None:
        sent.append(data)
        emit(self, data)

    monkeypatch.setattr(GeventConnection, "_adapter_emit_data", keep_and_emit)
    return sent


@pytest.fixture
def channel(link: WatchedLink, sent: list[bytes]) -> Channel:
    eventually(lambda: link.up)
    sent.clear()
    assert link.channel is not None
    return link.channel


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "door.amqp"]


def test_what_is_sent_outside_of_a_block_leaves_at_once(
    channel: Channel, sent: list[bytes]
) -> None:
    for count in 3, 6:  # method, header and body: pika gives each to the system alone
        channel.basic_publish("e", "k", b"pizza")
        assert len(sent) == count


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_block_sends_leaves_in_one_piece_at_its_end(
    channel: Channel, sent: list[bytes], fails: bool
) -> None:
    for body in b"one", b"two":
        channel.basic_publish("e", "k", body)
    alone = b"".join(sent)
    sent.clear()
    error = ZeroDivisionError("in the block")
    try:
        with channel.connection.joined():
            for body in b"one", b"two":
                channel.basic_publish("e", "k", body)
            assert sent == []
            if fails:
                raise error
    except ZeroDivisionError as caught:
        assert caught is error  # noqa: PT017 - whether it raises is the parameter
    assert sent == [alone]
    channel.basic_publish("e", "k", b"three")
    assert len(sent) == 4


def test_a_block_that_sends_nothing_sends_nothing(channel: Channel, sent: list[bytes]) -> None:
    with channel.connection.joined():
        pass
    assert sent == []


def test_frames_that_are_written_already_leave_like_all_others(
    channel: Channel, sent: list[bytes]
) -> None:
    connection, frame = channel.connection, Heartbeat().marshal()
    connection.publish(channel, frame)
    with connection.joined():
        connection.publish(channel, 2 * frame)
        connection.publish(channel, 3 * frame)
    assert sent == [frame, 5 * frame]
    channel.close()
    sent.clear()
    with pytest.raises(ChannelWrongStateError):
        connection.publish(channel, frame)
    assert sent == []


@pytest.mark.usefixtures("sent")
def test_what_the_system_did_not_take_yet_is_counted(channel: Channel, link: WatchedLink) -> None:
    connection = channel.connection
    assert connection.unwritten == 0
    channel.basic_publish("e", "k", b"x" * 16_000_000)  # more than a socket's buffers hold
    assert 0 < connection.unwritten <= 17_000_000
    link.drop(ZeroDivisionError())
    eventually(lambda: connection.unwritten == 0)


def test_all_that_pika_sends_goes_by_what_is_replaced(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another pika sends in another way: see what JoinedConnection has to replace now."""
    ours, pika_s = JoinedConnection._adapter_emit_data, GeventConnection._adapter_emit_data
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(pika_s).parameters)
    writes: list[bytes] = []
    transport = channel.connection._transport
    write = transport.write
    monkeypatch.setattr(transport, "write", lambda data: [writes.append(data), write(data)])
    with channel.connection.joined():
        channel.basic_publish("e", "k", b"pizza")
        channel.basic_ack(1)
        channel.basic_reject(2)
        channel.basic_get("q", lambda *_: None)
        channel.close()
        assert writes == []
    (data,) = writes
    found = []
    while data:
        size, frame = decode_frame(data)
        data = data[size:]
        found.append(frame.method.NAME if isinstance(frame, Method) else type(frame).__name__)
    sent = ["Publish", "Header", "Body", "Ack", "Reject", "Get", "Close"]
    assert [name.rpartition(".")[2] for name in found] == sent


@pytest.mark.parametrize("value", [1.5, math.inf, 2**63])
def test_pika_reads_and_writes_headers_by_what_is_replaced(value: float) -> None:
    headers = {"h": value, "list": [value], "table": {"h": value}}
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, headers)
    assert pika.data.decode_table(b"".join(pieces), 0)[0] == headers


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b"d" + pack(">d", 1.5), 1.5),
        (b"f" + pack(">f", 1.5), 1.5),
        (b"d" + pack(">d", math.inf), math.inf),
        (b"T" + pack(">Q", 2**63), 2**63),
    ],
)
def test_pika_s_own_reading_and_writing_of_headers_still_has_to_be_replaced(
    encoded: bytes, value: float
) -> None:
    """Else pika has been mended: door.amqp needs less of it."""
    with suppress(ValueError, OverflowError):
        assert door.amqp._decode_value(encoded, 0)[0] != value
    with pytest.raises((UnsupportedAMQPFieldException, error)):
        door.amqp._encode_value([], value)


def test_parameters_carry_every_setting_and_the_connection_s_name() -> None:
    env = {"RABBITMQ_USER": "waiter", "RABBITMQ_PASSWORD": "s3cret", "RABBITMQ_HOST": "h"}
    env |= {"RABBITMQ_PORT": "1", "RABBITMQ_HEARTBEAT": "3"}
    found = parameters(BrokerSettings.read(Environment(env)), "publisher")
    assert (found.host, found.port, found.heartbeat) == ("h", 1, 3)
    assert found.credentials.username == "waiter"
    assert found.credentials.password == "s3cret"
    assert found.client_properties == {"connection_name": "publisher"}


def test_a_link_connects_under_its_name_and_tells_that_it_is_up(
    link: WatchedLink, broker: SmallBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert not link.up
    assert BROKER_UP._value.get() == 0
    eventually(lambda: link.up)
    assert BROKER_UP._value.get() == 1
    (start,) = [one for one in broker.methods if isinstance(one, ConnectionMethods.StartOk)]
    assert start.client_properties["connection_name"] == "waiter"
    assert lines(caplog) == [f"Connected to the broker at 127.0.0.1:{broker.port}"]


def test_a_lost_connection_is_told_once_and_renewed(
    link: WatchedLink, broker: SmallBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for number in 1, 2:
        eventually(lambda: link.up)
        broker.cut()
        eventually(lambda: not link.up)
        assert isinstance(link.reasons[-1], StreamLostError)
        assert BROKER_UP._value.get() == 0
        assert len(lines(caplog)) == 2 * number
    eventually(lambda: link.up)
    assert [line.split()[0] for line in lines(caplog)] == ["Connected", "No"] * 2 + ["Connected"]


def test_a_missing_broker_is_asked_again_without_a_line_or_an_open_file_for_each_time(
    link: WatchedLink, broker: SmallBroker, caplog: pytest.LogCaptureFixture
) -> None:
    eventually(lambda: link.up)
    broker.end()
    eventually(lambda: len(link.reasons) > 3)
    files = len(os.listdir("/proc/self/fd"))
    eventually(lambda: len(link.reasons) > 13)
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # that of an attempt
    told = lines(caplog)
    assert [("refused" in line.lower()) for line in told] == [False, True]
    broker.begin()
    eventually(lambda: link.up)


def test_a_channel_that_the_broker_closes_is_renewed_with_its_connection(
    link: WatchedLink, channel: Channel, broker: SmallBroker
) -> None:
    broker.send(1, ChannelMethods.Close(404, "NOT_FOUND - no queue", 0, 0))
    eventually(lambda: not link.up)
    assert isinstance(link.reasons[0], ChannelClosedByBroker)
    eventually(lambda: link.up)
    assert link.channel is not channel
    assert broker.told(ConnectionMethods.StartOk) == 2


def test_a_dropped_connection_is_cut_without_a_word_and_renewed(
    link: WatchedLink, channel: Channel, broker: SmallBroker
) -> None:
    reason = TimeoutError("silence")
    link.drop(reason)
    assert not link.up
    assert link.reasons == [reason]
    eventually(lambda: link.up)
    assert link.channel is not channel
    assert broker.told(ConnectionMethods.Close) == 0
    assert broker.told(ConnectionMethods.StartOk) == 2


def test_a_connection_may_be_dropped_while_it_ends_by_itself(
    link: WatchedLink, channel: Channel, broker: SmallBroker
) -> None:
    dropped = []

    def drop(*_: object) -> None:
        link.drop(TimeoutError("silence"))
        dropped.append(link.up)

    channel.connection.add_on_close_callback(drop)
    broker.cut()
    eventually(lambda: bool(dropped))
    assert dropped == [False]
    eventually(lambda: link.up)
    assert broker.told(ConnectionMethods.StartOk) == 2


def test_a_bug_in_what_uses_the_channel_is_followed_by_another_attempt(
    link: WatchedLink, broker: SmallBroker
) -> None:
    link.bugs = 2
    eventually(lambda: link.up)
    assert broker.told(ConnectionMethods.StartOk) == 3


@pytest.mark.parametrize("away", [False, True])
def test_a_stopped_link_says_good_bye_and_connects_no_more(
    link: WatchedLink, broker: SmallBroker, away: bool, caplog: pytest.LogCaptureFixture
) -> None:
    eventually(lambda: link.up)
    if away:
        broker.end()
        eventually(lambda: len(link.reasons) > 2)
        broker.begin()
    told = len(lines(caplog))
    link.stop()
    assert broker.told(ConnectionMethods.Close) == int(not away)
    connected = broker.told(ConnectionMethods.StartOk)
    gevent.sleep(0.1)  # many retries
    assert broker.told(ConnectionMethods.StartOk) == connected
    assert not link.up
    assert len(lines(caplog)) == told


class ScriptedLink(Link):
    """Ends each attempt as the script says, and notes its pauses; strings are events between."""

    def __init__(self, script: list[Exception | str], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(BrokerSettings(), "waiter")
        self.pauses: list[float] = []
        self._script = script
        monkeypatch.setattr("door.amqp.gevent.sleep", self.pauses.append)

    def _hold_connection(self) -> Exception:
        match self._script.pop(0):
            case "alive":
                self.alive()
                return self._hold_connection()
            case "ready":
                self.ready(None)  # type: ignore[arg-type]
                return self._hold_connection()
            case RuntimeError() as bug:
                raise bug
            case Exception() as reason:
                self._stopping = not self._script
                return reason
        raise AssertionError


AWAY, FORBIDDEN, BUG, END = OSError("away"), OSError("no"), RuntimeError("bug"), OSError("end")


@pytest.mark.parametrize(
    ("script", "pauses"),
    [
        ([AWAY] * 6, [0.2, 0.4, 0.8, 1.6, 2, 2]),
        ([AWAY, AWAY, "ready", AWAY], [0.2, 0.4, 0.8]),  # as with a queue that is missing
        ([AWAY, AWAY, "alive", AWAY, AWAY], [0.2, 0.4, 0.2, 0.4]),
        ([BUG, BUG, AWAY], [0.2, 0.4, 0.8]),
    ],
)
def test_pauses_between_attempts_double_until_the_broker_does_what_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, script: list[Exception | str], pauses: list[float]
) -> None:
    link = ScriptedLink([*script, END], monkeypatch)
    link.start()
    assert link._keeper is not None
    link._keeper.get(timeout=DEADLINE)
    assert link.pauses[:-1] == pytest.approx(pauses)


def test_each_new_reason_has_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script: list[Exception | str] = [
        AWAY,
        AWAY,
        FORBIDDEN,
        FORBIDDEN,
        BUG,
        BUG,
        AWAY,
        "ready",
        AWAY,
        AWAY,
        END,
    ]
    link = ScriptedLink(script, monkeypatch)
    link.start()
    assert link._keeper is not None
    link._keeper.get(timeout=DEADLINE)
    reasons = [line.rpartition(": ")[2] for line in lines(caplog)]
    assert reasons == [repr(reason) for reason in (AWAY, FORBIDDEN, BUG, AWAY, AWAY)]
