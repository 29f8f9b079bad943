"""The benchmarks: how they time, count memory and report; and small runs whose figures are recomputed."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.benchmark import BAD_INPUT, SUBCOMMANDS, main
from jobs.benchmarks.dynamics import configuration, iterations_per_column, slope, solver_names
from jobs.benchmarks.efficiency import peak_allocated_bytes, peak_resident_bytes, step_memory
from jobs.benchmarks.gpu_layer import GpuPlan, synchronisations
from jobs.benchmarks.problems import Problem, Recipe, trained_problem
from jobs.benchmarks.pynsm_training import RATES, edges
from jobs.benchmarks.rivals import LeastSquares, nnls, tuned_descent
from jobs.benchmarks.timing import MIN_ROUNDS, Spread, Timings, alternate
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset
from simmatch.solvers.dynamics import Dynamics
from tests.reference import nnls_columns, projected_gradient, random_drive, random_lateral, relative_residual

# -- timing ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def work(self, name: str, seconds: list[float]) -> Callable[[], None]:
        remaining = iter(seconds)

        def action() -> None:
            self.calls += name
            self.now += next(remaining)

        return action


def test_candidates_take_turns_and_ratios_are_formed_within_a_round() -> None:
    clock = Clock()
    # a disturbance makes both of round 3 slow: the ratio does not see it. The first of each is the warm-up
    slow = [100.0, 4.0, 4.0, 40.0, 6.0, 4.0]
    fast = [100.0, 2.0, 1.0, 20.0, 1.0, 4.0]
    candidates = {"slow": clock.work("s", slow), "fast": clock.work("f", fast)}
    rounds = []
    timings = alternate(candidates, 5, clock=lambda: clock.now, after_round=lambda: rounds.append(clock.calls))
    assert clock.calls == "sf" * 6
    assert [len(calls) for calls in rounds] == [2, 4, 6, 8, 10, 12]
    assert timings.seconds == {"slow": slow[1:], "fast": fast[1:]}
    assert timings.speedup("fast", over="slow") == Spread(median=2.0, min=1.0, max=6.0)  # of 2, 4, 2, 6, 1
    assert timings.speedup("slow", over="slow") == Spread(1.0, 1.0, 1.0)
    assert timings.rate("fast", 8.0) == Spread(median=4.0, min=0.4, max=8.0)  # of 4, 8, 0.4, 8, 2
    assert timings.spread("slow").fields("s") == {"s": 4.0, "s_min": 4.0, "s_max": 40.0}


def test_short_candidates_are_called_until_they_last() -> None:
    clock = Clock()
    candidates = {"short": clock.work("s", [3.0] + [0.25] * 100), "long": clock.work("l", [2.0] * 100)}
    timings = alternate(candidates, 5, min_s=1.0, clock=lambda: clock.now)
    # the first call took long enough; had it not, the second one would have told
    assert clock.calls == "sl" * 6
    clock = Clock()
    candidates = {"short": clock.work("s", [0.5] + [0.25] * 100), "long": clock.work("l", [2.0] * 100)}
    timings = alternate(candidates, 5, min_s=1.0, clock=lambda: clock.now)
    assert clock.calls == "ssl" + "ssssl" * 5
    assert timings.seconds["short"] == [0.25] * 5  # per call


def test_a_stateful_candidate_is_warmed_up_with_another() -> None:
    clock = Clock()
    alternate(
        {"a": clock.work("a", [1.0] * 5)},
        warm_up={"a": clock.work("w", [1.0])},
        clock=lambda: clock.now,
    )
    assert clock.calls == "w" + "a" * MIN_ROUNDS


def test_few_rounds_and_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 5, got 3"):
        alternate({"a": lambda: None}, 3)
    with pytest.raises(ValueError, match="candidates: expected at least one"):
        alternate({})


def test_ratios_of_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Timings({"a": [1.0, 2.0], "b": [1.0]}).speedup("a", over="b")


# -- memory ------------------------------------------------------------------------------------------------------------

MEGABYTE = 2**20


def block(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MEGABYTE, dtype=torch.uint8)


def test_peak_is_of_what_lives_at_once() -> None:
    before = block(16)

    def action() -> torch.Tensor:
        first = block(3)
        second = block(4)
        del first
        third = block(2)  # 4 + 2 now; the peak was 3 + 4
        before.add_(1)
        del second
        return third

    assert peak_allocated_bytes(action) == 7 * MEGABYTE
    assert peak_allocated_bytes(lambda: before.add_(1)) < MEGABYTE


def test_peak_sees_temporaries_inside_a_kernel() -> None:
    """A float64 convolution on a CPU unfolds its input: [B, C·k·k, L] values that no operator returns."""
    x, weight = torch.rand(2, 3, 20, 20, dtype=torch.float64), torch.rand(4, 3, 5, 5, dtype=torch.float64)
    peak = peak_allocated_bytes(lambda: torch.nn.functional.conv2d(x, weight))
    result, unfolded = 2 * 4 * 16**2 * 8, 2 * 3 * 5**2 * 16**2 * 8
    assert result + unfolded <= peak <= 1.1 * (result + unfolded)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the highest resident memory")
def test_resident_peak_grows_by_what_is_touched() -> None:
    grown = peak_resident_bytes(lambda: torch.ones(64 * MEGABYTE, dtype=torch.uint8))
    assert grown is not None
    assert 60 * MEGABYTE <= grown <= 90 * MEGABYTE


def test_memory_of_a_training_step_does_not_depend_on_the_kernel() -> None:
    rows = [step_memory(kernel, 1, (28, 28), channels=64, images=20) for kernel in (3, 7)]
    small, large = (row["ratio"] for row in rows)
    assert rows[0]["activities_bytes"] == 64 * 20 * 28 * 28 * 4
    assert 1.0 < small <= 4.0  # the activities themselves, and the target
    assert large == pytest.approx(small, rel=0.1)  # all patches at once: 0.8 of the activities at k = 7, 0.1 at 3


# -- problems and rivals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Condition 300, seven columns, in float64; one column has no drive."""
    drive = random_drive(12, 7, 1)
    drive[:, 3] = 0.0
    return Problem(random_lateral(12, 0, condition=300.0, largest=3.0), drive, ridge=0.0)


