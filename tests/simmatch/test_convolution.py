"""Chunked convolution and its weight gradient against explicit patch matrices; what a learning step holds in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import simmatch.convolution
from jobs.benchmarks.efficiency import peak_allocated_bytes
from simmatch.config import DynamicsConfig
from simmatch.convolution import Convolution
from simmatch.extent import pair
from simmatch.layer import SimilarityMatchingConv2d
from tests.live_bytes import LiveBytes
from tests.reference import patch_matrix

# (in_channels, kernel, stride, padding, height, width)
SHAPES: list[tuple[Any, ...]] = [(2, 3, 1, 1, 8, 7), (1, 4, 3, 0, 9, 12), (3, 2, 3, 1, 5, 5), (1, 3, 2, 2, 6, 9)]
SHAPES += [(2, (1, 5), (1, 3), 0, 1, 20), (2, (3, 2), (1, 2), (2, 0), 5, 8)]  # kernels of their own along each axis
IMAGES = 5

# values in a chunk: one row of one image at a time, some rows, one or two whole images, everything
BUDGETS = [1, 150, 1000, 1 << 18]


class Case:
    """A convolution of random images with random factors, and its patches one by one, in float64."""

    def __init__(self, shape: tuple[Any, ...], channels: int) -> None:
        in_channels, kernel, stride, padding, height, width = shape
        generator = torch.Generator().manual_seed(sum(sum(pair(side)) for side in shape))

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        self.convolution = Convolution(kernel, stride, padding)
        self.images, self.weight = draw(IMAGES, in_channels, height, width), draw(channels, in_channels, *pair(kernel))
        map_size = self.convolution.map_size((height, width))
        self.scale, self.offset = draw(IMAGES, 1, *map_size), draw(channels)
        self.patches = patch_matrix(self.images, kernel, stride, padding)
        self.y = draw(channels, len(self.patches))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("channels", [4, 20], ids=["library", "lowered"])  # P is 9 to 18
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_explicit_patches(
    shape: tuple[Any, ...], channels: int, budget: int, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simmatch.convolution, "CHUNK_VALUES", budget)
    case = Case(shape, channels)
    scale = case.scale if scaled else None
    seen = case.patches * case.scale.reshape(-1, 1) if scaled else case.patches
    plain = case.weight.flatten(1) @ seen.T
    # sums of 18 products, and of 360: 1e-16 times their number and size
    for offset in (None, case.offset):
        result = case.convolution.forward(case.images, case.weight, scale, offset)
        expected = plain if offset is None else plain + offset.unsqueeze(1)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    result = case.convolution.weight_gradient(case.images, case.y, scale)
    torch.testing.assert_close(result[:, :-1], case.y @ seen, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(result[:, -1], case.y.sum(dim=1), rtol=1e-12, atol=1e-11)


def test_both_ways_to_convolve_are_under_test() -> None:
    assert {Convolution._lowered(Case(shape, 4).weight) for shape in SHAPES} == {None}
    assert None not in {Convolution._lowered(Case(shape, 20).weight) for shape in SHAPES}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_patches_are_those_of_their_positions(
    shape: tuple[Any, ...], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simmatch.convolution, "CHUNK_VALUES", budget)
    case = Case(shape, 1)
    per_image = len(case.patches) // IMAGES
    chosen = torch.randint(len(case.patches), (40,), generator=torch.Generator().manual_seed(0))
    images = case.images.transpose(2, 3).contiguous().transpose(2, 3)  # of other strides
    gathered = case.convolution.gather(images, chosen // per_image, chosen % per_image)
    assert torch.equal(gathered, case.patches[chosen])


# -- memory ------------------------------------------------------------------------------------------------------------

SIZE, CHANNELS, BATCH = 14, 64, 20
ACTIVITY_BYTES = 4 * CHANNELS * BATCH * SIZE * SIZE


def test_the_counter_counts() -> None:
    with LiveBytes() as live:
        for _ in range(3):
            values = torch.ones(10, 10)
            values.view(100).mul_(2.0)
        del values
        assert live.peak == 2 * 400  # the next is made before the name lets go of the last
        kept = torch.ones(300)
        assert live.peak == 1200
        torch.add(kept, kept, out=kept)
    assert live.peak == 1200


def step_over_activities(in_channels: int, kernel: int, *, contrast: bool, labels: bool) -> float:
    """Peak of one `partial_fit` over the bytes of the activities [K, N]."""
    layer = SimilarityMatchingConv2d(
        in_channels,
        CHANNELS,
        kernel,
        padding=kernel // 2,
        normalize="contrast" if contrast else "none",
        num_classes=3 if labels else 0,
        label_gain=1.0 if labels else 0.0,
        dynamics=DynamicsConfig(tile_columns=128, tolerance=0.0, max_iterations=2),
    )
    images = torch.rand(BATCH, in_channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(BATCH) % 3 if labels else None
    layer.partial_fit(images[:2], None if classes is None else classes[:2])  # the solver's buffers last
    with LiveBytes() as live:
        layer.partial_fit(images, classes)
    return live.peak / ACTIVITY_BYTES


@pytest.mark.parametrize("in_channels", [1, 16])
@pytest.mark.parametrize("contrast", [False, True])
def test_a_learning_step_needs_three_times_its_activities_with_any_kernel(
    in_channels: int, contrast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drive and activities are 2. The rest is left for chunks and tiles, which the sizes here keep small beside the
    batch as real ones are, and for weights, of which P × K = 784 × 64 is a fifth of these activities.

    The patch matrix alone would be P / K: 12 times the activities at k = 7 and 16 channels."""
    monkeypatch.setattr(simmatch.convolution, "CHUNK_VALUES", 1 << 13)
    ratios = [step_over_activities(in_channels, kernel, contrast=contrast, labels=False) for kernel in (3, 5, 7)]
    assert min(ratios) > 2.0  # it did count
    assert max(ratios) < 3.0, ratios


def test_labels_need_no_third_copy_of_the_activities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simmatch.convolution, "CHUNK_VALUES", 1 << 13)
    assert 2.0 < step_over_activities(1, 5, contrast=True, labels=True) < 3.0


@pytest.mark.parametrize("in_channels", [1, 16])
def test_the_convolution_library_makes_no_patch_matrix(in_channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that torch allocates, inside kernels too: the result and chunks, where the patch matrix is up to 12 times
    the activities."""
    monkeypatch.setattr(simmatch.convolution, "CHUNK_VALUES", 1 << 13)
    convolution = Convolution(7, 1, 3)
    images, scale = torch.rand(BATCH, in_channels, SIZE, SIZE), torch.rand(BATCH, 1, SIZE, SIZE)
    weight = torch.rand(CHANNELS, in_channels, 7, 7)
    y = torch.rand(CHANNELS, BATCH * SIZE * SIZE)
    forward = peak_allocated_bytes(lambda: convolution.forward(images, weight, scale, None))
    backward = peak_allocated_bytes(lambda: convolution.weight_gradient(images, y, scale))
    assert 1.0 <= forward / ACTIVITY_BYTES < 1.5
    assert 0.0 < backward / ACTIVITY_BYTES < 1.0  # the gradient and the weight's stand-in, in chunks and sum: 4 × 0.2
