"""Answers while a stream learns: over HTTP the latest by id, and scores of any window; on an MQTT topic all of them.

A request is answered by a `Snapshot`: the champion between two batches, copied and never changed, replaced as a whole.
So one answer is of one version, and no request waits for a batch. Copying takes at most `COPY_SHARE` of the time: where
it is quick, every version is served, else some are left out. While the stream waits for records, the newest is served.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from jobs.streaming.events import TopicConfig
from jobs.streaming.http_port import HttpConfig, HttpPort, Refused, last_part, token_from
from jobs.streaming.mqtt import MqttConnection
from jobs.streaming.outcome import Answer, Outcome, finite
from simmatch.config import Frozen, PositiveInt
from simmatch.data.windows import WindowShape, scaled
from simmatch.documents import quoted

if TYPE_CHECKING:
    from jobs.streaming.candidate import Candidate
    from jobs.streaming.config import StreamConfig, StreamDataConfig
    from simmatch.online.state import State
    from simmatch.readout import LinearClassifier

Floats = np.ndarray[Any, np.dtype[np.float64]]

COPY_SHARE = 0.02
"""Of the time, that copies of the champion may take."""


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


class FixedReadout:
    """The scores of an online readout as they were."""

    def __init__(self, classifier: LinearClassifier | None) -> None:
        self._classifier = classifier

    def scores(self, features: Tensor) -> Tensor | None:
        """Scores [B, classes]; None before there were two classes."""
        return None if self._classifier is None else self._classifier.scores(features)


class Snapshot:
    """A candidate between two batches, never changed.

    Made by the thread that learns, which only copies; what answers is built by the thread of the first request.

    Parameters
    ----------
    name: who it is.
    config: with its overrides.
    batch: the last batch that it has learnt from.
    classes: names, in the order of scores.
    shape: [C, H, W] of a window.
    """

    def __init__(
        self,
        name: str,
        config: StreamConfig,
        candidate: Candidate,
        *,
        batch: int,
        classes: Sequence[str],
        shape: Sequence[int],
    ) -> None:
        self.name, self.batch, self.classes, self.shape = name, batch, tuple(classes), list(shape)
        self._config = config
        self._candidate = cast(Any, copy.copy(candidate))
        self._candidate.readout = FixedReadout(candidate.readout.classifier)
        self._candidate.detector = copy.deepcopy(candidate.detector)
        self._candidate.stack = None
        self._weights: State | None = candidate.stack.state()
        self._lock = threading.Lock()

    def _built(self) -> Candidate:
        with self._lock:
            if self._weights is not None:
                from jobs.streaming.candidate import (
                    make_stack,  # which reads the configuration that holds this module's
                )

                stack = make_stack(self._config, self.shape, len(self.classes))
                stack.restore(self._weights)
                self._candidate.stack, self._weights = stack, None
        built: Candidate = self._candidate
        return built

    def score(self, x: Tensor, *, features: bool = False) -> list[dict[str, Any]]:
        """Answers about windows [n, C, H, W], as JSON has them."""
        said = self._built().say(x)
        novelty, novel = said.novelty.tolist(), said.novel.tolist()
        answers = []
        for index in range(len(x)):
            scores = None if said.scores is None else said.scores[index].tolist()
            answers.append(
                {
                    "label": None if scores is None else self.classes[int(said.predictions[index, 0])],
                    "scores": {} if scores is None else dict(zip(self.classes, map(finite, scores), strict=False)),
                    "novelty": finite(novelty[index]),
                    "novel": novel[index],
                }
                | ({"features": list(map(finite, said.encoded.features[index].tolist()))} if features else {})
            )
        return answers


def prepared(values: Floats, data: StreamDataConfig, shape: Sequence[int]) -> Tensor:
    """Windows as a source delivers them, as input [n, C, H, W] of a stack.

    Parameters
    ----------
    values: [n, samples, channels], or images [n, C, H, W] of 0 to 255.
    shape: [C, H, W] of an input.

    Raises
    ------
    ValueError
        They have another shape.
    """
    channels, height, width = shape
    image = height > 1 or values.ndim == 4
    expected = [channels, height, width] if image else [width, channels]
    if list(values.shape[1:]) != expected:
        what = "channels × height × width" if image else "samples × channels"
        given = " × ".join(map(str, values.shape[1:])) or "a number"
        raise ValueError(f"expected {what} of {' × '.join(map(str, expected))}, got {given}")
    if image:
        return torch.from_numpy(values).float() / 255
    how = WindowShape(width, width, data.window_scale, data.window_floor)
    return torch.from_numpy(scaled(values.transpose(0, 2, 1), how)[:, :, None])


class Served:
    """The snapshot of the moment. `offer` is called by the thread that learns, all else by any.

    clock: seconds, as of `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._not_before = -math.inf

    @property
    def snapshot(self) -> Snapshot | None:
        """None before the stack is calibrated."""
        return self._snapshot

    def offer(self, copied: Callable[[], Snapshot], *, idle: bool = False) -> bool:
        """A new version is there: copy it, unless the last copy was too short a time ago. Returns whether it was.

        idle: nothing else is to be done.
        """
        started = self._clock()
        if started < self._not_before and not idle:
            return False
        self._snapshot = copied()  # one assignment: a request has the old one or the new one
        ended = self._clock()
        self._not_before = ended + (ended - started) * (1 / COPY_SHARE - 1)
        return True


class Latest:
    """The latest answers by id, at most so many. `add` is called by one thread, `of` by any."""

    def __init__(self, most: int) -> None:
        self._most, self._size, self._newest = most, 0, 0
        self._by_id: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, answers: Sequence[Answer]) -> None:
        """Answers about windows that came before are left out."""
        with self._lock:
            for answer in answers:
                if answer.window > self._newest:
                    self._newest = answer.window
                    self._by_id.setdefault(answer.id, []).append(as_json(answer))
                    self._by_id.move_to_end(answer.id)
                    self._size += 1
            while self._size > self._most and self._by_id:
                _, oldest = self._by_id.popitem(last=False)
                self._size -= len(oldest)

    def of(self, record: str) -> list[dict[str, Any]]:
        """Answers about the windows that end with this record; none where it is not known."""
        with self._lock:
            return list(self._by_id.get(record, ()))


def as_json(answer: Answer, *, features: bool = False) -> dict[str, Any]:
    """An answer as JSON has it."""
    values: dict[str, Any] = {
        "id": answer.id,
        "number": answer.number,
        "time": finite(answer.time),
        "window": answer.window,
        "group": answer.group,
        "candidate": answer.candidate,
        "version": answer.version,
        "label": answer.label,
        "scores": {name: finite(float(score)) for name, score in answer.scores.items()},
        "novelty": finite(answer.novelty),
        "novel": answer.novel,
    }
    if answer.note:
        values["note"] = answer.note
    if features and answer.features is not None:
        values["features"] = list(map(finite, answer.features.tolist()))
    return values


class Answers:
    """Answers over HTTP and on an MQTT topic.

    Parameters
    ----------
    stream: its name.
    data: how windows are scaled.
    state: what GET /state adds.
    tell: is given lines for people, from other threads.

    Raises
    ------
    ConfigError
        The token is missing, the address cannot be used, or the broker refuses the user.
    """

    def __init__(
        self,
        stream: str,
        config: AnswersConfig,
        *,
        data: StreamDataConfig,
        state: Callable[[], Mapping[str, Any]],
        tell: Callable[[str], None],
    ) -> None:
        self.served, self.latest = Served(), Latest(config.kept)
        self._stream, self._config, self._data, self._state = stream, config, data, state
        self.port: HttpPort | None = None
        self._connection: MqttConnection | None = None
        if config.http is not None:
            token = token_from(config.http.token_env, "answers.http.token_env")
            routes = {("GET", "state"): self._get_state, ("GET", "answers"): self._get_answers}
            self.port = HttpPort(config.http, routes | {("POST", "score"): self._post_score}, token)
        if config.mqtt is not None:
            self._connection = MqttConnection(config.mqtt, "answers.mqtt", tell)

    @property
    def url(self) -> str | None:
        """Where requests are answered."""
        return self.port.url if self.port is not None else None

    @property
    def dropped(self) -> int:
        """Answers that were not published, as the broker was away for too long."""
        return self._connection.dropped if self._connection is not None else 0

    def add(self, outcome: Outcome) -> None:
        """The answers of a batch."""
        if self.port is not None:
            self.latest.add(outcome.answers)
        topic = self._config.mqtt
        if self._connection is not None and topic is not None:
            for answer in outcome.answers:
                content = {"stream": self._stream} | as_json(answer, features=topic.features)
                self._connection.publish(topic.topic, dumped(content))

    def offer(self, copied: Callable[[], Snapshot], *, idle: bool = False) -> None:
        """A new version of the champion, for POST /score."""
        if self.port is not None:
            self.served.offer(copied, idle=idle)

    def close(self) -> None:
        """Answer no more."""
        if self.port is not None:
            self.port.close()
        if self._connection is not None:
            self._connection.close()

    def _get_state(self, rest: str, _: Any) -> dict[str, Any]:
        if rest:
            raise Refused(HTTPStatus.NOT_FOUND, "expected GET /state")
        snapshot, port = self.served.snapshot, self.port
        served = {"candidate": snapshot.name, "batch": snapshot.batch} if snapshot is not None else None
        counts = {"answered": port.answered, "refused": port.refused} | port.percentiles_ms() if port else {}
        return {"stream": self._stream, "served": served, "requests": counts} | dict(self._state())

    def _get_answers(self, rest: str, _: Any) -> dict[str, Any]:
        record = last_part(rest)
        found = self.latest.of(record)
        if not found:
            raise Refused(HTTPStatus.NOT_FOUND, f"expected the id of a late record, got {quoted(record)}")
        return {"id": record, "answers": found}

    def _post_score(self, rest: str, body: Any) -> dict[str, Any]:
        assert self._config.http is not None
        if rest:
            raise Refused(HTTPStatus.NOT_FOUND, "expected POST /score")
        windows, features = _windows_of(body, self._config.http.windows)
        snapshot = self.served.snapshot
        if snapshot is None:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "expected a calibrated model: none yet", after_s=1.0)
        try:
            x = prepared(windows, self._data, snapshot.shape)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"windows: {error}") from None
        try:
            answers = snapshot.score(x, features=features)
        except torch.OutOfMemoryError:  # of a GPU on which the stream learns
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "expected free memory on the GPU", after_s=1.0) from None
        return {"candidate": snapshot.name, "batch": snapshot.batch, "windows": answers}


def dumped(values: Any) -> bytes:
    """JSON for a broker."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def _windows_of(body: Any, most: int) -> tuple[Floats, bool]:
    """The windows of a request, and whether features are asked for."""

    def refuse(reason: str) -> Refused:
        return Refused(HTTPStatus.BAD_REQUEST, reason)

    if not isinstance(body, dict) or not set(body) <= {"windows", "features"} or "windows" not in body:
        raise refuse('expected {"windows": [...]}, with "features": true or without')
    features = body.get("features", False)
    if not isinstance(features, bool):
        raise refuse(f"features: expected true or false, got {quoted(features)}")
    given = body["windows"]
    if not isinstance(given, list) or not 0 < len(given) <= most:
        raise refuse(f"windows: expected a list of 1 to {most}")
    try:
        values = np.asarray(given)
        if values.dtype.kind not in "iuf":  # text would be read as numbers, and truth values as 0 and 1
            raise ValueError
        values = values.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise refuse("windows: expected lists of numbers of equal lengths") from None
    if not np.isfinite(values).all():
        raise refuse("windows: expected finite numbers")
    return values, features