def test_residual_and_solution_equal_the_reference(problem: Problem) -> None:
    y = random_drive(12, 7, 2).clamp(min=0.0)
    y[:, 3] = 0.0
    torch.testing.assert_close(problem.residual(y), relative_residual(problem.drive, problem.lateral, y))
    expected = nnls_columns(problem.drive, problem.lateral)
    # residual 1e-10 at condition 300: |Δy| / |y*| ≲ √12 · 1e-10 · 300
    assert (problem.exact() - expected).norm() <= 1e-7 * expected.norm()
    assert problem.condition == pytest.approx(300.0)
    assert problem.largest == pytest.approx(3.0)
    y[0, 0] = -1e-3
    assert torch.isinf(problem.residual(y)[0])


def test_rivals_solve_the_same_problem(problem: Problem) -> None:
    expected = nnls_columns(problem.drive, problem.lateral)
    squares = LeastSquares.of(problem)
    found = squares.activities(nnls(squares))
    assert (found - expected).norm() <= 1e-8 * expected.norm()
    for residual in (1e-2, 1e-3):
        descent = tuned_descent(problem, squares, residual)
        assert descent is not None
        theirs = squares.activities(descent.solve(squares))
        assert relative_residual(problem.drive, problem.lateral, theirs).amax() <= residual
        # |Δy| ≤ √K · residual · max|d| / λmin, |y*| ≥ about max|d| / λmax
        assert (theirs - expected).norm() <= np.sqrt(12) * residual * 300 * expected.norm()


