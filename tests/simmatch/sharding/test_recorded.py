"""Updates whose faults are recorded: the bits of updates that raise them, and the same error, later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.recording import FaultRecord
from simmatch.sharding.rows import split_rows
from tests.exchanges import meshes, results, run_meshes
from tests.simmatch.kernels import scripted

CHANNELS, CLASSES = 10, 4
REVIVING = PlasticityConfig(lr=0.2, lr_decay_steps=20, tau=0.7, dead_after=2)
CASES: dict[str, dict[str, Any]] = {
    "plain": {"plasticity": PlasticityConfig(lr=0.1, lr_decay_steps=7, dead_after=2)},
    "supervised": {"num_classes": CLASSES, "label_gain": 2.0, "plasticity": REVIVING},
    "whitened": {"whiten": True, "normalize": "contrast", "padding": 1, "plasticity": REVIVING},
}


@pytest.fixture(autouse=True)
def kernels_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.use(monkeypatch)


def batch(update: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    return torch.rand(6, 1, 9, 9, generator=generator), torch.randint(-1, CLASSES, (6,), generator=generator)


def make_layer(case: str, mesh: Mesh | None = None) -> SimilarityMatchingConv2d:
    """`mesh`: columns are split over its owners and replicas; None: no mesh."""
    options = dict(CASES[case])
    if mesh is not None:
        options["dynamics"] = DynamicsConfig(exchange="gather_state")
        options |= {"mesh": mesh, "rows": split_rows(CHANNELS, mesh.owners.world_size)[mesh.owners.rank]}
    layer = SimilarityMatchingConv2d(1, CHANNELS, 4, **options)
    layer.calibrate(batch(0)[0])
    return layer


def learn(layer: SimilarityMatchingConv2d, update: int, recorded: bool, images: Tensor | None = None) -> Any:
    x, labels = batch(update)
    if layer.rows.start == 0 and update == 1:  # from here on, this channel is silent: it is dead two updates later
        layer.feedforward[3] = -20.0
        layer.label[3] = 0.0
    given = layer.prepare(x if images is None else images)
    return layer.partial_fit(given, labels if layer.num_classes else None, recorded=recorded)


def state_of(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    bound = layer.bound
    values = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    return values | {"bound": bound.largest.clone(), "ridge": bound.epsilon.clone(), "next": bound.perron.clone()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


WAYS: dict[str, Callable[[Callable[[Any], Any]], list[Any]]] = {
    "alone": lambda program: [program(None)],
    "gather_state, 1 owner": lambda program: [program(Mesh())],
    "gather_state, 2 owners": lambda program: results(run_meshes(meshes(owners=2), program)),
    "gather_state, 2 replicas": lambda program: results(run_meshes(meshes(replicas=2), program)),
    "gather_state, 2 replicas of 2 owners": lambda program: results(run_meshes(meshes(replicas=2, owners=2), program)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_recorded_updates_have_the_bits_of_others(case: str, way: str) -> None:
    """30 updates with a revival, the host looking at every tenth; the activities too."""

    def program(mesh: Mesh | None) -> int:
        own, other = make_layer(case, mesh), make_layer(case, mesh)
        for update in range(30):
            solutions = [learn(layer, update, layer is own) for layer in (own, other)]
            assert torch.equal(solutions[0].y, solutions[1].y)
            assert solutions[0].num_iters == solutions[1].num_iters
            if update % 10 == 9:
                own.raise_faults()
                assert_same(state_of(own), state_of(other))
        return int(own.revived)

    revived = WAYS[way](program)
    assert min(revived) >= 1
    assert len(set(revived)) == 1


# -- faults ------------------------------------------------------------------------------------------------------------

FAULTY = 4


def spoil(kind: str, layer: SimilarityMatchingConv2d, monkeypatch: pytest.MonkeyPatch) -> Tensor | None:
    """Prepare a fault of this owner in the next update; images to learn from, if they are the fault."""
    if kind == "image":
        images = batch(FAULTY)[0]
        images[:, 0, 3, 3] = torch.nan
        return images
    if kind == "feedforward":
        layer.feedforward[0, 0, 0, 0] = torch.inf
    else:  # the new W overflows; the drive and the statistics are finite
        monkeypatch.setattr(layer, "_learnt", overflowing(layer._learnt))
    return None


def overflowing(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def changed(statistics: Any) -> dict[str, Tensor]:
        after = function(statistics)
        after["feedforward"][0, 0, 0, 0] = torch.inf
        return after

    return changed


def failing(*_: Any, **__: Any) -> Any:
    raise OSError("disk full")


def expected(kind: str, replicas: int, owners: int) -> str:
    """What a replica finds reaches the others as one kind."""
    if kind == "overflow":
        return "non-finite feedforward or label weights"
    if kind == "feedforward" and replicas == 1:
        return "non-finite weights"
    if (replicas, owners) == (1, 1):
        return "non-finite values in the drive or the lateral weights"
    return "non-finite activities or statistics"


SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(("replicas", "owners"), SHAPES)
@pytest.mark.parametrize("kind", ["image", "overflow", "feedforward"])
def test_values_that_are_not_finite_are_raised_at_the_next_look(
    kind: str, replicas: int, owners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kind and the ranks of the error that is raised at once; no rank has changed since."""
    guilty = replicas * owners - 1

    def program(mesh: Mesh) -> tuple[str, list[int]]:
        own, other = make_layer("plain", mesh), make_layer("plain", mesh)
        for update in range(FAULTY):
            for layer in (own, other):
                learn(layer, update, layer is own)
        images = [spoil(kind, layer, monkeypatch) if mesh.columns.rank == guilty else None for layer in (own, other)]
        before = state_of(own)
        learn(own, FAULTY, True, images[0])
        for update in range(FAULTY + 1, FAULTY + 4):  # later updates, sound again, change nothing
            learn(own, update, True)
        assert_same(state_of(own), before)
        with pytest.raises(SharedFault) as late:
            own.raise_faults()
        assert_same(state_of(own), before)
        with pytest.raises(SharedFault) as early:
            learn(other, FAULTY, False, images[1])
        assert (late.value.kind, late.value.ranks) == (early.value.kind, early.value.ranks)
        assert late.value.update == FAULTY + 1
        assert f"in update {FAULTY + 1}" in str(late.value)
        return late.value.kind, late.value.ranks

    outcomes = results(run_meshes(meshes(replicas, 1, owners), program))
    assert outcomes == [(expected(kind, replicas, owners), [guilty])] * (guilty + 1)


