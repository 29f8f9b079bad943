"""Fast dynamics with few exchanges: accelerated block steps, each with several iterations on an owner's own rows.

The problem is that of `simmatch.solvers.dynamics`. With G owners, one step on a tile of n columns is

    exchange     y ← all owners' y                                            [K, n]     one all-gather
    compute      g = (M + εI) y − d                                           [K_g, n]   one GEMM
    extrapolate  z = y + β (y − y_prev), ∇(z) = g + β (g − g_prev), β = k/(k + 3)
    solve        δ ≈ argmin over z + δ ≥ 0 of ½ c δᵀ(M_gg + εI) δ + δᵀ∇(z)   `inner_iterations` with M_gg
    update       y ← z + δ

which is accelerated gradient in the metric c · blockdiag(M_gg), far better conditioned than M itself.

**The factor c.** M ≼ G · blockdiag(M_gg) for positive semidefinite M: with c = G and β = 0 no step raises the energy.
Such a large c is seldom needed. Codes are sparse, and Nesterov's momentum is stable unless c is below ¾ of the largest
curvature ρ = δᵀMδ / δᵀblockdiag(M_gg)δ. So for each column c is 0.9 of the largest ρ of its steps so far.

**The energy prevents divergence.** Its change ½⟨g + g_prev, y − y_prev⟩ is exact for a quadratic, and does not suffer
from cancellation like the difference of two energies. An owner knows its parts of the change, of ρ and of the residual
only after y has been gathered, so they are sent with the next y, one exchange late. Three iterates are therefore kept:
`good`, whose energy is known not to have risen; the `candidate`, which is tested; and the `incoming` one. If the energy
of the candidate has risen, both the candidate and the incoming iterate are dropped. The next step starts from `good`
with β = 0, c = G and inner iterations without momentum, each of which lowers the energy. A rise within rounding error
is ignored.

**Increments.** If the exchange format is shorter than the computing format, owners send y_next − y. All owners, the
sender included, add the same rounded increments to their copies of y. The copies remain equal bit by bit, residual and
energy are those of the copy, and rounding errors shrink with the increments.

Every decision is a function of gathered bytes only. Each column stops, reverts and restarts by itself.

Sources: Beck & Teboulle (2009) for the accelerated method, which allows any metric; O'Donoghue & Candès (2015) for the
restart by function value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import Exchange, Handle
from simmatch.sharding.packing import Packing
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound, rounding_factor
from simmatch.solvers.tile import Steps, read_tails, with_gaps

TAIL = 4
"""Rows exchanged after an owner's activities, with its parts of: [0] residual; [1] rise of the energy; [2] δᵀMδ and
[3] δᵀM_ggδ of the step to the candidate. At the first exchange they are [0] max|d| and [1] max(d, 0). Row 0 is also the
owner's status, see `simmatch.sharding.faults`."""

INNER_MOMENTUM = 0.7
"""β of the inner iterations. Of 0.5, 0.7 and k/(k + 3) it is the best, or within 5 % of it, at 4 and 8 iterations."""

METRIC = 0.9
"""c / ρ of accelerated steps. Below ¾ momentum is unstable; inner iterations that have not converged need a margin."""

CURVATURE_GROWTH = 1.25
"""Factor by which ρ grows after the energy rose."""

ROUNDING = 16.0
"""A rise of the energy up to this multiple of eps · max|d| · ‖y − y_prev‖₁ is attributed to rounding."""


@dataclass(frozen=True)
class Blocks:
    """The lateral matrix in the form that block steps use.

    Attributes
    ----------
    matrix: [K_g, G · (K_pad + TAIL) − TAIL], rows of M + εI, with zero columns for padding and tails.
    diagonal: [K_g, 1], M_ii.
    inner: [K_g, K_g], I − s (M_gg + εI).
    step: s ≤ 1/λmax(M_gg + εI), certified.
    owners: G.
    inner_iterations: iterations of a block step.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows = torch.eye(4), Rows.all(4)
    >>> bound = certify_afresh(lateral, rows, ridge=0.0)
    >>> Blocks.from_lateral(lateral, bound, DynamicsConfig(exchange="block"), rows).inner.shape
    torch.Size([4, 4])
    """

    matrix: Tensor
    diagonal: Tensor
    inner: Tensor
    step: float
    owners: int
    inner_iterations: int

    @classmethod
    def from_lateral(
        cls, lateral: Tensor, bound: Bound, config: DynamicsConfig, rows: Rows, world_size: int = 1
    ) -> Blocks:
        """Build the matrices from rows [K_g, K] of M. Values that are not finite are reported later, by all owners."""
        own = lateral.clone()
        own.diagonal(offset=rows.start).add_(bound.ridge)
        block = own[:, rows.start : rows.stop]
        step = 1.0 / bound_of_block(block, bound.value)
        inner = block * -step
        inner.diagonal().add_(1.0)
        diagonal = lateral.diagonal(offset=rows.start).unsqueeze(1)
        matrix = with_gaps(own, rows, world_size, TAIL)
        return cls(matrix, diagonal, inner, step, world_size, config.inner_iterations)


