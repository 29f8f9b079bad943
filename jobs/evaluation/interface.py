"""What every learner of convolutional features has in common, so that all meet the same readout.

A learner sees images without labels: whole ones in an order of the seed that is the same for all of them, or patches at
random positions of random images. It takes as many as it needs, and turns an image into K maps of
nonnegative activities. The maps are average-pooled to the same size and read by the same readout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Geometry that all learners share.

    Attributes
    ----------
    channels: K, features per position.
    kernel_size, stride, padding: of the patches.
    pool: height and width of the map that readouts see.
    """

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pool: int = 4


@dataclass(frozen=True)
class Cost:
    """What a learner holds and what an image costs; multiply–adds, without pooling and readout.

    Attributes
    ----------
    trained: parameters that learning moved (an autoencoder's decoder included).
    inference: parameters that encoding needs.
    operations: multiply–adds to encode one image.
    """

    trained: int
    inference: int
    operations: int


class Learner(Protocol):
    """A learner of features without labels."""

    name: str

    def fit(self, images: Tensor) -> None:
        """Learn from images [N, C, H, W] in [0, 1]."""

    def maps(self, images: Tensor) -> Tensor:
        """Activities [B, K, H', W'] ≥ 0 of images [B, C, H, W] in [0, 1], float32."""

    def cost(self, image_size: tuple[int, int]) -> Cost:
        """Parameters, and operations for an image of this height and width."""
