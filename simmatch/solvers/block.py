"""Fast dynamics with few exchanges: accelerated block steps, several inner iterations on the own rows for each.

The problem is that of `simmatch.solvers.dynamics`. One step on a tile of n columns, for G owners, is

    exchange     y ← all owners' y                                            [K, n]     one all-gather
    compute      g = (M + εI) y − d                                           [K_g, n]   one GEMM
    extrapolate  z = y + β (y − y_prev), ∇(z) = g + β (g − g_prev), β = k/(k + 3)
    solve        δ ≈ argmin over z + δ ≥ 0 of ½ c δᵀ(M_gg + εI) δ + δᵀ∇(z)   `inner_iterations` on the own block
    update       y ← z + δ

which is accelerated gradient in the metric c · blockdiag(M_gg), far better conditioned than M itself.

**The factor c.** M ≼ G · blockdiag(M_gg) for positive semidefinite M: at c = G and β = 0 no step raises the energy.
That much is seldom needed: codes are sparse, and Nesterov's momentum is stable until c falls below ¾ of the largest
curvature ρ = δᵀMδ / δᵀblockdiag(M_gg)δ. So c is, column by column, 0.9 of the largest ρ that its steps have met.

**What guards against divergence is the energy.** Its change ½⟨g + g_prev, y − y_prev⟩ is exact for a quadratic, and
does not cancel as the difference of two energies would. Each owner knows its part, as of ρ and of the residual, once it
has the gathered y: they ride with the next y, one exchange late. So three iterates are held: `good`, whose energy is
known not to have risen, the `candidate` that is being judged, and the one that arrives. Where the candidate has risen,
it is dropped with what arrives, and the next step starts from `good` with β = 0, c = G and plain inner iterations, each
of which lowers its model and so the energy. A rise that rounding explains is none.

**Increments.** With an exchange format shorter than the computing one, owners send y_next − y. All of them, the sender
too, add the same rounded increment to their copy of y: the copies stay equal bit by bit, residual and energy belong to
the copy, and the rounding shrinks with the increments.

Every decision is a function of gathered bytes only. Columns stop, revert and restart one by one.

Sources: Beck & Teboulle (2009) for the accelerated scheme, whose metric is free; O'Donoghue & Candès (2015) for restart
by function value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import Exchange, Handle
from simmatch.sharding.faults import raise_shared
from simmatch.sharding.packing import Packing
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import Bound
from simmatch.solvers.tile import NOT_FINITE_RESULT, Steps

TAIL = 4
"""Rows that ride behind an owner's activities, its parts of: [0] residual; [1] rise of the energy; [2] δᵀMδ and
[3] δᵀM_ggδ of the step to the candidate. At the first exchange [0] is max|d| and [1] max(d, 0). [0] is also the owner's
status, see `simmatch.sharding.faults`."""

INNER_MOMENTUM = 0.7
"""β of the inner iterations: of 0.5, 0.7 and k/(k + 3) the best or within 5 % of it at 4 and at 8 iterations."""

METRIC = 0.9
"""c / ρ of accelerated steps. Momentum is unstable below ¾; inner iterations that have not converged need a margin."""

CURVATURE_GROWTH = 1.25
"""What ρ is multiplied by where the energy rose."""

ROUNDING = 16.0
"""A rise of the energy below so many eps · max|d| · ‖y − y_prev‖₁ is rounding."""


@dataclass(frozen=True)
class Blocks:
    """The lateral matrix as block steps need it.

    Attributes
    ----------
    matrix: [K_g, G · (K_pad + TAIL) − TAIL], own rows of M + εI, zero columns for padding and tails.
    diagonal: [K_g, 1], M_ii.
    inner: [K_g, K_g], I − s (M_gg + εI).
    step: s ≤ 1/λmax(M_gg + εI), certified.
    owners: G.
    """

    matrix: Tensor
    diagonal: Tensor
    inner: Tensor
    step: float
    owners: int

    @classmethod
    def from_lateral(cls, lateral: Tensor, bound: Bound, rows: Rows, world_size: int = 1) -> Blocks:
        """Arrange own rows [K_g, K] of M. Values that are not finite raise later, on all owners."""
        own = lateral.clone()
        own.diagonal(offset=rows.start).add_(bound.ridge)
        slices = lateral.new_zeros(rows.count, world_size, rows.padded + TAIL)
        for rank, part in enumerate(split_rows(rows.total, world_size)):
            slices[:, rank, : part.count] = own[:, part.start : part.stop]
        block = own[:, rows.start : rows.stop]
        step = 1.0 / bound_of_block(block, bound.value)
        inner = block * -step
        inner.diagonal().add_(1.0)
        diagonal = lateral.diagonal(offset=rows.start).unsqueeze(1)
        return cls(slices.flatten(1)[:, :-TAIL], diagonal, inner, step, world_size)


def bound_of_block(block: Tensor, bound: float) -> float:
    """Upper bound of λmax of a diagonal block [K_g, K_g], at most `bound`, which holds for all of the matrix.

    Collatz–Wielandt along a few power iterations, λmax(M_gg) ≤ max_i (|M_gg| v)_i / v_i: each certifies.
    """
    magnitudes = block.abs()
    vector = magnitudes.diagonal().sqrt()
    least = block.new_tensor(bound)
    for _ in range(8):
        vector = vector.clamp(min=1e-2 * float(vector.amax())) if vector.amax() > 0 else torch.ones_like(vector)
        product = magnitudes @ vector
        least = torch.fmin(least, (product / vector).amax())
        vector = product / product.amax()
    # a nonnegative dot product of length K has relative error below (K + 2) eps; doubled for the division
    rounding = 1.0 + 2 * (block.shape[0] + 2) * torch.finfo(block.dtype).eps
    value = min(float(least) * rounding, bound)
    return value if value > 0 else 1.0


class BlockTile:
    """Buffers for n columns, allocated once and reused by every tile of that width.

    Attributes
    ----------
    good, candidate, incoming: [G, K_pad + TAIL, n], three iterates of all owners, see the module.
    tails: [G, TAIL, n], those of the last exchange.
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
        """[G, K_pad + TAIL, n], the solution once the dynamics have ended."""
        return self.good

    @property
    def tails(self) -> Tensor:
        return self.packing.tails if self.packing is not None else self.incoming[:, self.rows.padded :]

    def own(self, iterate: Tensor) -> Tensor:
        """[K_g, n], own rows of one of the three iterates."""
        return iterate[self.rank, : self.rows.count]

    def start(
        self,
        drive: Tensor,
        blocks: Blocks,
        config: DynamicsConfig,
        own: Tensor | None = None,
    ) -> None:
        """First iterate: a block step from y = 0, whose gradient is −d, or the own rows [K_g, n] of a warm start.

        A warm start is judged as any iterate is: where its energy is above that of y = 0, it is dropped.
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
            self._solve_block(blocks, config.inner_iterations)
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
        """Let `incoming` hold all owners' rows; with increments, those of the candidate plus what was sent."""
        if self.packing is not None:
            arrived = self.incoming[:, : self.rows.padded]
            self.packing.unpack(arrived)
            arrived.add_(self.candidate[:, : self.rows.padded]).clamp_(min=0.0)

    def judge(self, revert: Tensor, hold: Tensor | None) -> None:
        """Drop the candidate and what arrived where `revert`, what arrived where `hold` [n]; then move on by one."""
        if bool(revert.any()):
            torch.where(revert, self.good, self.candidate, out=self.candidate)
            torch.where(revert, self.good, self.incoming, out=self.incoming)
        if hold is not None:
            torch.where(hold, self.candidate, self.incoming, out=self.incoming)
        self.good, self.candidate, self.incoming = self.candidate, self.incoming, self.good

    def measure(self, blocks: Blocks, out: Tensor) -> None:
        """Gradient of the candidate, and into `out` [TAIL, n] what the own rows say about it."""
        self.gradient, self.last_gradient = self.last_gradient, self.gradient
        everything = self.candidate.flatten(0, 1)[:-TAIL]
        torch.addmm(self.drive, blocks.matrix, everything, beta=-1.0, out=self.gradient)
        y = self.own(self.candidate)
        torch.minimum(torch.mul(y, blocks.diagonal, out=self.w), self.gradient, out=self.w)
        torch.amax(self.w.abs_(), dim=0, out=out[0])
        # ⟨g + g_prev, y − y_prev⟩ less its rounding, twice the rise; NaN, from infinities, is no rise
        moved = torch.sub(y, self.own(self.good), out=self.w)
        slope = torch.add(self.gradient, self.last_gradient, out=self.w_prev).mul_(moved)
        torch.sum(slope, dim=0, out=out[1])
        torch.sum(moved.abs_(), dim=0, out=self.weight)
        out[1].sub_(self.weight.mul_(self.margin))
        # the step from z to y: ∇(y) − ∇(z) = M (y − z), and ∇(z) is the bias that the inner iterations had
        change = torch.sub(self.gradient, torch.div(self.bias, self.factor, out=self.w), out=self.w)
        delta = torch.sub(y, self.z, out=self.next)
        torch.sum(change.mul_(delta), dim=0, out=out[2])
        torch.addmm(delta, blocks.inner, delta, alpha=-1.0, out=self.w)
        torch.sum(self.w.mul_(delta), dim=0, out=out[3])
        out[3].div_(blocks.step)
        out[1:].nan_to_num_(0.0)

    def step(self, blocks: Blocks, config: DynamicsConfig, revert: Tensor, frozen: Tensor | None) -> None:
        """Momentum and metric of every column, and the block step with them."""
        torch.mul(self.curvature, METRIC, out=self.factor)
        self.factor.masked_fill_(self.curvature == 0, METRIC * blocks.owners)
        self.factor.clamp_(min=1.0).masked_fill_(revert, blocks.owners).reciprocal_().mul_(-blocks.step)
        self.inner_weight.fill_(1.0 + INNER_MOMENTUM).masked_fill_(revert, 1.0)
        self.k.masked_fill_(revert, 0.0)
        self._extrapolate()
        self._solve_block(blocks, config.inner_iterations)
        self._put(frozen)

    def learn_curvature(self, tails: Tensor, void: Tensor, risen: Tensor, owners: int) -> None:
        """Largest ρ so far from gathered tails [G, TAIL, n], except where their step is `void`; more where `risen`."""
        along, blockwise = tails[:, 2].sum(dim=0), tails[:, 3].sum(dim=0)
        met = torch.where(void | (blockwise <= 0), 0.0, along / blockwise)
        torch.maximum(self.curvature, met.nan_to_num_(0.0), out=self.curvature)
        grown = torch.where(risen, self.curvature * CURVATURE_GROWTH, self.curvature)
        torch.clamp(grown, max=float(owners), out=self.curvature)

    def _extrapolate(self) -> None:
        """z from `good` and the candidate, and as bias of the inner iterations −s∇(z)/c."""
        torch.div(self.k, torch.add(self.k, 3.0, out=self.weight), out=self.weight).add_(1.0)
        self.k.add_(1.0)
        torch.lerp(self.own(self.good), self.own(self.candidate), self.weight, out=self.z)
        torch.lerp(self.last_gradient, self.gradient, self.weight, out=self.bias).mul_(self.factor)

    def _solve_block(self, blocks: Blocks, inner_iterations: int) -> None:
        """Inner iterations for δ from δ = 0, which costs no product; `next` = z + δ ≥ 0."""
        delta, floor = self.next, torch.neg(self.z, out=self.floor)
        torch.maximum(self.bias, floor, out=delta)
        w_prev, w, spare = self.bias, self.w, self.w_prev
        for _ in range(inner_iterations - 1):
            torch.addmm(self.bias, blocks.inner, delta, out=w)
            torch.maximum(torch.lerp(w_prev, w, self.inner_weight, out=delta), floor, out=delta)
            w_prev, w, spare = w, spare, w
        delta.add_(self.z)

    def _put(self, frozen: Tensor | None) -> None:
        """`next` into the slice that is sent, or its increment; nothing moves in frozen columns."""
        y = self.own(self.candidate)
        if frozen is not None:
            torch.where(frozen, y, self.next, out=self.next)
        if self.packing is None:
            self.own(self.incoming).copy_(self.next)
        else:
            self.packing.pack(self.rank, self.next.sub_(y))


