"""Block steps against NNLS, plain loops and their own promises: several owners in threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.packing import Packing
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.block import Blocks, BlockTile, bound_of_block
from simmatch.solvers.bound import certify_afresh
from tests.blocks import solve_blocks, steps_of
from tests.exchanges import results, run_owners
from tests.live_bytes import CountAllocations
from tests.reference import nnls_columns, random_drive, random_lateral, relative_residual

PROBLEMS = settings(derandomize=True, deadline=None, database=None, max_examples=6)


def config(**changes: Any) -> DynamicsConfig:
    return DynamicsConfig(**{"exchange": "block", "max_iterations": 3000, "ridge": 0.0} | changes)


def solve(world_size: int, drive: Tensor, lateral: Tensor, **changes: Any) -> tuple[Tensor, Tensor, int, int, int]:
    """y, residual, block steps, exchanges and bytes; checked to be the same on all owners."""
    start = changes.pop("start", None)

    def owner(exchange: Any) -> tuple[Tensor, Tensor, int, int, int]:
        solved = solve_blocks(exchange, drive, lateral, config(**changes), start=start)
        return *solved, exchange.num_exchanges, exchange.bytes_exchanged

    outcomes = results(run_owners(world_size, owner))
    for other in outcomes[1:]:
        assert torch.equal(other[0], outcomes[0][0])
        assert torch.equal(other[1], outcomes[0][1])
        assert other[2:] == outcomes[0][2:]
    return outcomes[0]


def trained_like(size: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Drive [size, columns] and M = ⟨y yᵀ⟩ of rectified random filters on smooth inputs: nonnegative, one strong
    common direction, a decaying spectrum, codes sparse."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.9 ** torch.arange(25, dtype=torch.float64)
    filters = torch.randn(size, 25, generator=generator, dtype=torch.float64)
    filters /= filters.norm(dim=1, keepdim=True)
    seen = torch.randn(25, 40 * size, generator=generator, dtype=torch.float64) * spread[:, None]
    codes = (filters @ seen - 0.5).clamp(min=0.0)
    lateral = codes @ codes.T / seen.shape[1]
    lateral *= 2.5 / torch.linalg.eigvalsh(lateral)[-1]
    lateral.diagonal().add_(0.01)
    return filters @ (torch.randn(25, columns, generator=generator, dtype=torch.float64) * spread[:, None]), lateral


def energy(y: Tensor, drive: Tensor, lateral: Tensor) -> Tensor:
    y, drive, lateral = y.double(), drive.double(), lateral.double()
    return 0.5 * (y * (lateral @ y)).sum(dim=0) - (y * drive).sum(dim=0)


# -- the solution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_ill_conditioned(world_size: int) -> None:
    """Condition 1e4 and λmax = 50, built backwards: d = M y* − g with g ≥ 0 off the support of y* makes y* exact."""
    lateral = random_lateral(10, 3, condition=1e4, largest=50.0)
    generator = torch.Generator().manual_seed(4)
    known = torch.randn(10, 3, generator=generator, dtype=torch.float64).clamp(min=0.0)
    slack = torch.rand(10, 3, generator=generator, dtype=torch.float64) * (known == 0)
    y, residual, steps, _, _ = solve(world_size, lateral @ known - slack, lateral, tolerance=1e-13, inner_iterations=40)
    # |Δy| ≤ √K · residual · max|d| / λmin: √10 · 1e-13 · 1e4, relative to y* near 1
    assert residual.amax() <= 1e-13
    assert (y - known).norm() <= 1e-8 * known.norm()
    assert steps < 2000


@PROBLEMS
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(3, 12),
    log_condition=st.floats(0.5, 4.0),
    largest=st.sampled_from([0.03, 2.5, 300.0]),
    world_size=st.sampled_from([2, 3]),
    signed=st.booleans(),
)
def test_equals_nnls(seed: int, size: int, log_condition: float, largest: float, world_size: int, signed: bool) -> None:
    lateral = random_lateral(size, seed, condition=10**log_condition, largest=largest, signed=signed)
    columns = random_drive(size, 3, seed + 1)
    y = solve(world_size, columns, lateral, tolerance=1e-13, inner_iterations=30)[0]
    # relative error ≤ √12 · 1e-13 · 1e4, as above
    expected = nnls_columns(columns, lateral)
    assert (y - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("world_size", [2, 4])
def test_trained_lateral_equals_nnls(world_size: int) -> None:
    columns, lateral = trained_like(30, 12)
    assert torch.linalg.eigvalsh(lateral)[-1] > 2.0
    expected = nnls_columns(columns, lateral)
    y, residual, *_ = solve(world_size, columns, lateral, tolerance=1e-12)
    # condition 251
    assert (y - expected).norm() <= 1e-8 * expected.norm()
    assert 0.02 < (expected > 1e-9).double().mean() < 0.6
    assert residual.amax() <= 1e-12


def test_one_owner_solves_its_block_exactly() -> None:
    """All channels are one block: the first step is the problem itself, and inner iterations solve it."""
    columns, lateral = trained_like(12, 8)
    y, residual, steps, _, _ = solve(1, columns, lateral, tolerance=1e-10, inner_iterations=800)
    assert steps == 2  # the second reports the result of the first
    assert residual.amax() <= 1e-10
    torch.testing.assert_close(y, nnls_columns(columns, lateral), rtol=0, atol=1e-7)


def test_ridge_is_added_to_the_diagonal() -> None:
    columns, lateral = trained_like(12, 8)
    shifted = lateral + 0.05 * lateral.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = nnls_columns(columns, shifted)
    assert (solve(2, columns, lateral, tolerance=1e-13, ridge=0.05)[0] - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exchange_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("iterations", [1, 2, 7, 500])
def test_residual_belongs_to_the_returned_activities(
    dtype: torch.dtype, exchange_dtype: str | None, iterations: int
) -> None:
    columns, lateral = (part.to(dtype) for part in trained_like(20, 30))
    columns[:, 3] = 0.0
    changes = {"tolerance": 1e-3, "max_iterations": iterations, "exchange_dtype": exchange_dtype}
    y, residual, steps, _, _ = solve(3, columns, lateral, **changes)
    assert (y >= 0).all()
    expected = relative_residual(columns, lateral, y)
    # a product of 20 terms in either precision, relative to max|d|, with |M||y| / max|d| up to 10
    torch.testing.assert_close(residual.double(), expected, rtol=0, atol=200 * torch.finfo(dtype).eps)
    assert residual[3] == 0.0
    if iterations == 500:
        assert residual.amax() <= 1e-3
        assert steps < 60
    else:
        assert steps == iterations


# -- the energy guards -------------------------------------------------------------------------------------------------


def undamped(drive: Tensor, lateral: Tensor, world_size: int, steps: int) -> Tensor:
    """Every owner solves its own block exactly against the others' last activities."""
    y = torch.zeros_like(drive)
    for _ in range(steps):
        parts = []
        for rows in split_rows(lateral.shape[0], world_size):
            own = slice(rows.start, rows.stop)
            block = lateral[own, own]
            parts.append(nnls_columns(drive[own] - lateral[own] @ y + block @ y[own], block))
        y = torch.cat(parts)
    return y


