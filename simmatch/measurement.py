"""Metrics of an update, equal on all ranks whichever way they share the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.batch import Batch
from simmatch.geometry import Patches, explicit
from simmatch.labels import one_hot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.objective import objective_of_sums, similarity_objective, similarity_rows
from simmatch.sharding.columns import Part
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.gathered_state import gather_columns
from simmatch.sharding.sums import sum_over_ranks
from simmatch.solvers.dynamics import Solution


@dataclass(frozen=True)
class Measurement:
    """The metrics of one update.

    Attributes
    ----------
    objective: relative similarity-matching objective on some columns of the batch, before the update.
    residual: largest relative residual of a column.
    num_iters: iterations of the slowest column.
    active_fraction: fraction of activities above zero.

    >>> Measurement(objective=0.1, residual=1e-3, num_iters=12, active_fraction=0.15).num_iters
    12
    """

    objective: float
    residual: float
    num_iters: int
    active_fraction: float


def measure(
    layer: SimilarityMatchingConv2d,
    patches: Patches,
    solution: Solution,
    labels: Tensor | None = None,
    *,
    columns: int = 4096,
) -> Measurement:
    """Measure an update; all ranks call this together and get the same result.

    Parameters
    ----------
    layer: the layer after the update.
    patches: the batch, or this rank's part of it, from `layer.prepare`.
    solution: what `layer.partial_fit(patches, labels)` returned.
    labels: [B], as given to `partial_fit`.
    columns: approximate number of columns for the objective. Where columns are split over ranks, they are gathered, or
        sums over them are added, whichever is smaller.

    >>> layer = SimilarityMatchingConv2d(1, 8, kernel_size=3)
    >>> patches = layer.prepare(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> measure(layer, patches, layer.partial_fit(patches)).residual <= layer.dynamics.tolerance
    True
    """
    batch = Batch(patches, None if labels is None else one_hot(labels, layer.num_classes, layer.label))
    singles = [
        float(solution.residual.amax()) if solution.residual.numel() else 0.0,
        float(solution.num_iters),
        float((solution.y > 0).sum()) / (layer.out_channels * batch.columns),
    ]
    objective, gathered = _objective(layer, batch, solution.y, singles, columns)
    residual, num_iters, active = gathered.T
    return Measurement(objective, float(residual.amax()), int(num_iters.amax()), float(active.sum()))


def _objective(
    layer: SimilarityMatchingConv2d, batch: Batch, y: Tensor, singles: list[float], columns: int
) -> tuple[float, Tensor]:
    """The relative objective on the first images of a batch, and the single values [R, …] of all ranks."""
    exchange, positions, alpha = layer.sharing.splits, batch.patches.positions, float(layer.alpha)
    images = min(batch.images, max(1, columns // positions))
    parts = [layer.sharing.part(batch.images, positions, rank=rank) for rank in range(exchange.world_size)]
    counts = [len(_measured(part, images, positions)) for part in parts]
    own, x, y = _columns(batch, parts[exchange.rank], y, images)
    fault, height = LocalFault(exchange), layer.out_channels + layer.patch.patch_size
    z = None if batch.z is None else batch.z[:, :images].repeat_interleave(positions, dim=1)
    if exchange.world_size == 1 or sum(counts) * x.itemsize <= 2 * height * torch.float64.itemsize:
        joined, gathered = gather_columns(torch.cat([y, x.T]), singles, counts, exchange, fault)
        y, x = joined[: layer.out_channels], joined[layer.out_channels :].T
        return float(similarity_objective(x, y, z, alpha)), gathered
    _, gathered = gather_columns(x.new_zeros(0, 0), singles, [0] * exchange.world_size, exchange, fault)
    rows = similarity_rows(x, own, None if z is None else z.double().mean(dim=1), alpha)
    both = torch.cat([y.double(), rows])
    sums = sum_over_ranks(both @ both.T, exchange)
    return float(objective_of_sums(sums, layer.out_channels)), gathered


def _measured(part: Part, images: int, positions: int) -> range:
    """Of a part, the columns of the first images of the batch; as a range of the columns of the part's images."""
    limit = max(0, images - part.images.start) * positions
    return range(min(part.columns.start, limit), min(part.columns.stop, limit))


def _columns(batch: Batch, part: Part, y: Tensor, images: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """z [num_classes, n], x̃ [n, P] and y [K, n] of this rank's columns of the first images."""
    own, positions = batch.own(part), batch.patches.positions
    measured = _measured(part, images, positions)
    chosen = slice(measured.start, measured.stop)
    last = -(-measured.stop // positions)
    z = None if own.z is None else own.z[:, :last].repeat_interleave(positions, dim=1)[:, chosen]
    x = explicit(own.patches, images=last)[chosen] if last else y.new_zeros(0, batch.patches.config.patch_size)
    return z, x, y[:, : len(measured)]