def iterate_block(tile: BlockTile, blocks: Blocks, config: DynamicsConfig, exchange: Exchange) -> Steps:
    """The dynamics of one tile whose first iterate has been exchanged.

    Yields every exchange that it starts, returns (block steps, residual [n]). The solution is `tile.gathered`, its
    residual exactly that of the returned y.
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
        tile.step(blocks, config, revert, frozen)
        iteration += 1
        yield tile.send(exchange)
        tile.receive()
        reached, risen = _read_tails(tile.tails, scale)
        risen &= ~careful  # a careful step rises by rounding at most, which a repetition would not help
        tile.learn_curvature(tile.tails, revert, risen, exchange.world_size)
        careful, revert = revert, risen
        residual = torch.where(risen, residual, reached)
        frozen = _freeze(residual, frozen, config.tolerance)
        tile.judge(revert, frozen)
        if frozen is not None and bool(frozen.all()):
            return iteration, residual
    tile.measure(blocks, tile.last_tails[exchange.rank])
    yield exchange.all_gather(tile.last_tails)
    reached, risen = _read_tails(tile.last_tails, scale)
    risen &= ~careful
    tile.judge(risen, None)
    return iteration, torch.where(risen, residual, reached)


def _read_tails(tails: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gathered tails [G, TAIL, n] → relative residual [n] and, per column, whether the energy rose."""
    raise_shared(tails[:, 0], NOT_FINITE_RESULT)
    return tails[:, 0].amax(dim=0) / scale, tails[:, 1].sum(dim=0) > 0


def _freeze(residual: Tensor, frozen: Tensor | None, tolerance: float) -> Tensor | None:
    """Columns at the tolerance stop, for good: their residual is that of `good`, which they keep."""
    if tolerance == 0.0:
        return None
    below = residual <= tolerance if frozen is None else (residual <= tolerance) | frozen
    return below if frozen is not None or bool(below.any()) else None
