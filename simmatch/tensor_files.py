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
    try:
        write_whole(path, lambda partial: save_file(dict(tensors), partial, metadata))
    except SafetensorError as error:  # which the library raises for a full disk as well
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number is not None else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
