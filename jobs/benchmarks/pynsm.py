"""Compared with `pynsm` 1.0.1, the authors' library: encoding to a residual, equal iterations, training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.problems import Problem, error
from jobs.benchmarks.pynsm_layer import KERNEL, PynsmPlan, State, columns, trained_states
from jobs.benchmarks.pynsm_training import measure_training
from jobs.benchmarks.timing import alternate
from jobs.options import add_counts, add_parts
from jobs.pynsm import CHANNELS, ITERATIONS, require_pynsm
from jobs.reporting import Report
from simmatch.config import DynamicsConfig
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d

RESIDUALS = (1e-2, 1e-3)
MAX_ITERATIONS = 50_000
CLOSER = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
"""Factors of the tolerance that are tried until the error is no larger than theirs."""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="fashion_mnist", metavar="NAME", help="data set (default: fashion_mnist)")
    add_counts(
        parser, "after", "N", "encode with the weights after this many training images (default: 5000 20000 60000; "
        "quick: 500 1000)", several=True,
    )  # fmt: skip
    add_counts(parser, "images", "N", "images to encode (default: 200; quick: 20)")
    add_counts(parser, "train-images", "N", "training images of both libraries (default: 20000; quick: 1000)")
    add_counts(
        parser, "positions", "N", "positions per image of the candidate that learns from a sample of positions "
        "(default: 64)", default=64,
    )  # fmt: skip
    add_counts(parser, "batch-size", "N", "images per batch (default: 100)", default=100)
    add_parts(parser, PARTS)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the parts, print their tables, draw the speedups.

    Raises
    ------
    ConfigError
        Options that do not suit the data set.
    MissingError
        The library is not installed.
    """
    require_pynsm()
    dataset = load_dataset(DataConfig(name=options.data))
    plan = PynsmPlan.of(options, dataset)
    report.row(kind="library", pynsm=version("pynsm"), channels=CHANNELS, kernel_size=KERNEL, **asdict(plan))
    rows: list[Row] = []
    for name in options.parts:
        rows += PARTS[name](plan, dataset, report)
    _draw(rows, report)


# -- encoding ----------------------------------------------------------------------------------------------------------


def iterations_needed(state: State, images: Tensor, problem: Problem, residual: float, step: float) -> int | None:
    """The authors' iterations at this step after which all columns have the residual; None if more than the most."""
    model = state.authors(step, MAX_ITERATIONS)
    reached: list[int] = []

    def look(module: Any) -> bool:
        if float(problem.residual(columns(module.y.detach())).amax()) <= residual:
            reached.append(module.iteration_idx + 1)
        return bool(reached)

    model.register_iteration_hook("iteration", look)
    with torch.no_grad():
        model(images)
    return reached[0] if reached else None


def measure_encoding(plan: PynsmPlan, dataset: Dataset, report: Report) -> list[Row]:
    """Images/s to a residual, both from the same frozen weights."""
    states = trained_states(plan.lesson(dataset), plan.after, report)
    images = to_unit(dataset.test_images[: plan.images])
    rows = []
    with report.progress(len(states) * len(RESIDUALS)) as step:
        for after, state in sorted(states.items()):
            problem = state.problem(images)
            exact = problem.exact()
            for residual in RESIDUALS:
                step(f"after {after} images: encoding to {residual:g}")
                rows.append({"after": after} | encode(state, images, problem, exact, residual, plan))
                report.row(kind="encoding", **rows[-1])
    headings = {
        "after": "images learnt", "largest_eigenvalue": "λmax", "tolerance": "residual",
        "pynsm_iterations": "pynsm steps", "pynsm_images_per_second": "pynsm images/s", "pynsm_error": "error",
        "images_per_second": "images/s", "error": "error", "speedup": "×", "speedup_min": "min", "speedup_max": "max",
        "as_close_speedup": "× at their error",
    }  # fmt: skip
    report.rows_table("Encoding to a residual with the same frozen weights", headings, rows)
    return [row | {"label": f"encode to {row['tolerance']:g}\nafter {row['after']}"} for row in rows]


def encode(state: State, images: Tensor, problem: Problem, exact: Tensor, residual: float, plan: PynsmPlan) -> Row:
    """Both sides at one residual: theirs with step 1.9/λmax and the iterations it needs, ours with its defaults."""
    step = 1.9 / problem.largest
    needed = iterations_needed(state, images, problem, residual, step)
    model = state.authors(step, needed or MAX_ITERATIONS)

    def own(tolerance: float) -> SimilarityMatchingConv2d:
        return state.own(DynamicsConfig(tolerance=tolerance, max_iterations=MAX_ITERATIONS, ridge=0.0))

    row: Row = {"largest_eigenvalue": problem.largest, "condition": problem.condition, "tolerance": residual}
    measured = side_by_side(model, own(residual), images, problem, exact, plan, [own(residual * s) for s in CLOSER])
    return row | measured | {"pynsm_iterations": needed}


