"""Codes that are solutions of a nonnegative quadratic program, as those of our layers are.

y* = argmin over y ≥ 0 of ½ yᵀ G y − yᵀ d,  solved by `simmatch.solve` to a residual
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch import DynamicsConfig, solve
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics

MAX_ITERATIONS = 10_000
"""In units of K moves of a channel; a limit nothing should meet."""

COUNTED_IMAGES, COUNTED = 50, 100
"""Images, and columns spread over theirs, on which the work of a column is counted."""


def nonnegative_codes(drive: Tensor, lateral: Tensor, tolerance: float) -> Tensor:
    """y* [K, N] for drives d [K, N] and G [K, K]."""
    return solve(drive, lateral, DynamicsConfig(tolerance=tolerance, max_iterations=MAX_ITERATIONS)).y


def mean_iterations(drive: Tensor, lateral: Tensor, tolerance: float) -> float:
    """Iterations of a column, each worth a product with G, mean over `COUNTED` columns spread over the drive.

    A column counts whole iterations, rounded up; one whose drive is nowhere positive counts none.
    """
    config, rows = DynamicsConfig(tolerance=tolerance, max_iterations=MAX_ITERATIONS), Rows.all(len(lateral))
    dynamics, bound = Dynamics(config, rows, alone=True), certify_afresh(lateral, rows, ridge=config.ridge)
    chosen = torch.linspace(0, drive.shape[1] - 1, min(COUNTED, drive.shape[1])).round().long().tolist()
    counts = [dynamics.solve(drive[:, [column]], lateral, bound).num_iters for column in chosen]
    return sum(counts) / len(counts)
