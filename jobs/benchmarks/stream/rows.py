"""Rows of the benchmark: what predicts the class of records, and learns from them.

A row that learns features without gradients is a `Features`; `WithReadout` puts the online readout of all rows behind
it. Rows with a head of their own, such as a network, are a `Row` themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from jobs.benchmarks.stream.streams import Stream
from simmatch.config import ModelConfig
from simmatch.labels import UNLABELLED
from simmatch.online.encoded import Encoded
from simmatch.online.rate import RateConfig
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.online.stack import OnlineStack

NO_CLASS = -1
"""A prediction where none can be made yet."""


class Row(Protocol):
    """Predicts the classes of records, then learns from them."""

    def predict(self, x: Tensor) -> Tensor:
        """Classes int64 [B] of records [B, C, H, W], `NO_CLASS` where there is no prediction yet; changes nothing."""
        ...

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Learn from records that were just predicted; labels [B], `UNLABELLED` where there is none yet."""
        ...

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """Learn from labels that come late; everything else was learnt from these records when they arrived."""
        ...

    def end_segment(self, number: int) -> object:
        """A segment has ended, −1 for the warm-up; rows that are frozen after it stop learning."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what has to be kept to go on."""
        ...


class Features(Protocol):
    """Features that may learn without being told of the readout."""

    def encode(self, x: Tensor) -> Tensor:
        """Features [B, F] of records [B, C, H, W]; changes nothing."""
        ...

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Learn from a batch, the one that was encoded last."""
        ...

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """Learn from labels that come late."""
        ...

    def end_segment(self, number: int) -> bool:
        """A segment has ended, −1 for the warm-up; whether features have moved by that."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""
        ...


class WithReadout:
    """Features with the online readout behind them: a `Row`.

    Parameters
    ----------
    features: what the readout sees.
    config: of the readout.
    frozen_after: number of the segment after which the features do not learn, −1 for the warm-up; None: they always do.
    afresh_after: number of the segment after which the readout begins anew, as sums of features that have moved since
        are worth little; None: it never does.
    recompute_every: batches from one time to the next that the readout is computed anew from its reservoir, as long as
        the features learn, and when they have learnt at the end of a segment, or are frozen; 0: never.

    Classes are numbered for the readout in the order in which their labels arrive.
    """

    def __init__(
        self,
        features: Features,
        config: ReadoutConfig,
        *,
        frozen_after: int | None = None,
        afresh_after: int | None = None,
        recompute_every: int = 0,
    ) -> None:
        self.features, self.config = features, config
        self.frozen_after, self.afresh_after, self.recompute_every = frozen_after, afresh_after, recompute_every
        self.learning, self.readout, self.names, self.batches = True, None, list[int](), 0
        self._encoded: tuple[Tensor, Tensor] | None = None

    readout: OnlineReadout | None

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        encoded = self._encode(x)
        scores = None if self.readout is None else self.readout.scores(encoded)
        if scores is None:
            return torch.full((len(x),), self.names[0] if self.names else NO_CLASS)
        return torch.tensor(self.names)[scores.argmax(dim=1)]

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        encoded = self._encode(x)
        if self.learning:
            self.features.learn(x, labels)
        self._encoded = None
        self._learn_readout(x, encoded, labels)
        self.batches += 1
        if self.learning and self.recompute_every and self.batches % self.recompute_every == 0:
            self._recompute()

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self._learn_readout(x, self.features.encode(x), labels)
        if self.learning:
            self.features.learn_labels(x, labels)

    def end_segment(self, number: int) -> None:
        """See `Row`."""
        moved = self.learning and self.features.end_segment(number)
        if number == self.frozen_after:
            self.learning, moved = False, True
        if moved and self.recompute_every:
            self._recompute()
        if number == self.afresh_after:
            self.readout, self.names = None, []

    @property
    def nbytes(self) -> int:
        """See `Row`."""
        return self.features.nbytes + (0 if self.readout is None else self.readout.nbytes)

    def _recompute(self) -> None:
        if self.readout is not None:
            self.readout.recompute(self.features.encode)

    def _encode(self, x: Tensor) -> Tensor:
        if self._encoded is None or self._encoded[0] is not x:
            self._encoded = (x, self.features.encode(x))
        return self._encoded[1]

    def _learn_readout(self, x: Tensor, encoded: Tensor, labels: Tensor) -> None:
        if self.readout is None:
            self.readout = OnlineReadout(encoded.shape[1], self.config)
        self.names += [each for each in dict.fromkeys(labels.tolist()) if each not in (UNLABELLED, *self.names)]
        number = {name: index for index, name in enumerate(self.names)} | {UNLABELLED: UNLABELLED}
        numbers = torch.tensor([number[each] for each in labels.tolist()], dtype=torch.int64)
        self.readout.learn(encoded, numbers, inputs=x if self.config.reservoir else None)


@dataclass(frozen=True)
class Fixed:
    """Features that do not learn: a function.

    >>> Fixed(lambda x: x.flatten(1)).encode(torch.zeros(2, 1, 1, 8)).shape
    torch.Size([2, 8])
    """

    function: Callable[[Tensor], Tensor]
    nbytes: int = 0

    def encode(self, x: Tensor) -> Tensor:
        """See `Features`."""
        return self.function(x)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Nothing."""

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """Nothing."""

    def end_segment(self, number: int) -> bool:
        """Nothing."""
        return False


class SimilarityMatching:
    """A stack that learns from every batch, calibrated on the warm-up: `Features`.

    Parameters
    ----------
    stream: what it will learn.
    model: its layers.
    seed: of its weights.
    rate: how its learning rates change.
    """

    def __init__(self, stream: Stream, model: ModelConfig, seed: int, rate: RateConfig) -> None:
        self.stack = OnlineStack(model, stream.source, seed=seed, rate=rate)
        self.stack.calibrate(stream.warm_up.read(slice(None)))
        self._encoded: tuple[Tensor, Encoded] | None = None

    def encode(self, x: Tensor) -> Tensor:
        """See `Features`."""
        self._encoded = x, self.stack.encode(x)
        return self._encoded[1].features

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Features`."""
        known = self._encoded
        self.stack.learn(known[1] if known is not None and known[0] is x else self.stack.encode(x))
        self._encoded = None

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """Nothing."""

    def end_segment(self, number: int) -> bool:
        """Nothing."""
        return False

    @property
    def nbytes(self) -> int:
        """Of its state."""
        return sum(value.nbytes for value in self.stack.state().values())


class NoChange:
    """The class of the last label that arrived.

    >>> row = NoChange()
    >>> row.learn(torch.zeros(2, 1, 1, 8), torch.tensor([3, UNLABELLED]))
    >>> row.predict(torch.zeros(1, 1, 1, 8))
    tensor([3])
    """

    def __init__(self) -> None:
        self.last = NO_CLASS

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        return torch.full((len(x),), self.last)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        given = labels[labels != UNLABELLED]
        if len(given):
            self.last = int(given[-1])

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn(x, labels)

    def end_segment(self, number: int) -> None:
        """Nothing."""

    @property
    def nbytes(self) -> int:
        """Of one number."""
        return 8


@dataclass(frozen=True)
class Kind:
    """How a row is made, and the settings it may choose from on the warm-up of a stream.

    Attributes
    ----------
    make: (stream, seed, settings) → an untrained row.
    candidates: name → settings; the first is taken where there is nothing to choose from.
    """

    make: Callable[[Stream, int, Any], Row]
    candidates: Mapping[str, Any] = field(default_factory=lambda: {"": None})
