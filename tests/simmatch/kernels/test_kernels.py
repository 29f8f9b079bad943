"""The GPU's kernels without a GPU: what they compute, in Triton's interpreter; what they compile to, for sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from simmatch import kernels
from simmatch.config import DynamicsConfig
from simmatch.kernels import reference
from simmatch.kernels.system import System
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.dynamics import Dynamics
from tests.reference import random_drive, random_lateral

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(not kernels.installed(), reason="needs Triton, which is not installed")
MEASURED = ("3.6", "3.8")
needs_measured_triton = pytest.mark.skipif(
    not kernels.installed() or not version("triton").startswith(MEASURED),
    reason=f"registers and stack are compiler-dependent; the budgets were set with Triton {', '.join(MEASURED)}",
)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_kernels_compute() -> None:
    """All of `kernel_checks`, in a separate process: the interpreter is selected when Triton is imported.

    It takes many seconds of one processor, and several times that where others want the same processor.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simmatch.kernels.kernel_checks"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# -- what they compile to ----------------------------------------------------------------------------------------------

FLOATS, HALVES, INTEGERS = "*fp32", "*fp16", "*i32"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, aligned: bool) -> Any:
    """A kernel as a Hopper card gets it; the strides of a contiguous [K, N], pointers aligned if asked for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = constants | {"along": 1}
    hints = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if aligned and types.get(name, "").startswith("*")
    }
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=hints,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


def resources(binary: bytes, folder: Path) -> tuple[int, int, str]:
    """(registers, bytes of stack, machine code) as the disassembler in Triton's package reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("needs cuobjdump, which this Triton does not carry")
    path = folder / "kernel.cubin"
    path.write_bytes(binary)

    def dump(option: str) -> str:
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, timeout=60).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert usage is not None
    return int(usage[1]), int(usage[2]), dump("--dump-sass")


def innermost(code: str) -> str:
    """The shortest loop that has products of tensor cores in it, as machine code."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    places = {int(place, 16): line for line, (place, _) in enumerate(lines)}
    loops = []
    for last, (place, instruction) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(place, 16):
            loops.append("\n".join(text for _, text in lines[places[int(target[1], 16)] : last + 1]))
    return min((loop for loop in loops if "HGMMA" in loop), key=len)


@needs_measured_triton
@pytest.mark.parametrize(("channels", "most"), [(64, 48), (128, 64), (256, 96), (512, 168)])
def test_coordinate_descent_stays_in_registers(channels: int, most: int, tmp_path: Path) -> None:
    """No spill, no shared memory, no barrier: a move is one row of M and two reductions over the warp."""
    from simmatch.kernels.coordinate import descend

    types = {"columns": "i32", "across": "i32", "tolerance": "fp32", "limit": "i32", "iterations": INTEGERS}
    types |= dict.fromkeys(("drive", "start", "y", "residual", "rows", "inverse"), FLOATS)
    constants = {"CHANNELS": channels, "BLOCK": channels, "WARM": False}
    kernel = compiled(descend, types, constants, warps=1, aligned=False)
    registers, stack, code = resources(kernel.asm["cubin"], tmp_path)
    assert registers <= most
    assert stack == 0
    assert kernel.metadata.shared == 0
    assert "BAR.SYNC" not in code
    assert "REDUX" in code


GRADIENT = {"columns": "i32", "across": "i32", "tolerance": "fp32", "limit": "i32", "iterations": INTEGERS}
GRADIENT |= {"high": HALVES, "low": HALVES}
GRADIENT |= dict.fromkeys(("drive", "start", "y_out", "diagonal", "scaling", "pace"), FLOATS)
MULTIPROCESSOR = {"registers": 65536, "shared": 227 * 1024}


@needs_measured_triton
@pytest.mark.parametrize(("channels", "most_stack", "most_shared"), [(64, 0, 48), (128, 900, 114)])
def test_fused_gradient_stays_on_chip(channels: int, most_stack: int, most_shared: int, tmp_path: Path) -> None:
    """Products are the tensor cores'; two programs fit a multiprocessor; no shared memory for the increments."""
    from simmatch.kernels.gradient import COLUMNS, WARPS, accelerate

    constants = {"CHANNELS": channels, "BLOCK": channels, "COLUMNS": COLUMNS, "CHECK": 4}
    kernel = compiled(accelerate, GRADIENT, constants | {"FIXED": True, "WARM": False}, WARPS, aligned=True)
    registers, stack, code = resources(kernel.asm["cubin"], tmp_path)
    assert registers * WARPS * 32 * 2 <= MULTIPROCESSOR["registers"]
    assert stack <= most_stack
    assert kernel.metadata.shared <= most_shared * 1024
    assert code.count("HGMMA") == 3 * channels // 16
    iteration = innermost(code)
    assert iteration.count("STS") == 0
    assert iteration.count("LDL") + iteration.count("STL") <= (0 if channels == 64 else 170)