@pytest.mark.parametrize("world_size", [2, 3])
def test_converges_where_undamped_block_steps_jump(world_size: int) -> None:
    size = 9
    lateral = torch.ones(size, size, dtype=torch.float64) + 1e-3 * torch.eye(size, dtype=torch.float64)
    columns = random_drive(size, 5, 8) * 0.01 + 1.0
    best = energy(nnls_columns(columns, lateral), columns, lateral)
    jumps = [energy(undamped(columns, lateral, world_size, steps), columns, lateral) for steps in (10, 11)]
    assert torch.stack(jumps).amax() > -0.1  # every owner does the whole work, or none does any
    assert best.amax() < -0.5
    for steps, allowed in ((10, 0.03), (11, 0.03), (300, 1e-6)):
        y = solve(world_size, columns, lateral, tolerance=0.0, max_iterations=steps)[0]
        assert (energy(y, columns, lateral) - best).amax() <= allowed * best.abs().amax()


def hostile(kind: str) -> tuple[Tensor, Tensor]:
    if kind == "ones":
        return random_drive(9, 6, 5) * 0.05 + 1.0, torch.ones(9, 9, dtype=torch.float64) + 1e-4 * torch.eye(9)
    if kind == "signed":
        return random_drive(10, 6, 6), random_lateral(10, 6, condition=1e4, largest=3.0, signed=True)
    if kind == "units":
        # blocks of very different size, coupled as strongly as a semidefinite matrix allows
        scale = torch.logspace(-2, 1, 10, dtype=torch.float64)
        return random_drive(10, 6, 7) * scale[:, None], random_lateral(10, 7, condition=1e3) * scale * scale[:, None]
    return trained_like(24, 6)


