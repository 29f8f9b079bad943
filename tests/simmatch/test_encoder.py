"""Encoders and filters against closed forms, explicit patches, the statistics they promise, and rivals on digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmatch.agreement import Agreement, agreement, compare
from simmatch.config import PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.encoder import Encoder, feedforward_encoder, feedforward_filter
from simmatch.encoder import match as fit
from simmatch.geometry import explicit, transform
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.rows import split_rows
from simmatch.whitening import Whitening
from tests.reference import nnls_columns, patch_matrix, random_lateral

MATCHED = 1e-3
"""What the fit promises: mismatch of the statistics relative to a channel's root-mean-square activity."""


def learnt(images: Tensor, *, whiten: bool = False, normalize: str = "contrast") -> SimilarityMatchingConv2d:
    """24 channels on 3 × 3 patches, learnt from images; float64, so that rounding hides nothing."""
    layer = SimilarityMatchingConv2d(
        1,
        24,
        3,
        padding=1,
        normalize=normalize,
        whiten=whiten,
        plasticity=PlasticityConfig(lr=0.1, lr_decay_steps=20, tau=0.5),
        dtype=torch.float64,
    )
    if whiten:
        layer.calibrate(images)
    for batch in images.split(50):
        layer.partial_fit(batch)
    return layer


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    return to_unit(digits.train_images, torch.float64)


@pytest.fixture(scope="module")
def layer(images: Tensor) -> SimilarityMatchingConv2d:
    return learnt(images[:400])


@pytest.fixture(scope="module")
def white_layer(images: Tensor) -> SimilarityMatchingConv2d:
    return learnt(images[:400], whiten=True)


def untaught(lateral: Tensor, seed: int, **options: object) -> SimilarityMatchingConv2d:
    """A layer on 2 channels with random W and a given M."""
    made = SimilarityMatchingConv2d(2, len(lateral), 3, seed=seed, dtype=torch.float64, **options)  # type: ignore[arg-type]
    made.lateral.copy_(lateral)
    made.recertify()
    return made


def random_images(count: int = 60) -> Tensor:
    """Of both signs, so that every channel is active about half of the time."""
    return torch.rand(count, 2, 8, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "contrast"])
@pytest.mark.parametrize("whiten", [False, True])
def test_without_inhibition_the_encoder_is_exact(normalize: str, whiten: bool) -> None:
    """M = diag(m): y* = relu(W x̃ / m) is of the encoder's form, with A = diag(1/m) W Π J and b = −diag(1/m) W Π μ."""
    diagonal = torch.tensor([0.5, 1.0, 3.0, 2.0, 1.5], dtype=torch.float64)
    made = untaught(torch.diag(diagonal), 1, normalize=normalize, whiten=whiten, padding=1, stride=2)
    images = random_images()
    if whiten:
        made.calibrate(images)
    encoder = feedforward_encoder(made, images)
    weight, offset = made.feedforward.flatten(1), torch.zeros(5, dtype=torch.float64)
    if whiten:
        offset = -weight @ made.whitening @ made.whitening_mean
        weight = weight @ made.whitening
    if normalize == "contrast":
        weight = weight - weight.mean(dim=1, keepdim=True)
    expected = Encoder((weight / diagonal.unsqueeze(1)).reshape(5, 2, 3, 3), offset / diagonal, made.patch)
    # the mismatch is quadratic near the solution, 1e-3 of the statistics at the end: a few 1e-3 of the activities
    other = random_images(70)[60:]
    torch.testing.assert_close(encoder(other), expected(other), rtol=0.0, atol=5e-3 * float(expected(other).amax()))
    quality = agreement(encoder, made, other)
    assert quality.cosine > 0.999
    assert quality.error < 0.01


