"""The state of what learns online: tensors by name, from which it goes on to the same bits.

Every stateful part has `state() -> State` and `restore(State)`. A state is saved as safetensors (no pickle), and
named by a digest of all its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simmatch.tensor_files import write_tensors

State = dict[str, Tensor]
"""Tensors by name; numbers are 0-d, in float64 or int64."""


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and all bits of a state, in hexadecimal; the order of names does not matter.

    >>> digest({"a": torch.zeros(2)})[:8], digest({"a": torch.zeros(2, 1)})[:8]
    ('88602bf3', '919d76d2')
    """
    total = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().clone(memory_format=torch.contiguous_format)  # strides of 0 among them
        total.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_state(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Save a state as one safetensors file; it is there whole, or not at all.

    Raises
    ------
    OSError
        The disk is full or gone.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state({"a": torch.ones(2)}, Path(folder) / "state.safetensors")
    ...     load_state(Path(folder) / "state.safetensors")
    {'a': tensor([1., 1.])}
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    write_tensors(Path(path), tensors)


def load_state(path: str | Path) -> State:
    """Load a state that `save_state` saved.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is not safetensors.

    >>> load_state("missing")
    Traceback (most recent call last):
    FileNotFoundError: No such file or directory: missing
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a state in safetensors, got: {error}") from None


def part_of(state: Mapping[str, Tensor], prefix: str) -> State:
    """The part of a state whose names begin with `prefix` and a dot, without them; `joined` puts parts together.

    >>> part_of(joined({"readout": {"a": torch.ones(1)}}), "readout")
    {'a': tensor([1.])}
    """
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> State:
    """The states of several parts as one: `{part}.{name}`.

    >>> sorted(joined({"stack": {"a": torch.ones(1)}, "readout": {"a": torch.ones(1)}}))
    ['readout.a', 'stack.a']
    """
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
