"""Configuration of answers while a stream learns: over HTTP, and on an MQTT topic."""

from __future__ import annotations

from jobs.streaming.events import TopicConfig
from jobs.streaming.http_port import HttpConfig
from simmatch.config import Frozen, PositiveInt


class AnswerTopicConfig(TopicConfig):
    """A topic that every answer is published to as JSON, with QoS 1.

    After a restart answers since the newest snapshot are published again, with the same content: a receiver drops a
    `window` that it knows. While the broker is away the latest 1,000 wait; others are dropped, and counted.
    """

    features: bool = False
    """With the features."""


class AnswersConfig(Frozen):
    """Who gets answers while the stream learns."""

    http: HttpConfig | None = None
    mqtt: AnswerTopicConfig | None = None

    kept: PositiveInt = 10_000
    """Latest answers that GET /answers/ID knows, in memory; after a restart, those since the newest snapshot."""
