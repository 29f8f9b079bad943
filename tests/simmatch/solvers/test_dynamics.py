"""The solver against NNLS, plain loops, pynsm and its own promises."""

from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import PatchConfig, drive, prepare
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics, unrolled
from simmatch.solvers.quadratic import ConvergenceWarning, solve
from tests.live_bytes import CountAllocations
from tests.reference import (
    accelerated,
    nnls_columns,
    projected_gradient,
    random_drive,
    random_lateral,
    relative_residual,
)

PROBLEMS = settings(derandomize=True, deadline=None, database=None, max_examples=15)
FIRST_ORDER = ("accelerated", "projected_gradient")
SOLVERS = ("coordinate_descent", *FIRST_ORDER)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[Tensor, Tensor]:
    """Drive [24, 60] and lateral [24, 24] of a layer after 40 updates on digits scaled to [0, 4], in float64."""
    images = to_unit(digits.train_images[:1000], torch.float64) * 4.0
    layer = SimilarityMatchingConv2d(
        1,
        24,
        4,
        dynamics=DynamicsConfig(tolerance=1e-3, max_iterations=400),
        plasticity=PlasticityConfig(lr=0.1, tau=0.5),
        dtype=torch.float64,
    )
    for start in range(0, 1000, 25):
        layer.partial_fit(images[start : start + 25])
    columns = layer.drive(images[:12])
    return columns[:, ::5].contiguous(), layer.lateral


def dynamics(config: DynamicsConfig, lateral: Tensor) -> Dynamics:
    return Dynamics(config, Rows.all(lateral.shape[0]))


# -- the solution ------------------------------------------------------------------------------------------------------


@PROBLEMS
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 12),
    log_condition=st.floats(0.5, 4.0),
    largest=st.sampled_from([0.03, 1.0, 2.5, 300.0]),
    solver=st.sampled_from(["coordinate_descent", "accelerated"]),
)
def test_fast_solvers_equal_nnls(seed: int, size: int, log_condition: float, largest: float, solver: str) -> None:
    lateral = random_lateral(size, seed, condition=10**log_condition, largest=largest)
    columns = random_drive(size, 3, seed + 1)
    config = DynamicsConfig(solver=solver, tolerance=1e-13, max_iterations=20_000, ridge=0)
    solution = solve(columns, lateral, config)
    # |Δy| ≤ √K · residual · max|d| / λmin, and |y*| ≳ max|d| / λmax: relative error ≤ √12 · 1e-13 · 1e4 = 4e-9
    expected = nnls_columns(columns, lateral)
    assert (solution.y - expected).norm() <= 1e-8 * expected.norm()


