"""Patches of images: their normalisation and whitening, drives and statistics, without building the patch matrix.

A patch x holds the P = C·k·k values at one position. The neurons receive x̃ = Π (J x / s − μ):

    J = I − 11ᵀ/P   mean removal, s = max(std of the patch, floor)      (`normalize: contrast`, else J = I, s = 1)
    Π, μ            ZCA whitening and mean of the normalised patches    (`whiten: true`, else Π = I, μ = 0)

Both directions fold into one convolution each:

    drive       W x̃ = conv(x, W Π J) / s − W Π μ
    statistics  ⟨y x̃ᵀ⟩ = [weight gradient of the convolution at y / s] J Πᵀ − ⟨y⟩ (Π μ)ᵀ

Folding J into the filter, instead of subtracting a mean afterwards, avoids cancellation. `simmatch.convolution`
computes both. `prepare` stores the patches themselves in two cases: where the kernel covers the whole map, so that
each image is one patch, and where only some positions of each image are selected. The mean over randomly drawn
positions is an unbiased estimate of the mean over all.

A patch is k_h × k_w pixels. A signal is a map of height 1, and so are its patches. Only this module, `convolution` and
`simmatch.model` assume two spatial axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from simmatch.config import LayerConfig
from simmatch.convolution import Convolution, images_per_chunk
from simmatch.extent import Extent, pair, shown
from simmatch.seeding import folded
from simmatch.sharding.blocks import by_blocks
from simmatch.sharding.columns import Part
from simmatch.whitening import Whitening


@dataclass(frozen=True)
class PatchConfig:
    """Shape and normalisation of the patches of one layer.

    Parameters
    ----------
    in_channels: C, channels of the images.
    kernel_size, stride, padding: k × k patches, taken every `stride` pixels from images padded with zeros; or (height,
        width) of each.
    contrast: whether each patch is shifted to zero mean and divided by its standard deviation.
    contrast_floor: smallest standard deviation to divide by, in units of the input.

    >>> patch = PatchConfig(in_channels=3, kernel_size=5, padding=2)
    >>> patch.patch_size, patch.map_size((32, 32))
    (75, (32, 32))
    >>> signal = PatchConfig(in_channels=2, kernel_size=(1, 32), stride=(1, 8))
    >>> signal.patch_size, signal.map_size((1, 256))
    (64, (1, 29))
    """

    in_channels: int
    kernel_size: Extent
    stride: Extent = 1
    padding: Extent = 0
    contrast: bool = False
    contrast_floor: float = 0.1

    @classmethod
    def of_layer(cls, layer: LayerConfig, in_channels: int, image_size: tuple[int, int]) -> PatchConfig:
        """The patches of a configured layer, for inputs [in_channels, height, width].

        Raises
        ------
        ValueError
            The kernel is larger than the padded input.

        >>> dense = LayerConfig(out_channels=8, kernel_size="full")
        >>> [PatchConfig.of_layer(dense, 16, size).kernel_size for size in ((7, 7), (1, 29))]
        [7, (1, 29)]
        """
        height, width = image_size
        whole = height if height == width else (height, width)
        kernel = whole if layer.kernel_size == "full" else layer.kernel_size
        contrast = layer.normalize == "contrast"
        patch = cls(in_channels, kernel, layer.stride, layer.padding, contrast, layer.contrast_floor)
        patch.map_size(image_size)
        return patch

    @property
    def patch_size(self) -> int:
        """P = C · k_h · k_w."""
        return self.in_channels * math.prod(self.kernel)

    @property
    def kernel(self) -> tuple[int, int]:
        """(k_h, k_w)."""
        return pair(self.kernel_size)

    @property
    def convolution(self) -> Convolution:
        return Convolution(self.kernel_size, self.stride, self.padding)

    def map_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the activities. Raises ValueError if the kernel is larger than the padded image."""
        convolution, square = self.convolution, isinstance(self.kernel_size, int)
        (height, width), (above, beside) = image_size, convolution.margins
        padded = height + 2 * above, width + 2 * beside
        if padded[0] < self.kernel[0] or padded[1] < self.kernel[1]:
            hint = f"; [1, {self.kernel[1]}] for signals" if height == 1 and square else ""
            raise ValueError(
                f"kernel_size: expected at most {shown(min(padded) if square else padded)} for images of "
                f"{height} × {width} with padding {shown(self.padding)}, got {shown(self.kernel_size)}{hint}"
            )
        return convolution.map_size(image_size)


