"""Slow references of the kernels in plain torch, in any precision.

Columns of the problem are rows, [N, K], as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residuals(drive: Tensor, y: Tensor, lateral: Tensor, ridge: float = 0.0) -> Tensor:
    """max_i |min(M_ii y_i, ((M + εI) y − d)_i)| / max|d| of every column, in float64; 0/0 = 0.

    Parameters
    ----------
    drive, y: [N, K].
    lateral: [K, K], M.
    ridge: ε.

    >>> residuals(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2)).tolist()
    [0.0]
    """
    d, values, matrix = drive.double(), y.double(), lateral.double()
    gradient = values @ matrix + ridge * values - d
    worst = torch.minimum(matrix.diagonal() * values, gradient).abs().amax(dim=1)
    return torch.where((worst == 0) & (d == 0).all(dim=1), 0.0, worst / d.abs().amax(dim=1))


def greedy(
    drive: Tensor, lateral: Tensor, tolerance: float, limit: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Coordinate descent that always moves the channel of the largest violation: (y [N, K], moves [N]).

    Parameters
    ----------
    drive: [N, K].
    lateral: [K, K], M, with a positive diagonal.
    tolerance: relative residual at which a column stops.
    limit: maximum number of moves per column.
    start: [N, K], y ≥ 0 to start from. None: zero.

    >>> y, moves = greedy(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.eye(2), tolerance=1e-3, limit=10)
    >>> y.tolist(), moves.tolist()
    ([[1.0, 2.0], [0.0, 0.0]], [2, 0])
    """
    diagonal = lateral.diagonal()
    v = torch.zeros_like(drive) if start is None else start * diagonal
    rows = lateral / diagonal.unsqueeze(1)
    g = v @ rows - drive
    goal, moves = tolerance * drive.abs().amax(dim=1), torch.zeros(len(drive), dtype=torch.int64)
    for _ in range(limit):
        least = torch.minimum(v, g)
        largest, chosen = least.abs().max(dim=1)
        live = largest > goal
        if not bool(live.any()):
            break
        change = torch.where(live, least.gather(1, chosen.unsqueeze(1)).squeeze(1), 0.0)
        v = v.scatter_add(1, chosen.unsqueeze(1), -change.unsqueeze(1)).clamp(min=0.0)
        g = g - change.unsqueeze(1) * rows[chosen]
        moves += live
    return v / diagonal, moves


def accelerated(
    drive: Tensor, matrix: Tensor, diagonal: Tensor, step: float, tolerance: float, limit: int, check_every: int
) -> tuple[Tensor, Tensor]:
    """Accelerated projected gradient on increments: (y [N, K], iterations [N]).

    Parameters
    ----------
    drive: [N, K].
    matrix: [K, K], M + εI.
    diagonal: [K], M_ii.
    step: 1/λ̂.
    tolerance: relative residual at which a column stops; 0 for exactly `limit` iterations.
    limit: maximum number of iterations.
    check_every: iterations between two tests of the residual and of the restart condition.

    >>> y, iterations = accelerated(torch.ones(7, 4), torch.eye(4), torch.ones(4), 1.0, 1e-3, 100, check_every=4)
    >>> y.shape, iterations.tolist()
    (torch.Size([7, 4]), [5, 5, 5, 5, 5, 5, 5])
    """
    y, g = torch.zeros_like(drive), -drive
    w_prev, k = y, torch.zeros(len(drive), 1, dtype=drive.dtype)
    live, iterations = torch.ones(len(drive), 1, dtype=torch.bool), torch.ones(len(drive), dtype=torch.int64)
    scale = drive.abs().amax(dim=1, keepdim=True)
    for iteration in range(limit - 1):
        checking = iteration % check_every == 0
        if checking and tolerance > 0:
            worst = torch.minimum(diagonal * y, g).abs().amax(dim=1, keepdim=True)
            live = worst > tolerance * scale
            if not bool(live.any()):
                break
        w = y - step * g
        move = torch.where(live, (w + k / (k + 3) * (w - w_prev)).clamp(min=0.0) - y, 0.0)
        k = k + 1
        if checking:
            k = torch.where((g * move).sum(dim=1, keepdim=True) > 0, 0.0, k)
        y, w_prev, g = y + move, w, g + move @ matrix
        iterations += live.squeeze(1)
    w = y - step * g
    if tolerance == 0:
        w = w + k / (k + 3) * (w - w_prev)
    return w.clamp(min=0.0), iterations
