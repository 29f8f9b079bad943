"""LeNet-5, the network that similarity matching is compared with, for images of any size from 8 × 8.

    conv k × k, padding ⌊k/2⌋ → pool 2 → ReLU → conv k × k → pool 2 → ReLU → dense 120 → dense 84 → dense classes

Source: LeCun, Bottou, Bengio, Haffner, Proc. IEEE 86 (1998), fig. 2 (k = 5, 6 and 16 maps), in its usual modern form:
ReLU for tanh, maxima for trainable subsampling, all maps connected, a dense softmax output for radial basis functions.
Pooling comes before ReLU, which gives the same values for a quarter of the work.

With the contrast option the first convolution sees the same input as similarity-matching layers: patches without their
mean, divided by their deviation (`simmatch.geometry`). A comparison of robustness needs it; otherwise learning gets
credit for what normalisation does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.learners import Cost
from simmatch.geometry import PatchConfig, inverse_contrast
from simmatch.seeding import seeded

DENSE = (120, 84)
"""Units of the hidden dense layers."""

LEAST_SIDE = 8
"""Height or width of the smallest image."""

Filters = tuple[Tensor, Tensor]
"""Weight [K, C, k, k] and bias [K] of a convolution."""


@dataclass(frozen=True)
class LeNetSizes:
    """Sizes of the convolutional part.

    Attributes
    ----------
    kernel_size: of both convolutions; 5, or 3 for images below 16 × 16.
    first, second: height and width of the convolutions' maps, before pooling.
    pooled: whether the second map is pooled; it is not where fewer than 4 × 4 values would become fewer than 2 × 2.
    """

    kernel_size: int
    first: tuple[int, int]
    second: tuple[int, int]
    pooled: bool

    @classmethod
    def of(cls, image_size: tuple[int, int]) -> LeNetSizes:
        """Sizes for images of a height and width.

        >>> LeNetSizes.of((28, 28))
        LeNetSizes(kernel_size=5, first=(28, 28), second=(10, 10), pooled=True)
        >>> LeNetSizes.of((8, 8))
        LeNetSizes(kernel_size=3, first=(8, 8), second=(2, 2), pooled=False)

        Raises
        ------
        ValueError
            Images too small for two convolutions.
        """
        height, width = image_size
        if min(image_size) < LEAST_SIDE:
            raise ValueError(f"image size: expected at least {LEAST_SIDE} × {LEAST_SIDE}, got {height} × {width}")
        kernel = 5 if min(image_size) >= 16 else 3
        second = (height // 2 - kernel + 1, width // 2 - kernel + 1)
        return cls(kernel, image_size, second, min(second) >= 4)

    @property
    def last(self) -> tuple[int, int]:
        """Height and width of the last maps."""
        height, width = self.second
        return (height // 2, width // 2) if self.pooled else self.second

    def features(self, channels: tuple[int, int]) -> int:
        """Inputs of the dense layers, for convolutions of so many maps."""
        return channels[1] * math.prod(self.last)


class ContrastConv2d(nn.Conv2d):
    """Convolution of patches of zero mean and unit deviation: W x̃ + b with x̃ = J x / s.

    J = I − 11ᵀ/P removes the mean of a patch x of P = C·k·k values, s = max(std of x, floor). J is folded into the
    filters and s divides afterwards, as in `simmatch.geometry`: conv(x, W J) / s + b.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, padding: C, K, k and the zero padding, which patches include.
    contrast_floor: least deviation a patch is divided by, in units of the input.
    """

    bias: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, contrast_floor: float = 0.1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.patch = PatchConfig(
            in_channels, kernel_size, padding=padding, contrast=True, contrast_floor=contrast_floor
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, K, H', W']."""
        filters = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        products = F.conv2d(x, filters, padding=self.patch.padding)
        return torch.addcmul(self.bias.view(-1, 1, 1), products, inverse_contrast(x, self.patch))


