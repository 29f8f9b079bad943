"""Accuracy on the test images: of the label weights themselves, and of a readout that is trained on the features.

Every rank computes the features of its own images, and scores its own test images. Nothing that a rank holds grows with
the number of images:

    ridge           each rank sums the moments of its training images, F × F values; rank 0 solves their sum
    logistic, knn   rank 0 collects the features of the training images, at most `probe.max_feature_bytes`
    test            counts of correct labels are summed. Neighbours are searched for on rank 0, a few rows at a time

Where images are fewer than features, ridge collects them too: they have fewer values than the moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cluster.config import RunConfig
from cluster.cpus import all_cpus
from cluster.messages import Outbox, Progress, ReadoutScored, TrainingWarning
from cluster.redaction import one_line
from cluster.text import size
from simmatch.data.order import balanced_subset
from simmatch.data.sources import Dataset
from simmatch.features import FeatureStore
from simmatch.labels import UNLABELLED, distinct
from simmatch.memory import Lever, MemoryWatch
from simmatch.model import Stack
from simmatch.moments import Moments
from simmatch.readout import LinearClassifier, Readout, ReadoutName, fit_readout, ridge_of_moments, with_targets
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import Numbered, gather_from_ranks, moments_over_ranks, rows_at_first

Parts = Iterable[tuple[slice, Tensor]]
"""For each chunk this rank's range of images, and their features [n, F]: as many chunks on every rank."""

OnOneRank = Callable[[Callable[[], None] | None], None]
"""Does the work of rank 0 while the other ranks, which give None, wait."""


def read_out(
    config: RunConfig,
    stack: Stack,
    dataset: Dataset,
    train: Parts,
    test: FeatureStore,
    *,
    report: Outbox,
    on_one_rank: OnOneRank,
) -> None:
    """Report the accuracy of the readouts on the labelled test images. All ranks call it; a readout that fails is left
    out.

    Parameters
    ----------
    train: features of this rank's training images.
    test: the test images.
    """
    report.progress(Progress("readout", 0, 1))
    device, name = stack.layer(0).feedforward.device, config.probe.readout
    x = torch.zeros(1, *dataset.train_images.shape[1:], dtype=stack.dtype, device=device)
    features = stack.features(x).shape[1]
    sample = choose(config, dataset.train_labels, features, stack.dtype.itemsize)
    if sample.subset:
        report.send(TrainingWarning(f"the {name} readout is fitted on {sample.subset}"))
    ranks = Ranks(test.exchange, device, on_one_rank, Lever("probe.train_images", len(sample.images)))
    known = int((dataset.test_labels != UNLABELLED).sum())
    for which, images in (("training", len(sample.images)), ("test", known)):
        if images == 0:
            ranks.problem = ranks.problem or f"no {which} image has a label"
    order = Numbered(config.encode_batch, len(dataset.train_images)) if config.reduce == "exact" else None
    readout = None if ranks.problem else fit(name, train, sample, features, ranks, order=order)
    results = {}
    if known > 0 and (readout is not None or stack.config.layers[-1].supervised):
        right = count_right(readout, stack, test, dataset.test_labels, ranks, report)
        results = {key: each / known for key, each in right.items()}
    if ranks.problem:
        report.send(TrainingWarning(f"the {name} readout is left out: {ranks.problem}"))
    report.send(ReadoutScored(name, len(sample.images), **results, subset=sample.subset))
    report.progress(Progress("readout", 1, 1))


@dataclass(frozen=True)
class Sample:
    """The images on which a readout is fitted.

    Attributes
    ----------
    images, labels: their indices, ascending, and their labels.
    subset: what they are of; empty for all labelled images of `probe.train_images`.
    """

    images: Tensor
    labels: Tensor
    subset: str = ""

    def within(self, part: slice) -> Tensor:
        """The numbers in this sample of those in a range of images."""
        start, stop = torch.searchsorted(self.images, torch.tensor([part.start, part.stop])).tolist()
        return torch.arange(start, stop)


def choose(config: RunConfig, labels: Tensor, features: int, value_bytes: int) -> Sample:
    """The images for a readout of so many features: a function of the configuration and the labels [N]."""
    probe = config.probe
    images = (labels[: probe.train_images] != UNLABELLED).nonzero().flatten()
    most = probe.max_feature_bytes // (features * value_bytes)
    if probe.readout == "ridge" or len(images) <= most:
        return Sample(images, labels[images])
    classes = len(distinct(labels[images]))
    chosen = images[balanced_subset(labels[images], max(most, classes), config.seed)]
    return Sample(
        chosen,
        labels[chosen],
        f"{len(chosen):,} of {len(images):,} labelled images, drawn with seed {config.seed}, balanced over {classes} "
        f"classes: probe.max_feature_bytes is {size(probe.max_feature_bytes)}, and the features of all take "
        f"{size(features * value_bytes * len(images))}",
    )