@needs_measured_triton
@pytest.mark.parametrize(("changes", "most_spilled"), [({}, 0), ({"FIXED": False}, 0), ({"WARM": True}, 125)])
def test_wide_gradient_stays_on_chip(changes: dict[str, Any], most_spilled: int, tmp_path: Path) -> None:
    """One program fits a multiprocessor, M and the increments included; three products of 256 × 256 by 16 columns."""
    from simmatch.kernels.gradient_wide import WIDE_COLUMNS, WIDE_WARPS, accelerate_wide

    constants = {"CHANNELS": 256, "BLOCK": 256, "COLUMNS": WIDE_COLUMNS, "CHECK": 4, "FIXED": True, "WARM": False}
    kernel = compiled(accelerate_wide, GRADIENT, constants | changes, WIDE_WARPS, aligned=True)
    registers, _, code = resources(kernel.asm["cubin"], tmp_path)
    assert registers * WIDE_WARPS * 32 <= MULTIPROCESSOR["registers"]
    assert 192 * 1024 < kernel.metadata.shared <= MULTIPROCESSOR["shared"]  # three of four blocks, twice
    iteration = innermost(code)
    assert len(re.findall(r"HGMMA\.64x32x16\.F32 ", iteration)) == 3 * 256 * 256 // (128 * 16)
    assert iteration.count("LDL") + iteration.count("STL") <= most_spilled
    assert "LDG" not in iteration


