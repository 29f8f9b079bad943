"""All layers learning in one pass: against a slow loop written out here, over all axes of a mesh, and after a stop."""

from __future__ import annotations

import threading
import time
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor

from simmatch import ModelConfig, Stack
from simmatch.config import ConfigError, parse
from simmatch.data.order import Batches, epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, pooled
from simmatch.observer import Observer, Pass, Update
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.passing import IN_FLIGHT
from simmatch.stages import layer_costs, stages_of
from tests.exchanges import LinkEnd, ThreadExchange, meshes, results, run_meshes
from tests.pretended import Place

SEED = 5
TRAIN = {"epochs": 2, "images": 100, "batch_size": 30}  # eight updates; the last of an epoch has ten images
TOTAL = 8

LAYERS: list[dict[str, Any]] = [
    {
        "out_channels": 8,
        "kernel_size": 3,
        "normalize": "contrast",
        "whiten": True,
        "whiten_images": 150,
        "pool": 4,
        "power": 0.5,
        "train": {**TRAIN, "positions": 10},
    },
    {"out_channels": 6, "kernel_size": 2, "whiten": True, "whiten_images": 100, "train": TRAIN},
    {"out_channels": 5, "kernel_size": 2, "supervised": True, "label_gain": 1.0, "train": TRAIN},
    {
        "out_channels": 9,
        "kernel_size": "full",
        "whiten": True,
        "supervised": True,
        "label_gain": 30.0,
        "train": TRAIN,
        "dynamics": {"tolerance": 1e-3},
    },
]


def model_of(
    layers: int = 4,
    starts: tuple[int, ...] = (0, 0, 0, 0),
    *,
    exchange: str = "every_iteration",
    train: dict[str, Any] | None = None,
    **others: Any,
) -> ModelConfig:
    values = []
    for layer, start in zip(LAYERS[:layers], starts, strict=False):
        dynamics = {**layer.get("dynamics", {}), "exchange": exchange}
        learning = {**layer["train"], "start_after": start, **(train or {})}
        values.append({**layer, "train": learning, "dynamics": dynamics})
    return parse(ModelConfig, {"layers": values, "schedule": "together", **others})


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    return digits.train_images[:250]


@pytest.fixture(scope="module")
def labels(digits: Dataset) -> Tensor:
    return digits.train_labels[:250]


def stack_of(model: ModelConfig, images: Tensor) -> Stack:
    return Stack(model, InputConfig.of(images, 10), seed=SEED, dtype=torch.float64)


@torch.no_grad()
def slowly(model: ModelConfig, images: Tensor, labels: Tensor) -> Stack:
    """As the definition has it: batch after batch, layer after layer, on one rank."""
    stack, x = stack_of(model, images), to_unit(images, torch.float64)
    layers = [stack.layer(index) for index in range(len(model.layers))]
    starts = [config.train.start_after for config in model.layers]

    def encoded(x: Tensor, depth: int) -> Tensor:
        for layer, config in zip(layers[:depth], model.layers, strict=False):
            x = pooled(layer(x), config)
        return x

    order = [epoch_order(len(x), seed=SEED, epoch=epoch, images=100).split(30) for epoch in range(2)]
    for update, chosen in enumerate((*order[0], *order[1]), 1):
        for index, (layer, config) in enumerate(zip(layers, model.layers, strict=True)):
            if update <= starts[index]:
                break
            if update == starts[index] + 1:
                layer.calibrate(encoded(x[: config.whiten_images], index), config.whiten_patches)
            if not model.freeze_below or update <= (*starts[1:], TOTAL)[index]:
                patches = layer.prepare(encoded(x[chosen], index), config.train.positions)
                layer.partial_fit(patches, labels[chosen] if config.supervised else None)
    for index, (layer, config) in enumerate(zip(layers, model.layers, strict=True)):
        layer.recertify()
        if config.supervised:
            z = torch.nn.functional.one_hot(labels, 10).double()
            layer.settle_label(reduce(layer(encoded(x, index)), "b k h w -> k b", "mean") @ z, z.T @ z)
    return stack


