"""Records and signals of one distribution: independent of each other, or dependent as those of real processes are.

bearings, images   drawn at random; or by class, in runs: a machine stays in a state
Autoregressive     simulated signals that remember
Switching          simulated signals whose distribution is that of a class, and classes come in runs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Generator, Tensor

from jobs.benchmarks.stream.bearings import FILES, WINDOW
from simmatch.data.config import DataConfig
from simmatch.data.prepared import StoredImages
from simmatch.data.sources import load_dataset
from simmatch.online.drift import ERROR

Draw = Callable[[int, Generator], tuple[Tensor, Tensor]]
"""(number of records, generator) → records [n, C, H, W] and their classes."""

Signals = Callable[[int, float, Generator], dict[str, Tensor]]
"""(number of records, rate of errors, generator) → signals of a stream that begins there, [n] each."""

HOP = 7
"""Samples between windows that can be drawn: of the recordings of one load, some 150,000."""

FAULTS = 9
"""Classes of the bearings, and of simulated signals."""

RUN = 50
"""Records of a run, the mean."""


class Runs:
    """Classes of records that follow each other in runs; each call goes on where the last one ended.

    Parameters
    ----------
    turns: all runs have the mean length, and classes take turns; else lengths are geometric, and classes are drawn.

    >>> generator = torch.Generator().manual_seed(0)
    >>> [int((classes == 2).sum()) for classes in [Runs(turns=True)(120, generator)]]
    [20]
    """

    def __init__(self, *, turns: bool = False) -> None:
        self._turns, self._now, self._left = turns, -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, count: int, generator: Generator) -> Tensor:
        """The classes of the next records, int64 [count]."""
        while len(self._left) < count:
            step, length = 1, RUN
            if not self._turns:
                step = int(torch.randint(1, FAULTS, (1,), generator=generator))
                length = int(torch.empty(1).geometric_(1 / RUN, generator=generator))
            self._now = (self._now + step) % FAULTS
            self._left = torch.cat([self._left, torch.full((length,), self._now)])
        classes, self._left = self._left[:count], self._left[count:]
        return classes


def windows_at(folder: Path, load: int, runs: Runs | None = None) -> Draw:
    """Windows of bearings at one load, which begin anywhere; classes are the nine faults, at random or in runs."""
    path = str(folder / "bearings" / FILES[load])
    config = DataConfig(path=path, window=WINDOW, hop=HOP, label_pattern=r"/(\w+)$", split="time", test_fraction=0.01)
    dataset = load_dataset(config)
    return _drawn(dataset.train_images, dataset.train_labels, runs)


def images(degrees: float) -> Draw:
    """Fashion-MNIST, turned."""
    from torchvision.transforms.functional import InterpolationMode, rotate

    dataset = load_dataset(DataConfig(name="fashion_mnist"))
    draw = _drawn(dataset.train_images, dataset.train_labels)

    def turned(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x, labels = draw(count, generator)
        return rotate(x.float() / 255, degrees, InterpolationMode.BILINEAR), labels

    return turned


def _drawn(x: StoredImages, labels: Tensor, runs: Runs | None = None) -> Draw:
    places = [(labels == each).nonzero()[:, 0] for each in range(int(labels.max()) + 1)]

    def draw(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        if runs is None:
            chosen = torch.randint(len(labels), (count,), generator=generator)
        else:
            classes, share = runs(count, generator), torch.rand(count, generator=generator)
            pairs = zip(classes.tolist(), share.tolist(), strict=True)
            chosen = torch.stack([places[each][int(part * len(places[each]))] for each, part in pairs])
        return x[chosen], labels[chosen]

    return draw


@dataclass(frozen=True)
class Autoregressive:
    """Each signal is c times its last value and noise; its variance is 1. It is an error where it is large.

    c: coefficient; 0 gives independent values. Their correlation time is (1 + c) / (1 - c).

    >>> Autoregressive(0.9)(50, 0.1, torch.Generator().manual_seed(0))["error"].shape
    torch.Size([50])
    """

    coefficient: float

    def __call__(self, count: int, rate: float, generator: Generator) -> dict[str, Tensor]:
        """The signals."""
        from scipy.signal import lfilter
        from scipy.special import ndtri

        c, noise = self.coefficient, torch.randn(count, 3, generator=generator, dtype=torch.float64)
        noise[1:] *= sqrt(1 - c * c)
        error, novelty, objective = torch.from_numpy(lfilter([1.0], [1.0, -c], noise.numpy(), axis=0)).T
        return {ERROR: (error > ndtri(1 - rate)).double(), "novelty": novelty, "objective": objective}


@dataclass(frozen=True)
class Switching:
    """Classes in runs; given the class, values are independent, and Gaussian with the class's mean and variance 1.

    spread: standard deviation of the means. Rates of errors of the classes are uniform in [0, 2 · rate].

    >>> Switching(0.3)(50, 0.1, torch.Generator().manual_seed(0))["novelty"].shape
    torch.Size([50])
    """

    spread: float

    def __call__(self, count: int, rate: float, generator: Generator) -> dict[str, Tensor]:
        """The signals."""
        rates = 2 * rate * torch.rand(FAULTS, generator=generator)
        means = self.spread * torch.randn(2, FAULTS, generator=generator)
        classes = Runs()(count, generator)
        novelty, objective = means[:, classes] + torch.randn(2, count, generator=generator)
        error = torch.rand(count, generator=generator) < rates[classes]
        return {ERROR: error.double(), "novelty": novelty, "objective": objective}
