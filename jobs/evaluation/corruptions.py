"""The fifteen corruptions of MNIST-C, for images of any size and number of channels.

Mu and Gilmer, MNIST-C: a robustness benchmark for computer vision (arXiv:1906.02337). Written from their descriptions,
at their severities; lengths follow the size of the image. To add one, write a function `(images, draws) -> images`
and one entry of `CORRUPTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from jobs.evaluation import corruptions_geometry as geometry
from jobs.evaluation import corruptions_texture as texture
from jobs.evaluation.corruptions_draws import ImageDraws
from jobs.reporting import save_figure

Corruption = Callable[[Tensor, ImageDraws], Tensor]
"""Images [N, C, H, W] in [0, 1], float64, and their random numbers → images of that shape, to be clamped."""

CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "shot_noise": texture.shot_noise,
        "impulse_noise": texture.impulse_noise,
        "glass_blur": geometry.glass_blur,
        "motion_blur": geometry.motion_blur,
        "shear": geometry.shear,
        "scale": geometry.scale,
        "rotate": geometry.rotate,
        "brightness": texture.brightness,
        "translate": geometry.translate,
        "stripe": texture.stripe,
        "fog": texture.fog,
        "spatter": texture.spatter,
        "dotted_line": texture.dotted_line,
        "zigzag": texture.zigzag,
        "canny_edges": texture.canny_edges,
    }
)
"""Name → corruption, in the paper's order."""

CHUNK = 500
"""Images that are corrupted at a time; the result does not depend on it."""


def corrupt(images: Tensor, name: str, seed: int, *, first: int = 0) -> Tensor:
    """Corrupted images, of the same shape and dtype, in [0, 1].

    What becomes of an image depends on it, `name`, `seed` and its index `first + i` alone, not on the images beside it.

    Parameters
    ----------
    images: [N, C, H, W] in [0, 1], floating point.
    name: a key of `CORRUPTIONS`.
    seed: of the random numbers, for corruptions that use any.
    first: index of the first image in its data set.

    Raises
    ------
    ValueError
        An unknown name; images that are no floats [N, C, H, W] in [0, 1].
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got '{name}'")
    _check(images)
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK].to("cpu", torch.float64)
        draws = ImageDraws(f"corruption {name}", seed, range(first + start, first + start + len(part)))
        corrupted[start : start + CHUNK] = CORRUPTIONS[name](part, draws).clamp(0, 1).to(images.dtype)
    return corrupted


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floats [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
    outside = images[~((images >= 0) & (images <= 1))]
    if len(outside):
        raise ValueError(f"images: expected values in [0, 1], got {float(outside[0]):g}")


def draw_corruptions(images: Tensor, path: Path, *, seed: int = 0) -> None:
    """A picture of images [N, C, H, W] in [0, 1], one a row, as they are and under every corruption.

    Images of one or three channels are shown as they are, of others the mean channel.
    """
    columns = {"clean": images} | {name: corrupt(images, name, seed) for name in CORRUPTIONS}
    shown = images.shape[1] if images.shape[1] in (1, 3) else 0
    framed = [
        F.pad(column if shown else column.mean(dim=1, keepdim=True), (1, 1, 1, 1), value=0.5)
        for column in columns.values()
    ]
    height, width = framed[0].shape[2:]
    mosaic = torch.cat([torch.cat(list(column), dim=1) for column in framed], dim=2).float().cpu()
    figure = Figure(figsize=(0.75 * len(columns), 0.75 * len(images) * height / width + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([width * (i + 0.5) - 0.5 for i in range(len(columns))], list(columns), rotation=40, ha="left")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.set_yticks([])
    save_figure(figure, path)
