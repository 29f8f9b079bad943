"""One candidate: a stack, a readout, a detector of novelty and a monitor of drift, all fed the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.ray_session import embeds_ray
from jobs.streaming.config import StreamConfig
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.online.drift import ERROR, Drift, DriftMonitor
from simmatch.online.encoded import Encoded
from simmatch.online.novelty import NoveltyDetector
from simmatch.online.readout import OnlineReadout
from simmatch.online.stack import OnlineStack
from simmatch.online.state import joined, part_of

NONE = -1
"""A prediction that was not made."""


if TYPE_CHECKING:
    from cluster.online import RankedStack

COUNTS = ("batches", "answered", "right", "drifts", "nbytes")

BATCHES_A_LOOK = 64
"""Between two looks at the size of the state."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a candidate says about windows, before it learns from them.

    Attributes
    ----------
    encoded: by the stack, what it tells of them on the host.
    scores: [n, classes] of the readout; None before two classes.
    novelty: [n].
    novel: bool [n], above the threshold.
    weights: [n], with which it learns from them.
    predictions: int64 [n, 2], the classes that the readout and V name, or `NONE`.
    """

    encoded: Encoded
    scores: Tensor | None
    novelty: Tensor
    novel: Tensor
    weights: Tensor
    predictions: Tensor


def make_stack(config: StreamConfig, shape: list[int], classes: int) -> OnlineStack:
    """The stack of a candidate in this process, which may have no GPU where the stacks that learn are on ranks."""
    source, device = input_of(shape, classes), config.device if config.mesh.world_size == 1 else "cpu"
    return OnlineStack(config.model, source, seed=config.seed, rate=config.rate, reduce=config.reduce, device=device)


def input_of(shape: list[int], classes: int) -> InputConfig:
    """What a model is made for, windows of a shape [C, H, W]."""
    channels, height, width = shape
    return InputConfig(in_channels=channels, height=height, width=width, num_classes=classes)


def learning_stack(
    config: StreamConfig, shape: list[int], classes: int, note: Callable[[str], None]
) -> OnlineStack | RankedStack:
    """The stack that a candidate learns with: in this process, or on the ranks of `mesh`."""
    if config.mesh.world_size == 1:
        return make_stack(config, shape, classes)
    from cluster.online import RankedStack  # imports ray, whose environment must be set by then

    cluster = config.cluster
    if cluster.threads_per_rank is None:
        cluster = cluster.model_copy(update={"threads_per_rank": config.threads})
    return RankedStack(
        config.model,
        input_of(shape, classes),
        mesh=config.mesh,
        cluster=cluster,
        seed=config.seed,
        rate=config.rate,
        reduce=config.reduce,
        device=config.device,
        note=note,
        grows=not embeds_ray(),
    )


class Candidate:
    """Learns from windows; `calibrate` comes first.

    Parameters
    ----------
    config: with the candidate's overrides.
    shape: [C, H, W] of a window.
    classes: known so far.
    note: is given lines about its ranks.

    Attributes
    ----------
    batches: learnt from so far.
    answered, right: predictions so far whose label is known, and those of them that were right.
    drifts: found so far.
    nbytes: size of its state, at the latest look.
    """

    def __init__(self, config: StreamConfig, shape: list[int], classes: int, note: Callable[[str], None]) -> None:
        self._config = config
        self.stack = learning_stack(config, shape, classes, note)
        self.monitor = DriftMonitor(config.drift)
        self.batches = self.answered = self.right = self.drifts = self.nbytes = 0
        self._features = 0
        self.readout: OnlineReadout
        self.detector: NoveltyDetector

    @property
    def ranks_s(self) -> float:
        """Seconds of processor time of its ranks so far; 0 where the stack is in this process."""
        return 0.0 if isinstance(self.stack, OnlineStack) else self.stack.seconds

    def close(self) -> None:
        """End its ranks, if it has any."""
        if not isinstance(self.stack, OnlineStack):
            self.stack.close()

    def calibrate(self, x: Tensor) -> bool:
        """Measure the statistics of patches on windows [n, C, H, W], from which nothing is learnt yet, unless that is
        done. False: they are all alike, as those of a sensor that is off; others have to come."""
        if not self.stack.calibrated:
            self.stack.calibrate(x)
        if self.stack.calibrated and not self._features:
            self._build(self.stack.encode(x[:1]).features.shape[1])
        return self.stack.calibrated

    def _build(self, features: int) -> None:
        self._features = features
        self.readout = OnlineReadout(features, self._config.readout, seed=self._config.seed)
        self.detector = NoveltyDetector(features, self._config.novelty)

    def grow(self, classes: int) -> None:
        """There are so many classes now."""
        self.stack.grow(classes)

    def say(self, x: Tensor) -> Said:
        """Encode, score: windows [n, C, H, W]."""
        encoded = self.stack.encode(x).told()
        scores = self.readout.scores(encoded.features)
        novelty = self.detector.score(encoded.features)
        threshold = self.detector.threshold
        novel = torch.zeros(len(x), dtype=torch.bool) if threshold is None else novelty > threshold
        named = [_named(scores, len(x)), _named(encoded.label_scores, len(x))]
        weights = self.detector.weights(novelty)
        return Said(encoded, scores, novelty, novel, weights, torch.stack(named, dim=1))

    def watch(self, said: Said | None, errors: Tensor) -> list[Drift]:
        """Look for changes in the signals of a batch; the numbers of what is found count its windows.

        errors: [n + late], 1 where wrong, 0 where right, NaN where the label is unknown; those of labels that came late
            follow those of the windows.
        """
        signals = {} if said is None else {"novelty": said.novelty, **said.encoded.signals}
        found: list[Drift] = self.monitor.add({ERROR: errors, **signals}, 0)
        if found:
            self.drifts += len(found)
            self.stack.raise_rate()
        return found

    def learn(self, x: Tensor, said: Said, labels: Tensor) -> None:
        """Learn from windows, labels [n] or `UNLABELLED`."""
        self.stack.learn(said.encoded, labels, said.weights)
        self.readout.learn(said.encoded.features, labels, said.weights, inputs=x)
        self.detector.learn(said.encoded.features, said.novelty)
        if self.batches % BATCHES_A_LOOK == 0:
            self.nbytes = sum(tensor.nbytes for tensor in self.state()[0].values())
        self.batches += 1

    def learn_late(self, x: Tensor, labels: Tensor) -> None:
        """Labels [n] of windows that W and M have learnt from when they came: the readout and V learn from them."""
        encoded = self.stack.encode(x)
        self.readout.learn(encoded.features, labels, inputs=x)
        self.stack.learn_labels(encoded, labels)

    def recompute(self) -> None:
        """Compute the readout's sums anew, from the features that its reservoir has now."""
        self.readout.recompute(lambda x: self.stack.encode(x).features)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values."""
        parts = {"stack": self.stack.state(), "monitor": self.monitor.state()}
        if self._features:
            parts |= {"readout": self.readout.state(), "detector": self.detector.state()}
        return joined(parts), {name: getattr(self, name) for name in COUNTS} | {"features": self._features}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """As it was when the state was taken."""
        for name in COUNTS:
            setattr(self, name, plain[name])
        self.stack.restore(part_of(tensors, "stack"))
        self.monitor.restore(part_of(tensors, "monitor"))
        if plain["features"]:
            self._build(plain["features"])
            self.readout.restore(part_of(tensors, "readout"))
            self.detector.restore(part_of(tensors, "detector"))


def _named(scores: Tensor | None, windows: int) -> Tensor:
    """The class with the largest score, or `NONE`: int64 [n]."""
    return torch.full((windows,), NONE) if scores is None else scores.argmax(dim=1)


def right(predictions: Tensor, labels: Tensor) -> Tensor:
    """1 where a prediction was right, 0 where it was wrong, NaN without a label or a prediction: float64 [n].

    >>> right(torch.tensor([2, 1, NONE, 0]), torch.tensor([2, 0, 1, UNLABELLED])).tolist()
    [1.0, 0.0, nan, nan]
    """
    judged = (predictions != NONE) & (labels != UNLABELLED)
    return torch.where(judged, (predictions == labels).double(), torch.nan)
