"""The residual of given activities, from a product M y − d of its own: what a solver reports is not what it hoped for.

The product is formed in float32; each column's residual is computed from its own values alone, always in the same
order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simmatch.kernels.system import System

COLUMNS, WIDTH, DEPTH = 64, 64, 16
"""A tile of the product, and how much of the sum at a time: as fast as the vendor's library is at the product alone."""


@triton.jit
def certify(
    drive,
    y,
    residual,
    matrix,
    diagonal,
    columns,
    along,
    across,
    tolerance,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """residual[n] = max_i |min(M_ii y_i, (M y − d)_i)| / max|d|, 0/0 = 0; NaN stays NaN.

    AGAIN: only tiles of which some column's residual is above the tolerance.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < columns
    wanted = True
    if AGAIN:
        before = tl.load(residual + column, mask=present, other=0.0)
        wanted = tl.max((before > tolerance).to(tl.int32), 0) > 0
    if wanted:
        place = column.to(tl.int64)[:, None] * along
        worst = tl.zeros([COLUMNS], tl.int32)
        scale = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, BLOCK, WIDTH):
            total = tl.zeros([COLUMNS, WIDTH], tl.float32)
            channel = first + tl.arange(0, WIDTH)
            for second in range(0, BLOCK, DEPTH):
                other = second + tl.arange(0, DEPTH)
                values = tl.load(
                    y + place + other.to(tl.int64)[None, :] * across,
                    mask=present[:, None] & (other < CHANNELS)[None, :],
                    other=0.0,
                )
                rows = tl.load(matrix + other[:, None] * BLOCK + channel[None, :])
                total = tl.dot(values, rows, total, input_precision="ieee")
            inside = present[:, None] & (channel < CHANNELS)[None, :]
            place_here = place + channel.to(tl.int64)[None, :] * across
            d = tl.load(drive + place_here, mask=inside, other=0.0)
            own = tl.load(y + place_here, mask=inside, other=0.0)
            own = own * tl.load(diagonal + channel)[None, :]
            least = tl.minimum(own, total - d, propagate_nan=tl.PropagateNan.ALL)
            # as integers: the order of nonnegative floats, with NaN on top
            worst = tl.maximum(worst, tl.max(tl.abs(least).to(tl.int32, bitcast=True), 1))
            scale = tl.maximum(scale, tl.max(tl.abs(d), 1))
        found = worst.to(tl.float32, bitcast=True)
        found = tl.where((scale == 0) & (found == 0), 0.0, found / scale)
        tl.store(residual + column, found, mask=present)


def residuals(
    drive: Tensor, y: Tensor, system: System, *, residual: Tensor | None = None, tolerance: float = 0.0
) -> Tensor:
    """Residual [N] of y [N, K].

    residual: of a first look; only what lies near columns above `tolerance` is looked at again, in place.
    """
    columns, channels = drive.shape
    assert y.stride() == drive.stride()
    again = residual is not None
    if residual is None:
        residual = drive.new_empty(columns)
    block = system.block
    certify[(triton.cdiv(columns, COLUMNS),)](
        drive, y, residual, system.matrix, system.diagonal, columns, *drive.stride(), tolerance,
        CHANNELS=channels, BLOCK=block, WIDTH=min(block, WIDTH), COLUMNS=COLUMNS, DEPTH=DEPTH, AGAIN=again, num_warps=4,
    )  # fmt: skip
    return residual