def bound_of_block(block: Tensor, bound: float) -> float:
    """Upper bound of λmax of a diagonal block [K_g, K_g]; at most `bound`, which is valid for the whole matrix.

    It is the smallest Collatz–Wielandt bound λmax(M_gg) ≤ max_i (|M_gg| v)_i / v_i of a few power iterations.

    >>> round(bound_of_block(torch.eye(3), bound=10.0), 3)
    1.0
    """
    magnitudes = block.abs()
    vector = magnitudes.diagonal().sqrt()
    least = block.new_tensor(bound)
    for _ in range(8):
        vector = vector.clamp(min=1e-2 * float(vector.amax())) if vector.amax() > 0 else torch.ones_like(vector)
        product = magnitudes @ vector
        least = torch.fmin(least, (product / vector).amax())
        vector = product / product.amax()
    value = min(float(least) * rounding_factor(block), bound)
    return value if value > 0 else 1.0


class BlockTile:
    """Buffers and arithmetic for n columns; the buffers are reused by later tiles of the same width.

    Attributes
    ----------
    good, candidate, incoming: [G, K_pad + TAIL, n], three iterates of all owners, see the module.
    tails: [G, TAIL, n], tails of the last exchange.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> BlockTile(Rows.all(4), 10, IDENTITY, like=torch.zeros(()), config=DynamicsConfig()).good.shape
    torch.Size([1, 8, 10])
    """

    def __init__(self, rows: Rows, columns: int, exchange: Exchange, like: Tensor, config: DynamicsConfig) -> None:
        owners, self.rank, self.rows = exchange.world_size, exchange.rank, rows
        shape = (owners, rows.padded + TAIL, columns)
        self.good, self.candidate, self.incoming = (like.new_zeros(shape) for _ in range(3))
        self.last_tails = like.new_zeros(owners, TAIL, columns)
        self.packing = Packing.of(config.exchange_dtype, owners, rows.padded, TAIL, columns, like)
        self.bias, self.gradient, self.last_gradient, self.drive = like.new_empty(4, rows.count, columns)
        self.z, self.floor, self.next, self.w, self.w_prev = like.new_empty(5, rows.count, columns)
        self.k, self.weight, self.inner_weight, self.factor, self.margin, self.curvature = like.new_empty(6, columns)

    @property
    def gathered(self) -> Tensor:
        """[G, K_pad + TAIL, n], the solution after the last step."""
        return self.good

    @property
    def tails(self) -> Tensor:
        return self.packing.tails if self.packing is not None else self.incoming[:, self.rows.padded :]

    def own(self, iterate: Tensor) -> Tensor:
        """This owner's rows [K_g, n] of one of the three iterates."""
        return iterate[self.rank, : self.rows.count]

    def start(self, drive: Tensor, blocks: Blocks, own: Tensor | None = None) -> None:
        """Compute the first iterate: a block step from y = 0, with gradient −d, or a warm start `own` [K_g, n].

        A warm start is tested like any iterate, and dropped where its energy is above that of y = 0.
        """
        self.good.zero_()
        self.candidate.zero_()
        self.drive.copy_(drive)
        torch.neg(drive, out=self.gradient)
        self.last_gradient.copy_(self.gradient)
        for per_column in (self.k, self.margin, self.curvature):
            per_column.zero_()
        self.factor.fill_(-blocks.step / blocks.owners)
        self.inner_weight.fill_(1.0 + INNER_MOMENTUM)
        self._extrapolate()
        if own is None:
            self._solve_block(blocks)
        else:
            self.next.copy_(own)
            self.k.zero_()
        self._put(None)
        largest, highest, *_ = self.tails[self.rank]
        torch.amax(torch.abs(drive, out=self.w), dim=0, out=largest)
        largest.add_(blocks.matrix.sum() * 0.0)
        torch.amax(torch.clamp(drive, min=0.0, out=self.w), dim=0, out=highest)

    def send(self, exchange: Exchange) -> Handle:
        return exchange.all_gather(self.incoming if self.packing is None else self.packing.buffer)

    def receive(self) -> None:
        """Update `incoming` after an exchange: with increments, the candidate plus the increments of all owners."""
        if self.packing is not None:
            activities = self.incoming[:, : self.rows.padded]
            self.packing.unpack(activities)
            activities.add_(self.candidate[:, : self.rows.padded]).clamp_(min=0.0)

    def judge(self, revert: Tensor, hold: Tensor | None) -> None:
        """Drop candidate and incoming iterate where `revert` [n], the incoming one where `hold` [n]; then shift all."""
        if bool(revert.any()):
            torch.where(revert, self.good, self.candidate, out=self.candidate)
            torch.where(revert, self.good, self.incoming, out=self.incoming)
        if hold is not None:
            torch.where(hold, self.candidate, self.incoming, out=self.incoming)
        self.good, self.candidate, self.incoming = self.candidate, self.incoming, self.good

    def measure(self, blocks: Blocks, out: Tensor) -> None:
        """Compute the gradient of the candidate, and write this owner's parts of its tail into `out` [TAIL, n]."""
        self.gradient, self.last_gradient = self.last_gradient, self.gradient
        all_rows = self.candidate.flatten(0, 1)[:-TAIL]
        torch.addmm(self.drive, blocks.matrix, all_rows, beta=-1.0, out=self.gradient)
        y = self.own(self.candidate)
        torch.minimum(torch.mul(y, blocks.diagonal, out=self.w), self.gradient, out=self.w)
        torch.amax(self.w.abs_(), dim=0, out=out[0])
        # ⟨g + g_prev, y − y_prev⟩, twice the rise, less its rounding error; NaN from infinities is not a rise
        moved = torch.sub(y, self.own(self.good), out=self.w)
        slope = torch.add(self.gradient, self.last_gradient, out=self.w_prev).mul_(moved)
        torch.sum(slope, dim=0, out=out[1])
        torch.sum(moved.abs_(), dim=0, out=self.weight)
        out[1].sub_(self.weight.mul_(self.margin))
        # the step from z to y: ∇(y) − ∇(z) = M (y − z), where ∇(z) follows from the bias of the inner iterations
        change = torch.sub(self.gradient, torch.div(self.bias, self.factor, out=self.w), out=self.w)
        delta = torch.sub(y, self.z, out=self.next)
        torch.sum(change.mul_(delta), dim=0, out=out[2])
        torch.addmm(delta, blocks.inner, delta, alpha=-1.0, out=self.w)
        torch.sum(self.w.mul_(delta), dim=0, out=out[3])
        out[3].div_(blocks.step)
        out[1:].nan_to_num_(0.0)

    def step(self, blocks: Blocks, revert: Tensor, frozen: Tensor | None) -> None:
        """Set momentum and metric of every column, and make the block step."""
        torch.mul(self.curvature, METRIC, out=self.factor)
        self.factor.masked_fill_(self.curvature == 0, METRIC * blocks.owners)
        self.factor.clamp_(min=1.0).masked_fill_(revert, blocks.owners).reciprocal_().mul_(-blocks.step)
        self.inner_weight.fill_(1.0 + INNER_MOMENTUM).masked_fill_(revert, 1.0)
        self.k.masked_fill_(revert, 0.0)
        self._extrapolate()
        self._solve_block(blocks)
        self._put(frozen)

    def learn_curvature(self, tails: Tensor, void: Tensor, risen: Tensor, owners: int) -> None:
        """Update the largest ρ from gathered tails [G, TAIL, n], except where `void`; increase it where `risen`."""
        along, blockwise = tails[:, 2].sum(dim=0), tails[:, 3].sum(dim=0)
        observed = torch.where(void | (blockwise <= 0), 0.0, along / blockwise)
        torch.maximum(self.curvature, observed.nan_to_num_(0.0), out=self.curvature)
        grown = torch.where(risen, self.curvature * CURVATURE_GROWTH, self.curvature)
        torch.clamp(grown, max=float(owners), out=self.curvature)

    def _extrapolate(self) -> None:
        """Compute z from `good` and the candidate, and the bias −s∇(z)/c of the inner iterations."""
        torch.div(self.k, torch.add(self.k, 3.0, out=self.weight), out=self.weight).add_(1.0)
        self.k.add_(1.0)
        torch.lerp(self.own(self.good), self.own(self.candidate), self.weight, out=self.z)
        torch.lerp(self.last_gradient, self.gradient, self.weight, out=self.bias).mul_(self.factor)

    def _solve_block(self, blocks: Blocks) -> None:
        """Inner iterations for δ, starting from δ = 0 (the first needs no product); `next` = z + δ ≥ 0."""
        delta, floor = self.next, torch.neg(self.z, out=self.floor)
        torch.maximum(self.bias, floor, out=delta)
        w_prev, w, spare = self.bias, self.w, self.w_prev
        for _ in range(blocks.inner_iterations - 1):
            torch.addmm(self.bias, blocks.inner, delta, out=w)
            torch.maximum(torch.lerp(w_prev, w, self.inner_weight, out=delta), floor, out=delta)
            w_prev, w, spare = w, spare, w
        delta.add_(self.z)

    def _put(self, frozen: Tensor | None) -> None:
        """Write `next`, or its increment, into the slice to send; frozen columns do not change."""
        y = self.own(self.candidate)
        if frozen is not None:
            torch.where(frozen, y, self.next, out=self.next)
        if self.packing is None:
            self.own(self.incoming).copy_(self.next)
        else:
            self.packing.pack(self.rank, self.next.sub_(y))


