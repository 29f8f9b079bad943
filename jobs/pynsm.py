"""The authors' library, `pynsm` 1.0.1: its module and the training loop of its example, for benchmarks and comparison.

Its projection is the ReLU: without it its iteration does not solve the nonnegative problem at all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.reporting import MissingError

CHANNELS = 50
"""Channels of the example."""

RATE, TAU = 0.05, 0.1
"""ρ and τ' of the example. One of its steps is one of ours at η = 4ρ/K and τ = 2τ'."""

ITERATIONS = 40
"""Iterations of the example's dynamics."""


def require_pynsm() -> None:
    """Raise MissingError where the library is not installed."""
    try:
        import pynsm  # noqa: F401
    except ImportError:
        raise MissingError(
            "pynsm is not installed: `pip install --no-deps pynsm==1.0.1`, or `make test`, which installs it"
        ) from None


def convolution(weight: Tensor) -> nn.Conv2d:
    """An encoder with these weights [K, C, k, k]."""
    channels, in_channels, kernel_size, _ = weight.shape
    encoder = nn.Conv2d(in_channels, channels, kernel_size, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(weight)
    return encoder


def similarity_matching(
    encoder: nn.Module, lateral: Tensor, *, step: float, iterations: int = ITERATIONS, tau: float = TAU
) -> Any:
    """Its module.

    Parameters
    ----------
    encoder: images → maps of K channels.
    lateral: [K, K], M.
    step: of its projected gradient; at or above 2/λmax(M) it may diverge.
    """
    import pynsm

    model = pynsm.SimilarityMatching(
        encoder=encoder,
        out_channels=len(lateral),
        tau=tau,
        iteration_projection=F.relu,
        iteration_lr=step,
        max_iterations=iterations,
    )
    with torch.no_grad():
        model.competitor.weight.copy_(lateral)
    return model


class PynsmTraining:
    """The training loop of the example: SGD at rate ρ on the loss of a module whose encoder is a convolution."""

    def __init__(self, model: Any, rate: float) -> None:
        self.model, self.optimiser = model, torch.optim.SGD(model.parameters(), lr=rate)

    def learn(self, batch: Tensor) -> None:
        """One step on images [B, C, H, W]."""
        y = self.model(batch)
        loss = self.model.loss(batch, y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    @property
    def feedforward(self) -> Tensor:
        """W [K, C, k, k]."""
        weight: Tensor = self.model.encoder.weight
        return weight.detach()

    @property
    def lateral(self) -> Tensor:
        """M [K, K]."""
        weight: Tensor = self.model.competitor.weight
        return weight.detach()
