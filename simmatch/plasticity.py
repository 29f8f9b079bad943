"""The plasticity rules: changes of the weights from the statistics of a batch, as pure functions.

    ΔW = η (⟨y xᵀ⟩ − W)                            Hebbian, feedforward
    ΔM = (η/τ) (⟨y yᵀ⟩ − M)                        anti-Hebbian (M inhibits), lateral
    ΔV = (⟨y zᵀ⟩ − V ⟨z zᵀ⟩) diag(min(η/p̂, 1/p))   Hebbian, label; p̂ the running class frequency, p the batch's

⟨·⟩ is the mean over columns; for V it is the mean over labelled columns, so unlabelled images do not change V. Where
images have weights 0 ≤ w ≤ 1 it is the weighted mean, and η is multiplied by the largest weight: an image of weight 0
is as good as absent, and a batch of nothing but outliers changes little. A step therefore depends on the batch only
through sums and a count (`Statistics`). Sums from several ranks are added before
the step: one reduction per update, never a mean of means. Without the factor 1/p̂, V would learn num_classes times
more slowly than W. The limit 1/p prevents a batch with many images of one class from overshooting that class's mean
activity.

Source: Pehlevan, Sengupta & Chklovskii, "Why do similarity matching objectives lead to Hebbian/anti-Hebbian
networks?" (2018), online rules; Bahroun et al., arXiv:2308.02427, for convolution and supervision.
To add a rule, write a function with the signature of `similarity_matching` and add it to `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from simmatch.config import PlasticityConfig
from simmatch.seeding import folded, seeded, stream, uniform


@dataclass(frozen=True)
class Statistics:
    """Sums over the columns of one or more batches.

    Attributes
    ----------
    yx: [K_g, C, k, k], Σ y xᵀ.
    yy: [K_g, K], Σ y yᵀ, own rows.
    yz: [K_g, num_classes], Σ y zᵀ.
    zz: [num_classes, num_classes], Σ z zᵀ.
    count: number of columns in the sums; with weights, the sum of those of the columns, 0-d in float64.
    largest: the largest weight of an image, by which the rate is multiplied, 0-d in float64. None: 1.

    Statistics of several batches are added:

    >>> batch = Statistics(torch.ones(4, 1, 3, 3), torch.ones(4, 4), torch.ones(4, 10), torch.eye(10), count=36)
    >>> (batch + batch).count, float(batch.labelled)
    (72, 10.0)
    """

    yx: Tensor
    yy: Tensor
    yz: Tensor
    zz: Tensor
    count: int | Tensor
    largest: Tensor | None = None

    @property
    def labelled(self) -> Tensor:
        """Number of labelled columns, or 1 for none, so that the mean over none is 0; exact up to 2²⁴ in float32."""
        total = self.zz.diagonal().sum()
        return torch.where(total > 0, total, 1.0)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.yx + other.yx,
            self.yy + other.yy,
            self.yz + other.yz,
            self.zz + other.zz,
            self.count + other.count,
            None if self.largest is None or other.largest is None else self.largest.maximum(other.largest),
        )


@dataclass(frozen=True)
class Weights:
    """The weights of a layer, or changes to be added to them.

    Attributes
    ----------
    feedforward: [K_g, C, k, k], W.
    lateral: [K_g, K], M.
    label: [K_g, num_classes], V.

    >>> Weights(torch.zeros(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 10)).lateral.shape
    torch.Size([4, 4])
    """

    feedforward: Tensor
    lateral: Tensor
    label: Tensor


def draw_filter(seed: int, channel: int, draw: int, like: Tensor) -> Tensor:
    """Draw a row [C, k, k] of W: Gaussian, of expected squared norm 1, the same for any number of shards.

    Parameters
    ----------
    seed: of the layer.
    channel: number of the row.
    draw: 0 for the initial weights, the number of updates for the revival of a dead channel.
    like: [K_g, C, k, k], a tensor with the shape, dtype and device of W.

    >>> draw_filter(seed=0, channel=7, draw=0, like=torch.zeros(8, 3, 5, 5)).shape
    torch.Size([3, 5, 5])
    """
    generator, shape = seeded("feedforward", seed, channel, draw), like.shape[1:]
    row = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (row / math.sqrt(shape.numel())).to(like)


def revived_filters(seed: int, channels: Tensor, updates: int | Tensor, like: Tensor) -> Tensor:
    """Draw rows [n, C, k, k] of W anew: uniform entries, of expected squared norm 1, the same for any number of shards.

    Arithmetic on the device of `like`, with the same bits on every device; see `simmatch.seeding`.

    Parameters
    ----------
    seed: of the layer.
    channels: [n], numbers of the rows.
    updates: number of updates of the layer; a tensor is 0-d.
    like: [K_g, C, k, k], a tensor with the shape, dtype and device of W.

    >>> revived_filters(0, torch.tensor([7, 2]), 50, like=torch.zeros(8, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """
    shape = like.shape[1:]
    entries = torch.arange(shape.numel(), device=like.device)
    keys = folded(stream("revived", seed), updates, channels.unsqueeze(1), entries)
    rows = (2.0 * uniform(keys) - 1.0) * math.sqrt(3.0 / shape.numel())
    return rows.to(like.dtype).reshape(-1, *shape)


def dead_channels(silent: Tensor, inhibition: Tensor, config: PlasticityConfig) -> Tensor:
    """Which channels are dead: bool [K_g]. They were silent for `config.dead_after` updates, or have M_ii = 0.

    With η/τ = 1, M_ii becomes 0 after a single batch in which the channel is silent.

    Parameters
    ----------
    silent: [K_g], number of consecutive updates in which the channel was silent.
    inhibition: [K_g], M_ii.
    config: `dead_after`.

    >>> dead_channels(torch.tensor([0, 50, 0]), torch.tensor([1.0, 1.0, 0.0]), PlasticityConfig(dead_after=50))
    tensor([False,  True,  True])
    """
    return (silent >= config.dead_after) | (inhibition <= 0)


def settled_label(label: Tensor, yz: Tensor, zz: Tensor) -> Tensor:
    """Scale V to label-free activity: g V with g = ⟨C, V⟩ / ⟨V, V⟩, where C holds the class means of the activity.

    While labels drive the activities, V grows with them. It would then be too long for decoding, which compares V with
    label-free activity. g is the least-squares scale. Replacing V by the class means decodes worse (see `LOG.md`).

    Parameters
    ----------
    label: [K, num_classes], V of all channels.
    yz, zz: [K, num_classes] and [num_classes, num_classes], sums as in `Statistics`, over label-free activities.
        Classes without images are ignored; counts need not be whole numbers.

    >>> settled_label(2 * torch.eye(2), yz=torch.eye(2), zz=torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    counts = zz.diagonal()
    means, known = yz / torch.where(counts > 0, counts, 1.0), label * (counts > 0)
    return label * ((means * known).sum() / known.square().sum().clamp(min=torch.finfo(label.dtype).tiny))


def learning_rate(config: PlasticityConfig, update: int | Tensor) -> float | Tensor:
    """η of an update, counted from 0: lr / (1 + update / lr_decay_steps), but at least `lr_lowest`.

    From a 0-d tensor, where the rate decays, a 0-d tensor in float64: with the same bits, and without waiting for it.

    >>> learning_rate(PlasticityConfig(lr=0.1, lr_decay_steps=100), update=100)
    0.05
    """
    if config.lr_decay_steps is None:
        return config.lr
    if isinstance(update, Tensor):  # by tensors: torch divides numbers, or by numbers, through a rounded reciprocal
        steps = update.double()
        lr, decay_steps = (torch.full_like(steps, number) for number in (config.lr, config.lr_decay_steps))
        return (lr / (1.0 + steps / decay_steps)).clamp(min=config.lr_lowest)
    return max(config.lr / (1.0 + update / config.lr_decay_steps), config.lr_lowest)


def start_share(config: PlasticityConfig, updates: int) -> float:
    """Upper bound of the weight of the initial M₀ in M after `updates`: ∏(1 − η_u/τ) ≤ exp(−Σ η_u/τ).

    The sum is bounded by its integral.

    >>> round(start_share(PlasticityConfig(lr=0.1), updates=10), 3)
    0.368
    """
    decay = config.lr_decay_steps
    steps = float(updates) if decay is None else decay * math.log1p(updates / decay)
    return math.exp(-config.lr / config.tau * steps)


def class_frequency_change(statistics: Statistics, frequency: Tensor, lr: float | Tensor) -> Tensor:
    """Change of the running class frequency p̂ [num_classes]: η (p − p̂), or 0 for a batch without labels.

    Parameters
    ----------
    statistics: sums over the batch.
    frequency: [num_classes], p̂.
    lr: η, a number or a 0-d tensor.

    >>> zz = torch.diag(torch.tensor([3.0, 1.0]))
    >>> sums = Statistics(torch.zeros(4, 1, 3, 3), torch.zeros(4, 4), torch.zeros(4, 2), zz, count=4)
    >>> class_frequency_change(sums, torch.tensor([0.5, 0.5]), lr=0.1)
    tensor([ 0.0250, -0.0250])
    """
    columns = statistics.zz.diagonal()
    change = lr * (columns / statistics.labelled - frequency)
    return torch.where(columns.sum() > 0, change, torch.zeros_like(frequency))


def similarity_matching(
    weights: Weights, statistics: Statistics, frequency: Tensor, lr: float | Tensor, config: PlasticityConfig
) -> Weights:
    """The changes ΔW, ΔM, ΔV of similarity matching, as new tensors; see the equations of this module.

    Parameters
    ----------
    weights: the rows of W, M and V held here.
    statistics: sums over the batch, for the same rows.
    frequency: [num_classes], p̂ > 0.
    lr: η, a number or a 0-d tensor.
    config: τ.

    >>> weights = Weights(torch.zeros(2, 1, 1, 1), torch.eye(2), torch.zeros(2, 0))
    >>> sums = Statistics(torch.ones(2, 1, 1, 1), torch.ones(2, 2), torch.zeros(2, 0), torch.zeros(0, 0), count=1)
    >>> similarity_matching(weights, sums, torch.zeros(0), lr=0.1, config=PlasticityConfig()).lateral
    tensor([[0.0000, 0.1000],
            [0.1000, 0.0000]])
    """
    count = statistics.count
    labelled = statistics.labelled
    label = (statistics.yz - einsum(weights.label, statistics.zz, "k c, c d -> k d")) / labelled
    smallest = torch.finfo(frequency.dtype).tiny
    present = statistics.zz.diagonal() / labelled
    rate = torch.minimum(lr * frequency.clamp(min=smallest).reciprocal(), 1.0 / present.clamp(min=smallest))
    return Weights(
        feedforward=(statistics.yx / count).sub_(weights.feedforward).mul_(lr),
        lateral=(statistics.yy / count).sub_(weights.lateral).mul_(lr / config.tau),
        label=torch.where(present > 0, label * rate, 0.0),
    )


Rule = Callable[[Weights, Statistics, Tensor, float | Tensor, PlasticityConfig], Weights]

RULES: dict[str, Rule] = {"similarity_matching": similarity_matching}
"""Plasticity rules by the name used in `PlasticityConfig.rule`."""
