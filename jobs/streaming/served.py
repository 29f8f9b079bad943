"""The champion that answers requests while the stream learns: a copy of it between two batches.

A request is answered by a `Snapshot`, which is never changed, and replaced as a whole. So one answer is of one version,
and no request waits for a batch. Copying takes at most `COPY_SHARE` of the time: where it is quick, every version is
served, else some are left out. While the stream waits for records, the newest is served.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from jobs.streaming.candidate import Candidate, make_stack
from jobs.streaming.config import StreamConfig
from jobs.streaming.outcome import finite
from simmatch.online.state import State
from simmatch.readout import LinearClassifier

COPY_SHARE = 0.02
"""Of the time, that copies of the champion may take."""


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
