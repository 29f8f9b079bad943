"""How close to the hardware's limits: share of the GEMM rate, and peak memory of a training step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from jobs.benchmarks.problems import Problem
from jobs.benchmarks.timing import alternate
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, parse
from simmatch.data.sources import Dataset
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.solvers.dynamics import Dynamics
from simmatch.solvers.tile import SOLVERS

FIXED_ITERATIONS = 40
KERNELS = (3, 5, 7)

Row = dict[str, Any]

# -- share of the GEMM rate --------------------------------------------------------------------------------------------


def measure_gemm(problems: list[Problem], rounds: int, round_s: float, report: Report) -> None:
    """Operations of the iterations over the time of a whole solve, against the bare products of the same shape."""
    table = []
    with report.progress(len(problems) * len(SOLVERS)) as step:
        for problem in problems:
            for solver in SOLVERS:
                step(f"K = {problem.channels}: share of the GEMM rate, {solver}")
                table.append(gemm_share(problem, solver, rounds, round_s))
                report.row(kind="gemm", **table[-1])
    headings = {
        "channels": "K", "solver": "solver", "tile_columns": "tile", "gemm_gflops": "mm GFLOP/s",
        "gflops": "solve GFLOP/s", "share": "share", "share_min": "min", "share_max": "max",
    }  # fmt: skip
    report.rows_table(
        f"Share of the GEMM rate that the gradient methods reach, {FIXED_ITERATIONS} iterations", headings, table
    )


def gemm_share(problem: Problem, solver_name: str, rounds: int, round_s: float) -> Row:
    """`Dynamics.solve` with fixed iterations beside `torch.mm` and `torch.addmm` with `out=` at [K, K] × [K, n].

    round_s: least time of each in a round.
    """
    config = parse(DynamicsConfig, {"solver": solver_name, "tolerance": 0.0, "max_iterations": FIXED_ITERATIONS})
    width = min(config.columns_per_tile(problem.channels), problem.drive.shape[1])
    tiles = problem.drive.shape[1] // width
    drive = problem.drive[:, : width * tiles].contiguous()
    solver = Dynamics(config, problem.rows)
    iterations = solver.solve(drive, problem.lateral, problem.bound).num_iters
    y = drive[:, :width].clamp(min=0.0).contiguous()
    out = torch.empty_like(y)

    def products() -> None:
        for _ in range(tiles * iterations):
            torch.mm(problem.lateral, y, out=out)

    def biased_products() -> None:
        for _ in range(tiles * iterations):
            torch.addmm(y, problem.lateral, y, out=out)

    candidates = {
        "mm": products,
        "solve": lambda: solver.solve(drive, problem.lateral, problem.bound),
        "addmm": biased_products,
    }
    timings = alternate(candidates, rounds, min_s=round_s)
    gflop = 2e-9 * problem.channels**2 * drive.shape[1] * iterations
    return {
        "channels": problem.channels,
        "solver": solver_name,
        "tile_columns": width,
        "columns": drive.shape[1],
        "iterations": iterations,
        "dtype": str(drive.dtype).removeprefix("torch."),
        **timings.rate("mm", gflop).fields("gemm_gflops"),
        **timings.rate("addmm", gflop).fields("addmm_gflops"),
        **timings.rate("solve", gflop).fields("gflops"),
        **timings.speedup("solve", "mm").fields("share"),
        **timings.speedup("solve", "addmm").fields("share_of_addmm"),
    }


# -- memory ------------------------------------------------------------------------------------------------------------


def measure_memory(dataset: Dataset, images: int, report: Report) -> None:
    """Peak of the first training step over the size of its activities."""
    table = []
    with report.progress(len(KERNELS)) as step:
        for kernel_size in KERNELS:
            step(f"memory, k = {kernel_size}")
            table.append(step_memory(kernel_size, dataset.in_channels, dataset.image_size, images=images))
            report.row(kind="memory", **table[-1])
    headings = {
        "kernel_size": "k", "activities_bytes": "activities, bytes", "ratio": "ratio",
        "resident_ratio": "ratio, resident",
    }  # fmt: skip
    report.rows_table("Peak memory of a training step over its activities", headings, table)


def step_memory(
    kernel_size: int, in_channels: int, image_size: tuple[int, int], *, channels: int = 64, images: int = 50
) -> Row:
    """Peak bytes of one `partial_fit`, buffers of the solver included, over those of y [K, N].

    A fresh layer each time: the buffers that later steps find in place are part of its peak.
    """
    height, width = image_size
    batch = torch.rand(images, in_channels, height, width, generator=torch.Generator().manual_seed(0))

    def layer() -> SimilarityMatchingConv2d:
        return SimilarityMatchingConv2d(
            in_channels, channels, kernel_size, padding=kernel_size // 2, normalize="contrast"
        )

    counted, resident = layer(), layer()
    activities = channels * images * height * width * batch.element_size()  # odd k with padding k // 2 keeps the size
    allocated = peak_allocated_bytes(lambda: counted.partial_fit(batch))
    grown = peak_resident_bytes(lambda: resident.partial_fit(batch))
    return {
        "kernel_size": kernel_size,
        "channels": channels,
        "images": images,
        "activities_bytes": activities,
        "peak_bytes": allocated,
        "ratio": allocated / activities,
        "resident_bytes": grown,
        "resident_ratio": None if grown is None else grown / activities,
    }


def peak_allocated_bytes(action: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during `action()`, less what it held before.

    Every allocation and release counts, temporaries inside a kernel too (an unfolded patch matrix, say), which
    operators seen from Python would not show.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its own start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    recorded = profiler.profiler
    assert recorded is not None, "the profiler has just run"
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_resident_bytes(action: Callable[[], object]) -> int | None:
    """Growth of the process' resident memory to its highest during `action()`; None without Linux's /proc.

    Coarser than `peak_allocated_bytes` (freed blocks may stay resident), but complete: it includes buffers of the
    convolution library, which do not come from torch's allocator.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else blocks freed earlier, still resident, serve it unnoticed
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
        action()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
