"""Greedy coordinate descent with exact solutions on the active face: solves one column at a time, on a CPU.

    y* = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ d,   g = M y − d

A column starts from y = 0 and alternates two moves, each of which lowers the energy:

    coordinate   the channel that violates optimality most moves to its own minimum, and inhibits the others:
                 y_i ← max(0, y_i − g_i / M_ii), g ← g + Δy_i M_i                       2 K multiply–adds
    face         while the set S of active channels does not change, coordinate moves only refine the values. Once
                 they have cost as much as solving M_SS y_S = d_S would, that system is solved (Cholesky), and y moves
                 towards its solution as far as y ≥ 0 allows                            |S|³/6 + |S| K multiply–adds

Codes are 10 to 17 % active, so a column reads a fraction of M, whereas a gradient iteration multiplies by all of it.
Each column stops by itself. Columns share nothing: a code does not depend on the other columns of the batch, the tiles
or the threads, not even in its last bit. The control flow is scalar, so this solver needs a CPU, and it needs all
channels in one place.

numba compiles the solver on first use.

Sources: Hsieh & Dhillon, "Fast coordinate descent methods with variable selection for non-negative matrix
factorization" (2011), the greedy choice; Lawson & Hanson, "Solving least squares problems" (1974), ch. 23, the faces;
Moré & Toraldo (1991) for alternating the two.
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
"""Channels are padded to a multiple of this, so that every inner loop processes whole vectors."""

CHUNK = 16
"""Columns transposed at a time: one cache line of each row of the drive."""

SPANS = 8
"""Spans of columns per thread; several, because some columns take longer than others."""

LEAST_PATIENCE = 6
"""Smallest number of moves with the same active channels before a solution on the face is tried."""

_FAST = {"contract", "reassoc", "nsz", "arcp", "nnan", "ninf"}
"""What the compiler may assume. Inputs are checked to be finite before, and results after."""


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _add_row(g, lateral, i, amount):  # type: ignore[no-untyped-def]
    """g ← g + amount · M_i. Row i is read in place: making a view of it would cost reference counting."""
    for j in range(g.shape[0]):
        g[j] += amount * lateral[i, j]


def _rank(_context, value, index, index_mask):  # type: ignore[no-untyped-def]
    """The bits of a nonnegative float, the lowest ones replaced by an index: such integers are ordered as the floats.

    The integer is as wide as the float, so that the maximum over channels takes one vector instruction per vector.
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
    """g ← g + amount · M_i; returns the index of the largest violation |min(M_ii y_i, g_i)| with the new g."""
    top = _ranked(g.dtype.type(0), 0, index_mask)
    for j in range(g.shape[0]):
        gradient = g[j] + amount * lateral[i, j]
        g[j] = gradient
        own = diagonal[j] * y[j]
        rank = _ranked(abs(own if own < gradient else gradient), np.int64(j), index_mask)
        top = rank if rank > top else top
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
    """Move along the step to its end, or until the first channel reaches zero."""
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
    """Compute g = M y − d anew, without the rounding errors accumulated by moves."""
    for j in range(g.shape[0]):
        g[j] = -d[j]
    for i in range(y.shape[0]):
        if y[i] != 0:
            _add_row(g, lateral, i, y[i])


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _from_silence(d, g, index_mask):  # type: ignore[no-untyped-def]
    """g = −d, the gradient at y = 0; returns the index of the largest violation."""
    top = _ranked(g.dtype.type(0), 0, index_mask)
    for j in range(g.shape[0]):
        g[j] = -d[j]
        rank = _ranked(d[j] if d[j] > 0 else g.dtype.type(0), np.int64(j), index_mask)
        top = rank if rank > top else top
    return top & index_mask


@njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True)
def _largest_magnitude(d, index_mask):  # type: ignore[no-untyped-def]
    """max |d|, or a value that differs from it only in the bits that `_ranked` replaces."""
    top = _ranked(d.dtype.type(0), 0, index_mask)
    for j in range(d.shape[0]):
        rank = _ranked(abs(d[j]), np.int64(j), index_mask)
        top = rank if rank > top else top
    return abs(d[top & index_mask])


@njit(nogil=True, error_model="numpy", cache=True)
def _violation(g, diagonal, y, i):  # type: ignore[no-untyped-def]
    """|min(M_ii y_i, g_i)|"""
    own = diagonal[i] * y[i]
    return abs(own if own < g[i] else g[i])


