"""A certified upper bound of the largest eigenvalue of the lateral matrix M.

Every owner of channels holds its rows of M. `certify` takes two matrix–vector products and two small gathers, from
which all owners compute the same bound from the same bytes, and learn of a fault of any owner.

The bound depends only on M and on the starting vector. A copied or loaded layer with the same M and vector has exactly
the same bound. A bound is not used after M has changed.
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
"""Smallest entry of the vector v relative to its largest: keeps v > 0 on rows of M that are zero, or were recently."""

TIGHT = 1.2
"""Ratio of the bound to a lower bound of λmax(|M|) above which another round is made. While a layer learns, the ratio
stays below, so that an update needs one round; from an arbitrary vector it is above."""


@dataclass(frozen=True)
class Bound:
    """A certified upper bound of λmax(M + εI), equal on all owners.

    Attributes
    ----------
    value: λ̂ ≥ λmax(M) + ε. For nonnegative M and v > 0, λmax(M) ≤ max_i (Mv)_i / v_i (Collatz–Wielandt).
    ridge: ε, which is added to the diagonal of M in the dynamics, but not stored.
    perron: [K], the vector v for the next call. It converges to the Perron vector of M, which makes the bound tight.
    flagged: bool [K], channels flagged by their owners.

    >>> bound = certify_afresh(torch.eye(4), Rows.all(4), ridge=0.0)
    >>> round(bound.value, 3), bound.perron.shape
    (1.0, torch.Size([4]))
    """

    value: float
    ridge: float
    perron: Tensor
    flagged: Tensor


def fingerprint(lateral: Tensor) -> tuple[int, float]:
    """A value that changes when M is written to: the number of writes counted by torch, and ‖M‖_F.

    The norm detects writes that torch does not count.

    >>> lateral = torch.eye(4)
    >>> before = fingerprint(lateral)
    >>> fingerprint(lateral.mul_(2.0)) == before
    False
    """
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
    """Bound λmax(M) in rounds of two matrix–vector products, each followed by a gather of at most 3 K values.

    One round is made, and more only if the bound is above `tight` times a lower bound (the Rayleigh quotient of |M|);
    then until a round improves the bound by less than 0.1 %, at most 100 rounds.

    Parameters
    ----------
    lateral: [K_g, K], this owner's rows of M. Negative entries are allowed: λmax(M) ≤ ρ(|M|).
    perron: [K], v, equal on all owners. Any vector gives a valid bound.
    rows: the channels held here.
    ridge: ε relative to the mean of the diagonal of M.
    exchange: connects to the other owners.
    flagged: [K_g], 1 for channels to report to all owners (dead ones), else 0; NaN if this owner's feedforward or label
        weights are not finite.
    fault: holds the exception of this owner, if any.
    tight: see above.

    Raises
    ------
    SharedFault
        On all owners, if one of them has a fault or weights that are not finite.

    >>> bound = certify(torch.full((4, 4), 0.25), torch.ones(4), Rows.all(4), ridge=1e-6)
    >>> 1.0 <= bound.value < 1.001
    True
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
    """Bound λmax(M) without a starting vector, with rounds until one improves the bound by less than 0.1 %.

    >>> round(certify_afresh(torch.diag(torch.tensor([3.0, 1.0])), Rows.all(2), ridge=0.0).value, 3)
    3.0
    """
    return certify(lateral, lateral.new_ones(rows.total), rows, ridge=ridge, exchange=exchange, tight=1.0)


