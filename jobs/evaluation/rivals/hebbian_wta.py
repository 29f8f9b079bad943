"""A Hebbian layer with soft winner-take-all, on normalised and whitened patches.

    u = W x̃,  y = softmax(u / T),  ΔW_k ∝ ⟨s_k y_k (x̃ − u_k W_k)⟩

with s = 1, or s = −1 for all but the winner (`anti_hebbian`).

Sources: Journé, Rodriguez, Guo & Moraitis, "Hebbian deep learning without feedback" (2023), SoftHebb; for anti-Hebbian
losers Krotov & Hopfield, "Unsupervised learning by competing hidden units" (2019). Two changes, so that it needs no
rate per data set: a neuron's step is an average over what it answered to, and its weights are brought to norm 1 after
each step, where Oja's decay leads winners but not losers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.patches import PATCHES, PatchView, Preprocessing
from jobs.evaluation.rivals.visits import enough_passes

BATCH, PASSES, UPDATES = 512, 5, 200

RATE = 0.1
"""Share of the average change that a neuron takes at the first step; falls linearly to 0."""


@dataclass(frozen=True)
class HebbianSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    temperature: T, for patches of unit variance in each direction.
    activation: relu: max(0, u); triangle: max(0, u − mean over channels).
    anti_hebbian: losers move away from the patch.
    """

    temperature: float = 0.1
    activation: Literal["relu", "triangle"] = "relu"
    anti_hebbian: bool = False


def soft_competition(weights: Tensor, patches: Tensor, temperature: float, anti_hebbian: bool) -> Tensor:
    """ΔW [K, P] for W [K, P] and x̃ [n, P], each row divided by its neuron's sum of y."""
    u = patches @ weights.T
    y = torch.softmax(u / temperature, dim=1)
    signed = y
    if anti_hebbian:
        loses = torch.ones_like(y, dtype=torch.bool).scatter_(1, u.argmax(dim=1, keepdim=True), False)
        signed = torch.where(loses, -y, y)
    change = signed.T @ patches - (signed * u).sum(dim=0).unsqueeze(1) * weights
    return change / y.sum(dim=0).clamp(min=torch.finfo(y.dtype).tiny).unsqueeze(1)


class HebbianWTA(Convolutional[HebbianSettings]):
    """Learns K filters of norm 1 from `PATCHES` patches in `PASSES` passes, or `UPDATES` updates."""

    name = "hebbian_wta"
    candidates: ClassVar[tuple[HebbianSettings, ...]] = (
        HebbianSettings(contrast_floor=0.03),
        HebbianSettings(activation="triangle", contrast_floor=0.03),
        HebbianSettings(anti_hebbian=True, contrast_floor=0.03),
        HebbianSettings(temperature=0.25, contrast_floor=0.03),
    )

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        channels = self.shape.channels
        patches = view.sample(images, PATCHES, generator)
        filters = F.normalize(torch.randn(channels, patches.shape[1], generator=generator), dim=1)
        passes = enough_passes(len(patches), BATCH, PASSES, UPDATES)
        orders = [torch.randperm(len(patches), generator=generator) for _ in range(passes)]
        batches = [batch for order in orders for batch in torch.split(order, BATCH)]
        for step, batch in enumerate(batches):
            change = soft_competition(filters, patches[batch], self.settings.temperature, self.settings.anti_hebbian)
            filters = F.normalize(filters + RATE * (1 - step / len(batches)) * change, dim=1)
        return Learnt(filters, torch.zeros(channels), filters.numel())

    def activity(self, columns: Tensor) -> Tensor:
        if self.settings.activation == "triangle":
            columns -= columns.mean(dim=0)
        return columns.clamp_(min=0.0)
