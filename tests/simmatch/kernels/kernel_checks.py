"""What every kernel has to satisfy, on any device: on the CPU in Triton's interpreter, on a card as compiled.

`python -m tests.simmatch.kernels.kernel_checks` runs all of them on the CPU; TRITON_INTERPRET=1 must be set first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from simmatch import kernels
from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset, to_unit
from simmatch.kernels import certificate, coordinate, gradient, reference
from simmatch.kernels.system import System
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics
from tests.reference import random_drive, random_lateral

SOLVERS = ("accelerated", "coordinate_descent")
WIDE = (129, 160, 192, 250, 256)
RIDGE = 1e-6

FEW, SEVERAL = 9, 70
"""Columns that the interpreter takes one by one; columns that it takes by the tile, one and a ragged one."""

Case = tuple[str, int, int]


def wide(device: torch.device) -> tuple[int, ...]:
    """Widths above 128. The interpreter takes those at an edge: one of the upper 128 channels, most of them, or all."""
    return WIDE if device.type == "cuda" else (129, 250, 256)


def cases(device: torch.device) -> tuple[Case, ...]:
    """Every kernel that solves, with channels and columns.

    Above 128 channels gradient steps have a kernel of their own, whose tiles are half as wide.
    """
    narrow = (("coordinate_descent", 50, SEVERAL), ("accelerated", 50, SEVERAL))
    return (*narrow, *(("accelerated", channels, 34) for channels in wide(device)))


def narrow_and_wide(device: torch.device) -> tuple[Case, ...]:
    """Every kernel that solves, with few widths; in the interpreter each with some channels that are not there."""
    narrow, others = cases(device)[:2], cases(device)[2:]
    return (*narrow, *((others[0], others[-1]) if device.type == "cuda" else (others[1],)))


Check = Callable[[torch.device], None]


def problem(channels: int, columns: int, device: torch.device, seed: int = 0) -> tuple[Tensor, System]:
    """Drives [N, K] and a system of condition 100 on the device, in float32; drives of very different lengths."""
    lateral = random_lateral(channels, seed, condition=100.0, largest=3.0).float()
    drive = random_drive(channels, columns, seed + 1).float().T * torch.logspace(-4, 4, columns).unsqueeze(1)
    bound = certify_afresh(lateral, Rows.all(channels), ridge=RIDGE)
    return drive.contiguous().to(device), System(lateral.to(device), bound.ridge, bound.value)


def trained_problem(channels: int, device: torch.device) -> tuple[Tensor, System]:
    """What a layer that has seen some digits makes of 10 others: drives [N, K] and its M."""
    digits = load_dataset(DataConfig(name="digits"))
    images = to_unit(digits.train_images)
    layer = SimilarityMatchingConv2d(1, channels, 4, normalize="contrast", plasticity=PlasticityConfig(lr=0.2))
    for update in range(6):
        layer.partial_fit(images[20 * update : 20 * update + 20])
    drive = layer.drive(images[-10:])[:, ::4].T.contiguous()
    bound = certify_afresh(layer.lateral, Rows.all(channels), ridge=RIDGE)
    return drive.to(device), System(layer.lateral.to(device), bound.ridge, bound.value)


def after(drive: Tensor, system: System, iterations: int) -> Tensor:
    """y after some gradient steps, by the slow reference."""
    channels = drive.shape[1]
    matrix, diagonal = system.matrix[:channels, :channels].cpu(), system.diagonal[:channels].cpu()
    return reference.accelerated(drive.cpu(), matrix, diagonal, 1 / system.bound, 0.0, iterations, 4)[0].to(drive)


def solve(
    name: str, drive: Tensor, system: System, tolerance: float = 1e-3, **changes: object
) -> kernels.KernelSolution:
    start = changes.pop("start", None)
    config = DynamicsConfig(tolerance=tolerance, max_iterations=1000).model_copy(update=changes)
    assert kernels.supports(name, drive.shape[1], drive.dtype, tolerance) is None
    assert start is None or isinstance(start, Tensor)
    return kernels.solve(name, drive, system, config, start)


def some(name: str, drive: Tensor) -> Tensor:
    """As many of the columns as the device can do within a second; lengths from the least to the greatest."""
    slow = drive.device.type == "cpu" and name == "coordinate_descent"
    return drive[:: -(-len(drive) // FEW)].contiguous() if slow else drive


def exact_residual(drive: Tensor, y: Tensor, system: System) -> Tensor:
    return reference.residuals(drive, y, system.lateral, system.ridge).float()


def reaches_the_tolerance(device: torch.device) -> None:
    """Ragged tiles, channels that are no power of two; the reported residual is that of float64."""
    more = tuple((name, channels, columns) for channels, columns in ((20, 1), (64, 5)) for name in SOLVERS)
    for name, channels, columns in (*more, *cases(device)):
        whole, system = problem(channels, columns, device)
        drive = some(name, whole)
        for tolerance in (1e-2, 1e-5) if channels <= 64 else (1e-3,):
            solution = solve(name, drive, system, tolerance)
            exact = exact_residual(drive, solution.y, system)
            assert (solution.y >= 0).all()
            assert (solution.residual <= tolerance).all(), (name, channels, tolerance, solution.residual.amax())
            assert (exact <= solution.residual + 2e-6).all(), (name, channels, (exact - solution.residual).amax())
            assert (solution.iterations >= 1).all()


def every_value_is_written(device: torch.device) -> None:
    """Fresh memory holds NaN."""
    make = Tensor.new_empty_strided
    try:
        Tensor.new_empty_strided = lambda *given: make(*given).fill_(torch.nan)  # type: ignore[method-assign]
        for name, channels, columns in narrow_and_wide(device):
            drive, system = problem(channels, columns, device)
            assert solve(name, some(name, drive), system, 1e-2).y.isfinite().all(), (name, channels)
    finally:
        Tensor.new_empty_strided = make  # type: ignore[method-assign]


def columns_are_independent(device: torch.device) -> None:
    """Bit by bit, whatever stands beside a column and wherever in a tile it stands.

    In the interpreter a tile is multiplied by NumPy, whose order of sums depends on the row.
    """
    for name, channels, columns in narrow_and_wide(device):
        whole, system = problem(channels, columns, device)
        drive = some(name, whole)
        order = torch.randperm(len(drive), generator=torch.Generator().manual_seed(3)).to(device)
        together = solve(name, drive, system, 1e-2)
        shuffled = solve(name, drive[order], system, 1e-2)
        few = solve(name, drive[2:5].contiguous(), system, 1e-2)
        for field in ("y", "iterations", "residual"):
            values = getattr(together, field)
            exact = device.type == "cuda" or (name == "coordinate_descent" and field != "residual")
            same = torch.equal if exact else lambda a, b: bool((a - b).norm() <= 1e-3 * b.norm())
            assert same(getattr(shuffled, field) * 1.0, values[order] * 1.0), (name, channels, field)
            assert same(getattr(few, field) * 1.0, values[2:5] * 1.0), (name, channels, field)


def repeats_every_bit(device: torch.device) -> None:
    for name, channels, columns in narrow_and_wide(device):
        drive, system = problem(channels, columns, device)
        one, other = (solve(name, some(name, drive), system, 1e-2) for _ in range(2))
        assert torch.equal(one.y, other.y), name


def starts_where_it_is_told(device: torch.device) -> None:
    """Starting from the solution takes almost no work; starting from anywhere else reaches the same solution."""
    for name, channels, _ in narrow_and_wide(device):
        drive, system = problem(channels, 5 if device.type == "cuda" else 3, device)
        solved = solve("coordinate_descent", drive, system, 1e-5).y
        cold, warm = solve(name, drive, system), solve(name, drive, system, start=solved)
        assert (warm.residual <= 1e-3).all()
        assert (warm.iterations <= cold.iterations).all()
        assert warm.iterations.sum() < cold.iterations.sum() / 2, name
        assert (warm.y - solved).norm() <= 0.02 * solved.norm()
        far = solve(name, drive, system, 1e-5, start=torch.rand_like(drive) * drive.abs().amax(dim=1, keepdim=True))
        assert (far.y - solved).norm() <= 1e-3 * solved.norm(), name
        near = solve(name, drive, system, start=1.01 * solved)  # not good enough to be left as it is
        assert (near.y != cold.y).any(dim=1).all(), name  # else the way there was that from silence


def fixed_iterations_are_those_of_torch(device: torch.device) -> None:
    """What evaluation runs, and what an exported model computes: the same iterates to float32's rounding."""
    config = DynamicsConfig(tolerance=0, max_iterations=30, solver="accelerated")
    for channels in (50, *wide(device)):
        drive, system = problem(channels, SEVERAL if channels == 50 else 34, device)
        bound = certify_afresh(system.lateral, Rows.all(channels), ridge=RIDGE)
        expected = Dynamics(config, Rows.all(channels)).solve(drive.T, system.lateral, bound).y.T
        solution = solve("accelerated", drive, system, 0.0, max_iterations=30)
        assert (solution.iterations == 30).all()
        off = (solution.y - expected).abs().amax(dim=1) / expected.amax(dim=1)
        assert (off <= 1e-4).all(), (channels, off.amax())


