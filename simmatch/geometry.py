"""From images to drives and back to statistics, without building the P × L patch matrix.

A patch x (P = C·k·k values at one position) is seen by the neurons as x̃ = Π (J x / s − μ):

    J = I − 11ᵀ/P   mean removal, s = max(std of the patch, floor)      (`normalize: contrast`, else J = I, s = 1)
    Π, μ            ZCA whitening and mean of the normalised patches    (`whiten: true`, else Π = I, μ = 0)

Both directions fold into one convolution each:

    drive       W x̃ = conv(x, W Π J) / s − W Π μ
    statistics  ⟨y x̃ᵀ⟩ = [weight gradient of the convolution at y / s] J Πᵀ − ⟨y⟩ (Π μ)ᵀ

Folding J into the filter, instead of subtracting a mean afterwards, avoids cancellation. Where the kernel covers
the whole map there is one patch per image, as large as the image itself: `prepare` then stores x̃ directly.

Written for two spatial axes; nothing outside this module and `simmatch.model` knows how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv2d_weight


@dataclass(frozen=True)
class PatchConfig:
    """Shape and normalisation of the patches of one layer; see `simmatch.config.LayerConfig`."""

    in_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    contrast: bool = False
    contrast_floor: float = 0.1

    @property
    def patch_size(self) -> int:
        """P = C · k · k."""
        return self.in_channels * self.kernel_size**2

    def map_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the activities. Raises ValueError when the kernel exceeds the padded image."""
        padded = [size + 2 * self.padding for size in image_size]
        if min(padded) < self.kernel_size:
            raise ValueError(
                f"kernel_size: expected at most {min(padded)} for images of {image_size[0]} × {image_size[1]} "
                f"with padding {self.padding}, got {self.kernel_size}"
            )
        height, width = ((size - self.kernel_size) // self.stride + 1 for size in padded)
        return height, width


@dataclass(frozen=True)
class Patches:
    """Input of a layer, ready for drives and statistics: images with their contrast, or whole patches.

    Attributes
    ----------
    images: [B, C, H, W], or None where `matrix` is used.
    inverse_scale: [B, 1, H', W'], 1/s of each patch, or None for 1.
    matrix: [N, P], the patches x̃ themselves, where the kernel covers the map (N = B).
    map_size: (H', W') of the activities.
    """

    images: Tensor | None
    inverse_scale: Tensor | None
    matrix: Tensor | None
    map_size: tuple[int, int]

    @property
    def batch_size(self) -> int:
        source = self.images if self.matrix is None else self.matrix
        assert source is not None
        return source.shape[0]


@dataclass(frozen=True)
class Whitening:
    """Π [P, P], symmetric, and μ [P] of x̃ = Π (x_normalised − μ)."""

    matrix: Tensor
    mean: Tensor

    @property
    def offset(self) -> Tensor:
        """Π μ, [P]."""
        return self.matrix @ self.mean


def prepare(images: Tensor, config: PatchConfig, whitening: Whitening | None = None) -> Patches:
    """Images [B, C, H, W] → `Patches`."""
    map_size = config.map_size((images.shape[2], images.shape[3]))
    if map_size == (1, 1) and config.padding == 0 and images.shape[2:] == (config.kernel_size,) * 2:
        return Patches(None, None, transform(rearrange(images, "b c h w -> b (c h w)"), config, whitening), map_size)
    return Patches(images, inverse_contrast(images, config) if config.contrast else None, None, map_size)


def inverse_contrast(images: Tensor, config: PatchConfig) -> Tensor:
    """1 / max(std, floor) of every patch, zero padding included: [B, C, H, W] → [B, 1, H', W']."""

    def box(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, config.kernel_size, config.stride).mean(dim=1, keepdim=True)

    images = F.pad(images, (config.padding,) * 4)
    variance = box(images.square()) - box(images).square()
    return variance.clamp(min=config.contrast_floor**2).rsqrt()


def transform(patches: Tensor, config: PatchConfig, whitening: Whitening | None = None) -> Tensor:
    """x → x̃ on explicit patches [N, P]: the definition that the convolutions fold."""
    if config.contrast:
        patches = patches - patches.mean(dim=1, keepdim=True)
        deviation = patches.square().mean(dim=1, keepdim=True).sqrt()
        patches = patches / deviation.clamp(min=config.contrast_floor)
    if whitening is not None:
        patches = (patches - whitening.mean) @ whitening.matrix.T
    return patches


def explicit(
    patches: Patches, config: PatchConfig, whitening: Whitening | None = None, *, images: int | None = None
) -> Tensor:
    """x̃ of the first `images` images (None: all) as a matrix [N', P]; for looks at a few images, not for learning."""
    if patches.matrix is not None:
        return patches.matrix[:images]
    assert patches.images is not None
    chosen = patches.images[:images]
    total = chosen.shape[0] * patches.map_size[0] * patches.map_size[1]
    found = sample_patches(chosen, config, total, torch.Generator())
    return found if whitening is None else (found - whitening.mean) @ whitening.matrix.T


def drive(patches: Patches, feedforward: Tensor, config: PatchConfig, whitening: Whitening | None = None) -> Tensor:
    """W x̃ for every patch.

    Parameters
    ----------
    feedforward: [K_g, C, k, k].

    Returns
    -------
    [K_g, N], columns in the order of 'b h w'.
    """
    weight = rearrange(feedforward, "k c h w -> k (c h w)")
    if patches.matrix is not None:
        return weight @ patches.matrix.T
    assert patches.images is not None
    offset = None
    if whitening is not None:
        offset = weight @ whitening.offset
        weight = weight @ whitening.matrix
    if config.contrast:
        weight = weight - weight.mean(dim=1, keepdim=True)
    weight = weight.reshape(feedforward.shape)
    result = F.conv2d(patches.images, weight, stride=config.stride, padding=config.padding)
    if patches.inverse_scale is not None:
        result = result * patches.inverse_scale
    result = rearrange(result, "b k h w -> k (b h w)")
    return result if offset is None else result - offset.unsqueeze(1)


def correlate(patches: Patches, y: Tensor, config: PatchConfig, whitening: Whitening | None = None) -> Tensor:
    """Σ over columns of y x̃ᵀ: y [K_g, N] → [K_g, C, k, k]."""
    shape = (y.shape[0], config.in_channels, config.kernel_size, config.kernel_size)
    if patches.matrix is not None:
        return (y @ patches.matrix).reshape(shape)
    assert patches.images is not None
    height, width = patches.map_size
    maps = rearrange(y, "k (b h w) -> b k h w", h=height, w=width)
    if patches.inverse_scale is not None:
        maps = maps * patches.inverse_scale
    product: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        patches.images, shape, maps.contiguous(), stride=config.stride, padding=config.padding
    ).flatten(1)
    if config.contrast:
        product = product - product.mean(dim=1, keepdim=True)
    if whitening is not None:
        product = product @ whitening.matrix.T - y.sum(dim=1, keepdim=True) * whitening.offset
    return product.reshape(shape)


