"""Records from a real MQTT broker: once each where it keeps running, at least once where it does not.

Oracle: the list of what was published.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.streaming.mqtt import MqttConnection
from jobs.streaming.mqtt_config import MqttConfig
from jobs.streaming.records import Delivery, Fault, LateLabel, Record, Source
from jobs.streaming.sources import SourceConfig, open_source
from simmatch.config import ConfigError, parse
from tests.broker import Broker
from tests.certificates import Authority

LIMIT_S = 30.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker") as broker:
        yield broker


def config(broker: Broker, **keys: Any) -> SourceConfig:
    values = {"host": "127.0.0.1", "port": broker.port, "topics": ["a/#"], "client_id": "stream", "longest_pause_s": 1}
    return parse(SourceConfig, {"mqtt": {**values, **keys}})


@contextmanager
def source(broker: Broker, tell: Callable[[str], None] = print, **keys: Any) -> Iterator[Source]:
    opened = open_source(config(broker, **keys), {}, tell)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def publisher(broker: Broker, tell: Callable[[str], None] = print, **keys: Any) -> Iterator[MqttConnection]:
    values = {"host": "127.0.0.1", "port": broker.port, "longest_pause_s": 1}
    connection = MqttConnection(parse(MqttConfig, {**values, **keys}), "answers.mqtt", tell)
    try:
        yield connection
    finally:
        connection.close()


def message(number: int) -> bytes:
    return json.dumps({"id": number, "time": number, "values": [number, 0.5]}).encode()


def publish(connection: MqttConnection, numbers: range) -> None:
    for number in numbers:
        assert connection.publish("a/b", message(number))
    assert connection.flush(LIMIT_S)


def take(source: Source, count: int, *, acknowledge: bool = True) -> list[Delivery]:
    """So many deliveries, or those of `LIMIT_S`."""
    found: list[Delivery] = []
    deadline = time.monotonic() + LIMIT_S
    while len(found) < count and time.monotonic() < deadline:
        some = source.poll(min(7, count - len(found)), 0.2)
        if acknowledge:
            source.acknowledge(some)
        found += some
    return found


def ids(deliveries: list[Delivery]) -> list[int]:
    return [int(each.item.id) for each in deliveries if isinstance(each.item, Record)]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition does not come true"
        time.sleep(0.01)


def test_records_come_in_order_and_once(broker: Broker) -> None:
    with source(broker) as stream, publisher(broker) as connection:
        publish(connection, range(100))
        connection.publish("a/c", b'{"id": "7", "label": "worn"}')
        connection.publish("a/c", b"\xff{")
        connection.publish("other/topic", message(1000))
        found = take(stream, 102)
        assert ids(found) == list(range(100))
        assert found[100].item == LateLabel("7", "worn")
        assert found[101].item == Fault("expected UTF-8, got byte 0xff", b"\xff{", "a/c")
        assert stream.poll(10, 0.2) == []


def test_what_is_not_acknowledged_comes_again(broker: Broker) -> None:
    """To a stream that is opened again; what is published meanwhile is kept for it, and comes behind."""
    with publisher(broker) as connection:
        with source(broker) as stream:
            publish(connection, range(10))
            taken = take(stream, 10, acknowledge=False)
            before = broker.log().count("Received PUBACK from stream")
            stream.acknowledge(taken[:4])
            wait_for(lambda: broker.log().count("Received PUBACK from stream") == before + 4)
        publish(connection, range(10, 15))
        with source(broker) as stream:
            assert ids(take(stream, 11)) == list(range(4, 15))
        with source(broker) as stream:
            assert stream.poll(10, 0.2) == []


def test_the_broker_waits_for_acknowledgements(broker: Broker) -> None:
    with source(broker, most_unacknowledged=20) as stream, publisher(broker) as connection:
        publish(connection, range(100))
        held = take(stream, 20, acknowledge=False)
        assert ids(held) == list(range(20))
        assert stream.poll(10, 0.3) == []
        stream.acknowledge(held[:5])
        more = take(stream, 5, acknowledge=False)
        assert ids(more) == list(range(20, 25))
        stream.acknowledge(held[5:] + more)
        assert ids(take(stream, 75)) == list(range(25, 100))


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_broker_that_comes_back_has_lost_nothing(tmp_path: Path, by: signal.Signals) -> None:
    """Restarted, or killed where it writes each change: every record comes, those that were held a second time."""
    told: list[str] = []
    durable = by == signal.SIGKILL
    with (
        Broker(tmp_path / "broker", durable=durable) as broker,
        source(broker, told.append) as stream,
        publisher(broker) as connection,
    ):
        publish(connection, range(20))
        taken = take(stream, 12, acknowledge=False)
        stream.acknowledge(taken[:5])
        acknowledged = "Received PUBACK from stream (Mid: 5,"
        wait_for(lambda: acknowledged in broker.log())
        broker.end(by)
        wait_for(lambda: bool(told))
        assert [connection.publish("a/b", message(number)) for number in range(20, 30)] == 10 * [True]
        broker.start()
        assert connection.flush(LIMIT_S)
        stream.acknowledge(taken[5:])  # too late: the connection on which they came is gone
        found = []
        while not {*range(5, 30)} <= {*found}:
            found += ids(take(stream, 1))
        assert found[-1] == 29
        assert {*found} >= {*range(12, 30)}
        address = f"127.0.0.1:{broker.port}"
        assert told == [
            f"source.mqtt: the broker {address} does not answer: Connection refused; it is asked again",
            f"source.mqtt: the broker {address} answers again",
        ]


def test_a_broker_may_come_later(broker: Broker) -> None:
    told: list[str] = []
    broker.end()
    with source(broker, told.append) as stream:
        assert stream.poll(10, 0.1) == []
        assert len(told) == 1
        broker.start()
        with publisher(broker) as connection:
            wait_for(lambda: len(told) == 2)
            publish(connection, range(3))
        assert ids(take(stream, 3)) == [0, 1, 2]


def test_messages_wait_for_the_broker_up_to_a_limit(broker: Broker) -> None:
    with publisher(broker, lambda line: None) as connection:
        broker.end()
        wait_for(lambda: not connection.connected)
        taken = [connection.publish("a/b", message(number)) for number in range(1010)]
        assert sum(taken) == 1000
        assert connection.dropped == 10
        assert not connection.flush(0.1)


def test_an_id_of_two_clients_is_told(broker: Broker) -> None:
    """They take the connection from each other."""
    told: list[str] = []
    with source(broker, told.append), source(broker):
        wait_for(lambda: bool(told))
    assert told[0].endswith("ends one connection after the other; another client may use the client_id 'stream'")


def password_file(folder: Path) -> str:
    """ada with the password opensesame, as mosquitto_passwd writes it."""
    from base64 import b64encode
    from hashlib import pbkdf2_hmac

    salt = b"salt of 12 b"
    digest = pbkdf2_hmac("sha512", b"opensesame", salt, 101)
    file = folder / "passwords"
    file.write_text(f"ada:$7$101${b64encode(salt).decode()}${b64encode(digest).decode()}\n")
    file.chmod(0o600)
    return f"password_file {file}"


def test_a_password_is_needed_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Broker(tmp_path / "broker", password_file(tmp_path)) as broker:
        address, who = f"127.0.0.1:{broker.port}", {"user": "ada", "password_variable": "MQTT_PASSWORD"}
        with pytest.raises(ConfigError, match=r"^source.mqtt: the broker .* refuses a client without user: Not auth"):
            open_source(config(broker), {})
        with pytest.raises(ConfigError, match="password_variable: expected a variable that holds"):
            open_source(config(broker, **who), {})
        monkeypatch.setenv("MQTT_PASSWORD", "wrong-password")
        with pytest.raises(ConfigError) as error:
            open_source(config(broker, **who), {})
        assert str(error.value) == f"source.mqtt: the broker {address} refuses user 'ada': Not authorized"
        monkeypatch.setenv("MQTT_PASSWORD", "opensesame")
        with source(broker, **who) as stream, publisher(broker, **who) as connection:
            publish(connection, range(3))
            assert ids(take(stream, 3)) == [0, 1, 2]


def test_a_topic_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read a/#\ntopic write a/allowed\n")
    told: list[str] = []
    acl = f"acl_file {tmp_path / 'acl'}"
    with Broker(tmp_path / "broker", acl) as broker, publisher(broker, told.append) as connection:
        for topic in ("a/allowed", "a/b", "a/b"):
            connection.publish(topic, message(0))
        assert connection.flush(LIMIT_S)
    assert told == [f"answers.mqtt: the broker 127.0.0.1:{broker.port} refuses what is published: Not authorized"]


def test_a_subscription_without_permission_ends_the_start(tmp_path: Path) -> None:
    plugin = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "", "mosquitto_dynamic_security.so")
    if not plugin.exists():
        pytest.skip(f"needs {plugin}, which makes mosquitto refuse subscriptions")
    access = {"publishClientSend": True, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
    rules = {"defaultACLAccess": access, "clients": [], "roles": [], "groups": [{"groupname": "everybody"}]}
    (tmp_path / "rules.json").write_text(json.dumps({**rules, "anonymousGroup": "everybody"}))
    lines = [f"plugin {plugin}", f"plugin_opt_config_file {tmp_path / 'rules.json'}"]
    with Broker(tmp_path / "broker", *lines) as broker:
        with pytest.raises(ConfigError) as error:
            open_source(config(broker), {})
        address = f"127.0.0.1:{broker.port}"
        assert str(error.value) == f"source.mqtt.topics: the broker {address} refuses topic 'a/#': Not authorized"


def test_messages_without_a_promise_are_lost_when_they_are_too_many(broker: Broker) -> None:
    """Published with QoS 0: memory stays bounded, and it is told."""
    told: list[str] = []
    with source(broker, told.append, most_unacknowledged=10) as stream, publisher(broker) as connection:
        for number in range(100):
            connection._client.publish("a/b", message(number), qos=0)
        publish(connection, range(100, 105))
        wait_for(lambda: len(stream._waiting) == 25)  # type: ignore[attr-defined]
        found = take(stream, 25)
    assert ids(found) == [*range(20), *range(100, 105)]
    assert told == ["source.mqtt: messages of QoS 0 come faster than they are learnt from, and are lost; use QoS 1"]


# paho leaves the closing of a connection whose handshake fails to Python
@pytest.mark.filterwarnings("ignore:unclosed .*SSLSocket:ResourceWarning")
def test_encrypted_connections(tmp_path: Path) -> None:
    """With a certificate of the broker's, and of the client's."""
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    certificate, key = ours.certify("broker")
    lines = [f"cafile {ours.file}", f"certfile {certificate}", f"keyfile {key}", "require_certificate true"]
    own = dict(zip(("certificate", "key"), map(str, ours.certify("client")), strict=True))
    other = dict(zip(("certificate", "key"), map(str, others.certify("client")), strict=True))
    with Broker(tmp_path / "broker", *lines) as broker:
        tls = {"ca": str(ours.file), **own}
        with source(broker, tls=tls) as stream, publisher(broker, tls=tls) as connection:
            publish(connection, range(3))
            assert ids(take(stream, 3)) == [0, 1, 2]
        with pytest.raises(ConfigError, match=r"^source.mqtt.tls: no encrypted connection to 127.*: self-signed"):
            open_source(config(broker, tls={**tls, "ca": str(others.file)}), {})
        for wrong in ({}, other):
            told: list[str] = []
            with source(broker, told.append, tls={"ca": str(ours.file), **wrong}):
                wait_for(lambda told=told: bool(told))  # type: ignore[misc]
                expected = "it ended the connection without an answer; it may ask for another certificate"
                assert expected in told[0]
        told = []
        with source(broker, told.append):  # nothing that speaks TLS
            wait_for(lambda: bool(told))
            assert "it ended the connection without an answer" in told[0]
    gc.collect()


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ({"ca": "/nowhere"}, "source.mqtt.tls.ca: expected a file in PEM, got /nowhere: No such file or directory"),
        ({"certificate": __file__}, f"source.mqtt.tls.certificate: expected a file in PEM, got {__file__}: "),
    ],
)
def test_files_that_are_no_certificates_are_named(broker: Broker, tls: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_source(config(broker, tls=tls), {})
    assert str(error.value).startswith(message)


def test_a_server_that_is_no_broker_is_asked_again() -> None:
    """It takes connections, and says nothing."""
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"host": "127.0.0.1", "port": server.getsockname()[1], "connect_timeout_s": 0.2}
        connection = MqttConnection(parse(MqttConfig, values), "answers.mqtt", told.append)
        connection.close()
    assert told == [
        f"answers.mqtt: the broker 127.0.0.1:{values['port']} does not answer: no answer; it is asked again"
    ]


def test_what_is_too_large_is_set_aside(broker: Broker) -> None:
    with source(broker, max_record_bytes=100) as stream, publisher(broker) as connection:
        connection.publish("a/b", 300 * b"x")
        publish(connection, range(1))
        found = take(stream, 2)
    assert found[0].item == Fault("expected at most 100 bytes in a message, got 300", 100 * b"x", "a/b")
    assert ids(found) == [0]


def test_configurations_are_checked(broker: Broker) -> None:
    for keys, message in [
        ({"topics": []}, "mqtt.topics: expected a list of at least 1 item"),
        ({"topics": ["a/#/b"]}, "mqtt.topics.0: expected a filter such as pumps/+/vibration or pumps/#, got 'a/#/b'"),
        ({"topics": ["a", "b+"]}, "mqtt.topics.1: expected a filter such as"),
        ({"client_id": ""}, "mqtt.client_id: expected text that matches"),
        ({"id_field": None}, "mqtt: expected id_field and time_field with mqtt"),
        ({"pasword": "x"}, "mqtt.pasword: unknown key; "),
        ({"password_variable": "X"}, "mqtt: expected user with password_variable, got none"),
        ({"host": "a b"}, "mqtt.host: expected text that matches"),
        ({"tls": {"key": "x"}}, "mqtt.tls: expected a certificate with key, got none"),
        ({"port": 0}, "mqtt.port: expected greater than 0, got 0"),
    ]:
        with pytest.raises(ConfigError) as error:
            config(broker, **keys)
        assert str(error.value).startswith(message)
