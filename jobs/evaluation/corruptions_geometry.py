"""Corruptions that move pixels: shear, scale, rotate, translate; motion blur and glass blur.

Every function takes images [N, C, H, W] in [0, 1], float64, and their random numbers; all channels of an image
move alike. Lengths are those of MNIST-C, chosen for 28 pixels, in units of `pixel(images)`.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.evaluation.corruptions_draws import ImageDraws

SHEAR_RAD = 0.4
SCALE = 0.7
ROTATE_RAD = 0.4
TRANSLATE = 3.0
MOTION_SIGMA, MOTION_RAD = 3.0, math.pi / 4
GLASS_SIGMA, GLASS_REACH, GLASS_ROUNDS, GLASS_SHARE = 0.7, 1.0, 2, 0.375


def pixel(images: Tensor) -> float:
    """Length of one pixel of a 28 × 28 image in pixels of these images [..., H, W]."""
    return min(images.shape[-2:]) / 28


def whole(length: float) -> int:
    """The nearest length in whole pixels, at least one."""
    return max(1, math.floor(length + 0.5))


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Images [..., H, W], smoothed; what lies outside continues the nearest pixel."""
    smooth = scipy.ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", axes=(-2, -1))
    return torch.from_numpy(smooth)


def positions(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [H, 1] and columns [1, W] of the pixels of images [..., H, W], float64."""
    height, width = images.shape[-2:]
    return torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)[None]


def sample(images: Tensor, rows: Tensor, columns: Tensor, outside: str = "zeros") -> Tensor:
    """Values of images [N, C, H, W] at rows and columns [N, H', W'], bilinear between pixels: [N, C, H', W'].

    `outside` the image are zeros, or with "border" the nearest pixel's value.
    """
    height, width = images.shape[2:]
    # grid_sample has x first, and −1 and 1 at the outer edges of the first and the last pixel
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Images [N, C, H, W] whose pixel at centre + t shows what was at centre + matrix t + shift.

    `matrix` [N or 1, 2, 2] and `shift` [N or 1, 2], in pixels, rows first.
    """
    height, width = images.shape[2:]
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = positions(images)
    rows, columns = rows - middle[0], columns - middle[1]
    down, right = (
        middle[i] + matrix[:, i, 0, None, None] * rows + matrix[:, i, 1, None, None] * columns + shift[:, i, None, None]
        for i in range(2)
    )
    size = (len(images), height, width)
    return sample(images, down.expand(size), right.expand(size))


def _linear(images: Tensor, entries: list[list[Tensor]]) -> Tensor:
    matrix = torch.stack([torch.stack(row, dim=-1) for row in entries], dim=-2)
    return warp(images, matrix, torch.zeros(1, 2, dtype=torch.float64))


def shear(images: Tensor, draws: ImageDraws) -> Tensor:
    """Rows slide against each other by tan 0.4 of their distance, to one side or the other; the centre stays."""
    slope = draws.sign() * math.tan(SHEAR_RAD)
    one, zero = torch.ones_like(slope), torch.zeros_like(slope)
    return _linear(images, [[one, zero], [slope, one]])


def scale(images: Tensor, draws: ImageDraws) -> Tensor:
    """The image shrunk to 0.7 of its size about its centre, zeros around it."""
    one = torch.ones(1, dtype=torch.float64)
    return _linear(images, [[one / SCALE, 0 * one], [0 * one, one / SCALE]])


def rotate(images: Tensor, draws: ImageDraws) -> Tensor:
    """Turned about the centre by 0.4 rad (23°), one way or the other."""
    sign = draws.sign()
    cosine, sine = torch.full_like(sign, math.cos(ROTATE_RAD)), sign * math.sin(ROTATE_RAD)
    return _linear(images, [[cosine, sine], [-sine, cosine]])


def translate(images: Tensor, draws: ImageDraws) -> Tensor:
    """Moved by 3 of 28 pixels in both directions, each way as likely; zeros move in."""
    shift = whole(TRANSLATE * pixel(images)) * draws.sign(2)
    return warp(images, torch.eye(2, dtype=torch.float64)[None], shift)


def motion_blur(images: Tensor, draws: ImageDraws) -> Tensor:
    """Smeared to one side along a line within 45° of the horizontal, with half a Gaussian of σ = 3 pixels of 28."""
    sigma = MOTION_SIGMA * pixel(images)
    angle = draws.uniform(low=-MOTION_RAD, high=MOTION_RAD)[:, None, None]
    down, right = torch.sin(angle), torch.cos(angle)
    rows, columns = positions(images)
    steps = np.linspace(0, 4 * sigma, 1 + max(12, math.ceil(4 * sigma)))  # at most a pixel apart
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    blurred = torch.zeros_like(images)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        blurred += weight * sample(
            images, rows + step * down + 0 * columns, columns + step * right + 0 * rows, "border"
        )
    return blurred


def glass_blur(images: Tensor, draws: ImageDraws) -> Tensor:
    """Smoothed, 3/8 of the pixels exchanged one after the other with one within reach, twice, and smoothed again.

    The reach is a pixel of 28 and at least one pixel; where that is further, fewer are exchanged. MNIST-C exchanges
    half of the pixels with one of the four up to a pixel above and left: as far, in mean square, as 3/8 here.
    """
    unit, (height, width) = pixel(images), images.shape[2:]
    reach = whole(GLASS_REACH * unit)
    share = GLASS_SHARE * min(1.0, GLASS_REACH * unit / reach)
    rows, columns = (place.long() for place in positions(images))
    sources = np.tile(np.arange(height * width)[:, None], len(images))  # which pixel has come where: [H W, N]
    image = np.arange(len(images))
    for _ in range(GLASS_ROUNDS):
        exchanged = draws.uniform(height, width) < share
        offset = (draws.uniform(2, height, width, low=-reach, high=reach + 1)).floor().long() * exchanged[:, None]
        partner = (rows + offset[:, 0]).clamp(0, height - 1) * width + (columns + offset[:, 1]).clamp(0, width - 1)
        for place, other in enumerate(partner.flatten(1).T.numpy()):
            here = sources[place].copy()
            sources[place] = sources[other, image]
            sources[other, image] = here
    order = torch.from_numpy(sources.T.copy())[:, None].expand(-1, images.shape[1], -1)
    shuffled = gaussian(images, GLASS_SIGMA * unit).flatten(2).gather(2, order)
    return gaussian(shuffled.reshape(images.shape), GLASS_SIGMA * unit)
