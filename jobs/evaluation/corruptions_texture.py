"""Corruptions that change values in place: noise, brightness, stripe, fog, spatter, lines, and edges for an image.

Every function takes images [N, C, H, W] in [0, 1], float64, and their random numbers. Noise differs between the
channels, everything else is the same in all. Lengths are those of MNIST-C, in units of `pixel(images)`.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.evaluation.corruptions_draws import ImageDraws
from jobs.evaluation.corruptions_geometry import gaussian, pixel, positions, sample, whole

SHOT_PHOTONS = 3.0
IMPULSE_SHARE = 0.17
BRIGHTER = 0.5
FOG_WEIGHT, FOG_EXTENT, FOG_DECAY, FOG_RANGE = 3.0, 80.0, 1.4**2, 3.5
SPATTER_SIGMA, SPATTER_EDGE, SPATTER_COVER, SPATTER_GREY = 1.0, 1.5, 0.8, 63 / 255
LINE_REACH, DASH = 2.3, 2.0
ZIGZAG_MARGIN, ZIGZAG_TILT, ZIGZAG_SIZE = 2.0, 5.0, 2.0
CANNY_SIGMA, CANNY_LOW, CANNY_HIGH = 1.0, 0.1, 0.2


def shot_noise(images: Tensor, draws: ImageDraws) -> Tensor:
    """Counting noise of light: Poisson counts of mean 3 x, divided by 3."""
    return draws.poisson(SHOT_PHOTONS * images) / SHOT_PHOTONS


def impulse_noise(images: Tensor, draws: ImageDraws) -> Tensor:
    """17 % of the values replaced, half of them by 0 and half by 1."""
    drawn = draws.uniform(*images.shape[1:])
    noisy = torch.where(drawn < IMPULSE_SHARE, 1.0, images)
    return torch.where(drawn < IMPULSE_SHARE / 2, 0.0, noisy)


def brightness(images: Tensor, draws: ImageDraws) -> Tensor:
    """The largest channel (V of HSV) 0.5 brighter, at most 1; hue and saturation stay."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + BRIGHTER).clamp(max=1.0)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-12)), brighter)


def stripe(images: Tensor, draws: ImageDraws) -> Tensor:
    """Inverted, but for an upright stripe in the middle that is half as wide as the image."""
    width = images.shape[3]
    side = whole(width / 4)
    inside = (torch.arange(width) >= side) & (torch.arange(width) < width - side)
    return torch.where(inside, images, 1 - images)


def plasma(shape: tuple[int, int], unit: float, draws: ImageDraws) -> Tensor:
    """Smooth random clouds in [0, 1]: [N, H, W].

    A sum of octaves: random lattices, of which each has half the cell and 1/1.96 of the amplitude of the last, linear
    in between. It stands for the 28 × 28 corner of a diamond–square map of 256 × 256 with that decay; the first cell
    and the range were set so that images have the means (0.5 ± 0.19) and the spread inside (0.06) of that corner.
    """
    clouds, variance = torch.zeros(1, *shape, dtype=torch.float64), 0.0
    cell, amplitude = FOG_EXTENT * unit, 1.0
    while cell >= min(unit, 1.0):
        sides = [torch.arange(length, dtype=torch.float64)[:, None] / cell for length in shape]
        points = [math.ceil((length - 1) / cell) + 1 for length in shape]
        hats = [(1 - (side - torch.arange(n)).abs()).clamp(min=0) for side, n in zip(sides, points, strict=True)]
        lattice = draws.uniform(*points, low=-amplitude, high=amplitude)
        clouds = clouds + hats[0] @ lattice @ hats[1].T
        variance += amplitude**2 / 3
        cell, amplitude = cell / 2, amplitude / FOG_DECAY
    return (0.5 + clouds / (FOG_RANGE * math.sqrt(variance))).clamp(0, 1)


def fog(images: Tensor, draws: ImageDraws) -> Tensor:
    """Clouds three times as bright as the image are added, and the sum is brought back to the image's largest value."""
    clouds = FOG_WEIGHT * plasma((images.shape[2], images.shape[3]), pixel(images), draws)[:, None]
    largest = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + clouds) * largest / (largest + FOG_WEIGHT)


def spatter(images: Tensor, draws: ImageDraws) -> Tensor:
    """Dark grey drops, where smooth noise is well above its mean; made 28 pixels high or wide and resized."""
    unit, size = pixel(images), images.shape[2:]
    liquid = gaussian(draws.normal(*(whole(length / unit) for length in size)), SPATTER_SIGMA)
    cover = gaussian((liquid > 0).double(), SPATTER_EDGE)[:, None]
    cover = torch.where(cover < SPATTER_COVER, 0.0, cover)
    cover = F.interpolate(cover, size=size, mode="bilinear", antialias=True)
    return (1 - cover) * images + cover * SPATTER_GREY


