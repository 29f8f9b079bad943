"""Drives and statistics against explicit patch matrices, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from simmatch.data.sources import Dataset, to_unit
from simmatch.extent import pair
from simmatch.geometry import PatchConfig, correlate, drive, prepare, sample_patches, transform
from simmatch.moments import Moments
from simmatch.whitening import Whitening, zca
from tests.reference import inverse_root, normalised, patch_matrix

FLOOR = 0.15

# (in_channels, kernel, stride, padding, height, width): strides 1–3, paddings 0–2, odd sizes, borders that do not
# fit the stride, a 1 × 1 kernel, and a kernel that covers the map, with and without padding
# and kernels, strides and paddings of their own along each axis, as signals have them
SHAPES = [
    *((2, 3, stride, padding, 8, 7) for stride, padding in product((1, 2, 3), (0, 1, 2))),
    (1, 4, 3, 0, 9, 12),
    (3, 2, 3, 1, 5, 5),
    (3, 1, 2, 0, 5, 4),
    (2, 5, 1, 0, 5, 5),
    (1, 6, 1, 0, 6, 6),
    (2, 5, 1, 1, 3, 3),
    (1, 5, 2, 0, 6, 6),
    (2, (1, 5), (1, 3), 0, 1, 17),
    (3, (1, 4), 2, (0, 3), 1, 9),
    (2, (1, 7), 1, 0, 1, 7),
    (1, (3, 2), (1, 2), (2, 1), 5, 8),
    (2, (2, 5), (3, 1), 0, 2, 5),
]

Shape = tuple[Any, ...]


class Case:
    """One geometry with its explicit patch matrix, as seen by the neurons: [N, P]."""

    def __init__(self, shape: Shape, *, contrast: bool, whiten: bool) -> None:
        in_channels, kernel, stride, padding, height, width = shape
        generator = torch.Generator().manual_seed(sum(np.ravel(side).sum() for side in shape).item())
        self.images = torch.rand(4, in_channels, height, width, generator=generator, dtype=torch.float64)
        self.images[0] = 0.4  # flat: its inner patches have no contrast, the floor acts
        self.images[1] *= 0.2
        self.config = PatchConfig(in_channels, kernel, stride, padding, contrast, FLOOR)
        self.feedforward = torch.randn(5, in_channels, *pair(kernel), generator=generator, dtype=torch.float64)
        self.explicit = normalised(patch_matrix(self.images, kernel, stride, padding), FLOOR if contrast else None)
        self.whitening = None
        if whiten:
            size = self.config.patch_size
            root = torch.randn(size, size, generator=generator, dtype=torch.float64)
            mean = torch.randn(size, generator=generator, dtype=torch.float64)
            self.whitening = Whitening(root + root.T, mean)
            self.explicit = (self.explicit - mean) @ (root + root.T)
        self.patches = prepare(self.images, self.config, self.whitening)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


VARIANTS = pytest.mark.parametrize(("contrast", "whiten"), [(False, False), (True, False), (False, True), (True, True)])


@VARIANTS
def test_drive_equals_explicit_patches(shape: Shape, contrast: bool, whiten: bool) -> None:
    case = Case(shape, contrast=contrast, whiten=whiten)
    expected = case.feedforward.flatten(1) @ case.explicit.T
    result = drive(case.patches, case.feedforward)
    # sums of at most P = 50 products of numbers below 100 in float64: 50 · 100² · 1e-16 = 5e-11
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@VARIANTS
def test_correlate_equals_explicit_patches(shape: Shape, contrast: bool, whiten: bool) -> None:
    case = Case(shape, contrast=contrast, whiten=whiten)
    columns = case.explicit.shape[0]
    y = torch.randn(3, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (y @ case.explicit).reshape(3, *case.feedforward.shape[1:])
    result = correlate(case.patches, y)
    # sums over at most 4 · 121 columns
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@VARIANTS
def test_no_images_make_no_columns(contrast: bool, whiten: bool) -> None:
    """A rank's share of a chunk of few images may be empty."""
    case = Case((2, 3, 1, 1, 8, 7), contrast=contrast, whiten=whiten)
    for channels in (5, 20):  # the library's convolution, and patches written out
        patches = prepare(case.images[:0], case.config, case.whitening)
        weight = torch.zeros(channels, 2, 3, 3, dtype=torch.float64)
        assert drive(patches, weight).shape == (channels, 0)
        sums = correlate(patches, torch.zeros(channels, 0, dtype=torch.float64))
        assert torch.equal(sums, weight)


