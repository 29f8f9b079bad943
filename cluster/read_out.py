"""Accuracy on the test images: of the label weights themselves, and of a readout that rank 0 trains on the features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cluster.config import ProbeConfig
from cluster.cpus import all_cpus
from cluster.messages import Outbox, Progress, ReadoutScored, TrainingWarning
from cluster.redaction import one_line
from simmatch.data.sources import Dataset
from simmatch.features import FeatureStore, first_rows
from simmatch.labels import UNLABELLED
from simmatch.memory import Lever, MemoryWatch
from simmatch.model import Stack
from simmatch.readout import accuracy, fit_readout


def read_out(
    probe: ProbeConfig,
    stack: Stack,
    dataset: Dataset,
    train: Iterable[Tensor],
    test: FeatureStore,
    *,
    report: Outbox,
    long_work: Callable[[Callable[[], None]], None],
) -> None:
    """Report the accuracy of the readouts on the labelled test images. All ranks call it; a readout that fails is left
    out.

    Parameters
    ----------
    train: features of the training images, chunk by chunk, whole on every rank.
    test: the test images.
    long_work: does what takes long on this rank alone.
    """
    results: dict[str, float] = {}
    keep = test.exchange.rank == 0
    count = min(probe.train_images or len(dataset.train_images), len(dataset.train_images))
    labels, given = dataset.train_labels[:count], dataset.train_labels[:count] != UNLABELLED
    test_labels, known = dataset.test_labels, dataset.test_labels != UNLABELLED
    test_features, scores = _encode(stack, test, report, keep=keep)
    report.progress(Progress("readout", 0, 1))
    train_features = _collect(train, count, keep=keep)
    if keep:
        if stack.config.layers[-1].supervised and bool(known.any()):
            results["accuracy_decode"] = accuracy(scores[known], test_labels[known])

        def fit() -> None:
            with all_cpus(), MemoryWatch(torch.device("cpu")) as memory:
                memory.begin("fitting it", Lever("probe.train_images", count))
                for which, some in (("training", given), ("test", known)):
                    if not bool(some.any()):
                        raise ValueError(f"no {which} image has a label")
                readout = fit_readout(probe.readout, train_features[given], labels[given])
                results["accuracy"] = float(readout.score(test_features[known].numpy(), test_labels[known].numpy()))

        try:
            long_work(fit)
        except Exception as error:  # such as labels of one class only: everything is learnt and exported by now
            why = f"{type(error).__name__}: {error}"
            report.send(TrainingWarning(f"the {probe.readout} readout is left out: {one_line(why)}"))
        report.send(ReadoutScored(probe.readout, int(given.sum()), **results))
    report.progress(Progress("readout", 1, 1))


def _encode(stack: Stack, images: FeatureStore, report: Outbox, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Features [N, F] and scores [N, num_classes] (of no classes without labels) of images, where they are kept."""
    classes = stack.source.num_classes if stack.config.layers[-1].supervised else 0
    started = time.monotonic()

    def outputs(x: Tensor) -> Tensor:
        return torch.cat(list(stack.outputs(x).values()), dim=1)

    def with_progress(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        done = 0
        for part in parts:
            done += len(part)
            rate = done / max(time.monotonic() - started, 1e-9)
            report.progress(Progress("encode", done, images.count, images_per_second=rate))
            yield part

    values = _collect(with_progress(images.gathered(outputs)), images.count, keep=keep)
    features = values.shape[1] - classes if keep else 0
    return values[:, :features], values[:, features:]


def _collect(parts: Iterable[Tensor], count: int, *, keep: bool) -> Tensor:
    """The first `count` rows, where they are kept; the other ranks only contribute."""
    return first_rows((part.cpu() if keep else part[:, :0] for part in parts), count)
