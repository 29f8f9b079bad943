"""The dynamics on their own: a nonnegative quadratic program with many right-hand sides, checked before it is solved.

A layer trusts its own weights and records what the solver reached; `solve` takes any, refuses what has no
minimum, and warns when the tolerance was not reached.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh, check_lateral
from simmatch.solvers.dynamics import Dynamics, Solution


class ConvergenceWarning(UserWarning):
    """The dynamics ended above the requested residual."""


def solve(
    drive: Tensor, lateral: Tensor, config: DynamicsConfig | None = None, *, start: Tensor | None = None
) -> Solution:
    """Solve y* = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ d for every column of the drive.

    Parameters
    ----------
    drive: [K, N], floating point, finite.
    lateral: [K, K], symmetric positive semidefinite, finite; entries may have any sign.
    config: solver, tolerance, iterations. Default: `DynamicsConfig()`.
    start: [K, N], nonnegative activities to start from. Default: 0.

    Returns
    -------
    Solution(y [K, N], num_iters, residual [N]).

    Raises
    ------
    ValueError
        Shapes or dtypes that do not fit, values that are not finite, M not symmetric or not positive semidefinite.

    Warns
    -----
    ConvergenceWarning
        Some column ended above `config.tolerance`.

    Examples
    --------
    >>> solve(torch.tensor([[2.0], [-1.0]]), torch.eye(2)).y.flatten().tolist()
    [2.0, 0.0]
    """
    config = config or DynamicsConfig()
    _validate(drive, lateral, start)
    check_lateral(lateral)
    if drive.shape[1] == 0:
        return Solution(drive.clone(), 0, drive.new_zeros(0))
    # exact powers of two bring M and every column of d near 1, so that no finite input overflows on the way
    drive_scale, lateral_scale = _power_of_two(drive.abs().amax(dim=0)), _power_of_two(lateral.diagonal().amax())
    rows = Rows.all(lateral.shape[0])
    scaled = (lateral / lateral_scale).to(lateral.dtype)
    bound = certify_afresh(scaled, rows, ridge=config.ridge)
    if config.step is not None:
        config = config.model_copy(update={"step": config.step * float(lateral_scale)})
    if start is not None:
        start = (start / (drive_scale / lateral_scale)).to(drive.dtype)
    solution = Dynamics(config, rows).solve(
        (drive / drive_scale).to(drive.dtype), scaled, bound, start=start, alone=True
    )
    unscaled = torch.where(solution.y > 0, solution.y * (drive_scale / lateral_scale), 0.0)
    y = unscaled.clamp(max=torch.finfo(drive.dtype).max).to(drive.dtype)
    worst = float(solution.residual.amax()) if solution.residual.numel() else 0.0
    if config.tolerance > 0 and not worst <= config.tolerance:
        warnings.warn(
            f"the dynamics reached a residual of {worst:.2e} after {solution.num_iters} iterations, "
            f"above the tolerance {config.tolerance:.2e}; raise max_iterations (now {config.max_iterations})",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Solution(y, solution.num_iters, solution.residual)


def _power_of_two(values: Tensor) -> Tensor:
    """Largest power of two at most each value, in float64; 1 for 0."""
    return torch.where(values > 0, torch.exp2(torch.floor(torch.log2(values.double()))), 1.0)


def _validate(drive: Tensor, lateral: Tensor, start: Tensor | None) -> None:
    if drive.ndim != 2 or lateral.ndim != 2 or lateral.shape != (drive.shape[0],) * 2:
        raise ValueError(
            f"expected drive [K, N] and lateral [K, K], got drive {list(drive.shape)} and lateral {list(lateral.shape)}"
        )
    if not drive.is_floating_point() or drive.dtype != lateral.dtype:
        raise ValueError(f"expected drive and lateral in one floating dtype, got {drive.dtype} and {lateral.dtype}")
    for name, values in (("drive", drive), ("lateral", lateral)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if start is not None:
        if start.shape != drive.shape or start.dtype != drive.dtype:
            raise ValueError(
                f"start: expected {list(drive.shape)} of {drive.dtype}, got {list(start.shape)} of {start.dtype}"
            )
        if not bool((start.isfinite() & (start >= 0)).all()):
            raise ValueError("start: expected finite values that are not negative, got others")
