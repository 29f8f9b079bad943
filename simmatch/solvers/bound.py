"""A certified upper bound of the largest eigenvalue of the lateral matrix M.

For nonnegative M and any v > 0, λmax(M) ≤ max_i (Mv)_i / v_i (Collatz–Wielandt). Every owner of channels holds its rows
of M. An update makes two matrix–vector products, each followed by a small gather, from which all owners compute the
same bound from the same bytes, and learn of a fault of any owner:

    warm_up    v ← M v for the new M: a channel that has just become active is nearly absent from the old v
    certify    the bound from v, and M v for the next update

They are arithmetic on the device: the host does not wait for it. With several replicas, each owner gathers from all
of them, and uses the values of the first, which are those of all: so the replicas learn of each other's faults too.

The bound depends only on M and on v. A copied or loaded layer with the same M and vector has exactly the same bound.
A bound is not used after M has changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.sharding.exact import pairwise_sum
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.mesh import ALONE, Mesh
from simmatch.sharding.recording import put
from simmatch.sharding.rows import Rows, join_rows

PERRON_FLOOR = 1e-2
"""Smallest entry of the vector v relative to its largest: keeps v > 0 on rows of M that are zero, or were recently."""

WARM = 2.0
"""Factor of a saved vector v from which a bound was certified: `warm_up` returns it as it is. A vector whose largest
entry is at most 1 makes one step of the power method first. So the bound of a loaded M is the one that it had, from
what an update saved after a revival too, and from what earlier versions saved."""

NOT_FINITE_REPLICA = "activities or statistics"
"""Name, in messages, of values that a replica has found not to be finite before its sums were added to the others'."""

NOT_FINITE_LATERAL = "lateral weights"
"""Name, in messages, of the values checked at both exchanges."""


@dataclass(frozen=True, eq=False)
class Bound:
    """A certified upper bound of λmax(M + εI), equal on all owners, on the device.

    Attributes
    ----------
    largest: λ̂ ≥ λmax(M) + ε, 0-d in float64.
    epsilon: ε, which is added to the diagonal of M in the dynamics, but not stored; 0-d in float64.
    perron: [K], the vector v for the next update. It converges to the Perron vector of M, which makes the bound tight.

    >>> bound = certify_afresh(torch.eye(4), Rows.all(4), ridge=0.0)
    >>> round(bound.value, 3), bound.ridge, bound.perron.shape
    (1.0, 0.0, torch.Size([4]))
    """

    largest: Tensor
    epsilon: Tensor
    perron: Tensor

    @property
    def value(self) -> float:
        """λ̂ as a number; waits for the device."""
        return float(self.largest)

    @property
    def ridge(self) -> float:
        """ε as a number; waits for the device."""
        return float(self.epsilon)


