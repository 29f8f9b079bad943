"""The kernel of `simmatch.kernels.gradient` for 129 to 256 channels: M as two float16 matrices fits by its symmetry.

Both matrices whole would take 256 KB at K = 256; a multiprocessor of compute capability 9 has 227 KB of shared memory.
M is therefore cut into 2 × 2 blocks, of which three are held, and the fourth is read as the transpose of the second:

    [g₀]     [A   B] [Δ₀]
    [g₁]  +  [Bᵀ  C] [Δ₁]

That takes 192 KB, and 32 KB hold the increments Δ of 32 columns as pairs. Channels are rows here and M is the left
factor, so that each group of four warps computes 64 channels of all 32 columns.

The arithmetic of a column is that of `simmatch.kernels.gradient.accelerate`, with sums in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simmatch.kernels.increments import advance, power_below, shortened

WIDE_COLUMNS, WIDE_WARPS = 32, 8
"""Columns and warps per program. One program fills a multiprocessor; 64 columns do not fit into its registers."""


@triton.jit
def accelerate_wide(
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
    """The arguments are those of `accelerate`; of M only the diagonal blocks and the upper right one are read."""
    upper = tl.arange(0, BLOCK // 2)
    lower = BLOCK // 2 + upper
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    present = column < columns
    inside_0 = (upper < CHANNELS)[:, None] & present[None, :]
    inside_1 = (lower < CHANNELS)[:, None] & present[None, :]
    place_0 = column.to(tl.int64)[None, :] * along + upper.to(tl.int64)[:, None] * across
    place_1 = column.to(tl.int64)[None, :] * along + lower.to(tl.int64)[:, None] * across
    factor = tl.load(scaling)
    step = tl.load(pace) / factor
    a = tl.load(high + upper[:, None] * BLOCK + upper[None, :])
    b = tl.load(high + upper[:, None] * BLOCK + lower[None, :])
    c = tl.load(high + lower[:, None] * BLOCK + lower[None, :])
    a_rest = tl.load(low + upper[:, None] * BLOCK + upper[None, :])
    b_rest = tl.load(low + upper[:, None] * BLOCK + lower[None, :])
    c_rest = tl.load(low + lower[:, None] * BLOCK + lower[None, :])

    g_0 = tl.load(drive + place_0, mask=inside_0, other=0.0)
    g_1 = tl.load(drive + place_1, mask=inside_1, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(g_0), 0), tl.max(tl.abs(g_1), 0))
    scale = power_below(largest)
    goal = tolerance * (largest / scale)
    g_0 = -(g_0 / scale[None, :])
    g_1 = -(g_1 / scale[None, :])
    y_0 = tl.zeros([BLOCK // 2, COLUMNS], tl.float32)
    y_1 = tl.zeros([BLOCK // 2, COLUMNS], tl.float32)
    if WARM:
        y_0 = tl.load(start + place_0, mask=inside_0, other=0.0) / (scale * factor)[None, :]
        y_1 = tl.load(start + place_1, mask=inside_1, other=0.0) / (scale * factor)[None, :]
        delta_0 = shortened(tl.minimum(y_0, 60000.0))
        delta_1 = shortened(tl.minimum(y_1, 60000.0))
        y_0 = delta_0.to(tl.float32)
        y_1 = delta_1.to(tl.float32)
        g_0, g_1 = product(a, b, c, delta_0, delta_1, g_0, g_1)
        g_0, g_1 = product(a_rest, b_rest, c_rest, delta_0, delta_1, g_0, g_1)
    before_0 = y_0
    before_1 = y_1
    k = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    live = present
    working = True
    done = 0
    while working & (done < limit - 1):
        if not FIXED:
            own_0 = y_0 * tl.load(diagonal + upper)[:, None] * factor
            own_1 = y_1 * tl.load(diagonal + lower)[:, None] * factor
            worst = tl.max(tl.abs(tl.minimum(own_0, g_0)), 0)
            live = tl.maximum(worst, tl.max(tl.abs(tl.minimum(own_1, g_1)), 0)) > goal
            working = tl.max(live.to(tl.int32), 0) > 0
        going = live.to(tl.float32)
        reach = going * step
        for inner in range(0, tl.minimum(CHECK, limit - 1 - done)):
            beta = k / (k + 3.0) * going
            before_0, move_0 = advance(y_0, g_0, before_0, reach[None, :], beta[None, :])
            before_1, move_1 = advance(y_1, g_1, before_1, reach[None, :], beta[None, :])
            k += 1.0
            if inner == 0:
                k = tl.where(tl.sum(g_0 * move_0 + g_1 * move_1, 0) > 0, 0.0, k)
            delta_0 = shortened(move_0)
            delta_1 = shortened(move_1)
            y_0 += delta_0.to(tl.float32)
            y_1 += delta_1.to(tl.float32)
            left_0 = shortened(move_0 - delta_0.to(tl.float32))
            left_1 = shortened(move_1 - delta_1.to(tl.float32))
            y_0 += left_0.to(tl.float32)
            y_1 += left_1.to(tl.float32)
            # the small terms first: that order needs no registers beyond those there are
            g_0, g_1 = product(a, b, c, left_0, left_1, g_0, g_1)
            g_0, g_1 = product(a_rest, b_rest, c_rest, delta_0, delta_1, g_0, g_1)
            g_0, g_1 = product(a, b, c, delta_0, delta_1, g_0, g_1)
        count += tl.where(live, tl.minimum(CHECK, limit - 1 - done), 0)
        done += CHECK
    w_0 = y_0 - step * g_0
    w_1 = y_1 - step * g_1
    if FIXED:
        beta = k / (k + 3.0)
        w_0 = w_0 + beta[None, :] * (w_0 - before_0)
        w_1 = w_1 + beta[None, :] * (w_1 - before_1)
    tl.store(y_out + place_0, tl.maximum(w_0, 0.0) * (scale * factor)[None, :], mask=inside_0)
    tl.store(y_out + place_1, tl.maximum(w_1, 0.0) * (scale * factor)[None, :], mask=inside_1)
    tl.store(iterations + column, count + 1, mask=present)


@triton.jit
def product(a, b, c, x_0, x_1, g_0, g_1):
    """(g₀, g₁) + [[a, b], [bᵀ, c]] (x₀, x₁)."""
    g_0 = tl.dot(a, x_0, g_0)
    g_0 = tl.dot(b, x_1, g_0)
    g_1 = tl.dot(tl.trans(b), x_0, g_1)
    g_1 = tl.dot(c, x_1, g_1)
    return g_0, g_1
