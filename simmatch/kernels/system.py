"""M as the kernels read it: padded to a power of two, rows over their diagonal entry, halves of float16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEAST_BLOCK = 32
"""Channels that a warp holds at least, one a thread."""


@dataclass(frozen=True, eq=False)
class System:
    """(M + εI) y = d, all of it on one device; nothing here waits for it.

    Attributes
    ----------
    lateral: [K, K], M in float32.
    ridge: ε.
    bound: λ̂ ≥ λmax(M) + ε.
    """

    lateral: Tensor
    ridge: float
    bound: float

    @property
    def block(self) -> int:
        """K as the kernels see it: the next power of two."""
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
        """M_ii [BLOCK], without ε: what the residual is defined with."""
        diagonal = self.lateral.new_zeros(self.block)
        diagonal[: self.lateral.shape[0]] = self.lateral.diagonal()
        return diagonal

    @cached_property
    def inverse(self) -> Tensor:
        """1 / (M_ii + ε) [BLOCK]; 0 where padded, and where nothing holds the channel."""
        held = self.matrix.diagonal()
        return torch.where(held > 0, 1 / held, 0.0)

    @cached_property
    def rows(self) -> Tensor:
        """Row i of M + εI over its diagonal entry, [BLOCK, BLOCK]."""
        return self.matrix * self.inverse.unsqueeze(1)

    @cached_property
    def halves(self) -> Tensor:
        """c (M + εI) = hi + lo in float16, [2, BLOCK, BLOCK]; c is a power of two that brings the diagonal near 1."""
        scaled = self.matrix * self.factor
        high = scaled.half()
        return torch.stack([high, (scaled - high).half()])

    @cached_property
    def factor(self) -> Tensor:
        """c, a power of two, as a tensor."""
        largest = self.diagonal.amax()
        return torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0)
