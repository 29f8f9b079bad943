"""Weights of images in an update: against sums written out column by column, over shards, and at their ends 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import explicit
from simmatch.labels import UNLABELLED
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.mesh import Mesh
from tests.exchanges import meshes, results, run_meshes
from tests.simmatch.sharding.layers import layer_of

RATES = PlasticityConfig(lr=0.3, tau=1.7, lr_decay_steps=4, dead_after=4)
TIGHT = {"tolerance": 0.0, "solver": "accelerated", "max_iterations": 40}
STATE = ("feedforward", "lateral", "label", "class_frequency", "silent", "updates", "revived")
SHAPES = ((2, 2), (1, 3))
"""Replicas and owners."""


def batches_of(digits: Dataset, kind: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and weights; some weigh nothing, and one batch little."""
    generator = torch.Generator().manual_seed(0)
    size = 6 if kind == "dense" else 7
    images, labels = to_unit(digits.train_images[:60], torch.float64)[..., :size, :6], digits.train_labels[:60].clone()
    labels[torch.rand(60, generator=generator) < 0.3] = UNLABELLED
    weights = torch.rand(60, generator=generator, dtype=torch.float64)
    weights[::4] = 0.0
    weights[20:30] *= 0.01
    split = [each.split([10, 10, 10, 3, 20, 7]) for each in (images, labels, weights)]
    return list(zip(*split, strict=True))


def calibrated(mesh: Mesh, mode: str, kind: str, digits: Dataset, **options: Any) -> SimilarityMatchingConv2d:
    layer = layer_of(mesh, mode, kind, {**TIGHT, **options}, RATES)
    layer.calibrate(torch.cat([images for images, *_ in batches_of(digits, kind)]))
    return layer


