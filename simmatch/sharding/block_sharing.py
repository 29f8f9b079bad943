"""Sharing by columns with one result, bit by bit, for any number of ranks (`reduce: exact`).

As `ColumnSharing`, but a rank's part is a run of whole blocks (`simmatch.sharding.blocks`), each block is computed by
itself, and sums are exchanged as fixed-point numbers (`simmatch.sharding.exact`):

    weights      as before: rows are moved, nothing is computed
    block        drive, dynamics, Σ y xᵀ, Σ y yᵀ, Σ y zᵀ
    magnitudes   the largest of all blocks: a gather of four values
    statistics   integers of eight bytes, summed over the blocks of a rank, over owners, and over replicas

The magnitudes bound every entry of a block's sums: as computed, with rounding, it is at most twice

    |Σ y_i y_j| ≤ max_i Σ y_i²        |Σ y_i x_p| ≤ max_i Σ y_i · max |x|        |Σ y_i z_c| ≤ max_i Σ y_i

with x the patches as they are stored, and y times the root of the weight of its image: mean removal and whitening are
linear, and follow after the sum. A sum of n products in float32 is off by less than n · 2^−23 times the sum of their
magnitudes, so twice is enough for blocks of up to 2²¹ columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simmatch.batch import Batch, batch_drive, label_sums, with_totals
from simmatch.geometry import Filters, Patches, normalised, raw_correlation
from simmatch.parts import timed
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.blocks import aligned, cut, images_per_block, part_of_blocks
from simmatch.sharding.columns import Part
from simmatch.sharding.exact import from_fixed, shifts, to_fixed
from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.faults import LocalFault, status_of
from simmatch.sharding.sharing import ColumnSharing, OwnState, columns_of, unsolved
from simmatch.sharding.sums import sum_over_ranks
from simmatch.solvers.dynamics import Solution


class BlockSharing(ColumnSharing):
    """Every rank solves some blocks of a batch; parameters and attributes are those of `ColumnSharing`.

    >>> from simmatch.config import DynamicsConfig
    >>> from simmatch.geometry import PatchConfig, prepare
    >>> from simmatch.sharding.mesh import Mesh
    >>> from simmatch.sharding.rows import Rows
    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> batch = Batch(prepare(torch.ones(5, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> sharing = BlockSharing(DynamicsConfig(), rows, Mesh(), filters=(1, 3, 3), num_classes=0)
    >>> solution, statistics = sharing.learn(batch, state)
    >>> sharing.block(5, 36), solution.y.shape, statistics.yx.shape
    (5, torch.Size([4, 180]), torch.Size([4, 1, 3, 3]))
    """

    def block(self, images: int, positions: int) -> int | None:
        return images_per_block(images, positions)

    def part(self, images: int, positions: int, *, rank: int | None = None) -> Part:
        ranks = self.splits.world_size
        return part_of_blocks(images, positions, ranks=ranks, rank=self.splits.rank if rank is None else rank)

    def learn(
        self, batch: Batch, state: OwnState, solution: Solution | None = None
    ) -> tuple[Solution, Statistics | None]:
        lateral, part = state.weights.lateral, self.part(batch.images, batch.patches.positions)
        solved, table, total, magnitudes = None, None, None, lateral.new_zeros(3)
        with state.fault.apart(self._mesh.owners) as fault:
            weights = self._weights(state, fault) if solution is None else None
            with fault.apart(IDENTITY) as alone:
                blocks = self._own_blocks(batch, part)
                if solution is None:
                    assert weights is not None
                    solved = self._solve_blocks(blocks, weights, state, alone)
                else:
                    solved = blocks_of(columns_of(solution, part, batch), blocks)
                with timed("statistics"):
                    activities = [aligned(block.weighted(each.y)) for block, each in zip(blocks, solved, strict=True)]
                    magnitudes = largest_magnitudes(blocks, activities) if blocks else magnitudes
        with timed("exchange"):
            shift = self._shifts(magnitudes, batch, state.fault)
        with state.fault.apart(self._mesh.owners) as fault:
            with timed("statistics"), fault.apart(IDENTITY):
                if solved is not None:
                    table = self._fixed_sums(blocks, activities, shift)
            with timed("exchange"):
                total = self._state.fixed_sums(table, sum(self._widths), lateral, fault)
        with timed("exchange"):
            statistics = self._statistics(total, shift, batch, state)
        return joined(solved) if solved else unsolved(self._all_rows, part, state), statistics

    @property
    def _widths(self) -> list[int]:
        """Of Σ y xᵀ with Σ y behind it, Σ y yᵀ and Σ y zᵀ."""
        correlation, *others = self._state.widths
        return [correlation + 1, *others]

    def _own_blocks(self, batch: Batch, part: Part) -> list[Batch]:
        """The blocks of a part."""
        own = batch.own(part)
        size = images_per_block(batch.images, batch.patches.positions)
        return [aligned_batch(own.of_images(block)) for block in cut(part.count, size)]

    def _solve_part(
        self, batch: Batch, part: Part, weights: Weights, state: OwnState, fault: LocalFault, *, fixed: bool
    ) -> Solution:
        solved = self._solve_blocks(self._own_blocks(batch, part), weights, state, fault, fixed=fixed)
        return joined(solved) if solved else unsolved(self._all_rows, part, state)

    def _solve_blocks(
        self, blocks: Sequence[Batch], weights: Weights, state: OwnState, fault: LocalFault, *, fixed: bool = False
    ) -> list[Solution]:
        """Solve blocks, one after the other: y [K, n] and residual [n] of each."""
        filters = Filters.of(weights.feedforward, blocks[0].patches) if blocks else None
        solved = []
        for block in blocks:
            with timed("drive"):
                drive = batch_drive(block, weights, state.alpha, filters)
            with timed("dynamics"):
                solved.append(self._solver.solve(drive, weights.lateral, state.bound, fixed=fixed, fault=fault))
        return solved

    def _shifts(self, magnitudes: Tensor, batch: Batch, fault: LocalFault) -> Tensor:
        """s of Σ y xᵀ, Σ y yᵀ and Σ y zᵀ, from the magnitudes of all ranks.

        Raises
        ------
        SharedFault
            On all ranks, if one of them has a fault, or the sums could be too large for their dtype.
        """
        rank, ranks = self.splits.rank, self.splits.world_size
        gathered = magnitudes.new_zeros(ranks, 4)
        gathered[rank, :3] = magnitudes
        gathered[rank, 3:] = status_of(magnitudes)
        fault.mark(gathered[rank, 3:])
        self.splits.all_gather(gathered).wait()
        fault.raise_shared(gathered[:, 3], "activities")
        bounds = bounds_of_sums(gathered[:, :3].amax(dim=0))
        fault.raise_shared(status_of(2 * bounds).expand(ranks), "statistics")
        blocks = cut(batch.images, images_per_block(batch.images, batch.patches.positions))
        return shifts(bounds, len(blocks), bounds.dtype)

    def _fixed_sums(self, blocks: Sequence[Batch], activities: Sequence[Tensor], shift: Tensor) -> Tensor:
        """Σ y xᵀ before mean removal and whitening, Σ y, Σ y yᵀ and Σ y zᵀ, side by side: int64 [K, Σ widths].

        Normalised are the sums over all blocks, not those of each: K P² multiply–adds once.
        """
        table = torch.zeros(self._all_rows.total, sum(self._widths), dtype=torch.int64, device=shift.device)
        correlation, *others = self._widths
        yx, yy, yz = shift.unbind()
        targets = torch.split(table, [correlation - 1, 1, *others], dim=1)
        for block, y in zip(blocks, activities, strict=True):
            weighted = block.weighted(y)
            product, total = raw_correlation(block.patches, weighted)
            total = weighted.sum(dim=1, keepdim=True) if total is None else total
            sums = (product, total, y @ y.T, label_sums(block, y, self._num_classes))
            for target, tensor, one in zip(targets, sums, (yx, yx, yy, yz), strict=True):
                target += to_fixed(tensor, one)
        return table

    def _statistics(self, own: Tensor | None, shift: Tensor, batch: Batch, state: OwnState) -> Statistics | None:
        """Statistics from the integers of all replicas: rows [K_g, Σ widths] of each. None if some are held back."""
        lateral, rows = state.weights.lateral, self._state.rows
        table = own
        if table is None:
            table = torch.zeros(rows.count, sum(self._widths), dtype=torch.int64, device=shift.device)
        if self._mesh.replicas.world_size > 1:
            table = sum_over_ranks(table, self._mesh.replicas)
        if own is None:
            return None
        parts = torch.split(table, self._widths, dim=1)
        yx, yy, yz = (from_fixed(part, one, lateral.dtype) for part, one in zip(parts, shift, strict=True))
        whole = yx  # of the same shape on all ranks, each row in its place
        if rows.count < rows.total:
            whole = yx.new_zeros(rows.total, yx.shape[1])
            whole[rows.start : rows.stop] = yx
        yx = normalised(whole[:, :-1], whole[:, -1:], batch.patches)[rows.start : rows.stop]
        sums = Statistics(yx, yy, yz, yy.new_zeros(self._num_classes, self._num_classes), 0)
        return with_totals(sums, batch)


def aligned_batch(batch: Batch) -> Batch:
    """A batch whose tensors are `aligned`.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 3, 3), PatchConfig(in_channels=1, kernel_size=3)))
    >>> aligned_batch(batch.of_images(slice(1, 2))).patches.matrix.data_ptr() % 64
    0
    """
    names = [name for name in ("images", "inverse_scale", "matrix") if getattr(batch.patches, name) is not None]
    own: dict[str, Any] = {name: aligned(getattr(batch.patches, name)) for name in names}
    return replace(batch, patches=replace(batch.patches, **own), z=None if batch.z is None else aligned(batch.z))


def blocks_of(solution: Solution, blocks: Sequence[Batch]) -> list[Solution]:
    """The solution of a part, y [K, n] and residual [n], in blocks; `joined` is its inverse.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> whole = Solution(torch.ones(4, 72), 2, torch.zeros(72))
    >>> [each.y.shape for each in blocks_of(whole, [batch.of_images(slice(1)), batch.of_images(slice(1, 2))])]
    [torch.Size([4, 36]), torch.Size([4, 36])]
    """
    solved, start = [], 0
    for block in blocks:
        chosen = slice(start, start + block.columns)
        solved.append(Solution(solution.y[:, chosen], solution.iterations, solution.residual[chosen]))
        start = chosen.stop
    return solved


def joined(solved: Sequence[Solution]) -> Solution:
    """The solution of several blocks side by side.

    >>> joined([Solution(torch.ones(4, 3), 2, torch.zeros(3)), Solution(torch.ones(4, 5), 7, torch.zeros(5))]).y.shape
    torch.Size([4, 8])
    """
    iterations = torch.stack([torch.as_tensor(each.iterations) for each in solved]).amax()
    return Solution(
        torch.cat([each.y for each in solved], dim=1), iterations, torch.cat([each.residual for each in solved])
    )


def largest_magnitudes(blocks: Sequence[Batch], activities: Sequence[Tensor]) -> Tensor:
    """max_i Σ y_i² and max_i Σ y_i over the columns of a block, and the largest input: [3], the largest of all blocks.

    Parameters
    ----------
    blocks: of a rank; at least one.
    activities: [K, n] of each.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(1, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> largest_magnitudes([batch], [torch.full((4, 36), 2.0)])
    tensor([144.,  72.,   1.])
    """
    norms = torch.stack([torch.linalg.vector_norm(y, dim=1).amax() for y in activities]).amax()
    sums = torch.stack([y.sum(dim=1).amax() for y in activities]).amax()
    inputs = torch.stack([_largest_input(block.patches) for block in blocks]).amax()
    return torch.stack([norms.square(), sums, inputs])


def _largest_input(patches: Patches) -> Tensor:
    """The largest value of an explicit patch, or of an image times the largest scale."""
    if patches.matrix is not None:
        return patches.matrix.abs().amax()
    assert patches.images is not None
    largest = patches.images.abs().amax()
    return largest if patches.inverse_scale is None else largest * patches.inverse_scale.amax()


def bounds_of_sums(magnitudes: Tensor) -> Tensor:
    """Bounds [3] of the magnitudes that add up to an entry of Σ y [xᵀ 1], Σ y yᵀ and Σ y zᵀ over one block.

    Parameters
    ----------
    magnitudes: [3], from `largest_magnitudes`, of all ranks.

    >>> bounds_of_sums(torch.tensor([288.0, 144.0, 0.5]))
    tensor([144., 288., 144.])
    """
    squares, sums, largest = magnitudes.unbind()
    return torch.stack([sums * largest.clamp(min=1.0), squares, sums])
