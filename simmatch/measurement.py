"""What training reports of an update: equal on all owners, however they shared the work."""

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
    objective: relative similarity-matching objective on some of the batch's columns, before the update.
    residual, num_iters: of the slowest column of the batch.
    active_fraction: share of activities above zero.
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
    """Look at what `layer.partial_fit(patches, labels)` returned, on all owners alike.

    Where columns are split, an exchange brings the first of them together, about `columns`, for the objective.
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
