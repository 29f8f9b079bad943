"""A connection to an MQTT broker (version 5): for the source of a stream, and for whatever is published.

The connection comes back by itself. That the broker does not answer is told once, and once when it answers again.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.redaction import one_line
from jobs.streaming.mqtt_config import MqttConfig
from simmatch.config import ConfigError
from simmatch.documents import quoted
from simmatch.extras import extra

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

CLOSE_S = 2.0
"""Longest wait for the broker at the end."""

MOST_QUEUED = 1000
"""Messages that wait to be published while the broker is away; more are dropped, and counted."""

SHORT_S, MOST_SHORT = 10.0, 3
"""A connection that is lost sooner is a short one; after so many in a row a line is told."""

SESSION_TAKEN_OVER = 0x8E
"""Reason of a disconnection: another client has connected with the same id."""


@dataclass(frozen=True)
class Subscription:
    """What a connection receives, with QoS 1.

    Attributes
    ----------
    topics: filters of topics.
    received: called, by another thread, with each message and its receipt. Only what `MqttConnection.acknowledge` was
        called with is not sent again.
    client_id: the broker keeps messages for this client while it is away.
    session_s: for so long.
    most: messages that the broker sends before it waits for acknowledgements.
    most_bytes: of one message; larger ones are never sent.
    """

    topics: tuple[str, ...]
    received: Callable[[MQTTMessage, Any], None]
    client_id: str
    session_s: int
    most: int
    most_bytes: int


class MqttConnection:
    """A connection to a broker. Its methods may be called from any thread.

    Parameters
    ----------
    config: the broker.
    key: the name of `config` in messages, such as `source.mqtt`.
    tell: is given one line when the broker does not answer, and when it does again.
    subscription: what to receive; None: nothing, the connection publishes.
    client_id: of a connection that publishes; None: the broker makes one up.

    Raises
    ------
    ConfigError
        A file of `tls` cannot be read, the password is missing, or the broker refuses the user, the password, the
        certificate or a topic. A broker that does not answer is no error: it is asked again.
    """

    def __init__(
        self,
        config: MqttConfig,
        key: str,
        tell: Callable[[str], None],
        *,
        subscription: Subscription | None = None,
        client_id: str | None = None,
    ) -> None:
        with extra("stream"):
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
        self._config, self._key, self._tell, self._subscription = config, key, tell, subscription
        self._changed = threading.Condition()
        self._generation = 0
        """Of the connection: what came by an earlier one is sent again, and cannot be acknowledged any more."""
        self._connected = self._started = self._answered = self._failing = self._refused = False
        self._accepted = self._confirmed = self._short = 0
        self._since_s = 0.0
        self.failure: str | None = None
        """Why the connection will never work; one line."""
        self.dropped = 0
        """Messages that were not published, as too many waited."""
        name = client_id if subscription is None else subscription.client_id
        self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)
        self._prepare()
        self._connect()

    @property
    def connected(self) -> bool:
        """Whether the broker has taken the connection, and the subscriptions."""
        return self._connected

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Send a message with QoS 1, now or once the broker is back. False: it is dropped, as too many wait."""
        from paho.mqtt.enums import MQTTErrorCode

        info = self._client.publish(topic, payload, qos=1, retain=retain)
        taken = info.rc != MQTTErrorCode.MQTT_ERR_QUEUE_SIZE
        with self._changed:
            self._accepted += taken
            self.dropped += not taken
        return taken

    def acknowledge(self, receipt: Any) -> None:
        """The message with this receipt need not be sent again."""
        generation, number = receipt
        if generation == self._generation and number:
            self._client.ack(number, 1)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has all that was published. False: it has not yet."""
        with self._changed:
            return self._changed.wait_for(lambda: self._confirmed >= self._accepted, timeout_s)

    def close(self) -> None:
        """Take leave of the broker, which keeps what is not acknowledged."""
        self._client.disconnect()
        stop = threading.Thread(target=self._client.loop_stop, daemon=True)
        stop.start()
        stop.join(CLOSE_S)
        connection: Any = self._client.socket()
        if stop.is_alive() and connection is not None:  # the broker does not answer
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            stop.join(CLOSE_S)

    def _prepare(self) -> None:
        """Credentials, limits and what is called by the thread of the connection."""
        client, config = self._client, self._config
        if config.user is not None:
            client.username_pw_set(config.user, config.password(self._key))
        if config.tls is not None:
            client.tls_set_context(config.tls.context(f"{self._key}.tls"))
        client.connect_timeout = config.connect_timeout_s
        client.reconnect_delay_set(1, config.longest_pause_s)
        client.max_queued_messages_set(MOST_QUEUED)
        client.on_connect, client.on_connect_fail = self._on_connect, self._on_connect_fail
        client.on_disconnect, client.on_subscribe = self._on_disconnect, self._on_subscribe
        client.on_publish, client.on_message = self._on_publish, self._on_message

    def _connect(self) -> None:
        """Begin, and wait for the first answer or failure."""
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        if self._subscription is not None:
            properties.SessionExpiryInterval = self._subscription.session_s
            properties.ReceiveMaximum = self._subscription.most
            properties.MaximumPacketSize = self._subscription.most_bytes
        config = self._config
        host, _, port = config.address.rpartition(":")
        self._client.connect_async(
            host, int(port), config.keepalive_s, clean_start=self._subscription is None, properties=properties
        )
        self._client.loop_start()
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._answered, config.connect_timeout_s)
            self._started = True
        if self.failure is not None:
            self.close()
            raise ConfigError(self.failure)
        if not in_time:
            self._fails("no answer")

    def _on_connect(self, client: Client, _: Any, flags: Any, reason: Any, __: Any) -> None:
        from paho.mqtt.subscribeoptions import SubscribeOptions

        if reason.is_failure:
            whom = "a client without user" if self._config.user is None else f"user {quoted(self._config.user)}"
            self._refuses("", f"the broker {self._config.address} refuses {whom}: {reason}")
        elif self._subscription is None:
            self._works()
        else:
            if self._started and not flags.session_present and self._generation:
                self._say(f"{self._key}: the broker has lost its session; what it held for this client is lost")
            options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
            client.subscribe([(topic, options) for topic in self._subscription.topics])

    def _on_subscribe(self, _: Client, __: Any, ___: int, reasons: list[Any], ____: Any) -> None:
        assert self._subscription is not None
        for topic, reason in zip(self._subscription.topics, reasons, strict=False):
            if reason.is_failure:
                self._refuses(".topics", f"the broker {self._config.address} refuses topic {quoted(topic)}: {reason}")
                return
        self._works()

    def _on_connect_fail(self, _: Client, __: Any) -> None:
        error = sys.exception()  # paho calls this where it has caught it
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            self._refuses(".tls", f"no encrypted connection to {self._config.address}: {reason}")
        else:
            self._fails(str(getattr(error, "strerror", None) or error or "no answer"))

    def _on_disconnect(self, client: Client, _: Any, __: Any, reason: Any, ___: Any) -> None:
        connected, self._connected = self._connected, False
        self._generation += 1
        if self.failure is not None:
            return
        if reason.value == SESSION_TAKEN_OVER and self._subscription is not None:
            name = quoted(self._subscription.client_id)
            self.failure = f"{self._key}.client_id: expected a name of one client only, got {name}, which another uses"
            client.disconnect()
            self._answer()
        elif connected:
            self._count_short()
        elif not self._failing:
            about = "; it may ask for another certificate" if self._config.tls is not None else ""
            self._fails(f"it ended the connection without an answer{about}")

    def _count_short(self) -> None:
        """Two clients of one id take the connection from each other; most brokers do not say so."""
        self._short = self._short + 1 if time.monotonic() - self._since_s < SHORT_S else 0
        if self._short == MOST_SHORT and self._subscription is not None:
            name = quoted(self._subscription.client_id)
            self._say(
                f"{self._key}: the broker {self._config.address} ends one connection after the other; another client "
                f"may use the client_id {name}"
            )

    def _on_publish(self, _: Client, __: Any, ___: int, reason: Any, ____: Any) -> None:
        if reason.is_failure and not self._refused:
            self._refused = True
            self._say(f"{self._key}: the broker {self._config.address} refuses what is published: {reason}")
        with self._changed:
            self._confirmed += 1
            self._changed.notify_all()

    def _on_message(self, _: Client, __: Any, message: MQTTMessage) -> None:
        assert self._subscription is not None
        self._subscription.received(message, (self._generation, message.mid if message.qos else 0))

    def _works(self) -> None:
        """Connected, and subscribed."""
        self._connected, self._since_s = True, time.monotonic()
        if self._failing:
            self._failing = False
            self._say(f"{self._key}: the broker {self._config.address} answers again")
        self._answer()

    def _fails(self, reason: str) -> None:
        """It is asked again, and that is told once."""
        if not self._failing:
            self._failing = True
            self._say(f"{self._key}: the broker {self._config.address} does not answer: {reason}; it is asked again")
        self._answer()

    def _refuses(self, key: str, reason: str) -> None:
        """At the start that is an error; later it may be put right."""
        if self._started:
            self._fails(reason)
            return
        self.failure = one_line(f"{self._key}{key}: {reason}")
        self._client.disconnect()
        self._answer()

    def _answer(self) -> None:
        with self._changed:
            self._answered = True
            self._changed.notify_all()

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone ends no connection
            self._tell(one_line(line))
