"""Readouts against nearest neighbours and classes that are known to be separable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.readout import LOGISTIC_STRENGTH, ReadoutName, accuracy, decode, fit_readout, fit_ridge
from simmatch.seeding import seeded


def test_decode_names_the_nearest_column() -> None:
    generator = seeded("decode")
    activity, label = torch.rand(50, 8, generator=generator), torch.rand(8, 5, generator=generator)
    nearest = torch.cdist(activity.double(), label.T.double()).argmin(dim=1)
    assert torch.equal(decode(activity, label).argmax(dim=1), nearest)
    assert accuracy(decode(activity, label), nearest) == 1.0
    assert accuracy(decode(activity, label), (nearest + 1) % 5) == 0.0


@pytest.mark.parametrize("name", get_args(ReadoutName))
def test_a_readout_learns_what_can_be_read(name: str) -> None:
    generator = seeded("readout")
    labels = torch.arange(300) % 3
    centres = 4 * torch.eye(3, 6)
    features = centres[labels] + 0.5 * torch.randn(300, 6, generator=generator)
    readout = fit_readout(name, features[:200].clone(), labels[:200])  # type: ignore[arg-type]
    # centres are 5.7 apart, deviations 0.5: an error has probability below 1e-7
    assert torch.equal(readout.predict(features[200:]), labels[200:])


@pytest.mark.parametrize(("images", "classes"), [(40, 3), (300, 3), (300, 2)])
def test_ridge_is_scikit_learns(images: int, classes: int) -> None:
    """With fewer images than features, with more, and with two classes; one feature is constant."""
    generator = seeded("ridge")
    labels = 2 * (torch.arange(images) % classes)  # not 0 … classes − 1
    features = (
        torch.randn(images, 60, generator=generator, dtype=torch.float64) + labels[:, None] * torch.arange(60) / 60
    )
    features[:, 7] = 5.0
    ours = fit_ridge(features, labels)
    theirs = make_pipeline(StandardScaler(), RidgeClassifier(alpha=0.01 * images, solver="cholesky"))
    theirs.fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.decision_function(features.numpy()))
    result = ours.scores(features)
    torch.testing.assert_close(result if classes > 2 else result[:, 1], expected, rtol=0, atol=1e-9)
    assert (ours.predict(features).numpy() == theirs.predict(features.numpy())).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_logistic_readout_is_scikit_learns(classes: int) -> None:
    """Kept as scores that are linear in the features, so that every rank can compute them."""
    labels = 2 * (torch.arange(200) % classes)
    features = torch.randn(200, 12, generator=seeded("logistic")) + 0.2 * labels[:, None] * torch.arange(12) / 12
    features[:, 7] = 5.0
    ours = fit_readout("logistic", features, labels)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=LOGISTIC_STRENGTH / 200, max_iter=200, tol=1e-3))
    theirs.fit(features.numpy(), labels.numpy())
    expected = theirs.predict(features.numpy())
    assert 0.5 < (expected == labels.numpy()).mean() < 1.0  # some are near the boundary
    assert (ours.predict(features).numpy() == expected).all()


def test_neighbours_are_asked_for_as_many_images() -> None:
    with pytest.raises(ValueError, match="knn: expected at least 10 images, got 9"):
        fit_readout("knn", torch.rand(9, 3), torch.arange(9))


@pytest.mark.parametrize("size", [3, 30])
def test_ridge_asks_for_two_classes(size: int) -> None:
    with pytest.raises(ValueError, match=r"labels: expected at least 2 classes, got \[4\]"):
        fit_ridge(torch.rand(20, size), torch.full((20,), 4))


def longest_wait(work: Callable[[], object]) -> float:
    """Of another thread while some work is done, over the time of the work."""
    waits, done = [0.0], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not done.wait(0.002):
            now = time.monotonic()
            waits.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    return max(waits) / seconds


def test_ridge_does_not_block_other_threads() -> None:
    """Other threads are served while it solves; scipy's solver lets none run for a third of the fit."""
    features, labels = torch.rand(1900, 1900, generator=seeded("lock")), torch.arange(1900) % 3
    fit_readout("ridge", features[:10], labels[:10])  # what is loaded on first use does not count
    assert min(longest_wait(lambda: fit_readout("ridge", features, labels)) for _ in range(3)) < 0.15


def test_an_unknown_readout_is_refused() -> None:
    with pytest.raises(ValueError, match="readout: expected one of ridge, logistic, knn, got 'svm'"):
        fit_readout("svm", torch.zeros(2, 2), torch.zeros(2))  # type: ignore[arg-type]


def test_settled_labels_fit_the_class_means_and_decode_better_than_driven_ones(digits: Dataset) -> None:
    """Under a strong label gain V grows with the labels' drive; settled on label-free activity it decodes."""
    images, labels = to_unit(digits.train_images), digits.train_labels
    layer = SimilarityMatchingConv2d(
        1,
        64,
        8,
        num_classes=10,
        label_gain=300.0,
        normalize="contrast",
        whiten=True,
        dynamics=DynamicsConfig(tolerance=1e-3),
        plasticity=PlasticityConfig(lr=0.1, lr_decay_steps=10),
    )
    layer.calibrate(images)
    for start in [*range(0, 1400, 50)] * 3:
        layer.partial_fit(images[start : start + 50], labels[start : start + 50])
    test, test_labels = to_unit(digits.test_images), digits.test_labels
    driven = accuracy(decode(layer(test).flatten(1), layer.label), test_labels)
    free = layer(images)
    statistics = layer.statistics(images, free, labels)
    means = torch.stack([free[labels == name].mean(dim=0).flatten() for name in range(10)], dim=1)
    before = layer.label.clone()
    layer.settle_label(statistics.yz, statistics.zz)
    # the multiple of V nearest to the class means, by another routine
    length = torch.linalg.lstsq(before.reshape(-1, 1), means.reshape(-1, 1)).solution
    torch.testing.assert_close(layer.label, before * length, rtol=1e-3, atol=1e-5)
    settled = accuracy(decode(layer(test).flatten(1), layer.label), test_labels)
    assert settled > 0.9  # a linear classifier reaches 0.95 here
    assert driven < 0.5
