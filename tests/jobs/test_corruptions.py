"""Corruptions do what their names say, to each image alone, at any size."""

from __future__ import annotations

import colorsys
import itertools
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import Tensor

import jobs.evaluation.corruptions
from jobs.evaluation.corruptions import CHUNK, CORRUPTIONS, corrupt, draw_corruptions
from jobs.evaluation.corruptions_draws import ImageDraws
from jobs.evaluation.corruptions_texture import plasma

PAPER = (
    "shot noise, impulse noise, glass blur, motion blur, shear, scale, rotate, brightness, translate, stripe, fog, "
    "spatter, dotted line, zigzag, canny edges"
)
WITHOUT_CHANCE = {"scale", "brightness", "stripe", "canny_edges"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def grey(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


def draws_of(name: str, count: int, seed: int = 0) -> ImageDraws:
    """The draws that `corrupt` gives the first images."""
    return ImageDraws(f"corruption {name}", seed, range(count))


def blob(height: int, width: int, sigma: float = 2.0) -> Tensor:
    """A smooth, lopsided image [1, 1, H, W] that is nearly 0 at the edges."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    first = torch.exp(-((rows - 0.45 * height) ** 2 + (columns - 0.6 * width) ** 2) / (2 * sigma**2))
    second = torch.exp(-((rows - 0.6 * height) ** 2 + (columns - 0.4 * width) ** 2) / sigma**2)
    return (0.6 * first + 0.4 * second)[None, None]


# -- every corruption --------------------------------------------------------------------------------------------------


def test_the_papers_fifteen_in_its_order() -> None:
    assert list(CORRUPTIONS) == [name.replace(" ", "_") for name in PAPER.split(", ")]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same whatever images are beside it and however many are taken at a time."""
    images = noise(9, 2, 12, 11)
    together = corrupt(images, name, seed=3, first=40)
    assert torch.equal(together, corrupt(images, name, seed=3, first=40))
    alone = [corrupt(images[i : i + 1], name, seed=3, first=40 + i) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr(jobs.evaluation.corruptions, "CHUNK", 4)
    assert torch.equal(together, corrupt(images, name, seed=3, first=40))
    other_mates = torch.cat([images[:1], 1 - images[1:]])
    assert torch.equal(together[0], corrupt(other_mates, name, seed=3, first=40)[0])
    assert CHUNK > 4


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_and_index_decide(name: str) -> None:
    images = noise(1, 1, 28, 28).expand(6, 1, 28, 28)
    at_first, later, reseeded = (corrupt(images, name, seed, first=first) for seed, first in ((0, 0), (0, 100), (1, 0)))
    for other in (later, reseeded, at_first.roll(1, 0)):
        assert torch.equal(at_first, other) == (name in WITHOUT_CHANCE)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 1, 8, 8), torch.float32),
        ((4, 3, 32, 32), torch.float64),
        ((3, 2, 9, 14), torch.float32),
        ((3, 1, 20, 13), torch.bfloat16),
        ((2, 1, 1, 1), torch.float32),
        ((0, 1, 8, 8), torch.float32),
    ],
)
def test_shape_dtype_and_range(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = noise(*shape).to(dtype)
    before = images.clone()
    corrupted = corrupt(images, name, seed=0)
    assert corrupted.shape == shape
    assert corrupted.dtype == dtype
    assert torch.equal(images, before)
    assert bool(((corrupted >= 0) & (corrupted <= 1)).all())
    if min(shape) > 1:
        changed = (corrupted != images).flatten(1).float().mean(dim=1)
        assert float(changed.min()) > 0.02


def test_refusals() -> None:
    images = noise(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"^corruption: expected one of shot_noise, .*, canny_edges, got 'snow'$"):
        corrupt(images, "snow", seed=0)
    with pytest.raises(ValueError, match=r"^images: expected floats \[N, C, H, W\], got torch.float32 \(2, 8, 8\)$"):
        corrupt(images[:, 0], "fog", seed=0)
    with pytest.raises(ValueError, match=r"^images: expected floats \[N, C, H, W\], got torch.uint8 \(2, 1, 8, 8\)$"):
        corrupt((255 * images).to(torch.uint8), "fog", seed=0)
    for value in (1.5, -0.25, math.nan):
        images[1, 0, 3, 2] = value
        with pytest.raises(ValueError, match=rf"^images: expected values in \[0, 1\], got {value:g}$"):
            corrupt(images, "fog", seed=0)


# -- noise and values --------------------------------------------------------------------------------------------------


def test_shot_noise_counts_photons() -> None:
    """Values are counts / 3 with Poisson's probabilities, those above 3 taken together by the clamp at 1."""
    for value in (0.0, 0.1, 0.5, 1.0):
        counts = 3 * corrupt(grey(value, 60, 1, 28, 28).double(), "shot_noise", seed=2)
        assert torch.allclose(counts, counts.round(), atol=1e-12)
        share = torch.bincount(counts.round().long().flatten(), minlength=4).double() / counts.numel()
        law = scipy.stats.poisson(3 * value).pmf(range(3))
        law = np.append(law, 1 - law.sum())
        assert np.allclose(share, law, atol=4 * 0.5 / math.sqrt(counts.numel()))


def test_shot_noise_mean_and_variance() -> None:
    """Before the clamp: mean x, variance x / 3."""
    images = grey(0.6, 60, 1, 28, 28).double()
    noisy = CORRUPTIONS["shot_noise"](images, draws_of("shot_noise", 60))
    assert float(noisy.mean()) == pytest.approx(0.6, abs=4 * math.sqrt(0.2 / noisy.numel()))
    assert float(noisy.var()) == pytest.approx(0.2, rel=0.05)


def test_impulse_noise_replaces_a_share() -> None:
    images = 0.25 + 0.5 * noise(60, 3, 28, 28)
    noisy = corrupt(images, "impulse_noise", seed=0)
    black, white = (float((noisy == value).float().mean()) for value in (0, 1))
    spread = 4 * math.sqrt(0.085 * 0.915 / noisy.numel())
    assert black == pytest.approx(0.085, abs=spread)
    assert white == pytest.approx(0.085, abs=spread)
    kept = (noisy > 0) & (noisy < 1)
    assert torch.equal(noisy[kept], images[kept])
    for values in (black + white, float((noisy[:, 0] == noisy[:, 1]).float().mean())):  # channels apart
        assert values < 0.2


def test_brightness_is_hsv() -> None:
    images = noise(1, 3, 5, 6)
    images[0, :, 2, 2] = 0.0
    brighter = corrupt(images, "brightness", seed=0)
    for row in range(5):
        for column in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, row, column].tolist())
            oracle = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.5))
            assert brighter[0, :, row, column].tolist() == pytest.approx(oracle, abs=1e-6)
    greys = noise(3, 1, 8, 8)
    torch.testing.assert_close(corrupt(greys, "brightness", seed=0), (greys + 0.5).clamp(max=1))