@pytest.mark.parametrize("kind", ["maps", "supervised", "dense"])
def test_sums_and_update_are_those_of_the_definition(kind: str, digits: Dataset) -> None:
    """In float64, column by column: 1e-12 of sums of some hundred terms near 1."""
    layer = calibrated(Mesh(), "every_iteration", kind, digits)
    images, labels, weights = batches_of(digits, kind)[0]
    given = None if kind == "maps" else labels
    patches, y = layer.prepare(images), layer.solve(images, given).y
    x, columns = explicit(patches), y.permute(0, 2, 3, 1).flatten(0, 2)
    positions = len(x) // len(images)
    yx, yy = torch.zeros(len(columns.T), x.shape[1]).double(), torch.zeros(2 * [len(columns.T)]).double()
    yz, zz, count = torch.zeros_like(layer.label), torch.zeros(2 * [layer.num_classes]).double(), 0.0
    for number, (xn, yn) in enumerate(zip(x, columns, strict=True)):
        w, label = float(weights[number // positions]), int(labels[number // positions])
        yx, yy, count = yx + w * torch.outer(yn, xn), yy + w * torch.outer(yn, yn), count + w
        if given is not None and label != UNLABELLED:
            yz[:, label] += w * yn
            zz[label, label] += w
    sums = layer.statistics(images, y, given, weights)
    torch.testing.assert_close(sums.yx.flatten(1), yx, rtol=0, atol=1e-11)
    torch.testing.assert_close(sums.yy, yy, rtol=0, atol=1e-11)
    torch.testing.assert_close(sums.yz, yz, rtol=0, atol=1e-11)
    torch.testing.assert_close(sums.zz, zz, rtol=0, atol=1e-12)
    assert float(sums.count) == pytest.approx(count, rel=1e-12)

    before = {name: layer.get_buffer(name).clone() for name in STATE}
    layer.partial_fit(images, given, weights)
    lr, labelled = RATES.lr * float(weights.max()), max(float(zz.sum()), 1e-300)
    w, m = before["feedforward"].flatten(1), before["lateral"]
    torch.testing.assert_close(layer.feedforward.flatten(1), w + lr * (yx / count - w), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.lateral, m + lr / RATES.tau * (yy / count - m), rtol=0, atol=1e-12)
    if given is not None:
        present, frequency = zz.diagonal() / labelled, before["class_frequency"]
        rate = torch.minimum(lr / frequency, 1 / present)
        label = torch.where(present > 0, (yz / labelled - before["label"] * present) * rate, 0.0)
        torch.testing.assert_close(layer.label, before["label"] + label, rtol=0, atol=1e-12)
        expected = frequency + lr * (present - frequency)
        torch.testing.assert_close(layer.class_frequency, expected, rtol=0, atol=1e-12)


def learn(
    digits: Dataset, mode: str, kind: str, weighted: Callable[[Tensor], Tensor | None] = lambda each: each
) -> Callable[[Mesh], dict[str, Tensor]]:
    """A program for one rank; the result: its rows, or all rows of what is not split."""

    def program(mesh: Mesh) -> dict[str, Tensor]:
        layer = calibrated(mesh, mode, kind, digits)
        for images, labels, weights in batches_of(digits, kind):
            layer.partial_fit(images, None if kind == "maps" else labels, weighted(weights))
        return {name: layer.get_buffer(name) for name in STATE}

    return program


def joined(parts: list[dict[str, Tensor]], owners: int) -> dict[str, Tensor]:
    first = parts[:owners]
    return {
        name: torch.cat([each[name] for each in first]) if name in (*STATE[:3], "silent") else first[0][name]
        for name in STATE
    }


@pytest.mark.parametrize("kind", ["maps", "supervised", "dense"])
@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_any_number_of_ranks_gives_the_weights_of_one(mode: str, kind: str, digits: Dataset) -> None:
    """Fixed iterations on the same columns, in float64: only the order of sums differs. Iterates of `block` depend on
    the number of owners, so there replicas are compared."""
    for replicas, owners in SHAPES:
        alone = results(run_meshes(meshes(1, 1, owners if mode == "block" else 1), learn(digits, mode, kind)))
        together = results(run_meshes(meshes(replicas, 1, owners), learn(digits, mode, kind)))
        expected, found = joined(alone, owners if mode == "block" else 1), joined(together, owners)
        for name in STATE:
            torch.testing.assert_close(
                found[name], expected[name], rtol=0, atol=1e-10, msg=f"{name} {replicas} {owners}"
            )


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
@pytest.mark.parametrize("kind", ["maps", "supervised", "dense"])
def test_weights_of_one_change_no_bit(mode: str, kind: str, digits: Dataset) -> None:
    plain, ones = (learn(digits, mode, kind, each)(Mesh()) for each in (lambda _: None, torch.ones_like))
    for name in STATE:
        assert torch.equal(plain[name], ones[name]), name


@pytest.mark.parametrize("kind", ["maps", "supervised", "dense"])
def test_an_image_of_weight_zero_is_as_good_as_absent(kind: str, digits: Dataset) -> None:
    """Up to the rounding of other sums, float64; a rate that falls, and labels of absent images, among them."""
    with_it, without = (calibrated(Mesh(), "every_iteration", kind, digits) for _ in range(2))
    for images, labels, weights in batches_of(digits, kind):
        z, here = (None if kind == "maps" else labels), weights > 0
        with_it.partial_fit(images, z, weights)
        without.partial_fit(images[here], None if z is None else z[here], weights[here])
    for name in STATE:
        torch.testing.assert_close(with_it.get_buffer(name), without.get_buffer(name), rtol=0, atol=1e-11)


def test_lateral_stays_valid_under_any_weights() -> None:
    """In float32, rates up to 1: symmetric and nonnegative as stored, positive semidefinite up to rounding."""
    generator = torch.Generator().manual_seed(1)
    layer = SimilarityMatchingConv2d(1, 12, 3, plasticity=PlasticityConfig(lr=1.0, revive=False))
    for _ in range(30):
        weights = torch.rand(9, generator=generator) ** 4
        layer.partial_fit(torch.rand(9, 1, 6, 6, generator=generator), weights=weights)
        eigenvalues = torch.linalg.eigvalsh(layer.lateral.double())
        assert bool((layer.lateral >= 0).all())
        torch.testing.assert_close(layer.lateral, layer.lateral.T, rtol=1e-6, atol=1e-6 * float(layer.lateral.max()))
        assert float(eigenvalues[0]) >= -1e-6 * float(eigenvalues[-1])


def test_one_image_of_little_weight_changes_little() -> None:
    """Alone in its batch it is the whole mean; the rate makes up for it."""
    x, dynamics = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(2)), DynamicsConfig(tolerance=1e-6)
    steps = []
    for weight in (1.0, 0.01):
        layer = SimilarityMatchingConv2d(1, 6, 3, dynamics=dynamics)
        before = layer.feedforward.clone()
        layer.partial_fit(x, weights=torch.tensor([weight]))
        steps.append(layer.feedforward - before)
    torch.testing.assert_close(steps[1], 0.01 * steps[0], rtol=1e-3, atol=1e-7)


BAD = {
    "shape": (torch.ones(3), r"weights: expected a tensor of floating-point numbers \[2\], one per image, got \[3\]"),
    "integers": (torch.ones(2).long(), r"weights: expected a tensor of floating-point numbers \[2\], .* torch.int64"),
    "above one": (torch.tensor([1.0, 1.5]), r"weights: expected numbers from 0 to 1, got 1.5"),
    "nan": (torch.tensor([1.0, torch.nan]), r"weights: expected numbers from 0 to 1, got nan"),
    "nothing": (torch.zeros(2), r"weights: expected one above 0, got none"),
}


@pytest.mark.parametrize(("weights", "message"), BAD.values(), ids=BAD)
def test_bad_weights_change_nothing(weights: Tensor, message: str) -> None:
    layer = SimilarityMatchingConv2d(1, 4, 3)
    with pytest.raises(ValueError, match=message):
        layer.partial_fit(torch.rand(2, 1, 6, 6), weights=weights)
    assert int(layer.updates) == 0