def test_a_problem_is_trained_once_for_a_recipe(digits: Dataset, tmp_path: Path) -> None:
    recipe = Recipe("digits", 6, images=30, batch_size=10, columns=20, seed=0)
    steps: list[tuple[int, int]] = []

    def count(*step: int) -> None:
        steps.append((step[0], step[1]))

    first = trained_problem(recipe, digits, tmp_path, count)
    assert steps == [(0, 3), (1, 3), (2, 3)]
    assert first.drive.shape == (6, 20)
    assert not torch.equal(first.lateral, torch.eye(6))
    again = trained_problem(recipe, digits, tmp_path, count)
    assert len(steps) == 3
    assert torch.equal(again.lateral, first.lateral)
    assert torch.equal(again.drive, first.drive)
    other = trained_problem(Recipe("digits", 6, 30, 10, 20, seed=1), digits, tmp_path, count)
    assert len(steps) == 6
    assert not torch.equal(other.lateral, first.lateral)
    (tmp_path / "digits-6.safetensors").write_bytes(b"damaged")
    assert torch.equal(trained_problem(recipe, digits, tmp_path, count).lateral, first.lateral)
    assert len(steps) == 9


def test_exponents_add_up() -> None:
    sizes = [64, 128, 512]
    iterations, each = [3.0 * size**0.4 for size in sizes], [2e-9 * size**1.7 for size in sizes]
    seconds = [count * taken for count, taken in zip(iterations, each, strict=True)]
    assert slope(sizes, seconds) == pytest.approx(2.1)
    assert slope(sizes, iterations) + slope(sizes, each) == pytest.approx(slope(sizes, seconds))


# -- whole runs --------------------------------------------------------------------------------------------------------


