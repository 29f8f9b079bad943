"""Learning from some positions of each image: which are drawn, what is computed from them, what they estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import PatchConfig, correlate, draw_positions, drive, explicit, prepare
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import stream
from simmatch.whitening import Whitening
from tests.reference import normalised, patch_matrix

FLOOR = 0.15

# -- drawing -----------------------------------------------------------------------------------------------------------


def test_positions_are_distinct_and_equally_likely() -> None:
    """6000 draws of 5 out of 12: each position 2500 times, with a deviation of √(6000 · 5/12 · 7/12) = 38."""
    drawn = draw_positions(5, 6000, (3, 4), stream("test"))
    assert drawn.shape == (6000, 5)
    assert bool((drawn.diff(dim=1) > 0).all())
    assert int(drawn.min()) >= 0
    counts = drawn.flatten().bincount(minlength=12)
    assert len(counts) == 12
    assert (counts - 2500).abs().amax() < 5 * 38
    together = sum(bool((row == 0).any() and (row == 11).any()) for row in drawn)
    # both of a pair: 6000 · 5/12 · 4/11 = 909 times, deviation 28
    assert abs(together - 909) < 5 * 28


def test_the_same_key_draws_the_same() -> None:
    one, again, other = (draw_positions(5, 10, (3, 4), stream("test", number)) for number in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_all_positions_come_in_order() -> None:
    assert torch.equal(draw_positions(12, 2, (3, 4), stream("test")), torch.arange(12).repeat(2, 1))


def test_more_positions_than_the_map_has_are_refused() -> None:
    with pytest.raises(ValueError, match="positions: expected at most 12, the map of 3 × 4 activities, got 13"):
        draw_positions(13, 2, (3, 4), stream("test"))


# -- geometry ----------------------------------------------------------------------------------------------------------

IMAGES, KERNEL, POSITIONS = 4, 3, 5


class Case:
    """Images with drawn positions, and their patches as the neurons see them, one by one."""

    def __init__(self, *, contrast: bool, whiten: bool, stride: int = 2, padding: int = 1) -> None:
        generator = torch.Generator().manual_seed(3)
        self.config = PatchConfig(2, KERNEL, stride, padding, contrast, FLOOR)
        self.images = torch.rand(IMAGES, 2, 8, 7, generator=generator, dtype=torch.float64)
        self.images[0] = 0.4  # no contrast: the floor acts
        every = normalised(patch_matrix(self.images, KERNEL, stride, padding), FLOOR if contrast else None)
        size = self.config.patch_size
        self.whitening = None
        if whiten:
            root = torch.randn(size, size, generator=generator, dtype=torch.float64)
            self.whitening = Whitening(root + root.T, torch.randn(size, generator=generator, dtype=torch.float64))
            every = (every - self.whitening.mean) @ self.whitening.matrix.T
        map_size = self.config.map_size((8, 7))
        self.positions = draw_positions(POSITIONS, IMAGES, map_size, stream("test"))
        every = rearrange(every, "(b l) p -> b l p", b=IMAGES)
        self.explicit = torch.cat([patches[chosen] for patches, chosen in zip(every, self.positions, strict=True)])
        self.patches = prepare(self.images, self.config, self.whitening, self.positions)
        self.feedforward = torch.randn(6, 2, KERNEL, KERNEL, generator=generator, dtype=torch.float64)


VARIANTS = pytest.mark.parametrize(("contrast", "whiten"), [(False, False), (True, False), (False, True), (True, True)])


@VARIANTS
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_drives_and_statistics_equal_explicit_patches(contrast: bool, whiten: bool, stride: int, padding: int) -> None:
    """Products of length 18 and 20 in float64, of numbers below 100."""
    case = Case(contrast=contrast, whiten=whiten, stride=stride, padding=padding)
    assert (case.patches.batch_size, case.patches.positions) == (IMAGES, POSITIONS)
    result = drive(case.patches, case.feedforward)
    torch.testing.assert_close(result, case.feedforward.flatten(1) @ case.explicit.T, rtol=1e-10, atol=1e-10)
    y = torch.rand(6, IMAGES * POSITIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = correlate(case.patches, y).flatten(1)
    torch.testing.assert_close(result, y @ case.explicit, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        explicit(case.patches, images=2),
        case.explicit[: 2 * POSITIONS],
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_patches_of_some_images_are_theirs(some: bool) -> None:
    case = Case(contrast=True, whiten=True)
    positions = case.positions if some else None
    selected = prepare(case.images, case.config, case.whitening, positions).of_images(slice(1, 3))
    alone = prepare(case.images[1:3], case.config, case.whitening, positions[1:3] if positions is not None else None)
    assert selected.batch_size == alone.batch_size == 2
    ours, theirs = (drive(part, case.feedforward) for part in (selected, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# -- learning ----------------------------------------------------------------------------------------------------------


def make_layer(**changes: Any) -> SimilarityMatchingConv2d:
    options: dict[str, Any] = {"stride": 2, "padding": 1, "normalize": "contrast", "whiten": True, "num_classes": 10}
    dynamics = DynamicsConfig(tolerance=0.0, max_iterations=20)
    return SimilarityMatchingConv2d(
        1, 8, 3, label_gain=2.0, dynamics=dynamics, dtype=torch.float64, **(options | changes)
    )


def columns_of(maps: Tensor) -> Tensor:
    return rearrange(maps, "b k h w -> k (b h w)")


def test_learning_from_all_positions_in_order_is_learning_from_the_images(digits: Dataset) -> None:
    """The same columns on another way: 1e-16 of each product, five updates of a contracting rule."""
    one, other = make_layer(), make_layer()
    images = to_unit(digits.train_images[:60], torch.float64)
    one.calibrate(images)
    other.calibrate(images)
    for start in range(0, 60, 12):
        x, labels = images[start : start + 12], digits.train_labels[start : start + 12]
        whole = one.partial_fit(x, labels)
        every = other.partial_fit(other.prepare(x, torch.arange(16).repeat(12, 1)), labels)
        torch.testing.assert_close(every.y, whole.y, rtol=1e-9, atol=1e-9)
    assert (one.feedforward - make_layer().feedforward).norm() > 0.1
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_statistics_count_the_drawn_columns_and_repeat_their_label(digits: Dataset) -> None:
    """Against sums over single columns, each with the label of its image."""
    layer = make_layer()
    images, labels = to_unit(digits.train_images[:6], torch.float64), digits.train_labels[:6]
    layer.calibrate(images)
    positions = draw_positions(5, 6, (4, 4), stream("test"))
    patches = layer.prepare(images, positions)
    y = layer.solve(patches, labels).y
    assert y.shape == (6, 8, 1, 5)
    sums = layer.statistics(patches, y, labels)
    seen = normalised(patch_matrix(images, 3, 2, 1), 0.1)
    seen = rearrange((seen - layer.whitening_mean) @ layer.whitening, "(b l) p -> b l p", b=6)
    yx, yy = torch.zeros(8, 9, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    yz, zz = torch.zeros(8, 10, dtype=torch.float64), torch.zeros(10, 10, dtype=torch.float64)
    for image in range(6):
        for column in range(5):
            code, label = y[image, :, 0, column], int(labels[image])
            yx += torch.outer(code, seen[image, positions[image, column]])
            yy += torch.outer(code, code)
            yz[:, label] += code
            zz[label, label] += 1
    assert sums.count == 30
    for ours, theirs in ((sums.yx.flatten(1), yx), (sums.yy, yy), (sums.yz, yz), (sums.zz, zz)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_mean_over_drawn_columns_estimates_the_mean_over_all(digits: Dataset) -> None:
    """The mean of 400 estimates is within 5 of its standard errors of ⟨y xᵀ⟩ and ⟨y yᵀ⟩ over all columns.

    72 + 64 entries, each beyond 5 with a chance of 6e-7.
    """
    layer = make_layer()
    images = to_unit(digits.train_images[:10], torch.float64)
    layer.calibrate(images)
    y = columns_of(layer.solve(images).y)
    whole = layer.statistics(images, layer.solve(images).y)
    every = rearrange(y, "k (b l) -> b k l", b=10)
    draws = []
    for number in range(400):
        positions = draw_positions(4, 10, (4, 4), stream("test", number))
        chosen = every.gather(2, positions.unsqueeze(1).expand(-1, 8, -1)).unsqueeze(2)
        sums = layer.statistics(layer.prepare(images, positions), chosen)
        draws.append(torch.cat([sums.yx.flatten(), sums.yy.flatten()]) / sums.count)
    estimates = torch.stack(draws)
    error = (estimates.mean(dim=0) - torch.cat([whole.yx.flatten(), whole.yy.flatten()]) / whole.count).abs()
    standard = estimates.std(dim=0) / 400**0.5
    assert float(standard.amax()) > 0
    assert bool((error <= 5 * standard + 1e-12).all())
