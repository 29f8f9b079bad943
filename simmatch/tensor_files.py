"""Files of tensors, written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from simmatch.files import write_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a complete safetensors file, as `write_whole` does. The tensors are contiguous, and share no memory.

    Raises
    ------
    OSError
        The file could not be written: the disk is full, for example. An existing file of that name is unchanged.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder, "state.safetensors"), {"a": torch.ones(2)})
    ...     len(Path(folder, "state.safetensors").read_bytes())
    72
    """
    write_whole(path, lambda partial: save_tensors(partial, tensors, metadata, target=path))


def save_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, target: object
) -> None:
    """Write a safetensors file that will become, or become part of, `target`.

    Raises
    ------
    OSError
        The file could not be written; the error names `target`.

    >>> import torch
    >>> save_tensors(Path("/no/such/folder/part"), {"a": torch.ones(2)}, target="checkpoint-3")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'checkpoint-3'
    """
    try:
        save_file(dict(tensors), file, metadata)
    except SafetensorError as error:  # which the library raises for a full disk as well
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number is not None else errno.EIO
        raise OSError(code, os.strerror(code), str(target)) from error
