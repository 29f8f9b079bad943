"""Updates that are replayed: captured updates on a CPU, where a replay repeats the operations that were captured.

What a device makes of a graph is tested in `test_on_a_card`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch import captured, learning
from simmatch.config import DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.fit import Trainer
from simmatch.inputs import Staged
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Update
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from tests.pretended import pretended
from tests.simmatch.kernels import scripted
from tests.tape import TapeGraph

IMAGES, BATCH, EPOCHS = 50, 20, 4
PER_EPOCH = 3  # the last of 10 images


class Follower(Observer):
    """Knows the layer that learns, and remembers every update."""

    def __init__(self) -> None:
        self.layer: Any = None
        self.updates: list[Update] = []
        self.states: list[dict[str, Tensor]] = []

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.layer = layer

    def updated(self, update: Update) -> None:
        self.updates.append(update)
        self.states.append({name: tensor.clone() for name, tensor in update.layer.state_dict().items()})


@pytest.fixture(autouse=True)
def kernels_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.use(monkeypatch)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 9, 9), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (IMAGES,), generator=generator)


def train(follower: Follower, *, measure_every: int | None = 4) -> Stack:
    """A layer at drawn positions, and a supervised one on cached features."""
    learning = TrainConfig(epochs=EPOCHS, batch_size=BATCH, positions=20)
    rates = PlasticityConfig(lr=0.2, lr_decay_steps=10, dead_after=2)
    model = ModelConfig(
        layers=(
            LayerConfig(out_channels=6, kernel_size=4, pool=2, train=learning, plasticity=rates),
            LayerConfig(
                out_channels=5, kernel_size="full", supervised=True, train=TrainConfig(epochs=EPOCHS, batch_size=BATCH)
            ),
        )
    )
    stack = Stack(model, InputConfig(in_channels=1, height=9, width=9, num_classes=3), seed=3)
    Trainer(stack, *data(), observer=follower, measure_every=measure_every).fit()
    return stack


def assert_same(one: Stack, other: Stack) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_graph_of_these_tests_is_one() -> None:
    """What it repeats are operations on memory, with the numbers of the capture: see `tests.tape`."""
    numbers, kept, made, graph = [1.0], {"moving": torch.zeros(2)}, dict[str, Tensor](), TapeGraph()
    in_place, version = torch.zeros(2), 0

    def function() -> Tensor:
        in_place.add_(numbers[0])
        kept["moving"] = kept["moving"] + 1.0
        made.setdefault("in a capture", torch.zeros(2)).add_(1.0)
        return torch.stack([in_place, kept["moving"], made["in a capture"]])

    result = graph.capture(function)
    assert result.isnan().all()
    assert in_place.tolist() == [0.0, 0.0]
    numbers[0], kept["moving"], version = 5.0, torch.full((2,), 10.0), in_place._version
    for replay in (1.0, 2.0, 3.0):
        graph.replay()
        assert result[:, 0].tolist() == [replay, 1.0, 1.0]
    assert in_place._version == version
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        TapeGraph().capture(lambda: float(in_place.sum()))


def graphs_for(monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> list[TapeGraph]:
    made: list[TapeGraph] = []

    def new_graph(device: torch.device) -> TapeGraph:
        made.append(TapeGraph(fault=fault))
        return made[-1]

    monkeypatch.setattr(learning, "new_graph", new_graph)
    return made


def test_captured_updates_have_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both layers, with metrics; a smaller batch is not replayed. Without kernels for a graph: the same weights."""
    plain, follower = Follower(), Follower()
    expected = train(plain)
    graphs = graphs_for(monkeypatch)
    assert_same(train(follower), expected)
    measured = [[update.measurement for update in each.updates] for each in (plain, follower)]
    assert measured[0] == measured[1]
    full = EPOCHS * (PER_EPOCH - 1)
    assert [graph.replays for graph in graphs] == [full - captured.WARM_UP] * 2
    assert all(graph.closed for graph in graphs)
    assert [update.looked for update in follower.updates] == [n % 4 == 0 for n in range(1, 13)] * 2


