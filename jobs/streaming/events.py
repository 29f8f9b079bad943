"""Events of a stream to a webhook and to an MQTT topic; `jobs.streaming.curves` sends them to MLflow.

Each has an index, and is sent at least once, in order: a receiver that must act once drops an index that it knows. See
`jobs.streaming.outbox`.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator

import jobs.streaming.outbox as outbox
from cluster.redaction import redact
from cluster.timeouts import run_with_timeout
from jobs.streaming.mqtt import MqttConnection
from jobs.streaming.mqtt_config import MqttConfig
from jobs.streaming.outbox import EventRefused, Message, Outbox, message_of
from jobs.streaming.outcome import EventKind, Outcome
from jobs.streaming.tokens import token_from
from simmatch.config import Frozen, PositiveFloat, PositiveInt

SECRET_HEADER = "X-Simmatch-Secret"
INDEX_HEADER = "Idempotency-Key"
NEVER = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
"""Answers after which an event is not sent again."""

KINDS: tuple[EventKind, ...] = get_args(EventKind)
Kinds = Annotated[tuple[EventKind, ...], Field(strict=False)]


class WebhookConfig(Frozen):
    """Where events are sent as JSON, one POST each."""

    url: str
    """Starts with https://, or with http:// where the network is trusted. Holds no credentials; redirects are not
    followed."""

    secret_env: str = "SIMMATCH_WEBHOOK_SECRET"
    """Environment variable that holds the shared secret, at least 16 characters; sent as `X-Simmatch-Secret`."""

    kinds: Kinds = KINDS
    """What is sent."""

    timeout_s: PositiveFloat = 5.0
    """Longest wait for one answer. What fails is sent again, after 1 s at first, then up to a minute."""

    waiting: PositiveInt = 1000
    """Most events that wait; of more, the oldest faults are dropped, then the oldest others, and counted."""

    @field_validator("url")
    @classmethod
    def _is_sound(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            sound = False
        if not sound or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"expected http://HOST/… or https://HOST/…, got {redact(url)!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"expected no credentials in the address: secret_env names them, got {redact(url)!r}")
        return url


class TopicConfig(MqttConfig):
    """A topic of an MQTT broker."""

    topic: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^+#\x00]+$")]
    """Without wildcards."""


class EventTopicConfig(TopicConfig):
    """A topic that events are published to as JSON, with QoS 1."""

    kinds: Kinds = KINDS
    waiting: PositiveInt = 1000
    """Most events that wait; of more, the oldest faults are dropped, then the oldest others, and counted."""


class EventsConfig(Frozen):
    """Who is told of events, beside MLflow, the page and the log."""

    webhook: WebhookConfig | None = None
    mqtt: EventTopicConfig | None = None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: the secret would go to another place."""


class Webhook:
    """Sends one message; an answer other than 2xx is an error.

    Raises
    ------
    ConfigError
        There is no secret in the environment.
    """

    def __init__(self, config: WebhookConfig) -> None:
        self._config = config
        self._secret = token_from(config.secret_env, "events.webhook.secret_env")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, message: Message) -> None:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "simmatch",
            SECRET_HEADER: self._secret,
            INDEX_HEADER: f"{message.stream}-{message.index}",
        }
        request = urllib.request.Request(
            self._config.url, message.model_dump_json().encode(errors="replace"), headers, method="POST"
        )
        timeout_s = self._config.timeout_s
        # one that answers byte by byte would reset the time-out of its connection with each
        run_with_timeout(timeout_s, "webhook", partial(self._post, request, timeout_s))

    def _post(self, request: urllib.request.Request, timeout_s: float) -> None:
        try:
            with self._opener.open(request, timeout=timeout_s):
                pass
        except urllib.error.HTTPError as error:
            with error:
                reason = f"status {error.code}"
                if error.code in NEVER:
                    raise EventRefused(reason) from None
                raise ConnectionError(reason) from None


class Topic:
    """Publishes one message, and waits for the broker's word."""

    def __init__(self, config: EventTopicConfig, tell: Callable[[str], None]) -> None:
        self._topic = config.topic
        self.connection = MqttConnection(config, "events.mqtt", tell)

    def __call__(self, message: Message) -> None:
        if not self.connection.connected or not self.connection.publish(
            self._topic, message.model_dump_json().encode(errors="replace")
        ):
            raise ConnectionError("the broker does not answer")
        if not self.connection.flush(outbox.LONGEST_PAUSE_S):
            raise ConnectionError("the broker does not confirm")


class Events:
    """Sends the events of a stream to all its receivers.

    Parameters
    ----------
    tell: is given lines for people, from other threads.

    Raises
    ------
    ConfigError
        A secret is missing, or the broker refuses the user.
    """

    def __init__(self, stream: str, run_dir: Path, config: EventsConfig, tell: Callable[[str], None]) -> None:
        self._stream, self._run_dir = stream, run_dir
        self._kinds: list[Sequence[str]] = []
        self.outboxes: list[Outbox] = []
        self._topic: Topic | None = None
        if config.webhook is not None:
            self._add("webhook", Webhook(config.webhook), config.webhook, tell)
        if config.mqtt is not None:
            self._topic = Topic(config.mqtt, tell)
            self._add("mqtt", self._topic, config.mqtt, tell)
        kept = outbox.load(run_dir).receivers
        for each in self.outboxes:
            each.start(kept.get(each.name, outbox.Waiting()))

    def _add(
        self,
        name: str,
        send: Callable[[Message], None],
        config: WebhookConfig | EventTopicConfig,
        tell: Callable[[str], None],
    ) -> None:
        self.outboxes.append(Outbox(name, send, config.waiting, tell))
        self._kinds.append(config.kinds)

    def add(self, outcome: Outcome) -> None:
        """Queue the events of a batch, and return at once; those that came before are left out."""
        if outcome.events:
            for each, kinds in zip(self.outboxes, self._kinds, strict=True):
                each.put(message_of(self._stream, event) for event in outcome.events if event.kind in kinds)

    def sync(self) -> None:
        """What waits is on the disk.

        Raises
        ------
        OSError
            The disk did not take it.
        """
        if self.outboxes:
            outbox.write(self._run_dir, self.outboxes)

    def dropped(self) -> dict[str, int]:
        """Events that were never sent, by receiver."""
        return {each.name: each.dropped for each in self.outboxes}

    def close(self) -> None:
        """Send what waits, for a few seconds; the rest at the next start."""
        for each in self.outboxes:
            each.close()
        if self._topic is not None:
            self._topic.connection.close()