@dataclass(frozen=True)
class Patches:
    """Input of a layer, prepared for drives and statistics: images with their contrast, or explicit patches.

    Attributes
    ----------
    config, whitening: those of the layer.
    images: [B, C, H, W], or None where `matrix` is used.
    inverse_scale: [B, 1, H', W'], 1/s of each patch, or None for 1.
    matrix: [N, P], explicit patches, where the kernel covers the map (N = B) or only some positions of each image are
        selected (N = B · positions, image by image).
    map_size: (H', W') of the activities; (1, positions) where only some positions are selected.
    whitened: whether `matrix` holds x̃. If not, drives and statistics apply the whitening.
    part: which part of a batch these images are; None: they are a batch.

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> patches.batch_size, patches.map_size, patches.positions
    (2, (6, 6), 36)
    """

    config: PatchConfig
    whitening: Whitening | None
    map_size: tuple[int, int]
    images: Tensor | None = None
    inverse_scale: Tensor | None = None
    matrix: Tensor | None = None
    whitened: bool = True
    part: Part | None = None

    @property
    def positions(self) -> int:
        """Columns per image."""
        return self.map_size[0] * self.map_size[1]

    @property
    def batch_size(self) -> int:
        if self.matrix is not None:
            return self.matrix.shape[0] // self.positions
        assert self.images is not None
        return self.images.shape[0]

    def of_images(self, chosen: slice) -> Patches:
        """The patches of some of the images."""
        if self.matrix is not None:
            by_image = rearrange(self.matrix, "(b l) p -> b l p", l=self.positions)
            return replace(self, matrix=by_image[chosen].flatten(0, 1))
        assert self.images is not None
        scale = None if self.inverse_scale is None else self.inverse_scale[chosen]
        return replace(self, images=self.images[chosen], inverse_scale=scale)


def prepare(
    images: Tensor,
    config: PatchConfig,
    whitening: Whitening | None = None,
    positions: Tensor | None = None,
    *,
    block: int | None = None,
) -> Patches:
    """Prepare images as `Patches`.

    Parameters
    ----------
    images: [B, C, H, W].
    config: shape and normalisation of the patches.
    whitening: Π and μ, or None for no whitening.
    positions: [B, n], integers h · W' + w: the positions of each image to use. None: all.
    block: number of images that are prepared by themselves, so that no bit depends on the other images. None: all.

    >>> images, config = torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)
    >>> prepare(images, config, positions=torch.tensor([[0, 7], [3, 35]])).matrix.shape
    torch.Size([4, 9])
    """
    map_size = config.map_size((images.shape[2], images.shape[3]))
    if positions is not None:
        positions = positions.to(images.device)
        batch = torch.arange(len(images), device=images.device).repeat_interleave(positions.shape[1])
        map_size = (1, positions.shape[1])
        rows = None if block is None else block * map_size[1]
        gathered = config.convolution.gather(images, batch, positions.flatten())
        matrix = by_blocks(lambda part: transform(part, config), gathered, rows)
        return Patches(config, whitening, map_size, matrix=matrix, whitened=whitening is None)
    if map_size == (1, 1) and not any(config.convolution.margins) and images.shape[2:] == config.kernel:
        matrix = by_blocks(lambda part: transform(part, config, whitening), images.flatten(1), block)
        return Patches(config, whitening, map_size, matrix=matrix)
    scale = by_blocks(lambda part: inverse_contrast(part, config), images, block) if config.contrast else None
    return Patches(config, whitening, map_size, images=images, inverse_scale=scale)