@needs_triton
def test_certificate_is_in_float32(tmp_path: Path) -> None:
    from simmatch.kernels.certificate import COLUMNS, DEPTH, WIDTH, certify

    types = {"columns": "i32", "across": "i32", "tolerance": "fp32"}
    types |= dict.fromkeys(("drive", "y", "residual", "matrix", "diagonal"), FLOATS)
    constants = {"CHANNELS": 512, "BLOCK": 512, "WIDTH": WIDTH, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    kernel = compiled(certify, types, constants | {"AGAIN": False}, 4, aligned=True)
    _, stack, code = resources(kernel.asm["cubin"], tmp_path)
    assert stack == 0
    assert "HGMMA" not in code  # float32, not what tensor cores make of it
    assert kernel.metadata.shared <= 48 * 1024


# -- when they are used ------------------------------------------------------------------------------------------------


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason names what was given; then torch does it."""
    monkeypatch.setattr(kernels, "installed", lambda: True)
    assert kernels.supports("coordinate_descent", 512, torch.float32, 1e-3) is None
    assert kernels.supports("accelerated", 256, torch.float32, 0.0) is None
    assert kernels.supports("coordinate_descent", 512, torch.float32, 1e-3, 10) is None
    for reason, arguments in {
        "float32, got torch.float64": ("accelerated", 64, torch.float64, 1e-3),
        "a tolerance of at least 1e-05, got 1e-07": ("accelerated", 64, torch.float32, 1e-7),
        "no fixed number": ("coordinate_descent", 64, torch.float32, 0.0),
        "up to 256 channels, got 257": ("accelerated", 257, torch.float32, 0.0),
        "accelerated needs compute capability 9, got 10": ("accelerated", 64, torch.float32, 0.0, 10),
        "descent needs compute capability 8 or more, got 7": ("coordinate_descent", 64, torch.float32, 1e-2, 7),
        "up to 4096 channels, got 5000": ("coordinate_descent", 5000, torch.float32, 1e-2),
        "no kernel for projected_gradient": ("projected_gradient", 64, torch.float32, 1e-2),
    }.items():
        assert reason in (kernels.supports(*arguments) or "")
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert kernels.supports("accelerated", 64, torch.float32, 1e-2) == "Triton is not installed"


class OnCard:
    """Stands in for a drive on a device."""

    dtype, device = torch.float32, torch.device("cuda")

    def __init__(self, channels: int) -> None:
        self.shape = (channels, 1000)


@pytest.mark.parametrize(
    ("channels", "capability", "changes", "expected"),
    [
        (128, 9, {}, "coordinate_descent"),
        (128, 8, {}, "coordinate_descent"),
        (128, 7, {}, None),
        (128, 9, {"tolerance": 0}, "accelerated"),
        (128, 8, {"tolerance": 0}, None),
        (256, 9, {"tolerance": 0}, "accelerated"),
        (257, 9, {"tolerance": 0}, None),
        (128, 10, {"tolerance": 0}, None),
        (128, 10, {}, "coordinate_descent"),
        (5000, 9, {}, None),
        (128, 9, {"solver": "accelerated"}, "accelerated"),
        (512, 9, {"solver": "accelerated"}, None),
        (128, 9, {"solver": "projected_gradient"}, None),
    ],
)
def test_auto_picks_by_device_width_and_tolerance(
    channels: int, capability: int, changes: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "installed", lambda: True)
    monkeypatch.setattr(kernels, "capability", lambda _: capability)
    drive: Any = OnCard(channels)
    assert kernels.select(DynamicsConfig(**changes), drive) == expected
    assert kernels.select(DynamicsConfig(**changes), torch.zeros(channels, 3)) is None  # on a CPU


@needs_triton
def test_coordinate_descent_that_no_kernel_does_is_refused() -> None:
    """With the reason; on the device without memory, for which there is no kernel."""
    lateral = torch.eye(32)
    bound = certify_afresh(lateral, Rows.all(32), ridge=0)
    for dtype, why in ((torch.float32, "no kernel for this device"), (torch.float64, "float32, got torch.float64")):
        drive = torch.empty(32, 5, dtype=dtype, device="meta")
        dynamics = Dynamics(DynamicsConfig(solver="coordinate_descent"), Rows.all(32), alone=True)
        with pytest.raises(ValueError, match=f"expected accelerated on meta, got coordinate_descent .*{why}"):
            dynamics.solve(drive, lateral, bound)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are chosen on the CPU too, and torch computes what they would; the names of those that were used."""
    used: list[str] = []

    def computed(
        name: str, drive: torch.Tensor, system: System, config: DynamicsConfig, start: torch.Tensor | None
    ) -> kernels.KernelSolution:
        used.append(name)
        y, moves = reference.greedy(drive, system.matrix, config.tolerance, 10_000, start)
        residual = reference.residuals(drive, y, system.lateral, system.ridge).to(drive)
        return kernels.KernelSolution(y.T.contiguous().T, moves.int(), residual)

    monkeypatch.setattr(kernels, "select", lambda config, drive: "coordinate_descent")
    monkeypatch.setattr(kernels, "solve", computed)
    return used


def test_dynamics_by_a_kernel(scripted: list[str]) -> None:
    """Where nothing is exchanged, also for a part of a wider drive; shapes, orientation and start are kept."""
    lateral, drive = random_lateral(32, 0).float(), random_drive(32, 40, 1).float()
    bound = certify_afresh(lateral, Rows.all(32), ridge=1e-6)
    dynamics = Dynamics(DynamicsConfig(tolerance=1e-3), Rows.all(32), alone=True)
    for part in (drive, drive[:, 7:20]):
        solution = dynamics.solve(part, lateral, bound)
        expected = Dynamics(DynamicsConfig(tolerance=1e-3), Rows.all(32)).solve(part, lateral, bound)
        assert (solution.y - expected.y).norm() <= 0.05 * expected.y.norm()
        assert (solution.residual <= 1e-3).all()
        again = dynamics.solve(part, lateral, bound, start=solution.y)
        assert again.num_iters < solution.num_iters
    assert scripted == ["coordinate_descent"] * 4


def test_what_is_not_finite_is_raised(scripted: list[str]) -> None:
    lateral, drive = random_lateral(32, 0).float(), random_drive(32, 5, 1).float()
    bound = certify_afresh(lateral, Rows.all(32), ridge=1e-6)
    drive[3, 2] = torch.nan
    dynamics = Dynamics(DynamicsConfig(), Rows.all(32), alone=True)
    with pytest.raises(SharedFault, match="non-finite values in the drive"):
        dynamics.solve(drive, lateral, bound)
