"""Block steps between real gloo processes: one solution at any shard count, the same bytes on every rank."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import IDENTITY, Exchange, Handle
from simmatch.sharding.faults import SharedFault
from tests.blocks import solve_blocks
from tests.exchanges import results
from tests.reference import nnls_columns, random_drive, random_lateral, relative_residual

CHANNELS, COLUMNS, CONDITION, LARGEST = 16, 40, 300.0, 2.5  # on 3 ranks: 6, 5, 5 channels; three tiles
TOLERANCE = 1e-10


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lateral = random_lateral(CHANNELS, 1, condition=CONDITION, largest=LARGEST)
    return random_drive(CHANNELS, COLUMNS, 2).to(dtype), lateral.to(dtype)


def config(**changes: Any) -> DynamicsConfig:
    defaults = {"exchange": "block", "tolerance": TOLERANCE, "max_iterations": 1000, "ridge": 0.0, "tile_columns": 16}
    return DynamicsConfig(**{**defaults, **changes})


class LateExchange:
    """An exchange whose owner comes late to every fifth gather."""

    def __init__(self, inner: Exchange) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def all_gather(self, gathered: Tensor) -> Handle:
        if self.inner.num_exchanges % 5 == 0:
            time.sleep(0.02)
        return self.inner.all_gather(gathered)


def program(
    exchange: Exchange, dtype_name: str, changes: dict[str, Any], late_rank: int | None = None, fault: str = ""
) -> tuple[Tensor, Tensor, int, int]:
    """y, residual, block steps and bytes of one rank; the last rank suffers the fault."""
    drive, lateral = problem(getattr(torch, dtype_name))
    if exchange.rank == exchange.world_size - 1:
        if fault == "drive":
            drive[-1, -1] = math.nan  # in the last tile: the others are under way by then
        if fault == "lateral":
            lateral[-1, 0] = math.nan
    if exchange.rank == late_rank:
        exchange = LateExchange(exchange)
    y, residual, steps = solve_blocks(exchange, drive, lateral, config(**changes))
    return y, residual, steps, exchange.bytes_exchanged


def assert_same_everywhere(found: list[tuple[Tensor, Tensor, int, int]]) -> None:
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])
        assert other[2:] == found[0][2:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_solution_at_any_shard_count(ranks: Any, world_size: int) -> None:
    """The iterates depend on the blocks; solutions agree to what the residual implies.

    With r = min(D y, ∇(y)), D = diag M, the point y − D⁻¹r solves the problem with drive d + r. Both problems being
    monotone, e = y − y* has eᵀMe ≤ eᵀr + rᵀD⁻¹Me, so ‖e‖ ≤ (1 + λmax / min M_ii) ‖r‖ / λmin, with ‖r‖ ≤ √K max|d|
    times the residual.
    """
    drive, lateral = problem(torch.float64)
    found = results(ranks(program, world_size, "float64", {}))
    assert_same_everywhere(found)
    alone = solve_blocks(IDENTITY, drive, lateral, config())
    sensitivity = (1 + LARGEST / float(lateral.diagonal().amin())) * CONDITION / LARGEST
    allowed = sensitivity * math.sqrt(CHANNELS) * TOLERANCE * float(drive.abs().amax())
    assert allowed < 1e-5
    assert (found[0][0] - alone[0]).norm(dim=0).amax() <= 2 * allowed
    assert (found[0][0] - nnls_columns(drive, lateral)).norm(dim=0).amax() <= allowed
    assert relative_residual(drive, lateral, found[0][0]).amax() <= TOLERANCE + 1e-14


@pytest.mark.parametrize("late_rank", [0, 1])
@pytest.mark.parametrize("exchange_dtype", [None, "bfloat16"])
def test_a_slow_rank_changes_nothing(ranks: Any, late_rank: int, exchange_dtype: str | None) -> None:
    changes = {"tolerance": 1e-3, "exchange_dtype": exchange_dtype}
    in_time = results(ranks(program, 2, "float32", changes))
    exchanges = list(ranks.num_exchanges)
    late = results(ranks(program, 2, "float32", changes, late_rank))
    assert_same_everywhere(in_time + late)
    assert ranks.num_exchanges == exchanges
    assert len(set(exchanges)) == 1


def test_bfloat16_halves_the_bytes(ranks: Any) -> None:
    full = results(ranks(program, 3, "float32", {"tolerance": 1e-3}))
    full_exchanges = ranks.num_exchanges[0]
    short = results(ranks(program, 3, "float32", {"tolerance": 1e-3, "exchange_dtype": "bfloat16"}))
    assert_same_everywhere(short)
    assert short[0][1].amax() <= 1e-3
    drive, lateral = problem(torch.float32)
    # float32 products of 16 terms, relative to max|d|, with |M||y| / max|d| up to 10
    assert relative_residual(drive, lateral, short[0][0]).amax() <= 1e-3 + 1e-4
    assert ranks.num_exchanges[0] <= full_exchanges + 3
    # 6 padded rows in 2 bytes instead of 4, and 4 rows of tails in 4: 28 instead of 40 a column
    assert short[0][3] / ranks.num_exchanges[0] == pytest.approx(0.7 * full[0][3] / full_exchanges, rel=0.05)


@pytest.mark.parametrize("fault", ["drive", "lateral"])
def test_a_fault_on_one_rank_ends_all_at_the_same_exchange(ranks: Any, fault: str) -> None:
    outcomes = ranks(program, 3, "float32", {"tolerance": 1e-3}, None, fault)
    assert all(isinstance(outcome, SharedFault) and outcome.ranks == [2] for outcome in outcomes), outcomes
    assert len(set(ranks.num_exchanges)) == 1
