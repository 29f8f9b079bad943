"""The solvers on one device, on problems from training: iterations, time, GEMM share, other libraries, memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from jobs.benchmarks.efficiency import measure_gemm, measure_memory
from jobs.benchmarks.problems import Problem, Recipe, error, trained_problem
from jobs.benchmarks.rivals import RESIDUALS, measure_rivals
from jobs.benchmarks.timing import alternate
from jobs.options import add_counts, add_parts
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, parse
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset
from simmatch.solvers.dynamics import Dynamics, Solution

REFERENCE = "projected_gradient"
"""The solver that the others' iterations are compared with."""

MAX_ITERATIONS = 100_000
SAMPLED_COLUMNS = 32
"""Columns solved one by one for the mean of their iterations."""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="fashion_mnist", metavar="NAME", help="data set (default: fashion_mnist)")
    add_counts(parser, "channels", "K", "layer widths (default: 64 128 256 512 1024; quick: 64 256)", several=True)
    add_counts(parser, "images", "N", "training images (default: 3000; quick: 750)")
    add_counts(parser, "columns", "N", "columns to solve for (default: 4096; quick: 512)")
    add_parts(parser, PARTS)


@dataclass(frozen=True)
class DynamicsPlan:
    """What one call measures."""

    channels: Sequence[int]
    images: int
    batch_size: int
    columns: int
    exact_columns: int
    rival_columns: int
    gemm_round_s: float
    memory_images: int
    rounds: int
    seed: int
    data: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> DynamicsPlan:
        """Sizes from the options.

        150 updates either way: the condition of M settles within 100 to 150 of them, whatever their size (K = 64,
        batches of 20 images: 105 after 50 updates, 165 after 100, 159 after 150, 174 after 300; λmax 2.10 to 2.17).
        """
        images = options.images or (750 if options.quick else 3000)
        return cls(
            channels=options.channels or ([64, 256] if options.quick else [64, 128, 256, 512, 1024]),
            images=images,
            batch_size=max(1, images // 150),
            columns=options.columns or (512 if options.quick else 4096),
            exact_columns=128 if options.quick else 512,
            rival_columns=16 if options.quick else 64,
            gemm_round_s=0.05 if options.quick else 0.2,
            memory_images=20 if options.quick else 50,
            rounds=options.rounds,
            seed=options.seed,
            data=options.data,
        )

    def columns_of(self, channels: int) -> int:
        """Columns timed: fewer for wide layers, whose work per column grows with K²."""
        return min(self.columns, max(512, 2**20 // channels))


def run(options: argparse.Namespace, report: Report) -> None:
    plan = DynamicsPlan.of(options)
    dataset = load_dataset(DataConfig(name=plan.data))
    problems = _problems(plan, dataset, report)
    for name in options.parts:
        PARTS[name](plan, problems, dataset, report)


def _problems(plan: DynamicsPlan, dataset: Dataset, report: Report) -> list[Problem]:
    problems: list[Problem] = []
    with report.progress(len(plan.channels)) as step:
        for channels in plan.channels:
            step(f"trained problem, K = {channels}")
            recipe = Recipe(plan.data, channels, plan.images, plan.batch_size, plan.columns, plan.seed)
            problem = trained_problem(recipe, dataset, report.run_dir / "problems")
            problem = problem.first(plan.columns_of(channels))
            report.row(
                kind="problem", channels=channels, images=plan.images, updates=math.ceil(plan.images / plan.batch_size),
                columns=problem.drive.shape[1], largest_eigenvalue=problem.largest, condition=problem.condition,
                bound_over_largest=problem.bound.value / problem.largest,
            )  # fmt: skip
            problems.append(problem)
    return problems


# -- solvers -----------------------------------------------------------------------------------------------------------


def solver_names() -> list[str]:
    """Every solver that a configuration can name."""
    return [name for name in get_args(DynamicsConfig.model_fields["solver"].annotation) if name != "auto"]


def configuration(solver: str, residual: float, problem: Problem) -> DynamicsConfig:
    """A solver's configuration as users have it, except for the limit of iterations; the reference at 1.9/λmax."""
    values: dict[str, Any] = {"solver": solver, "tolerance": residual, "max_iterations": MAX_ITERATIONS}
    if solver == REFERENCE:
        values["step"] = 1.9 / problem.largest
    return parse(DynamicsConfig, values)


def iterations_per_column(solver: Dynamics, problem: Problem) -> Tensor:
    """Iterations of each of the first columns, solved one by one: none depends on the other columns of its batch."""
    counts = []
    for column in range(min(SAMPLED_COLUMNS, problem.drive.shape[1])):
        drive = problem.drive[:, column : column + 1].contiguous()
        counts.append(solver.solve(drive, problem.lateral, problem.bound).num_iters)
    return torch.tensor(counts, dtype=torch.float64)


def measure_solvers(problems: list[Problem], plan: DynamicsPlan, report: Report) -> None:
    """Every solver on every problem: iterations, columns/s, verified residual and error."""
    rows: list[Row] = []
    with report.progress(len(problems) * (len(RESIDUALS) + 1)) as step:
        for problem in problems:
            step(f"K = {problem.channels}: y* in float64")
            exact = problem.first(plan.exact_columns).exact()
            for residual in RESIDUALS:
                step(f"K = {problem.channels}: {len(solver_names())} solvers to {residual:g}")
                compared = compare_solvers(problem, exact, residual, plan.rounds)
                for row in compared:
                    report.row(kind="solver", **row)
                rows += compared
    headings = {
        "channels": "K", "solver": "solver", "tolerance": "residual", "residual": "reached", "error": "error",
        "num_iters": "iterations", "iterations_mean": "mean", "iterations_ratio": "of reference",
        "columns_per_second": "columns/s", "speedup": "× reference", "speedup_min": "min", "speedup_max": "max",
    }  # fmt: skip
    report.rows_table(f"Solvers on trained M (reference: {REFERENCE} at 1.9/λmax)", headings, rows)
    _slopes(rows, report)
    _draw_solvers(rows, report)


def compare_solvers(problem: Problem, exact: Tensor, residual: float, rounds: int) -> list[Row]:
    """All solvers side by side at one residual.

    Parameters
    ----------
    exact: [K, N'], y* of the first N' columns.
    """
    solvers = {name: Dynamics(configuration(name, residual, problem), problem.rows) for name in solver_names()}
    solutions: dict[str, Solution] = {}

    def solve(name: str) -> None:
        solutions[name] = solvers[name].solve(problem.drive, problem.lateral, problem.bound)

    timings = alternate({name: partial(solve, name) for name in solvers}, rounds)
    columns, rows = problem.drive.shape[1], []
    for name, solution in solutions.items():
        each = iterations_per_column(solvers[name], problem)
        verified = problem.residual(solution.y)
        rows.append(
            {
                "channels": problem.channels,
                "solver": name,
                "tolerance": residual,
                "columns": columns,
                "num_iters": solution.num_iters,
                "iterations_mean": each.mean(),
                "iterations_median": each.median(),
                "iterations_ratio": solution.num_iters / solutions[REFERENCE].num_iters,
                "residual": verified.amax(),
                "residual_reported": solution.residual.amax(),
                "error": error(solution.y[:, : exact.shape[1]], exact),
                "active_fraction": (solution.y > 0).double().mean(),
                **timings.rate(name, columns).fields("columns_per_second"),
                **timings.speedup(name, REFERENCE).fields("speedup"),
            }
        )
    return rows


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of values ≈ c · sizesᵖ, by least squares on log–log axes.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def _slopes(rows: list[Row], report: Report) -> None:
    """How time per column grows with K, and the two factors that it is made of: iterations, and time of each."""
    slopes = []
    for residual in RESIDUALS:
        for name in solver_names():
            chosen = [row for row in rows if row["solver"] == name and row["tolerance"] == residual]
            sizes = [row["channels"] for row in chosen]
            if len(set(sizes)) < 2:
                continue
            seconds = [1.0 / row["columns_per_second"] for row in chosen]
            counts = [float(row["iterations_mean"]) for row in chosen]
            each = [taken / count for taken, count in zip(seconds, counts, strict=True)]
            slopes.append(
                {
                    "channels": sizes,
                    "solver": name,
                    "tolerance": residual,
                    "slope": slope(sizes, seconds),
                    "slope_iterations": slope(sizes, counts),
                    "slope_iteration_seconds": slope(sizes, each),
                }
            )
            report.row(kind="slope", **slopes[-1])
    headings = {
        "solver": "solver", "tolerance": "residual", "slope": "time per column", "slope_iterations": "iterations",
        "slope_iteration_seconds": "time per iteration",
    }  # fmt: skip
    report.rows_table(
        "Growth with K: exponent of time per column = of iterations + of time per iteration and column",
        headings,
        slopes,
    )


def _draw_solvers(rows: list[Row], report: Report) -> None:
    with report.figure("dynamics", width=10.0) as figure:
        left, right = figure.subplots(1, 2)
        names = solver_names()
        for name in names:
            for residual, line in zip(RESIDUALS, ("--", "-"), strict=True):
                chosen = [row for row in rows if row["solver"] == name and row["tolerance"] == residual]
                sizes = [row["channels"] for row in chosen]
                colour = f"C{names.index(name)}"
                label = f"{name}, residual {residual:g}"
                left.plot(sizes, [row["num_iters"] for row in chosen], line, marker="o", color=colour, label=label)
                micros = [1e6 / row["columns_per_second"] for row in chosen]
                right.plot(sizes, micros, line, marker="o", color=colour, label=label)
        left.set_ylabel("iterations of the slowest column")
        right.set_ylabel("µs per column")
        for axes in (left, right):
            axes.set(xlabel="K", xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="both")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)


PARTS: dict[str, Callable[[DynamicsPlan, list[Problem], Dataset, Report], None]] = {
    "solvers": lambda plan, problems, _, report: measure_solvers(problems, plan, report),
    "gemm": lambda plan, problems, _, report: measure_gemm(problems, plan.rounds, plan.gemm_round_s, report),
    "rivals": lambda plan, problems, _, report: measure_rivals(problems, plan.rival_columns, plan.rounds, report),
    "memory": lambda plan, _, dataset, report: measure_memory(dataset, plan.memory_images, report),
}
"""What can be measured, in this order."""
