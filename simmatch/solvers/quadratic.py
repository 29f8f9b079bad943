"""The dynamics as a function: a nonnegative quadratic program with many right-hand sides.

A layer does not check its own weights, and records the residual. `solve` is for any M: it checks its arguments, raises
an error if there is no minimum, and warns when the tolerance was not reached.
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
    """A solver or a fit ended above its tolerance.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     solution = solve(torch.ones(2, 1), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), DynamicsConfig(
    ...         solver="projected_gradient", tolerance=1e-6, max_iterations=1))
    >>> caught[0].category is ConvergenceWarning
    True
    """


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
    `Solution`: y [K, N], num_iters, residual [N].

    Raises
    ------
    ValueError
        Shapes or dtypes do not match, values are not finite, or M is not symmetric or not positive semidefinite.

    Warns
    -----
    ConvergenceWarning
        Some column ended above `config.tolerance`.

    Examples
    --------
    The second channel is driven below its threshold:

    >>> solution = solve(torch.tensor([[2.0], [-1.0]]), torch.eye(2))
    >>> solution.y
    tensor([[2.0000],
            [0.0000]])
    >>> solve(torch.ones(64, 1000), torch.eye(64)).residual.shape
    torch.Size([1000])
    """
    config = config or DynamicsConfig()
    _validate(drive, lateral, start)
    check_lateral(lateral)
    if drive.shape[1] == 0:
        return Solution(drive.clone(), 0, drive.new_zeros(0))
    # M and every column of d are scaled by exact powers of two to be near 1, so that no finite input overflows
    drive_scale, lateral_scale = _power_of_two(drive.abs().amax(dim=0)), _power_of_two(lateral.diagonal().amax())
    rows = Rows.all(lateral.shape[0])
    scaled = (lateral / lateral_scale).to(lateral.dtype)
    bound = certify_afresh(scaled, rows, ridge=config.ridge)
    if config.step is not None:
        config = config.model_copy(update={"step": config.step * float(lateral_scale)})
    if start is not None:
        start = (start / (drive_scale / lateral_scale)).to(drive.dtype)
    solution = Dynamics(config, rows, alone=True).solve(
        (drive / drive_scale).to(drive.dtype), scaled, bound, start=start
    )
    unscaled = torch.where(solution.y > 0, solution.y * (drive_scale / lateral_scale), 0.0)
    y = unscaled.clamp(max=torch.finfo(drive.dtype).max).to(drive.dtype)
    worst = float(solution.residual.amax())
    if config.tolerance > 0 and not worst <= config.tolerance:
        warnings.warn(
            f"the dynamics reached a residual of {worst:.2e} after {solution.num_iters} iterations, "
            f"above the tolerance {config.tolerance:.2e}; raise max_iterations (now {config.max_iterations})",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Solution(y, solution.iterations, solution.residual)


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two that is at most each value, in float64; 1 for 0."""
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
            raise ValueError("start: expected finite, nonnegative values, got others")