def draw_positions(
    count: int, images: int | range, map_size: tuple[int, int], key: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw `count` distinct positions of each image, uniformly: int64 [B, count], ascending in each row.

    A function of its arguments alone, with the same bits on every device; see `simmatch.seeding`. The positions of an
    image do not depend on the other images.

    Parameters
    ----------
    count: positions per image.
    images: B, for images 0 … B − 1, or their numbers.
    map_size: (H', W') of the activities.
    key: from `stream` or `folded`; another key gives an independent draw. A tensor is 0-d.
    device: of the result.

    Raises
    ------
    ValueError
        The map has fewer than `count` positions.

    >>> draw_positions(4, 100, (24, 24), key=0).shape
    torch.Size([100, 4])
    """
    available = map_size[0] * map_size[1]
    if count > available:
        raise ValueError(
            f"positions: expected at most {available}, the map of {map_size[0]} × {map_size[1]} activities, got {count}"
        )
    numbers = range(images) if isinstance(images, int) else images
    positions = torch.arange(available, device=device)
    counters = (torch.arange(numbers.start, numbers.stop, device=device) << 32).unsqueeze(1) + positions
    # the largest of random keys; each holds its position in its low bits, so no two are equal
    low = (1 << (available - 1).bit_length()) - 1
    keys = folded(key, counters).bitwise_and_(~low).bitwise_or_(positions)
    return keys.topk(count, dim=1, sorted=False).values.bitwise_and_(low).sort(dim=1).values


def inverse_contrast(images: Tensor, config: PatchConfig) -> Tensor:
    """1 / max(std, floor) of every patch, zero padding included: [B, C, H, W] → [B, 1, H', W'].

    >>> inverse_contrast(torch.rand(2, 3, 8, 8), PatchConfig(in_channels=3, kernel_size=3, contrast=True)).shape
    torch.Size([2, 1, 6, 6])
    """
    convolution = config.convolution

    def box_mean(values: Tensor) -> Tensor:  # batch innermost in memory: pooling is vectorised over it
        padded = F.pad(rearrange(values, "b 1 h w -> 1 b h w"), convolution.frame)
        padded = padded.contiguous(memory_format=torch.channels_last)
        means = F.avg_pool2d(padded, convolution.kernel, convolution.strides)
        return rearrange(means, "1 b h w -> b 1 h w")

    if images.shape[0] == 0:  # a rank may have no images of a small batch
        return images.new_empty(0, 1, *config.map_size((images.shape[2], images.shape[3])))
    # channels are averaged first, chunk by chunk, so that no copy of all images is made
    chunks = [images] if torch.compiler.is_exporting() else torch.split(images, images_per_chunk(images))
    squares = torch.cat([chunk.square().mean(dim=1, keepdim=True) for chunk in chunks])
    variance = box_mean(squares) - box_mean(images.mean(dim=1, keepdim=True)).square()
    return variance.clamp(min=config.contrast_floor**2).rsqrt().contiguous()


def transform(patches: Tensor, config: PatchConfig, whitening: Whitening | None = None) -> Tensor:
    """x → x̃ for explicit patches [N, P]: the definition of what the convolutions compute.

    >>> config = PatchConfig(in_channels=1, kernel_size=2, contrast=True)
    >>> transform(torch.tensor([[1.0, 3.0, 1.0, 3.0]]), config)
    tensor([[-1.,  1., -1.,  1.]])
    """
    if config.contrast:
        patches = patches - patches.mean(dim=1, keepdim=True)
        deviation = torch.linalg.vector_norm(patches, dim=1, keepdim=True) / config.patch_size**0.5
        patches = patches.div_(deviation.clamp(min=config.contrast_floor))
    if whitening is not None:
        patches = (patches - whitening.mean) @ whitening.matrix.T
    return patches


def explicit(patches: Patches, *, images: int | None = None) -> Tensor:
    """x̃ of the first `images` images (None: all) as a matrix [N', P]: to measure on a few images, not to learn from.

    >>> explicit(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)), images=1).shape
    torch.Size([36, 9])
    """
    config, whitening = patches.config, patches.whitening
    chosen = patches.of_images(slice(images))
    if chosen.matrix is not None:
        matrix = chosen.matrix
    else:
        assert chosen.images is not None
        matrix = sample_patches(chosen.images, config, chosen.batch_size * chosen.positions, torch.Generator())
    already = patches.matrix is not None and patches.whitened
    return matrix if whitening is None or already else (matrix - whitening.mean) @ whitening.matrix.T


@dataclass(frozen=True)
class Filters:
    """Rows of W with mean removal and whitening folded in, for patches as they are stored.

    Attributes
    ----------
    weight: [K_g, C, k_h, k_w], W Π J, or W where the patches are whitened already.
    offset: [K_g], −W Π μ, or None for 0.

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> Filters.of(torch.ones(5, 1, 3, 3), patches).weight.shape
    torch.Size([5, 1, 3, 3])
    """

    weight: Tensor
    offset: Tensor | None

    @classmethod
    def of(cls, feedforward: Tensor, patches: Patches) -> Filters:
        """The filters for patches like these."""
        if patches.matrix is not None and patches.whitened:
            return cls(feedforward, None)
        weight, offset, whitening = feedforward.flatten(1), None, patches.whitening
        if whitening is not None:
            offset = -(weight @ whitening.offset)
            weight = weight @ whitening.matrix
        if patches.matrix is None and patches.config.contrast:
            weight = weight - weight.mean(dim=1, keepdim=True)
        return cls(weight.reshape(feedforward.shape), offset)


def drive(patches: Patches, feedforward: Tensor, filters: Filters | None = None) -> Tensor:
    """W x̃ of every patch.

    Parameters
    ----------
    patches: N columns, from `prepare`.
    feedforward: [K_g, C, k_h, k_w], the rows of W held here.
    filters: of these rows, if they are needed more than once.

    Returns
    -------
    [K_g, N], columns in the order 'b h w'.

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> drive(patches, torch.ones(5, 1, 3, 3)).shape
    torch.Size([5, 72])
    """
    filters = filters or Filters.of(feedforward, patches)
    if patches.matrix is not None:
        result = filters.weight.flatten(1) @ patches.matrix.T
        return result if filters.offset is None else result.add_(filters.offset.unsqueeze(1))
    assert patches.images is not None
    convolution = patches.config.convolution
    return convolution.forward(patches.images, filters.weight, patches.inverse_scale, filters.offset)


def correlate(patches: Patches, y: Tensor) -> Tensor:
    """Σ over columns of y x̃ᵀ: y [K_g, N] → [K_g, C, k_h, k_w].

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> correlate(patches, torch.ones(5, 72)).shape
    torch.Size([5, 1, 3, 3])
    """
    return normalised(*raw_correlation(patches, y), patches)


def raw_correlation(patches: Patches, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Σ y xᵀ for patches as they are stored, before mean removal and whitening: [K_g, P]; and Σ y, [K_g, 1].

    Σ y is None where `normalised` does not need it.

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> [part.shape for part in raw_correlation(patches, torch.ones(5, 72))]
    [torch.Size([5, 9]), torch.Size([5, 1])]
    """
    if patches.matrix is not None:
        return y @ patches.matrix, None if patches.whitened else y.sum(dim=1, keepdim=True)
    assert patches.images is not None
    gradient = patches.config.convolution.weight_gradient(patches.images, y, patches.inverse_scale)
    return gradient[:, :-1], gradient[:, -1:]


