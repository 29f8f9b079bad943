"""Answers while a stream learns: over HTTP the latest by id, and scores of any window; on an MQTT topic all of them.

Scores are those of the champion as it was between two batches, see `jobs.streaming.served`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.streaming.answers_config import AnswersConfig
from jobs.streaming.config import StreamDataConfig
from jobs.streaming.http_port import HttpPort, Refused, last_part
from jobs.streaming.mqtt import MqttConnection
from jobs.streaming.outcome import Answer, Outcome, finite
from jobs.streaming.served import Served, Snapshot
from jobs.streaming.tokens import token_from
from simmatch.data.windows import WindowShape, scaled
from simmatch.documents import quoted

Floats = np.ndarray[Any, np.dtype[np.float64]]


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
            raise Refused(
                HTTPStatus.NOT_FOUND, f"expected the id of a recent record in which a window ends, got {quoted(record)}"
            )
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
