"""The lateral matrix in the formats that the kernels read: padded, scaled by its diagonal, and split into float16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEAST_BLOCK = 32
"""Smallest padded number of channels: one per thread of a warp."""


@dataclass(frozen=True, eq=False)
class System:
    """The matrix M + εI on one device; the host does not wait for the device.

    Attributes
    ----------
    lateral: [K, K], M in float32.
    ridge: ε, a number or a 0-d tensor on the device.
    bound: λ̂ ≥ λmax(M) + ε, likewise.

    >>> system = System(torch.eye(50), ridge=0.0, bound=1.0)
    >>> system.block, system.rows.shape, system.halves.shape
    (64, torch.Size([64, 64]), torch.Size([2, 64, 64]))
    """

    lateral: Tensor
    ridge: float | Tensor
    bound: float | Tensor

    @property
    def block(self) -> int:
        """K padded to the next power of two, at least 32."""
        return max(LEAST_BLOCK, 1 << (self.lateral.shape[0] - 1).bit_length())

    @cached_property
    def matrix(self) -> Tensor:
        """M + εI [BLOCK, BLOCK], zero where padded."""
        channels = self.lateral.shape[0]
        matrix = self.lateral.new_zeros(self.block, self.block)
        matrix[:channels, :channels] = self.lateral
        matrix.diagonal()[:channels].add_(self.ridge)
        return matrix

    @cached_property
    def diagonal(self) -> Tensor:
        """M_ii [BLOCK], without ε, as in the definition of the residual."""
        diagonal = self.lateral.new_zeros(self.block)
        diagonal[: self.lateral.shape[0]] = self.lateral.diagonal()
        return diagonal

    @cached_property
    def inverse(self) -> Tensor:
        """1 / (M_ii + ε) [BLOCK]; 0 where padded, and where M_ii + ε = 0."""
        diagonal = self.matrix.diagonal()
        return torch.where(diagonal > 0, 1 / diagonal, 0.0)

    @cached_property
    def step(self) -> Tensor:
        """1/λ̂ [1], which a kernel reads by pointer."""
        return self.lateral.new_ones(1) / self.bound

    @cached_property
    def rows(self) -> Tensor:
        """Rows of M + εI, each divided by its diagonal entry: [BLOCK, BLOCK]."""
        return self.matrix * self.inverse.unsqueeze(1)

    @cached_property
    def halves(self) -> Tensor:
        """c (M + εI) as a sum of two float16 matrices, [2, BLOCK, BLOCK]; c is `factor`."""
        scaled = self.matrix * self.factor
        high = scaled.half()
        return torch.stack([high, (scaled - high).half()])

    @cached_property
    def factor(self) -> Tensor:
        """c, the power of two that scales the largest diagonal entry to [1, 2), as a tensor."""
        largest = self.diagonal.amax()
        return torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0)
