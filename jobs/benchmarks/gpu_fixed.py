"""The fixed number of iterations of evaluation on a GPU: by the kernel and by the plain loop, beside float64.

This decides up to which width `simmatch.kernels.select` should choose the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from jobs.benchmarks.gpu_columns import trained
from jobs.benchmarks.gpu_layer import GpuPlan, Row
from jobs.benchmarks.problems import Problem
from jobs.reporting import Report
from simmatch import kernels
from simmatch.config import DynamicsConfig
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics, Solution

SAME = 1e-4
"""Largest difference of an activity, over the largest of its column, that passes for the rounding of float32."""


def measure_fixed(plan: GpuPlan, report: Report) -> None:
    """The same columns through `encode_iterations` iterations; `same` is the share of columns that agree with float64.

    The kernel's rounding of one column, or the plain loop's, may restart the momentum one look earlier or later.
    """
    config, table = DynamicsConfig().encoding(), list[Row]()
    for channels in plan.channels:
        problem = trained(plan, channels, plan.values // channels)
        ways = {"plain loop": Dynamics(config, problem.rows)}
        missing = None if kernels.select(config, problem.drive) else why_not(problem, config)
        if missing is None:
            ways["kernel"] = Dynamics(config, problem.rows, alone=True)
        solve: dict[str, Callable[[], Solution]] = {
            name: partial(way.solve, problem.drive, problem.lateral, problem.bound) for name, way in ways.items()
        }
        solutions = {name: action() for name, action in solve.items()}
        timings, expected = plan.timed({**solve}), in_float64(problem.first(4096), config)
        for name, solution in solutions.items():
            largest = expected.amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny)  # a column may be silent
            off = (solution.y[:, : expected.shape[1]] - expected).abs().amax(dim=0) / largest
            row: Row = {"channels": channels, "columns": problem.drive.shape[1], "name": name}
            row |= {"off_median": off.median(), "off": off.amax(), "same": (off <= SAME).double().mean()}
            row |= timings.rate(name, problem.drive.shape[1]).fields("columns_per_second")
            row |= timings.speedup(name, "plain loop").fields("speedup")
            table.append(row | {"iterations": solution.num_iters, "missing": missing})
            report.row(kind="fixed", **table[-1])
    headings = {
        "channels": "K", "name": "way", "columns_per_second": "columns/s", "columns_per_second_min": "min",
        "columns_per_second_max": "max", "speedup": "× plain loop", "off_median": "off, median", "off": "off, most",
        "same": "as in float64",
    }  # fmt: skip
    report.rows_table(f"Exactly {config.max_iterations} iterations", headings, table)


def why_not(problem: Problem, config: DynamicsConfig) -> str:
    """Why no kernel runs a fixed number of iterations here."""
    device = problem.drive.device
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    given = (problem.drive.dtype, config.tolerance, kernels.capability(device))
    return kernels.supports(config.solver, problem.channels, *given) or ""


def in_float64(problem: Problem, config: DynamicsConfig) -> Tensor:
    """What the plain loop computes in float64: [K, N]."""
    lateral = problem.lateral.double()
    bound = certify_afresh(lateral, problem.rows, ridge=problem.ridge)
    y: Tensor = Dynamics(config, problem.rows).solve(problem.drive.double(), lateral, bound).y
    return y
