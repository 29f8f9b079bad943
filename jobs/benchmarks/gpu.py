"""The dynamics on a GPU: columns per second at equal residual and after a fixed number of iterations, updates in a
row, encoding, wide layers.

Runs on a bare machine: torch for CUDA, Triton, and what `simmatch` imports; neither Ray nor MLflow. Every part writes
its rows as soon as they are known, and a part that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from jobs.benchmarks.gpu_columns import measure_columns, measure_compiled
from jobs.benchmarks.gpu_fixed import measure_fixed
from jobs.benchmarks.gpu_layer import GpuPlan, Row, measure_encoding, measure_updates
from jobs.benchmarks.gpu_wide import measure_wide
from jobs.options import add_counts, add_parts
from jobs.reporting import Report
from simmatch import kernels
from simmatch.precision import exact_float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_parts(parser, PARTS)
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the data sets (default: where data.root would be looked up)"
    )
    parser.add_argument(
        "--device", default="cuda", metavar="NAME", help="torch device; cpu for a dry run (default: cuda)"
    )
    widths = "layer widths of the parts `columns` and `fixed` (default: 64 128 256 512)"
    add_counts(parser, "channels", "K", widths, several=True)
    add_counts(
        parser, "wide", "K", "layer widths of the part `wide`, on CIFAR-10 (default: 256 1024 2048)", several=True
    )


def run(options: argparse.Namespace, report: Report) -> None:
    plan = GpuPlan.of(options)
    exact_float32()
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "none: a dry run"
    report.row(kind="card", name=name, triton=kernels.installed())
    for part in options.parts:
        started = time.perf_counter()
        try:
            with torch.no_grad():
                PARTS[part](plan, report)
        except Exception as error:  # the rows of the other parts are worth having
            report.row(kind="failed", part=part, error=f"{type(error).__name__}: {error}"[:500])
        report.row(kind="part", part=part, seconds=time.perf_counter() - started)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_rates(plan: GpuPlan, report: Report) -> None:
    """What the card can do at most: products in float16 and float32, copies."""
    size = 8192 if plan.values > 2**20 else 64
    halves = torch.randn(2, size, size, device=plan.device).half()
    floats = torch.randn(2, size // 2, size // 2, device=plan.device)
    block = torch.randn(4 * size**2, device=plan.device)
    other = torch.empty_like(block)
    timings = plan.timed(
        {
            "gemm_fp16_tflops": lambda: halves[0] @ halves[1],
            "gemm_fp32_tflops": lambda: floats[0] @ floats[1],
            "copy_tb_per_s": lambda: other.copy_(block),
        }
    )
    amounts = {"gemm_fp16_tflops": 2 * size**3, "gemm_fp32_tflops": size**3 / 4, "copy_tb_per_s": 2 * block.nbytes}
    row: Row = {}
    for name, amount in amounts.items():
        row |= timings.rate(name, amount / 1e12).fields(name)
    report.row(kind="rates", **row)


PARTS: dict[str, Callable[[GpuPlan, Report], None]] = {
    "rates": measure_rates,
    "columns": measure_columns,
    "fixed": measure_fixed,
    "updates": measure_updates,
    "encode": measure_encoding,
    "wide": measure_wide,
    "compile": measure_compiled,
}
"""What can be measured, in this order."""
