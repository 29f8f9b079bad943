"""A CUDA graph that is only pretended: the operations of a capture, repeated later on the memory that they used.

As on a device

* capturing runs nothing: memory from before is afterwards as it was, and that of tensors made meanwhile holds garbage;
* waiting for a value is an error while capturing;
* a replay repeats the operations with the numbers, shapes and addresses of then. What Python would decide or compute
  otherwise by now, and memory in the place of which there is other memory by now, it does not see;
* torch does not count what a replay writes.

So an update that keeps a value in Python, in a tensor that is replaced later, or in one that a capture has made, has
other bits than one that is not captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")

READ = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount")
"""Operations whose result is a value, or has a shape that depends on values."""

NOT_CAPTURED = "operation not permitted when stream is capturing"
"""Start of the message of what cannot be captured."""

GARBAGE = 0xFF
"""Every byte of memory that nothing has written to: NaN, or −1."""


class Tape(TorchDispatchMode):
    """Notes operations on tensors in the memory of the host in the graph that records them, while it is entered.

    Attributes
    ----------
    recording: the graph that captures; None: none does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording: TapeGraph | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recording is None:
            return func(*args, **kwargs)
        return self.recording.note(func, args, kwargs)


class TapeGraph:
    """A `simmatch.captured.Graph` of operations on tensors in the memory of the host.

    Parameters
    ----------
    tape: of a pretended GPU, which hands over its operations while this graph captures. None: all operations are noted.
    fault: what happens at the end of a capture.

    Attributes
    ----------
    replays: their number; closed: whether its memory has been released.
    """

    def __init__(self, tape: Tape | None = None, fault: Exception | None = None) -> None:
        self._tape, self._fault = tape, fault
        self.replays, self.closed = 0, False
        self._steps: list[tuple[Any, Any, Any, dict[int, Tensor]]] = []  # the last: which results have own memory
        self._made: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # written to, and a copy

    def capture(self, function: Callable[[], T]) -> T:
        tape = self._tape or Tape()
        tape.recording = self
        try:
            if self._tape is not None:
                result = function()
            else:
                with tape:
                    result = function()
            if self._fault is not None:
                raise self._fault
            return result
        finally:
            tape.recording = None
            for storage, held in self._before.values():
                storage.copy_(held)
            for storage in self._made.values():
                storage.fill_(GARBAGE)
            self._before.clear()

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of a capture."""
        if func.overloadpacket.__name__ in READ:
            raise RuntimeError(f"{NOT_CAPTURED}: {func}")
        given = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        known, written = {storage._cdata for storage in given}, _written(func, args, kwargs)
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self._before.setdefault(storage._cdata, (storage, storage.clone()))
        result = func(*args, **kwargs)
        new = {}
        for place, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self._made[storage._cdata] = storage
                new[place] = _uncounted(tensor)
        if new or written:
            self._steps.append((func, *tree_map_only(Tensor, _uncounted, (args, kwargs)), new))
        return result

    def replay(self) -> None:
        assert not self.closed
        self.replays += 1
        with _disable_current_modes(), torch.inference_mode():  # tensors of either mode can be written to there
            for func, args, kwargs, new in self._steps:
                results = tree_leaves(func(*args, **kwargs))
                for place, target in new.items():
                    target.copy_(results[place])

    def close(self) -> None:
        self.closed = True
        self._steps.clear()


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    parameters = func._schema.arguments
    values = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | kwargs
    named = (values.get(each.name) for each in parameters if each.alias_info is not None and each.alias_info.is_write)
    return [tensor for tensor in tree_leaves(list(named)) if isinstance(tensor, Tensor)]


def _uncounted(tensor: Tensor) -> Tensor:
    """The same memory, writes to which torch counts elsewhere."""
    return tensor if tensor.is_inference() else tensor.data