def assert_close(stack: Stack, expected: Stack, tolerance: float) -> None:
    for (name, one), other in zip(stack.state_dict().items(), expected.state_dict().values(), strict=True):
        scale = float(other.abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale, msg=name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


SCHEDULES = {
    "at once": model_of(),
    "one after the other": model_of(starts=(0, 2, 2, 5)),
    "frozen below": model_of(starts=(0, 2, 4, 5), freeze_below=True),
}


@pytest.mark.parametrize("model", SCHEDULES.values(), ids=SCHEDULES)
def test_against_the_definition(model: ModelConfig, images: Tensor, labels: Tensor) -> None:
    """float64; images are encoded in parts of 70 here and at once there: products round differently."""
    trained = Trainer(stack_of(model, images), images, labels, encode_batch=70).fit()
    assert_close(trained, slowly(model, images, labels), 1e-9)


# -- over owners and stages --------------------------------------------------------------------------------------------


def train(
    mesh: Mesh,
    model: ModelConfig,
    images: Tensor,
    labels: Tensor,
    observer: Observer | None = None,
    saved: list[dict[str, Tensor]] | None = None,
) -> Stack:
    """What one rank does; `saved`: the state of every layer, whole, from which it goes on."""
    observer = observer or Follower(saved)
    return Trainer(stack_of(model, images), images, labels, mesh=mesh, encode_batch=70, observer=observer).fit()


def copied(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in layer.state_dict().items()}


class Follower(Observer):
    """Restores layers, remembers them after every update of the pass, and ends or stops the pass."""

    def __init__(self, saved: list[dict[str, Tensor]] | None = None, *, stop_after: int | None = None) -> None:
        self.saved, self.last = saved, stop_after
        self.passes: list[Pass] = []
        self.updates: list[Update] = []
        self.states: list[dict[int, dict[str, Tensor]]] = []

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        for name, whole in (self.saved[index] if self.saved else {}).items():
            target = getattr(layer, name)
            sharded = target.ndim > 0 and len(target) < len(whole)
            target.copy_(whole[layer.rows.start : layer.rows.stop] if sharded else whole)

    def stop_after(self, number: int) -> bool:
        return number == self.last

    def updated(self, update: Update) -> None:
        self.updates.append(update)

    def passed(self, done: Pass) -> None:
        self.passes.append(done)
        self.states.append(
            {
                index: {name: each.clone() for name, each in layer.state_dict().items()}
                for index, layer in done.layers.items()
            }
        )
        if done.stop:
            raise Stopped


class Stopped(Exception):
    """Raised by a follower that was asked to stop."""


@pytest.mark.parametrize("exchange", ["every_iteration", "block", "gather_state"])
@pytest.mark.parametrize(("replicas", "owners"), [(1, 2), (1, 3), (2, 1), (2, 2)])
def test_owners_and_replicas(exchange: str, replicas: int, owners: int, images: Tensor, labels: Tensor) -> None:
    """float64: sums in another order, over few updates of a contracting rule. All ranks hold the same bits. `block`
    takes other iterations for another number of blocks: it agrees to the tolerance of the dynamics only."""
    model = model_of(3, (0, 2, 2), exchange=exchange)
    one = train(Mesh(), model, images, labels)
    found = results(run_meshes(meshes(replicas, 1, owners), lambda mesh: train(mesh, model, images, labels)))
    for other in found[1:]:
        assert_equal(other.state_dict(), found[0].state_dict())
    assert_close(found[0], one, 0.2 if exchange == "block" and owners > 1 else 1e-9)


class Noted:
    """Images that note which of them are read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.shape, self.reads = images, images.shape, []  # type: Tensor, torch.Size, list[list[int]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        self.reads.append(indices.tolist())
        return self.images.index_select(0, indices)


@pytest.mark.parametrize(("replicas", "stages", "owners"), [(2, 2, 1), (2, 2, 2), (11, 1, 1)])
def test_a_replica_reads_encodes_and_passes_on_its_own_images(
    replicas: int, stages: int, owners: int, images: Tensor, labels: Tensor
) -> None:
    """One of eleven has none of the ten images of the last batch."""
    model = model_of(3, (0, 0, 2))
    one = train(Mesh(), model, images, labels)

    def member(mesh: Mesh) -> tuple[Stack, list[list[int]]]:
        source = Noted(images)
        return train(mesh, model, source, labels), source.reads

    found = results(run_meshes(meshes(replicas, stages, owners), member))
    order = Batches(len(images), 30, epochs=2, seed=SEED, images=100)
    for rank, (stack, reads) in enumerate(found):
        assert_equal(stack.state_dict(), found[0][0].state_dict())
        stage, replica = rank // (replicas * owners), rank // owners % replicas
        for number in range(TOTAL):
            batch = order[number].tolist()
            own = batch[replica * len(batch) // replicas : (replica + 1) * len(batch) // replicas]
            assert (own in reads) == (stage == 0)
            assert batch not in reads
    assert_close(found[0][0], one, 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_give_the_same_bits(stages: int, name: str, images: Tensor, labels: Tensor) -> None:
    """Whichever stage is slow."""
    expected = train(Mesh(), SCHEDULES[name], images, labels).state_dict()
    places = meshes(stages=stages, delays_s={stages - 1: 0.002 * stages})
    for stack in results(run_meshes(places, lambda mesh: train(mesh, SCHEDULES[name], images, labels))):
        assert_equal(stack.state_dict(), expected)


# -- a pass that stops and goes on -------------------------------------------------------------------------------------


def merged(followers: list[Follower]) -> list[dict[str, Tensor]]:
    """The last state of every layer that the stages remember together."""
    layers = {index: state for follower in followers for index, state in follower.states[-1].items()}
    return [layers[index] for index in sorted(layers)]


@pytest.mark.parametrize(
    ("name", "last", "before", "after"),
    [
        ("at once", 1, 2, 1),
        ("one after the other", 2, 1, 3),
        ("one after the other", 3, 3, 2),  # in an update in which two layers are calibrated
        ("one after the other", 6, 2, 4),
        ("frozen below", 4, 4, 1),
        ("frozen below", 5, 2, 3),
        ("at once", 8, 2, 3),
    ],
)
def test_a_pass_goes_on_at_any_number_of_stages(
    name: str, last: int, before: int, after: int, images: Tensor, labels: Tensor
) -> None:
    """All stages stop after the same update, and hold all that the pass needs to go on with the same bits."""
    model = SCHEDULES[name]
    expected = train(Mesh(), model, images, labels).state_dict()
    stopped = [Follower(stop_after=last) for _ in range(before)]
    places = meshes(stages=before, delays_s={0: 0.002})
    outcomes = run_meshes(places, lambda mesh: train(mesh, model, images, labels, stopped[mesh.stage]))
    assert [type(outcome) for outcome in outcomes] == [Stopped] * before
    for follower in stopped:
        assert [done.number for done in follower.passes] == list(range(1, last + 1))
    continued = [Follower(merged(stopped)) for _ in range(after)]
    found = run_meshes(meshes(stages=after), lambda mesh: train(mesh, model, images, labels, continued[mesh.stage]))
    for stack, follower in zip(results(found), continued, strict=True):
        assert [done.number for done in follower.passes] == list(range(last + 1, TOTAL + 1))
        assert_equal(stack.state_dict(), expected)


def test_a_pass_that_goes_on_calibrates_no_layer_again(images: Tensor, labels: Tensor) -> None:
    """Not even one whose input was dark when it began: the layers below it have moved since."""
    layers = [{"out_channels": 4, "kernel_size": 3, "whiten_images": 50, "train": TRAIN} for _ in range(2)]
    model = parse(ModelConfig, {"layers": layers, "schedule": "together"})
    dark = images.clone()
    dark[:50] = 0
    begun: list[set[int]] = [set(), set()]

    class Calibrated(Follower):
        def __init__(self, turn: int, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.turn = turn

        def progress(self, phase: str, done: int, total: int, layer: int, **rate: float | None) -> None:
            begun[self.turn] |= {layer} if phase == "calibrate" else set()

    stopped = Calibrated(0, stop_after=3)
    with pytest.raises(Stopped):
        train(Mesh(), model, dark, labels, stopped)
    assert not any(state["input_power"] for state in merged([stopped]))
    train(Mesh(), model, dark, labels, Calibrated(1, merged([stopped])))
    assert begun == [{0, 1}, set()]


def test_learning_may_end_before_the_pass_does(images: Tensor, labels: Tensor) -> None:
    """Where the observer does not end the training, the stack is completed as it is."""

    class Early(Observer):
        def stop_after(self, number: int) -> bool:
            return number == 4

    model = SCHEDULES["one after the other"]
    found = results(run_meshes(meshes(stages=2), lambda mesh: train(mesh, model, images, labels, Early())))
    for stack in found:
        assert [int(stack.layer(index).updates) for index in range(4)] == [4, 2, 2, 0]
        assert_equal(stack.state_dict(), found[0].state_dict())


def test_an_observer_hears_of_every_update(images: Tensor, labels: Tensor) -> None:
    follower = Follower()
    model = SCHEDULES["frozen below"]
    Trainer(stack_of(model, images), images, labels, observer=follower, measure_every=2).fit()
    assert [(done.number, done.total, done.images, done.stop) for done in follower.passes] == [
        (number, TOTAL, 10 if number in (4, 8) else 30, False) for number in range(1, TOTAL + 1)
    ]
    made = {index: [update.number for update in follower.updates if update.index == index] for index in range(4)}
    assert made == {0: [1, 2], 1: [1, 2], 2: [1], 3: [1, 2, 3]}
    assert all(update.total == len(made[update.index]) for update in follower.updates)
    measured = [(update.index, update.number) for update in follower.updates if update.measurement is not None]
    assert measured == [(0, 2), (1, 2), (2, 1), (3, 2), (3, 3)]


# -- stages that wait, and stages that fail ----------------------------------------------------------------------------


def test_no_stage_waits_for_a_later_one_in_an_exchange_of_all_ranks(images: Tensor, labels: Tensor) -> None:
    """Such an exchange has less time than a link: the last updates of a late stage may take longer."""
    places = meshes(stages=3)
    first = places[0].everyone
    assert isinstance(first, ThreadExchange)
    ended, begun = threading.Event(), []

    class Last(Follower):
        def __init__(self, mesh: Mesh) -> None:
            super().__init__()
            self.mesh = mesh

        def passed(self, done: Pass) -> None:
            super().passed(done)
            if done.number == done.total and self.mesh.stage == 0:
                ended.set()
            if done.number == done.total and self.mesh.stage == 2:
                assert ended.wait(10.0)
                time.sleep(0.2)  # for an exchange that would be wrong
                begun.append(first.num_exchanges)

    results(run_meshes(places, lambda mesh: train(mesh, SCHEDULES["at once"], images, labels, Last(mesh))))
    assert begun == [1]  # the one before learning


def test_a_stage_is_a_few_batches_ahead_at_most(images: Tensor, labels: Tensor) -> None:
    model = model_of(2, train={"epochs": 2, "images": 100, "batch_size": 10})
    places = meshes(stages=2)
    assert isinstance(places[0].above, LinkEnd)
    link = places[0].above.to
    link.held, link.delay_s = IN_FLIGHT, 0.05
    results(run_meshes(places, lambda mesh: train(mesh, model, images, labels)))
    assert link.most_pending in (IN_FLIGHT, IN_FLIGHT + 1)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_fault_of_a_stage_is_raised(
    failing: int, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that stage; the others wait for it until their time is up."""

    class Failing(Observer):
        def __init__(self, mesh: Mesh) -> None:
            self.fails = mesh.stage == failing

        def updated(self, update: Update) -> None:
            if self.fails and update.number == 2:
                raise OSError("disk full")

    monkeypatch.setattr("tests.exchanges.TIMEOUT_S", 1.0)
    outcomes = run_meshes(
        meshes(stages=3), lambda mesh: train(mesh, SCHEDULES["at once"], images, labels, Failing(mesh))
    )
    assert isinstance(outcomes[failing], OSError)
    assert all(isinstance(outcome, TimeoutError) for stage, outcome in enumerate(outcomes) if stage != failing)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "both"}, "schedule: expected 'greedy' or 'together', got 'both'"),
        ({"freeze_below": True}, r"expected schedule: together with freeze_below=true, got greedy"),
        ({"starts": (0, 3)}, r"expected schedule: together with layers.1.train.start_after=3, got greedy"),
        (
            {"schedule": "together", "starts": (3, 3)},
            "expected layers.0.train.start_after=0, as nothing is below the first layer, got 3",
        ),
        (
            {"schedule": "together", "starts": (0, 3, 2)},
            "expected layers.2.train.start_after of at least 3, where the layer below begins, got 2",
        ),
        (
            {"schedule": "together", "starts": (0, 3, 3), "freeze_below": True},
            "expected layers.2.train.start_after of at least 4, as freeze_below then stops the layer below, got 3",
        ),
        (
            {"schedule": "together", "epochs": (1, 2)},
            "expected layers.1.train.epochs=1, as in layers.0, with schedule: together, got 2",
        ),
        (
            {"schedule": "together", "images": (None, 20)},
            "expected layers.1.train.images=None, as in layers.0, with schedule: together, got 20",
        ),
        (
            {"schedule": "together", "batch_size": (10, 20)},
            "expected layers.1.train.batch_size=10, as in layers.0, with schedule: together, got 20",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    keys = {"starts": "start_after", "epochs": "epochs", "images": "images", "batch_size": "batch_size"}
    lists = {keys[name]: values.pop(name) for name in tuple(values) if name in keys}
    count = max([2, *(len(each) for each in lists.values())])
    trains = [{name: each[index] for name, each in lists.items()} for index in range(count)]
    layers = [{"out_channels": 4, "kernel_size": 1, "train": train} for train in trains]
    with pytest.raises(ConfigError, match=message):
        parse(ModelConfig, {"layers": layers, **values})


def test_a_layer_that_would_begin_after_the_end_is_refused(images: Tensor, labels: Tensor) -> None:
    model = model_of(2, (0, TOTAL))
    with pytest.raises(ValueError, match=r"model.layers.1.train.start_after: expected less than 8, the updates of the"):
        Trainer(stack_of(model, images), images, labels)
    Trainer(stack_of(model_of(2, (0, TOTAL - 1)), images), images, labels)


def test_layers_of_different_updates_do_not_go_on(images: Tensor, labels: Tensor) -> None:
    model, stack = model_of(2), stack_of(model_of(2), images)
    follower = Follower(stop_after=3)
    with pytest.raises(Stopped):
        Trainer(stack, images, labels, observer=follower).fit()
    stack.layer(0).updates += 1
    with pytest.raises(ValueError, match=r"layer 1: expected 4 updates after 4 of the pass, got 3"):
        Trainer(stack, images, labels).fit()
    assert model == stack.config


# -- the layers of a stage ---------------------------------------------------------------------------------------------


def test_stages_are_split_where_the_slowest_is_fastest() -> None:
    """Against every way to split six layers of different cost."""
    widths = (4, 16, 8, 4, 12, 6)
    layers = [{"out_channels": width, "kernel_size": 1} for width in widths]
    model = parse(ModelConfig, {"layers": layers, "schedule": "together"})
    source = InputConfig(in_channels=3, height=4, width=4, num_classes=0)
    costs = layer_costs(model, source)
    for stages in range(1, 7):
        found = stages_of(model, source, stages)
        assert [index for layers in found for index in layers] == list(range(6))
        ways = [(0, *cuts, 6) for cuts in combinations(range(1, 6), stages - 1)]
        least = min(max(sum(costs[start:stop]) for start, stop in pairwise(way)) for way in ways)
        assert max(sum(costs[layers.start : layers.stop]) for layers in found) == least
    with pytest.raises(ConfigError, match=r"mesh.layer: expected 1 to 6, the layers of the model, got 7"):
        stages_of(model, source, 7)
    greedy = model.model_copy(update={"schedule": "greedy"})
    with pytest.raises(ConfigError, match=r"mesh.layer: expected 1 with model.schedule: greedy, got 2"):
        stages_of(greedy, source, 2)


def test_labels_may_be_on_the_gpu(card: Place) -> None:
    """The batches of a GPU are sent from the host, labels included."""
    model = parse(ModelConfig, {"layers": [{**LAYERS[3], "kernel_size": 3}], "schedule": "together"})
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
    stack = Stack(model, InputConfig.of(images, num_classes=2), device="cuda")
    trainer = Trainer(stack, images, labels.to("cuda"))
    assert trainer.setup.labels is not None
    assert trainer.setup.labels.device.type == "cpu"
    if card.real:
        trainer.fit()
