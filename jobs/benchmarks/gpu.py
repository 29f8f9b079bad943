"""The dynamics on a GPU: columns per second at equal residual, updates in a row, encoding, wide layers.

Runs on a bare machine: torch for CUDA, Triton, and what `simmatch` imports; neither Ray nor MLflow. Every part writes
its rows as soon as they are known, and a part that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.gpu_rivals import AuthorsLoop, Dictionary, GraphLoop, compiled_loop, torch_loop
from jobs.benchmarks.problems import Problem, Recipe, error
from jobs.benchmarks.timing import Spread, Timings, alternate
from jobs.reporting import MissingError, Report
from simmatch import kernels
from simmatch.config import DataConfig, DynamicsConfig, PlasticityConfig
from simmatch.data.order import batch_indices
from simmatch.data.sources import Dataset, load_dataset, to_unit
from simmatch.geometry import draw_positions, sample_patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.precision import exact_float32
from simmatch.readout import Ridge
from simmatch.seeding import seeded
from simmatch.sharding.exchange import IdentityExchange
from simmatch.solvers.dynamics import Dynamics, Solution

RESIDUALS = (1e-2, 1e-3)

MAX_ITERATIONS = 2000

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"what to measure (default: all of {', '.join(PARTS)})",
    )  # fmt: skip
    parser.add_argument("--root", metavar="DIR", help="folder of the data sets (default: as data.root)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="default: cuda; cpu for a dry run")
    parser.add_argument("--channels", type=int, nargs="+", metavar="K", help="widths of `columns` (default: 64 to 512)")
    parser.add_argument("--wide", type=int, nargs="+", metavar="K", help="widths on CIFAR-10 (default: 256 1024 2048)")


@dataclass(frozen=True)
class Plan:
    """What one call measures, and on what."""

    device: torch.device
    root: str | None
    channels: tuple[int, ...]
    wide: tuple[int, ...]
    values: int
    updates: int
    images: int
    rounds: int
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        quick = options.quick
        return cls(
            device=torch.device(options.device),
            root=options.root,
            channels=tuple(options.channels or ((32,) if quick else (64, 128, 256, 512))),
            wide=tuple(options.wide or ((32,) if quick else (256, 1024, 2048))),
            values=2**15 if quick else 2**26,
            updates=5 if quick else 500,
            images=40 if quick else 60_000,
            rounds=options.rounds,
            seed=options.seed,
        )

    def dataset(self, name: str) -> Dataset:
        return load_dataset(DataConfig(name=name, root=self.root))

    def now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, candidates: dict[str, Callable[[], object]]) -> Timings:
        return alternate(candidates, self.rounds, clock=self.now)


def run(options: argparse.Namespace, report: Report) -> None:
    plan = Plan.of(options)
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        raise MissingError("gpu: expected a CUDA device, torch sees none here")
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


# -- rates -------------------------------------------------------------------------------------------------------------


def measure_rates(plan: Plan, report: Report) -> None:
    """What the card can do at most: products in float16 and float32, copies."""
    size = 8192 if plan.values > 2**20 else 64
    halves = torch.randn(2, size, size, device=plan.device).half()
    floats = torch.randn(2, size // 2, size // 2, device=plan.device)
    block = torch.randn(4 * size**2, device=plan.device)
    other = torch.empty_like(block)
    found = plan.timed(
        {
            "gemm_fp16_tflops": lambda: halves[0] @ halves[1],
            "gemm_fp32_tflops": lambda: floats[0] @ floats[1],
            "copy_tb_per_s": lambda: other.copy_(block),
        }
    )
    amounts = {"gemm_fp16_tflops": 2 * size**3, "gemm_fp32_tflops": size**3 / 4, "copy_tb_per_s": 2 * block.nbytes}
    row: Row = {}
    for name, amount in amounts.items():
        row |= found.rate(name, amount / 1e12).fields(name)
    report.row(kind="rates", **row)


# -- columns per second ------------------------------------------------------------------------------------------------


def trained(plan: Plan, channels: int, columns: int) -> Problem:
    """A problem on the device, as 150 updates on it leave one; see `jobs.benchmarks.problems`."""
    dataset = plan.dataset("fashion_mnist")
    recipe = Recipe("fashion_mnist", channels, 3000, 20, columns, plan.seed)
    layer = recipe.layer(dataset.in_channels).to(plan.device)
    for update in range(150 if plan.device.type == "cuda" else 5):
        layer.partial_fit(batch(dataset, update, 20, plan))
    drive = layer.drive(to_unit(dataset.test_images[: max(100, plan.images)]).to(plan.device))
    order = torch.randperm(drive.shape[1], generator=seeded("columns", recipe.seed))[:columns]
    return Problem(layer.lateral.clone(), drive[:, order.to(plan.device)].contiguous())


def batch(dataset: Dataset, update: int, size: int, plan: Plan) -> Tensor:
    """Images of one update, on the device."""
    count = len(dataset.train_images)
    steps = count // size
    chosen = batch_indices(update % steps, num_images=count, batch_size=size, seed=plan.seed, epoch=update // steps)
    return to_unit(dataset.train_images[chosen].to(plan.device))


def measure_columns(plan: Plan, report: Report) -> None:
    """Every way to solve the same columns to the same residual, recomputed in float64."""
    table: list[Row] = []
    for channels in plan.channels:
        problem = trained(plan, channels, plan.values // channels)
        report.row(kind="problem", channels=channels, columns=problem.drive.shape[1],
                   largest_eigenvalue=problem.largest, condition=problem.condition)  # fmt: skip
        for tolerance in RESIDUALS:
            for row in compare(problem, tolerance, plan):
                report.row(kind="columns", channels=channels, tolerance=tolerance, **row)
                table.append(row | {"channels": channels, "tolerance": tolerance})
    keys = ("channels", "tolerance", "name", "columns_per_second", "columns_per_second_min", "columns_per_second_max",
            "speedup", "residual", "residual_reported", "error")  # fmt: skip
    report.table(
        "Columns per second at equal residual", ["K", "residual", "way", "columns/s", "min", "max", "× eager",
        "float64", "reported", "error"], [[row.get(key) for key in keys] for row in table],
    )  # fmt: skip


def compare(problem: Problem, tolerance: float, plan: Plan) -> list[Row]:
    """Rows of all candidates; the eager loop in tiles of 2²⁴ values is what the others are compared with."""
    eager = DynamicsConfig(solver="accelerated", tolerance=tolerance, max_iterations=MAX_ITERATIONS)
    auto = eager.model_copy(update={"solver": "auto"})
    solvers = {"eager": (Dynamics(eager, problem.rows), False), "simmatch": (Dynamics(auto, problem.rows), True)}
    if kernels.select(eager, problem.drive) is not None:
        solvers["fused gradient"] = (Dynamics(eager, problem.rows), True)
    found: dict[str, Solution] = {}

    def solve(name: str) -> None:
        solver, alone = solvers[name]
        found[name] = solver.solve(problem.drive, problem.lateral, problem.bound, alone=alone)

    candidates: dict[str, Callable[[], object]] = {name: partial(solve, name) for name in solvers}
    solve("eager")
    loop = torch_loop(problem.lateral, problem.bound, eager)
    graph: GraphLoop | None = None
    if plan.device.type == "cuda":
        width = eager.columns_per_tile(problem.channels, "cuda")
        graph = GraphLoop(loop, problem.drive, found["eager"].num_iters, width)
        candidates["eager, CUDA graph"] = graph.run
    solve("simmatch")
    first = found["simmatch"].y.clone()
    timings = plan.timed(candidates)
    exact, rows = problem.first(1024).exact(), []
    for name in candidates:
        y = found[name].y if name in found or graph is None else graph.y
        verified = residual_in_parts(problem, y)
        off = error(y[:, : exact.shape[1]], exact)
        row: Row = {"name": name, "columns": problem.drive.shape[1], "residual": verified.amax(), "error": off}
        row |= timings.rate(name, problem.drive.shape[1]).fields("columns_per_second")
        row |= timings.speedup(name, "eager").fields("speedup")
        if name in found:
            reported = found[name].residual
            row |= {"iterations": found[name].num_iters, "residual_reported": reported.amax(),
                    "truth_above_reported": (verified - reported.double()).amax()}  # fmt: skip
        rows.append(row)
    rows[1]["same_bits"] = bool(torch.equal(first, found["simmatch"].y))
    return rows + slow_rivals(problem, tolerance, plan)


def residual_in_parts(problem: Problem, y: Tensor) -> Tensor:
    """Residual [N] in float64, some columns at a time."""
    parts = zip(torch.split(problem.drive, 2**16, dim=1), torch.split(y, 2**16, dim=1), strict=True)
    return torch.cat([Problem(problem.lateral, drive).residual(part) for drive, part in parts])


def slow_rivals(problem: Problem, tolerance: float, plan: Plan) -> list[Row]:
    """Tiles as on a CPU, and `pynsm`; timed once, on fewer columns."""
    few = problem.first(max(4096, problem.drive.shape[1] // 16))
    eager = DynamicsConfig(solver="accelerated", tolerance=tolerance, max_iterations=MAX_ITERATIONS)
    tiles = eager.model_copy(update={"tile_columns": eager.columns_per_tile(problem.channels)})
    small = Dynamics(tiles, problem.rows)

    def as_on_a_cpu() -> Tensor:
        return small.solve(few.drive, few.lateral, few.bound, alone=False).y

    rows = [once("eager, a CPU's tiles", few, plan, as_on_a_cpu)]
    authors = AuthorsLoop.of(problem)
    if authors is not None:
        needed = authors.iterations_needed(few, tolerance)
        rows.append(once("pynsm", few, plan, lambda: authors.solve(few.drive, needed)) | {"iterations": needed})
    return rows


def once(name: str, problem: Problem, plan: Plan, action: Callable[[], Tensor]) -> Row:
    """The second call's time."""
    action()
    started = plan.now()
    y = action()
    rate = problem.drive.shape[1] / (plan.now() - started)
    residual = residual_in_parts(problem, y).amax()
    return {"name": name, "columns": problem.drive.shape[1], "columns_per_second": rate, "residual": residual}


