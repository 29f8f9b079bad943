"""A Triton kernel for greedy coordinate descent in float32, one warp per column.

A warp holds one column in registers: v_i = (M_ii + ε) y_i and the gradient g = (M + εI) y − d. The channel of the
largest violation |min(v_i, g_i)| moves to its own minimum, v_i ← max(v_i − g_i, 0), and g follows with one row of M,
divided by its diagonal entry beforehand. One maximum over the warp gives the largest violation and its channel: the
bits of nonnegative floats are ordered as the floats are, and the lowest bits hold the channel.

The moves are those of `simmatch.solvers.coordinate` without the solutions on the face.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmatch.kernels.system import System

PROGRAMS = 132 * 32
"""Programs per launch: 32 blocks on each of 132 multiprocessors. Program p takes columns p, p + PROGRAMS, …"""


@triton.jit
def _key(least, channel, mask: tl.constexpr):
    """The largest |min(v, g)|, as the bits of a float whose lowest bits hold the channel."""
    return tl.max((least.to(tl.int32, bitcast=True) & (0x7FFFFFFF - mask)) | channel, 0)


@triton.jit
def _pick(values, channel, index):
    """values[index], as a sum over bit patterns of which all but one are zero."""
    chosen = tl.where(channel == index, values.to(tl.int32, bitcast=True), 0)
    return tl.sum(chosen, 0).to(tl.float32, bitcast=True)


# no alignment is assumed: 16-byte loads of a row would have to be redistributed over the warp, 4-byte loads need not
@triton.jit(do_not_specialize_on_alignment=["drive", "start", "y", "rows", "inverse"])
def descend(
    drive,
    start,
    y,
    iterations,
    residual,
    rows,
    inverse,
    columns,
    along,
    across,
    tolerance,
    limit,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARM: tl.constexpr,
):
    """Solve one column after the other: drive, start, y [N, K] of strides (along, across).

    rows: [K, BLOCK], row i of M + εI over its diagonal entry; inverse: [BLOCK], 1 / (M_ii + ε); both 0 where
    M_ii + ε = 0. WARM: start from `start`, and solve only columns whose `residual` is above the tolerance.
    """
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    scaling = tl.load(inverse + channel)
    held = scaling > 0
    column = tl.program_id(0)
    while column < columns:
        place = column.to(tl.int64) * along + channel.to(tl.int64) * across
        wanted = True
        if WARM:
            wanted = tl.load(residual + column) > tolerance
        if wanted:
            d = tl.load(drive + place, mask=inside, other=0.0)
            # reduced by the rounding of the moves, and by the bits of the violation that hold the channel
            goal = (tolerance - 1e-6) * (1.0 - BLOCK * 1.2e-7) * tl.max(tl.abs(d), 0)
            g = tl.where(held, -d, 0.0)
            v = tl.zeros([BLOCK], tl.float32)
            if WARM:
                before = tl.load(start + place, mask=inside & held, other=0.0)
                v = tl.where(held, before / scaling, 0.0)
                v = tl.where(v > 0, v, 0.0)
                left = tl.max(tl.where(v > 0, channel + 1, 0), 0)
                while left > 0:
                    index = left - 1
                    g += _pick(v, channel, index) * tl.load(rows + index * BLOCK + channel)
                    left = tl.max(tl.where((v > 0) & (channel < index), channel + 1, 0), 0)
            moves = 0
            least = tl.minimum(v, g)
            top = _key(least, channel, BLOCK - 1)
            while ((top & (0x7FFFFFFF - (BLOCK - 1))).to(tl.float32, bitcast=True) > goal) & (moves < limit):
                index = top & (BLOCK - 1)
                change = _pick(least, channel, index)
                v = tl.where(channel == index, v - change, v)
                g -= change * tl.load(rows + index * BLOCK + channel)
                least = tl.minimum(v, g)
                top = _key(least, channel, BLOCK - 1)
                moves += 1
            tl.store(y + place, v * scaling, mask=inside)
            used = (moves + CHANNELS - 1) // CHANNELS
            if WARM:
                used += tl.load(iterations + column)
            tl.store(iterations + column, used)
        column += tl.num_programs(0)


def solve(
    drive: Tensor,
    system: System,
    tolerance: float,
    limit: int,
    *,
    start: Tensor | None = None,
    iterations: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve every column to a violation of at most tolerance · max|d|: (y [N, K], iterations [N]).

    Parameters
    ----------
    drive: [N, K], of any strides.
    system: M, ε and the bound of λmax.
    tolerance: at least 1e-5, so that rounding does not prevent convergence.
    limit: maximum number of iterations, in units of K moves.
    start: [N, K], y ≥ 0 to start from, overwritten with the result. None: zero.
    iterations, residual: [N], given together with `start`: iterations so far, and residual of every column. Columns
        within the tolerance are not changed.

    >>> drive = torch.ones(1000, 64, device="cuda")
    >>> solve(drive, System(torch.eye(64, device="cuda"), ridge=0.0, bound=1.0), tolerance=1e-3, limit=100)[0].shape
    torch.Size([1000, 64])
    """
    columns, channels = drive.shape
    warm = start is not None
    y = drive.new_empty_strided(drive.shape, drive.stride()) if start is None else start
    assert y.stride() == drive.stride()
    if iterations is None:
        iterations = torch.empty(columns, dtype=torch.int32, device=drive.device)
    warps = max(1, system.block // 1024)  # 32 channels per thread: more would not fit into the registers
    descend[(min(columns, PROGRAMS),)](
        drive, y, y, iterations, residual if warm else iterations, system.rows, system.inverse, columns,
        *drive.stride(), tolerance, limit * channels,
        CHANNELS=channels, BLOCK=system.block, WARM=warm, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, iterations