def silence_and_disaster_stay_in_their_column(device: torch.device) -> None:
    """No drive: y = 0 with residual 0. NaN or infinity: a residual that is not finite. Neighbours: unchanged."""
    for name, channels, _ in cases(device):
        drive, system = problem(channels, 8, device)
        broken = drive.clone()
        broken[1], broken[3, 7], broken[5, -2], broken[6] = 0.0, torch.nan, torch.inf, -drive[6].abs()
        good, bad = solve(name, drive, system, 1e-2), solve(name, broken, system, 1e-2)
        assert (bad.y[[1, 6]] == 0).all()
        assert (bad.residual[[1, 6]] == 0).all()
        assert not bad.residual[[3, 5]].isfinite().any(), (name, bad.residual)
        assert torch.equal(bad.y[[0, 2, 4, 7]], good.y[[0, 2, 4, 7]])


def a_channel_that_nothing_holds_stays_silent(device: torch.device) -> None:
    drive, system = problem(50, 8, device)
    lateral = system.lateral.clone()
    lateral[7], lateral[:, 7] = 0.0, 0.0
    bare = System(lateral, 0.0, system.bound)
    solution = kernels.solve("coordinate_descent", drive, bare, DynamicsConfig(tolerance=1e-2))
    assert (solution.y[:, 7] == 0).all()
    unanswered = drive[:, 7].clamp(min=0) / drive.abs().amax(dim=1)
    assert (solution.residual - unanswered <= 1e-2).all()