def normalised(product: Tensor, total: Tensor | None, patches: Patches) -> Tensor:
    """Σ y x̃ᵀ [K_g, C, k_h, k_w] from the sums of `raw_correlation`, over these or other patches of the layer.

    >>> patches = prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3))
    >>> normalised(torch.ones(5, 9), torch.ones(5, 1), patches).shape
    torch.Size([5, 1, 3, 3])
    """
    config, whitening = patches.config, patches.whitening
    if patches.matrix is None and config.contrast:
        product = product - product.mean(dim=1, keepdim=True)
    if whitening is not None and not (patches.matrix is not None and patches.whitened):
        assert total is not None
        product = product @ whitening.matrix.T - total * whitening.offset
    return product.reshape(-1, config.in_channels, *config.kernel)


def sample_patches(images: Tensor, config: PatchConfig, count: int, generator: torch.Generator) -> Tensor:
    """Normalised patches at random positions of random images: [B, C, H, W] → [count, P].

    If there are at most `count` patches, all of them, in order.

    >>> config, generator = PatchConfig(in_channels=3, kernel_size=5), torch.Generator().manual_seed(0)
    >>> sample_patches(torch.rand(4, 3, 32, 32), config, 100, generator).shape
    torch.Size([100, 75])
    """
    height, width = config.map_size((images.shape[2], images.shape[3]))
    index = drawn_patches(images.shape[0] * height * width, count, generator)
    return normalised_patches(images, config, index.to(images.device))


def drawn_patches(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` of `total` patches, drawn with replacement, on the CPU; if there are no more, all, in order.

    >>> drawn_patches(3, 5, torch.Generator()), drawn_patches(100, 5, torch.Generator()).shape
    (tensor([0, 1, 2]), torch.Size([5]))
    """
    if total <= count:
        return torch.arange(total, device="cpu")
    return torch.randint(total, (count,), generator=generator, device="cpu")


def normalised_patches(images: Tensor, config: PatchConfig, index: Tensor) -> Tensor:
    """Normalised patches [n, P] of images [B, C, H, W] by their index [n], counted in the order 'b h w'.

    >>> config = PatchConfig(in_channels=1, kernel_size=2)
    >>> normalised_patches(torch.arange(9.0).reshape(1, 1, 3, 3), config, torch.tensor([3]))
    tensor([[4., 5., 7., 8.]])
    """
    height, width = config.map_size((images.shape[2], images.shape[3]))
    batch, position = index // (height * width), index % (height * width)
    return transform(config.convolution.gather(images, batch, position), config)
