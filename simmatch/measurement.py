"""Metrics of an update, equal on all ranks whichever way they share the work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simmatch.geometry import Patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.columns import split_columns
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.gathered_state import gather_columns
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
    patches: the batch, from `layer.prepare`.
    solution: what `layer.partial_fit(patches, labels)` returned.
    labels: [B], as given to `partial_fit`.
    columns: approximate number of columns for the objective. Where columns are split over ranks, these are gathered.

    >>> layer = SimilarityMatchingConv2d(1, 8, kernel_size=3)
    >>> patches = layer.prepare(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> measure(layer, patches, layer.partial_fit(patches)).residual <= layer.dynamics.tolerance
    True
    """
    exchange = layer.sharing.column_exchange
    total = patches.batch_size * patches.positions
    first = min(total, max(1, columns // patches.positions) * patches.positions)  # whole images
    counts = [max(0, min(part.stop, first) - part.start) for part in split_columns(total, exchange.world_size)]
    singles = [
        float(solution.residual.amax()) if solution.residual.numel() else 0.0,
        float(solution.num_iters),
        float((solution.y > 0).sum()) / (layer.out_channels * total),
    ]
    own = solution.y[:, : counts[exchange.rank]]
    y, gathered = gather_columns(own, singles, counts, exchange, LocalFault(exchange))
    residual, num_iters, active = gathered.T
    return Measurement(
        objective=layer.objective(patches, y, labels, columns=columns),
        residual=float(residual.amax()),
        num_iters=int(num_iters.amax()),
        active_fraction=float(active.sum()),
    )
