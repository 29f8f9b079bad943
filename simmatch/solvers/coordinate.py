"""Greedy coordinate descent with solutions on the face: the dynamics of one column at a time, on a CPU.

    y* = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ d,   g = M y − d

A column starts from y = 0 and alternates two moves, each of which lowers the energy:

    coordinate   the channel that violates optimality most moves to its own minimum, and inhibits the others:
                 y_i ← max(0, y_i − g_i / M_ii), g ← g + Δy_i M_i                       2 K multiply–adds
    face         while the set S of active channels stays the same, coordinate moves only polish. Once they have
                 cost as much as solving M_SS y_S = d_S would, it is solved (Cholesky), and y moves there as far as
                 y ≥ 0 allows                                                           |S|³/6 + |S| K multiply–adds

Codes are 10 to 17 % active, so a column touches a fraction of M, where a gradient iteration multiplies by all of it;
and columns end one by one. Nothing is shared between columns: a code does not depend, not even in its last bit, on
batch mates, tiles or threads. The price: scalar control flow, so CPU only, and all channels in one place.

Compiled by numba on first use. Sources: Hsieh & Dhillon, "Fast coordinate descent methods with variable selection for
non-negative matrix factorization" (2011), the greedy choice; Lawson & Hanson, "Solving least squares problems" (1974),
ch. 23, the faces; Moré & Toraldo (1991) for alternating the two.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from simmatch.solvers.pool import Pool

LANES = 16
"""Channels are padded to a multiple of this, so that every inner loop is whole vectors."""

CHUNK = 16
"""Columns transposed at a time: a cache line of a row of the drive."""

SPANS = 8
"""Spans of columns per thread: some columns take longer than others."""

LEAST_PATIENCE = 6
"""Moves with the same active channels before a solution on the face is considered."""

_FAST = {"contract", "reassoc", "nsz", "arcp", "nnan", "ninf"}
"""What the compiler may assume: inputs are checked to be finite before, results after."""


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _add_row(g, lateral, i, amount):  # type: ignore[no-untyped-def]
    """g ← g + amount · M_i. Row i is read in place: a view of it would cost a count of references."""
    for j in range(g.shape[0]):
        g[j] += amount * lateral[i, j]


def _rank(_context, value, index, index_mask):  # type: ignore[no-untyped-def]
    """Bits of a nonnegative float, the lowest replaced by an index: such integers are ordered as the floats are.

    As wide as the float: the maximum over channels is then one vector instruction for every vector of values.
    """
    width = types.int32 if value == types.float32 else types.int64

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        integer = context.get_value_type(width)
        bits = builder.bitcast(arguments[0], integer)
        number = arguments[1] if width == types.int64 else builder.trunc(arguments[1], integer)
        return builder.or_(builder.and_(bits, builder.not_(arguments[2])), number)

    return width(value, types.int64, width), generate


_ranked: Any = intrinsic(_rank)


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _move(g, lateral, i, amount, y, diagonal, index_mask):  # type: ignore[no-untyped-def]
    """g ← g + amount · M_i; index of the largest violation |min(M_ii y_i, g_i)| of the new g."""
    top = _ranked(g.dtype.type(0), 0, index_mask)
    for j in range(g.shape[0]):
        gradient = g[j] + amount * lateral[i, j]
        g[j] = gradient
        own = diagonal[j] * y[j]
        here = _ranked(abs(own if own < gradient else gradient), np.int64(j), index_mask)
        top = here if here > top else top
    return top & index_mask


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _step_on_face(lateral, g, active, count, factor, inverse, step):  # type: ignore[no-untyped-def]
    """Solve M_SS p = −g_S by Cholesky; returns whether M_SS is positive definite to working precision."""
    for a in range(count):
        for b in range(a + 1):
            factor[a, b] = lateral[active[a], active[b]]
    for a in range(count):
        for b in range(a):
            done = factor[a, b]
            for c in range(b):
                done -= factor[a, c] * factor[b, c]
            factor[a, b] = done * inverse[b]
        pivot = factor[a, a]
        for c in range(a):
            pivot -= factor[a, c] * factor[a, c]
        if not pivot > lateral[active[a], active[a]] * 1e-6:
            return False
        inverse[a] = 1 / np.sqrt(pivot)
    for a in range(count):
        done = -g[active[a]]
        for c in range(a):
            done -= factor[a, c] * step[c]
        step[a] = done * inverse[a]
    for a in range(count - 1, -1, -1):
        value = step[a] * inverse[a]
        step[a] = value
        for c in range(a):
            step[c] -= factor[a, c] * value
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def _take_face_step(lateral, g, y, active, count, step):  # type: ignore[no-untyped-def]
    """Move along the step until it ends or the first channel falls silent."""
    zero = y.dtype.type(0)
    length, first = y.dtype.type(1), -1
    for a in range(count):
        if y[active[a]] + step[a] < zero:
            reach = y[active[a]] / -step[a]
            if reach < length:
                length, first = reach, a
    for a in range(count):
        i = active[a]
        value = zero if a == first else max(zero, y[i] + length * step[a])
        _add_row(g, lateral, i, value - y[i])
        y[i] = value


@njit(nogil=True, error_model="numpy", cache=True)
def _gradient(lateral, d, y, g):  # type: ignore[no-untyped-def]
    """g = M y − d from scratch, without the rounding that moves have left."""
    for j in range(g.shape[0]):
        g[j] = -d[j]
    for i in range(y.shape[0]):
        if y[i] != 0:
            _add_row(g, lateral, i, y[i])


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _from_silence(d, g, index_mask):  # type: ignore[no-untyped-def]
    """g = −d, the gradient at y = 0; index of the largest violation."""
    top = _ranked(g.dtype.type(0), 0, index_mask)
    for j in range(g.shape[0]):
        g[j] = -d[j]
        here = _ranked(d[j] if d[j] > 0 else g.dtype.type(0), np.int64(j), index_mask)
        top = here if here > top else top
    return top & index_mask


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _largest_magnitude(d, index_mask):  # type: ignore[no-untyped-def]
    """max |d|, or a value that agrees with it but for the bits that `_ranked` replaces."""
    top = _ranked(d.dtype.type(0), 0, index_mask)
    for j in range(d.shape[0]):
        here = _ranked(abs(d[j]), np.int64(j), index_mask)
        top = here if here > top else top
    return abs(d[top & index_mask])


@njit(nogil=True, error_model="numpy", cache=True)
def _violation(g, diagonal, y, i):  # type: ignore[no-untyped-def]
    """|min(M_ii y_i, g_i)|"""
    own = diagonal[i] * y[i]
    return abs(own if own < g[i] else g[i])


@njit(nogil=True, error_model="numpy", cache=True)
def _solve_column(matrices, d, y, cold, limits, buffers):  # type: ignore[no-untyped-def]
    """One column from y as given, zero if `cold`, in place; returns (coordinate moves, residual of y).

    matrices: M + εI [K, K]; the diagonal of M and the inverse diagonal of M + εI [K].
    limits: tolerance; least residual worth aiming at; slack of `_ranked`; rounding of a move; most moves; index mask.
    """
    lateral, diagonal, inverse_diagonal = matrices
    tolerance, floor, slack, rounding, limit, index_mask = limits
    floats, active, factor = buffers
    g, pivots, step = floats
    channels, zero = g.shape[0], y.dtype.type(0)
    scale = _largest_magnitude(d, index_mask)
    if scale == zero:
        y[:] = zero
        return 0, zero
    moves, unchanged, patience, failures, stuck = 0, 0, LEAST_PATIENCE, 0, False
    best = y.dtype.type(np.inf)
    goal = max(tolerance, floor) * scale
    if cold:
        i = _from_silence(d, g, index_mask)
    else:
        _gradient(lateral, d, y, g)
        i = _move(g, lateral, 0, zero, y, diagonal, index_mask)
    while True:
        largest = _violation(g, diagonal, y, i) * slack
        if largest <= goal and moves * rounding <= tolerance:
            return moves, largest / scale  # what moves have left of rounding is far below the tolerance
        if stuck or moves >= limit or largest <= goal:
            _gradient(lateral, d, y, g)
            i = _move(g, lateral, 0, zero, y, diagonal, index_mask)
            reached = _violation(g, diagonal, y, i) * slack
            # a fresh gradient that is no better again and again: the dtype has no more to give
            failures = failures + 1 if reached > best / 2 else 0
            best = min(best, reached)
            if reached <= tolerance * scale or moves >= limit or failures == 3:
                return moves, reached / scale
        value = max(zero, y[i] - g[i] * inverse_diagonal[i])
        change = value - y[i]
        stuck = change == zero
        unchanged = unchanged + 1 if (value > zero) == (y[i] > zero) else 0
        y[i] = value
        moves += 1
        i = _move(g, lateral, i, change, y, diagonal, index_mask)
        if unchanged >= patience:
            unchanged, count = 0, 0
            for j in range(channels):  # without a branch, which would be mispredicted
                active[count] = j
                count += y[j] > zero
            cost = count * count * count // 6 + 2 * count * channels
            patience = max(LEAST_PATIENCE, cost // (2 * channels))  # moves that cost as much
            if _step_on_face(lateral, g, active, count, factor, pivots, step):
                _take_face_step(lateral, g, y, active, count, step)
                i = _move(g, lateral, 0, zero, y, diagonal, index_mask)


@njit(nogil=True, error_model="numpy", cache=True)
def _solve_columns(matrices, drive, y, residual, moves, span, cold, limits, buffers):  # type: ignore[no-untyped-def]
    """Columns span[0] … span[1] − 1 of the drive [K, N], from y [K, N], or from zero if `cold`, and into it."""
    channels = drive.shape[0]
    column, d, codes = buffers
    for start in range(span[0], span[1], CHUNK):
        width = min(CHUNK, span[1] - start)
        codes[:] = 0
        for i in range(channels):
            for c in range(width):
                d[c, i] = drive[i, start + c]
            if not cold:
                for c in range(width):
                    codes[c, i] = y[i, start + c]
        for c in range(width):
            moves[start + c], residual[start + c] = _solve_column(matrices, d[c], codes[c], cold, limits, column)
        for i in range(channels):
            for c in range(width):
                y[i, start + c] = codes[c, i]


class CoordinateDescent:
    """Solves columns with buffers and threads that last from call to call; calls may come from several threads.

    torch's number of threads counts; each takes spans of columns until none is left.
    """

    def __init__(self) -> None:
        self._threads: tuple[int, ThreadPoolExecutor] | None = None
        self._buffers = Pool()

    def __reduce__(self) -> tuple[type[CoordinateDescent], tuple[()]]:
        """A copy of a layer starts with buffers and threads of its own."""
        return CoordinateDescent, ()

    def solve(
        self,
        drive: Tensor,
        lateral: Tensor,
        *,
        ridge: float,
        tolerance: float,
        max_iterations: int,
        start: Tensor | None = None,
    ) -> tuple[Tensor, int, Tensor]:
        """Solve every column.

        Parameters
        ----------
        drive: [K, N], finite, on the CPU.
        lateral: [K, K], M, finite.
        ridge: ε, added to the diagonal of M.
        max_iterations: limit in units of K coordinate moves, which cost as much as one product with M.
        start: [K, N], y ≥ 0 to start from. None: zero.

        Returns
        -------
        (activities [K, N]; iterations of the slowest column in those units, rounded up; residual [N])
        """
        channels, columns = drive.shape
        padded = -(-channels // LANES) * LANES
        matrix = torch.eye(padded, dtype=drive.dtype, device="cpu")
        matrix[:channels, :channels] = lateral
        diagonal = matrix.diagonal().clone()
        matrix.diagonal().add_(ridge)
        held = matrix.diagonal() > 0
        inverse = torch.where(held, 1 / matrix.diagonal(), 0.0)
        matrices = (matrix.numpy(), diagonal.numpy(), inverse.numpy())
        # a channel that nothing holds stays silent
        answered = drive if bool(held.all()) else drive * held[:channels, None]

        eps, index_mask = torch.finfo(drive.dtype).eps, (1 << (padded - 1).bit_length()) - 1
        levels = drive.new_tensor([tolerance, 8 * eps, 1 + 2 * index_mask * eps, 100 * eps])
        integer = np.int32 if drive.dtype == torch.float32 else np.int64  # as wide as a value
        limits = (*levels.numpy(), max_iterations * channels, integer(index_mask))
        y = torch.empty_like(answered) if start is None else start.clone()
        residual, moves = drive.new_empty(columns), drive.new_empty(columns, dtype=torch.int64)
        arrays = [tensor.numpy() for tensor in (answered, y, residual, moves)]
        threads = torch.get_num_threads()
        width = CHUNK * max(1, columns // (SPANS * threads * CHUNK))
        spans = iter(range(0, columns, width))  # shared: a thread takes the next span that is left

        def work(buffers: Any) -> None:
            for first in spans:
                span = (first, min(first + width, columns))
                _solve_columns(matrices, *arrays, span, start is None, limits, buffers)  # type: ignore[call-arg]

        workers = 1 if columns <= width else threads
        key = (len(matrix), matrix.dtype)
        buffers = [self._buffers.take(key, lambda: _buffers(matrix)) for _ in range(workers)]
        if workers == 1:
            work(buffers[0])
        else:
            list(self._executor(workers).map(work, buffers))
        for lent in buffers:
            self._buffers.give(key, lent)
        if answered is not drive:
            # the drive of a channel that nothing holds is what no solution can answer
            scale, own_scale = drive.abs().amax(dim=0), answered.abs().amax(dim=0)
            left = (drive - answered).clamp(min=0).amax(dim=0)
            residual = torch.where(scale > 0, torch.maximum(left, residual * own_scale) / scale, 0.0)
        return y, -(-int(moves.max()) // channels), residual

    def _executor(self, workers: int) -> ThreadPoolExecutor:
        """Threads of this process: those of a parent do not live on after a fork."""
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(workers, thread_name_prefix="columns")
        return self._threads[1]


def _buffers(matrix: Tensor) -> Any:
    """What one thread works in, as `_solve_columns` takes it."""
    size = len(matrix)
    floats, factor = matrix.new_zeros(3, size), matrix.new_zeros(size, size)
    column = (tuple(floats.numpy()), np.zeros(size + 1, np.int64), factor.numpy())
    return column, *matrix.new_zeros(2, CHUNK, size).numpy()