def test_captured_updates_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors that are made cannot be written to later, outside of it; the bound is kept in the same ones."""
    expected, follower = train(Follower()), Follower()
    graphs = graphs_for(monkeypatch)
    with torch.inference_mode():
        stack = train(follower)
    assert_same(stack, expected)
    assert all(graph.replays > 0 for graph in graphs)


def test_updates_that_raise_faults_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(Follower())
    monkeypatch.setattr(SimilarityMatchingConv2d, "by_kernel", False)
    follower = Follower()
    assert_same(train(follower), expected)
    assert all(update.looked for update in follower.updates)


def test_what_has_failed_in_a_capture_is_named() -> None:
    """torch ends the capture then, which fails as well."""

    class Invalid(TapeGraph):
        def capture(self, function: Callable[[], Any]) -> Any:
            try:
                return super().capture(function)
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    updates = captured.Updates(lambda batch: float(batch.source.sum()), Invalid(), [])
    batch = Staged(torch.ones(5, 2), labels=None, images=5)
    for _ in range(captured.WARM_UP):
        updates(batch)
    with pytest.warns(UserWarning, match="previous error during capture, after .* not permitted .*_local_scalar"):
        assert updates(batch) == 10.0


def test_updates_go_on_uncaptured_where_capturing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning for each layer, that says why."""
    expected = train(Follower())
    follower = Follower()
    graphs = graphs_for(monkeypatch, RuntimeError("operation not permitted when stream is capturing"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(train(follower), expected)
    messages = [str(one.message) for one in caught if "captured" in str(one.message)]
    assert len(messages) == 2
    assert all("RuntimeError: operation not permitted when stream is capturing" in message for message in messages)
    assert [(graph.replays, graph.closed) for graph in graphs] == [(0, True)] * 2


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("measure_every", [4, None])
def test_a_fault_is_raised_at_the_next_look(
    measure_every: int | None, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is named; the weights are those before it."""
    plain, spoilt = Follower(), torch.zeros(())
    train(plain)
    broken = 7  # of the first layer: the second that is replayed
    original = scripted.solve

    class Spoiling(Follower):
        def updating(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
            spoilt.fill_(torch.nan if len(self.updates) == broken - 1 else 0.0)
            return super().updating(index, layer)

    def solve(*arguments: Any, **options: Any) -> Any:
        solution = original(*arguments, **options)
        solution.residual[3] += spoilt
        return solution

    monkeypatch.setattr("simmatch.kernels.solve", solve)
    graphs, follower = graphs_for(monkeypatch) if replayed else [], Spoiling()
    with pytest.raises(SharedFault, match=f"non-finite activities on rank 0 in update {broken}"):
        train(follower, measure_every=measure_every)
    assert [graph.replays > 1 for graph in graphs] == [True] * replayed
    looks = 8 if measure_every else EPOCHS * PER_EPOCH
    assert len(follower.updates) == looks - 1
    last = dict(follower.layer.state_dict())
    assert int(last["updates"]) == broken - 1
    for name, tensor in last.items():
        assert torch.equal(tensor, plain.states[broken - 2][name]), name


KINDS: dict[str, dict[str, Any]] = {
    "drawn": {"plasticity": PlasticityConfig(lr=0.2, lr_decay_steps=5, dead_after=2)},
    "exact": {"dynamics": DynamicsConfig(exchange="gather_state"), "mesh": Mesh(), "reduce": "exact"},
    "whitened": {"whiten": True, "padding": 1, "normalize": "contrast"},
    "weights": {"num_classes": 3, "label_gain": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_update_can_be_captured(kind: str) -> None:
    """And has the bits of one that is not, while the rate falls and is raised."""
    images, labels = data()
    x, graph = images.float() / 255.0, TapeGraph()
    own, other = (SimilarityMatchingConv2d(1, 6, 4, **KINDS[kind]) for _ in range(2))

    def updates_of(layer: SimilarityMatchingConv2d, graph: TapeGraph | None) -> captured.Updates[Tensor]:
        def make(batch: Staged) -> Tensor:
            patches = layer.prepare(batch.source, 10 if kind == "drawn" else None)
            return layer.partial_fit(patches, batch.labels, batch.weights, recorded=True).y

        layer.calibrate(x)
        return captured.Updates(make, graph, layer.mesh.learning)

    pair = updates_of(own, graph), updates_of(other, None)
    for number in range(10):
        chosen = torch.arange(10) + 4 * number
        weights = torch.linspace(0.1, 1.0, 10).roll(number) if kind == "weights" else None
        batch = Staged(x[chosen], labels[chosen] if own.num_classes else None, 10, weights)
        assert torch.equal(*(updates(batch) for updates in pair))
        if number == 6:
            for layer in (own, other):
                layer.raise_rate(hold=1)
    own.raise_faults()
    assert graph.replays == 10 - captured.WARM_UP
    for name, tensor in other.named_buffers():
        assert torch.equal(own.get_buffer(name), tensor), name
    assert torch.equal(own.bound.largest, other.bound.largest)


def test_batches_are_taken_in_inference_mode_and_outside_of_it() -> None:
    updates = captured.Updates(lambda batch: batch.source * 2.0, TapeGraph(), [])
    for number in range(captured.WARM_UP + 3):
        with torch.inference_mode(number % 2 == 1):
            result = updates(Staged(torch.full((2,), float(number)), labels=None, images=2))
            assert result.tolist() == [2.0 * number] * 2


def test_exchanges_of_replays_are_counted() -> None:
    """Capturing makes none; every replay makes as many as the update that was captured."""

    class Counting:
        num_exchanges, bytes_exchanged = 10, 1000

        def count(self, exchanges: int, received: int) -> None:
            self.num_exchanges += exchanges
            self.bytes_exchanged += received

    class Silent:
        def capture(self, function: Callable[[], Any]) -> Any:
            return function()

        def replay(self) -> None:
            return None

        def close(self) -> None:
            return None

    exchange: Any = Counting()
    updates = captured.Updates(lambda batch: exchange.count(3, 50), Silent(), [exchange])
    for number in range(captured.WARM_UP + 4):
        updates(Staged(torch.zeros(5, 2), labels=None, images=5))
        assert (exchange.num_exchanges, exchange.bytes_exchanged) == (13 + 3 * number, 1050 + 50 * number)


def test_faults_are_looked_at_although_measurements_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "LOOK_EVERY", 5)
    follower = Follower()
    train(follower, measure_every=1000)
    last = EPOCHS * PER_EPOCH
    assert [update.looked for update in follower.updates] == [n % 5 == 0 or n == last for n in range(1, last + 1)] * 2
    assert [update.measurement is not None for update in follower.updates] == [n == last for n in range(1, 13)] * 2


def test_a_graph_is_captured_on_the_device_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: torch would otherwise capture nothing there, and replays would do nothing."""
    entered: list[tuple[Any, ...]] = []

    @contextmanager
    def context(*arguments: Any, **options: Any) -> Iterator[None]:
        entered.append((*arguments, options.get("stream")))
        yield

    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"new stream of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current stream of {device}")
    graph = captured.new_graph(torch.device("cuda", 1))
    assert graph is not None
    assert graph.capture(lambda: 7) == 7
    assert entered == [("current stream of cuda:1", None), ("graph", "new stream of cuda:1")]


def test_the_host_does_not_wait_where_images_are_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for indices and labels, which come from the host: from the second update on, until it looks at faults."""
    images, labels = data()
    waits: list[list[str]] = []
    with pretended(monkeypatch) as card:

        class Watching(Follower):
            def updating(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
                card.waits.clear()
                return super().updating(index, layer)

            def updated(self, update: Update) -> None:
                waits.append(list(card.waits))

        layer = LayerConfig(out_channels=5, kernel_size=4, supervised=True, train=TrainConfig(batch_size=10))
        stack = Stack(ModelConfig(layers=(layer,)), InputConfig.of(images, num_classes=3), device="cuda")
        Trainer(stack, images.to("cuda"), labels, observer=Watching()).fit()
    assert len(waits) == IMAGES // 10
    assert waits[1:-1] == [[]] * (len(waits) - 2)
    assert len(waits[-1]) > 0
