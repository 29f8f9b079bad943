"""Updates on a CUDA device: the host does not wait within them, and replayed ones have the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.collectives import join_group, open_store
from simmatch import captured, learning
from simmatch.config import DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.order import Batches
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Update
from simmatch.precision import exact_float32
from simmatch.sharding.exchange import Exchange, IdentityExchange
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

pytestmark = pytest.mark.gpu

IMAGES, BATCH, EPOCHS = 330, 50, 3


@pytest.fixture(autouse=True)
def precision() -> None:
    exact_float32()


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "gather_state": {"dynamics": DynamicsConfig(exchange="gather_state"), "mesh": Mesh()},
    "supervised": {"num_classes": 10, "label_gain": 1.0, "plasticity": PlasticityConfig(lr_decay_steps=100)},
    "whitened": {"whiten": True, "padding": 1},
    "accelerated": {"dynamics": DynamicsConfig(solver="accelerated")},
}


@pytest.mark.parametrize("positions", [9, None])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_host_does_not_wait_within_updates(
    setting: str, positions: int | None, cuda: torch.device, digits: Dataset
) -> None:
    layer = SimilarityMatchingConv2d(1, 40, 4, normalize="contrast", device=cuda, **SETTINGS[setting])
    assert layer.by_kernel
    images, labels = digits.train_images[:BATCH].to(cuda), digits.train_labels[:BATCH].to(cuda)
    layer.calibrate(to_unit(images))

    def learn(updates: int) -> None:
        for _ in range(updates):
            patches = layer.prepare(to_unit(images), positions)
            layer.partial_fit(patches, labels if layer.num_classes else None, recorded=True)

    learn(3)  # compiles kernels, and makes the record of faults
    with waiting_forbidden():
        learn(3)
    layer.raise_faults()
    assert int(layer.updates) == 6


class Follower(Observer):
    def __init__(self) -> None:
        self.layer: Any = None
        self.measured: list[Any] = []

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.layer = layer

    def updated(self, update: Update) -> None:
        self.measured.append(update.measurement)


def model(exchange: str) -> ModelConfig:
    """A layer at drawn positions, and a supervised one on cached features; both with dead channels now and then."""
    rates, dynamics = PlasticityConfig(lr=0.2, dead_after=3), DynamicsConfig(tolerance=1e-3, exchange=exchange)
    train = TrainConfig(epochs=EPOCHS, batch_size=BATCH)
    first = LayerConfig(
        out_channels=24, kernel_size=4, pool=2, normalize="contrast", plasticity=rates, dynamics=dynamics,
        whiten_images=BATCH, train=train.model_copy(update={"positions": 9}),
    )  # fmt: skip
    second = LayerConfig(
        out_channels=20, kernel_size="full", supervised=True, plasticity=rates, dynamics=dynamics, train=train
    )
    return ModelConfig(layers=(first, second))


def train(
    device: torch.device,
    digits: Dataset,
    exchange: Exchange | None = None,
    images: Tensor | None = None,
    follower: Follower | None = None,
) -> Stack:
    default, labels = digits.train_images[:IMAGES], digits.train_labels[:IMAGES]
    mode = "every_iteration" if exchange is None else "gather_state"
    stack = Stack(model(mode), InputConfig(in_channels=1, height=8, width=8, num_classes=10), seed=1, device=device)
    given = default if images is None else images
    mesh = None if exchange is None else Mesh.of_owners(exchange)
    Trainer(stack, given, labels, mesh=mesh, observer=follower, measure_every=5, encode_batch=100).fit()
    return stack


def assert_same(one: Stack, other: Stack) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["alone", "gather_state"])
def test_captured_updates_have_the_bits_of_others_and_the_values_of_a_cpu(
    mode: str, cuda: torch.device, digits: Dataset, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = None if mode == "alone" else IdentityExchange()
    followers = [Follower() for _ in range(3)]
    stacks = [train(cuda, digits, exchange, follower=followers[0])]
    full = EPOCHS * (IMAGES // BATCH)
    assert len(replays) == 2 * (full - captured.WARM_UP)
    monkeypatch.setattr(learning, "new_graph", lambda device: None)
    stacks.append(train(cuda, digits, exchange, follower=followers[1]))
    monkeypatch.setattr(SimilarityMatchingConv2d, "by_kernel", False)
    stacks.append(train(cuda, digits, exchange, follower=followers[2]))
    assert len(replays) == 2 * (full - captured.WARM_UP)
    for stack in stacks[1:]:
        assert_same(stacks[0], stack)
    assert followers[0].measured == followers[1].measured
    assert [one is None for one in followers[0].measured] == [one is None for one in followers[2].measured]
    on_cpu = train(torch.device("cpu"), digits, exchange)
    for name in ("feedforward", "lateral"):  # codes to 1e-3, by other solvers
        expected = on_cpu.layer(0).get_buffer(name)
        assert (stacks[0].layer(0).get_buffer(name).cpu() - expected).norm() <= 0.05 * expected.norm(), name


def test_a_fault_in_a_replay_is_raised_at_the_next_look(
    cuda: torch.device, digits: Dataset, replays: list[int]
) -> None:
    """One image with NaN, not used to calibrate: the first update that uses it is named; nothing has changed since."""
    images, follower = to_unit(digits.train_images[:IMAGES]).clone(), Follower()
    order = Batches(IMAGES, BATCH, epochs=EPOCHS, seed=1)
    broken = next(number for number in range(len(order)) if number >= 5 and len(order[number]) == BATCH)
    earlier = torch.cat([order[number] for number in range(broken)])
    later = next(index for index in order[broken].tolist() if index >= BATCH and index not in earlier.tolist())
    images[later] = torch.nan
    with pytest.raises(SharedFault, match=f"non-finite .* on rank 0 in update {broken + 1}"):
        train(cuda, digits, images=images, follower=follower)
    assert len(replays) > 0
    assert int(follower.layer.updates) == broken
    assert follower.layer.feedforward.isfinite().all()


def test_exchanges_of_nccl_are_captured(cuda: torch.device, digits: Dataset, replays: list[int]) -> None:
    """One rank, as nccl takes no two on one card: the bits and the exchanges of uncaptured updates."""
    expected = train(cuda, digits, IdentityExchange())
    replays.clear()
    store, _ = open_store("127.0.0.1", 30.0)
    exchange = join_group(store, 0, 0, 1, torch.device("cuda", torch.cuda.current_device()), 30.0)
    try:
        assert exchange.capturable
        assert_same(train(cuda, digits, exchange), expected)
        assert len(replays) > 0
        torch.cuda.synchronize()
        assert exchange.num_started == exchange.num_exchanges == exchange.num_completed
    finally:
        dist.destroy_process_group()
