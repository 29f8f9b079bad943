"""What a kernel computes, as plain tensor operations: for tests of what stands around the kernels, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simmatch import kernels
from simmatch.config import DynamicsConfig

STEPS = 12


def solve(
    solver: str, drive: Tensor, system: kernels.System, config: DynamicsConfig, start: Tensor | None = None
) -> kernels.KernelSolution:
    """`STEPS` steps of projected gradient for drives [N, K]; NaN in a drive gives NaN in its residual alone."""
    channels = drive.shape[1]
    matrix, diagonal = system.matrix[:channels, :channels], system.diagonal[:channels]
    y = torch.zeros_like(drive) if start is None else start
    for _ in range(STEPS):
        y = (y - system.step * (y @ matrix - drive)).clamp(min=0.0)
    least = torch.minimum(diagonal * y, y @ matrix - drive).abs().amax(dim=1)
    iterations = torch.full((len(drive),), STEPS, dtype=torch.int32, device=drive.device)
    scale = drive.abs().amax(dim=1)
    return kernels.KernelSolution(y.nan_to_num(0.0), iterations, least / torch.where(scale == 0, 1.0, scale))


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve by this wherever all channels are on one device."""
    monkeypatch.setattr(kernels, "select", lambda config, drive: "accelerated")
    monkeypatch.setattr(kernels, "solve", solve)