def iterate_block(tile: BlockTile, blocks: Blocks, config: DynamicsConfig, exchange: Exchange) -> Steps:
    """The dynamics of a tile whose first iterate has been exchanged.

    Yields every exchange that it starts, and returns (block steps, residual [n]). The solution is `tile.gathered`, and
    the residual is that of the returned y.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows, config = torch.eye(4), Rows.all(4), DynamicsConfig(exchange="block")
    >>> blocks = Blocks.from_lateral(lateral, certify_afresh(lateral, rows, ridge=0.0), config, rows)
    >>> tile = BlockTile(rows, 10, IDENTITY, like=lateral, config=config)
    >>> tile.start(torch.ones(4, 10), blocks)
    >>> tile.send(IDENTITY).wait()
    >>> for handle in iterate_block(tile, blocks, config, IDENTITY):
    ...     handle.wait()
    >>> tile.gathered[0, :4].shape
    torch.Size([4, 10])
    """
    tails = tile.tails
    scale = tails[:, 0].amax(dim=0)
    torch.mul(scale, ROUNDING * torch.finfo(scale.dtype).eps, out=tile.margin)
    scale.masked_fill_(scale == 0, 1.0)  # no drive: y = 0 is exact, 0/0 = 0
    residual = tails[:, 1].amax(dim=0) / scale  # of y = 0
    tile.receive()
    revert = careful = torch.zeros_like(scale, dtype=torch.bool)
    tile.judge(revert, None)

    iteration, frozen = 1, None
    while iteration < config.max_iterations:
        tile.measure(blocks, tile.tails[exchange.rank])
        tile.step(blocks, revert, frozen)
        iteration += 1
        yield tile.send(exchange)
        tile.receive()
        reached, risen = read_tails(tile.tails, scale)
        risen &= ~careful  # a careful step can rise only by rounding errors, which a repetition would not avoid
        tile.learn_curvature(tile.tails, revert, risen, exchange.world_size)
        careful, revert = revert, risen
        residual = torch.where(risen, residual, reached)
        frozen = _freeze(residual, frozen, config.tolerance)
        tile.judge(revert, frozen)
        if frozen is not None and bool(frozen.all()):
            return iteration, residual
    tile.measure(blocks, tile.last_tails[exchange.rank])
    yield exchange.all_gather(tile.last_tails)
    reached, risen = read_tails(tile.last_tails, scale)
    risen &= ~careful
    tile.judge(risen, None)
    return iteration, torch.where(risen, residual, reached)


def _freeze(residual: Tensor, frozen: Tensor | None, tolerance: float) -> Tensor | None:
    """Freeze columns at the tolerance permanently: they keep `good`, to which their residual belongs."""
    if tolerance == 0.0:
        return None
    below = residual <= tolerance if frozen is None else (residual <= tolerance) | frozen
    return below if frozen is not None or bool(below.any()) else None
