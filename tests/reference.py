"""Slow oracles, written from the formulas and not from the code: loops, explicit matrices, other libraries.

Everything here works on float64 NumPy arrays or torch tensors of toy size and shares no code with `simmatch`.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor

from simmatch.extent import Extent

# -- nonnegative quadratic programs ------------------------------------------------------------------------------------


def nnls_columns(drive: Tensor, lateral: Tensor) -> Tensor:
    """argmin over y ≥ 0 of ½ yᵀMy − yᵀd, column by column: M = LLᵀ makes it ½‖Lᵀy − L⁻¹d‖², an NNLS problem."""
    factor = np.linalg.cholesky(lateral.double().numpy())
    targets = scipy.linalg.solve_triangular(factor, drive.double().numpy(), lower=True)
    columns = [scipy.optimize.nnls(factor.T, target)[0] for target in targets.T]
    return torch.from_numpy(np.stack(columns, axis=1))


def relative_residual(drive: Tensor, lateral: Tensor, y: Tensor) -> Tensor:
    """max_i |min(M_ii y_i, (M y − d)_i)| / max|d| per column, 0/0 = 0, entry by entry in float64."""
    d, m, values = (part.double().numpy() for part in (drive, lateral, y))
    result = []
    for column in range(d.shape[1]):
        gradient = m @ values[:, column] - d[:, column]
        worst = max(abs(min(m[i, i] * values[i, column], gradient[i])) for i in range(m.shape[0]))
        largest = np.abs(d[:, column]).max()
        result.append(worst / largest if largest > 0 else 0.0)
    return torch.tensor(result, dtype=torch.float64)


def projected_gradient(drive: Tensor, lateral: Tensor, step: float, iterations: int) -> Tensor:
    """y ← relu(y − s(My − d)) from y = 0, in a plain loop."""
    y = torch.zeros_like(drive)
    for _ in range(iterations):
        y = (y - step * (lateral @ y - drive)).clamp(min=0.0)
    return y


def accelerated(drive: Tensor, lateral: Tensor, step: float, iterations: int, check_every: int) -> Tensor:
    """Nesterov's scheme in its textbook form, one column at a time, with gradient restart.

    y_next = relu(z − s∇(z)), z = y + β(y − y_prev), β = k/(k + 3), k counting from the last restart; at every
    `check_every`-th iteration ∇(y)·(y_next − y) > 0 restarts the momentum of the iteration that follows.
    """
    columns = []
    for d in drive.T:
        previous, y = torch.zeros_like(d), (step * d).clamp(min=0.0)
        k, restart = 1, False
        for iteration in range(1, iterations):
            k = 0 if restart else k
            z = y + k / (k + 3) * (y - previous)
            following = (z - step * (lateral @ z - d)).clamp(min=0.0)
            k += 1
            uphill = torch.dot(lateral @ y - d, following - y) > 0
            restart = iteration % check_every == 0 and bool(uphill)
            previous, y = y, following
        columns.append(y)
    return torch.stack(columns, dim=1)


def random_lateral(
    size: int, seed: int, *, condition: float = 100.0, largest: float = 1.0, signed: bool = False
) -> Tensor:
    """PSD matrix [size, size] of λmax `largest` and the given condition number; nonnegative unless `signed`.

    A Gram matrix of low rank has λmin = 0, so that adding λmax/(κ − 1) to its diagonal gives condition κ exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, size // 2)
    factors = torch.rand(size, rank, generator=generator, dtype=torch.float64)
    if signed:
        factors = factors - 0.5
    gram = factors @ factors.T
    top = float(torch.linalg.eigvalsh(gram)[-1])
    gram = gram + torch.eye(size, dtype=torch.float64) * top / (condition - 1)
    return gram * (largest / (top + top / (condition - 1)))


def random_drive(size: int, columns: int, seed: int) -> Tensor:
    """Drives [size, columns] of both signs, more often positive."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, columns, generator=generator, dtype=torch.float64) + 0.5


# -- patches -----------------------------------------------------------------------------------------------------------


def patch_matrix(images: Tensor, kernel_size: Extent, stride: Extent, padding: Extent) -> Tensor:
    """All patches [N, C·k·k], rows in the order of 'b h w', zero padding."""
    unfolded = F.unfold(images, kernel_size, stride=stride, padding=padding)  # [B, P, L]
    return unfolded.permute(0, 2, 1).reshape(-1, unfolded.shape[1])


def normalised(patches: Tensor, contrast_floor: float | None) -> Tensor:
    """Each patch less its mean, over its standard deviation or the floor; unchanged without a floor."""
    if contrast_floor is None:
        return patches
    rows = []
    for patch in patches.double().numpy():
        rows.append((patch - patch.mean()) / max(patch.std(), contrast_floor))
    return torch.from_numpy(np.stack(rows))


def inverse_root(covariance: np.ndarray) -> np.ndarray:
    """C^(-1/2) through Schur's method: no eigenvectors."""
    return np.linalg.inv(scipy.linalg.sqrtm(covariance).real)
