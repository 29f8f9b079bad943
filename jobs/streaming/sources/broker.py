"""Records from an MQTT broker, each a JSON object. What is not acknowledged, the broker sends again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from jobs.streaming.mqtt import MqttConnection, Subscription
from jobs.streaming.mqtt_config import MqttConfig
from jobs.streaming.records import Delivery, Fault, SourceError
from jobs.streaming.sources.fields import Place, RecordKeys, from_json
from simmatch.documents import quoted, shortened

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage

LOOK_S = 1.0
"""Between two looks whether the connection will never work."""

LARGEST_PACKET = 16
"""Messages of so many times `max_record_bytes` are not even sent by the broker."""


def _filter(topic: str) -> str:
    """A filter of topics, checked: paho and brokers refuse others."""
    *inner, last = topic.split("/")
    wild = [level for level in (*inner, last) if len(level) > 1 and ("+" in level or "#" in level)]
    if wild or "#" in inner or not topic.isprintable():
        raise ValueError(f"expected a filter such as pumps/+/vibration or pumps/#, got {quoted(topic)}")
    return topic


TopicFilter = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_filter)]


class BrokerConfig(MqttConfig, RecordKeys):
    """Topics of an MQTT broker: a message is a JSON object, a record or a late label.

    >>> BrokerConfig(host="localhost", topics=("pumps/#",), client_id="pumps-1").session_s
    604800
    """

    topics: Annotated[tuple[TopicFilter, ...], Field(min_length=1, strict=False)]
    """Filters of topics, such as `pumps/+/vibration`. They are read with QoS 1; what is published with QoS 0 may be
    lost."""

    client_id: Annotated[str, Field(pattern=r"^[\w.:/-]+$", max_length=200)]
    """By this name the broker keeps messages while this stream is away. No other client may have it."""

    session_s: Annotated[int, Field(gt=0, lt=2**32)] = 7 * 86400
    """For so long. The broker may have a lower limit, and one of messages that it keeps."""

    most_unacknowledged: Annotated[int, Field(gt=0, lt=65536)] = 1000
    """Messages that the broker sends before it waits until they are in the journal. At least the records of a batch
    are needed, or batches end only by their deadline."""

    @model_validator(mode="after")
    def _named(self) -> BrokerConfig:
        if self.id_field is None or self.time_field is None:
            raise ValueError("expected id_field and time_field with mqtt, whose messages may come twice, got none")
        return self


class BrokerSource:
    """See `jobs.streaming.records.Source`."""

    def __init__(self, config: BrokerConfig, tell: Callable[[str], None]) -> None:
        self._config, self._tell = config, tell
        self._waiting: deque[tuple[MQTTMessage, Any]] = deque()
        self._arrived = Condition()
        self._lost = 0
        subscription = Subscription(
            topics=config.topics, received=self._received, client_id=config.client_id, session_s=config.session_s,
            most=config.most_unacknowledged, most_bytes=LARGEST_PACKET * config.max_record_bytes,
        )  # fmt: skip
        self._connection = MqttConnection(config, "source.mqtt", tell, subscription=subscription)

    @property
    def ended(self) -> bool:
        return False

    def poll(self, limit: int, wait_s: float) -> list[Delivery]:
        deadline = time.monotonic() + wait_s
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting, max(0.0, min(LOOK_S, deadline - time.monotonic())))
                taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            if taken or time.monotonic() >= deadline:
                return [self._delivery(*each) for each in taken]
            if self._connection.failure is not None:
                raise SourceError(self._connection.failure)

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._connection.acknowledge(delivery.receipt)

    def needs(self, key: str) -> bool:
        """There are no positions: the broker knows what was acknowledged."""
        return False

    def close(self) -> None:
        self._connection.close()

    def _received(self, message: MQTTMessage, receipt: Any) -> None:
        """Called by the thread of the connection. The broker sends no more than it may with QoS 1."""
        with self._arrived:
            if len(self._waiting) >= 2 * self._config.most_unacknowledged and message.qos == 0:
                self._lost += 1
                if self._lost > 1:
                    return
            else:
                self._waiting.append((message, receipt))
                self._arrived.notify()
                return
        with suppress(OSError, ValueError):  # as in `MqttConnection`
            self._tell("source.mqtt: messages of QoS 0 come faster than they are learnt from, and are lost; use QoS 1")

    def _delivery(self, message: MQTTMessage, receipt: Any) -> Delivery:
        try:
            place = shortened(message.topic)
        except UnicodeDecodeError:
            place = "a topic that is not UTF-8"
        raw, most = bytes(message.payload), self._config.max_record_bytes
        if len(raw) > most:
            fault = Fault(f"expected at most {most} bytes in a message, got {len(raw)}", raw[:most], place)
            return Delivery(fault, receipt=receipt)
        return Delivery(from_json(raw, self._config, Place(place)), receipt=receipt)