class KeptBound:
    """The bound of one M, and whether M has been written to since.

    It stays in the same tensors from update to update, so that a captured update finds what the one before it wrote.

    >>> lateral, kept = torch.eye(4), KeptBound()
    >>> kept.holds_for(lateral)
    False
    >>> kept.keep(certify_afresh(lateral, Rows.all(4), ridge=0.0), lateral)
    >>> kept.holds_for(lateral), kept.holds_for(lateral.mul_(2.0))
    (True, False)
    """

    def __init__(self) -> None:
        self.bound: Bound | None = None
        self._norm: Tensor | None = None
        self._of: tuple[Tensor, int] | None = None

    def keep(self, bound: Bound, lateral: Tensor, ok: Tensor | None = None) -> None:
        """Keep the certified bound of M; if `ok` is given and false, on the device, keep what there is."""
        norm = torch.linalg.vector_norm(lateral)
        values = (bound.largest, bound.epsilon, bound.perron, norm)
        for target, value in zip(self._storage(values), values, strict=True):
            put(target, value, ok)
        self._of = lateral, _version(lateral)

    def _storage(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors of the bound and of ‖M‖; new ones if those cannot hold the values."""
        if self.bound is not None and self._norm is not None:
            kept = (self.bound.largest, self.bound.epsilon, self.bound.perron, self._norm)
            pairs = zip(kept, values, strict=True)
            if all((a.device, a.dtype) == (b.device, b.dtype) for a, b in pairs):
                return kept
        with torch.inference_mode(False):  # so that they can be written to in inference mode and outside of it
            largest, epsilon, perron, self._norm = (value.clone() for value in values)
        self.bound = Bound(largest, epsilon, perron)
        return largest, epsilon, perron, self._norm

    def forget(self) -> None:
        """M may have been written to."""
        self._of = None

    @property
    def forgotten(self) -> bool:
        """Whether M may have been written to since the bound was kept, with the owner's knowledge."""
        return self._of is None

    def holds_for(self, lateral: Tensor, *, look: bool = True) -> bool:
        """Whether this is the tensor whose bound is kept, and it has not been written to since.

        torch counts most writes; ‖M‖ detects the others, for which the host has to `look` at the device.
        """
        if self._of is None or self._of[0] is not lateral or self._of[1] != _version(lateral):
            return False
        return not look or bool(self._norm == torch.linalg.vector_norm(lateral))


def _version(tensor: Tensor) -> int:
    """The number of writes to a tensor, as counted by torch."""
    return 0 if tensor.is_inference() else tensor._version


def certify(
    lateral: Tensor,
    perron: Tensor,
    rows: Rows,
    *,
    ridge: float,
    mesh: Mesh = ALONE,
    fault: LocalFault | None = None,
    exact: bool = False,
) -> Bound:
    """Bound λmax(M) by one matrix–vector product and one gather of 2 K values.

    The trace of a positive semidefinite M is a bound too; the smaller is returned.

    Parameters
    ----------
    lateral: [K_g, K], this owner's rows of M. Negative entries are allowed: λmax(M) ≤ ρ(|M|).
    perron: [K], v, equal on all owners. Any vector gives a valid bound.
    rows: the channels held here.
    ridge: ε relative to the mean of the diagonal of M.
    mesh: connects to the other owners and replicas.
    fault: holds the exception of this owner, if any.
    exact: whether no bit may depend on how many rows an owner has; it takes longer.

    Raises
    ------
    SharedFault
        On all owners, if one of them has a fault or weights that are not finite.

    >>> bound = certify(torch.full((4, 4), 0.25), torch.ones(4), Rows.all(4), ridge=1e-6)
    >>> 1.0 <= bound.value < 1.001
    True
    """
    fault = fault or LocalFault(mesh.columns)
    vector = _floored(perron)
    own = [_product(lateral, vector, exact=exact), lateral.diagonal(offset=rows.start).abs()]
    gathered, tables = _gather(own, rows, mesh, fault)
    fault.raise_shared(gathered, NOT_FINITE_LATERAL)
    product, diagonal = _joined(tables, rows, mesh)
    largest, epsilon = _bound(product, vector, diagonal, ridge)
    return Bound(largest, epsilon, _floored(product))


def warm_up(
    lateral: Tensor,
    perron: Tensor,
    rows: Rows,
    *,
    flagged: Tensor,
    mesh: Mesh = ALONE,
    fault: LocalFault | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of the power method, v ← |M| v, and the flags of all owners, in one gather of 2 K values.

    Parameters
    ----------
    lateral, rows, mesh, fault, exact: as for `certify`.
    perron: [K], v, equal on all owners; it makes no step if its largest entry is above 1, see `WARM`.
    flagged: [K_g], 1 for channels to report to all owners (dead ones), else 0; NaN if this owner's feedforward or label
        weights are not finite.

    Returns
    -------
    v [K], and which channels were flagged by their owners, bool [K].

    Raises
    ------
    SharedFault
        As for `certify`.

    >>> warm_up(torch.eye(2), torch.ones(2), Rows.all(2), flagged=torch.tensor([0.0, 1.0]))
    (tensor([1., 1.]), tensor([False,  True]))
    """
    fault, start = fault or LocalFault(mesh.columns), _floored(perron)
    gathered, tables = _gather([_product(lateral, start, exact=exact), flagged], rows, mesh, fault)
    fault.raise_shared(gathered[:, -1:], NOT_FINITE_REPLICA)
    fault.raise_shared(tables[:, 1], "feedforward or label weights")
    fault.raise_shared(tables[:, 0], NOT_FINITE_LATERAL)
    product, flags = _joined(tables, rows, mesh)
    return _warmed(perron, start, product), flags > 0


def certify_afresh(lateral: Tensor, rows: Rows, *, ridge: float, mesh: Mesh = ALONE, exact: bool = False) -> Bound:
    """Bound λmax(M) without a starting vector: `certify` until two products improve the bound by less than 0.1 %.

    The host decides, and waits for the device.

    >>> round(certify_afresh(torch.diag(torch.tensor([3.0, 1.0])), Rows.all(2), ridge=0.0).value, 3)
    3.0
    """

    def two_products(start: Tensor) -> Bound:
        first = certify(lateral, start, rows, ridge=ridge, mesh=mesh, exact=exact)
        return certify(lateral, first.perron, rows, ridge=ridge, mesh=mesh, exact=exact)

    bound = two_products(lateral.new_ones(rows.total))
    for _ in range(100):
        previous, bound = bound, two_products(bound.perron)
        if bound.value >= 0.999 * previous.value:
            break
    return bound


def traced_bound(lateral: Tensor, perron: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """`warm_up` and `certify` for a single owner as a graph, for export.

    Returns
    -------
    The bound and ε, scalar tensors.

    >>> bound, epsilon = traced_bound(torch.eye(4), torch.ones(4), ridge=0.5)
    >>> round(float(bound), 3), float(epsilon)
    (1.5, 0.5)
    """
    magnitudes, start = lateral.abs(), _floored(perron)
    vector = _warmed(perron, start, magnitudes @ start)
    return _bound(magnitudes @ vector, vector, magnitudes.diagonal(), ridge)


def _gather(own: list[Tensor], rows: Rows, mesh: Mesh, fault: LocalFault) -> tuple[Tensor, Tensor]:
    """Values [K_g] of every owner of every replica, followed by its status: flat [ranks, n · K_pad + 1], and a view of
    the values, [ranks, n, K_pad]."""
    ranks, rank = mesh.columns.world_size, mesh.columns.rank
    gathered = own[0].new_zeros(ranks, len(own) * rows.padded + 1)
    tables = gathered[:, :-1].view(ranks, len(own), rows.padded)
    for target, values in zip(tables[rank], own, strict=True):
        target[: rows.count] = values
    fault.mark(gathered[rank, -1:])
    mesh.columns.all_gather(gathered).wait()
    return gathered, tables


def _joined(tables: Tensor, rows: Rows, mesh: Mesh) -> Tensor:
    """[n, K], the values of the first replica."""
    return join_rows(tables[: mesh.owners.world_size], rows.total, dim=1)


def _product(lateral: Tensor, vector: Tensor, *, exact: bool) -> Tensor:
    """|M| v for the rows held here, [K_g]. The bits of a row of `@` depend on how many rows there are."""
    return pairwise_sum(lateral.abs().mul_(vector)) if exact else lateral.abs() @ vector


def _bound(product: Tensor, vector: Tensor, diagonal: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """λ̂ and ε from |M| v, v and the diagonal of M, all [K]."""
    least = torch.minimum((product / vector).amax(dim=0), diagonal.sum()).double()
    least = torch.where(least > 0, least, 1.0)  # any positive number is a bound for M = 0
    epsilon = ridge * diagonal.mean().double()
    return least * rounding_factor(product) + epsilon, epsilon


def rounding_factor(lateral: Tensor) -> float:
    """Factor for rounding: a nonnegative dot product of length K has relative error below (K + 2) eps; doubled.

    Parameters
    ----------
    lateral: rows or a column of M: a tensor of M's dtype whose last dimension is K.

    >>> rounding_factor(torch.eye(62)) - 1 == 128 * torch.finfo(torch.float32).eps
    True
    """
    return 1.0 + 2 * (lateral.shape[-1] + 2) * torch.finfo(lateral.dtype).eps


def _floored(product: Tensor) -> Tensor:
    """A product M v as the next v: largest entry 1, none below `PERRON_FLOOR`; all ones if no entry is positive."""
    top = product.amax(dim=0)
    return torch.where(top > 0, product.div(top).clamp(min=PERRON_FLOOR), 1.0)


def _warmed(perron: Tensor, start: Tensor, product: Tensor) -> Tensor:
    """The result of `warm_up`, from v as given, floored, and multiplied by |M|."""
    return torch.where(perron.amax(dim=0) > 1.0, start, _floored(product))


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
