"""As little of a batch as contains a range of its columns: what a rank has to correlate to solve its part."""

from __future__ import annotations

from dataclasses import replace

from simmatch.batch import Batch
from simmatch.geometry import Patches


def covering(columns: range, batch: Batch) -> tuple[Batch, slice]:
    """The smallest part of a batch that contains a range of columns: some images, or some rows of one image's map.

    Returns
    -------
    The part, no images if the range is empty, and the range within the columns of the part. The drive of other columns
    may be wrong.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> part, inside = covering(range(0, 10), batch)
    >>> part.columns, inside
    (12, slice(0, 10, None))
    """
    positions = batch.patches.positions
    if len(columns) == 0:
        return batch.of_images(slice(0)), slice(0, 0)
    first = columns.start // positions
    part = batch.of_images(slice(first, -(-columns.stop // positions)))
    start = columns.start - first * positions
    if part.patches.batch_size == 1:
        cropped, before = crop(part.patches, start, start + len(columns))
        part, start = replace(part, patches=cropped), start - before
    return part, slice(start, start + len(columns))


def crop(patches: Patches, start: int, stop: int) -> tuple[Patches, int]:
    """The rows of a single image's map that contain columns `start` … `stop` − 1.

    Returns
    -------
    The patches of these rows, and the number of columns before them. The outermost rows may be wrong, because zero
    padding replaces the neighbouring rows of the image; rows of the requested columns are always correct.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> part, before = crop(prepare(torch.ones(1, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)), 13, 18)
    >>> part.map_size, before
    ((1, 6), 12)
    """
    config = patches.config
    if patches.matrix is not None:
        return replace(patches, matrix=patches.matrix[start:stop], map_size=(1, stop - start)), start
    convolution = config.convolution
    (tall, _), (down, _), (margin, _) = convolution.kernel, convolution.strides, convolution.margins
    if patches.images is None or margin >= tall:
        return patches, 0
    height, width = patches.map_size
    outermost = -(-margin // down)
    top, bottom = max(0, start // width - outermost), min(height, -(-stop // width) + outermost)
    end = patches.images.shape[2]
    if bottom < height:
        end = (bottom - 1) * down + tall - 2 * margin
    scale = patches.inverse_scale
    part = replace(
        patches,
        images=patches.images[:, :, top * down : end],
        inverse_scale=None if scale is None else scale[:, :, top:bottom],
        map_size=(bottom - top, width),
    )
    return part, top * width
