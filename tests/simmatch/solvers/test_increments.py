"""`exchange_dtype: bfloat16` with one exchange per iteration: the copies stay equal, and the residual gets as low."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics, Solution
from simmatch.solvers.tile import TAIL
from tests.exchanges import ThreadExchange, results, run_owners
from tests.reference import random_drive, random_lateral, relative_residual

SIZE, COLUMNS = 11, 40


def problem() -> tuple[Tensor, Tensor]:
    return random_drive(SIZE, COLUMNS, 2).float(), random_lateral(SIZE, 1, condition=300.0, largest=4.0).float()


def solve(owners: int, config: DynamicsConfig, **options: bool) -> tuple[list[Solution], list[ThreadExchange]]:
    drive, lateral = problem()
    bound, rows = certify_afresh(lateral, Rows.all(SIZE), ridge=0), split_rows(SIZE, owners)

    def owner(exchange: ThreadExchange) -> tuple[Solution, ThreadExchange]:
        own = slice(rows[exchange.rank].start, rows[exchange.rank].stop)
        return Dynamics(config, rows[exchange.rank], exchange).solve(drive[own], lateral[own], bound), exchange

    pairs = results(run_owners(owners, owner, **options))
    return [solution for solution, _ in pairs], [exchange for _, exchange in pairs]


def config(dtype: str | None, tolerance: float = 1e-5) -> DynamicsConfig:
    return DynamicsConfig(exchange_dtype=dtype, tolerance=tolerance, max_iterations=2_000, tile_columns=16, ridge=0)


@pytest.mark.parametrize("owners", [1, 2, 3])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_increments_reach_the_residual_of_full_precision(owners: int, asynchronous: bool) -> None:
    """1e-5, fifty times below where activities rounded to bfloat16 stall."""
    drive, lateral = problem()
    solutions, _ = solve(owners, config("bfloat16"), asynchronous=asynchronous)
    for solution in solutions:
        assert torch.equal(solution.y, solutions[0].y)  # the shared copies, bit by bit
        assert torch.equal(solution.residual, solutions[0].residual)
    assert solutions[0].residual.amax() <= 1e-5
    # the residual belongs to the copy that is returned; float32 rounding of M y beside it
    assert relative_residual(drive, lateral, solutions[0].y).amax() <= 1e-5 + 5e-6
    (full, *_), _ = solve(owners, config(None), asynchronous=asynchronous)
    assert solutions[0].num_iters <= 1.5 * full.num_iters


def test_rounded_activities_would_stall() -> None:
    """Why increments: the best activities that bfloat16 can write down are above 5e-4."""
    drive, lateral = problem()
    (exact, *_), _ = solve(1, config(None))
    assert relative_residual(drive, lateral, exact.y.bfloat16().float()).amax() > 5e-4


@pytest.mark.parametrize("owners", [2, 3])
def test_bytes_are_half_and_a_tail(owners: int) -> None:
    """Exact counts: rows in two bytes filled up to whole words of four, tails in four; one exchange more at the end."""
    iterations, padded = 30, -(-SIZE // owners)
    fixed = config("bfloat16", 0.0).model_copy(update={"max_iterations": iterations, "solver": "accelerated"})
    _, exchanges = solve(owners, fixed)
    widths = [16, 16, 8]  # 40 columns in tiles of 16
    slices = sum(4 * (-(-padded * width // 2) + TAIL * width) for width in widths)
    last = sum(4 * TAIL * width for width in widths)
    for exchange in exchanges:
        assert exchange.num_exchanges == len(widths) * (iterations + 1)
        assert exchange.bytes_exchanged == (owners - 1) * (iterations * slices + last)
    _, full = solve(owners, fixed.model_copy(update={"exchange_dtype": None}))
    # full precision sends TAIL rows of four bytes beside each row's four
    assert full[0].bytes_exchanged == (owners - 1) * (iterations * 4 * (padded + TAIL) * COLUMNS + last)