def measure_compiled(plan: Plan, report: Report) -> None:
    """torch.compile of the plain loop, to 1e-2, at the second width; compiling takes most of the time."""
    problem = trained(plan, plan.channels[:2][-1], plan.values // 512)
    eager = DynamicsConfig(solver="accelerated", tolerance=RESIDUALS[0], max_iterations=MAX_ITERATIONS)
    found = Dynamics(eager, problem.rows).solve(problem.drive, problem.lateral, problem.bound, alone=False)
    loop = compiled_loop(torch_loop(problem.lateral, problem.bound, eager))
    row = once("torch.compile", problem, plan, lambda: loop(problem.drive, found.num_iters))
    report.row(kind="columns", channels=problem.channels, tolerance=RESIDUALS[0], iterations=found.num_iters, **row)


# -- updates and encoding ----------------------------------------------------------------------------------------------


def measure_updates(plan: Plan, report: Report) -> None:
    """Updates in a row: K = 128, 7 × 7, batches of 100 images × 196 positions, input and a look at the residual too."""
    dataset = plan.dataset("fashion_mnist")
    modes: dict[str, Row] = {
        "alone": {},
        "gather_state": {"dynamics": DynamicsConfig(exchange="gather_state"), "exchange": IdentityExchange()},
        "every_iteration": {"exchange": IdentityExchange()},
    }
    for name, changes in modes.items():
        layer = first_layer(plan, **changes)
        updates = max(5, plan.updates // (20 if name == "every_iteration" else 1))

        def some(first: int, count: int, layer: SimilarityMatchingConv2d = layer) -> None:
            for update in range(first, first + count):
                learn_once(layer, dataset, update, plan)

        some(0, min(20, updates))
        seconds = []
        for part in range(5):
            started = plan.now()
            some(20 + part * (updates // 5), updates // 5)
            seconds.append((plan.now() - started) / (updates // 5))
        row: Row = Spread.of(seconds).fields("seconds_per_update")
        started = plan.now()
        for update in range(20):
            draw(dataset, update, plan)
        row["seconds_of_input"] = (plan.now() - started) / 20
        if plan.device.type == "cuda":
            once = partial(learn_once, layer, dataset, 1, plan)
            row |= {"waits": synchronisations(once), "profile": profile(once)}
        report.row(kind="updates", mode=name, updates=updates, **row)


def first_layer(plan: Plan, **changes: Any) -> SimilarityMatchingConv2d:
    """128 channels of 7 × 7 on grey images."""
    rates = PlasticityConfig(lr=0.1, lr_decay_steps=100)
    return SimilarityMatchingConv2d(1, 128, 7, normalize="contrast", plasticity=rates, **changes).to(plan.device)


def learn_once(layer: SimilarityMatchingConv2d, dataset: Dataset, update: int, plan: Plan) -> None:
    """One batch, as a job has it: images and positions drawn on the host; the residual looked at every tenth time."""
    images, positions = draw(dataset, update, plan)
    solution = layer.partial_fit(layer.prepare(images, positions))
    if update % 10 == 0:
        float(solution.residual.mean())


def draw(dataset: Dataset, update: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """100 images on the device and 196 positions of each."""
    positions = draw_positions(196, 100, (22, 22), seeded("positions", plan.seed, update))
    return batch(dataset, update, 100, plan), positions


def synchronisations(action: Callable[[], object]) -> dict[str, int]:
    """How often the host waits for the device, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in caught).most_common())


def profile(action: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one call, the longest first; the time of all of them last."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        action()
        torch.cuda.synchronize()
    rows = [(event.key[:60], event.count, event.self_device_time_total) for event in found.key_averages()]
    rows.sort(key=lambda row: -row[2])
    return [*rows[:12], ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def measure_encoding(plan: Plan, report: Report) -> None:
    """60,000 images, K = 128, 7 × 7, stride 1: to residual 1e-2, and with the fixed iterations of evaluation."""
    dataset, layer = plan.dataset("fashion_mnist"), first_layer(plan)
    for update in range(150 if plan.device.type == "cuda" else 2):
        layer.partial_fit(batch(dataset, update, 20, plan))
    images = dataset.train_images[: plan.images].to(plan.device)

    def encode(fixed: bool) -> None:
        for part in torch.split(images, 2000):
            x = to_unit(part)
            F.adaptive_avg_pool2d(layer(x) if fixed else layer.solve(x).y, 4)

    timings = plan.timed({"to 1e-2": partial(encode, False), "fixed iterations": partial(encode, True)})
    for way in timings.seconds:
        columns = plan.images * 22 * 22
        report.row(kind="encode", way=way, images=plan.images, columns=columns, **timings.spread(way).fields("seconds"))


# -- wide layers -------------------------------------------------------------------------------------------------------


def measure_wide(plan: Plan, report: Report) -> None:
    """CIFAR-10, one layer, 6 × 6, all positions: learn, encode all images, ridge on 2 × 2 pooled activities."""
    dataset = plan.dataset("cifar10")
    for channels in plan.wide:
        report.row(kind="wide", channels=channels, **wide_layer(dataset, channels, plan))


def wide_layer(dataset: Dataset, channels: int, plan: Plan) -> Row:
    layer = SimilarityMatchingConv2d(
        3, channels, 6, normalize="contrast", whiten=True, plasticity=PlasticityConfig(lr=0.1, lr_decay_steps=100)
    ).to(plan.device)
    train, test = (part[: plan.images].to(plan.device) for part in (dataset.train_images, dataset.test_images))
    layer.calibrate(to_unit(train[:5000]), 100_000)
    updates = 200 if plan.device.type == "cuda" else 2
    started = plan.now()
    for update in range(updates):
        solution = layer.partial_fit(batch(dataset, update, 50, plan))
    learnt = plan.now()
    width = max(10, 2**28 // (channels * 27 * 27))
    labels = [part[: plan.images].to(plan.device) for part in (dataset.train_labels, dataset.test_labels)]

    def features(code: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of the images learnt from, and of those held out."""
        chunks = (torch.split(images, width) for images in (train, test))
        return [torch.cat([F.adaptive_avg_pool2d(code(to_unit(x)), 2).flatten(1) for x in parts]) for parts in chunks]

    def accuracy(found: list[Tensor]) -> float:
        ridge = Ridge(found[0], labels[0])
        classes = ridge.classes.to(plan.device)[ridge.scores(found[1]).argmax(dim=1)]
        return float((classes == labels[1]).double().mean())

    started_encoding = plan.now()
    codes = features(lambda x: layer.solve(x).y)
    encoded = plan.now() - started_encoding
    accuracies = {"simmatch": accuracy(codes)}
    sample = sample_patches(to_unit(train[:5000]), layer.patch, 200_000, seeded("dictionary", plan.seed))
    sample = (sample - layer.whitening_mean) @ layer.whitening.T
    sample = sample[torch.randperm(len(sample), generator=seeded("dictionary order", plan.seed)).to(plan.device)]
    rivals = {"exemplars": Dictionary.exemplars(sample, channels), "k_means": Dictionary.k_means(sample, channels)}
    accuracies |= {name: accuracy(features(partial(rival.maps, layer))) for name, rival in rivals.items()}
    return {
        "updates": updates, "batch_size": 50, "images": len(train) + len(test), "seconds_to_learn": learnt - started,
        "seconds_to_encode": encoded, "ridge_accuracy": accuracies,
        "residual": solution.residual.amax(), "active_fraction": (solution.y > 0).double().mean(),
        "dead_channels": layer.dead_channels,
    }  # fmt: skip


PARTS: dict[str, Callable[[Plan, Report], None]] = {
    "rates": measure_rates,
    "columns": measure_columns,
    "updates": measure_updates,
    "encode": measure_encoding,
    "wide": measure_wide,
    "compile": measure_compiled,
}
"""What can be measured, in this order."""