@pytest.mark.parametrize("whiten", [False, True])
def test_transform_is_the_definition(whiten: bool) -> None:
    case = Case((2, 3, 1, 1, 8, 7), contrast=True, whiten=whiten)
    raw = patch_matrix(case.images, 3, 1, 1)
    # elementwise operations and one product of length 18
    torch.testing.assert_close(transform(raw, case.config, case.whitening), case.explicit, rtol=1e-12, atol=1e-12)


def test_contrast_does_not_see_brightness_and_gain() -> None:
    """x → 3x + 7 changes nothing where the deviation exceeds the floor: J removes 7, 1/s removes 3."""
    case = Case((2, 3, 2, 0, 9, 9), contrast=True, whiten=False)
    images = case.images[2:]
    plain, moved = (drive(prepare(values, case.config), case.feedforward) for values in (images, 3.0 * images + 7.0))
    # a variance near 1 is taken from squares near 80: 80 · 1e-16, and a little more for the sums
    torch.testing.assert_close(moved, plain, rtol=1e-10, atol=1e-10)


def test_float32_stays_near_float64() -> None:
    """Images of large mean and little contrast, the worst of cancellation: 1e-7 · (mean/deviation)² = 1e-4."""
    generator = torch.Generator().manual_seed(5)
    images = 3.0 + 0.3 * torch.rand(3, 1, 9, 9, generator=generator, dtype=torch.float64)
    config = PatchConfig(1, 4, 1, 0, True, 0.01)
    feedforward = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64) / 4
    exact = drive(prepare(images, config), feedforward)
    single = drive(prepare(images.float(), config), feedforward.float())
    assert (single.double() - exact).abs().amax() <= 1e-3 * exact.abs().amax()