def test_where_all_channels_are_active_the_encoder_is_linear() -> None:
    """y* = M⁻¹(W x + offset) > 0 on all columns: least squares is exact, and so is the encoder."""
    lateral = random_lateral(4, 5, condition=10.0)
    generator = torch.Generator().manual_seed(6)
    inputs = torch.rand(2000, 6, generator=generator, dtype=torch.float64)
    weight = 0.1 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    solution, bias = torch.linalg.solve(lateral, weight), torch.full((4,), 20.0, dtype=torch.float64)
    y = solution @ inputs.T + bias.unsqueeze(1)
    assert float(y.amin()) > 0
    weight_fitted, bias_fitted = fit(inputs, y, bias)
    # one step in the metric of the inputs solves it, to a ridge of 1e-6 and a mismatch of 1e-3 of y ≈ 20
    reproduced = weight_fitted @ inputs.T + bias_fitted.unsqueeze(1)
    assert float((reproduced - y).square().mean().sqrt() / y.square().mean().sqrt()) < MATCHED


# -- folding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
def test_the_encoder_is_affine_in_the_layers_patches(images: Tensor, whiten: bool) -> None:
    """Undo the folding: A = A' Π gives u = A' x̃ + (b + A' Π μ) on explicit x̃, with Π, μ of the layer's whitening."""
    made = learnt(images[:100], whiten=whiten)
    encoder = feedforward_encoder(made, images[:100])
    maps = encoder(images[100:110])
    seen = transform(patch_matrix(images[100:110], 3, 1, 1), made.patch)
    expected = (seen @ encoder.weight.flatten(1).T + encoder.bias).clamp(min=0.0)
    # sums of 9 products in float64; a variance taken from squares costs a few digits
    torch.testing.assert_close(maps.permute(0, 2, 3, 1).flatten(0, 2), expected, rtol=1e-9, atol=1e-9)
    if whiten:
        whitening = Whitening(made.whitening, made.whitening_mean)
        white = explicit(made.prepare(images[100:110]))
        inverse = torch.linalg.inv(whitening.matrix)
        again = (white @ inverse.T + whitening.mean) @ encoder.weight.flatten(1).T + encoder.bias
        torch.testing.assert_close(again.clamp(min=0.0), expected, rtol=1e-7, atol=1e-7)


def test_brightness_and_gain_do_not_matter_with_contrast(layer: SimilarityMatchingConv2d, images: Tensor) -> None:
    unpadded = replace(
        feedforward_encoder(layer, images[:100]), patch=replace(layer.patch, padding=0, contrast_floor=1e-9)
    )
    some = images[:5] + 0.01 * torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # variances of 1e-5 next to squares of 50: 50 · 1e-16 / 1e-5 = 5e-10, times activities of 10 or so
    torch.testing.assert_close(unpadded(3.0 * some + 2.0), unpadded(some), rtol=1e-6, atol=1e-6)


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "contrast"])
def test_the_statistics_of_the_sample_are_matched(images: Tensor, normalize: str) -> None:
    """⟨ŷ vᵀ⟩ = ⟨y vᵀ⟩ and ⟨ŷ⟩ = ⟨y⟩: 150 images of 64 positions are all in the sample.

    Images with noise have no empty patches, so that no bias is fixed.
    """
    noise = torch.rand(images[:300].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = 0.8 * images[:300] + 0.2 * noise
    made = learnt(noisy, normalize=normalize)
    sample = noisy[:150]
    encoder = feedforward_encoder(made, sample)
    seen = transform(patch_matrix(sample, 3, 1, 1), made.patch)
    with_one = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.float64)], dim=1)
    y, estimate = true(made, sample), encoder(sample).permute(1, 0, 2, 3).flatten(1)
    wanted, got = y @ with_one / len(seen), estimate @ with_one / len(seen)
    covariance = with_one.T @ with_one / len(seen)
    scale = y.square().mean(dim=1).sqrt()
    difference = got - wanted
    mismatch = (difference * (difference @ torch.linalg.pinv(covariance))).sum(dim=1).clamp(min=0.0).sqrt()
    # the fit stops at 1e-3; activities here come from `nnls`, there from a residual of 1e-4
    assert float((mismatch / scale).amax()) < 3 * MATCHED
    # the bound of what a rectified affine function explains: it lowers the mean square and nothing else
    assert bool((estimate.square().mean(dim=1) <= 1.01 * y.square().mean(dim=1)).all())