def rows_of(out: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in out.splitlines():
        row = json.loads(line)
        found.setdefault(row["kind"], []).append(row)
    return found


def test_dynamics_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "dynamics",
        "--quick",
        "--data",
        "digits",
        "--channels",
        "8",
        "16",
        "--images",
        "100",
        "--columns",
        "40",
    ]
    arguments += ["--parts", "solvers", "gemm", "rivals", "--run-dir", str(tmp_path), "--seed", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "dynamics.jsonl").read_text() == out
    rows = rows_of(out)
    assert rows["environment"][0]["options"]["seed"] == 3
    stored = {channels: load_file(tmp_path / "problems" / f"digits-{channels}.safetensors") for channels in (8, 16)}
    for row in rows["problem"]:
        eigenvalues = np.linalg.eigvalsh(stored[row["channels"]]["lateral"].double().numpy())
        assert row["largest_eigenvalue"] == pytest.approx(eigenvalues[-1], rel=1e-4)
        assert row["condition"] == pytest.approx(eigenvalues[-1] / eigenvalues[0], rel=1e-2)  # ε = 1e-6 of the mean
        assert 1.0 <= row["bound_over_largest"] < 1.1
    assert {row["solver"] for row in rows["solver"]} == set(solver_names())
    assert len(rows["solver"]) == 2 * 2 * len(solver_names())
    for row in rows["solver"]:
        weights = stored[row["channels"]]
        again = Problem(weights["lateral"], weights["drive"])
        solver = Dynamics(configuration(row["solver"], row["tolerance"], again), again.rows)
        solution = solver.solve(again.drive, again.lateral, again.bound)
        recomputed = relative_residual(again.drive, again.lateral, solution.y)
        exact = nnls_columns(again.drive, again.lateral)
        # ε and float32 rounding, in units of the drive
        assert row["residual"] == pytest.approx(float(recomputed.amax()), rel=1e-3, abs=1e-5)
        assert recomputed.amax() <= row["tolerance"] * 1.01
        expected = float((solution.y - exact).norm() / exact.norm())
        assert row["error"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert row["num_iters"] == solution.num_iters
        assert row["iterations_mean"] <= row["num_iters"]
        assert iterations_per_column(solver, again).amax() <= solution.num_iters
        assert row["columns_per_second_min"] <= row["columns_per_second"] <= row["columns_per_second_max"]
    reference = [row for row in rows["solver"] if row["solver"] == "projected_gradient"]
    assert all(row["iterations_ratio"] == row["speedup"] == 1.0 for row in reference)
    for row in rows["gemm"]:
        assert row["iterations"] == 40
        assert row["share"] == pytest.approx(row["gflops"] / row["gemm_gflops"], rel=3.0)
    for row in rows["rival"]:
        assert row["rival_residual"] <= row["tolerance"]
        assert row["residual"] <= row["tolerance"] * 1.01
        assert row["rival_error"] < 0.1
    assert len(rows["slope"]) == 2 * len(solver_names())
    assert (tmp_path / "figures" / "dynamics.png").stat().st_size > 5000


def test_pynsm_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pynsm", "--quick", "--data", "digits", "--after", "40", "120", "--images", "6", "--batch-size", "5"]
    arguments += ["--train-images", "150", "--positions", "4", "--run-dir", str(tmp_path)]
    assert main(arguments) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [(row["after"], row["tolerance"]) for row in rows["encoding"]] == [
        (40, 1e-2), (40, 1e-3), (120, 1e-2), (120, 1e-3),
    ]  # fmt: skip
    for row in rows["encoding"]:
        assert max(row["residual"], row["pynsm_residual"]) <= row["tolerance"] * 1.001
        assert max(row["error"], row["pynsm_error"]) <= 10 * row["tolerance"]
        assert row["difference"] <= row["error"] + row["pynsm_error"] * 1.1
        weights = load_file(tmp_path / "problems" / f"digits-after-{row['after']}.safetensors")
        assert row["largest_eigenvalue"] == pytest.approx(
            float(torch.linalg.eigvalsh(weights["lateral"])[-1]), rel=1e-4
        )
    check_count(rows["encoding"][1], tmp_path)
    for row in rows["fixed"]:
        assert row["difference"] < 1e-5  # the same 40 steps in float32
        assert row["residual"] == pytest.approx(row["pynsm_residual"], rel=1e-2, abs=1e-5)
    check_training(rows)
    assert (tmp_path / "figures" / "pynsm.png").stat().st_size > 5000


def check_training(rows: dict[str, list[dict[str, Any]]]) -> None:
    """At the same rates both learn the same; the figures told are those of the curves."""
    trainers = ["pynsm", "simmatch", "simmatch, some positions"]
    assert [(row["trainer"], row["lr"], row["tau"]) for row in rows["training"]] == [
        (trainer, rates.lr, rates.tau) for rates in RATES for trainer in trainers
    ]
    curves: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in rows["learning"]:
        curves.setdefault((row["trainer"], row["lr"], row["tau"]), []).append(row)
    for row in rows["training"]:
        assert row["positions"] == (4 if row["trainer"] == trainers[2] else None)
        curve = curves[row["trainer"], row["lr"], row["tau"]]
        assert [point["images"] for point in curve] == edges(150, 5)
        assert (curve[0]["objective"], curve[-1]["objective"]) == (row["objective_before"], row["objective"])
        assert all(one["seconds"] < two["seconds"] for one, two in pairwise(curve))
    authors, own, some = rows["training"][:3]  # published rates
    assert authors["objective"] < 0.9 * authors["objective_before"]
    assert own["objective"] == pytest.approx(authors["objective"], rel=0.02)
    assert some["objective"] == pytest.approx(authors["objective"], rel=0.1)
    assert rows["training"][7]["objective"] < 0.1 * own["objective"]  # τ = 1
    for row in rows["best"]:
        own_curves = [curve for (trainer, *_), curve in curves.items() if trainer == row["trainer"]]
        limit = float(row["figure"].removeprefix("s to "))
        reached = [point["seconds"] for curve in own_curves for point in curve if point["objective"] <= limit]
        assert row["value"] == (min(reached) if reached else None)
    assert {row["figure"] for row in rows["best"]} == {"s to 0.1", "s to 0.014"}  # fewer than 1,000 images


def check_count(row: dict[str, Any], folder: Path) -> None:
    """The authors' library got as many iterations as it needs, by plain loops, and not one more."""
    weights = load_file(folder / "problems" / f"digits-after-{row['after']}.safetensors")
    images = load_dataset(DataConfig(name="digits")).test_images[: row["images"]]
    patches = torch.nn.functional.unfold(images, 6).permute(1, 0, 2).flatten(1)
    drive = (weights["feedforward"].flatten(1) @ patches).double()
    lateral = weights["lateral"].double()
    step = 1.9 / float(torch.linalg.eigvalsh(lateral)[-1])
    reached = [
        float(relative_residual(drive, lateral, projected_gradient(drive, lateral, step, count)).amax())
        for count in (row["pynsm_iterations"] - 1, row["pynsm_iterations"])
    ]
    assert reached[1] <= row["tolerance"] < reached[0]


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def pictures(config: DataConfig) -> Dataset:
    """Noise of the shape that a data set's images have."""
    shape = (1, 28, 28) if config.name == "fashion_mnist" else (3, 32, 32)
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (count, *shape), generator=draw).to(torch.uint8) for count in (300, 120)]
    labels = [torch.arange(len(part)) % 10 for part in images]
    return Dataset(config.name, images[0], labels[0], images[1], labels[1], 10)