def test_stripe_inverts_outside_the_middle() -> None:
    for width, side in ((28, 7), (8, 2), (32, 8)):
        images = noise(3, 2, 28, width)
        oracle = images.clone()
        oracle[..., :side] = 1 - images[..., :side]
        oracle[..., -side:] = 1 - images[..., -side:]
        torch.testing.assert_close(corrupt(images, "stripe", seed=0), oracle)


def test_clouds_are_those_of_the_large_map() -> None:
    """Golden values: 300 diamond–square maps of 256 × 256, decay 1.4 a level, their 28 × 28 corners."""
    for size in (28, 8):
        clouds = plasma((size, size), size / 28, draws_of("fog", 400))
        assert bool(((clouds >= 0) & (clouds <= 1)).all())
        assert float(clouds.mean()) == pytest.approx(0.52, abs=0.04)
        assert float(clouds.mean(dim=(1, 2)).std()) == pytest.approx(0.19, abs=0.02)
        assert float(clouds.std(dim=(1, 2)).mean()) == pytest.approx(0.060, abs=0.008)
    neighbours = plasma((28, 28), 1.0, draws_of("fog", 400)).diff(dim=2).std()
    assert float(neighbours) == pytest.approx(0.0105, abs=0.0015)


def test_fog_is_added_and_scaled_back() -> None:
    """Two images with one maximum m keep their difference times m / (m + 3), under the same clouds."""
    first, second = 0.5 * noise(4, 1, 28, 28), 0.5 * noise(4, 1, 28, 28, seed=1)
    first[:, 0, 0, 0] = second[:, 0, 0, 0] = 0.6
    foggy = [corrupt(images, "fog", seed=0) for images in (first, second)]
    torch.testing.assert_close(foggy[0] - foggy[1], (first - second) * 0.6 / 3.6)
    assert float(foggy[0].amax()) <= 0.6 + 1e-6
    assert torch.equal(corrupt(grey(0.0, 2, 1, 8, 8), "fog", seed=0), grey(0.0, 2, 1, 8, 8))


