"""The lateral matrix M as the dynamics need it: a certified bound of its largest eigenvalue.

Every owner of channels holds its rows of M. `certify` costs two matrix–vector products and two small gathers, in
which all owners learn the same bound from the same bytes, and of any fault.

The bound is a function of M and of the vector that it starts from, and of nothing else: whoever holds both, a copy or
a loaded layer, has the same bound in every bit, and no bound outlives the M that it is of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.rows import Rows, join_rows

PERRON_FLOOR = 1e-2
"""Least entry of the vector v relative to its largest: keeps v > 0 on rows of M that are zero or were until now."""

TIGHT = 1.2
"""What the bound may be over a lower bound of λmax(|M|) before another round is made. Learning stays below, so one
round is made an update; a vector that knows nothing of M is above."""


@dataclass(frozen=True)
class Bound:
    """Upper bound of λmax(M + εI), the same on every owner.

    Attributes
    ----------
    value: λ̂ ≥ λmax(M) + ε. For nonnegative M and v > 0, λmax(M) ≤ max_i (Mv)_i / v_i (Collatz–Wielandt).
    ridge: ε, added to the diagonal of M wherever the dynamics are solved, never stored.
    perron: [K], the v of the next call. It tends to the Perron vector of M, which makes the bound tight.
    flagged: [K], true where the channel's owner flagged it.
    """

    value: float
    ridge: float
    perron: Tensor
    flagged: Tensor


def fingerprint(lateral: Tensor) -> tuple[int, float]:
    """Tells whether M has been written to: the number of writes that torch counted, and ‖M‖_F for those it did not."""
    version = 0 if lateral.is_inference() else lateral._version
    return version, float(torch.linalg.vector_norm(lateral))


def certify(
    lateral: Tensor,
    perron: Tensor,
    rows: Rows,
    *,
    ridge: float,
    exchange: Exchange = IDENTITY,
    flagged: Tensor | None = None,
    fault: LocalFault | None = None,
    tight: float = TIGHT,
) -> Bound:
    """Bound λmax(M) from rounds of two matrix–vector products, each followed by a gather of at most 3 K values.

    One round is all, unless it leaves the bound more than `tight` times a lower bound (Rayleigh's quotient of |M|);
    then rounds go on until one gains less than 0.1 %, 100 at most.

    Parameters
    ----------
    lateral: [K_g, K], this owner's rows of M. Signed entries are allowed: λmax(M) ≤ ρ(|M|).
    perron: [K], v, equal on all owners; any will do, for it is floored.
    ridge: ε relative to the mean of M's diagonal.
    flagged: [K_g], 1 for own channels of which all owners are to learn (dead ones), else 0; NaN where this owner's
        feedforward or label weights are not finite.
    fault: holds this owner's exception, if it has one.

    Raises
    ------
    SharedFault
        An owner has a fault or non-finite weights.
    """
    own_flags = lateral.new_zeros(rows.count) if flagged is None else flagged
    fault = fault or LocalFault(exchange)
    one_round = partial(_round, lateral.abs(), rows, ridge=ridge, exchange=exchange, fault=fault)
    first, lower = one_round(_floored(perron), own_flags)
    bound = first
    for _ in range(100):
        if bound.value <= tight * lower:
            break
        previous = bound.value
        bound, lower = one_round(bound.perron, torch.zeros_like(own_flags))
        if bound.value >= 0.999 * previous:
            break
    return replace(bound, flagged=first.flagged)


def certify_afresh(lateral: Tensor, rows: Rows, *, ridge: float, exchange: Exchange = IDENTITY) -> Bound:
    """Bound λmax(M) without a warm start, as tightly as rounds that gain 0.1 % make it."""
    return certify(lateral, lateral.new_ones(rows.total), rows, ridge=ridge, exchange=exchange, tight=1.0)


def traced_bound(lateral: Tensor, perron: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """One round of `certify` by a single owner as a plain graph, for export: (bound, ε added to the diagonal of M)."""
    magnitudes, first = lateral.abs(), _floored(perron)
    product = magnitudes @ first
    second = _floored(product)
    diagonal = magnitudes.diagonal()
    value, epsilon = _least((product, magnitudes @ second), (first, second), diagonal), ridge * diagonal.mean()
    return value * _rounding(lateral) + epsilon, epsilon


def _round(
    magnitudes: Tensor,
    rows: Rows,
    perron: Tensor,
    flagged: Tensor,
    *,
    ridge: float,
    exchange: Exchange,
    fault: LocalFault,
) -> tuple[Bound, float]:
    """A bound of λmax(M) + ε from the own rows of |M|, and a lower bound of λmax(|M|) + ε.

    The first product starts from `perron`, the second from the first's result: a channel that has just woken is nearly
    absent from the one and present in the other. Both certify, and so does the trace of a positive semidefinite M; the
    least counts.
    """
    gathered = magnitudes.new_zeros(exchange.world_size, 3, rows.padded)
    product, diagonal, flags = gathered[exchange.rank]
    product[: rows.count] = magnitudes @ perron
    diagonal[: rows.count] = magnitudes.diagonal(offset=rows.start)
    flags[: rows.count] = flagged
    fault.mark(flags)
    exchange.all_gather(gathered).wait()
    received = gathered.cpu()  # a few values: a device would be waited for at every look
    fault.raise_shared(received[:, 2], "feedforward or label weights")
    fault.raise_shared(received[:, :2], "lateral weights")
    product, diagonal, flags = join_rows(received, rows.total, dim=1)
    second = _floored(product)

    gathered = magnitudes.new_zeros(exchange.world_size, rows.padded)
    gathered[exchange.rank, : rows.count] = magnitudes @ second.to(magnitudes.device)
    exchange.all_gather(gathered).wait()
    third = join_rows(gathered.cpu(), rows.total)

    value = float(_least((product, third), (perron.cpu(), second), diagonal)) or 1.0  # of M = 0 every number is a bound
    epsilon = ridge * float(diagonal.mean())
    lower = _dot(second, third) / _dot(second, second)
    bound = Bound(
        value * _rounding(magnitudes) + epsilon, epsilon, _floored(third).to(perron), (flags > 0).to(perron.device)
    )
    return bound, lower + epsilon


def _least(products: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], diagonal: Tensor) -> Tensor:
    """The least of the bounds max_i (Mv)_i / v_i and trace M."""
    quotients = [(product / vector).amax(dim=0) for product, vector in zip(products, vectors, strict=True)]
    return torch.stack([*quotients, diagonal.sum()]).amin(dim=0)


def _rounding(lateral: Tensor) -> float:
    """A nonnegative dot product of length K has relative error below (K + 2) eps; doubled for the division."""
    return 1.0 + 2 * (lateral.shape[1] + 2) * torch.finfo(lateral.dtype).eps


def _floored(product: Tensor) -> Tensor:
    """A product M v as the next v: largest entry 1, none below `PERRON_FLOOR`; ones where none is positive."""
    top = product.amax(dim=0)
    return torch.where(top > 0, product.div(top).clamp(min=PERRON_FLOOR), 1.0)


def _dot(one: Tensor, other: Tensor) -> float:
    """Inner product whose last bit depends on no order of summation, so that owners decide alike on any hardware."""
    return math.fsum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def check_lateral(lateral: Tensor) -> None:
    """Refuse an M for which ½ yᵀMy − yᵀd need not have a minimum: [K, K], finite.

    Raises
    ------
    ValueError
        M is not symmetric, not positive semidefinite (both to rounding), or has no positive diagonal entry.
    """
    size, eps = lateral.shape[0], torch.finfo(lateral.dtype).eps
    if size == 0:
        return
    asymmetry = (lateral - lateral.T).abs().amax()
    if asymmetry > 100 * eps * lateral.abs().amax():
        raise ValueError(f"lateral: expected a symmetric matrix, got |M - Mᵀ| up to {float(asymmetry):.2e}")
    largest = lateral.diagonal().amax().double()
    if not largest > 0:
        raise ValueError("lateral: expected a positive diagonal entry, got none: the problem has no minimum")
    # scaled so that nothing overflows; the Cholesky factorisation needs a shift for rounding
    scaled = (lateral / torch.exp2(torch.floor(torch.log2(largest)))).to(lateral.dtype)
    shift = 10 * size * eps * torch.eye(size, dtype=lateral.dtype, device=lateral.device)
    _, info = torch.linalg.cholesky_ex(scaled + shift)
    if int(info) > 0:
        lowest = float(torch.linalg.eigvalsh(scaled)[0])
        raise ValueError(
            f"lateral: expected a positive semidefinite matrix, got a smallest eigenvalue of {lowest:.2e} "
            f"relative to the largest diagonal entry"
        )
