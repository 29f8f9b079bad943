"""Readers of image file formats: IDX (MNIST and similar data sets) and the batches of CIFAR-10.

No content of a file is ever executed. Any fault in a file is a `DataError` with a one-line message.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """Images or labels cannot be used. The one-line message names the file or the data set, and the fault.

    >>> read_idx(Path("missing-idx3-ubyte"), num_dims=3)
    Traceback (most recent call last):
    simmatch.data.formats.DataError: missing-idx3-ubyte: cannot be read: [Errno 2] No such file or directory: ...
    """


@contextmanager
def errors_name(key: str) -> Iterator[None]:
    """Every `DataError` about a place begins with the key that gives the place.

    >>> with errors_name("data.path"):
    ...     raise DataError("/nowhere: no such folder")
    Traceback (most recent call last):
    simmatch.data.formats.DataError: data.path: /nowhere: no such folder
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


_IDX_DTYPES: dict[int, np.dtype[Any]] = {0x08: np.dtype(np.uint8), 0x0D: np.dtype(">f4")}


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read an IDX file of uint8 or float32 values, plain or gzipped.

    Parameters
    ----------
    path: the file.
    num_dims: expected number of dimensions: 3 for images, 1 for labels.

    Returns
    -------
    uint8 or float32, of the shape that the file declares.

    Raises
    ------
    DataError
        The file is not of this format, or longer or shorter than it declares. No more than the declared length is
        held in memory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels-idx1-ubyte")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    ...     read_idx(path, num_dims=1)
    tensor([7, 8, 9], dtype=torch.uint8)
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            return _parse_idx(gzip.GzipFile(fileobj=raw) if is_gzip else raw, path, num_dims)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _parse_idx(file: IO[bytes] | gzip.GzipFile, path: Path, num_dims: int) -> Tensor:
    header = _read(file, 4 + 4 * num_dims)
    if header[:2] != b"\0\0" or len(header) < 4:
        raise DataError(f"{path}: expected an IDX file, which starts with 00 00, got '{header[:4].hex(' ')}'")
    dtype = _IDX_DTYPES.get(header[2])
    if dtype is None:
        raise DataError(f"{path}: expected IDX type code 0x08 (uint8) or 0x0d (float32), got 0x{header[2]:02x}")
    if header[3] != num_dims:
        raise DataError(f"{path}: expected {num_dims} dimensions, got {header[3]}")
    if len(header) < 4 + 4 * num_dims:
        raise DataError(f"{path}: expected a header of {4 + 4 * num_dims} bytes, got {len(header)}")
    shape = struct.unpack_from(f">{num_dims}I", header, 4)
    if 0 in shape:
        raise DataError(f"{path}: expected sizes of at least 1, got {shape}")
    expected = math.prod(shape) * dtype.itemsize
    body = _read(file, expected + 1)
    if len(body) != expected:
        given = len(body) if len(body) < expected else "more"
        raise DataError(f"{path}: expected {expected} bytes after the header for sizes {shape}, got {given}")
    values = np.frombuffer(body, dtype).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=False))


def _read(file: IO[bytes] | gzip.GzipFile, limit: int) -> bytearray:
    """Read at most `limit` bytes, in pieces: memory is allocated only for bytes that exist, not for a declared size."""
    content = bytearray()
    while len(content) < limit and (piece := file.read(min(limit - len(content), 1 << 20))):
        content += piece
    return content


class _Recorded:
    """Placeholder for the numpy objects named in a pickle: stores its arguments and runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The C unpickler would allocate a memo table as large as an index in the file; the Python one uses a dict.
class _BatchUnpickler(pickle._Unpickler):
    """Reads a CIFAR batch. Names outside `allowed` are an error, and no name is ever imported."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _Recorded


_CIFAR_SHAPE = (3, 32, 32)


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of CIFAR-10: of the binary version if its suffix is `.bin`, else of the python version.

    Returns
    -------
    Images uint8 [n, 3, 32, 32] and labels int64 [n].

    Raises
    ------
    DataError
        The file is not of this format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "data_batch_1.bin")
    ...     _ = path.write_bytes(bytes([9] + [0] * 3072))
    ...     images, labels = read_cifar_batch(path)
    >>> images.shape, labels
    (torch.Size([1, 3, 32, 32]), tensor([9]))
    """
    try:
        content = path.read_bytes()
        images, labels = _parse_binary(content) if path.suffix == ".bin" else _parse_pickle(content)
        return torch.from_numpy(images.reshape(-1, *_CIFAR_SHAPE)), torch.tensor(labels, dtype=torch.int64)
    except Exception as error:  # a damaged pickle can raise almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected a batch of CIFAR-10: {reason}") from None


def _parse_binary(content: bytes) -> tuple[np.ndarray, list[int]]:
    size = 1 + math.prod(_CIFAR_SHAPE)
    if not content or len(content) % size:
        raise ValueError(f"expected a multiple of {size} bytes, got {len(content)}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, 1:].copy(), records[:, 0].tolist()


def _parse_pickle(content: bytes) -> tuple[np.ndarray, list[int]]:
    # latin1 turns the byte strings of Python 2 into text, one character a byte
    batch = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    labels, (_, shape, dtype, is_fortran, raw) = batch["labels"], batch["data"].state
    raw = raw.args[0] if isinstance(raw, _Recorded) else raw
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if dtype.args[0] != "u1" or len(shape) != 2 or shape[1] != math.prod(_CIFAR_SHAPE) or len(raw) != math.prod(shape):
        raise ValueError(f"expected uint8 data [n, {math.prod(_CIFAR_SHAPE)}], got {dtype.args[0]} {shape}")
    if len(labels) != shape[0] or not all(type(label) is int for label in labels):
        raise ValueError(f"expected {shape[0]} integer labels, got {len(labels)} values")
    images = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    return images.copy(order="C"), labels