@pytest.mark.parametrize("solved_first", [True, False])
@pytest.mark.parametrize("mode", ["alone", "gather_state"])
def test_updates_that_need_not_solve_take_turns_with_others(mode: str, solved_first: bool) -> None:
    """As in a stream, where the solution is known unless labels drive it: the bits and the fault of other updates."""
    own, other = (make_layer("supervised", Mesh() if mode == "gather_state" else None) for _ in range(2))

    def update(layer: SimilarityMatchingConv2d, number: int) -> None:
        x, labels = batch(number)
        patches = layer.prepare(x)
        known = layer.solve(patches) if number % 2 == solved_first else None
        given = None if known is not None else labels
        layer.partial_fit(patches, given, solution=known, recorded=layer is own)

    for number in range(1, 7):
        for layer in (own, other):
            update(layer, number)
    own.raise_faults()
    assert_same(state_of(own), state_of(other))
    for number in (7, 8):
        for layer in (own, other):
            layer.load_state_dict(other.state_dict())
            layer.certify()
        learnt = own._learnt
        own._learnt = overflowing(learnt)  # type: ignore[method-assign]
        update(own, number)
        own._learnt = learnt  # type: ignore[method-assign]
        update(own, number + 1)  # sound again; changes nothing
        with pytest.raises(SharedFault, match="non-finite feedforward or label weights on rank 0 in update 7"):
            own.raise_faults()
        assert_same(state_of(own), state_of(other))
        own.raise_faults()


def test_what_a_captured_update_writes_to_stays_when_another_kind_of_update_comes() -> None:
    record, sound = FaultRecord(torch.device("cpu")), torch.zeros(1, 2)
    record.add({"activities": sound}, None)
    [written] = record._statuses.values()
    record.add({"activities": sound, "lateral weights": sound}, None)
    written.fill_(float("nan"))  # as a replay does
    record.ok.fill_(False)
    with pytest.raises(SharedFault, match="non-finite activities on rank 0 in update 4"):
        record.raise_first(updates=3)
    record.raise_first(updates=3)  # it is empty again


@pytest.mark.parametrize(("replicas", "owners"), SHAPES[1:])
def test_an_exception_of_one_rank_is_raised_by_all_at_the_next_look(replicas: int, owners: int) -> None:
    def program(mesh: Mesh) -> str:
        layer = make_layer("plain", mesh)
        for update in range(FAULTY):
            learn(layer, update, True)
        before = state_of(layer)
        if mesh.columns.rank == 1:
            layer.sharing._solve = failing  # type: ignore[method-assign, union-attr]
        learn(layer, FAULTY, True)
        learn(layer, FAULTY + 1, True)
        with pytest.raises(SharedFault, match=f"exception on rank 1 in update {FAULTY + 1}") as caught:
            layer.raise_faults()
        assert_same(state_of(layer), before)
        return str(caught.value.__cause__)

    causes = ["None"] * (replicas * owners)
    causes[1] = "disk full"
    assert results(run_meshes(meshes(replicas, 1, owners), program)) == causes


