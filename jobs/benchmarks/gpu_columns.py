"""Columns per second of every way to solve the dynamics on a GPU, at equal residual.

Beside ours stand the plain loop of the dynamics (eager, captured as a CUDA graph, or compiled) and `pynsm`'s loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jobs.benchmarks.gpu_layer import GpuPlan, Row, batch
from jobs.benchmarks.problems import Problem, Recipe, error
from jobs.pynsm import require_pynsm, similarity_matching
from jobs.reporting import MissingError, Report
from simmatch import kernels
from simmatch.captured import CudaGraph
from simmatch.config import DynamicsConfig
from simmatch.data.sources import to_unit
from simmatch.seeding import seeded
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound
from simmatch.solvers.dynamics import Dynamics, Solution
from simmatch.solvers.tile import Folded, nesterov

RESIDUALS = (1e-2, 1e-3)

MAX_ITERATIONS = 2000


def trained(plan: GpuPlan, channels: int, columns: int) -> Problem:
    """A problem on the device, as 150 updates on it leave one; see `jobs.benchmarks.problems`."""
    dataset = plan.dataset("fashion_mnist")
    recipe = Recipe("fashion_mnist", channels, 3000, 20, columns, plan.seed)
    layer = recipe.layer(dataset.in_channels).to(plan.device)
    for update in range(150 if plan.device.type == "cuda" else 5):
        layer.partial_fit(batch(dataset, update, 20, plan))
    drive = layer.drive(to_unit(dataset.test_images[: max(100, plan.images)]).to(plan.device))
    order = torch.randperm(drive.shape[1], generator=seeded("columns", recipe.seed))[:columns]
    return Problem(layer.lateral.clone(), drive[:, order.to(plan.device)].contiguous())


def measure_columns(plan: GpuPlan, report: Report) -> None:
    """Every way to solve the same columns to the same residual, recomputed in float64."""
    table: list[Row] = []
    for channels in plan.channels:
        problem = trained(plan, channels, plan.values // channels)
        report.row(kind="problem", channels=channels, columns=problem.drive.shape[1],
                   largest_eigenvalue=problem.largest, condition=problem.condition)  # fmt: skip
        for tolerance in RESIDUALS:
            for row in compare(problem, tolerance, plan):
                table.append({"channels": channels, "tolerance": tolerance} | row)
                report.row(kind="columns", **table[-1])
    headings = {
        "channels": "K", "tolerance": "residual", "name": "way", "columns_per_second": "columns/s",
        "columns_per_second_min": "min", "columns_per_second_max": "max", "speedup": "× eager", "residual": "float64",
        "residual_reported": "reported", "error": "error",
    }  # fmt: skip
    report.rows_table("Columns per second at equal residual", headings, table)


def compare(problem: Problem, tolerance: float, plan: GpuPlan) -> list[Row]:
    """Rows of all candidates; the eager loop in tiles of 2²⁴ values is what the others are compared with."""
    eager = DynamicsConfig(solver="accelerated", tolerance=tolerance, max_iterations=MAX_ITERATIONS)
    auto = eager.model_copy(update={"solver": "auto"})
    solvers = {"eager": Dynamics(eager, problem.rows), "simmatch": Dynamics(auto, problem.rows, alone=True)}
    if kernels.select(eager, problem.drive) is not None:
        solvers["fused gradient"] = Dynamics(eager, problem.rows, alone=True)
    solutions: dict[str, Solution] = {}

    def solve(name: str) -> None:
        solutions[name] = solvers[name].solve(problem.drive, problem.lateral, problem.bound)

    candidates: dict[str, Callable[[], object]] = {name: partial(solve, name) for name in solvers}
    solve("eager")
    loop = torch_loop(problem.lateral, problem.bound, eager)
    graph: GraphLoop | None = None
    if plan.device.type == "cuda":
        width = eager.columns_per_tile(problem.channels, "cuda")
        graph = GraphLoop(loop, problem.drive, solutions["eager"].num_iters, width)
        candidates["eager, CUDA graph"] = graph.run
    solve("simmatch")
    first = solutions["simmatch"].y.clone()
    timings = plan.timed(candidates)
    exact, rows = problem.first(1024).exact(), []
    for name in candidates:
        y = solutions[name].y if name in solutions or graph is None else graph.y
        verified = residual_in_parts(problem, y)
        off = error(y[:, : exact.shape[1]], exact)
        row: Row = {"name": name, "columns": problem.drive.shape[1], "residual": verified.amax(), "error": off}
        row |= timings.rate(name, problem.drive.shape[1]).fields("columns_per_second")
        row |= timings.speedup(name, "eager").fields("speedup")
        if name in solutions:
            reported = solutions[name].residual
            row |= {"iterations": solutions[name].num_iters, "residual_reported": reported.amax(),
                    "truth_above_reported": (verified - reported.double()).amax()}  # fmt: skip
        rows.append(row)
    rows[1]["same_bits"] = bool(torch.equal(first, solutions["simmatch"].y))
    return rows + slow_rivals(problem, tolerance, plan)


def residual_in_parts(problem: Problem, y: Tensor) -> Tensor:
    """Residual [N] in float64, some columns at a time."""
    parts = zip(torch.split(problem.drive, 2**16, dim=1), torch.split(y, 2**16, dim=1), strict=True)
    return torch.cat([Problem(problem.lateral, drive).residual(part) for drive, part in parts])


def slow_rivals(problem: Problem, tolerance: float, plan: GpuPlan) -> list[Row]:
    """Tiles as on a CPU, and `pynsm`; timed once, on fewer columns."""
    few = problem.first(max(4096, problem.drive.shape[1] // 16))
    eager = DynamicsConfig(solver="accelerated", tolerance=tolerance, max_iterations=MAX_ITERATIONS)
    tiles = eager.model_copy(update={"tile_columns": eager.columns_per_tile(problem.channels)})
    small = Dynamics(tiles, problem.rows)

    def as_on_a_cpu() -> Tensor:
        return small.solve(few.drive, few.lateral, few.bound).y

    rows = [once("eager, a CPU's tiles", few, plan, as_on_a_cpu)]
    authors = AuthorsLoop.of(problem)
    if authors is not None:
        needed = authors.iterations_needed(few, tolerance)
        rows.append(once("pynsm", few, plan, lambda: authors.solve(few.drive, needed)) | {"iterations": needed})
    return rows


def once(name: str, problem: Problem, plan: GpuPlan, action: Callable[[], Tensor]) -> Row:
    """The second call's time."""
    action()
    started = plan.now()
    y = action()
    rate = problem.drive.shape[1] / (plan.now() - started)
    residual = residual_in_parts(problem, y).amax()
    return {"name": name, "columns": problem.drive.shape[1], "columns_per_second": rate, "residual": residual}