@PROBLEMS
@given(seed=st.integers(0, 10_000), size=st.integers(1, 10), solver=st.sampled_from(SOLVERS), signed=st.booleans())
def test_all_solvers_equal_nnls(seed: int, size: int, solver: str, signed: bool) -> None:
    lateral = random_lateral(size, seed, condition=30.0, largest=3.0, signed=signed)
    columns = random_drive(size, 3, seed + 1)
    config = DynamicsConfig(solver=solver, tolerance=1e-12, max_iterations=5_000, ridge=0)
    expected = nnls_columns(columns, lateral)
    # as above with condition 30: 1e-10
    assert (solve(columns, lateral, config).y - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_ill_conditioned(solver: str) -> None:
    """Condition 1e4 and λmax = 50, built backwards: d = M y* − g with g ≥ 0 off the support of y* makes y* exact."""
    size = 8
    lateral = random_lateral(size, 3, condition=1e4, largest=50.0)
    generator = torch.Generator().manual_seed(4)
    known = torch.randn(size, 2, generator=generator, dtype=torch.float64).clamp(min=0.0)
    slack = torch.rand(size, 2, generator=generator, dtype=torch.float64) * (known == 0)
    columns = lateral @ known - slack
    # projected gradient gains a factor 1 − 1.9e-4 per iteration at worst: 120,000 of them reach 1e-10
    iterations = 120_000 if solver == "projected_gradient" else 20_000
    config = DynamicsConfig(solver=solver, tolerance=1e-13, max_iterations=iterations, check_every=100, ridge=0)
    assert (solve(columns, lateral, config).y - known).norm() <= 1e-8 * known.norm()


@pytest.mark.parametrize("solver", ["coordinate_descent", "accelerated"])
def test_trained_lateral_equals_nnls(trained: tuple[Tensor, Tensor], solver: str) -> None:
    columns, lateral = trained
    eigenvalues = torch.linalg.eigvalsh(lateral)
    assert eigenvalues[-1] > 2.0  # the step 1.0 of the authors' code has no guarantee here
    expected = nnls_columns(columns, lateral)
    config = DynamicsConfig(solver=solver, tolerance=1e-13, max_iterations=20_000, ridge=0)
    solution = solve(columns, lateral, config)
    # condition up to 1e5 at residual 1e-13
    assert (solution.y - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("solver", ["coordinate_descent", "accelerated"])
def test_ridge_is_added_to_the_diagonal(solver: str) -> None:
    lateral = random_lateral(6, 11, condition=1e3, largest=4.0)
    columns = random_drive(6, 4, 12)
    config = DynamicsConfig(solver=solver, tolerance=1e-13, max_iterations=20_000, ridge=0.05)
    shifted = lateral + 0.05 * lateral.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = nnls_columns(columns, shifted)
    assert (solve(columns, lateral, config).y - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("check_every", [1, 4, 7])
def test_iterates_equal_plain_loops(signed: bool, check_every: int) -> None:
    """Not the limit but every iterate: momentum, restart and step are those that the documentation names."""
    lateral = random_lateral(7, 21, condition=1e3, largest=5.0, signed=signed)
    columns = random_drive(7, 6, 22)
    bound = certify_afresh(lateral, Rows.all(7), ridge=0)
    for iterations in (1, 2, 5, 38, 90):
        config = DynamicsConfig(tolerance=0, max_iterations=iterations, check_every=check_every, ridge=0)
        solution = dynamics(config, lateral).solve(columns, lateral, bound)
        expected = accelerated(columns, lateral, 1.0 / bound.value, iterations, check_every)
        # affine against textbook form of one recursion: 90 iterations of rounding, values near 1
        torch.testing.assert_close(solution.y, expected, rtol=1e-11, atol=1e-11)
        assert solution.num_iters == iterations

        config = config.model_copy(update={"solver": "projected_gradient"})
        solution = dynamics(config, lateral).solve(columns, lateral, bound)
        expected = projected_gradient(columns, lateral, 1.9 / bound.value, iterations)
        torch.testing.assert_close(solution.y, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_fixed_step_reproduces_pynsm(seed: int) -> None:
    """The authors' library: step 1.0, 40 iterations, rectified."""
    import pynsm  # here, so that a machine without it runs the tests of a GPU

    generator = torch.Generator().manual_seed(seed)
    channels, size = 6, 3
    feedforward = torch.randn(channels, 2, size, size, generator=generator, dtype=torch.float64) / size
    lateral = random_lateral(channels, seed, condition=20.0, largest=1.7)  # below 2: the step is stable
    images = torch.rand(3, 2, 7, 6, generator=generator, dtype=torch.float64)

    encoder = nn.Conv2d(2, channels, size, bias=False, dtype=torch.float64)
    authors = pynsm.SimilarityMatching(
        encoder=encoder, out_channels=channels, iteration_projection=torch.nn.functional.relu, max_iterations=40
    ).double()
    with torch.no_grad():
        encoder.weight.copy_(feedforward)
        authors.competitor.weight.copy_(lateral)
    expected = authors(images).transpose(0, 1).flatten(1)  # b k h w → k (b h w)

    patch = PatchConfig(2, size)
    columns = drive(prepare(images, patch), feedforward)
    config = DynamicsConfig(solver="projected_gradient", step=1.0, tolerance=0, max_iterations=40, ridge=0)
    # the same 40 operations in float64; at condition 20 they have not converged, so the count matters
    torch.testing.assert_close(solve(columns, lateral, config).y, expected, rtol=1e-10, atol=1e-10)


def test_step_one_oscillates_where_the_certified_step_converges(trained: tuple[Tensor, Tensor]) -> None:
    # all y_i alike: y ← relu(1 − 1.5 y) jumps between 0 and 1 for ever, at residuals 1 and min(M_ii, 1.5) = 0.7
    alike = torch.ones(4, 1, dtype=torch.float64), 0.1 * torch.eye(4, dtype=torch.float64) + 0.6
    for columns, lateral in (alike, trained):
        for iterations in (40, 41, 400):
            config = DynamicsConfig(solver="projected_gradient", step=1.0, tolerance=1e-3, max_iterations=iterations)
            with pytest.warns(ConvergenceWarning, match="reached a residual of"):
                oscillating = solve(columns, lateral, config)
            assert oscillating.residual.median() > 0.5
            assert oscillating.y.isfinite().all()
        certified = DynamicsConfig(solver="projected_gradient", tolerance=1e-3, max_iterations=5_000)
        assert solve(columns, lateral, certified).residual.amax() <= 1e-3


# -- the residual and the stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", FIRST_ORDER)
@pytest.mark.parametrize("iterations", [1, 3, 8, 30])
def test_residual_belongs_to_the_returned_activities(
    solver: str, iterations: int, trained: tuple[Tensor, Tensor]
) -> None:
    columns, lateral = trained
    config = DynamicsConfig(solver=solver, tolerance=0, max_iterations=iterations, ridge=0)
    solution = solve(columns, lateral, config)
    expected = relative_residual(columns, lateral, solution.y)
    assert expected.amax() > 1e-4  # there is something to report
    # formed as (y − w)/s by the solver: rounding of order K · eps relative to the drive
    torch.testing.assert_close(solution.residual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_tolerance_is_respected_by_every_column(
    solver: str, tolerance: float, dtype: torch.dtype, slack: float, trained: tuple[Tensor, Tensor]
) -> None:
    """In float32 too, by a residual formed in float64; 1e-4 is float32's rounding over K = 24 terms, generously."""
    columns, lateral = trained[0].to(dtype), trained[1].to(dtype)
    config = DynamicsConfig(solver=solver, tolerance=tolerance, max_iterations=3_000, tile_columns=16, ridge=0)
    solution = solve(columns, lateral, config)
    assert solution.y.dtype == dtype
    assert solution.residual.amax() <= tolerance
    assert relative_residual(columns, lateral, solution.y).amax() <= tolerance + slack
    assert (solution.y >= 0).all()


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_stops_at_the_first_check_below_the_tolerance(tolerance: float) -> None:
    """The residual seen at iteration c (every 4th) lets the iteration that follows be the last: y is iterate c + 1."""
    lateral = random_lateral(7, 31, condition=300.0, largest=5.0)
    columns = random_drive(7, 1, 32)
    bound = certify_afresh(lateral, Rows.all(7), ridge=0)

    def iterate(count: int) -> Tensor:
        return accelerated(columns, lateral, 1.0 / bound.value, count, 4)

    first = next(c for c in range(4, 400, 4) if relative_residual(columns, lateral, iterate(c))[0] <= tolerance)
    assert relative_residual(columns, lateral, iterate(first + 1))[0] <= tolerance  # momentum did not leave it again
    config = DynamicsConfig(tolerance=tolerance, max_iterations=400, check_every=4, ridge=0)
    solution = dynamics(config, lateral).solve(columns, lateral, bound)
    assert solution.num_iters == first + 1
    torch.testing.assert_close(solution.y, iterate(first + 1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("factor", [10.0, 255.0, 1e-4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_units_of_the_input_do_not_matter(solver: str, factor: float, trained: tuple[Tensor, Tensor]) -> None:
    """x → c x: d → c³ d, M → c² M, y → c y; the residual and the number of iterations stay."""
    columns, lateral = trained
    config = DynamicsConfig(solver=solver, tolerance=1e-2, max_iterations=2_000)
    plain, scaled = solve(columns, lateral, config), solve(columns * factor**3, lateral * factor**2, config)
    assert scaled.num_iters == plain.num_iters
    # rounding of c³ d and c² M, amplified by the condition of the first few dozen iterations
    torch.testing.assert_close(scaled.y, plain.y * factor, rtol=1e-9, atol=1e-9 * factor)
    torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-6, atol=1e-10)


def test_zero_drive_is_exactly_zero() -> None:
    lateral = random_lateral(5, 41, condition=1e3, largest=3.0)
    columns = random_drive(5, 6, 42)
    columns[:, 2] = 0.0
    columns[:, 4] = -columns[:, 4].abs()
    solution = solve(columns, lateral, DynamicsConfig(tolerance=1e-6, max_iterations=2_000))
    for column in (2, 4):
        assert (solution.y[:, column] == 0).all()
        assert solution.residual[column] == 0
    assert solve(torch.zeros_like(columns), lateral).y.count_nonzero() == 0


def test_warns_exactly_when_not_converged() -> None:
    lateral = random_lateral(6, 51, condition=1e3, largest=3.0)
    columns = random_drive(6, 5, 52)
    with pytest.warns(ConvergenceWarning, match=r"above the tolerance 1\.00e-09; raise max_iterations \(now 9\)"):
        solution = solve(columns, lateral, DynamicsConfig(solver="accelerated", tolerance=1e-9, max_iterations=9))
    assert solution.num_iters == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in ("coordinate_descent", "accelerated"):
            solve(columns, lateral, DynamicsConfig(solver=solver, tolerance=1e-9, max_iterations=5_000))
        solve(columns, lateral, DynamicsConfig(tolerance=0, max_iterations=9))  # asked for nothing
        bound = certify_afresh(lateral, Rows.all(6), ridge=0)
        dynamics(DynamicsConfig(tolerance=1e-9, max_iterations=9), lateral).solve(columns, lateral, bound)


# -- columns are independent -------------------------------------------------------------------------------------------


def difficult_batch(lateral: Tensor, columns: int) -> Tensor:
    """Drives whose columns need from none to hundreds of iterations, over twelve orders of magnitude."""
    size = lateral.shape[0]
    generator = torch.Generator().manual_seed(61)
    result = torch.randn(size, columns, generator=generator, dtype=torch.float64) + 0.3
    _, vectors = torch.linalg.eigh(lateral)
    result[:, ::5] = vectors[:, :1]  # the slowest direction
    result[:, 1::5] = lateral.sum(dim=1, keepdim=True)  # y* = 1
    result[:, 3::10] = 0.0
    return result * 10.0 ** torch.linspace(-6, 6, columns, dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-5])
@pytest.mark.parametrize("check_every", [1, 4])
def test_a_code_does_not_depend_on_its_batch_mates(tolerance: float, check_every: int) -> None:
    """Bit by bit at the same place: easy mates, hard mates, mates that vanish, and mates of another scale."""
    lateral = random_lateral(9, 62, condition=1e3, largest=4.0)
    columns = difficult_batch(lateral, 20)
    config = DynamicsConfig(tolerance=tolerance, max_iterations=300, check_every=check_every, tile_columns=20)
    solver, bound = dynamics(config, lateral), certify_afresh(lateral, Rows.all(9), ridge=1e-6)
    together = solver.solve(columns, lateral, bound)
    alone_iters = set()
    for keep in range(20):
        for mates in (torch.zeros_like(columns), columns.flip(1) * 1e3):
            mates[:, keep] = columns[:, keep]
            solution = solver.solve(mates, lateral, bound)
            assert torch.equal(solution.y[:, keep], together.y[:, keep])
            assert torch.equal(solution.residual[keep], together.residual[keep])
            alone_iters.add(solution.num_iters)
    assert len(alone_iters) > 2  # the columns do stop at different times


@pytest.mark.parametrize("tolerance", [0.0, 1e-2, 1e-5])
def test_tiles_and_positions_change_only_rounding(tolerance: float) -> None:
    lateral = random_lateral(9, 62, condition=1e3, largest=4.0)
    columns = difficult_batch(lateral, 150)
    bound = certify_afresh(lateral, Rows.all(9), ridge=1e-6)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(63))
    config = DynamicsConfig(tolerance=tolerance, max_iterations=200)
    expected = dynamics(config, lateral).solve(columns, lateral, bound)
    for width in (7, 64, 1000):
        solver = dynamics(config.model_copy(update={"tile_columns": width}), lateral)
        for _ in range(2):  # the second call meets used buffers
            solution = solver.solve(columns[:, order], lateral, bound)
            # another GEMM kernel sums in another order; 200 iterations of float64 rounding, relative to the column
            scale = expected.y.amax(dim=0).clamp(min=1e-300)[order]
            torch.testing.assert_close(solution.y / scale, expected.y[:, order] / scale, rtol=0, atol=1e-9)
            assert solution.num_iters == expected.num_iters


def test_used_buffers_leave_no_trace() -> None:
    """A call after another problem, another width and a failed call equals a fresh solver's."""
    lateral, other = random_lateral(6, 71, largest=3.0), random_lateral(6, 72, condition=1e4, largest=50.0)
    columns = random_drive(6, 33, 73)
    config = DynamicsConfig(tolerance=1e-4, tile_columns=16)
    fresh = dynamics(config, lateral).solve(columns, lateral, certify_afresh(lateral, Rows.all(6), ridge=0))
    solver = dynamics(config, lateral)
    solver.solve(columns * -1e20, other, certify_afresh(other, Rows.all(6), ridge=0))
    broken = columns.clone()
    broken[2, 20] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite values in the drive"):
        solver.solve(broken, lateral, certify_afresh(lateral, Rows.all(6), ridge=0))
    again = solver.solve(columns, lateral, certify_afresh(lateral, Rows.all(6), ridge=0))
    assert torch.equal(again.y, fresh.y)
    assert torch.equal(again.residual, fresh.residual)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_unrolled_equals_the_fixed_solver(
    solver: str, dtype: torch.dtype, tolerance: float, trained: tuple[Tensor, Tensor]
) -> None:
    """Tolerances: 30 iterations of rounding in either precision, relative to the largest activity."""
    columns, lateral = trained[0].to(dtype), trained[1].to(dtype)
    config = DynamicsConfig(solver=solver, encode_iterations=30, tolerance=0.5)
    bound = certify_afresh(lateral, Rows.all(lateral.shape[0]), ridge=config.ridge)
    fixed = dynamics(config, lateral).solve(columns, lateral, bound, fixed=True)
    assert fixed.num_iters == 30
    plain = unrolled(columns, lateral, config, bound=bound.value, ridge=bound.ridge)
    assert (plain - fixed.y).abs().amax() <= tolerance * fixed.y.amax()


# -- any finite input, and bad input -----------------------------------------------------------------------------------


# y* beyond float32 and y* = 0 side by side, of either solver
@example(0, 1, 37, -30, 0, False, "accelerated", 0.0)
@example(0, 4, 37, -30, 2, True, "projected_gradient", 1e-6)
@example(0, 1, 37, -30, 0, False, "coordinate_descent", 0.0)
@example(0, 4, 37, -30, 2, True, "coordinate_descent", 0.0)
@settings(PROBLEMS, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 6),
    drive_exponent=st.integers(-38, 37),
    lateral_exponent=st.integers(-30, 30),
    rank=st.integers(0, 6),
    dead_row=st.booleans(),
    solver=st.sampled_from(SOLVERS),
    ridge=st.sampled_from([0.0, 1e-6]),
)
def test_finite_float32_input_never_gives_nan(
    seed: int,
    size: int,
    drive_exponent: int,
    lateral_exponent: int,
    rank: int,
    dead_row: bool,
    solver: str,
    ridge: float,
) -> None:
    """Extreme units, singular M, positive drive in its kernel, a dead row."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(size, rank, generator=generator, dtype=torch.float64)
    factors[0] += 0.1
    lateral = factors @ factors.T
    if dead_row and size > 1:
        lateral[-1] = lateral[:, -1] = 0.0
    if rank == 0:
        lateral[0, 0] = 1.0
    lateral = (lateral * 10.0**lateral_exponent).float()
    columns = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    columns = (columns * 10.0**drive_exponent).clamp(-3e38, 3e38).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = solve(columns, lateral, DynamicsConfig(solver=solver, ridge=ridge, max_iterations=20))
    assert solution.y.isfinite().all()
    assert solution.residual.isfinite().all()
    assert (solution.y >= 0).all()


def test_extreme_units_still_solve() -> None:
    """d = 1e30 and M = 1e-4: y = 1e34; d = 1e-30 and M = 1e-20: y = 1e-10. Both fit float32, though M d would not."""
    for (level, inhibition), solver in product(((1e30, 1e-4), (1e-30, 1e-20), (1e-30, 1e6)), SOLVERS[:2]):
        columns = torch.tensor([[level], [-level]])
        solution = solve(columns, torch.eye(2) * inhibition, DynamicsConfig(solver=solver, ridge=0))
        # two roundings of float32
        torch.testing.assert_close(solution.y, torch.tensor([[level / inhibition], [0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("columns", "lateral", "message"),
    [
        (torch.ones(3), torch.eye(3), r"expected drive \[K, N\] and lateral \[K, K\], got drive \[3\]"),
        (torch.ones(3, 2), torch.eye(4), r"got drive \[3, 2\] and lateral \[4, 4\]"),
        (torch.ones(3, 2), torch.ones(3, 2), r"got drive \[3, 2\] and lateral \[3, 2\]"),
        (torch.ones(2, 2, dtype=torch.int64), torch.eye(2, dtype=torch.int64), "one floating dtype, got torch.int64"),
        (torch.ones(2, 2), torch.eye(2).double(), "got torch.float32 and torch.float64"),
        (torch.tensor([[1.0], [math.nan]]), torch.eye(2), "drive: expected finite values"),
        (torch.ones(2, 1), torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), "lateral: expected finite values"),
        (torch.ones(2, 1), torch.tensor([[1.0, 0.2], [0.1, 1.0]]), "lateral: expected a symmetric matrix.*1.00e-01"),
        (torch.ones(2, 1), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite matrix.*-1.00e"),
        (torch.ones(2, 1), torch.zeros(2, 2), "expected a positive diagonal entry, got none"),
    ],
)
def test_bad_input_is_named(columns: Tensor, lateral: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(columns, lateral)


def test_no_columns_give_no_activities() -> None:
    solution = solve(torch.zeros(3, 0), torch.eye(3))
    assert solution.y.shape == (3, 0)
    assert solution.residual.shape == (0,)


# -- cost --------------------------------------------------------------------------------------------------------------


def test_the_counter_counts() -> None:
    with CountAllocations(100) as counter:
        values = torch.ones(10, 10)
        values.mul_(2.0)
        torch.add(values, values, out=values)
        values.sum(dim=0)
        assert counter.count == 1
        values.abs()
        assert counter.count == 2


@pytest.mark.parametrize("solver", FIRST_ORDER)
@pytest.mark.parametrize("tolerance", [0.0, 1e-12])
def test_no_buffer_is_allocated_per_iteration(solver: str, tolerance: float) -> None:
    size, columns = 6, 64
    lateral = random_lateral(size, 81, condition=1e4, largest=4.0)
    problem = random_drive(size, columns, 82)
    bound = certify_afresh(lateral, Rows.all(size), ridge=0)
    counts = []
    for iterations in (20, 60):
        config = DynamicsConfig(
            solver=solver, tolerance=tolerance, max_iterations=iterations, tile_columns=columns, ridge=0
        )
        warm = dynamics(config, lateral)
        warm.solve(problem, lateral, bound)
        with CountAllocations(size * columns) as counter:
            assert warm.solve(problem, lateral, bound).num_iters == iterations
        counts.append(counter.count)
    assert counts[0] == counts[1]
    assert counts[0] <= 3  # what is returned, and how it is put together


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_cuda_equals_cpu(
    cuda: torch.device, dtype: torch.dtype, tolerance: float, trained: tuple[Tensor, Tensor]
) -> None:
    """Fixed iterations, so that only rounding differs: 60 of them, relative to the largest activity."""
    columns, lateral = trained[0].to(dtype), trained[1].to(dtype)
    config = DynamicsConfig(tolerance=0, max_iterations=60, tile_columns=16)
    expected = solve(columns, lateral, config)
    solution = solve(columns.to(cuda), lateral.to(cuda), config)
    assert solution.y.device.type == "cuda"
    assert (solution.y.cpu() - expected.y).abs().amax() <= tolerance * expected.y.amax()
