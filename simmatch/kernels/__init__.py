"""Triton kernels that solve the dynamics on one GPU which holds all channels.

    coordinate    greedy coordinate descent, one warp per column: for everything solved to a tolerance
    gradient      accelerated projected gradient, a tile of columns stays on chip for all iterations: for up to 128
                  channels and the fixed number of iterations of evaluation
    certificate   the reported residual, from a separate product M y − d

Each has a slow reference in `simmatch.kernels.reference`. Columns of the problem are rows here, [N, K], because a
kernel processes single columns or tiles of columns. Triton is imported when a kernel is first used.

Kernels are launched with `enable_fp_fusion=True`: products and sums fused as measured, whatever Triton's default is.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.kernels.system import System

__all__ = ["KernelSolution", "System", "installed", "select", "solve", "supports"]

FUSED_CHANNELS = 128
"""Most channels for which M, as two float16 matrices, and a tile fit into a multiprocessor's memory and registers."""

COORDINATE_CHANNELS = 4096
"""Most channels that fit into the registers of the warps of one column."""

LEAST_TOLERANCE = 1e-5
"""Smallest tolerance for which the kernels, which compute in float32, are used."""


@dataclass(frozen=True)
class KernelSolution:
    """What `solve` returns, on the device.

    Attributes
    ----------
    y: [N, K], activities.
    iterations: [N], int32; for coordinate descent in units of K moves, rounded up.
    residual: [N], computed by the kernel `certificate`.

    >>> KernelSolution(torch.zeros(7, 4), torch.zeros(7, dtype=torch.int32), torch.zeros(7)).y.shape
    torch.Size([7, 4])
    """

    y: Tensor
    iterations: Tensor
    residual: Tensor


@cache
def installed() -> bool:
    """Whether Triton is installed.

    >>> installed() == (importlib.util.find_spec("triton") is not None)
    True
    """
    return importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> int:
    """Major number of the compute capability of a CUDA device: 8 for A100, 9 for H100 and H200."""
    return torch.cuda.get_device_capability(device)[0]


def supports(solver: str, channels: int, dtype: torch.dtype, tolerance: float) -> str | None:
    """The reason why no kernel solves a problem, or None if one does.

    Parameters
    ----------
    solver: as in `DynamicsConfig.solver`.
    channels: K.
    dtype: of the drive.
    tolerance: as in `DynamicsConfig.tolerance`; 0 stands for a fixed number of iterations.

    >>> supports("projected_gradient", 64, torch.float32, 1e-2) is None
    False
    """
    if not installed():
        return "Triton is not installed"
    if dtype != torch.float32:
        return f"kernels compute in float32, got {dtype}"
    if 0 < tolerance < LEAST_TOLERANCE:
        return f"kernels need a tolerance of at least {LEAST_TOLERANCE:g}, got {tolerance:g}"
    if solver == "coordinate_descent":
        if tolerance == 0:
            return "coordinate descent has no fixed number of iterations"
        most = COORDINATE_CHANNELS
    elif solver == "accelerated":
        most = FUSED_CHANNELS
    else:
        return f"there is no kernel for {solver}"
    return None if channels <= most else f"the kernel of {solver} takes up to {most} channels, got {channels}"


def select(config: DynamicsConfig, drive: Tensor) -> str | None:
    """The solver whose kernel fits a drive [K, N] with all channels on one device, or None if there is no kernel.

    `auto` selects coordinate descent, or accelerated gradient where the number of iterations is fixed. The kernel of
    the latter is laid out for the tensor cores of compute capability 9.

    >>> select(DynamicsConfig(), torch.zeros(64, 1000)) is None  # not on a GPU
    True
    """
    if drive.device.type != "cuda":
        return None
    solver = config.solver
    if solver == "auto":
        solver = "coordinate_descent" if config.tolerance > 0 else "accelerated"
    major = capability(drive.device)
    if major < 8 or (solver == "accelerated" and major != 9):
        return None
    return solver if supports(solver, drive.shape[0], drive.dtype, config.tolerance) is None else None


def solve(
    solver: str, drive: Tensor, system: System, config: DynamicsConfig, start: Tensor | None = None
) -> KernelSolution:
    """Solve every column with one of the kernels; the host does not wait for the device.

    Parameters
    ----------
    solver: what `select` returned.
    drive: [N, K], contiguous, or the transpose of a contiguous tensor. Columns that are not finite get a residual that
        is not finite.
    system: M, ε and the bound of λmax.
    config: `tolerance` (0: exactly `max_iterations`), `max_iterations`, `check_every`.
    start: [N, K], y ≥ 0 to start from. None: zero.
    """
    from simmatch.kernels import certificate, coordinate, gradient
    from simmatch.kernels.transpose import transposed

    tolerance, limit = config.tolerance, config.max_iterations
    if start is not None:
        start = drive.new_empty_strided(drive.shape, drive.stride()).copy_(start)
    if solver == "accelerated":
        y, iterations = gradient.solve(drive, system, tolerance, limit, check_every=config.check_every, start=start)
    elif start is not None:
        y, iterations = start, torch.zeros(len(drive), dtype=torch.int32, device=drive.device)
    elif drive.is_contiguous():
        y, iterations = coordinate.solve(drive, system, tolerance, limit)
    else:  # a warp reads a column, which should be contiguous
        y, iterations = coordinate.solve(transposed(drive.T), system, tolerance, limit)
        y = transposed(y).T
    residual = certificate.residuals(drive, y, system)
    if tolerance > 0:  # columns above the tolerance, from rounding or a start: more moves, from a fresh gradient
        left = residual.masked_fill(iterations >= limit, 0.0)
        coordinate.solve(drive, system, tolerance, limit, start=y, iterations=iterations, residual=left)
        residual = certificate.residuals(drive, y, system, residual=residual, tolerance=tolerance)
    return KernelSolution(y, iterations, residual)
