"""One result at any shard count: real gloo processes against one rank, in arithmetic, in stopping and in failing."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.config import RunConfig
from cluster.messages import LayerMetrics, LayerWarning, Message, Outbox, ReadoutScored
from cluster.monitors import TrainingFault
from cluster.training import Assignment
from simmatch.config import DynamicsConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.exchange import IDENTITY, Exchange, Handle, IdentityExchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from simmatch.sharding.state import gather_rows, replicated_state, shard_state
from tests.exchanges import of_type, results
from tests.faults import FaultPlan, faulty_training
from tests.reference import nnls_columns

UPDATES = 50
EARLY_UPDATES = 25  # with early stop, whose updates cost several times as many exchanges
ITERATIONS = 12
TILE = 80
LR, TAU = 0.1, 0.5
CHANNELS = 10  # on 3 ranks: 4, 3, 3
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# -- one layer ---------------------------------------------------------------------------------------------------------


def make_layer(
    kind: str, dtype: torch.dtype, tolerance: float, exchange: Exchange, device: str = "cpu"
) -> SimilarityMatchingConv2d:
    """A small convolutional layer, or a supervised dense one on whitened input; the rows of one rank of it."""
    dynamics = DynamicsConfig(
        tolerance=tolerance, max_iterations=ITERATIONS if tolerance == 0 else 400, tile_columns=TILE
    )
    shared: dict[str, Any] = {
        "dynamics": dynamics,
        "plasticity": PlasticityConfig(lr=LR, tau=TAU),
        "rows": split_rows(CHANNELS, exchange.world_size)[exchange.rank],
        "mesh": Mesh.of_owners(exchange),
        "dtype": dtype,
        "device": device,
    }
    if kind == "conv":
        return SimilarityMatchingConv2d(1, CHANNELS, 3, stride=2, padding=1, normalize="contrast", **shared)
    return SimilarityMatchingConv2d(1, CHANNELS, 8, num_classes=10, label_gain=3.0, whiten=True, **shared)


@dataclasses.dataclass
class Learnt:
    """A layer after its updates, all rows of it, and what every update's dynamics said."""

    weights: dict[str, Tensor]
    num_iters: list[int]
    residuals: list[Tensor]
    largest_drive: float
    largest_code: float


def learn(exchange: Exchange, kind: str, dtype_name: str, tolerance: float, device: str = "cpu") -> Learnt:
    dtype = DTYPES[dtype_name]
    layer = make_layer(kind, dtype, tolerance, exchange, device)
    # a convolution on 8 images makes 128 columns, two tiles; on 5, where columns stop by themselves, one tile
    size = 40 if kind == "dense" else 8 if tolerance == 0 else 5
    data = load_dataset(DataConfig(name="digits"))
    images, labels = to_unit(data.train_images, dtype).to(device), data.train_labels.to(device)
    num_iters, residuals = [], []
    largest_drive = largest_code = 0.0
    for update in range(UPDATES if tolerance == 0 else EARLY_UPDATES):
        chosen = slice(update * 23, update * 23 + size)
        seen = labels[chosen] if kind == "dense" else None
        solution = layer.partial_fit(images[chosen], seen)
        largest_drive = max(largest_drive, float(layer.drive(images[chosen], seen).abs().amax()))
        largest_code = max(largest_code, float(solution.y.amax()))
        num_iters.append(solution.num_iters)
        residuals.append(solution.residual.cpu())
    weights = {name: tensor.cpu() for name, tensor in replicated_state(layer).items()}
    for name, own in shard_state(layer).items():
        weights[name] = gather_rows(own, layer.rows, exchange).cpu()
    return Learnt(weights, num_iters, residuals, largest_drive, largest_code)


@lru_cache
def on_one_rank(kind: str, dtype_name: str, tolerance: float) -> Learnt:
    with torch.no_grad():
        return learn(IDENTITY, kind, dtype_name, tolerance)


def distance(one: Learnt, other: Learnt, name: str) -> float:
    """Largest difference of a tensor, relative to its largest entry."""
    first, second = one.weights[name].double(), other.weights[name].double()
    scale = second.abs().amax().clamp(min=1e-30) if second.numel() else 1.0
    return float((first - second).norm(torch.inf) / scale) if second.numel() else 0.0


LEARNT = ("feedforward", "lateral", "label", "class_frequency", "perron", "input_power")


