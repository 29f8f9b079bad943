"""Codes that are solutions of a nonnegative quadratic program, as those of our layers are.

y* = argmin over y ≥ 0 of ½ yᵀ G y − yᵀ d,  solved by the solver of our layers to a residual
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from simmatch import ConvergenceWarning, DynamicsConfig
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics

MAX_ITERATIONS = 10_000
"""In units of K moves of a channel; a limit nothing should meet."""

COUNTED_IMAGES, COUNTED = 50, 100
"""Images, and columns spread over theirs, on which the work of a column is counted."""


class NonnegativeCodes:
    """Solves for one G [K, K], whose bound is certified once: `simmatch.solve` would do so for every few images.

    Warns
    -----
    ConvergenceWarning
        Some column ended above the tolerance.

    >>> codes, drive = NonnegativeCodes(torch.eye(2), tolerance=1e-3), torch.tensor([[2.0], [-1.0]])
    >>> codes(drive).round(decimals=3).flatten().tolist(), codes.mean_iterations(drive)
    ([2.0, 0.0], 1.0)
    """

    def __init__(self, lateral: Tensor, tolerance: float) -> None:
        config, rows = DynamicsConfig(tolerance=tolerance, max_iterations=MAX_ITERATIONS), Rows.all(len(lateral))
        self.lateral, self.tolerance = lateral, tolerance
        self._dynamics = Dynamics(config, rows, alone=True)
        self._bound = certify_afresh(lateral, rows, ridge=config.ridge)

    def __call__(self, drive: Tensor) -> Tensor:
        """y* [K, N] for drives d [K, N]."""
        solution = self._dynamics.solve(drive, self.lateral, self._bound)
        if drive.shape[1] and not (worst := float(solution.residual.amax())) <= self.tolerance:
            warnings.warn(f"codes reached a residual of {worst:.2e}", ConvergenceWarning, stacklevel=2)
        return solution.y

    def mean_iterations(self, drive: Tensor) -> float:
        """Iterations of a column, each worth a product with G, mean over `COUNTED` columns spread over the drive.

        A column counts whole iterations, rounded up; one whose drive is nowhere positive counts none.
        """
        chosen = torch.linspace(0, drive.shape[1] - 1, min(COUNTED, drive.shape[1])).round().long().tolist()
        counts = [self._dynamics.solve(drive[:, [column]], self.lateral, self._bound).num_iters for column in chosen]
        return sum(counts) / len(counts)
