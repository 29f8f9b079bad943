"""Convolution of images to columns [K, N], and its weight gradient, with buffers that do not grow with the batch.

Both run over chunks of images, or of rows where one image is large. Intermediate values stay in cache, and neither the
P × N patch matrix nor a second tensor of the size of the activities is ever built. Columns are in the order 'b h w',
channels outermost. No convolution library writes that order, so either the P values of each patch or the K values of
each activity have to be rearranged. The smaller of the two is chosen:

    P ≤ K    patches of a chunk are written out, and one matrix product gives the chunk's columns in place
    P > K    the library convolves the chunk, and scale, offset and rearrangement are one pass over its result

On a GPU the library always convolves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from simmatch.extent import Extent, pair
from simmatch.precision import repeatable_convolutions

CHUNK_VALUES = 1 << 18
"""Values per chunk on a CPU: 1 MiB in float32, so that a chunk stays in cache."""

DEVICE_CHUNK_VALUES = 1 << 24
"""Values per chunk on other devices: enough to occupy the whole device."""


@dataclass(frozen=True)
class Chunk:
    """Some images of a batch, or some rows of one image.

    Attributes
    ----------
    images: [n, C, h, w], padded: exactly the pixels that the chunk's patches cover.
    batch: the images of the batch.
    rows: the rows of the map.
    columns: the columns, n · rows · W' of them.

    >>> Chunk(torch.zeros(2, 1, 8, 8), slice(0, 2), slice(0, 6), slice(0, 72)).images.shape
    torch.Size([2, 1, 8, 8])
    """

    images: Tensor
    batch: slice
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias that writes columns: [B, C, H, W] ↔ [K, N], N = B · H' · W'.

    Parameters
    ----------
    kernel_size, stride, padding: k × k patches, taken every `stride` pixels from images padded with zeros; or (height,
        width) of each.

    >>> convolution = Convolution(kernel_size=3, stride=1, padding=0)
    >>> images, weight = torch.ones(2, 1, 8, 8), torch.ones(5, 1, 3, 3)
    >>> y = convolution.forward(images, weight, scale=None, offset=None)
    >>> y.shape, convolution.weight_gradient(images, y, scale=None).shape
    (torch.Size([5, 72]), torch.Size([5, 10]))
    """

    kernel_size: Extent
    stride: Extent
    padding: Extent

    @property
    def kernel(self) -> tuple[int, int]:
        """(k_h, k_w)."""
        return pair(self.kernel_size)

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels from one patch to the next, (down, across)."""
        return pair(self.stride)

    @property
    def margins(self) -> tuple[int, int]:
        """Pixels of zeros on each side, (above and below, left and right)."""
        return pair(self.padding)

    @property
    def frame(self) -> list[int]:
        """The margins in torch's order: left, right, above, below."""
        vertical, horizontal = self.margins
        return [horizontal, horizontal, vertical, vertical]

    def map_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(H', W'): positions along the axes of images of (H, W) pixels."""
        height, width = (
            (size + 2 * margin - kernel) // stride + 1
            for size, margin, kernel, stride in zip(image_size, self.margins, self.kernel, self.strides, strict=True)
        )
        return height, width

    def forward(self, images: Tensor, weight: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        """conv(x, W) · scale + offset.

        Parameters
        ----------
        images: [B, C, H, W].
        weight: [K, C, k_h, k_w].
        scale: [B, 1, H', W'], a factor of each patch, or None for 1.
        offset: [K], or None for 0.

        Returns
        -------
        [K, N], columns in the order 'b h w'.
        """
        if torch.compiler.is_exporting():  # a graph has no loop over an open batch
            return self._graph(images, weight, scale, offset)
        height, width = self.map_size(images.shape[2:])
        channels = weight.shape[0]
        result = images.new_empty(channels, images.shape[0] * height * width)
        maps = rearrange(result, "k (b h w) -> b k h w", h=height, w=width)
        lowered = self._lowered(weight)
        if lowered is not None:
            constant = weight.new_zeros(channels) if offset is None else offset
            affine = torch.cat([weight.flatten(1), constant.unsqueeze(1)], dim=1)
            for chunk, patches in self._patches(images, scale, lowered):
                torch.mm(affine, patches, out=result[:, chunk.columns])
            return result
        bias = offset if scale is None else None
        for chunk in self._chunks(images, channels):
            with repeatable_convolutions(images.device):
                maps_of_chunk = F.conv2d(chunk.images, weight, bias, self.strides)
            target = maps[chunk.batch, :, chunk.rows]
            if scale is None:
                target.copy_(maps_of_chunk)
            elif offset is None:
                torch.mul(maps_of_chunk, scale[chunk.batch, :, chunk.rows], out=target)
            else:
                torch.addcmul(offset.view(-1, 1, 1), maps_of_chunk, scale[chunk.batch, :, chunk.rows], out=target)
        return result

    def weight_gradient(self, images: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        """Σ over columns of y [x · scale; 1]ᵀ.

        Parameters
        ----------
        images, scale: as in `forward`.
        y: [K, N].

        Returns
        -------
        [K, P + 1]: the gradient of the weight, and Σ y in the last column.
        """
        channels = y.shape[0]
        weight = y.new_empty(channels, images.shape[1], *self.kernel)  # only its shape is used
        total = y.new_zeros(channels, weight[0].numel() + 1)
        lowered = self._lowered(weight)
        if lowered is not None:
            for chunk, patches in self._patches(images, scale, lowered):
                total.addmm_(y[:, chunk.columns], patches.T)
            return total
        height, width = self.map_size(images.shape[2:])
        maps = rearrange(y, "k (b h w) -> b k h w", h=height, w=width)
        for chunk in self._chunks(images, channels):
            own = maps[chunk.batch, :, chunk.rows]
            scaled = own.new_empty(own.shape)
            if scale is None:
                scaled.copy_(own)
            else:
                torch.mul(own, scale[chunk.batch, :, chunk.rows], out=scaled)
            total[:, :-1] += self._library_gradient(scaled, chunk.images, weight).flatten(1)
            total[:, -1] += y[:, chunk.columns].sum(dim=1)
        return total

    def _library_gradient(self, scaled: Tensor, images: Tensor, weight: Tensor) -> Tensor:
        """Gradient [K, C, k_h, k_w] of a convolution without padding, as automatic differentiation computes it."""
        stride, none, once = list(self.strides), [0, 0], [1, 1]
        gradient: Tensor
        with repeatable_convolutions(images.device):
            _, gradient, _ = torch.ops.aten.convolution_backward(
                scaled, images, weight, None, stride, none, once, False, none, 1, [False, True, False]
            )
        return gradient

    def gather(self, images: Tensor, batch: Tensor, position: Tensor) -> Tensor:
        """Patches [n, P] at selected positions.

        Parameters
        ----------
        images: [B, C, H, W].
        batch: [n], the image of each patch.
        position: [n], the position h · W' + w of each patch.
        """
        padded = self._pad(images)
        _, channels, height, width = padded.shape
        columns, (down, across) = self.map_size(images.shape[2:])[1], self.strides
        corner = position // columns * (down * width) + position % columns * across
        corner = corner + batch * (channels * height * width)
        tall, wide = (torch.arange(size, device=images.device) for size in self.kernel)
        channel = torch.arange(channels, device=images.device) * (height * width)
        inside = rearrange(channel, "c -> c 1 1") + rearrange(tall * width, "i -> i 1") + wide
        inside = inside.flatten()
        patches = images.new_empty(len(corner), len(inside))
        rows = max(1, _budget(images) // len(inside))
        for part, target in zip(torch.split(corner, rows), torch.split(patches, rows), strict=True):
            torch.take(padded, part.unsqueeze(1) + inside, out=target)
        return patches

    def at(self, images: Tensor, positions: Tensor) -> Tensor:
        """Patches [B, n, P] of every image at the same positions h · W' + w, [n]; `gather` of few, with fewer calls."""
        columns = self.map_size(images.shape[2:])[1]
        windows = self._windows(self._pad(images))[:, :, positions // columns, positions % columns]
        return rearrange(windows, "b c n i j -> b n (c i j)")

    def _windows(self, padded: Tensor) -> Tensor:
        """All patches of padded images as a view: [B, C, h, w] → [B, C, H', W', k_h, k_w]."""
        (tall, wide), (down, across) = self.kernel, self.strides
        return padded.unfold(2, tall, down).unfold(3, wide, across)

    def _pad(self, images: Tensor) -> Tensor:
        return F.pad(images, self.frame) if any(self.margins) else images

    def _graph(self, images: Tensor, weight: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        """`forward` as a plain graph."""
        result = F.conv2d(images, weight, stride=self.strides, padding=self.margins)
        result = rearrange(result if scale is None else result * scale, "b k h w -> k (b h w)")
        return result if offset is None else result + offset.unsqueeze(1)

    @staticmethod
    def _lowered(weight: Tensor) -> int | None:
        """P + 1 if patches are written out, None if the library convolves."""
        size = weight[0].numel()
        return size + 1 if weight.device.type == "cpu" and size <= weight.shape[0] else None

    def _chunks(self, images: Tensor, values_per_column: int) -> Iterator[Chunk]:
        """The batch in chunks of about `CHUNK_VALUES` values, each at least one row of one image."""
        height, width = self.map_size(images.shape[2:])
        (tall, _), (down, _) = self.kernel, self.strides
        affordable = max(1, _budget(images) // (values_per_column * width))
        rows, step = min(affordable, height), max(1, affordable // height)
        for start in range(0, images.shape[0], step):
            batch = slice(start, min(start + step, images.shape[0]))
            padded = self._pad(images[batch])
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                covered = padded[:, :, top * down : (bottom - 1) * down + tall]
                first = (start * height + top) * width
                columns = slice(first, first + (batch.stop - start) * (bottom - top) * width)
                yield Chunk(covered, batch, slice(top, bottom), columns)

    def _patches(self, images: Tensor, scale: Tensor | None, lowered: int) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks and their scaled patches with a last row of ones, [P + 1, columns]; one buffer serves all chunks."""
        buffer = images.new_empty(0)
        for chunk in self._chunks(images, lowered):
            windows = rearrange(self._windows(chunk.images), "b c h w i j -> c i j b h w")
            count = chunk.columns.stop - chunk.columns.start
            if buffer.numel() < lowered * count:  # the first chunk is the largest
                buffer = images.new_empty(lowered * count)
            patches = buffer[: lowered * count].view(lowered, count)
            target = patches[:-1].view(windows.shape)
            if scale is None:
                target.copy_(windows)
            else:
                torch.mul(windows, rearrange(scale[chunk.batch, :, chunk.rows], "b 1 h w -> b h w"), out=target)
            patches[-1] = 1.0
            yield chunk, patches


def images_per_chunk(images: Tensor) -> int:
    """The number of images [B, C, H, W] per chunk, at least one.

    >>> images_per_chunk(torch.empty(100, 3, 32, 32))
    85
    """
    return max(1, _budget(images) // images.shape[1:].numel())


def _budget(like: Tensor) -> int:
    """Values per chunk."""
    return CHUNK_VALUES if like.device.type == "cpu" else DEVICE_CHUNK_VALUES
