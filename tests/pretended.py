"""A GPU that is only pretended: its tensors are in the memory of the host, and say that they are on `cuda:0`.

All values are real, so what runs there can be compared with the CPU, bit by bit. An operation on tensors of both places
is an error, as on a GPU, and what a host would wait for is noted. The dynamics are solved by `scripted`, on either.
Updates are captured and replayed as on a GPU (`tests.tape`).

Operations in other threads are not intercepted where they make a tensor from nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from simmatch import kernels, learning
from tests.simmatch.kernels import scripted
from tests.tape import NOT_CAPTURED, READ, Tape, TapeGraph

CARD = torch.device("cuda", 0)

OURS = re.compile(r"/(simmatch|cluster|jobs)/(?!.*/tests/)[^.]*[.]py$")

COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take indices of the host, and wait where they are a mask on the GPU."""


class CardTensor(Tensor):
    """A tensor of the pretended GPU; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CardTensor:
        options: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor: CardTensor = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CARD, **options)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(func, args, kwargs or {}, [], None)

    # what torch makes of a tensor's memory, past all operations

    def new_tensor(self, data: Any) -> Tensor:
        return torch.tensor(data, dtype=self.dtype).to(CARD)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Card(TorchDispatchMode):
    """While it is entered, `cuda` is the pretended GPU.

    Attributes
    ----------
    waits: where the host has waited, `module.function`.
    tape: knows which graph captures.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(func, args, kwargs or {}, self.waits, self.tape.recording)


@dataclass(frozen=True)
class Place:
    """Where `cuda` is, for tests that know both.

    Attributes
    ----------
    tolerance: relative difference of what is learnt there from what is learnt on the CPU: rounding, or other solvers.
    real: whether it is a CUDA device.
    """

    tolerance: float
    real: bool


def perform(func: Any, args: Any, kwargs: Any, waits: list[str], graph: TapeGraph | None) -> Any:
    """One operation, on the values in the memory of the host; noted in the graph that captures, if there is one."""
    name = func.overloadpacket.__name__
    on_card: dict[int, Tensor] = {}
    of_host: list[Tensor] = []
    held = _held([args, kwargs], on_card, of_host)
    if on_card and name not in (*COPIES, *INDEXED) and any(tensor.ndim > 0 for tensor in of_host):
        raise RuntimeError(f"expected all tensors on the same device, got cuda:0 and cpu: {func}")
    device = kwargs.get("device")
    there = bool(on_card) if device is None else torch.device(device).type == "cuda"
    if name == "copy_":
        there = isinstance(args[0], CardTensor)
    if name == "_pin_memory":
        return args[0].clone()
    if there and name in COPIES and of_host and not _without_waiting(args, kwargs):
        if graph is not None:
            raise RuntimeError(f"{NOT_CAPTURED}: a copy from the host, {func}")
        waits.append(_place())
    if on_card:
        masks = name in INDEXED and any(isinstance(each, CardTensor) and each.dtype == torch.bool for each in args[1])
        if masks or name in READ or not there:
            if graph is not None:
                raise RuntimeError(f"{NOT_CAPTURED}: {func}")
            waits.append(_place())
    if device is not None and there:
        held[1]["device"] = "cpu"
    if not there:
        return func(*held[0], **held[1])
    return _put(func(*held[0], **held[1]) if graph is None else graph.note(func, *held), on_card)


def _without_waiting(args: Any, kwargs: Any) -> bool:
    """Whether a copy is to be started only."""
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _held(value: Any, on_card: dict[int, Tensor], of_host: list[Tensor]) -> Any:
    """The values of tensors of the GPU, in any form; `on_card` gets these tensors by their values, `of_host` others."""
    if isinstance(value, CardTensor):
        on_card[id(value.held)] = value
        return value.held
    if isinstance(value, Tensor):
        of_host.append(value)
    elif isinstance(value, dict):
        return {key: _held(each, on_card, of_host) for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        return [_held(each, on_card, of_host) for each in value]
    return value


def _put(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else CardTensor(value)
    return type(value)(_put(each, known) for each in value) if isinstance(value, (list, tuple)) else value


def _place() -> str:
    """The function of ours that is at work."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not OURS.search(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


def solve(
    tape: Tape, solver: str, drive: Tensor, system: kernels.System, *others: Any, **options: Any
) -> kernels.KernelSolution:
    """`scripted.solve`, on the values."""
    on_card: dict[int, Tensor] = {}
    held = _held([drive, system.lateral, system.ridge, system.bound, others, options], on_card, [])
    with _disable_current_modes(), nullcontext() if tape.recording is None else tape:
        found = scripted.solve(solver, held[0], kernels.System(*held[1:4]), *held[4], **held[5])
    values = (found.y, found.iterations, found.residual)
    return kernels.KernelSolution(*map(CardTensor, values)) if on_card else found


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A pretended GPU, for this thread."""
    pytest.importorskip("triton", reason="needs a torch for CUDA, with which Triton comes")
    torch._C._ensureCUDADeviceGuardSet()
    scripted.use(monkeypatch)
    tape = Tape()
    monkeypatch.setattr(kernels, "solve", partial(solve, tape))
    monkeypatch.setattr(kernels, "capability", lambda device: None if device.type == "cpu" else 9)
    monkeypatch.setattr(learning, "new_graph", lambda device: TapeGraph(tape) if device.type == "cuda" else None)
    for name, value in {"_lazy_init": None, "get_device_name": "pretended", "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with Card(tape) as card:
        yield card
