"""Triton kernels that solve the dynamics on one GPU which holds all channels.

    coordinate    greedy coordinate descent, one warp per column: for everything solved to a tolerance
    gradient      accelerated projected gradient, a tile of columns stays on chip for all iterations: for up to 256
                  channels and the fixed number of iterations of evaluation
    certificate   the reported residual, from a separate product M y − d

`KERNELS` is the table from which `select` chooses. Each kernel has a slow reference in `simmatch.kernels.reference`.
Columns of the problem are rows here, [N, K], because a kernel processes single columns or tiles of columns. Triton is
imported when a kernel is first used.

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

LEAST_TOLERANCE = 1e-5
"""Smallest tolerance for which the kernels, which compute in float32, are used."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes.

    Attributes
    ----------
    solver: as in `DynamicsConfig.solver`.
    fixed: whether it can run a fixed number of iterations.
    channels: the most that fit on chip.
    capabilities: smallest and largest major number of the compute capability of a device; None: any larger one.

    >>> [(kernel.solver, kernel.channels) for kernel in KERNELS]
    [('coordinate_descent', 4096), ('accelerated', 256)]
    """

    solver: str
    fixed: bool
    channels: int
    capabilities: tuple[int, int | None]

    def refuses(self, channels: int, tolerance: float, capability: int | None) -> str | None:
        """The reason why it does not take a problem, or None if it does; for the arguments see `supports`."""
        if tolerance == 0 and not self.fixed:
            return f"{self.solver.replace('_', ' ')} has no fixed number of iterations"
        if channels > self.channels:
            return f"the kernel of {self.solver} takes up to {self.channels} channels, got {channels}"
        least, most = self.capabilities
        if capability is not None and not least <= capability <= (capability if most is None else most):
            expected = f"{least} or more" if most is None else f"{least} to {most}" if most > least else f"{least}"
            return f"the kernel of {self.solver} needs compute capability {expected}, got {capability}"
        return None


KERNELS = (
    Kernel("coordinate_descent", fixed=False, channels=4096, capabilities=(8, None)),
    Kernel("accelerated", fixed=True, channels=256, capabilities=(9, 9)),
)
"""The first that takes a problem is the one that `solver: auto` selects. Measured on compute capability 9 (H200):
coordinate descent is the faster one at equal residual from 128 channels on, and serves all tolerances; gradient steps
serve a fixed number of iterations, and are laid out for the tensor cores of that capability alone. Not measured:
coordinate descent on other capabilities, and gradient steps for 129 to 256 channels, where an estimate gives 3 to 10
times the rate of the plain loop in torch."""


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
def capability(device: torch.device) -> int | None:
    """Major number of the compute capability of a CUDA device: 8 for A100, 9 for H100 and H200; else None.

    >>> capability(torch.device("cpu")) is None
    True
    """
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def supports(
    solver: str, channels: int, dtype: torch.dtype, tolerance: float, capability: int | None = None
) -> str | None:
    """The reason why no kernel solves a problem, or None if one does.

    Parameters
    ----------
    solver: as in `DynamicsConfig.solver`.
    channels: K.
    dtype: of the drive.
    tolerance: as in `DynamicsConfig.tolerance`; 0 stands for a fixed number of iterations.
    capability: major number of the compute capability of the device; None: any.

    >>> supports("projected_gradient", 64, torch.float32, 1e-2) is None
    False
    """
    if not installed():
        return "Triton is not installed"
    if dtype != torch.float32:
        return f"kernels compute in float32, got {dtype}"
    if 0 < tolerance < LEAST_TOLERANCE:
        return f"kernels need a tolerance of at least {LEAST_TOLERANCE:g}, got {tolerance:g}"
    for kernel in KERNELS:
        if kernel.solver == solver:
            return kernel.refuses(channels, tolerance, capability)
    return f"there is no kernel for {solver}"


def select(config: DynamicsConfig, drive: Tensor) -> str | None:
    """The solver whose kernel fits a drive [K, N] with all channels on one device, or None if there is no kernel.

    >>> select(DynamicsConfig(), torch.zeros(64, 1000)) is None  # not on a GPU
    True
    """
    if drive.device.type != "cuda":
        return None
    problem = (drive.shape[0], drive.dtype, config.tolerance, capability(drive.device))
    asked = (kernel.solver for kernel in KERNELS if config.solver in ("auto", kernel.solver))
    return next((solver for solver in asked if supports(solver, *problem) is None), None)


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

    # Triton launches on the current device, whatever device its arguments are on
    with torch.cuda.device_of(drive):  # type: ignore[no-untyped-call]
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
