"""The similarity-matching objective of a batch: the distance between similarities of outputs and of inputs.

    ‖XᵀX + α Zᵀ C_z⁻¹ Z − YᵀY‖²_F  over  ‖XᵀX + α Zᵀ C_z⁻¹ Z‖²_F

The N × N similarity matrices are not formed where N is large: with S = [X; √α C_z^(-1/2) Z] stacked by rows,
‖SᵀS − YᵀY‖² = ‖S Sᵀ‖² − 2 ‖Y Sᵀ‖² + ‖Y Yᵀ‖², and nothing here is larger than max(K, P + num_classes)².

Source: Bahroun et al., arXiv:2308.02427; design of the label term after canonical correlation analysis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.batch import Batch
from simmatch.config import PlasticityConfig
from simmatch.geometry import explicit
from simmatch.plasticity import Statistics, start_share

FORGOTTEN = 0.1
"""Weight of the initial M₀ in M below which the objective of a layer reflects what it has learnt."""


def similarity_objective(x: Tensor, y: Tensor, z: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """The relative objective: 0 where similarities match exactly, 1 for Y = 0.

    Parameters
    ----------
    x: [N, P], patches after normalisation and whitening (as in `Patches.matrix`).
    y: [K, N], activities.
    z: [num_classes, N], one-hot labels, zero columns where unlabelled; classes that do not occur are ignored.
    alpha: α, the weight of the label term.

    Returns
    -------
    Scalar tensor in float64.

    >>> x = torch.eye(3)
    >>> float(similarity_objective(x, y=x.T)), float(similarity_objective(x, y=torch.zeros(4, 3)))
    (0.0, 1.0)
    """
    frequency = None if z is None else z.double().mean(dim=1)
    source = similarity_rows(x, z, frequency, alpha)
    target = y.double()
    reference = _squared_gram(source)
    value = reference - 2 * _squared_cross(target, source) + _squared_gram(target)
    return value / reference.clamp(min=torch.finfo(torch.float64).tiny)


def similarity_rows(x: Tensor, z: Tensor | None, frequency: Tensor | None, alpha: float) -> Tensor:
    """S = [X; √α C_z^(-1/2) Z] in float64, so that SᵀS are the similarities of the inputs.

    Parameters
    ----------
    x, z, alpha: as for `similarity_objective`, of some of the columns.
    frequency: [num_classes], the diagonal of C_z, over all columns.

    >>> similarity_rows(torch.ones(7, 9), torch.ones(2, 7), torch.tensor([0.5, 0.5]), alpha=1.0).shape
    torch.Size([11, 7])
    """
    rows = x.double().T
    if z is None or frequency is None or alpha <= 0:
        return rows
    by_label = alpha**0.5 * z.double() * frequency.double().clamp(min=1e-300).rsqrt().unsqueeze(1)
    return torch.cat([rows, by_label])


def objective_of_sums(sums: Tensor, targets: int) -> Tensor:
    """`similarity_objective` from [Y; S] [Y; S]ᵀ, which can be summed over ranges of columns.

    Parameters
    ----------
    sums: [K + P + …, K + P + …], in float64.
    targets: K, the number of rows of Y.

    >>> both = torch.eye(3, dtype=torch.float64).repeat(2, 1)  # Y = S
    >>> float(objective_of_sums(both @ both.T, targets=3))
    0.0
    """
    yy, cross, reference = sums[:targets, :targets], sums[:targets, targets:], sums[targets:, targets:].square().sum()
    value = reference - 2 * cross.square().sum() + yy.square().sum()
    return value / reference.clamp(min=torch.finfo(torch.float64).tiny)


def batch_objective(batch: Batch, y: Tensor, alpha: float, *, columns: int) -> float:
    """`similarity_objective` on the first images of a batch: at least one image, and about `columns` columns.

    Parameters
    ----------
    batch: patches and labels of B images.
    y: [K, N], activities.
    alpha: α, the weight of the label term.
    columns: approximate number of columns.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> batch_objective(batch, torch.zeros(5, 72), alpha=0.0, columns=36)
    1.0
    """
    positions = batch.patches.positions
    images = min(batch.patches.batch_size, max(1, columns // positions))
    z = None if batch.z is None else batch.z[:, :images].repeat_interleave(positions, dim=1)
    x = explicit(batch.patches, images=images)
    return float(similarity_objective(x, y[:, : images * positions], z, alpha))


def worse_than_silence(statistics: Statistics, alpha: Tensor | float = 0.0) -> Tensor:
    """Whether the relative objective of a batch is above 1, that is ‖Y Yᵀ‖² > 2 ‖Y Sᵀ‖²; S Sᵀ is not needed.

    A 0-d tensor on the device.

    Parameters
    ----------
    statistics: sums over the batch, for all K channels.
    alpha: α, the weight of the label term.

    >>> none = torch.zeros(1, 0), torch.zeros(0, 0)
    >>> worse_than_silence(Statistics(torch.ones(1, 1, 1, 1), torch.tensor([[2.0]]), *none, count=1))
    tensor(True)
    """
    frequency = statistics.zz.diagonal() / statistics.count
    by_label = (statistics.yz.square() / frequency.clamp(min=torch.finfo(frequency.dtype).tiny)).sum()
    yy, yx = statistics.yy.flatten(), statistics.yx.flatten()
    return yy.dot(yy) > 2 * (yx.dot(yx) + alpha * by_label)


def divergence_warning(config: PlasticityConfig, updates: int, *, above_one: bool) -> str | None:
    """A one-line warning for a layer whose relative objective is above 1 although M₀ no longer matters; else None.

    Parameters
    ----------
    config: the layer's rates.
    updates: number of updates so far.
    above_one: whether the relative objective is above 1.

    >>> divergence_warning(PlasticityConfig(), 100, above_one=False) is None
    True
    >>> divergence_warning(PlasticityConfig(tau=0.5), 100, above_one=True)
    'the relative objective is above 1, worse than no activity at all, with plasticity.tau=0.5 ...'
    """
    if not above_one or start_share(config, updates) > FORGOTTEN:
        return None
    return (
        f"the relative objective is above 1, worse than no activity at all, with plasticity.tau={config.tau:g} and "
        f"plasticity.lr={config.lr:g}: expected below 1; try tau 1, then a smaller lr or dynamics.tolerance"
    )


def _squared_gram(rows: Tensor) -> Tensor:
    """‖R Rᵀ‖²_F = ‖Rᵀ R‖²_F, from the smaller of the two matrices."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return gram.square().sum()


def _squared_cross(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T).square().sum()