def measure_compiled(plan: GpuPlan, report: Report) -> None:
    """torch.compile of the plain loop, to 1e-2, at the second width; compiling takes most of the time."""
    problem = trained(plan, plan.channels[:2][-1], plan.values // 512)
    eager = DynamicsConfig(solver="accelerated", tolerance=RESIDUALS[0], max_iterations=MAX_ITERATIONS)
    solution = Dynamics(eager, problem.rows).solve(problem.drive, problem.lateral, problem.bound)
    loop = compiled_loop(torch_loop(problem.lateral, problem.bound, eager))
    row = once("torch.compile", problem, plan, lambda: loop(problem.drive, solution.num_iters))
    report.row(kind="columns", channels=problem.channels, tolerance=RESIDUALS[0], iterations=solution.num_iters, **row)


# -- other ways --------------------------------------------------------------------------------------------------------

State = tuple[Tensor, Tensor, Tensor]
Block = Callable[[Tensor, State], State]


def torch_loop(lateral: Tensor, bound: Bound, config: DynamicsConfig) -> Block:
    """(s d, (y, w_prev, k)) → the state four iterations later, restart included: as in `simmatch.solvers.tile`."""
    folded = Folded.from_lateral(lateral, bound, config, Rows.all(len(lateral)))
    matrix, step = folded.matrix, folded.step

    def block(drive: Tensor, state: State) -> State:
        y, w_prev, k = state
        bias = drive * step
        for iteration in range(4):
            w = torch.addmm(bias, matrix, y)
            following = torch.lerp(w_prev, w, nesterov(k, torch.empty_like(k)) + 1.0).clamp(min=0.0)
            k = k + 1.0
            if iteration == 3:
                k = torch.where(((y - w) * (following - y)).sum(dim=0) > 0, 0.0, k)
            w_prev, y = w, following
        return y, w_prev, k

    return block


def begin(drive: Tensor) -> State:
    return torch.zeros_like(drive), torch.zeros_like(drive), torch.zeros_like(drive[0])


class GraphLoop:
    """The plain loop for a number of iterations, captured once for a tile and replayed for every tile.

    Attributes
    ----------
    y: [K, N], result of the last run.
    """

    def __init__(self, block: Block, drive: Tensor, iterations: int, width: int) -> None:
        self._drive, self._width = drive, min(width, drive.shape[1])
        self._input = drive[:, : self._width].contiguous()
        self.y = torch.empty_like(drive)

        def loop(blocks: int) -> Tensor:
            state = begin(self._input)
            for _ in range(blocks):
                state = block(self._input, state)
            return state[0]

        loop(1)  # what is made once for all calls is not part of a graph
        self._graph = CudaGraph(drive.device)
        self._output = self._graph.capture(partial(loop, -(-iterations // 4)))

    def run(self) -> None:
        columns = self._drive.shape[1]
        for first in range(0, columns, self._width):
            first = min(first, columns - self._width)  # the last tile overlaps
            where = slice(first, first + self._width)
            self._input.copy_(self._drive[:, where])
            self._graph.replay()
            self.y[:, where].copy_(self._output)


def compiled_loop(block: Block) -> Callable[[Tensor, int], Tensor]:
    """The same through torch.compile."""
    compiled = torch.compile(block)

    def solve(drive: Tensor, iterations: int) -> Tensor:
        state = begin(drive)
        for _ in range(-(-iterations // 4)):
            state = compiled(drive, state)
        return state[0]

    return solve


@dataclass(frozen=True)
class AuthorsLoop:
    """`pynsm`'s loop: projected gradient through automatic differentiation, at its best certain step 1.9/λmax."""

    lateral: Tensor
    step: float

    @classmethod
    def of(cls, problem: Problem) -> AuthorsLoop | None:
        """None where `pynsm` is not installed."""
        try:
            require_pynsm()
        except MissingError:
            return None
        return cls(problem.lateral, 1.9 / problem.bound.value)

    def iterations_needed(self, problem: Problem, tolerance: float) -> int:
        """Iterations of projected gradient until the residual is reached; ours counts them as theirs does."""
        config = DynamicsConfig(
            solver="projected_gradient", step=self.step, tolerance=tolerance, max_iterations=5000, tile_columns=2**14
        )
        return Dynamics(config, problem.rows).solve(problem.drive, self.lateral, problem.bound).num_iters

    def solve(self, drive: Tensor, iterations: int) -> Tensor:
        """[K, N] → y [K, N], the columns as an image of K channels."""
        encoder = torch.nn.Identity()
        model = similarity_matching(encoder, self.lateral, step=self.step, iterations=iterations).to(drive.device)
        with torch.enable_grad():
            y: Tensor = model(drive.reshape(1, len(drive), 1, -1)).detach()
        return y.reshape(drive.shape)
