"""The dynamics on a GPU, where all channels are on the device: Triton kernels behind one contract.

    coordinate    greedy coordinate descent, a warp a column: whatever is solved to a tolerance
    gradient      accelerated projected gradient, a tile of columns on chip for all iterations: K ≤ 128, the fixed
                  number of iterations of evaluation
    certificate   the residual that is reported, from a product M y − d of its own

Each has its slow counterpart in `simmatch.kernels.reference`. Columns are rows here, [N, K], because a kernel takes
columns one by one or by the tile. Triton is imported where a kernel is first used.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.kernels.system import System

__all__ = ["Found", "System", "installed", "select", "solve", "supports"]

FUSED_CHANNELS = 128
"""Channels whose M, as two float16 matrices, fits beside a tile in a multiprocessor's shared memory and registers."""

COORDINATE_CHANNELS = 4096
"""Channels that fit into the registers of the warps of one column."""

LEAST_TOLERANCE = 1e-5
"""Least residual that float32 is asked for."""


@dataclass(frozen=True)
class Found:
    """What the kernels return.

    Attributes
    ----------
    y: [N, K].
    iterations: [N], int32; of coordinate descent in units of K moves, rounded up.
    residual: [N], certified.
    """

    y: Tensor
    iterations: Tensor
    residual: Tensor


@cache
def installed() -> bool:
    """Whether Triton is."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> int:
    """Major number of a CUDA device's compute capability: 8 for A100, 9 for H100 and H200."""
    return torch.cuda.get_device_capability(device)[0]


def supports(solver: str, channels: int, dtype: torch.dtype, tolerance: float) -> str | None:
    """Why a kernel cannot take this problem, or None where it can; tolerance 0 is a fixed number of iterations."""
    if not installed():
        return "Triton is not installed"
    if dtype != torch.float32:
        return f"kernels compute in float32, got {dtype}"
    if 0 < tolerance < LEAST_TOLERANCE:
        return f"kernels reach a tolerance of {LEAST_TOLERANCE:g}, got {tolerance:g}"
    if solver == "coordinate_descent":
        if tolerance == 0:
            return "coordinate descent has no fixed number of iterations"
        most = COORDINATE_CHANNELS
    elif solver == "accelerated":
        most = FUSED_CHANNELS
    else:
        return f"no kernel for {solver}"
    return None if channels <= most else f"the kernel of {solver} takes up to {most} channels, got {channels}"


def select(config: DynamicsConfig, drive: Tensor) -> str | None:
    """The kernel for a drive [K, N] all of whose channels are on its device; None where torch has to do it.

    `auto`: coordinate descent; where the number of iterations is fixed, accelerated gradient, whose registers and
    shared memory are laid out for the tensor cores of capability 9.
    """
    if drive.device.type != "cuda":
        return None
    solver = config.solver
    if solver == "auto":
        solver = "coordinate_descent" if config.tolerance > 0 else "accelerated"
    found = capability(drive.device)
    if found < 8 or (solver == "accelerated" and found != 9):
        return None
    return solver if supports(solver, drive.shape[0], drive.dtype, config.tolerance) is None else None


def solve(solver: str, drive: Tensor, system: System, config: DynamicsConfig, start: Tensor | None = None) -> Found:
    """Solve every column by one of the kernels; nothing here waits for the device.

    Parameters
    ----------
    solver: as `select` says.
    drive: [N, K], contiguous or the transpose of what is; not finite where it is not: then neither is the residual.
    config: tolerance (0: exactly `max_iterations`), iterations, looks.
    start: [N, K], y ≥ 0 to begin at. None: 0.
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
    else:  # a warp reads a column: it had better lie together
        y, iterations = coordinate.solve(transposed(drive.T), system, tolerance, limit)
        y = transposed(y).T
    residual = certificate.residuals(drive, y, system)
    if tolerance > 0:  # what is left by rounding, or a start to begin at: moves in float32, from a fresh gradient
        left = residual.masked_fill(iterations >= limit, 0.0)
        coordinate.solve(drive, system, tolerance, limit, start=y, iterations=iterations, residual=left)
        residual = certificate.residuals(drive, y, system, residual=residual, tolerance=tolerance)
    return Found(y, iterations, residual)