def test_spatter_covers_with_grey() -> None:
    shares = []
    for size in (28, 8, 56):
        black, white = (corrupt(grey(value, 200, 1, size, size), "spatter", seed=0) for value in (0.0, 1.0))
        cover = 1 - (white - black)  # where they agree, the drop hides the image
        torch.testing.assert_close(black, cover * 63 / 255, atol=1e-6, rtol=0)
        if size == 28:
            covered = cover > 1e-6
            assert float(cover[covered].min()) >= 0.8 - 1e-6
            drops = [scipy.ndimage.label(image)[1] for image in covered[:, 0].numpy()]
            assert 1 < np.mean(drops) < 15  # drops, not dust
        shares.append(float(cover.mean()))
    assert 0.05 < shares[0] < 0.25
    assert shares[1:] == pytest.approx([shares[0]] * 2, abs=0.01)


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "step"), [(28, 3), (8, 1), (32, 3)])
def test_translate_is_a_shift(size: int, step: int) -> None:
    """Nothing is lost of an image with a wide margin, so that a circular shift is the oracle; all four ways occur."""
    images = torch.zeros(40, 2, size, size)
    images[:, :, step:-step, step:-step] = noise(40, 2, size - 2 * step, size - 2 * step)
    moved, seen = corrupt(images, "translate", seed=0), set()
    for image, other in zip(images, moved, strict=True):
        ways = [(down, right) for down in (-step, step) for right in (-step, step)]
        fitting = [way for way in ways if torch.allclose(image.roll(way, (1, 2)), other, atol=1e-6)]
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) == 4
    edge = corrupt(grey(1.0, 8, 1, size, size), "translate", seed=0)  # zeros move in
    assert edge.sum(dim=(1, 2, 3)).tolist() == pytest.approx([(size - step) ** 2] * 8, abs=1e-3)


def test_rotate_is_scipys() -> None:
    for height, width in ((28, 28), (40, 28), (27, 33)):
        image = blob(height, width)
        turned = corrupt(image.expand(10, 2, -1, -1), "rotate", seed=0)
        oracles = [
            scipy.ndimage.rotate(image[0, 0].numpy(), sign * math.degrees(0.4), reshape=False, order=1)
            for sign in (-1, 1)
        ]
        found = {next(i for i in (0, 1) if np.allclose(part, oracles[i], atol=1e-4)) for part in turned[:, 0].numpy()}
        assert found == {0, 1}
        assert torch.equal(turned[:, 0], turned[:, 1])


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("shear", [[[1, 0], [math.tan(0.4), 1]], [[1, 0], [-math.tan(0.4), 1]]]),
        ("scale", [[[1 / 0.7, 0], [0, 1 / 0.7]]]),
    ],
)
def test_affine_is_scipys(name: str, matrices: list[list[list[float]]]) -> None:
    """The matrix takes a place in the result, from the centre, to the place it shows."""
    image = blob(26, 30)
    centre = np.array([12.5, 14.5])
    oracles = [
        scipy.ndimage.affine_transform(image[0, 0].numpy(), np.array(m), centre - np.array(m) @ centre, order=1)
        for m in matrices
    ]
    changed = corrupt(image.expand(10, 1, -1, -1), name, seed=0)[:, 0].numpy()
    found = {next(i for i, o in enumerate(oracles) if np.allclose(part, o, atol=1e-4)) for part in changed}
    assert found == set(range(len(matrices)))