def assert_same_everywhere(found: list[Learnt]) -> None:
    """All ranks hold the same replicated state and gathered the same rows, bit by bit."""
    for other in found[1:]:
        assert other.num_iters == found[0].num_iters
        for name, tensor in found[0].weights.items():
            assert torch.equal(other.weights[name], tensor), name
        for one, two in zip(found[0].residuals, other.residuals, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_the_layers_under_test_learn_something(kind: str) -> None:
    """Else parity would be cheap: the weights move, channels compete, labels arrive, several tiles are solved."""
    learnt, fresh = on_one_rank(kind, "float64", 0.0), make_layer(kind, torch.float64, 0.0, IDENTITY)
    assert (learnt.weights["feedforward"] - fresh.feedforward).norm() > 0.3 * fresh.feedforward.norm()
    lateral = learnt.weights["lateral"]
    assert (lateral - lateral.diagonal().diag()).amax() > 0.05 * lateral.amax()
    assert int(learnt.weights["updates"]) == UPDATES
    if kind == "dense":
        assert learnt.weights["label"].abs().amax() > 0.01
    else:
        assert len(learnt.residuals[0]) > TILE


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_fixed_iterations_in_float64(ranks: Any, kind: str, world_size: int) -> None:
    """1e-10: products are summed in another order, 1e-16 of their size, over 12 iterations and 50 updates of a
    contracting rule; a wrong row, column or bound shows at 1e-2."""
    one = on_one_rank(kind, "float64", 0.0)
    found = results(ranks(learn, world_size, kind, "float64", 0.0))
    assert_same_everywhere(found)
    assert found[0].num_iters == one.num_iters == [ITERATIONS] * UPDATES
    for name in LEARNT:
        assert distance(found[0], one, name) < 1e-10, name
    assert torch.equal(found[0].weights["silent"], one.weights["silent"])


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_fixed_iterations_in_float32(ranks: Any, kind: str) -> None:
    """Three ranks in float32 are as good a rounding of the float64 result as one rank is: within a factor of 4, as
    two roundings of the same kind differ, and a floor of 8 eps for tensors that one rank happens to hit."""
    exact, one = on_one_rank(kind, "float64", 0.0), on_one_rank(kind, "float32", 0.0)
    found = results(ranks(learn, 3, kind, "float32", 0.0))
    assert_same_everywhere(found)
    for name in LEARNT:
        rounding = distance(one, exact, name)
        assert rounding < 1e-4, name  # else the comparison would allow anything
        assert distance(found[0], exact, name) <= 4 * rounding + 8 * torch.finfo(torch.float32).eps, name


TOLERANCE = 1e-3


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_early_stop_in_float64(ranks: Any, kind: str) -> None:
    """Stopping is decided by comparing residuals with the tolerance. They differ by 1e-13 between shard counts, so
    a column stops elsewhere with a chance of about 1e-10: decisions, and with them the weights, are the same."""
    one = on_one_rank(kind, "float64", TOLERANCE)
    found = results(ranks(learn, 3, kind, "float64", TOLERANCE))
    assert_same_everywhere(found)
    assert found[0].num_iters == one.num_iters
    assert 1 < min(one.num_iters) < max(one.num_iters) < 400  # it does stop early, and not always at once
    for mine, theirs in zip(found[0].residuals, one.residuals, strict=True):
        assert float(mine.amax()) <= TOLERANCE
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    for name in LEARNT:
        assert distance(found[0], one, name) < 1e-9, name


def error_per_residual(lateral: Tensor) -> float:
    """‖y − y*‖ ≤ this · ‖r‖ for the residual r_i = min(M_ii y_i, (M y − d)_i) of the dynamics.

    u = y − D⁻¹r ≥ 0 and F − r ≥ 0 with F = M y − d are complementary by the definition of r (D = diag M). With the
    same for y*, (u − y*)ᵀ(F − r − F*) ≤ 0, that is (e − D⁻¹r)ᵀ(M e − r) ≤ 0 for e = y − y*, hence
    λmin ‖e‖² ≤ eᵀM e ≤ ‖e‖ (‖r‖ + ‖M D⁻¹ r‖).
    """
    eigenvalues = torch.linalg.eigvalsh(lateral)
    return float((1 + torch.linalg.matrix_norm(lateral / lateral.diagonal(), 2)) / eigenvalues[0])


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_the_bound_of_the_error_by_the_residual_holds(kind: str) -> None:
    """The bound that the next test builds on, against nonnegative least squares."""
    lateral = on_one_rank(kind, "float64", TOLERANCE).weights["lateral"]
    generator = torch.Generator().manual_seed(0)
    drive = torch.randn(CHANNELS, 20, generator=generator, dtype=torch.float64)
    y = nnls_columns(drive, lateral)
    disturbed = (y + 0.01 * torch.randn(y.shape, generator=generator, dtype=torch.float64)).clamp(min=0.0)
    residual = torch.minimum(lateral.diagonal()[:, None] * disturbed, lateral @ disturbed - drive)
    errors, bounds = (disturbed - y).norm(dim=0), error_per_residual(lateral) * residual.norm(dim=0)
    assert bool((errors <= bounds).all())


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_early_stop_in_float32(ranks: Any, kind: str) -> None:
    """Here rounding moves residuals by about 1e-4 of the tolerance, so that about one column in 10⁴ stops a check
    earlier or later: `elsewhere` counts them, by their residuals.

    Such a column's two codes lie both within E = error_per_residual · √K · tolerance · max|d| of y*, so 2E apart.
    It enters ⟨y yᵀ⟩ as one of N columns, with rate lr/τ and twice, M being quadratic; W and V move less. The rest is
    rounding, as in the test of fixed iterations. Without such a column the tolerance is that of rounding.
    """
    one = on_one_rank(kind, "float32", TOLERANCE)
    found = results(ranks(learn, 2, kind, "float32", TOLERANCE))
    assert_same_everywhere(found)
    assert max(float(residual.amax()) for residual in found[0].residuals) <= TOLERANCE
    differences = torch.stack(found[0].residuals) - torch.stack(one.residuals)
    elsewhere = int((differences.abs() > 0.01 * TOLERANCE).sum())
    assert elsewhere <= max(3, differences.numel() // 1000)
    lateral = one.weights["lateral"].double()
    error = error_per_residual(lateral) * CHANNELS**0.5 * TOLERANCE * one.largest_drive
    moved = LR / TAU * 2 * one.largest_code * 2 * error / differences.shape[1] / float(lateral.amax())
    for name in LEARNT:
        assert distance(found[0], one, name) < 1e-4 + elsewhere * moved, (name, elsewhere, moved)


# -- the whole program -------------------------------------------------------------------------------------------------


def come_late(exchange: Exchange, delay_s: float) -> None:
    """Make this end of an exchange late at every seventh, be it a gather or not.

    Only the time differs; what is exchanged does not. It remains the connection whose exchanges are recorded.
    """

    def late(start: Callable[..., Handle]) -> Callable[..., Handle]:
        def begin(*tensors: Tensor) -> Handle:
            if exchange.num_exchanges % 7 == 0:
                time.sleep(delay_s)
            return start(*tensors)

        return begin

    for name in ("all_gather", "all_to_all"):
        setattr(exchange, name, late(getattr(exchange, name)))


def train(
    exchange: Exchange,
    config: RunConfig,
    run_dir: Path,
    plans: tuple[FaultPlan, ...] = (),
    late_rank: int | None = None,
) -> list[Message]:
    """One rank of `cluster.training.Training`; the messages that it sends."""
    assignment, outbox = Assignment(config, run_dir, exchange.rank), Outbox()
    if exchange.rank == late_rank:
        come_late(exchange, 0.02)
    try:
        faulty_training(*plans)(assignment, Mesh.of_owners(exchange), outbox, torch.device("cpu")).run()
    except TrainingFault as fault:
        fault.add_note("".join(traceback.format_exception(fault)))  # causes do not travel between processes
        raise
    return outbox.messages


@dataclasses.dataclass
class Trained:
    """What a whole run leaves."""

    weights: dict[str, Tensor]
    exported: bytes
    readout: ReadoutScored
    metrics: list[LayerMetrics]


def read(run_dir: Path, messages: list[Message]) -> Trained:
    path = run_dir / "model" / "model.safetensors"
    (readout,) = of_type(messages, ReadoutScored)
    return Trained(load_file(path), path.read_bytes(), readout, of_type(messages, LayerMetrics))


ConfigMaker = Callable[..., RunConfig]


def run_to_end(ranks: Any, config: RunConfig, run_dir: Path, **options: Any) -> Trained:
    run_dir.mkdir()
    world_size = config.mesh.world_size
    return read(run_dir, results(ranks(train, world_size, config, run_dir, *options.values()))[0])


@pytest.fixture(scope="module")
def single(digits_config: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run on one rank in float64."""
    return run_to_end(ranks, digits_config(1, dtype="float64"), tmp_path_factory.mktemp("single") / "run")


@pytest.fixture(scope="module")
def pair(digits_config: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run on two ranks in float32."""
    return run_to_end(ranks, digits_config(2), tmp_path_factory.mktemp("pair") / "run")


@pytest.mark.parametrize(("world_size", "cached"), [(2, True), (3, True), (3, False)])
def test_a_run_gives_one_model_at_any_shard_count(
    ranks: Any, digits_config: ConfigMaker, single: Trained, tmp_path: Path, world_size: int, cached: bool
) -> None:
    """float64, so that no stop decision flips; 1e-9 leaves room for the eigenvectors of the whitening, whose
    sensitivity the ridge bounds. Without the cache every batch is encoded anew, its images split over the ranks."""
    config = digits_config(world_size, dtype="float64", cache_features=cached)
    found = run_to_end(ranks, config, tmp_path / "run")
    assert found.weights.keys() == single.weights.keys()
    for name, expected in single.weights.items():
        scale = float(expected.abs().amax()) if expected.numel() else 0.0
        torch.testing.assert_close(found.weights[name], expected, rtol=0, atol=1e-9 * scale, msg=name)
    for name in ("accuracy", "accuracy_decode"):
        assert abs(getattr(found.readout, name) - getattr(single.readout, name)) * 121 <= 1.001  # one image
    for mine, theirs in zip(found.metrics, single.metrics, strict=True):
        assert (mine.layer, mine.update) == (theirs.layer, theirs.update)
        for name in ("num_iters", "dead_channels", "active_fraction"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-9), name
        assert mine.objective == pytest.approx(theirs.objective, rel=1e-6)


def test_the_run_under_test_learns(single: Trained) -> None:
    """Ten classes: chance is 0.1 ± 0.03 on 121 images. The readout of ten units, and V alone, are far from it."""
    assert single.readout.accuracy > 0.4
    assert single.readout.accuracy_decode > 0.4


def unchanging(metrics: LayerMetrics) -> LayerMetrics:
    """Without the figures that depend on the clock."""
    return dataclasses.replace(metrics, images_per_second=0, window_s=0, waiting_share=0, checkpoint_share=0)


def test_two_runs_of_one_configuration_are_equal_bit_by_bit(
    ranks: Any, digits_config: ConfigMaker, pair: Trained, tmp_path: Path
) -> None:
    again = run_to_end(ranks, digits_config(2), tmp_path / "run")
    assert again.exported == pair.exported
    assert again.readout == pair.readout
    assert list(map(unchanging, again.metrics)) == list(map(unchanging, pair.metrics))


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_slow_rank_changes_nothing(
    ranks: Any, digits_config: ConfigMaker, pair: Trained, tmp_path: Path, late_rank: int
) -> None:
    """Who comes late decides nothing: every stop, restart and revival is the same, so every bit is."""
    found = run_to_end(ranks, digits_config(2), tmp_path / "run", plans=(), late_rank=late_rank)
    assert found.exported == pair.exported
    assert list(map(unchanging, found.metrics)) == list(map(unchanging, pair.metrics))


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "plan"),
    [
        (2, FaultPlan(rank=1, layer=0, step=3, kind="nan feedforward")),
        (3, FaultPlan(rank=0, layer=0, step=2, kind="nan lateral")),
        (3, FaultPlan(rank=2, layer=1, step=2, kind="nan label")),
        (2, FaultPlan(rank=1, layer=0, step=1, kind="exception")),
        (3, FaultPlan(rank=2, layer=1, step=5, kind="exception")),
    ],
    ids=lambda value: f"{value.kind}-{value.layer}".replace(" ", "-") if isinstance(value, FaultPlan) else str(value),
)
def test_a_fault_on_one_rank_ends_all_at_the_same_exchange(
    ranks: Any, digits_config: ConfigMaker, tmp_path: Path, world_size: int, plan: FaultPlan
) -> None:
    started = time.monotonic()
    outcomes = ranks(train, world_size, digits_config(world_size), tmp_path, (plan,), exchange_timeout_s=40.0)
    assert time.monotonic() - started < 35.0  # nobody sat out an exchange's limit
    assert all(isinstance(outcome, TrainingFault) for outcome in outcomes), outcomes
    messages = {str(outcome) for outcome in outcomes}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith(f"layer {plan.layer}, step {plan.step}: ")
    assert message.endswith(f" on rank {plan.rank}")
    assert ("exception" if plan.kind == "exception" else "non-finite") in message
    assert len(set(ranks.num_exchanges)) == 1
    assert not (tmp_path / "model").exists()
    assert {outcome.diverged for outcome in outcomes} == {plan.kind != "exception"}
    if plan.kind == "exception":  # the faulty rank's own exception stands behind the shared one, in its traceback
        told = ["InjectedError: injected" in outcome.__notes__[0] for outcome in outcomes]
        assert told == [rank == plan.rank for rank in range(world_size)]


def test_weights_that_explode_are_noticed_within_the_step(
    ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    plan = FaultPlan(rank=1, layer=1, step=12, kind="explode")
    outcomes = ranks(train, 2, digits_config(2), tmp_path, (plan,))
    assert all(isinstance(outcome, TrainingFault) and outcome.diverged for outcome in outcomes), outcomes
    (message,) = {str(outcome) for outcome in outcomes}
    assert message.startswith("layer 1, step 12: the lateral weights explode: bound of their largest eigenvalue ")
    assert len(set(ranks.num_exchanges)) == 1


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_an_objective_above_one_is_told_once_with_its_rates(
    tau: float, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    config = digits_config(1)
    layer = config.model.layers[0].model_copy(
        update={
            "out_channels": 50,
            "normalize": "none",
            "kernel_size": 6,
            "train": TrainConfig(batch_size=20, images=240, epochs=6),
            "plasticity": PlasticityConfig(lr=0.2, tau=tau),
        }
    )
    config = config.model_copy(update={"model": ModelConfig(layers=(layer,))})
    with torch.no_grad():
        messages = train(IdentityExchange(), config, tmp_path)
    warnings = of_type(messages, LayerWarning)
    high = [metrics.update for metrics in of_type(messages, LayerMetrics) if metrics.objective > 1]
    if tau == 1.0:
        assert not warnings
        assert not high
        return
    (warning,) = warnings
    assert warning.text.startswith(f"layer 0, step {high[0]}: the relative objective is above 1")
    assert "plasticity.tau=0.4 and plasticity.lr=0.2" in warning.text


def test_faults_on_two_ranks_name_both(ranks: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    plans = tuple(FaultPlan(rank=rank, layer=0, step=2, kind="exception") for rank in (0, 2))
    outcomes = ranks(train, 3, digits_config(3), tmp_path, plans)
    assert {str(outcome) for outcome in outcomes} == {"layer 0, step 2: exception on ranks 0, 2"}
    assert len(set(ranks.num_exchanges)) == 1


def test_one_rank_alone_says_what_it_met(digits_config: ConfigMaker, tmp_path: Path) -> None:
    plan = FaultPlan(rank=0, layer=0, step=2, kind="exception")
    with pytest.raises(TrainingFault) as caught, torch.no_grad():
        train(IDENTITY, digits_config(1), tmp_path, (plan,))
    assert str(caught.value) == "layer 0, step 2: InjectedError: injected"


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_two_devices_under_nccl(ranks: Any, kind: str) -> None:
    """float64 on CUDA: other kernels than on the CPU, the same bound on what the order of a sum can do."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, one for each rank, and torch sees {torch.cuda.device_count()}")
    found = results(ranks(learn, 2, kind, "float64", 0.0, "cuda", device="cuda"))
    assert_same_everywhere(found)
    one = on_one_rank(kind, "float64", 0.0)
    for name in LEARNT:
        assert distance(found[0], one, name) < 1e-9, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_two_ranks_share_one_device_over_gloo(ranks: Any, cuda: torch.device, kind: str) -> None:
    """Tensors on the device, exchanged through the host."""
    found = results(ranks(learn, 2, kind, "float64", 0.0, "cuda"))
    assert_same_everywhere(found)
    one = on_one_rank(kind, "float64", 0.0)
    for name in LEARNT:
        assert distance(found[0], one, name) < 1e-9, name
