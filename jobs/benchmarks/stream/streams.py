"""What a benchmark of streams is made of: parts in order, their batches, and which labels arrive when.

    warm-up → segment 0 → segment 1 → …

A stream is learnt from once, in its order. Its warm-up is data from before it begins: settings are chosen there and
whitening is measured there; every row learns from it like from the rest, and it is not scored. Each segment is scored
batch by batch before anything is learnt from the batch. Held-out parts are never learnt from: after each segment, all
of them are scored, which shows what was forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simmatch.data.prepared import StoredImages
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.seeding import seeded


@dataclass(frozen=True, eq=False)
class Part:
    """Some records in order.

    Attributes
    ----------
    name: in tables and figures.
    x: [N, C, H, W], windows of signals or images.
    labels: int64 [N], the true classes.

    >>> len(Part("load 0", torch.zeros(3, 1, 1, 8), torch.tensor([0, 1, 1])))
    3
    """

    name: str
    x: StoredImages
    labels: Tensor

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.labels), (len(self.x), len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: slice) -> Tensor:
        """Records [n, C, H, W] as floating-point numbers; pixels are divided by 255."""
        x = self.x[chosen]
        return x if x.is_floating_point() else x.float() / 255

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Records and labels, `size` at a time.

        >>> [len(labels) for _, labels in Part("", torch.zeros(5, 1, 1, 8), torch.zeros(5).long()).batches(2)]
        [2, 2, 1]
        """
        for start in range(0, len(self), size):
            chosen = slice(start, min(start + size, len(self)))
            yield self.read(chosen), self.labels[chosen]


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream: what is learnt from, in order, and what is held out.

    Attributes
    ----------
    name: of its results.
    classes: number of classes.
    warm_up: learnt from first, not scored.
    segments: learnt from and scored, in order.
    held_out: scored after every segment.
    batch_size: records that are tested together, then learnt from.
    pilot: another stream, of other records, on which settings are chosen; None: the warm-up.
    by_final: rows are compared by their accuracy on the held-out parts after the last segment, not prequentially.

    >>> part = Part("a", torch.zeros(4, 1, 1, 8), torch.arange(4))
    >>> Stream("example", 4, part, (part,), (), batch_size=2).source.image_size
    (1, 8)
    """

    name: str
    classes: int
    warm_up: Part
    segments: tuple[Part, ...]
    held_out: tuple[Part, ...]
    batch_size: int
    pilot: Stream | None = None
    by_final: bool = False

    @property
    def source(self) -> InputConfig:
        """Shape of a record, and the number of classes."""
        return InputConfig.of(self.warm_up.x, self.classes)

    def before(self) -> Stream:
        """What settings are chosen on: the pilot, or the warm-up as a stream of which the second half is scored."""
        if self.pilot is not None:
            return self.pilot if self.by_final else replace(self.pilot, held_out=())
        half = len(self.warm_up) // 2 // self.batch_size * self.batch_size
        first, second = (
            Part(name, self.warm_up.read(chosen), self.warm_up.labels[chosen])
            for name, chosen in (("first half", slice(half)), ("second half", slice(half, len(self.warm_up))))
        )
        return Stream(f"{self.name}, before it begins", self.classes, first, (second,), (), self.batch_size)


@dataclass(frozen=True)
class Labelling:
    """Which labels are given, and when.

    Attributes
    ----------
    share: of the records, drawn at random, whose label is ever given.
    delay: records that arrive between a record and its label; 0: the label comes with the record's batch.

    >>> Labelling(0.05, 500).name
    '5% late 500'
    """

    share: float = 1.0
    delay: int = 0

    @property
    def name(self) -> str:
        """Of results and columns."""
        return f"{100 * self.share:g}%" + (f" late {self.delay}" if self.delay else "")

    def given(self, labels: Tensor, first: int, seed: int) -> Tensor:
        """Labels [n] of the records from number `first` on, `UNLABELLED` where none is ever given.

        >>> int((Labelling(0.5).given(torch.arange(1000), first=0, seed=0) != UNLABELLED).sum()) in range(450, 550)
        True
        """
        if self.share >= 1.0:
            return labels
        drawn = torch.rand(first + len(labels), generator=seeded("labels of a stream", seed))[first:]
        return torch.where(drawn < self.share, labels, UNLABELLED)
