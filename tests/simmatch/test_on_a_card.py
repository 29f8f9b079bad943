"""The paths that matter, on a CUDA device; skipped where there is none. Oracles: the CPU, float64, the definition."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from simmatch import kernels, solve
from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.kernels import reference
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.precision import exact_float32
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from tests.reference import random_drive, random_lateral

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

from tests.simmatch.kernels import kernel_checks

pytestmark = pytest.mark.gpu

MODES = ("alone", "every_iteration", "block", "gather_state")


@pytest.fixture(autouse=True)
def precision() -> None:
    exact_float32()


def make_layer(
    device: torch.device, mode: str = "alone", *, channels: int = 40, **changes: object
) -> SimilarityMatchingConv2d:
    """A layer for the digits; `alone`: no exchange at all, else that of one owner."""
    mesh = {} if mode == "alone" else {"mesh": Mesh()}
    dynamics = DynamicsConfig(
        tolerance=1e-3, max_iterations=400, exchange="every_iteration" if mode == "alone" else mode
    )
    values = {"normalize": "contrast", "dynamics": dynamics, "plasticity": PlasticityConfig(lr=0.1, tau=0.5)}
    return SimilarityMatchingConv2d(1, channels, 4, **(values | mesh | changes), device=device)  # type: ignore[arg-type]


def learn(layer: SimilarityMatchingConv2d, digits: Dataset, updates: int = 12, labels: bool = False) -> None:
    device, dtype = layer.lateral.device, layer.lateral.dtype
    for update in range(updates):
        chosen = slice(20 * update, 20 * update + 20)
        seen = digits.train_labels[chosen].to(device) if labels else None
        solution = layer.partial_fit(to_unit(digits.train_images[chosen], dtype).to(device), seen)
        assert (solution.residual <= layer.dynamics.tolerance).all()
        assert solution.y.device.type == "cuda"


@pytest.mark.parametrize("check", kernel_checks.CHECKS, ids=lambda check: check.__name__)
def test_kernels(check: Callable[[torch.device], None], cuda: torch.device) -> None:
    check(cuda)


@pytest.mark.parametrize("channels", [64, 128, 160, 256, 512, 1000, 2048])
def test_kernels_of_every_width(channels: int, cuda: torch.device) -> None:
    drive, system = kernel_checks.problem(channels, 200, cuda)
    for name in kernel_checks.SOLVERS:
        for tolerance in (1e-2, 1e-3):
            if kernels.supports(name, channels, drive.dtype, tolerance) is not None:
                continue
            solution = kernel_checks.solve(name, drive, system, tolerance)
            exact = kernel_checks.exact_residual(drive, solution.y, system)
            assert (solution.residual <= tolerance).all(), (name, tolerance)
            assert (exact <= solution.residual + 1e-5).all(), (name, tolerance, (exact - solution.residual).amax())


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_learns_what_it_learns_on_a_cpu(mode: str, cuda: torch.device, digits: Dataset) -> None:
    """Codes to 1e-3 by other solvers: the weights agree to a few times that."""
    own, other = make_layer(cuda, mode), make_layer(torch.device("cpu"))
    learn(own, digits)
    for update in range(12):
        other.partial_fit(to_unit(digits.train_images[20 * update : 20 * update + 20]))
    for name in ("feedforward", "lateral"):
        expected = other.get_buffer(name)
        assert (own.get_buffer(name).cpu() - expected).norm() <= 0.02 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_supervised_dense_layer_learns(dtype: torch.dtype, cuda: torch.device, digits: Dataset) -> None:
    layer = SimilarityMatchingConv2d(
        1, 40, 8, num_classes=10, label_gain=3.0, whiten=True, dtype=dtype, device=cuda,
        dynamics=DynamicsConfig(tolerance=1e-3, max_iterations=1000),
    )  # fmt: skip
    learn(layer, digits, labels=True)
    assert layer.label.dtype == dtype
    assert float(layer.label.abs().amax()) > 0.01


@pytest.mark.parametrize("channels", [40, 200])
def test_encoding_and_export_agree_with_the_cpu(channels: int, cuda: torch.device, digits: Dataset) -> None:
    """The fixed iterations of evaluation: on the device, on the CPU with the same weights, and as an exported graph.

    To rounding, but for a column here and there whose momentum restarts one look earlier or later.
    """
    layer = make_layer(cuda, channels=channels)
    learn(layer, digits)
    images = to_unit(digits.test_images[:30])
    codes_on_card = layer(images.to(cuda)).cpu()
    other = make_layer(torch.device("cpu"), channels=channels)
    other.load_state_dict({name: tensor.cpu() for name, tensor in layer.state_dict().items()})
    expected = other(images)
    exported = torch.export.export(other, (images,)).module()(images)
    for codes in (codes_on_card, exported):
        off = (codes - expected).abs().amax(dim=1) / expected.amax()
        assert (off <= 1e-4).double().mean() >= 0.99
        assert (off <= 1e-2).all()


def test_a_state_travels_both_ways(cuda: torch.device, digits: Dataset) -> None:
    """Saved on the device, loaded on the CPU, and back: the same bits, and learning continues."""
    layer = make_layer(cuda)
    learn(layer, digits, updates=3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    other = make_layer(torch.device("cpu"))
    other.load_state_dict(state)
    other.partial_fit(to_unit(digits.train_images[:20]))
    again = make_layer(cuda)
    again.load_state_dict(state)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(again.get_buffer(name), tensor), name
    learn(again, digits, updates=2)


@pytest.mark.parametrize("mode", MODES)
def test_a_drive_that_is_not_finite_is_refused(mode: str, cuda: torch.device, digits: Dataset) -> None:
    layer = make_layer(cuda, mode)
    images = to_unit(digits.train_images[:5]).to(cuda)
    images[2, 0, 3, 3] = torch.nan
    with pytest.raises(SharedFault, match="non-finite"):
        layer.partial_fit(images)


@pytest.mark.parametrize("solver", ["auto", "accelerated", "coordinate_descent", "projected_gradient"])
def test_solve_on_the_device(solver: str, cuda: torch.device) -> None:
    lateral, drive = random_lateral(50, 0, condition=30.0).float(), random_drive(50, 300, 1).float()
    config = DynamicsConfig(solver=solver, tolerance=1e-3, max_iterations=5000)
    solution = solve(drive.to(cuda), lateral.to(cuda), config)
    exact = reference.residuals(drive.T, solution.y.cpu().T, lateral, 1e-6 * float(lateral.diagonal().mean()))
    assert (exact <= 1.01e-3).all()
    assert (exact <= solution.residual.cpu() + 1e-5).all()


@pytest.mark.parametrize("mode", ["alone", "gather_state"])
def test_two_runs_give_the_same_bits(mode: str, cuda: torch.device, digits: Dataset) -> None:
    layers = []
    for _ in range(2):
        layer = make_layer(cuda, mode)
        learn(layer, digits)
        layers.append(layer)
    for name, tensor in layers[0].state_dict().items():
        assert torch.equal(layers[1].get_buffer(name), tensor), name
