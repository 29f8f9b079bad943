"""Moments of rows in parts and over ranks, against numpy on all rows at once; rows that reach rank 0 alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from simmatch.moments import ROWS, Moments
from simmatch.seeding import seeded
from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.state import moments_over_ranks, rows_at_first
from tests.exchanges import ThreadExchange, results, run_owners


def drawn(count: int, dtype: torch.dtype) -> Tensor:
    """Rows far from the origin, of two scales, and one constant value."""
    rows = 1000 + torch.randn(count, 5, dtype=torch.float64, generator=seeded("moments", count))
    rows[:, 3] *= 0.01
    rows[:, 4] = 0.1
    return rows.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_moments_in_parts_are_those_of_all_rows(ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 a mean of 1000 is 3e-5 off. What is constant has no variance at all."""
    rows = drawn(5000, dtype)
    expected = np.cov(rows.double().numpy().T, bias=True)

    def owner(exchange: ThreadExchange) -> Moments:
        parts = [*torch.split(rows, 617)[exchange.rank : 8 : ranks]]  # a rank may have none
        if exchange.rank == 0:
            parts += [rows[8 * 617 :], rows[:0]]
        return moments_over_ranks(enumerate(parts), Moments(5), exchange)

    for moments in results(run_owners(ranks, owner)):
        assert moments.count == 5000
        np.testing.assert_allclose(moments.mean.numpy(), rows.double().numpy().mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=0, atol=tolerance)
        if dtype == torch.float32:
            assert moments.covariance[4].tolist() == [0.0] * 5


def test_ranks_without_rows_add_nothing() -> None:
    rows = drawn(7, torch.float64)

    def owner(exchange: ThreadExchange) -> Moments:
        return moments_over_ranks([(0, rows if exchange.rank == 1 else rows[:0])], Moments(5), exchange)

    for moments in results(run_owners(3, owner)):
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(rows.numpy().T, bias=True), atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (5, 0, 2), (3000, 1, 10)])
def test_rows_reach_rank_0_alone_and_a_few_at_a_time(ranks: int, sizes: tuple[int, ...]) -> None:
    """Each with its place; the others hold nothing of them."""
    total = sum(sizes[:ranks])
    rows, places = torch.rand(total, 4), torch.randperm(total)

    def owner(exchange: ThreadExchange) -> tuple[Tensor, list[int]]:
        start = sum(sizes[: exchange.rank])
        own = slice(start, start + sizes[exchange.rank])
        whole, counts = torch.zeros(total, 4), []
        for part, at in rows_at_first(rows[own], places[own], exchange):
            whole[at] = part
            counts.append(len(part))
        return whole, counts

    found = results(run_owners(ranks, owner))
    assert torch.equal(found[0][0][places], rows)
    assert max(found[0][1], default=0) <= ROWS
    for _, counts in found[1:]:
        assert counts == [0] * len(found[0][1])


def test_one_rank_alone_needs_no_exchange() -> None:
    rows = drawn(20, torch.float64)
    total = moments_over_ranks([(0, rows)], Moments(5), IDENTITY)
    assert torch.allclose(total.scatter, Moments.of(rows).scatter, rtol=1e-12)
