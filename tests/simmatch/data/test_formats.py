"""Files are checked against values written here and against other readers; whatever is wrong is one line."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simmatch.data.formats import DataError, read_cifar_batch, read_idx
from tests.image_files import IDX_FILES, cifar_arrays, idx_bytes, python2_batch, write_mnist

# -- IDX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_values_come_back(tmp_path, dtype, compress):
    values = np.random.default_rng(1).uniform(0, 255, (5, 4, 3)).astype(dtype)
    path = tmp_path / "images"
    path.write_bytes(compress(idx_bytes(values)))
    assert torch.equal(read_idx(path, 3), torch.from_numpy(values))


def test_idx_agrees_with_torchvision(tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    write_mnist(tmp_path)
    assert torch.equal(read_idx(tmp_path / IDX_FILES[0], 3), read_image_file(str(tmp_path / IDX_FILES[0])))
    assert torch.equal(read_idx(tmp_path / IDX_FILES[1], 1).long(), read_label_file(str(tmp_path / IDX_FILES[1])))


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "starts with 00 00, got ''"),
        (b"\0\0", "starts with 00 00, got '00 00'"),
        (b"\x01" + GOOD[1:], "starts with 00 00, got '01 00 08 03'"),
        (GOOD[:2] + b"\x0b" + GOOD[3:], "type code 0x08 .* got 0x0b"),
        (GOOD[:3] + b"\x01" + GOOD[4:], "expected 3 dimensions, got 1"),
        (GOOD[:9], "header of 16 bytes, got 9"),
        (GOOD[:-1], r"expected 24 bytes after the header for sizes \(2, 4, 3\), got 23"),
        (GOOD + b"\0", "expected 24 bytes .* got more"),
        (gzip.compress(GOOD[:-5], mtime=0), "expected 24 bytes .* got 19"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b" + GOOD, "cannot be read"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 0, 3), r"at least 1, got \(2, 0, 3\)"),
        # declares 79 octillion bytes: refused without an attempt to hold them
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"abc", "expected 79228162458924105385300197375 bytes .* got 3"),
    ],
)
def test_idx_fault_is_one_line_naming_the_file(tmp_path, content, expected):
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_idx_fuzzed_is_read_or_refused(tmp_path, data):
    """Any bytes either parse to exactly what their header declares or give a DataError."""
    start = data.draw(st.sampled_from([b"", b"\0\0\x08\x03", b"\0\0\x0d\x03", b"\x1f\x8b\x08\0", GOOD[:16], GOOD]))
    sizes = data.draw(
        st.just(b"") | st.lists(st.integers(0, 3), min_size=3, max_size=3).map(lambda s: struct.pack(">3I", *s))
    )
    content = bytearray(start + sizes + data.draw(st.binary(max_size=80)))
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3)):
        if position < len(content):
            content[position] = value
    wrapped = data.draw(st.sampled_from([bytes, gzip.compress]))(bytes(content))
    path = tmp_path / "fuzzed"
    path.write_bytes(wrapped)
    try:
        values = read_idx(path, 3)
    except DataError:
        return
    shape = struct.unpack(">3I", content[4:16])
    assert tuple(values.shape) == shape
    dtype = np.dtype({0x08: ">u1", 0x0D: ">f4"}[content[2]])
    assert len(content) == 16 + math.prod(shape) * dtype.itemsize
    assert values.numpy().tobytes() == np.frombuffer(content[16:], dtype).astype(dtype.newbyteorder("=")).tobytes()


def test_idx_gzip_bomb_is_not_held(tmp_path):
    """A megabyte that unpacks to a gigabyte is refused after the bytes that its header declares."""
    import tracemalloc

    packer = gzip.zlib.compressobj(9, gzip.zlib.DEFLATED, 31)
    zeros = bytes(1 << 24)
    content = packer.compress(GOOD) + b"".join(packer.compress(zeros) for _ in range(16)) + packer.flush()
    (tmp_path / "bomb").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="got more"):
        read_idx(tmp_path / "bomb", 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:numpy.core.multiarray is deprecated:DeprecationWarning")  # the oracle's import
def test_cifar_batch_of_python_2_agrees_with_pickle(tmp_path):
    data, labels = cifar_arrays(3)
    content = python2_batch(data, labels)
    oracle = pickle.loads(content, encoding="latin1")
    assert np.array_equal(oracle["data"], data)
    (tmp_path / "data_batch_1").write_bytes(content)
    images, read_labels = read_cifar_batch(tmp_path / "data_batch_1")
    assert np.array_equal(images.numpy(), data.reshape(3, 3, 32, 32))
    assert read_labels.tolist() == oracle["labels"] == labels
    assert read_labels.dtype == torch.int64


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batch_of_python_3(tmp_path, order, protocol):
    data, labels = cifar_arrays(2)
    content = pickle.dumps({"data": np.array(data, order=order), "labels": labels}, protocol)
    (tmp_path / "test_batch").write_bytes(content)
    images, read_labels = read_cifar_batch(tmp_path / "test_batch")
    assert np.array_equal(images.numpy(), data.reshape(2, 3, 32, 32))
    assert read_labels.tolist() == labels


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_cifar_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Bomb(marker), "labels": []}, 2))
    with pytest.raises(DataError, match=r"data_batch_1: expected a batch of CIFAR-10: it names __builtin__\.getattr"):
        read_cifar_batch(tmp_path / "data_batch_1")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data_batch_1.bin", bytes(3072), "multiple of 3073 bytes, got 3072"),
        ("data_batch_1.bin", b"", "multiple of 3073 bytes, got 0"),
        ("data_batch_1", b"", "expected a batch"),
        ("data_batch_1", b"\x80\x02r\xff\xff\xff\xff.", "expected a batch"),
        ("data_batch_1", python2_batch(*cifar_arrays(2))[:-200], "expected a batch"),
        ("data_batch_1", python2_batch(cifar_arrays(2)[0], [1]), "expected 2 integer labels, got 1"),
        ("data_batch_1", python2_batch(np.zeros((2, 5), np.uint8), [1, 2]), r"data \[n, 3072\], got u1 \(2, 5\)"),
    ],
)
def test_cifar_fault_names_the_file(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_cifar_batch(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