def sample_patches(images: Tensor, config: PatchConfig, count: int, generator: torch.Generator) -> Tensor:
    """Normalised patches at random positions of random images: [B, C, H, W] → [count, P].

    All patches, in order, where there are no more than `count` of them.
    """
    height, width = config.map_size((images.shape[2], images.shape[3]))
    total = images.shape[0] * height * width
    index = torch.arange(total) if total <= count else torch.randint(total, (count,), generator=generator)
    index = index.to(images.device)
    batch, position = index // (height * width), index % (height * width)
    padded = F.pad(images, (config.padding,) * 4)
    kernel = torch.arange(config.kernel_size, device=images.device)
    rows = rearrange(position // width * config.stride, "n -> n 1 1 1") + rearrange(kernel, "k -> 1 1 k 1")
    cols = rearrange(position % width * config.stride, "n -> n 1 1 1") + rearrange(kernel, "k -> 1 1 1 k")
    channel = rearrange(torch.arange(config.in_channels, device=images.device), "c -> 1 c 1 1")
    picked = padded[rearrange(batch, "n -> n 1 1 1"), channel, rows, cols]
    return transform(rearrange(picked, "n c h w -> n (c h w)"), config)


COVARIANCE_ROWS = 2048
"""Patches multiplied at a time, so that a float32 covariance does not lose digits to its length."""


def zca(patches: Tensor, ridge: float) -> Whitening:
    """ZCA whitening of normalised patches [N, P], decomposed in float64 and returned in their dtype.

    Π = (C_x + ridge · mean eigenvalue · I)^(-1/2) with C_x the covariance: the identity of the canonical
    correlation objective XᵀC_x⁻¹X, regularised.
    """
    mean = patches.mean(dim=0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for start in range(0, len(patches), COVARIANCE_ROWS):  # products in the patches' dtype, sums of them in float64
        part = patches[start : start + COVARIANCE_ROWS]
        centred = part - mean.to(part.dtype)
        covariance += centred.T @ centred
    covariance /= patches.shape[0]
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # patches that hardly vary are left alone rather than blown up to what their dtype cannot hold
    least = torch.finfo(patches.dtype).eps
    spectrum = (eigenvalues.clamp(min=0.0) + ridge * eigenvalues.mean()).clamp(min=least)
    matrix = (vectors * spectrum.rsqrt()) @ vectors.T
    return Whitening(matrix.to(patches.dtype), mean.to(patches.dtype))