def true(made: SimilarityMatchingConv2d, images: Tensor) -> Tensor:
    """[K, N], by active sets in SciPy on explicit patches."""
    seen = transform(patch_matrix(images, 3, 1, 1), made.patch)
    return nnls_columns(made.feedforward.flatten(1) @ seen.T, regularised(made))


def regularised(made: SimilarityMatchingConv2d) -> Tensor:
    """M + ε I, the system that the dynamics solve."""
    size = made.out_channels
    return made.lateral + made.dynamics.ridge * made.lateral.diagonal().mean() * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("whiten", [False, True])
def test_empty_patches_are_exact(whiten: bool, request: pytest.FixtureRequest, images: Tensor) -> None:
    """A tenth of the digits' patches is empty. Where y*(0) > 0 the bias equals it, elsewhere it is at most 0."""
    made = request.getfixturevalue("white_layer" if whiten else "layer")
    empty = -made.whitening @ made.whitening_mean if whiten else torch.zeros(9, dtype=torch.float64)
    expected = nnls_columns((made.feedforward.flatten(1) @ empty).unsqueeze(1), regularised(made)).squeeze(1)
    active = expected > 1e-6
    assert bool(active.any()) == whiten  # without whitening nothing drives
    encoder, plain = feedforward_encoder(made, images[:150]), feedforward_filter(made, images[:150])
    for bias in (encoder.bias, plain.bias):
        assert bool((bias[~active] <= 1e-6).all())
        assert bool((bias[active] > 0).all())
    nothing = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    # a residual of 1e-4 leaves a few per mille of the largest activity where M is ill-conditioned
    atol = 5e-3 * float(expected.amax())
    torch.testing.assert_close(encoder(nothing)[0, :, 2, 2], expected, rtol=0.0, atol=atol)


def test_a_filter_has_the_power_of_its_input(layer: SimilarityMatchingConv2d, images: Tensor) -> None:
    sample = images[:150]
    fitted = feedforward_filter(layer, sample)
    maps = F.conv2d(sample, fitted.weight, fitted.bias, padding=1).relu()
    expected = sample.square().mean().expand(24)
    torch.testing.assert_close(maps.square().mean(dim=(0, 2, 3)), expected, rtol=1e-9, atol=0.0)
    again = feedforward_filter(layer, sample)
    assert torch.equal(again.weight, fitted.weight)  # the sample is a function of the layer's seed