# -- whitening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 2.0])
def test_zca_equals_the_closed_form(ridge: float) -> None:
    generator = torch.Generator().manual_seed(6)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    patches = torch.randn(400, 8, generator=generator, dtype=torch.float64) @ mixing + 3.0
    whitening, power = zca(Moments.of(patches), ridge, torch.float64)
    covariance = np.cov(patches.numpy().T, bias=True)
    shifted = covariance + ridge * np.trace(covariance) / 8 * np.eye(8)
    # both are accurate to condition · eps; the condition is below 1e5
    np.testing.assert_allclose(whitening.matrix.numpy(), inverse_root(shifted), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(whitening.mean.numpy(), patches.numpy().mean(axis=0), rtol=1e-12)
    torch.testing.assert_close(whitening.matrix, whitening.matrix.T, rtol=1e-12, atol=1e-12)

    white = (patches - whitening.mean) @ whitening.matrix
    assert power == pytest.approx(float(white.square().sum(dim=1).mean()), rel=1e-8)
    white_covariance = np.cov(white.numpy().T, bias=True)
    if ridge < 1e-6:
        # the smallest eigenvalue is 1e-3 of the mean or more: the ridge moves it by 1e-6 of itself
        np.testing.assert_allclose(white_covariance, np.eye(8), atol=1e-5)
    else:
        # λ → λ/(λ + ρ) on each eigenvector
        np.testing.assert_allclose(white_covariance, covariance @ np.linalg.inv(shifted), rtol=1e-8, atol=1e-8)


def test_zca_of_degenerate_patches_is_finite() -> None:
    """Digits: border pixels that never change, and mean removal takes a direction away."""
    flat = torch.ones(50, 6)
    assert zca(Moments.of(flat), 0.1, torch.float32)[0].matrix.isfinite().all()
    some = torch.zeros(50, 6)
    some[:, 2] = torch.linspace(-1, 1, 50)
    whitening, _ = zca(Moments.of(some), 0.1, torch.float32)
    # one eigenvalue λ, mean λ/6: (λ(1 + 0.1/6))^(-1/2) along it, (0.1 λ/6)^(-1/2) elsewhere
    power = float(some[:, 2].double().square().mean())
    assert float(whitening.matrix[2, 2]) == pytest.approx((power * (1 + 0.1 / 6)) ** -0.5, rel=1e-6)
    assert float(whitening.matrix[0, 0]) == pytest.approx((power * 0.1 / 6) ** -0.5, rel=1e-6)


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_sampled_patches_are_patches(stride: int, padding: int, contrast: bool, digits: Dataset) -> None:
    images = to_unit(digits.train_images[:6], torch.float64)
    config = PatchConfig(1, 3, stride, padding, contrast, FLOOR)
    explicit = normalised(patch_matrix(images, 3, stride, padding), FLOOR if contrast else None)
    everything = sample_patches(images, config, explicit.shape[0], torch.Generator().manual_seed(0))
    torch.testing.assert_close(everything, explicit, rtol=1e-12, atol=1e-12)  # all of them, in order

    count = explicit.shape[0] - 1
    some = sample_patches(images, config, count, torch.Generator().manual_seed(0))
    again = sample_patches(images, config, count, torch.Generator().manual_seed(0))
    other = sample_patches(images, config, count, torch.Generator().manual_seed(1))
    assert some.shape[0] == count
    assert torch.equal(some, again)
    assert not torch.equal(some, other)
    assert (
        torch.cdist(some, explicit, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).amax() < 1e-10
    )  # each is one of the patches


def test_sampling_reaches_every_position() -> None:
    """12 positions, 220 · 11 draws: one of them is missed with probability 12 · (11/12)^2420 < 1e-90."""
    images = torch.arange(48.0).reshape(2, 1, 4, 6)
    config = PatchConfig(1, 1, 2)
    sample = sample_patches(images, config, 12 - 1, torch.Generator().manual_seed(0))
    expected = set(images[:, :, ::2, ::2].flatten().tolist())
    assert set(sample.flatten().tolist()) <= expected
    seen: set[float] = set()
    for seed in range(220):
        seen |= set(sample_patches(images, config, 11, torch.Generator().manual_seed(seed)).flatten().tolist())
    assert seen == expected


@pytest.mark.parametrize(("kernel", "padding"), [(6, 0), (8, 1)])
def test_a_kernel_larger_than_the_image_is_refused(kernel: int, padding: int) -> None:
    config = PatchConfig(1, kernel, 1, padding)
    message = f"expected at most {5 + 2 * padding} for images of 5 × 9 with padding {padding}, got {kernel}"
    with pytest.raises(ValueError, match=f"kernel_size: {message}"):
        prepare(torch.zeros(1, 1, 5, 9), config)


def test_columns_run_over_images_then_rows_then_columns() -> None:
    """One bright pixel: exactly the columns of the patches that see it answer."""
    images = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    images[1, 0, 2, 3] = 1.0
    config = PatchConfig(1, 2)
    columns = drive(prepare(images, config), torch.ones(1, 1, 2, 2, dtype=torch.float64))[0]
    seen = [(image, row, col) for image, row, col in product(range(2), range(3), range(4)) if _sees(image, row, col)]
    assert torch.nonzero(columns).flatten().tolist() == [image * 12 + row * 4 + col for image, row, col in seen]


def _sees(image: int, row: int, col: int) -> bool:
    return image == 1 and row in (1, 2) and col in (2, 3)