def test_shear_keeps_rows_and_scale_shrinks() -> None:
    """Closed forms: a row keeps its sum; the area goes with the square of the scale, the spread with the scale."""
    image = blob(36, 36).double()
    torch.testing.assert_close(corrupt(image, "shear", seed=0).sum(dim=3), image.sum(dim=3), rtol=1e-3, atol=1e-3)
    small = corrupt(image, "scale", seed=0)
    assert float(small.sum() / image.sum()) == pytest.approx(0.49, rel=5e-3)
    places = torch.arange(36).double() - 17.5
    means = [float((part.sum(dim=2) * places).sum() / part.sum()) for part in (image, small)]
    assert means[1] == pytest.approx(0.7 * means[0], abs=0.02)


@pytest.mark.parametrize(("size", "sigma"), [(57, 3 * 57 / 28), (29, 3 * 29 / 28)])
def test_motion_blur_smears_along_a_half_gaussian(size: int, sigma: float) -> None:
    """A dot becomes a line from it to the left: its mass is kept, its mean as far as that of the half-Gaussian."""
    images = torch.zeros(30, 1, size, size, dtype=torch.float64)
    dot = (size // 2, size - 4)
    images[:, 0, dot[0], dot[1]] = 1.0
    blurred = corrupt(images, "motion_blur", seed=0)[:, 0]
    rows, columns = (torch.arange(size).double() - place for place in dot)
    steps = np.linspace(0, 4 * sigma, 1 + max(12, math.ceil(4 * sigma)))
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    distance = float(steps @ weights / weights.sum())
    angles = []
    for image in blurred:
        assert float(image.sum()) == pytest.approx(1.0, abs=0.02)
        down = float((image.sum(dim=1) * rows).sum() / image.sum())
        right = float((image.sum(dim=0) * columns).sum() / image.sum())
        assert math.hypot(down, right) == pytest.approx(distance, rel=0.05)
        assert right < 0
        angles.append(math.atan2(down, -right))
        sine, cosine = math.sin(angles[-1]), math.cos(angles[-1])
        off_line = (rows[:, None] * cosine + columns[None] * sine) ** 2
        assert float((image * off_line).sum()) < 0.5  # no wider than a pixel
    assert max(map(abs, angles)) < math.pi / 4 + 0.05
    assert max(angles) > 0.3
    assert min(angles) < -0.3


def test_motion_blur_of_a_plain_image_is_the_image() -> None:
    images = grey(0.7, 3, 1, 28, 28)
    torch.testing.assert_close(corrupt(images, "motion_blur", seed=0), images)


@pytest.mark.parametrize(("size", "share"), [(28, 0.375), (8, 0.375 * 8 / 28), (56, 0.375)])
def test_glass_blur_against_loops(size: int, share: float) -> None:
    """Pixel by pixel, with the numbers that `corrupt` draws."""
    images = noise(4, 2, size, size).double()
    reach, sigma, draws = max(1, size // 28), 0.7 * size / 28, draws_of("glass_blur", 4)
    smooth = [
        [scipy.ndimage.gaussian_filter(part, sigma, mode="nearest") for part in image] for image in images.numpy()
    ]
    for _ in range(2):
        drawn, offsets = draws.uniform(size, size), draws.uniform(2, size, size, low=-reach, high=reach + 1)
        for index in range(4):
            for row in range(size):
                for column in range(size):
                    if drawn[index, row, column] < share:
                        other_row = min(max(row + math.floor(offsets[index, 0, row, column]), 0), size - 1)
                        other = other_row, min(max(column + math.floor(offsets[index, 1, row, column]), 0), size - 1)
                        for part in smooth[index]:
                            part[row, column], part[other] = part[other], part[row, column]
    oracle = [[scipy.ndimage.gaussian_filter(part, sigma, mode="nearest") for part in image] for image in smooth]
    assert np.allclose(corrupt(images, "glass_blur", seed=0), oracle, atol=1e-12)


# -- lines and edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dash"), [(28, 2), (8, 1), (56, 4)])
def test_dotted_line_is_straight_and_dotted(size: int, dash: int) -> None:
    ink = corrupt(torch.zeros(40, 1, size, size), "dotted_line", seed=0)[:, 0]
    on = torch.arange(size) // dash % 2 == 1
    assert float(ink[:, :, ~on].max()) == 0
    start, end = draws_of("dotted_line", 40).uniform(2, high=size - 1).unbind(1)
    slopes = (end - start) / (size - 1)
    assert float(slopes.abs().max()) > 0.5
    for image, first, slope in zip(ink, start, slopes, strict=True):
        for column in range(size):
            if on[column]:
                line = float(first + slope * column)
                rows = image[:, column].nonzero()[:, 0].double()
                assert image[:, column].argmax() == pytest.approx(line, abs=0.51)
                assert float((rows - line).abs().max()) < 2.1 * max(1.0, size / 28)
                assert float(image[:, column].max()) > 0.4
    image = noise(1, 1, size, size)
    torch.testing.assert_close(corrupt(image, "dotted_line", seed=0)[0, 0], (image[0, 0] + ink[0]).clamp(max=1))


def distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of points [..., 2] from the segment: [...]."""
    along = np.clip((points - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return np.linalg.norm(points - start - along[..., None] * (end - start), axis=-1)


@pytest.mark.parametrize("size", [28, 8, 56])
def test_zigzag_follows_its_polyline(size: int) -> None:
    """Corners are laid out one by one; ink near the polyline, none elsewhere."""
    unit, count = size / 28, 30
    ink = corrupt(torch.zeros(count, 1, size, size), "zigzag", seed=0)[:, 0].numpy()
    step, reach = max(1.0, 2 * unit), 2.3 * max(unit, 0.5)
    draws = draws_of("zigzag", count)
    starts = draws.uniform(1, 1, high=size - 1).flatten().tolist()
    tilts = draws.uniform(1, 1, low=-5 * unit, high=5 * unit).flatten().tolist()
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1).astype(float)
    for image, start, tilt in zip(ink, starts, tilts, strict=True):
        run = size - 1 - 4 * unit
        right = np.array([tilt, run]) / math.hypot(tilt, run)
        down = np.array([right[1], -right[0]])
        corners, sign, along = [np.zeros(2)], 1, step
        while along < math.hypot(tilt, run):
            corners.append(along * right + sign * step * down)
            sign, along = -sign, along + 2 * step
        line = [corner + np.array([start, 2 * unit]) for corner in corners]
        distance = np.min([distance_to_segment(grid, *ends) for ends in itertools.pairwise(line)], axis=0)
        beyond = (grid - line[-1]) @ right > -0.1  # the last, shorter arm
        before = (grid - line[0]) @ right < 0.1
        far = distance > 0.633 * math.sqrt(2) * reach + 0.01  # 1 − 1/e of the reach; corners reach √2 as far
        assert image[far & ~beyond].max() == 0
        close = (distance < 0.3 * reach) & ~beyond & ~before
        assert close.any() or min(start, size - 1 - start) < 2 * step
        assert image[close].min(initial=1.0) >= 1 + math.log(1 - 0.3) - 1e-6
        assert image.max() > 0.3  # some of it is always seen


def test_canny_of_a_disk_is_a_thin_ring() -> None:
    rows, columns = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    radius = torch.sqrt(rows**2 + columns**2)
    for true in (6.0, 8.0, 10.5):
        disk = (true + 0.5 - radius).clamp(0, 1)  # with a soft rim of one pixel, half covered at the radius
        edges = corrupt(disk[None, None], "canny_edges", seed=0)[0, 0]
        assert set(edges.unique().tolist()) == {0.0, 1.0}
        on = edges == 1
        assert float((radius[on] - true).abs().max()) <= 1.0
        assert scipy.ndimage.label(on.numpy(), np.ones((3, 3)))[1] == 1
        assert scipy.ndimage.label(~on.numpy())[1] == 2  # closed: inside and outside do not meet
        # a path of king's moves around a circle has 8 r / √2 = 5.7 r steps, one without diagonals 8 r
        assert 5.2 * true < int(on.sum()) < 7.5 * true


def test_canny_of_a_step_is_one_pixel_wide() -> None:
    """The gradient is the same in the two pixels beside a step: one of them stays, for either sign and axis."""
    step = (torch.arange(20) >= 9).float().expand(20, 20)
    for image in (step, 1 - step, step.T, 1 - step.T):
        edges = corrupt(image[None, None], "canny_edges", seed=0)[0, 0]
        along = edges if torch.equal(image[0], image[-1]) else edges.T
        assert along.sum(dim=1).tolist() == [1.0] * 20
        assert along.sum(dim=0).max() == 20


def test_canny_joins_weak_to_strong_edges() -> None:
    """Smoothed by σ = 1, a step of height a has a Sobel value of 4 a (Φ(1.5) − Φ(−0.5)) = 2.5 a beside it.

    So it is weak from a = 0.04, strong from 0.08. Images do not join.
    """
    assert 4 * np.diff(scipy.stats.norm.cdf([-0.5, 1.5])) == pytest.approx(2.5, abs=0.005)

    def step(upper: float, lower: float) -> Tensor:
        heights = torch.cat([torch.full((14,), upper), torch.full((14,), lower)])
        return (0.5 + heights[:, None] * (torch.arange(28) >= 14))[None]

    heights = [(0.076, 0.076), (0.084, 0.084), (0.076, 0.076), (0.084, 0.042), (0.084, 0.038)]
    edges = corrupt(torch.stack([step(*pair) for pair in heights]), "canny_edges", seed=0)
    rows_with_edges = (edges[:, 0].sum(dim=2) > 0).sum(dim=1).tolist()
    assert rows_with_edges[:4] == [0, 28, 0, 28]
    assert 13 < rows_with_edges[4] < 17  # smoothing carries the strong half a little further


def test_canny_of_colours() -> None:
    images = noise(2, 3, 28, 28)
    edges = corrupt(images, "canny_edges", seed=0)
    of_grey = corrupt(images.mean(dim=1, keepdim=True), "canny_edges", seed=0)
    assert torch.equal(edges, of_grey.expand(-1, 3, -1, -1))


# -- the picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_picture(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def make(*args, **options) -> Figure:
        figures.append(Figure(*args, **options))
        return figures[-1]

    monkeypatch.setattr(jobs.evaluation.corruptions, "Figure", make)
    images = noise(4, channels, 8, 9)
    draw_corruptions(images, tmp_path / "corruptions.png", seed=5)
    pixels = matplotlib.image.imread(tmp_path / "corruptions.png")
    assert float(pixels[..., :3].std()) > 0.05
    [axes] = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", *CORRUPTIONS]
    mosaic = axes.images[0].get_array()
    assert mosaic.shape == (4 * 10, 16 * 11, 3 if channels == 3 else 1)[: mosaic.ndim]
    for column, name in enumerate(["clean", *CORRUPTIONS]):
        oracle = images if name == "clean" else corrupt(images, name, seed=5)
        for row in range(4):
            tile = np.asarray(mosaic[10 * row + 1 : 10 * row + 9, 11 * column + 1 : 11 * column + 10])
            expected = oracle[row].permute(1, 2, 0) if channels == 3 else oracle[row].mean(dim=0)
            assert np.allclose(tile.squeeze(), expected, atol=1e-6)