def traced_bound(lateral: Tensor, perron: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """One round of `certify` for a single owner as a graph, for export.

    Returns
    -------
    The bound and ε, scalar tensors.

    >>> bound, epsilon = traced_bound(torch.eye(4), torch.ones(4), ridge=0.5)
    >>> round(float(bound), 3), float(epsilon)
    (1.5, 0.5)
    """
    magnitudes, first = lateral.abs(), _floored(perron)
    product = magnitudes @ first
    second = _floored(product)
    diagonal = magnitudes.diagonal()
    value, epsilon = _least((product, magnitudes @ second), (first, second), diagonal), ridge * diagonal.mean()
    return value * rounding_factor(lateral) + epsilon, epsilon


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
    """An upper bound of λmax(M) + ε from this owner's rows of |M|, and a lower bound of λmax(|M|) + ε.

    The first product starts from `perron`, the second from the result of the first: a channel that has just become
    active is nearly absent from the first and present in the second. Both give a bound, and so does the trace of a
    positive semidefinite M; the smallest is returned.
    """
    gathered = magnitudes.new_zeros(exchange.world_size, 3, rows.padded)
    product, diagonal, flags = gathered[exchange.rank]
    product[: rows.count] = magnitudes @ perron
    diagonal[: rows.count] = magnitudes.diagonal(offset=rows.start)
    flags[: rows.count] = flagged
    fault.mark(flags)
    exchange.all_gather(gathered).wait()
    received = gathered.cpu()  # a few values; on a device every access would wait
    fault.raise_shared(received[:, 2], "feedforward or label weights")
    fault.raise_shared(received[:, :2], "lateral weights")
    product, diagonal, flags = join_rows(received, rows.total, dim=1)
    second = _floored(product)

    gathered = magnitudes.new_zeros(exchange.world_size, rows.padded)
    gathered[exchange.rank, : rows.count] = magnitudes @ second.to(magnitudes.device)
    exchange.all_gather(gathered).wait()
    third = join_rows(gathered.cpu(), rows.total)

    value = (
        float(_least((product, third), (perron.cpu(), second), diagonal)) or 1.0
    )  # any positive number is a bound for M = 0
    epsilon = ridge * float(diagonal.mean())
    lower = _dot(second, third) / _dot(second, second)
    bound = Bound(
        value * rounding_factor(magnitudes) + epsilon,
        epsilon,
        _floored(third).to(perron),
        (flags > 0).to(perron.device),
    )
    return bound, lower + epsilon


def _least(products: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], diagonal: Tensor) -> Tensor:
    """The smallest of the bounds max_i (Mv)_i / v_i and trace M."""
    quotients = [(product / vector).amax(dim=0) for product, vector in zip(products, vectors, strict=True)]
    return torch.stack([*quotients, diagonal.sum()]).amin(dim=0)


def rounding_factor(lateral: Tensor) -> float:
    """Factor for rounding: a nonnegative dot product of length K has relative error below (K + 2) eps; doubled.

    >>> rounding_factor(torch.eye(62)) - 1 == 128 * torch.finfo(torch.float32).eps
    True
    """
    return 1.0 + 2 * (lateral.shape[1] + 2) * torch.finfo(lateral.dtype).eps


def _floored(product: Tensor) -> Tensor:
    """A product M v as the next v: largest entry 1, none below `PERRON_FLOOR`; all ones if no entry is positive."""
    top = product.amax(dim=0)
    return torch.where(top > 0, product.div(top).clamp(min=PERRON_FLOOR), 1.0)


def _dot(one: Tensor, other: Tensor) -> float:
    """Exactly rounded inner product, independent of the order of summation: owners on any hardware decide alike."""
    return math.fsum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def check_lateral(lateral: Tensor) -> None:
    """Check that ½ yᵀMy − yᵀd has a minimum, for finite M [K, K].

    Raises
    ------
    ValueError
        M is not symmetric, not positive semidefinite (both up to rounding), or has no positive diagonal entry.

    >>> check_lateral(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    Traceback (most recent call last):
    ValueError: lateral: expected a positive semidefinite matrix, got a smallest eigenvalue of -1.00e+00 relative to ...
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
    # scaled so that nothing overflows; the Cholesky factorisation needs a shift because of rounding
    scaled = (lateral / torch.exp2(torch.floor(torch.log2(largest)))).to(lateral.dtype)
    shift = 10 * size * eps * torch.eye(size, dtype=lateral.dtype, device=lateral.device)
    _, info = torch.linalg.cholesky_ex(scaled + shift)
    if int(info) > 0:
        lowest = float(torch.linalg.eigvalsh(scaled)[0])
        raise ValueError(
            f"lateral: expected a positive semidefinite matrix, got a smallest eigenvalue of {lowest:.2e} "
            f"relative to the largest diagonal entry"
        )