def side_by_side(
    model: Any,
    layer: SimilarityMatchingConv2d,
    images: Tensor,
    problem: Problem,
    exact: Tensor,
    plan: PynsmPlan,
    closer: Sequence[SimilarityMatchingConv2d] = (),
) -> Row:
    """Time both in turns on the images, batch by batch, and compare their results.

    closer: layers with ever smaller tolerances. The first whose error is no larger than theirs takes part too: at one
    residual a method that stops right at it may be further from the solution than one that passes it.
    """
    parts = torch.split(images, plan.batch_size)

    def theirs() -> Tensor:
        return torch.cat([columns(model(part)) for part in parts], dim=1)

    def ours(layer: SimilarityMatchingConv2d) -> Tensor:
        return torch.cat([columns(layer.solve(part).y) for part in parts], dim=1)

    with torch.no_grad():
        their_y, our_y = theirs(), ours(layer)
        their_error = error(their_y, exact)
        candidates: dict[str, Callable[[], Any]] = {
            "pynsm": lambda: [model(part) for part in parts],
            "simmatch": lambda: [layer.solve(part) for part in parts],
        }
        as_close = next((own for own in (layer, *closer) if error(ours(own), exact) <= their_error), None)
        if closer and as_close is not None:
            candidates["as close"] = lambda: [as_close.solve(part) for part in parts]
        timings = alternate(candidates, plan.rounds)
    row: Row = {
        "images": len(images),
        "batch_size": plan.batch_size,
        "pynsm_residual": problem.residual(their_y).amax(),
        "pynsm_error": their_error,
        **timings.rate("pynsm", len(images)).fields("pynsm_images_per_second"),
        "solver": layer.dynamics.solver_on("cpu", alone=True),
        "residual": problem.residual(our_y).amax(),
        "error": error(our_y, exact),
        "difference": error(our_y, their_y.double()),
        **timings.rate("simmatch", len(images)).fields("images_per_second"),
        **timings.speedup("simmatch", "pynsm").fields("speedup"),
    }
    if "as close" in candidates and as_close is not None:
        row |= {"as_close_tolerance": as_close.dynamics.tolerance, "as_close_error": error(ours(as_close), exact)}
        row |= timings.speedup("as close", "pynsm").fields("as_close_speedup")
    return row


def measure_fixed(plan: PynsmPlan, dataset: Dataset, report: Report) -> list[Row]:
    """Exactly the authors' 40 float32 projected-gradient iterations on both sides, at 1.9/λmax."""
    rows = []
    images = to_unit(dataset.test_images[: plan.images])
    states = trained_states(plan.lesson(dataset), plan.after, report)
    with report.progress(len(states)) as step:
        for after, state in sorted(states.items()):
            step(f"after {after} images: {ITERATIONS} iterations")
            problem = state.problem(images)
            size = 1.9 / problem.largest
            layer = state.own(
                DynamicsConfig(
                    solver="projected_gradient", step=size, tolerance=0.0, max_iterations=ITERATIONS, ridge=0.0
                )
            )
            model = state.authors(size, ITERATIONS)
            measured = side_by_side(model, layer, images, problem, problem.exact(), plan)
            rows.append({"after": after, "iterations": ITERATIONS} | measured)
            report.row(kind="fixed", **rows[-1])
    headings = {
        "after": "images learnt", "pynsm_images_per_second": "pynsm images/s", "images_per_second": "images/s",
        "difference": "difference", "residual": "residual", "speedup": "×", "speedup_min": "min", "speedup_max": "max",
    }  # fmt: skip
    report.rows_table(f"Encoding with exactly {ITERATIONS} float32 projected-gradient iterations", headings, rows)
    return [row | {"label": f"{ITERATIONS} steps\nafter {row['after']}"} for row in rows]


PARTS: dict[str, Callable[[PynsmPlan, Dataset, Report], list[Row]]] = {
    "encoding": measure_encoding,
    "fixed": measure_fixed,
    "training": measure_training,
}
"""What can be measured, in this order."""


def _draw(rows: list[Row], report: Report) -> None:
    with report.figure("pynsm", width=max(6.0, 1.1 * len(rows)), height=4.5) as figure:
        axes = figure.subplots()
        middle = [row["speedup"] for row in rows]
        spread = [
            [row["speedup"] - row["speedup_min"] for row in rows],
            [row["speedup_max"] - row["speedup"] for row in rows],
        ]
        axes.bar([row["label"] for row in rows], middle, yerr=spread, capsize=4, color="C0", alpha=0.8)
        axes.axhline(1.0, color="k", linewidth=0.8)
        axes.set_ylabel("times faster than pynsm (median, least, greatest)")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