@njit(nogil=True, error_model="numpy", cache=True)
def _solve_column(matrices, d, y, cold, limits, buffers):  # type: ignore[no-untyped-def]
    """Solve one column in place, starting from y, which is zero if `cold`; returns (coordinate moves, residual of y).

    matrices: M + εI [K, K]; the diagonal of M and the inverse diagonal of M + εI [K].
    limits: tolerance; smallest residual to aim at; slack of `_ranked`; rounding error of a move; maximum number of
        moves; index mask.
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
            return moves, largest / scale  # the accumulated rounding errors are far below the tolerance
        if stuck or moves >= limit or largest <= goal:
            _gradient(lateral, d, y, g)
            i = _move(g, lateral, 0, zero, y, diagonal, index_mask)
            reached = _violation(g, diagonal, y, i) * slack
            # three fresh gradients without an improvement: the precision of the dtype is reached
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
            for j in range(channels):  # no branch here: it would be mispredicted
                active[count] = j
                count += y[j] > zero
            cost = count * count * count // 6 + 2 * count * channels
            patience = max(LEAST_PATIENCE, cost // (2 * channels))  # as many moves as cost the same
            if _step_on_face(lateral, g, active, count, factor, pivots, step):
                _take_face_step(lateral, g, y, active, count, step)
                i = _move(g, lateral, 0, zero, y, diagonal, index_mask)


@njit(nogil=True, error_model="numpy", cache=True)
def _solve_columns(matrices, drive, y, residual, moves, span, cold, limits, buffers):  # type: ignore[no-untyped-def]
    """Solve columns span[0] … span[1] − 1 of the drive [K, N] into y [K, N], from y, or from zero if `cold`."""
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
    """The solver, with buffers and threads that are kept from call to call; several threads may call it.

    It uses as many threads as `torch.get_num_threads()`. Each takes spans of columns until none is left.

    >>> solver = CoordinateDescent()
    >>> lateral = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> y, num_iters, residual = solver.solve(
    ...     torch.tensor([[1.0], [-1.0]]), lateral, ridge=0.0, tolerance=1e-4, max_iterations=100)
    >>> y.tolist(), num_iters, residual.shape
    ([[1.0], [0.0]], 1, torch.Size([1]))
    """

    def __init__(self) -> None:
        self._threads: tuple[int, ThreadPoolExecutor] | None = None
        self._buffers = Pool()

    def __reduce__(self) -> tuple[type[CoordinateDescent], tuple[()]]:
        """Copies share no buffers and no threads."""
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
        tolerance: relative residual at which a column stops; 0 for the precision of the dtype.
        max_iterations: limit in units of K coordinate moves, which cost as much as one product with M.
        start: [K, N], y ≥ 0 to start from. None: zero.

        Returns
        -------
        Activities [K, N]; iterations of the slowest column in units of K moves, rounded up; residual [N].
        """
        channels, columns = drive.shape
        padded = -(-channels // LANES) * LANES
        matrix = torch.eye(padded, dtype=drive.dtype, device="cpu")
        matrix[:channels, :channels] = lateral
        diagonal = matrix.diagonal().clone()
        matrix.diagonal().add_(ridge)
        solvable = matrix.diagonal() > 0
        inverse = torch.where(solvable, 1 / matrix.diagonal(), 0.0)
        matrices = (matrix.numpy(), diagonal.numpy(), inverse.numpy())
        # a channel with M_ii + ε = 0 has no minimum of its own; it stays silent
        answered = drive if bool(solvable.all()) else drive * solvable[:channels, None]

        eps, index_mask = torch.finfo(drive.dtype).eps, (1 << (padded - 1).bit_length()) - 1
        levels = drive.new_tensor([tolerance, 8 * eps, 1 + 2 * index_mask * eps, 100 * eps])
        integer = np.int32 if drive.dtype == torch.float32 else np.int64  # as wide as a value of the drive
        limits = (*levels.numpy(), max_iterations * channels, integer(index_mask))
        y = torch.empty_like(answered) if start is None else start.clone()
        residual, moves = drive.new_empty(columns), drive.new_empty(columns, dtype=torch.int64)
        arrays = [tensor.numpy() for tensor in (answered, y, residual, moves)]
        threads = torch.get_num_threads()
        width = CHUNK * max(1, columns // (SPANS * threads * CHUNK))
        spans = iter(range(0, columns, width))  # shared by the threads, each of which takes the next span

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
        for buffer in buffers:
            self._buffers.give(key, buffer)
        if answered is not drive:
            # the drive of silent channels remains in the residual: no solution exists for them
            scale, own_scale = drive.abs().amax(dim=0), answered.abs().amax(dim=0)
            left = (drive - answered).clamp(min=0).amax(dim=0)
            residual = torch.where(scale > 0, torch.maximum(left, residual * own_scale) / scale, 0.0)
        return y, -(-int(moves.max()) // channels), residual

    def _executor(self, workers: int) -> ThreadPoolExecutor:
        """The threads of this process: after a fork the parent's threads no longer exist."""
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(workers, thread_name_prefix="columns")
        return self._threads[1]


def _buffers(matrix: Tensor) -> Any:
    """The buffers of one thread, as `_solve_columns` expects them."""
    size = len(matrix)
    floats, factor = matrix.new_zeros(3, size), matrix.new_zeros(size, size)
    column = (tuple(floats.numpy()), np.zeros(size + 1, np.int64), factor.numpy())
    return column, *matrix.new_zeros(2, CHUNK, size).numpy()
