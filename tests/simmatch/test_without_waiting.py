"""A whole update on tensors that only claim to be on a GPU: nothing may read them, and nothing a graph cannot capture.

Fake tensors have a shape, a dtype and a device, but no values: whatever needs a value on the host raises an error, and
so does any result whose shape depends on values. The kernels are not launched; all code around them runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmatch import kernels
from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.exchange import IdentityExchange
from simmatch.sharding.mesh import Mesh
from simmatch.solvers.bound import Bound

pytest.importorskip("triton", reason="needs Triton, whose kernels are not launched but imported")

CARD = torch.device("cuda", 0)
CHANNELS, CLASSES, IMAGES, POSITIONS = 40, 10, 20, 50

NOT_IN_A_GRAPH = (
    "local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount", "pin_memory",
    "rand", "normal", "uniform", "bernoulli", "multinomial", "lift_fresh", "linalg_check_errors",
)  # fmt: skip
"""Starts of the names of operations that wait for the device, or need a generator of the host."""


class Trace(TorchDispatchMode):
    """The operations of a step, and those among them in which tensors of the host take part.

    A graph would copy such a tensor anew, from memory that is long reused, or keep the value that it had.
    """

    active: Trace | None = None

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.calls: list[str] = []
        self.on_host: list[str] = []

    def __enter__(self) -> Trace:
        Trace.active = self
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        Trace.active = None
        super().__exit__(*reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        self.calls.append(f"{func} {[_constant(value) for value in tree_leaves((args, kwargs))]}")
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        if any(tensor.device != CARD for tensor in tensors):
            self.on_host.append(f"{func} {[tuple(tensor.shape) for tensor in tensors]}")
        return result


def _constant(value: Any) -> Any:
    """What a graph keeps of an argument: of a tensor its place, of which only the shape shows here."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


class NotLaunched:
    """Stands for a compiled kernel; notes its launches in `calls` of the trace that is active."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            if Trace.active is not None:
                values = [_constant(value) for value in tree_leaves((arguments, options))]
                Trace.active.calls.append(f"{self.name} {grid} {values}")

        return launch


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    from simmatch.kernels import certificate, coordinate, gradient, transpose

    for module, kernel in (
        (certificate, "certify"), (coordinate, "descend"), (gradient, "accelerate"), (transpose, "turn"),
    ):  # fmt: skip
        monkeypatch.setattr(module, kernel, NotLaunched(kernel))
    monkeypatch.setattr(kernels, "capability", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    return FakeTensorMode()


def make_layer(split: bool = False, **changes: Any) -> SimilarityMatchingConv2d:
    """On the card; its bound is known, as after an earlier update."""
    if split:
        changes |= {"dynamics": DynamicsConfig(exchange="gather_state"), "mesh": Mesh(), **changes}
    layer = SimilarityMatchingConv2d(1, CHANNELS, 5, normalize="contrast", device=CARD, **changes)
    number = torch.ones((), dtype=torch.float64, device=CARD)
    layer._kept.keep(Bound(number, number.clone(), torch.ones(CHANNELS, device=CARD)), layer.lateral)
    return layer


class Two(IdentityExchange):
    """Two ranks, of which only this one exists."""

    world_size = 2


SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "gather_state": {"split": True},
    "replicas": {"split": True, "mesh": Mesh(replicas=Two(), columns=Two())},
    "supervised": {"num_classes": CLASSES, "label_gain": 1.0, "plasticity": PlasticityConfig(lr_decay_steps=100)},
    "whitened": {"whiten": True, "padding": 2},
    "accelerated": {"dynamics": DynamicsConfig(solver="accelerated")},
}


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_update_neither_waits_for_the_device_nor_copies_to_it(
    setting: str, drawn: bool, card: FakeTensorMode
) -> None:
    """From images as stored, with positions drawn or all of them."""
    with card:
        layer = make_layer(**SETTINGS[setting])
        assert layer.by_kernel
        images = torch.zeros(IMAGES, 1, 28, 28, dtype=torch.uint8, device=CARD)
        labels = torch.zeros(IMAGES, dtype=torch.int64, device=CARD) if layer.num_classes else None

        def step() -> Tensor:
            x = to_unit(images)
            patches = layer.prepare(x, POSITIONS) if drawn else layer.prepare(x)
            return layer.partial_fit(patches, labels, recorded=True).y

        step()  # the first one makes the record of faults
        with Trace() as trace:
            y = step()
        with Trace() as following:
            step()
    assert y.device == CARD
    assert following.calls == trace.calls  # a replay repeats the numbers of the captured update
    assert trace.on_host == []
    assert not [name for name in trace.operations if name.lstrip("_").startswith(NOT_IN_A_GRAPH)]
    assert sum(trace.operations.values()) > 100  # else nothing was traced
    assert [call for call in trace.calls if call.startswith(("descend", "accelerate"))]


def test_the_trace_notices_what_it_looks_for(card: FakeTensorMode) -> None:
    """An update that raises faults reads the device; a table of the host is copied to it."""
    with card:
        layer = make_layer()
        with pytest.raises(DataDependentOutputException):
            layer.partial_fit(torch.zeros(IMAGES, 1, 28, 28, device=CARD))
        with Trace() as trace:
            torch.zeros(3).to(CARD)
    assert any("_to_copy" in operation for operation in trace.on_host)


def test_forbidding_waits_on_a_card_is_no_warning() -> None:
    """Else the first test that forbids them on a card fails, and waits stay forbidden in all that follow."""
    torch._C._cuda_set_sync_debug_mode(0)  # type: ignore[attr-defined]