class Ranks:
    """The ranks that read out together, and what has gone wrong so far on rank 0.

    Attributes
    ----------
    problem: why there is no readout; on other ranks than the first, only whether it is empty counts.
    """

    def __init__(self, exchange: Exchange, device: torch.device, on_one_rank: OnOneRank, lever: Lever) -> None:
        self.exchange, self.device, self.problem = exchange, device, ""
        self._on_one_rank, self._lever = on_one_rank, lever

    @property
    def first(self) -> bool:
        return self.exchange.rank == 0

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do what may fail on rank 0; returns, on every rank, whether it went well."""

        def caught() -> None:
            try:
                with all_cpus(), MemoryWatch(torch.device("cpu")) as memory:
                    memory.begin("fitting it", self._lever)
                    work()
            except Exception as error:  # such as labels of one class only: everything is learnt and exported by now
                self.problem = f"{type(error).__name__}: {one_line(str(error))}"

        self._on_one_rank(caught if self.first else None)
        failed = torch.full((1,), float(bool(self.problem)), device=self.device)
        if bool(gather_from_ranks(failed, self.exchange)[0]):
            self.problem = self.problem or "rank 0 cannot fit it"
        return not self.problem


def fit(
    name: ReadoutName, train: Parts, sample: Sample, features: int, ranks: Ranks, *, order: Numbered | None = None
) -> Readout | None:
    """A readout fitted on rank 0: on every rank if it is linear, else on rank 0. None where there is none.

    order: of the blocks in which sums are to be added; None: any.
    """
    fitted: list[Readout] = []
    classes = distinct(sample.labels)
    if name == "ridge" and len(sample.images) >= features:
        blocks = (
            (first, with_targets(rows, sample.labels[numbers], classes))
            for first, numbers, rows in _chosen(train, sample)
        )
        empty = Moments(features + len(classes), ranks.device)
        moments = moments_over_ranks(blocks, empty, ranks.exchange, order=order)
        well = ranks.attempt(lambda: fitted.append(ridge_of_moments(moments.cpu(), classes)))
    else:
        collected = _collect(_chosen(train, sample), len(sample.images), ranks)
        well = ranks.attempt(lambda: fitted.append(fit_readout(name, collected, sample.labels)))
    if not well or name == "knn":
        return fitted[0] if fitted else None
    shared = LinearClassifier.empty(classes, features, ranks.device)
    for number, value in enumerate(shared.values):
        if isinstance(own := fitted[0] if fitted else None, LinearClassifier):
            value.copy_(own.values[number])
        ranks.exchange.broadcast(value, source=0).wait()
    return shared


def _chosen(train: Parts, sample: Sample) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of this rank's images those of the sample, chunk by chunk: the first image, numbers in the sample, features."""
    for part, rows in train:
        numbers = sample.within(part)
        yield part.start, numbers, rows[(sample.images[numbers] - part.start).to(rows.device)]


def _collect(own: Iterable[tuple[int, Tensor, Tensor]], count: int, ranks: Ranks) -> Tensor:
    """The features of a whole sample on rank 0; the others get none."""
    numbers, rows = (torch.cat(values) for values in zip(*((each[1], each[2]) for each in own), strict=True))
    whole = rows.new_empty(count if ranks.first else 0, *rows.shape[1:], device="cpu")
    for part, places in rows_at_first(rows, numbers.to(ranks.device), ranks.exchange):
        whole[places.cpu()] = part.cpu()
    return whole


def count_right(
    readout: Readout | None, stack: Stack, test: FeatureStore, labels: Tensor, ranks: Ranks, report: Outbox
) -> dict[str, int]:
    """How many test images a readout, and the label weights of a supervised last layer, give their labels [N]."""
    supervised, started = stack.config.layers[-1].supervised, time.monotonic()
    by_readout, by_layer = (torch.zeros(1, dtype=torch.int64, device=ranks.device) for _ in range(2))
    for turn, (part, outputs) in enumerate(test.encode(stack.outputs), 1):
        expected = labels[part].to(ranks.device)  # where it is unknown, it is no class
        if supervised:
            by_layer += (outputs["scores"].argmax(dim=1) == expected).sum()
        if isinstance(readout, LinearClassifier):
            by_readout += (readout.predict(outputs["features"]) == expected).sum()
        elif not ranks.problem:
            known = expected != UNLABELLED
            by_readout += _count_at_first(readout, outputs["features"][known], expected[known], ranks)
        rate = test.done(turn) / max(time.monotonic() - started, 1e-9)
        report.progress(Progress("encode", test.done(turn), test.count, images_per_second=rate))
    used = {"accuracy": (not ranks.problem, by_readout), "accuracy_decode": (supervised, by_layer)}
    return {key: int(gather_from_ranks(count, ranks.exchange).sum()) for key, (use, count) in used.items() if use}


def _count_at_first(readout: Readout | None, features: Tensor, labels: Tensor, ranks: Ranks) -> int:
    """How many images of all ranks a readout of rank 0 gives their labels; 0 on the other ranks."""
    counts = [0]

    def predict(rows: Tensor, expected: Tensor) -> None:
        assert readout is not None
        counts.append(int((readout.predict(rows) == expected).sum()))

    for rows, expected in rows_at_first(features, labels, ranks.exchange):
        if not ranks.attempt(partial(predict, rows.cpu(), expected.cpu())):
            break
    return sum(counts)
