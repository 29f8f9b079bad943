"""What a layer computes from one batch: the drives of its columns, and the sums that its weights learn from.

    d = W x̃ + α V z          drives, [K, N]
    Σ y x̃ᵀ, Σ y yᵀ, Σ y zᵀ, Σ z zᵀ   statistics

N = B · L columns, L positions of each of B images, in the order 'b h w'; a label is the same at all positions of its
image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from einops import rearrange, reduce
from torch import Tensor

from simmatch.geometry import Patches, correlate, drive
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.rows import Rows


@dataclass(frozen=True)
class Batch:
    """The images of one call as a layer works on them.

    Attributes
    ----------
    patches: of B images.
    z: [num_classes, B], one-hot labels, zero columns where unlabelled; None without labels.
    """

    patches: Patches
    z: Tensor | None = None

    @property
    def columns(self) -> int:
        """N."""
        return self.patches.batch_size * self.patches.positions

    def of_images(self, chosen: slice) -> Batch:
        """Some of the images."""
        return Batch(self.patches.of_images(chosen), None if self.z is None else self.z[:, chosen])


def batch_drive(batch: Batch, weights: Weights, alpha: Tensor | None = None) -> Tensor:
    """d = W x̃ + α V z for the rows in `weights`: [K_g, N]. Without labels, or with α None, W x̃."""
    result = drive(batch.patches, weights.feedforward)
    if batch.z is None or alpha is None:
        return result
    by_label = alpha * weights.label @ batch.z  # [K_g, B]
    by_image = rearrange(result, "k (b l) -> k b l", l=batch.patches.positions)
    by_image += rearrange(by_label, "k b -> k b 1")
    return result


def batch_statistics(batch: Batch, y: Tensor, rows: Rows, num_classes: int) -> Statistics:
    """Sums over the columns of a batch for some rows; y [K, N] of all channels."""
    own = y[rows.start : rows.stop]
    if batch.z is None:
        yz = y.new_zeros(rows.count, num_classes)
    else:
        yz = reduce(own, "k (b l) -> k b", "sum", b=batch.patches.batch_size) @ batch.z.T
    statistics = Statistics(correlate(batch.patches, own), own @ y.T, yz, y.new_zeros(num_classes, num_classes), 0)
    return with_totals(statistics, batch)


def with_totals(statistics: Statistics, batch: Batch) -> Statistics:
    """The statistics with Σ z zᵀ and the count of columns, which take no activities, of this batch."""
    zz = statistics.zz if batch.z is None else batch.z @ batch.z.T * batch.patches.positions
    return replace(statistics, zz=zz, count=batch.columns)
