"""Files of images written byte by byte, by other code than that which reads them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values: np.ndarray) -> bytes:
    code = {"uint8": 0x08, "float32": 0x0D}[values.dtype.name]
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
        + values.astype(values.dtype.newbyteorder(">")).tobytes()
    )


def write_mnist(folder: Path, *, train: int = 20, test: int = 10, mark: int = 0, gz: bool = False) -> list[np.ndarray]:
    """Four IDX files of 4 × 3 images; the first pixel of all is `mark`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = []
    for name, count in zip(IDX_FILES, (train, train, test, test), strict=True):
        if "images" in name:
            values = rng.integers(0, 256, (count, 4, 3), dtype=np.uint8)
            values[0, 0, 0] = mark
        else:
            values = rng.integers(0, 10, count, dtype=np.uint8)
        arrays.append(values)
        content = idx_bytes(values)
        (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(content) if gz else content)
    return arrays


def cifar_arrays(count: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and the numpy of its day pickled it: byte strings for keys and for the array's content."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integers(values: list[int]) -> bytes:
        return b"".join(b"J" + struct.pack("<i", value) for value in values)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integers([0, 1]) + b"\x87R"
    dtype += b"(" + integers([3]) + text(b"|") + b"NNN" + integers([-1, -1, 0]) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integers([0]) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + integers([1]) + integers(list(data.shape)) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + integers(labels) + b"eu."