class LeNet(nn.Module):
    """LeNet-5, with any number of maps.

    Parameters
    ----------
    in_channels: C of the images.
    image_size: (H, W).
    num_classes: of the scores.
    channels: maps of the two convolutions.
    contrast: the first convolution sees contrast-normalised patches.
    seed: of the initial weights.

    Raises
    ------
    ValueError
        Images smaller than 8 × 8.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        *,
        channels: tuple[int, int] = (6, 16),
        contrast: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sizes = LeNetSizes.of(image_size)
        kernel, padding = self.sizes.kernel_size, self.sizes.kernel_size // 2
        first = (
            ContrastConv2d(in_channels, channels[0], kernel, padding)
            if contrast
            else nn.Conv2d(in_channels, channels[0], kernel, padding=padding)
        )
        self.convolutions = nn.ModuleList([first, nn.Conv2d(*channels, kernel)])
        widths = (self.sizes.features(channels), *DENSE, num_classes)
        self.dense = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        for index, layer in enumerate([*self.convolutions, *self.dense]):
            _draw(layer, seeded("lenet", seed, index), small=contrast)
        self.to(memory_format=torch.channels_last)  # pooling is vectorised over channels

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] → input of the dense layers, [B, F]."""
        first, second = self.convolutions
        maps = F.relu(F.max_pool2d(first(images), 2))
        maps = second(maps)
        return F.relu(F.max_pool2d(maps, 2) if self.sizes.pooled else maps).flatten(1)

    def classify(self, features: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features [B, F] → scores [B, num_classes]; `drop` is applied to the input of every dense layer."""
        values = features
        for index, layer in enumerate(self.dense):
            values = F.relu(values) if index else values
            values = layer(drop(values) if drop else values)
        return values

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] → scores [B, num_classes]."""
        return self.classify(self.features(images))

    def cost(self, *, frozen: bool = False) -> Cost:
        """Parameters, and multiply–adds for an image; `frozen`: the convolutions' are not trained.

        Neither pooling nor contrast normalisation is counted, as for the other learners.
        """
        first, second = math.prod(self.sizes.first), math.prod(self.sizes.second)
        products = [layer.weight.numel() for layer in (*self.convolutions, *self.dense)]
        operations = products[0] * first + products[1] * second + sum(products[2:])
        trained = sum(values.numel() for values in (self.dense if frozen else self).parameters())
        return Cost(trained, sum(values.numel() for values in self.parameters()), operations)


@torch.no_grad()
def initialise(net: LeNet, filters: Sequence[Filters]) -> None:
    """Put given weights and biases into the convolutions, in order; the others stay as drawn.

    Parameters
    ----------
    filters: (weight [K, C, k, k], bias [K]) of one or both convolutions. A contrast-normalising convolution removes
        the mean of its filters itself.

    Raises
    ------
    ValueError
        Shapes that differ from the network's, or too many of them; nothing is changed then.
    """
    if not 0 < len(filters) <= len(net.convolutions):
        raise ValueError(f"filters: expected those of 1 to {len(net.convolutions)} convolutions, got {len(filters)}")
    pairs = []
    for index, (given, layer) in enumerate(zip(filters, net.convolutions, strict=False)):
        own: Filters = (layer.get_parameter("weight"), layer.get_parameter("bias"))
        for name, values, target in zip(("weight", "bias"), given, own, strict=True):
            if values.shape != target.shape:
                raise ValueError(f"filters.{index}.{name}: expected {list(target.shape)}, got {list(values.shape)}")
            pairs.append((target, values))
    for target, values in pairs:
        target.copy_(values)


def _draw(layer: nn.Module, generator: torch.Generator, *, small: bool) -> None:
    """Initial weights: Gaussian of variance 2 / fan-in (He et al. 2015), or, if `small`, uniform of a sixth of that.

    Images in [0, 1] have a mean square of about 0.2, normalised patches of 1; on held-out images the first did better
    on plain images, the second on normalised ones, each by one to three points at 10 labels per class.
    """
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    bound = 1.0 / math.sqrt(weight[0].numel())
    if small:
        nn.init.uniform_(weight, -bound, bound, generator=generator)
        nn.init.uniform_(bias, -bound, bound, generator=generator)
    else:
        nn.init.normal_(weight, 0.0, math.sqrt(2.0) * bound, generator=generator)
        nn.init.zeros_(bias)