def test_an_exception_while_an_update_is_captured_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update goes on uncaptured then; a graph with the exception in it would report it at every replay."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def program(mesh: Mesh) -> str:
        layer = make_layer("plain", mesh)
        fault = layer._fault(recorded=True)
        with pytest.raises(OSError, match="disk full"), fault:
            failing()
        with pytest.raises(OSError, match="disk full"), fault.apart(mesh.owners) as some, some:
            failing()
        return "raised"

    assert results(run_meshes(meshes(2, 1, 2), program)) == ["raised"] * 4


def test_a_layer_learns_on_after_its_fault_was_raised() -> None:
    own, other = make_layer("plain"), make_layer("plain")
    images = batch(0)[0]
    images[0] = torch.nan
    learn(own, 0, True, images)
    with pytest.raises(SharedFault, match="in update 1"):
        own.raise_faults()
    for update in range(3):
        learn(own, update, True)
        learn(other, update, False)
    own.raise_faults()
    assert_same(state_of(own), state_of(other))


def test_an_update_that_raises_faults_does_not_follow_one_with_a_fault() -> None:
    """Else the fault would be reported of another update, after a change of the weights."""
    layer, x = make_layer("plain"), batch(1)[0]
    statistics = layer.statistics(x, layer.solve(x).y)
    before = state_of(layer)
    for follow in (lambda: learn(layer, 2, False), lambda: layer.update(statistics)):
        learn(layer, 0, True, torch.full_like(x, torch.nan))
        with pytest.raises(SharedFault, match="in update 1"):
            follow()
        assert_same(state_of(layer), before)


def test_batches_of_any_number_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel there is one exchange per tile, and their number depends on the batch."""
    monkeypatch.undo()
    layer = SimilarityMatchingConv2d(1, CHANNELS, 4, dynamics=DynamicsConfig(solver="accelerated", tile_columns=50))
    for update, images in enumerate((1, 5, 2)):
        layer.partial_fit(batch(update)[0][:images], recorded=True)
        layer.raise_faults()
    for images in (4, 1):
        x = batch(3)[0][:images]
        x[-1] = torch.nan
        with pytest.raises(SharedFault, match="non-finite"):  # at once: the host decides here
            layer.partial_fit(x, recorded=True)
    assert int(layer.updates) == 3


def test_a_layer_of_another_dtype_or_grad_mode_goes_on_recording() -> None:
    layer = make_layer("plain")
    with torch.inference_mode():
        learn(layer, 0, True)
    learn(layer, 2, True)
    layer.double()
    layer.partial_fit(batch(3)[0].double(), recorded=True)
    layer.raise_faults()
    layer.partial_fit(torch.full_like(batch(4)[0], torch.nan).double(), recorded=True)
    with pytest.raises(SharedFault, match="in update 4"):
        layer.raise_faults()


def test_weights_written_to_between_recorded_updates_are_noticed() -> None:
    """torch counts this write; the other only ‖M‖ shows."""
    for write in (lambda tensor: tensor.mul_(2.0), lambda tensor: tensor.numpy().__imul__(2.0)):
        layer = make_layer("plain")
        learn(layer, 0, True)
        layer.raise_faults()
        write(layer.lateral)
        with pytest.raises(RuntimeError, match="expected the rows for which the bound was last certified"):
            layer.raise_faults()


@pytest.mark.parametrize("way", list(WAYS))
def test_weights_that_were_loaded_have_no_faults(way: str) -> None:
    """Neither those of weights before them, nor that of having been written to; and they learn on."""

    def program(exchange: Any) -> dict[str, Tensor]:
        layer = make_layer("plain", exchange)
        learn(layer, 0, recorded=True)
        known = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        learn(layer, 1, recorded=True, images=torch.full((6, 1, 9, 9), torch.nan))
        layer.load_state_dict(known)
        layer.raise_faults()
        layer.certify()
        learn(layer, 2, recorded=True)
        layer.raise_faults()
        return state_of(layer)

    def undisturbed(exchange: Any) -> dict[str, Tensor]:
        layer = make_layer("plain", exchange)
        learn(layer, 0, recorded=True)
        layer.certify()
        learn(layer, 2, recorded=True)
        return state_of(layer)

    for one, other in zip(WAYS[way](program), WAYS[way](undisturbed), strict=True):
        assert_same(one, other)


def test_divergence_is_reported_at_the_next_look() -> None:
    """By the same warning: activities that follow M, one update behind, worse than none at all."""
    layer = SimilarityMatchingConv2d(1, CHANNELS, 4, plasticity=PlasticityConfig(lr=0.9))
    for update in range(4):
        learn(layer, update, True)
    layer.raise_faults()
    layer.above_one.fill_(True)
    with pytest.warns(UserWarning, match="the relative objective is above 1"):
        layer.raise_faults()
