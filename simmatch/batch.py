"""Drives and statistics of one batch.

    d = W x̃ + α V z          drives, [K, N]
    Σ y x̃ᵀ, Σ y yᵀ, Σ y zᵀ, Σ z zᵀ   statistics

There are N = B · L columns, L positions of each of B images, in the order 'b h w'. All positions of an image have the
label of the image, and its weight w in the sums: Σ w y x̃ᵀ and so on, over a count of Σ w columns. Both factors of
Σ w y yᵀ are √w y, so that it stays positive semidefinite as computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from einops import rearrange, reduce
from torch import Tensor

from simmatch.geometry import Filters, Patches, correlate, drive
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.columns import Part
from simmatch.sharding.rows import Rows


@dataclass(frozen=True)
class Batch:
    """Patches of some images, with their labels.

    Attributes
    ----------
    patches: patches of B images, or of a rank's part of them.
    z: [num_classes, B], one-hot labels of all B images, zero columns where unlabelled; None without labels.
    weights: [B], 0 ≤ w ≤ 1 of all B images; None: 1 of each.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)), z=torch.eye(2))
    >>> batch.columns, batch.of_images(slice(1)).columns
    (72, 36)
    """

    patches: Patches
    z: Tensor | None = None
    weights: Tensor | None = None

    @property
    def images(self) -> int:
        """B, the number of images."""
        return self.patches.batch_size if self.patches.part is None else self.patches.part.whole

    @property
    def columns(self) -> int:
        """N, the number of columns."""
        return self.images * self.patches.positions

    def of_images(self, chosen: slice) -> Batch:
        """A batch of some of the images; all patches are here."""
        return self._with(self.patches.of_images(chosen), chosen)

    def own(self, part: Part) -> Batch:
        """The images of a part, as a batch of its own.

        Raises
        ------
        ValueError
            The patches are those of another part.
        """
        if self.patches.part is None:
            return self.of_images(part.images)
        if self.patches.part != part or self.patches.batch_size != part.count:
            raise ValueError(f"patches: expected those of {part}, got {self.patches.part}")
        return self._with(replace(self.patches, part=None), part.images)

    def _with(self, patches: Patches, chosen: slice) -> Batch:
        """Patches of some of the images, with what belongs to these images."""
        z, weights = self.z, self.weights
        return Batch(patches, None if z is None else z[:, chosen], None if weights is None else weights[chosen])

    def weighted(self, y: Tensor) -> Tensor:
        """√w y of the columns of a batch, [K, N]; y itself without weights."""
        if self.weights is None:
            return y
        by_image = rearrange(y, "k (b l) -> k b l", b=self.patches.batch_size)
        return (by_image * self.weights.sqrt().unsqueeze(1)).flatten(1)


def batch_drive(batch: Batch, weights: Weights, alpha: Tensor | None = None, filters: Filters | None = None) -> Tensor:
    """d = W x̃ + α V z for the rows in `weights`: [K_g, N]. Without labels, or if α is None, d = W x̃.

    filters: of these weights, if they are needed more than once.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> batch_drive(batch, Weights(torch.ones(5, 1, 3, 3), torch.eye(5), torch.zeros(5, 0))).shape
    torch.Size([5, 72])
    """
    if batch.columns == 0:
        return weights.lateral.new_zeros(len(weights.lateral), 0)
    result = drive(batch.patches, weights.feedforward, filters)
    if batch.z is None or alpha is None:
        return result
    by_label = alpha * weights.label @ batch.z  # [K_g, B]
    by_image = rearrange(result, "k (b l) -> k b l", l=batch.patches.positions)
    by_image += rearrange(by_label, "k b -> k b 1")
    return result


def batch_statistics(batch: Batch, y: Tensor, rows: Rows, num_classes: int) -> Statistics:
    """Sums over the columns of a batch, for the channels in `rows`.

    Parameters
    ----------
    batch: patches and labels of B images.
    y: [K, N], activities of all channels.
    rows: the channels.
    num_classes: number of classes of V.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> statistics = batch_statistics(batch, torch.ones(5, 72), Rows.all(5), num_classes=0)
    >>> statistics.yx.shape, statistics.yy.shape, statistics.count
    (torch.Size([5, 1, 3, 3]), torch.Size([5, 5]), 72)
    """
    config = batch.patches.config
    if batch.columns == 0:
        yx = y.new_zeros(rows.count, config.in_channels, *config.kernel)
        yz, zz = y.new_zeros(rows.count, num_classes), y.new_zeros(num_classes, num_classes)
        return Statistics(yx, y.new_zeros(rows.count, rows.total), yz, zz, 0)
    y = batch.weighted(y)
    own = y[rows.start : rows.stop]
    yz, zz = label_sums(batch, own, num_classes), y.new_zeros(num_classes, num_classes)
    return with_totals(Statistics(correlate(batch.patches, batch.weighted(own)), own @ y.T, yz, zz, 0), batch)


def label_sums(batch: Batch, y: Tensor, num_classes: int) -> Tensor:
    """Σ w y zᵀ over the columns of a batch, from √w y [K_g, N]: [K_g, num_classes]; zeros without labels.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)), z=torch.eye(2))
    >>> label_sums(batch, torch.ones(5, 72), num_classes=2)[0]
    tensor([36., 36.])
    """
    if batch.z is None:
        return y.new_zeros(len(y), num_classes)
    z = batch.z if batch.weights is None else batch.z * batch.weights.sqrt()
    return reduce(y, "k (b l) -> k b", "sum", b=batch.patches.batch_size) @ z.T


def with_totals(statistics: Statistics, batch: Batch) -> Statistics:
    """Replace Σ z zᵀ, count and largest weight, which do not depend on activities, by those of a whole batch.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> part = batch_statistics(batch.of_images(slice(1)), torch.ones(5, 36), Rows.all(5), num_classes=0)
    >>> with_totals(part, batch).count
    72
    """
    z, weights, positions = batch.z, batch.weights, batch.patches.positions
    if weights is None:
        return replace(statistics, zz=statistics.zz if z is None else z @ z.T * positions, count=batch.columns)
    zz = statistics.zz if z is None else (z * weights) @ z.T * positions
    wide = weights.double()
    return replace(statistics, zz=zz, count=wide.sum() * positions, largest=wide.amax())