def test_without_contrast_filter_and_encoder_differ_by_scale_alone(images: Tensor) -> None:
    """Then v = x, and both are fitted to the same patches."""
    made = learnt(images[:200], normalize="none")
    sample = images[:150]
    encoder, fitted = feedforward_encoder(made, sample), feedforward_filter(made, sample)
    gain = fitted.weight.flatten(1).norm(dim=1) / encoder.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(fitted.weight, encoder.weight * gain.view(-1, 1, 1, 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fitted.bias, encoder.bias * gain, rtol=1e-9, atol=1e-12)
    plain, scaled = agreement(encoder, made, sample[:20]), agreement(fitted, made, sample[:20])
    assert scaled.correlation == pytest.approx(plain.correlation)
    assert scaled.support == pytest.approx(plain.support)
    assert scaled.error <= plain.error + 1e-9  # least-squares gains cannot be worse than any other


def test_a_channel_silent_on_the_sample_stays_silent(images: Tensor) -> None:
    made = learnt(images[:200])
    made.feedforward[3] = 0.0
    for fitted in (feedforward_encoder(made, images[:50]), feedforward_filter(made, images[:50])):
        assert bool((fitted.weight[3] == 0).all())
        assert float(fitted.bias[3]) == 0.0
        assert bool(fitted.weight.isfinite().all())


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_agreement_of_activities_with_themselves_is_perfect() -> None:
    y = torch.rand(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).sub(0.5).clamp(min=0.0)
    y[:, :3] = 0.0  # silent columns
    y[2] = 0.0  # a silent channel
    quality = compare(y, y)
    assert quality == Agreement(pytest.approx(1.0), pytest.approx(1.0), 1.0, 0.0)
    # all but the error ignore a common scale
    half = compare(0.5 * y, y)
    assert half == Agreement(pytest.approx(1.0), pytest.approx(1.0), 1.0, pytest.approx(0.5))


def test_agreement_by_hand() -> None:
    y = torch.tensor([[3.0, 0.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    estimate = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    compared = compare(estimate, y)
    # cosines 9/15, 1 (both silent), 0 (one silent), 0 (disjoint); Jaccard 1/2, 1, 0, 0
    assert compared.cosine == pytest.approx((0.6 + 1.0) / 4)
    assert compared.support == pytest.approx(1.5 / 4)
    # 16 + 4 + 1 + 1 over 9 + 16 + 1
    assert compared.error == pytest.approx((22 / 26) ** 0.5)
    # y_1 − 1 = (2, −1, −1, 0), ŷ_1 − 5/4 = (7, −5, 3, −5)/4; y_2 − 1 = (3, −1, −1, −1), ŷ_2 − 1/4 = (−1, −1, −1, 3)/4
    first, second = 16 / (6 * 108) ** 0.5, -4 / (12 * 12) ** 0.5
    assert compared.correlation == pytest.approx((first + second) / 2)


def test_agreement_with_silence_is_defined() -> None:
    nothing, some = torch.zeros(2, 3), torch.eye(2, 3)
    assert compare(nothing, nothing) == Agreement(1.0, 1.0, 1.0, 0.0)
    # the third column is silent in both
    assert compare(nothing, some) == Agreement(pytest.approx(1 / 3), 0.0, pytest.approx(1 / 3), 1.0)
    assert compare(some, nothing).error == float("inf")


def naive(made: SimilarityMatchingConv2d) -> Encoder:
    """No inhibition: relu(W x̃ / diag M)."""
    weight, offset = made.feedforward.flatten(1), torch.zeros(made.out_channels, dtype=torch.float64)
    if made.whiten:
        offset = -weight @ made.whitening @ made.whitening_mean
        weight = weight @ made.whitening
    weight = weight - weight.mean(dim=1, keepdim=True)
    diagonal = made.lateral.diagonal()
    return Encoder((weight.T / diagonal).T.reshape(made.feedforward.shape), offset / diagonal, made.patch)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_encoder_agrees_on_digits_it_has_not_seen(
    whiten: bool, request: pytest.FixtureRequest, images: Tensor
) -> None:
    """Correlation above 0.9 and error below 0.4, as for 24 channels on 9 pixels; no inhibition is far worse."""
    made = request.getfixturevalue("white_layer" if whiten else "layer")
    unseen = images[1000:1100]
    quality = agreement(feedforward_encoder(made, images[:150]), made, unseen)
    rival = agreement(naive(made), made, unseen)
    assert quality.correlation > 0.9
    assert quality.error < 0.4
    assert quality.cosine > 0.8
    assert quality.correlation > rival.correlation
    assert quality.error < rival.error / 2
    assert quality.support > rival.support
    # the filter is blind to a patch's contrast, and loses by it
    plain = agreement(feedforward_filter(made, images[:150]), made, unseen)
    assert 0.7 < plain.correlation < quality.correlation


# -- costs and errors --------------------------------------------------------------------------------------------------


def test_operations_are_counted(layer: SimilarityMatchingConv2d, images: Tensor) -> None:
    """24 channels, P = 9: 216, and with contrast two sums of 9 and 24 divisions."""
    encoder = feedforward_encoder(layer, images[:20])
    assert encoder.operations == 216 + 18 + 24
    assert replace(encoder, patch=replace(layer.patch, contrast=False)).operations == 216
    assert feedforward_filter(layer, images[:20]).operations == 216


def test_wrong_input_is_refused(layer: SimilarityMatchingConv2d, images: Tensor) -> None:
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        feedforward_encoder(layer, images[:0])
    with pytest.raises(ValueError, match=r"images: expected \[B, 1, H, W\], got \[9, 2, 8, 8\]"):
        feedforward_filter(layer, images[:9].repeat(1, 2, 1, 1))
    shard = SimilarityMatchingConv2d(1, 8, 3, rows=split_rows(8, 2)[0])
    with pytest.raises(ValueError, match="expected a layer with all 8 channels, got 4"):
        feedforward_encoder(shard, images[:9].float())