def stroke(distance: Tensor, unit: float) -> Tensor:
    """Ink at a distance from a line: 1 + log(1 − distance / reach), where positive.

    The reach is 2.3 pixels of 28, and 1.15 pixels at least, or a line could pass between the pixels unseen.
    """
    reach = LINE_REACH * max(unit, 0.5)
    return (1 + torch.log1p(-(distance / reach).clamp(max=0.99))).clamp(min=0)


def dotted_line(images: Tensor, draws: ImageDraws) -> Tensor:
    """A straight line from the left to the right edge, in dashes of two pixels of 28."""
    unit, (rows, columns) = pixel(images), positions(images)
    height, width = images.shape[2:]
    start, end = draws.uniform(2, 1, 1, high=height - 1).unbind(1)
    slope = (end - start) / max(width - 1, 1)
    distance = (rows - start - slope * columns).abs() / torch.sqrt(1 + slope**2)
    dashes = columns // whole(DASH * unit) % 2
    return images + (stroke(distance, unit) * dashes)[:, None]


def zigzag(images: Tensor, draws: ImageDraws) -> Tensor:
    """A nearly level zigzag, two pixels of 28 up and down and eight from crest to crest; at least 1 and 4 pixels."""
    unit, (rows, columns) = pixel(images), positions(images)
    height, width = images.shape[2:]
    margin, size = ZIGZAG_MARGIN * unit, max(1.0, ZIGZAG_SIZE * unit)
    start = draws.uniform(1, 1, high=height - 1)
    tilt = draws.uniform(1, 1, low=-ZIGZAG_TILT * unit, high=ZIGZAG_TILT * unit)
    run = width - 1 - 2 * margin
    length = torch.sqrt(run**2 + tilt**2)
    cosine, sine = run / length, tilt / length
    along = (columns - margin) * cosine + (rows - start) * sine
    across = (rows - start) * cosine - (columns - margin) * sine
    wave = size * (1 - ((along / size + 1).remainder(4) - 2).abs())
    distance = (across - wave).abs() / math.sqrt(2)  # both arms of the zigzag rise by 45°
    ink = stroke(distance, unit) * ((along >= 0) & (along <= length))
    return images + ink[:, None]


def canny_edges(images: Tensor, draws: ImageDraws) -> Tensor:
    """Edges of the mean channel, 1 on 0, in all channels (Canny, doi:10.1109/TPAMI.1986.4767851).

    Smoothing, gradient, thinning across the edge to where the gradient is largest, and of what is above the low
    threshold the parts (8-connected) that are somewhere above the high one.
    """
    smooth = gaussian(images.mean(dim=1), CANNY_SIGMA * pixel(images)).numpy()
    gradient = [torch.from_numpy(_sobel(smooth, axis)) for axis in (1, 2)]
    magnitude = torch.sqrt(gradient[0] ** 2 + gradient[1] ** 2)
    thin = _thin(magnitude, gradient) & (magnitude >= CANNY_LOW)
    plane = np.zeros((3, 3, 3), dtype=bool)
    plane[1] = True  # neighbours within an image, none in the next image
    labels, count = scipy.ndimage.label(thin.numpy(), plane)
    kept = np.zeros(count + 1, dtype=bool)
    kept[labels[(thin & (magnitude >= CANNY_HIGH)).numpy()]] = True
    return torch.from_numpy(kept[labels]).double()[:, None].expand(images.shape)


def _sobel(images: np.ndarray, axis: int) -> np.ndarray:
    """Eight times the derivative per pixel along a dim of images [N, H, W], smoothed along the other one."""
    smooth = scipy.ndimage.correlate1d(images, [1, 2, 1], axis=3 - axis, mode="nearest")
    return np.asarray(scipy.ndimage.correlate1d(smooth, [-1, 0, 1], axis=axis, mode="nearest"))


def _thin(magnitude: Tensor, gradient: list[Tensor]) -> Tensor:
    """Where the magnitude [N, H, W] is not below that one pixel further along the gradient, and above that behind."""
    rows, columns = positions(magnitude)
    down, right = (part / magnitude.clamp(min=1e-12) for part in gradient)
    ahead, behind = (
        sample(magnitude[:, None], rows + step * down, columns + step * right)[:, 0] for step in (1.0, -1.0)
    )
    rounding = 1e-9 * magnitude  # of equal neighbours exactly one stays
    return (magnitude >= ahead - rounding) & (magnitude > behind + rounding)