def test_gpu_benchmark_runs_dry_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that a card gets, as far as a CPU can follow: residuals are those asked for, nothing fails."""
    monkeypatch.setattr("jobs.benchmarks.gpu_layer.load_dataset", pictures)
    arguments = ["gpu", "--device", "cpu", "--quick", "--parts", "rates", "columns", "fixed", "updates", "wide"]
    assert main([*arguments, "--run-dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row["kind"] == "failed"] == []
    columns = [row for row in rows if row["kind"] == "columns"]
    assert {row["name"] for row in columns} == {"eager", "simmatch", "eager, a CPU's tiles", "pynsm"}
    for row in columns:
        assert row["residual"] <= 1.001 * row["tolerance"]
        if "truth_above_reported" in row:
            assert row["truth_above_reported"] <= 1e-5
    assert all(row["same_bits"] for row in columns if row["name"] == "simmatch")
    (fixed,) = (row for row in rows if row["kind"] == "fixed")
    assert (fixed["name"], fixed["missing"], fixed["iterations"]) == ("plain loop", "there is no kernel for cpu", 30)
    assert fixed["off_median"] <= 1e-4
    assert fixed["same"] > 0.9
    updates = [row for row in rows if row["kind"] == "updates"]
    assert [(row["mode"], row["way"]) for row in updates] == [
        *((mode, way) for mode in ("alone", "gather_state") for way in ("raised", "recorded", "captured")),
        ("every_iteration", "raised"),
    ]
    assert all(row["seconds_per_update"] > 0 for row in updates)
    (wide,) = (row for row in rows if row["kind"] == "wide")
    assert set(wide["ridge_accuracy"]) == {"simmatch", "exemplars", "k_means"}


def test_gpu_benchmark_waits_for_the_device_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: seconds would be those of starting work."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    options = argparse.Namespace(device="cpu", root=None, channels=None, wide=None, quick=True, rounds=5, seed=0)
    assert replace(GpuPlan.of(options), device=torch.device("cuda", 1)).now() > 0
    assert waited == [torch.device("cuda", 1)]


def test_gpu_benchmark_counts_waits_of_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of the mode itself too."""
    told = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(told, stacklevel=2))
    waits = synchronisations(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    assert list(waits.values()) == [1]
    assert next(iter(waits)).startswith("test_benchmark.py:")


def test_gpu_benchmark_asks_for_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["gpu", "--run-dir", str(tmp_path)]) == BAD_INPUT
    assert "device: expected one that torch can use here, got 'cuda': " in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert set(SUBCOMMANDS) == {
        "dynamics",
        "exact",
        "gpu",
        "ingest",
        "pynsm",
        "scaling",
        "network",
        "overhead",
        "signals",
        "stream",
    }
    assert all(name in said for name in SUBCOMMANDS)
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dynamics", "--rounds", "3"], "argument --rounds: expected an integer of at least 5, got '3'"),
        (["dynamics", "--threads", "0"], "argument --threads: expected an integer of at least 1, got '0'"),
        (["dynamics", "--seed", "-1"], "argument --seed"),
        (["dynamics", "--channels", "64", "0"], "argument --channels: expected an integer of at least 1, got '0'"),
        (["dynamics", "--images", "0"], "argument --images: expected an integer of at least 1, got '0'"),
        (["pynsm", "--after", "0"], "argument --after: expected an integer of at least 1, got '0'"),
        (["pynsm", "--batch-size", "0"], "argument --batch-size: expected an integer of at least 1, got '0'"),
        (["gpu", "--wide", "0"], "argument --wide: expected an integer of at least 1, got '0'"),
        (["overhead", "--every", "0"], "argument --every: expected an integer of at least 1, got '0'"),
        (["scaling", "--ranks", "1"], "argument --ranks: expected an integer of at least 2, got '1'"),
        (["scaling", "--batches", "0", "4"], "argument --batches: expected an integer of at least 1, got '0'"),
        (["dynamics", "--parts", "solver"], "invalid choice: 'solver'"),
        ([], "required: NAME"),
        (["dynamic"], "invalid choice: 'dynamic'"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dynamics", "--data", "digit"], "data.name: expected one of .*; did you mean 'digits'"),
        (["dynamics", "--data", "digits", "--images", "1438"], "--images: expected at most 1437 of digits, got 1438"),
        (["dynamics", "--data", "digits", "--columns", "99999"], "--columns: expected at most"),
        (["pynsm", "--data", "digits", "--after", "9", "9999"], "--after: expected 1 to 1437, got 9999"),
        (["pynsm", "--data", "digits", "--after", "9", "--train-images", "500", "--positions", "10"],
         "--positions: expected 1 to 9, got 10"),
        (["pynsm", "--data", "digits", "--after", "9", "--train-images", "99", "--batch-size", "20"],
         "--train-images: expected 100 to 1437, got 99"),
    ],
)  # fmt: skip
def test_bad_values_end_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--quick", "--run-dir", str(tmp_path)]) == BAD_INPUT
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: {message}", last), last


def test_missing_data_package_and_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_with(arguments: list[str]) -> str:
        assert main(arguments) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIMMATCH_DATA", str(tmp_path / "nowhere"))
    # not Fashion-MNIST: Debian's package may be there
    assert "mnist: no files found" in ends_with(["dynamics", "--data", "mnist", "--run-dir", "r"])
    monkeypatch.setitem(sys.modules, "pynsm", None)
    assert "pynsm is not installed: `pip install" in ends_with(["pynsm", "--data", "digits", "--run-dir", "r"])
    (tmp_path / "file").write_text("")
    assert "--run-dir: expected a folder" in ends_with(["dynamics", "--run-dir", "file"])
    assert "--run-dir: expected a folder of this machine, got nothing" in ends_with(["dynamics", "--run-dir", ""])


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert (
        main(["dynamics", "--data", "nowhere", "--threads", str(before + 1), "--run-dir", str(tmp_path)]) == BAD_INPUT
    )
    assert torch.get_num_threads() == before
    first = json.loads((tmp_path / "dynamics.jsonl").read_text().splitlines()[0])
    assert first["threads"] == before + 1
