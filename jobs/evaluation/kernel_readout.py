"""A readout in closed form that is not linear: Gaussian kernel ridge, on landmarks where labels are many.

    k(f, l) = exp(−w ‖φ(f) − φ(l)‖² / s),   s the median squared distance of labelled images
    scores = t̄ + Σ_j k(f, l_j) a_j,   a = argmin Σ_n ‖Σ_j k(f_n, l_j) a_j − (t_n − t̄)‖² + ν aᵀ K a,   K = [k(l_i, l_j)]

With every labelled image a landmark, (K + ν) a = t − t̄: kernel ridge regression (Saunders, Gammerman & Vovk 1998).
With m of n images, (Σ k kᵀ + ν K) a = Σ k (t − t̄), k the m kernels of an image: the Nyström approximation (Williams &
Seeger 2001). These normal equations are solved by conjugate gradients to a residual, preconditioned as in FALKON
(Rudi, Carratino & Rosasco 2017); forming Σ k kᵀ would take several times as long.

φ is the scaling of the ridge readout, with the exponent chosen there. Width and penalty are chosen on held-out images.
Memory beside the features: n m values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jobs.evaluation.readouts import ROWS, Scaling
from simmatch.labels import check_labels, one_hot
from simmatch.readout import accuracy, solve_ridge
from simmatch.seeding import seeded

WIDTHS = (0.5, 1.0, 2.0)
"""w that may be chosen where every labelled image is a landmark; at the median distance k = exp(−w)."""

PENALTIES = (0.1, 0.01)
"""ν that may be chosen, where k(f, f) = 1; as a sum over images it needs no change with their number."""

LANDMARKS = 10_000
"""Most landmarks."""

MEDIAN_IMAGES = 1000
"""Landmarks, the first ones, whose distances the median is taken of."""

RESIDUAL, ITERATIONS = 1e-4, 50
"""Of conjugate gradients: relative residual of the preconditioned equations, and most iterations."""


@dataclass(frozen=True)
class KernelReadout:
    """A kernel readout: scores = k(f, landmarks) A + t̄.

    Attributes
    ----------
    landmarks: [m, F], scaled; rate: w / s; matrix: [m, classes]; bias: [classes]; width: w; penalty: ν.
    """

    scaling: Scaling
    landmarks: Tensor
    rate: float
    matrix: Tensor
    bias: Tensor
    width: float
    penalty: float

    def scores(self, features: Tensor) -> Tensor:
        """[N, classes]."""
        parts = torch.split(features, ROWS)
        return (
            torch.cat([gaussian(self.scaling(part), self.landmarks, self.rate) @ self.matrix for part in parts])
            + self.bias
        )

    @property
    def parameters(self) -> int:
        return self.landmarks.numel() + self.matrix.numel() + self.bias.numel()


def gaussian(first: Tensor, second: Tensor, rate: float) -> Tensor:
    """exp(−rate ‖a_i − b_j‖²) of a [N, F] and b [M, F]: [N, M]."""
    lengths = first.square().sum(dim=1, keepdim=True) + second.square().sum(dim=1)
    return lengths.addmm_(first, second.T, alpha=-2.0).clamp_(min=0.0).mul_(-rate).exp_()


def median_distance(scaled: Tensor) -> float:
    """Median of ‖a_i − a_j‖², i < j, of the first images of a [N, F]; 1 where all are equal."""
    squares = torch.pdist(scaled[:MEDIAN_IMAGES]).square()
    return (float(squares.median()) if len(squares) else 0.0) or 1.0


def kernel_path(
    labelled: tuple[Tensor, Tensor],
    num_classes: int,
    scaling: Scaling,
    width: float,
    *,
    penalties: Sequence[float] = PENALTIES,
    most: int = LANDMARKS,
) -> list[KernelReadout]:
    """Kernel readouts of labelled (features [N, F], labels [N]), one for every penalty.

    Parameters
    ----------
    scaling, width: φ and w.
    most: landmarks, drawn from the labelled images where those are more.

    Raises
    ------
    ValueError
        A label out of range.
    """
    features, labels = labelled
    count, exact = len(features), len(features) <= most
    order = torch.arange(count) if exact else torch.randperm(count, generator=seeded("landmarks", 0))[:most]
    landmarks = scaling(features[order])
    rate = width / median_distance(landmarks)
    check_labels(labels, num_classes, len(features))
    targets = one_hot(labels, num_classes, features).T.contiguous()  # its layout decides how sums round
    bias = targets.mean(dim=0)
    square = gaussian(landmarks, landmarks, rate).fill_diagonal_(1.0)
    if exact:
        solutions = _by_factor(square, targets - bias, penalties)
    else:
        kernel = features.new_empty(count, most)
        for part, into in zip(torch.split(features, ROWS), torch.split(kernel, ROWS), strict=True):
            into.copy_(gaussian(scaling(part), landmarks, rate))
        solutions = _by_gradients(kernel, square, targets - bias, penalties)
    return [
        KernelReadout(scaling, landmarks, rate, matrix, bias, width, penalty)
        for matrix, penalty in zip(solutions, penalties, strict=True)
    ]


def _by_factor(square: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """(K + ν)⁻¹ t, a factorisation each; overwrites K."""
    solutions, before = [], 0.0
    for penalty in penalties:
        solutions.append(solve_ridge(square, targets, penalty - before))
        before = penalty
    return solutions


def _by_gradients(kernel: Tensor, square: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """(⟨k kᵀ⟩ + λ K)⁻¹ ⟨k t⟩, λ = ν / N, for k [N, m], K [m, m] and t [N, classes]; overwrites K.

    K = Uᵀ U and U Uᵀ / m + λ = Rᵀ R, as if the landmarks were all images; a = U⁻¹ R⁻¹ v, and the equations for v have a
    matrix near the identity. Rounding of k, m ε at most, is added to the diagonal of K.
    """
    size = len(square)
    square.diagonal().add_(size * torch.finfo(square.dtype).eps)
    factor = torch.linalg.cholesky(square).mT.contiguous()
    torch.mm(factor, factor.mT, out=square).div_(size)
    right = _transposed_times(kernel, targets) / len(kernel)
    solutions = []
    for penalty in penalties:
        shifted = square.clone()
        shifted.diagonal().add_(penalty / len(kernel))
        root = torch.linalg.cholesky(shifted).mT.contiguous()
        equations = _Equations(kernel, factor, root, penalty / len(kernel))
        solutions.append(equations.coefficients(equations.solve(right)))
    return solutions


@dataclass(frozen=True)
class _Equations:
    """Preconditioned normal equations with k, U, R and λ of `_by_gradients`."""

    kernel: Tensor
    factor: Tensor
    root: Tensor
    shrinkage: float

    def coefficients(self, v: Tensor) -> Tensor:
        """a = U⁻¹ R⁻¹ v."""
        return _solve(self.factor, _solve(self.root, v))

    def times(self, v: Tensor) -> Tensor:
        """R⁻ᵀ (U⁻ᵀ ⟨k kᵀ⟩ U⁻¹ + λ) R⁻¹ v."""
        inner = _solve(self.root, v)
        outer = _transposed_times(self.kernel, self.kernel @ _solve(self.factor, inner)) / len(self.kernel)
        return _solve_transposed(self.root, _solve_transposed(self.factor, outer).add_(inner, alpha=self.shrinkage))

    def solve(self, right: Tensor) -> Tensor:
        """v for ⟨k t⟩, by conjugate gradients, column by column of t; warns where they end above `RESIDUAL`."""
        residual = _solve_transposed(self.root, _solve_transposed(self.factor, right))
        v, direction = torch.zeros_like(residual), residual.clone()
        squared = first = residual.square().sum(dim=0)
        tiny = torch.finfo(right.dtype).tiny
        for _ in range(ITERATIONS):
            if bool((squared <= RESIDUAL**2 * first).all()):
                return v
            change = self.times(direction)
            step = squared / (direction * change).sum(dim=0).clamp(min=tiny)
            v += step * direction
            residual -= step * change
            before, squared = squared, residual.square().sum(dim=0)
            direction = residual + squared / before.clamp(min=tiny) * direction
        worst = float((squared / first.clamp(min=tiny)).max().sqrt())
        warnings.warn(f"kernel readout: relative residual {worst:.1e} after {ITERATIONS} iterations", stacklevel=2)
        return v


def _transposed_times(kernel: Tensor, right: Tensor) -> Tensor:
    """kᵀ r for k [N, m] and a few columns r; ten times as fast as `kernel.T @ right` on a CPU."""
    return (right.T @ kernel).T.contiguous()


def _solve(upper: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(upper, right, upper=True)
    return solution


def _solve_transposed(upper: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    return solution


def choose_kernel(
    labelled: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    num_classes: int,
    scaling: Scaling,
    *,
    widths: Sequence[float] = WIDTHS,
    penalties: Sequence[float] = PENALTIES,
    most: int = LANDMARKS,
) -> tuple[KernelReadout, float]:
    """The kernel readout that is best on held-out (features, labels), and its accuracy there; of equals the first.

    Parameters as in `kernel_path`.
    """
    best: tuple[KernelReadout, float] | None = None
    for width in widths:
        path = kernel_path(labelled, num_classes, scaling, width, penalties=penalties, most=most)
        # the kernels of held-out images once for all penalties
        matrices = torch.cat([each.matrix for each in path], dim=1)
        joint = replace(path[0], matrix=matrices, bias=path[0].bias.repeat(len(path))).scores(held_out[0])
        for each, part in zip(path, joint.chunk(len(path), dim=1), strict=True):
            right = accuracy(part, held_out[1])
            if best is None or right > best[1]:
                best = each, right
    assert best is not None
    return best
