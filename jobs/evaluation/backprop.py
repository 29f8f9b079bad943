"""Training by backpropagation: the rival of local learning rules, with four settings to choose from per budget.

Cross-entropy with label smoothing, AdamW (Loshchilov & Hutter 2019), a learning rate that rises for a tenth of the
steps and falls to zero along a cosine, dropout of the input of the dense layers. No augmentation, because no rival
has any. Two threads are slower than two processes of one thread each: small networks do not fill both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.evaluation.lenet import LeNet
from jobs.evaluation.material import Labelled, UnitImages, in_batches
from simmatch.readout import accuracy
from simmatch.seeding import seeded

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""

IMAGES_AT_ONCE = 500
"""Images that are encoded or scored together; more do not fit the cache."""


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained.

    Attributes
    ----------
    lr: highest learning rate.
    weight_decay: of weights, not of biases; a step takes off lr · weight_decay of them.
    batch_size: images per step; all, where there are fewer.
    epochs, least_steps: passes over the images, and steps if those would be fewer.
    dropout: share of the values that a dense layer does not see in a step.
    label_smoothing: probability that the target spreads over all classes.

    Raises
    ------
    ValueError
        A value out of range.
    """

    lr: float
    weight_decay: float = 0.01
    batch_size: int = 32
    epochs: float = 25.0
    least_steps: int = 1
    dropout: float = 0.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for key in ("lr", "epochs", "batch_size", "least_steps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}: expected a positive number, got {getattr(self, key)}")
        for key in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 0 and less than 1, got {getattr(self, key)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")

    def steps(self, num_images: int) -> int:
        """Number of steps for so many images."""
        return max(self.least_steps, math.ceil(self.epochs * num_images / min(self.batch_size, num_images)))

    def shortened(self, share: float) -> TrainSettings:
        """The same settings for a share of the steps."""
        return replace(self, epochs=share * self.epochs, least_steps=math.ceil(share * self.least_steps))


Kind = Literal["few", "many"]
"""Size of a budget: up to 100 labels per class, or more."""

CANDIDATES: Mapping[Kind, tuple[TrainSettings, ...]] = {
    "few": (
        TrainSettings(lr=2e-3, epochs=20, least_steps=250),
        TrainSettings(lr=2e-3, epochs=20, least_steps=250, dropout=0.15),
        TrainSettings(lr=4e-3, epochs=20, least_steps=250, dropout=0.15),
        TrainSettings(lr=4e-3, epochs=20, least_steps=250, dropout=0.3),
    ),
    "many": (
        TrainSettings(lr=2e-3, batch_size=64, epochs=4, least_steps=1000),
        TrainSettings(lr=4e-3, batch_size=64, epochs=4, least_steps=1000),
        TrainSettings(lr=4e-3, batch_size=64, epochs=4, least_steps=1000, dropout=0.1),
        TrainSettings(lr=6e-3, batch_size=128, epochs=4, least_steps=1000),
    ),
}
"""Settings worth trying, chosen on held-out images of Fashion-MNIST."""


def candidates(per_class: int | None) -> tuple[TrainSettings, ...]:
    """The settings to choose from at a budget of labels per class; None for all labels."""
    return CANDIDATES["few" if per_class is not None and per_class <= 100 else "many"]


def train(
    net: LeNet, images: UnitImages, labels: Tensor, settings: TrainSettings, seed: int, frozen: bool = False
) -> None:
    """Train a network, from the weights that it has.

    Parameters
    ----------
    images, labels: [N, C, H, W] in [0, 1] and int64 [N].
    seed: of the order of the images and of dropout. On one machine and number of threads, runs are bitwise equal.
    frozen: do not train the convolutions, but the dense layers on their output, which is computed once.

    Raises
    ------
    ValueError
        Numbers of images and labels that differ or are 0.
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(f"expected images with one label each, got {len(images)} images and {len(labels)} labels")
    inputs = encode(net, images) if frozen else images
    parameters = list((net.dense if frozen else net).parameters())
    decaying: dict[str, Any] = {"params": [values for values in parameters if values.ndim > 1]}
    others: dict[str, Any] = {"params": [values for values in parameters if values.ndim == 1], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([decaying, others], weight_decay=settings.weight_decay, fused=True)
    drop = dropping(settings.dropout, seeded("dropout", seed)) if settings.dropout else None
    steps = settings.steps(len(labels))
    for step, chosen in enumerate(batches(len(labels), settings.batch_size, steps, seeded("batches", seed))):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * schedule(step, steps)
        optimiser.zero_grad()
        features = inputs[chosen] if frozen else net.features(inputs[chosen])
        scores = net.classify(features, drop)
        loss = F.cross_entropy(scores, labels[chosen], label_smoothing=settings.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def schedule(step: int, steps: int) -> float:
    """Learning rate over its highest value: linear up to 1 in `WARM_UP` of the steps, a cosine down to 0 after it."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising)))


@torch.no_grad()
def encode(net: LeNet, images: UnitImages) -> Tensor:
    """Input [N, F] of the dense layers for images [N, C, H, W]."""
    return torch.cat([net.features(part) for part in in_batches(images, IMAGES_AT_ONCE)])


@torch.no_grad()
def predict(net: LeNet, images: UnitImages) -> Tensor:
    """Scores [N, num_classes] of images [N, C, H, W]."""
    return torch.cat([net(part) for part in in_batches(images, IMAGES_AT_ONCE)])


def compare(
    make_net: Callable[[], LeNet],
    learn: Labelled,
    held_out: Labelled,
    settings: Sequence[TrainSettings],
    seed: int,
    *,
    frozen: bool = False,
) -> list[float]:
    """Accuracy on held-out images after training under each of the settings.

    Parameters
    ----------
    make_net: a new network with the same initial weights at every call.
    learn: the images and labels of a budget; `held_out`: others.
    """
    accuracies = []
    for each in settings:
        net = make_net()
        train(net, learn.images, learn.labels, each, seed, frozen)
        accuracies.append(accuracy(predict(net, held_out.images), held_out.labels))
    return accuracies


def batches(num_images: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step's images: one random order of all images after another, cut in batches of equal size."""
    size = min(batch_size, num_images)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(num_images, generator=generator)])
        yield left[:size]
        left = left[size:]


def dropping(share: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Dropout (Srivastava et al. 2014) with its own random numbers: values kept are divided by the share kept."""

    def drop(values: Tensor) -> Tensor:
        kept = torch.rand(values.shape, generator=generator) >= share
        return values * kept / (1 - share)

    return drop