def moves_are_those_of_the_reference(device: torch.device) -> None:
    """Ties and rounding may change a choice here and there, not how many moves it takes."""
    whole, system = problem(50, 40, device)
    drive = some("coordinate_descent", whole)
    y, iterations = coordinate.solve(drive, system, 1e-2, 100)
    expected, moves = reference.greedy(drive.cpu(), system.matrix[:50, :50].cpu(), 1e-2 - 1e-6, 5000)
    y, iterations = y.cpu(), iterations.cpu()
    assert ((y - expected).abs().amax(dim=1) <= 0.05 * expected.amax(dim=1)).all()
    assert (iterations - -(-moves.to(iterations) // 50)).abs().double().mean() <= 0.2


def iterations_are_those_of_the_reference(device: torch.device) -> None:
    """Rounding decides a look or a restart here and there."""
    for channels in (50, 250):
        drive, system = problem(channels, 40, device)
        y, iterations = gradient.solve(drive, system, 1e-2, 200)
        matrix, diagonal = system.matrix[:channels, :channels], system.diagonal[:channels]
        given = (part.cpu().double() for part in (drive, matrix, diagonal))
        expected, counted = reference.accelerated(*given, 1 / system.bound, 1e-2, 200, 4)
        assert (iterations.cpu() == counted).double().mean() > 0.9
        same = iterations.cpu() == counted
        off = ((y.cpu() - expected).abs().amax(dim=1) / expected.amax(dim=1))[same]
        assert (off <= 1e-4).double().mean() > 0.9, off


def certificate_is_the_residual(device: torch.device) -> None:
    """Of any y at all, of solutions, of random and of trained M: neither below nor above it but for rounding.

    A sum of K + 2 terms in float32, whatever its order, is off by (K + 2) 2⁻²⁴ times the sum of their sizes at most;
    twice √(K + 2) 2⁻²⁴ is asked for, since the signs of the roundings vary.
    """
    widths = (20, 50, 160, 512) if device.type == "cuda" else (20, 50, 256)  # the trained one of 300 is the widest
    problems = [problem(channels, SEVERAL, device) for channels in widths]
    for drive, system in (*problems, *(trained_problem(channels, device) for channels in (40, 300))):
        matrix = system.matrix[: drive.shape[1], : drive.shape[1]].double()
        start = torch.rand_like(drive) * drive.abs().amax(dim=1, keepdim=True)
        solved = (after(drive, system, iterations) for iterations in (5, 60, 400))
        for y in (torch.zeros_like(drive), start, *solved):
            reported = certificate.residuals(drive, y, system).double()
            exact = reference.residuals(drive, y, system.lateral, system.ridge)
            sizes = (y.double() @ matrix.abs() + drive.double().abs()).amax(dim=1) / drive.double().abs().amax(dim=1)
            rounding = 2.0 * (drive.shape[1] + 2) ** 0.5 * 2.0**-24 * sizes + 2.0**-22 * exact
            assert (exact <= reported + rounding).all(), (drive.shape, (exact - reported - rounding).amax())
            assert (reported <= exact + rounding).all(), (drive.shape, (reported - exact - rounding).amax())


def orientation_changes_nothing(device: torch.device) -> None:
    """Columns side by side, [K, N] as a layer has them, or each in one piece."""
    for name, channels, columns in narrow_and_wide(device):
        whole, system = problem(channels, columns, device)
        drive = some(name, whole)
        turned = solve(name, drive.T.contiguous().T, system, 1e-2)
        assert torch.equal(turned.y, solve(name, drive, system, 1e-2).y), name
        assert turned.y.T.is_contiguous()


CHECKS: tuple[Check, ...] = (
    reaches_the_tolerance,
    every_value_is_written,
    columns_are_independent,
    repeats_every_bit,
    starts_where_it_is_told,
    fixed_iterations_are_those_of_torch,
    silence_and_disaster_stay_in_their_column,
    a_channel_that_nothing_holds_stays_silent,
    moves_are_those_of_the_reference,
    iterations_are_those_of_the_reference,
    certificate_is_the_residual,
    orientation_changes_nothing,
)


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    for check in CHECKS:
        started = time.process_time()
        try:
            check(torch.device("cpu"))
            print(f"ok      {check.__name__} {time.process_time() - started:.1f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
