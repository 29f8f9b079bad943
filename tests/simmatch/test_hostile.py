"""A layer in people's hands: copied, averaged, pickled, called from threads, exported, compiled, and misused."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from simmatch.config import DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Outputs, Stack
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.coordinate import CHUNK, CoordinateDescent
from simmatch.solvers.quadratic import solve
from tests.exchanges import ThreadExchange, results, run_owners
from tests.reference import random_lateral

EXACT = DynamicsConfig(solver="accelerated", tolerance=1e-9, max_iterations=20_000, encode_iterations=3_000)
"""A step that is too long for M, as that of a smaller M's bound would be, diverges here; one for M converges."""


def images(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")


def layer_of(seed: int, *, largest: float, **options: Any) -> SimilarityMatchingConv2d:
    """Eight channels on 3 × 3 patches, their M with this largest eigenvalue; one update behind it."""
    settings: dict[str, Any] = {"dynamics": EXACT, "dtype": torch.float64, "seed": seed} | options
    layer = SimilarityMatchingConv2d(1, 8, 3, **settings)
    layer.lateral.copy_(random_lateral(8, seed, condition=30.0, largest=largest))
    layer.partial_fit(images(3, seed=seed, dtype=layer.lateral.dtype))
    return layer


def state_of(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.state_dict().items()}


def unchanged(layer: SimilarityMatchingConv2d, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(buffer, before[name]) for name, buffer in layer.state_dict().items())


# -- a bound is that of the M at hand ----------------------------------------------------------------------------------


def by_loading(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    copied = copy.deepcopy(layer)
    copied(images(1))
    copied.load_state_dict(other.state_dict())
    return copied


def by_averaging(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    averaged = AveragedModel(layer, use_buffers=True, avg_fn=lambda _average, new, _count: new)
    averaged(images(1))
    for _ in range(2):  # the first call copies
        averaged.update_parameters(other)
    return averaged


def by_calling(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.functional_call(layer, dict(other.named_buffers()), (x,))


def by_assigning(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    layer.load_state_dict(other.state_dict(), assign=True)
    return layer


def by_writing(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    layer.feedforward.copy_(other.feedforward)
    layer.lateral.copy_(other.lateral)
    return layer


def by_writing_unseen(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    """Writes that torch counts for no version of the tensor."""
    layer.feedforward.data.copy_(other.feedforward)
    layer.lateral.numpy()[...] = other.lateral.numpy()
    return layer


def by_unpickling(layer: SimilarityMatchingConv2d, other: SimilarityMatchingConv2d) -> Callable[[Tensor], Tensor]:
    return by_writing(pickle.loads(pickle.dumps(layer)), other)


WAYS = [by_loading, by_averaging, by_calling, by_assigning, by_writing, by_writing_unseen, by_unpickling]


@pytest.mark.parametrize("way", WAYS)
def test_the_dynamics_use_the_current_m_however_it_was_changed(way: Callable[..., Any]) -> None:
    """From an M with λmax = 1 to one with 40: a step of the old bound is forty times too long."""
    layer, other = layer_of(0, largest=1.0), layer_of(1, largest=40.0)
    x = images(4, seed=9)
    assert layer(x).isfinite().all()  # whatever is kept of a bound is kept now
    expected = solve(other.drive(x), other.lateral, DynamicsConfig(tolerance=1e-10, ridge=EXACT.ridge)).y
    codes = way(layer, other)(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(codes, expected, rtol=1e-6, atol=1e-6 * float(expected.amax()))


def test_a_stack_that_was_copied_solves_with_what_it_loads() -> None:
    config = LayerConfig(out_channels=8, kernel_size=3, dynamics=EXACT)
    source = InputConfig(in_channels=1, height=8, width=8, num_classes=2)
    stack, strong = (Stack(ModelConfig(layers=(config,)), source, dtype=torch.float64) for _ in range(2))
    strong.layer(0).lateral.copy_(random_lateral(8, 3, condition=30.0, largest=40.0))
    copied, x = copy.deepcopy(stack), images(2)
    copied(x)
    copied.load_state_dict(strong.state_dict())
    assert torch.equal(copied(x), strong(x))


def test_a_call_with_other_weights_leaves_no_trace() -> None:
    layer, other = layer_of(0, largest=1.0), layer_of(1, largest=40.0)
    x = images(4)
    before, expected = state_of(layer), layer(x)
    torch.func.functional_call(layer, {"lateral": other.lateral}, (x,))
    assert torch.equal(layer(x), expected)
    assert unchanged(layer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Of activities and of what is learnt next, by state, pickle, torch.save and copy."""
    few = DynamicsConfig(solver="accelerated", encode_iterations=5)  # far from the solution the step shows
    layer = layer_of(2, largest=3.0, dynamics=few, dtype=dtype)
    x = images(5, seed=4, dtype=dtype)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = SimilarityMatchingConv2d(1, 8, 3, dynamics=few, dtype=dtype)
    loaded.load_state_dict(layer.state_dict())
    others = [loaded, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    expected = layer(x)
    layer.partial_fit(x)
    for other in others:
        assert torch.equal(other(x), expected)
        other.partial_fit(x)
        assert unchanged(other, state_of(layer))


def test_a_change_of_format_and_back_bounds_the_rounded_m() -> None:
    layer = layer_of(5, largest=7.0)
    layer.float().double()
    top = float(torch.linalg.eigvalsh(layer.lateral)[-1])
    layer.certify()
    assert top <= layer.bound.value <= 1.2 * top


def test_a_state_of_an_earlier_version_loads() -> None:
    """It had the same entries; its Perron vector was one step ahead, which bounds as well."""
    layer = layer_of(6, largest=5.0)
    state = state_of(layer)
    state["perron"] = certify_afresh(layer.lateral, Rows.all(8), ridge=0.0).perron
    loaded = SimilarityMatchingConv2d(1, 8, 3, dynamics=EXACT, dtype=torch.float64)
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded(images(3)), layer(images(3)), rtol=1e-7, atol=1e-7)


def test_a_vector_that_knows_nothing_of_m_bounds_it_within_a_fifth() -> None:
    """M in which two strong channels have only just come up, from a vector in which they are almost absent."""
    lateral = torch.eye(40, dtype=torch.float64)
    lateral[:2, :2] = torch.tensor([[90.0, 80.0], [80.0, 90.0]], dtype=torch.float64)
    layer = SimilarityMatchingConv2d(1, 40, 3, dtype=torch.float64)
    layer.lateral.copy_(lateral)
    layer.perron.fill_(1.0)
    layer.perron[:2] = 0.01
    layer.certify()
    assert 170.0 <= layer.bound.value <= 1.2 * 170.0
    # a row of small couplings to many others, as an approximate vector hides it
    hub = torch.eye(200, dtype=torch.float64)
    hub[0, 1:] = hub[1:, 0] = 0.05
    top = 1.0 + 0.05 * 199**0.5
    for start in (torch.ones(200), torch.full((200,), 0.01).index_fill_(0, torch.tensor([7]), 1.0)):
        wide = SimilarityMatchingConv2d(1, 200, 3, dtype=torch.float64)
        wide.lateral.copy_(hub)
        wide.perron.copy_(start)
        wide.certify()
        assert top <= wide.bound.value <= 1.2 * top * (1 + 1e-6)


@pytest.mark.parametrize("start", [[0.0] * 8, [-1.0] * 8, [-1.0, 1.0] * 4, [torch.nan] + [1.0] * 7])
def test_any_vector_bounds(start: list[float]) -> None:
    """A partly loaded state may hold a vector that is not the Perron vector of any matrix."""
    layer = layer_of(7, largest=20.0)
    layer.load_state_dict({"perron": torch.tensor(start)}, strict=False)
    top = float(torch.linalg.eigvalsh(layer.lateral)[-1])
    layer.certify()
    assert top <= layer.bound.value <= 1.2 * top


def test_a_bound_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded layer that is called image by image does not bound the same M at every call."""
    layer = layer_of(8, largest=2.0)
    layer.load_state_dict(state_of(layer))
    layer(images(1))
    monkeypatch.setattr(SimilarityMatchingConv2d, "certify", lambda _self: pytest.fail("again"))
    layer(images(1))


def test_another_tensor_is_another_m() -> None:
    """It has been written to as often as the first, and has the same norm: only its identity differs."""
    layer = SimilarityMatchingConv2d(1, 4, 3, dynamics=EXACT, dtype=torch.float64)
    layer(images(1))
    other = torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0], dtype=torch.float64))  # λmax = 2 instead of 1
    while other._version < layer.lateral._version:
        other.add_(0.0)
    assert other.norm() == layer.lateral.norm()
    assert other._version == layer.lateral._version
    layer.lateral = other
    with pytest.raises(RuntimeError, match="lateral: expected the rows for which the bound was last certified"):
        _ = layer.bound
    layer(images(1))
    assert layer.bound.value >= 2.0


# -- several owners ----------------------------------------------------------------------------------------------------


def shard(exchange: ThreadExchange, mode: str, **options: Any) -> SimilarityMatchingConv2d:
    rows = split_rows(8, exchange.world_size)[exchange.rank]
    dynamics = DynamicsConfig(exchange=mode)
    return SimilarityMatchingConv2d(
        1, 8, 3, dynamics=dynamics, dtype=torch.float64, rows=rows, mesh=Mesh.of_owners(exchange), **options
    )


@pytest.mark.parametrize("write", [lambda rows: rows.mul_(3.0), lambda rows: rows.data.mul_(3.0)])
@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_rows_that_one_owner_wrote_to_are_refused_by_all(mode: str, write: Callable[[Tensor], Any]) -> None:
    """All owners share one bound: a single owner cannot compute a new one, and none continues with the old one."""

    def program(exchange: ThreadExchange) -> list[str]:
        layer, said = shard(exchange, mode), []
        layer.partial_fit(images(4))
        before = state_of(layer)
        if exchange.rank == 1:
            write(layer.lateral)
            before = state_of(layer)
        for call in (layer, layer.solve, layer.partial_fit):
            with pytest.raises(SharedFault, match="exception on rank 1") as caught:
                call(images(4))
            said.append(str(caught.value.__cause__))
        assert unchanged(layer, before)
        layer.recertify()
        assert layer(images(4)).isfinite().all()
        return said

    messages = results(run_owners(2, program))
    assert all("call certify() or recertify() on all owners" in message for message in messages[1])


@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_shards_that_load_a_state_go_on_bit_by_bit(mode: str) -> None:
    def program(exchange: ThreadExchange) -> None:
        layer, loaded = shard(exchange, mode), shard(exchange, mode)
        layer.partial_fit(images(4))
        loaded.load_state_dict(layer.state_dict())
        for call in (layer, loaded):
            call.partial_fit(images(4, seed=1))
        assert unchanged(loaded, state_of(layer))

    results(run_owners(3, program))


@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_a_state_that_one_owner_loaded_is_refused_by_all(mode: str) -> None:
    """The others do not know of it: an exchange of this owner alone would never end."""

    def program(exchange: ThreadExchange) -> None:
        layer = shard(exchange, mode)
        layer.partial_fit(images(4))
        if exchange.rank == 1:
            layer.load_state_dict(state_of(layer))
        for call in (layer, layer.solve, layer.partial_fit):
            with pytest.raises(SharedFault, match="exception on rank 1"):
                call(images(4))
        layer.certify()
        layer.partial_fit(images(4))

    results(run_owners(2, program))


@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_patches_of_another_layer_on_one_owner_are_refused_by_all(mode: str) -> None:
    def program(exchange: ThreadExchange) -> str:
        layer, x = shard(exchange, mode), images(4)
        layer.partial_fit(x)
        before = state_of(layer)
        stranger = shard(exchange, mode, normalize="contrast") if exchange.rank == 0 else layer
        for call in (layer, layer.solve, layer.partial_fit):
            with pytest.raises(SharedFault, match="exception on rank 0") as caught:
                call(stranger.prepare(x))
        assert unchanged(layer, before)
        layer.partial_fit(x)
        return str(caught.value.__cause__)

    found = results(run_owners(2, program))
    assert found[0].startswith("patches: expected patches prepared by this layer")


@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
@pytest.mark.parametrize("owners", [1, 3])
def test_no_owner_learns_from_an_empty_batch(mode: str, owners: int) -> None:
    """All raise alike, in our words, at no exchange; activities of no images are no activities."""

    def program(exchange: ThreadExchange) -> tuple[str, int]:
        layer = shard(exchange, mode)
        layer.partial_fit(images(4))
        before, count = state_of(layer), exchange.num_exchanges
        with pytest.raises(ValueError, match="images: expected") as caught:
            layer.partial_fit(images(0))
        assert exchange.num_exchanges == count
        assert unchanged(layer, before)
        assert layer(images(0)).shape == layer.solve(images(0)).y.shape == (0, 8, 6, 6)
        layer.partial_fit(images(4))
        return str(caught.value), exchange.num_exchanges

    outcomes = results(run_owners(owners, program))
    assert outcomes == outcomes[:1] * owners
    assert outcomes[0][0] == "images: expected a batch of at least one, got a batch of size 0"


def test_an_owner_whose_new_weights_are_not_finite_keeps_all_from_changing() -> None:
    """Statistics overflow on one owner only: the others have learnt nothing either when they hear of it."""

    def program(exchange: ThreadExchange) -> bool:
        layer = shard(exchange, "every_iteration")
        x = images(4)
        statistics = layer.statistics(x, layer.solve(x).y)
        if exchange.rank == 1:
            statistics.yx.fill_(torch.inf)
        before = state_of(layer)
        with pytest.raises(SharedFault, match="non-finite feedforward or label weights on rank 1"):
            layer.update(statistics)
        return unchanged(layer, before)

    assert results(run_owners(3, program)) == [True] * 3


# -- threads, processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "accelerated", "projected_gradient"])
@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_threads_do_not_meet(solver: str, mode: str) -> None:
    dynamics = DynamicsConfig(solver=solver, exchange=mode, tolerance=1e-4)
    layer = SimilarityMatchingConv2d(1, 24, 3, dynamics=dynamics)
    for seed in range(3):
        layer.partial_fit(images(8, seed=seed, dtype=torch.float32))
    work = [images(24, seed=seed, dtype=torch.float32) for seed in range(6)]
    expected = [layer.solve(x).y for x in work]
    wrong: list[int] = []
    together = threading.Barrier(len(work))

    def call(index: int) -> None:
        together.wait(20)
        for _ in range(3):
            if not torch.equal(layer.solve(work[index]).y, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_scratch_is_lent_once() -> None:
    """As many pieces as calls at a time, and the same ones again."""
    solver, lateral = CoordinateDescent(), torch.eye(5)
    drive = torch.rand(5, CHUNK)
    settings = {"ridge": 0.0, "tolerance": 1e-6, "max_iterations": 10}
    taken: list[Any] = []
    lend = solver._buffers.take

    def nested(key: Any, make: Callable[[], Any]) -> Any:
        taken.append(lend(key, make))
        if len(taken) == 1:  # another call while this one has its buffers
            solver.solve(drive, lateral, **settings)
        return taken[-1] if len(taken) > 2 else taken[0]

    solver._buffers.take = nested  # type: ignore[method-assign]
    solver.solve(drive, lateral, **settings)
    assert taken[0] is not taken[1]
    solver.solve(drive, lateral, **settings)
    assert any(taken[2] is piece for piece in taken[:2])


def _solve_in_child(layer: SimilarityMatchingConv2d, answers: Any) -> None:
    torch.set_num_threads(2)
    answers.put(layer.solve(images(8, dtype=torch.float32)).y.numpy())


@pytest.mark.fault
def test_a_process_that_is_spawned_may_hold_a_layer() -> None:
    layer = SimilarityMatchingConv2d(1, 8, 3)
    layer.partial_fit(images(4, dtype=torch.float32))
    expected = layer.solve(images(8, dtype=torch.float32)).y  # it has threads and buffers now
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_solve_in_child, args=(layer, answers))
    child.start()
    codes = torch.from_numpy(answers.get(timeout=60))
    child.join(20)
    assert child.exitcode == 0
    assert torch.equal(codes, expected)


def test_threads_of_a_parent_are_not_waited_for_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = CoordinateDescent()
    before = solver._executor(1)
    assert solver._executor(1) is before
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a child sees it
    assert solver._executor(1) is not before


# -- export and compilation --------------------------------------------------------------------------------------------


def made(normalize: str = "contrast") -> SimilarityMatchingConv2d:
    dynamics = DynamicsConfig(encode_iterations=8)
    layer = SimilarityMatchingConv2d(1, 9, 3, normalize=normalize, dynamics=dynamics)
    for seed in range(3):
        layer.partial_fit(images(8, seed=seed, dtype=torch.float32))
    return layer.eval()


def test_a_loaded_layer_is_exported_without_a_call() -> None:
    layer = made()
    loaded = SimilarityMatchingConv2d(1, 9, 3, normalize="contrast", dynamics=layer.dynamics).eval()
    loaded.load_state_dict(layer.state_dict())
    x = images(4, dtype=torch.float32)
    program = torch.export.export(loaded, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    # the graph bounds the M that it has: another one, forty times as large, does not make it diverge
    graph = program.module()
    graph.lateral.mul_(40.0)
    layer.lateral.mul_(40.0)
    torch.testing.assert_close(graph(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_graph_has_nothing_that_onnx_lacks() -> None:
    """No write into a view, no maximum over all axes: what its converter refuses."""
    example = images(4, dtype=torch.float32)
    program = torch.export.export(made(), (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    nodes = [node for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    names = {str(node.target) for node in nodes}
    assert not {name for name in names if "scatter" in name or "copy." in name.replace("_to_copy.", "")}
    assert all(node.args[1:] for node in nodes if str(node.target) in ("aten.amax.default", "aten.amin.default"))


def test_onnx_computes_the_activities() -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    config = LayerConfig(out_channels=9, kernel_size=3, normalize="contrast", pool=2, power=0.5)
    supervised = LayerConfig(out_channels=5, kernel_size="full", supervised=True, label_gain=1.0, whiten=True)
    source = InputConfig(in_channels=1, height=8, width=8, num_classes=3)
    stack = Stack(ModelConfig(layers=(config, supervised)), source).eval()
    x = images(4, dtype=torch.float32)
    stack.layer(0).partial_fit(x)
    stack.layer(1).partial_fit(stack.below(x, 1), torch.tensor([0, 1, 2, 0]))
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.onnx.export(Outputs(stack).eval(), (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = reference.ReferenceEvaluator(program.model_proto)
    for count in (1, 4):
        answers = session.run(None, {session.input_names[0]: x[:count].numpy()})
        for value, expected in zip(answers, stack.outputs(x[:count]).values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself: others in each version
@pytest.mark.parametrize("normalize", ["contrast", "none"])
def test_a_compiled_layer_computes_the_same(normalize: str) -> None:
    """Nine values a patch and nine channels: patches are written out."""
    layer, x = made(normalize), images(4, dtype=torch.float32)
    assert torch.equal(torch.compile(layer)(x), layer(x))


# -- what surrounds a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "accelerated"])
@pytest.mark.parametrize(
    "surrounded", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta")]
)
def test_what_surrounds_a_call_changes_no_bit(surrounded: Callable[[], Any], solver: str) -> None:
    """Autocast around a whole network; a default device that is not the layer's (meta stands for any)."""

    def learn() -> tuple[Tensor, ...]:
        x, labels = images(6, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1, 2], device="cpu")
        plasticity = PlasticityConfig(dead_after=1)  # rows are drawn anew, too
        options: dict[str, Any] = {"normalize": "contrast", "whiten": True, "num_classes": 3, "label_gain": 0.5}
        layer = SimilarityMatchingConv2d(
            1, 8, 3, dynamics=DynamicsConfig(solver=solver), plasticity=plasticity, seed=1, **options
        )
        layer.calibrate(x, num_patches=100)
        for _ in range(3):
            layer.partial_fit(x, labels)
        y = layer.solve(x, labels).y
        layer.update(layer.statistics(x, y, labels))
        layer.recertify()
        assert 0.0 <= layer.objective(x, y.transpose(0, 1).flatten(1), labels) <= 2.0
        return y, layer.drive(x), layer(x), *layer.buffers()

    expected = learn()
    with surrounded():
        tensors = learn()
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


# -- arguments ---------------------------------------------------------------------------------------------------------

X, LABELS = images(4, dtype=torch.float32), torch.tensor([0, 1, 2, 0])

IMAGES = {
    "float64": (X.double(), "expected torch.float32, the format of the layer's weights, got torch.float64"),
    "uint8": (X.to(torch.uint8), "expected torch.float32, the format of the layer's weights, got torch.uint8"),
    "numpy": (X.numpy(), r"expected a torch.Tensor \[B, 1, H, W\], got numpy.ndarray"),
    "list": ([0.0], r"expected a torch.Tensor \[B, 1, H, W\], got list"),
    "one image": (X[0], r"expected \[B, 1, H, W\], got \[1, 8, 8\]"),
    "channels": (X.expand(4, 3, 8, 8), r"expected \[B, 1, H, W\], got \[4, 3, 8, 8\]"),
    "device": (X.to("meta"), "expected a tensor on cpu, as the layer's weights, got meta"),
}

LABEL_FAULTS = {
    "one-hot": (torch.eye(3)[LABELS], r"expected a tensor of integers \[4\].*got \[4, 3\] of torch.float32"),
    "integer one-hot": (torch.eye(3).long()[LABELS], r"expected a tensor of integers \[4\].*got \[4, 3\] of torch.int"),
    "float": (LABELS.float(), r"expected a tensor of integers \[4\].*got \[4\] of torch.float32"),
    "bool": (LABELS.bool(), r"expected a tensor of integers \[4\].*got \[4\] of torch.bool"),
    "too few": (LABELS[:2], r"expected a tensor of integers \[4\].*got \[2\] of torch.int64"),
    "too many": (torch.cat([LABELS, LABELS]), r"expected a tensor of integers \[4\].*got \[8\] of torch.int64"),
    "list": ([0, 1, 2, 0], r"expected a tensor of integers \[4\].*got list"),
    "range": (LABELS + 1, "expected classes 0 … 2 or -1, got 3"),
}


def fresh(mode: str = "every_iteration", **options: Any) -> SimilarityMatchingConv2d:
    settings = {"num_classes": 3, "label_gain": 0.5, "whiten": True} | options
    return SimilarityMatchingConv2d(1, 8, 3, dynamics=DynamicsConfig(exchange=mode), **settings)


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_refused_before_anything_changes(kind: str, mode: str) -> None:
    given, message = IMAGES[kind]
    layer = fresh(mode)
    before = state_of(layer)
    for call in (layer, layer.solve, layer.partial_fit, layer.calibrate, layer.prepare):
        with pytest.raises(ValueError, match=rf"^images: {message}$"):
            call(given)
    assert unchanged(layer, before)


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
@pytest.mark.parametrize("kind", LABEL_FAULTS)
def test_labels_are_refused_before_anything_changes(kind: str, mode: str) -> None:
    """A layer that would calibrate itself first does not."""
    given, message = LABEL_FAULTS[kind]
    layer = fresh(mode)
    before = state_of(layer)
    y = layer(X)
    calls = (layer.solve, layer.partial_fit, lambda x, labels: layer.statistics(x, y, labels))
    for call in calls:
        with pytest.raises(ValueError, match=rf"^labels: {message}"):
            call(X, given)
    assert unchanged(layer, before)


def test_labels_of_a_layer_without_classes_are_refused() -> None:
    layer = SimilarityMatchingConv2d(1, 8, 3)
    for call in (layer.solve, layer.partial_fit):
        with pytest.raises(ValueError, match=r"^labels: expected None for a layer with num_classes=0, got \[4\] of"):
            call(X, LABELS)


def test_a_gradient_is_refused_where_it_would_be_lost() -> None:
    layer, x = SimilarityMatchingConv2d(1, 8, 3), X.clone().requires_grad_()
    for call in (layer, layer.solve):
        with pytest.raises(
            ValueError, match=r"^images: expected a tensor that does not require a gradient.*got one that does"
        ):
            call(x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(X))
    layer.partial_fit(x)  # learns without one anyway


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.complex64])
def test_a_format_that_the_dynamics_do_not_have_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"^dtype: expected torch.float32 or torch.float64, got {dtype}$"):
        SimilarityMatchingConv2d(1, 8, 3, dtype=dtype)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match=rf"^layer: expected weights of torch.float32 or .*, got {dtype}$"):
            SimilarityMatchingConv2d(1, 8, 3).to(dtype)(X.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_layer_is_not_calibrated_by_values_that_are_not_finite(value: float) -> None:
    layer, x = fresh(), X.clone()
    x[3, 0, 7, 7] = value
    before = state_of(layer)
    for call in (layer.calibrate, layer.partial_fit):
        with pytest.raises(ValueError, match=r"^images: expected finite values, got NaN or infinity$"):
            call(x)
    assert unchanged(layer, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((4, 2), 36), r"expected 0 … 35, got 36"),
        (torch.full((4, 2), -1), r"expected 0 … 35, got -1"),
        (torch.zeros(3, 2).long(), r"expected \[4, n\] with n ≥ 1, got \[3, 2\]"),
        (torch.zeros(4, 0).long(), r"expected \[4, n\] with n ≥ 1, got \[4, 0\]"),
        (torch.zeros(4, 2), r"expected integers \[4, n\], got torch.float32"),
        ([[0]], r"expected integers \[4, n\], got list"),
    ],
)
def test_positions_are_on_the_map(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^positions: {message}$"):
        SimilarityMatchingConv2d(1, 8, 3).prepare(X, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contrast_floor": 0.0}, "contrast_floor: expected greater than 0, got 0.0"),
        ({"contrast_floor": torch.nan}, "contrast_floor: expected a finite number, got nan"),
        ({"whiten_ridge": -1.0}, "whiten_ridge: expected greater than or equal to 0, got -1.0"),
    ],
)
def test_normalisation_is_possible(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SimilarityMatchingConv2d(1, 8, 3, **given)


@pytest.mark.parametrize("count", [0, -1])
def test_a_layer_is_not_calibrated_by_no_patches(count: int) -> None:
    with pytest.raises(ValueError, match=f"^num_patches: expected at least 1, got {count}$"):
        fresh().calibrate(X, count)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_any_integers_are_the_same_classes(dtype: torch.dtype) -> None:
    layer, other = fresh(), fresh()
    layer.partial_fit(X, LABELS)
    other.partial_fit(X, LABELS.to(dtype))
    assert unchanged(other, state_of(layer))


def test_activities_and_statistics_of_another_layer_are_refused() -> None:
    layer, other = SimilarityMatchingConv2d(1, 8, 3), SimilarityMatchingConv2d(1, 7, 3)
    before = state_of(layer)
    with pytest.raises(ValueError, match=r"^activities: expected \[4, 8, 6, 6\], got \[4, 7, 6, 6\]$"):
        layer.statistics(X, other(X))
    with pytest.raises(ValueError, match=r"^activities: expected torch.float32.*got torch.float64$"):
        layer.statistics(X, layer(X).double())
    with pytest.raises(ValueError, match=r"^statistics: expected yx \[8, 1, 3, 3\], got \[7, 1, 3, 3\]$"):
        layer.update(other.statistics(X, other(X)))
    nothing = layer.statistics(X[:0], layer(X[:0]))
    with pytest.raises(ValueError, match=r"^statistics: expected sums over at least one column, got a count of 0$"):
        layer.update(nothing)
    assert unchanged(layer, before)
    layer.update(layer.statistics(X, layer(X)) + nothing)  # nothing adds nothing
    assert layer.updates == 1


def test_a_layer_lives_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = SimilarityMatchingConv2d(1, 8, 3, dynamics=EXACT)
        layer.partial_fit(X)
        before = layer.bound.value
        layer.lateral.mul_(40.0)
        layer.certify()
        assert layer.bound.value > 10 * before
