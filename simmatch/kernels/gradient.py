"""Triton kernels for accelerated projected gradient, up to 256 channels: a tile stays on chip for all iterations.

A program solves `COLUMNS` columns. y, the previous gradient step and g = (M + εI) y − d stay in registers, M stays in
shared memory, and one iteration is

    w = y − s g;   t = relu(w + β (w − w_prev));   Δ = t − y, rounded;   y ← y + Δ;   g ← g + M Δ

The tensor cores multiply *increments*, whose rounding error shrinks with them, and y is exactly the sum of the
increments that went into g. Powers of two scale the diagonal of M and the drive of every column to near 1. M and Δ are
then sums of two float16 values each, which takes three products and reproduces the iterates of float32. (One float16
value each is twice as fast and reaches residuals of 2e-4, but its iterates are wrong by 5e-4, and coordinate descent
is faster still.) Δ is rounded towards zero, so that y ≥ 0 holds exactly. Momentum, restarts and the order of decisions
are those of `simmatch.solvers.tile`. A column that has reached its tolerance gets Δ = 0 from then on: columns do not
depend on each other, not even in the last bit.

The result is one more step t in float32, so that a silent channel is exactly zero.

`accelerate` is for up to 128 channels. For more, `simmatch.kernels.gradient_wide` computes the same with M in blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmatch.kernels.gradient_wide import WIDE_COLUMNS, WIDE_WARPS, accelerate_wide
from simmatch.kernels.increments import advance, power_below, shortened
from simmatch.kernels.system import System

NARROW = 128
"""Most channels of `accelerate`."""

COLUMNS, WARPS = 64, 4
"""Columns and warps per program: 450 TFLOP/s in products at K = 128 on an H200; doubling both changes nothing."""


@triton.jit
def accelerate(
    drive,
    start,
    y_out,
    iterations,
    high,
    low,
    diagonal,
    scaling,
    pace,
    columns,
    along,
    across,
    tolerance,
    limit,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK: tl.constexpr,
    FIXED: tl.constexpr,
    WARM: tl.constexpr,
):
    """drive, start, y_out [N, K] of strides (along, across); scaling, pace: pointers to c and 1/λ̂, as in `System`."""
    channel = tl.arange(0, BLOCK)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[:, None] & (channel < CHANNELS)[None, :]
    place = column.to(tl.int64)[:, None] * along + channel.to(tl.int64)[None, :] * across
    factor = tl.load(scaling)
    step = tl.load(pace) / factor
    m = tl.load(high + channel[:, None] * BLOCK + channel[None, :])
    rest = tl.load(low + channel[:, None] * BLOCK + channel[None, :])

    d = tl.load(drive + place, mask=inside, other=0.0)
    largest = tl.max(tl.abs(d), 1)
    scale = power_below(largest)
    goal = tolerance * (largest / scale)
    g = -(d / scale[:, None])
    if WARM:
        begin = tl.load(start + place, mask=inside, other=0.0) / (scale * factor)[:, None]
        delta = shortened(tl.minimum(begin, 60000.0))
        y = delta.to(tl.float32)
        g = tl.dot(delta, m, g)
        g = tl.dot(delta, rest, g)
        w_prev = y
    else:
        y = tl.zeros([COLUMNS, BLOCK], tl.float32)
        w_prev = y
    k = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    live = column < columns
    working = True
    done = 0
    while working & (done < limit - 1):
        if not FIXED:
            own = y * tl.load(diagonal + channel)[None, :] * factor
            live = tl.max(tl.abs(tl.minimum(own, g)), 1) > goal
            working = tl.max(live.to(tl.int32), 0) > 0
        going = live.to(tl.float32)
        reach = going * step  # a column that has stopped keeps its value: Δ = relu(y) − y = 0
        for inner in range(0, tl.minimum(CHECK, limit - 1 - done)):
            beta = k / (k + 3.0) * going
            w_prev, move = advance(y, g, w_prev, reach[:, None], beta[:, None])
            k += 1.0
            if inner == 0:
                k = tl.where(tl.sum(g * move, 1) > 0, 0.0, k)
            delta = shortened(move)
            y += delta.to(tl.float32)
            g = tl.dot(delta, m, g)
            g = tl.dot(delta, rest, g)
            left = shortened(move - delta.to(tl.float32))
            y += left.to(tl.float32)
            g = tl.dot(left, m, g)
        count += tl.where(live, tl.minimum(CHECK, limit - 1 - done), 0)
        done += CHECK
    w = y - step * g
    if FIXED:
        beta = k / (k + 3.0)
        w = w + beta[:, None] * (w - w_prev)
    tl.store(y_out + place, tl.maximum(w, 0.0) * (scale * factor)[:, None], mask=inside)
    tl.store(iterations + column, count + 1, mask=column < columns)


def solve(
    drive: Tensor,
    system: System,
    tolerance: float,
    limit: int,
    *,
    check_every: int = 4,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve every column to a residual of about the tolerance: (y [N, K], iterations [N]).

    Parameters
    ----------
    drive: [N, K], of any strides.
    system: M, ε and the bound of λmax.
    tolerance: relative residual at which a column stops; 0 for exactly `limit` iterations.
    limit: maximum number of iterations.
    check_every: iterations between two tests of the residual and of the restart condition.
    start: [N, K], y ≥ 0 to start from (rounded to float16). None: zero.

    >>> drive = torch.ones(1000, 64, device="cuda")
    >>> solve(drive, System(torch.eye(64, device="cuda"), ridge=0.0, bound=1.0), tolerance=0.0, limit=30)[0].shape
    torch.Size([1000, 64])
    """
    columns, channels = drive.shape
    y = drive.new_empty_strided(drive.shape, drive.stride())
    iterations = torch.empty(columns, dtype=torch.int32, device=drive.device)
    high, low = system.halves
    assert start is None or start.stride() == drive.stride()
    narrow = system.block <= NARROW
    kernel, tile, warps = (accelerate, COLUMNS, WARPS) if narrow else (accelerate_wide, WIDE_COLUMNS, WIDE_WARPS)
    kernel[(triton.cdiv(columns, tile),)](
        drive, drive if start is None else start, y, iterations, high, low, system.diagonal, system.factor,
        system.step, columns, *drive.stride(), tolerance, limit,
        CHANNELS=channels, BLOCK=system.block, COLUMNS=tile, CHECK=check_every, FIXED=tolerance == 0,
        WARM=start is not None, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, iterations
