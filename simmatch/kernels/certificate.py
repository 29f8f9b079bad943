"""A Triton kernel for the residual of given activities, from a separate product M y − d.

The reported residual is thus independent of a solver's running gradient. The product is formed in float32, which puts
the residual off by at most (K + 2) 2⁻²⁴ max_i (Σ_j |M_ij| y_j + |d_i|) / max|d|: near a solution by 2⁻²³ (K + 2). Each
column's residual is computed from that column alone, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simmatch.kernels.system import System

COLUMNS, WIDTH, DEPTH = 64, 64, 16
"""Tile of the product, and length of each partial sum: as fast as the vendor's library computes the product alone."""


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

    AGAIN: recompute only the tiles with a column whose residual is above the tolerance.
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
            # compared as integers, which order nonnegative floats and put NaN above them
            worst = tl.maximum(worst, tl.max(tl.abs(least).to(tl.int32, bitcast=True), 1))
            scale = tl.maximum(scale, tl.max(tl.abs(d), 1))
        result = worst.to(tl.float32, bitcast=True)
        result = tl.where((scale == 0) & (result == 0), 0.0, result / scale)
        tl.store(residual + column, result, mask=present)


def residuals(
    drive: Tensor, y: Tensor, system: System, *, residual: Tensor | None = None, tolerance: float = 0.0
) -> Tensor:
    """Relative residual [N] of activities y [N, K].

    Parameters
    ----------
    drive, y: [N, K], of the same strides.
    system: M, ε and the bound of λmax.
    residual: [N], an earlier result, updated in place; only tiles with a column above `tolerance` are recomputed.
    tolerance: used with `residual`.

    >>> y = drive = torch.ones(1000, 64, device="cuda")
    >>> residuals(drive, y, System(torch.eye(64, device="cuda"), ridge=0.0, bound=1.0)).shape
    torch.Size([1000])
    """
    columns, channels = drive.shape
    assert y.stride() == drive.stride()
    again = residual is not None
    if residual is None:
        residual = drive.new_empty(columns)
    block = system.block
    certify[(triton.cdiv(columns, COLUMNS),)](
        drive, y, residual, system.matrix, system.diagonal, columns, *drive.stride(), tolerance,
        CHANNELS=channels, BLOCK=block, WIDTH=min(block, WIDTH), COLUMNS=COLUMNS, DEPTH=DEPTH, AGAIN=again,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return residual