@pytest.mark.parametrize("kind", ["ones", "signed", "units", "trained"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_energy_never_rises(kind: str, dtype: torch.dtype, rounding: float) -> None:
    """Over what runs of more and more steps return. Rounding: relative to the energies, of which float32 resolves 1e-7
    per product and M's condition of 1e4 makes no more than 3e-5."""
    columns, lateral = (part.to(dtype) for part in hostile(kind))
    last = torch.zeros(columns.shape[1], dtype=torch.float64)
    for steps in (1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 20):
        now = energy(
            solve(3, columns, lateral, tolerance=0.0, max_iterations=steps, inner_iterations=6)[0],
            columns,
            lateral,
        )
        assert (now <= last + rounding * last.abs().amax()).all(), steps
        last = now
    assert (last < 0).any()


@pytest.mark.parametrize("kind", ["ones", "signed", "units"])
def test_an_energy_that_rises_is_reverted(kind: str) -> None:
    """The safeguard does work in these runs: without it an iterate would be worse than one before it."""
    columns, lateral = hostile(kind)
    rows = split_rows(columns.shape[0], 2)
    risen = 0

    def owner(exchange: Any) -> int:
        own = rows[exchange.rank]
        lines = lateral[own.start : own.stop]
        blocks = Blocks.from_lateral(
            lines, certify_afresh(lateral, Rows.all(lateral.shape[0]), ridge=0), config(), own, 2
        )
        tile = BlockTile(own, columns.shape[1], exchange, lateral, config())
        tile.start(columns[own.start : own.stop], blocks)
        count = 0
        for handle in steps_of(tile, blocks, config(tolerance=0.0, max_iterations=60), exchange):
            handle.wait()
            tails = tile.tails[:, 1].sum(dim=0)
            count += int((tails > 0).sum())
        return count

    counts = results(run_owners(2, owner))
    risen = counts[0]
    assert counts == [risen, risen]
    assert risen > 0


# -- what is exchanged -------------------------------------------------------------------------------------------------


def exchanges_of_accelerated_gradient(drive: Tensor, lateral: Tensor, tolerance: float) -> int:
    """Of the textbook scheme, restarted by its gradient and looked at after every iteration, with the exact λmax:
    one per iteration and one that brings the last residual."""
    step = 1.0 / float(torch.linalg.eigvalsh(lateral)[-1])
    previous, y, k = torch.zeros_like(drive), (step * drive).clamp(min=0.0), torch.ones_like(drive[0])
    open_columns = torch.ones(drive.shape[1], dtype=torch.bool)
    count = 1
    while True:
        gradient = lateral @ y - drive
        residual = torch.minimum(lateral.diagonal()[:, None] * y, gradient).abs().amax(dim=0) / drive.abs().amax(dim=0)
        open_columns &= residual > tolerance
        if not open_columns.any():
            return count + 1
        z = y + k / (k + 3) * (y - previous)
        following = (z - step * (lateral @ z - drive)).clamp(min=0.0)
        k = torch.where((gradient * (following - y)).sum(dim=0) > 0, 0.0, k + 1)
        previous, y, count = y, following, count + 1


@pytest.mark.parametrize("exchange_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize(("world_size", "share"), [(2, 0.5), (4, 0.6)])
def test_few_exchanges(world_size: int, share: float, tolerance: float, exchange_dtype: str | None) -> None:
    columns, lateral = trained_like(96, 48)
    rival = exchanges_of_accelerated_gradient(columns, lateral, tolerance)
    _, residual, steps, num_exchanges, num_bytes = solve(
        world_size, columns.float(), lateral.float(), tolerance=tolerance, exchange_dtype=exchange_dtype
    )
    assert residual.amax() <= tolerance
    assert num_exchanges == steps <= share * rival
    per_row = 2 if exchange_dtype else 4
    slice_bytes = 96 // world_size * 48 * per_row + 4 * 48 * 4
    assert num_bytes == num_exchanges * (world_size - 1) * slice_bytes


def test_increments_reach_what_full_precision_reaches() -> None:
    """bfloat16 keeps 8 bits: plain values would stall near 4e-3. Increments end at float32's own floor."""
    columns, lateral = (part.float() for part in trained_like(40, 20))
    for tolerance in (1e-3, 1e-5):
        full = solve(2, columns, lateral, tolerance=tolerance)
        short = solve(2, columns, lateral, tolerance=tolerance, exchange_dtype="bfloat16")
        assert short[1].amax() <= tolerance
        assert short[2] <= full[2] + 3
    y = solve(2, columns.double(), lateral.double(), tolerance=1e-12, exchange_dtype="bfloat16")[0]
    expected = nnls_columns(columns, lateral)
    assert (y - expected).norm() <= 1e-8 * expected.norm()


def test_a_code_does_not_depend_on_its_batch_mates() -> None:
    columns, lateral = trained_like(20, 8)
    one = solve(2, columns, lateral, tolerance=1e-4)
    other = columns.flip(1) * -3.0
    other[:, 5] = columns[:, 5]
    two = solve(2, other, lateral, tolerance=1e-4)
    assert torch.equal(one[0][:, 5], two[0][:, 5])
    assert torch.equal(one[1][5], two[1][5])


def test_columns_stop_one_by_one_and_keep_their_code() -> None:
    """An easy column beside a hard one has what it would have alone, to the bit."""
    columns, lateral = trained_like(20, 8)
    columns[:, :7] = columns[:, 2:3]
    columns[:, 7] = 0.0
    columns[4, 7] = 1.0
    alone = columns.clone()
    alone[:, :7] = 0.0
    hard, easy = solve(2, columns, lateral, tolerance=1e-6), solve(2, alone, lateral, tolerance=1e-6)
    assert easy[2] < hard[2]
    assert torch.equal(hard[0][:, 7], easy[0][:, 7])


def test_tiles_in_flight_do_not_meet() -> None:
    columns, lateral = trained_like(20, 31)
    whole = solve(3, columns, lateral, tolerance=1e-10)
    tiled = solve(3, columns, lateral, tolerance=1e-10, tile_columns=8, tiles_in_flight=3)
    # same residual reached, condition 251
    assert (whole[0] - tiled[0]).abs().amax() <= 1e-6


# -- starts ------------------------------------------------------------------------------------------------------------


def test_a_warm_start_at_the_solution_stays() -> None:
    columns, lateral = trained_like(20, 12)
    y = solve(2, columns, lateral, tolerance=1e-12)[0]
    again, residual, steps, _, _ = solve(2, columns, lateral, tolerance=1e-9, start=y)
    assert steps == 2
    assert torch.equal(again, y)
    assert residual.amax() <= 1e-12


def test_an_absurd_start_is_dropped() -> None:
    columns, lateral = trained_like(20, 12)
    cold = solve(2, columns, lateral, tolerance=1e-8)
    y, _, steps, _, _ = solve(2, columns, lateral, tolerance=1e-8, start=torch.full_like(columns, 1e6))
    assert (y - cold[0]).abs().amax() <= 1e-4
    assert steps <= cold[2] + 40


# -- faults and odd input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["drive", "lateral", "exception"])
def test_a_fault_is_shared(where: str) -> None:
    columns, lateral = trained_like(10, 4)

    def owner(exchange: Any) -> Any:
        mine = exchange.rank == 1
        seen, lines = columns.clone(), lateral.clone()
        if mine and where == "drive":
            seen[5, 2] = math.nan
        if mine and where == "lateral":
            lines[5, 2] = math.inf
        fault = OSError("here") if mine and where == "exception" else None
        return solve_blocks(exchange, seen, lines, config(), fault)

    outcomes = run_owners(3, owner)
    assert all(isinstance(outcome, SharedFault) and outcome.ranks == [1] for outcome in outcomes), outcomes
    assert {outcome.kind for outcome in outcomes} == {
        "exception" if where == "exception" else "non-finite values in the drive or the lateral weights"
    }
    if where == "exception":
        assert isinstance(outcomes[1].__cause__, OSError)


def test_one_owner_raises_its_own_exception() -> None:
    columns, lateral = trained_like(10, 4)
    with pytest.raises(OSError, match="here"):
        solve_blocks(IDENTITY, columns, lateral, config(), OSError("here"))


@settings(PROBLEMS, max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    drive_exponent=st.integers(-30, 10),
    rank=st.integers(1, 6),
    dead_row=st.booleans(),
    exchange_dtype=st.sampled_from([None, "bfloat16"]),
)
def test_finite_float32_input_never_gives_nan(
    seed: int, drive_exponent: int, rank: int, dead_row: bool, exchange_dtype: str | None
) -> None:
    """Singular M, positive drive in its kernel, a dead row, a residual that float32 cannot reach."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(6, rank, generator=generator, dtype=torch.float64)
    lateral = factors @ factors.T
    if dead_row:
        lateral[-1] = lateral[:, -1] = 0.0
    columns = torch.randn(6, 3, generator=generator, dtype=torch.float64) * 10.0**drive_exponent
    y, residual, steps, _, _ = solve(
        2,
        columns.float(),
        lateral.float(),
        tolerance=1e-12,
        max_iterations=30,
        ridge=1e-6,
        exchange_dtype=exchange_dtype,
    )
    assert y.isfinite().all()
    assert (y >= 0).all()
    assert residual.isfinite().all()
    assert (residual <= 1.0 + 1e-6).all()  # no worse than y = 0 where M is near singular, and never a runaway
    assert steps <= 30


@PROBLEMS
@given(seed=st.integers(0, 10_000), size=st.integers(1, 8), signed=st.booleans(), dead_row=st.booleans())
def test_the_bound_of_a_block_holds(seed: int, size: int, signed: bool, dead_row: bool) -> None:
    block = random_lateral(size, seed, condition=50.0, largest=3.0, signed=signed)
    if dead_row:
        block[0] = block[:, 0] = 0.0
    top = float(torch.linalg.eigvalsh(block)[-1])
    certified = bound_of_block(block, 3.0 * (1.0 + 1e-12))
    assert top <= certified * (1.0 + 1e-14)
    if not signed and not dead_row:
        assert certified <= 1.05 * top
    assert bound_of_block(torch.full((2, 2), math.nan), math.nan) > 0


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange_dtype", [None, "bfloat16"])
def test_no_buffer_is_allocated_per_step(exchange_dtype: str | None) -> None:
    columns, lateral = (part.float() for part in trained_like(8, 64))
    settings_ = config(tolerance=1e-12, max_iterations=10, exchange_dtype=exchange_dtype)
    rows = Rows.all(8)
    blocks = Blocks.from_lateral(lateral, certify_afresh(lateral, rows, ridge=0), settings_, rows)
    tile = BlockTile(rows, 64, IDENTITY, lateral, settings_)
    with CountAllocations(8 * 64) as counter:
        torch.ones(8, 64)
        assert counter.count == 1
        tile.start(columns, blocks)
        assert sum(1 for _ in steps_of(tile, blocks, settings_, IDENTITY)) == 11
    assert counter.count == 1


def test_a_tile_that_met_a_fault_serves_again() -> None:
    columns, lateral = trained_like(8, 16)
    rows, wanted = Rows.all(8), config(tolerance=1e-6)
    blocks = Blocks.from_lateral(lateral, certify_afresh(lateral, rows, ridge=0), wanted, rows)

    def run(tile: BlockTile, drive: Tensor) -> Tensor:
        tile.start(drive, blocks)
        for handle in steps_of(tile, blocks, wanted, IDENTITY):
            handle.wait()
        return tile.gathered[0, :8].clone()

    used = BlockTile(rows, 16, IDENTITY, lateral, wanted)
    run(used, columns * 1e6)
    with pytest.raises(SharedFault, match="non-finite values in the drive"):
        run(used, columns * math.nan)
    assert torch.equal(run(used, columns), run(BlockTile(rows, 16, IDENTITY, lateral, wanted), columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_keeps_what_the_format_holds(dtype: torch.dtype) -> None:
    """Three rows of five do not fill whole words of float64; an owner with two rows leaves the third zero."""
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packing = Packing(2, 3, 2, 5, values, dtype)
    assert packing.buffer.nbytes == 2 * 8 * (math.ceil(15 * dtype.itemsize / 8) + 10)
    packing.tails.fill_(math.pi)
    packing.pack(1, values)
    unpacked = torch.full((2, 3, 5), math.nan, dtype=torch.float64)
    packing.unpack(unpacked)
    assert torch.equal(unpacked[1, :2], values.to(dtype).double())
    assert (unpacked[1, 2] == 0).all()
    assert (unpacked[0] == 0).all()
    assert (packing.tails == math.pi).all()
