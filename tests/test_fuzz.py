"""What is read from outside, damaged in every way: one clear error or the right content, never anything else.

`SIMMATCH_FUZZ` examples of each, 100 unless set; `make test-faults` takes 2,000.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoints.committer import commit
from cluster.checkpoints.manifest import MANIFEST, CheckpointError, Cursor, LayerState, Manifest, read_manifest
from cluster.checkpoints.reader import Reader
from cluster.checkpoints.shard_writer import write_shard
from cluster.config import RunConfig
from jobs.options import override, read_yaml
from simmatch.config import ConfigError, parse
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError, read_idx
from simmatch.data.sources import load_dataset
from simmatch.sharding.rows import Rows, split_rows
from tests.image_files import idx_bytes
from tests.own_images import items, write_parquet, write_tars

EXAMPLES = int(os.environ.get("SIMMATCH_FUZZ", "100"))
fuzz = settings(max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.timeout(900)

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"
NAMES = ("digits", "fashion_mnist", "mnist", "cifar10")


# -- damage ------------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes flipped, cut out, put in, doubled, cut off; up to four times."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(damaged) - 1, draw(st.sampled_from([16, 64, len(damaged)]))))))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "end", "double"]))
        if kind == "flip" and damaged:
            damaged[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and damaged:
            damaged[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + draw(st.integers(1, 8))]
        elif kind == "insert":
            damaged[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "end":
            del damaged[at:]
        else:
            damaged += damaged[at : at + 64]
    return bytes(damaged)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["full", "auto", "1e9999", "../x", "s3://x", "\0", "-1", "nan"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


def places(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value within."""
    nested: list[tuple[Any, Any]] = []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        nested += [(values, key), *places(value)]
    return nested


@st.composite
def changed(draw: st.DrawFn, values: Any) -> Any:
    """Plain values of which one to three were replaced, removed, renamed or added to."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        every = places(values)
        if not every:
            break
        container, key = every[draw(st.integers(0, len(every) - 1))]
        kind = draw(st.sampled_from(["replace", "near", "remove", "add"]))
        if kind == "replace":
            container[key] = draw(VALUES)
        elif kind == "near" and isinstance(container[key], int | float):
            container[key] = draw(st.sampled_from([0, -1, 1, 0.5, 2 * container[key], -container[key], 10**9, 1e308]))
        elif kind == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            container.append(draw(VALUES))
    return values


def one_line(error: Exception, path: Path | None = None) -> None:
    """An error for people, which names the file; the jobs print its words on one line."""
    text = str(error)
    assert text.strip()
    assert "Traceback" not in text
    assert path is None or str(path) in text


def assert_printable(error: Exception) -> None:
    assert str(error).isprintable()


# -- IDX files ---------------------------------------------------------------------------------------------------------

ARRAY = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
FLOATS = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 4, 3)


def as_idx(content: bytes, dims: int) -> np.ndarray | None:
    """Another reader's opinion, by the format's description: the array, or None where the file is wrong."""
    if len(content) < 4 + 4 * dims or content[:2] != b"\0\0" or content[3] != dims:
        return None
    dtype = {0x08: ">u1", 0x0D: ">f4"}.get(content[2])
    shape = struct.unpack_from(f">{dims}I", content, 4)
    if dtype is None or 0 in shape:
        return None
    body = content[4 + 4 * dims :]
    return np.frombuffer(body, dtype).reshape(shape) if len(body) == math.prod(shape) * int(dtype[2]) else None


@pytest.fixture(scope="module")
def idx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx") / "file"


@fuzz
@given(data=st.data(), zipped=st.booleans(), array=st.sampled_from([ARRAY, FLOATS]))
def test_idx_files(idx_path: Path, data: st.DataObject, zipped: bool, array: np.ndarray) -> None:
    content = idx_bytes(array)
    written = data.draw(damage(gzip.compress(content, mtime=0) if zipped else content))
    idx_path.write_bytes(written)
    unzipped: bytes | None = written
    if written[:2] == b"\x1f\x8b":
        try:
            unzipped = gzip.decompress(written)
        except Exception:
            unzipped = None
    expected = None if unzipped is None else as_idx(unzipped, 3)
    try:
        values = read_idx(idx_path, 3)
    except DataError as error:
        one_line(error, idx_path)
        values = None
    assert (values is None) == (expected is None), written
    if values is not None and expected is not None:
        assert np.array_equal(values.numpy(), expected.astype(values.numpy().dtype), equal_nan=True)


@fuzz
@given(content=st.binary(max_size=200))
def test_bytes_that_were_never_idx(idx_path: Path, content: bytes) -> None:
    idx_path.write_bytes(content)
    with pytest.raises(DataError):
        read_idx(idx_path, 3)


# -- own images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@fuzz
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of a damaged image
def test_files_of_own_images(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    """Damage is found when the images are listed or decoded, or it has changed their content."""
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if suffix == ".tar":
            [whole] = write_tars(folder, items(8), shards=1).iterdir()
        else:
            whole = write_parquet(folder / "a.parquet", items(8))
        path.write_bytes(data.draw(damage(whole.read_bytes())))
    try:
        dataset = load_dataset(DataConfig(path=str(path), test_fraction=0.4, size=4, channels=3))
    except (DataError, ConfigError) as error:
        one_line(error)
        assert_printable(error)
    else:
        assert dataset.train_images.shape[1:] == (3, 4, 4)
        assert -1 <= int(dataset.train_labels.min()) <= int(dataset.train_labels.max()) < dataset.num_classes


# -- manifests and shards ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "step"
    shards = []
    for rank, rows in enumerate(split_rows(6, 2)):
        tensors = {"w": torch.arange(6.0)[rows.start : rows.stop, None]}
        shards.append(write_shard(folder, rank, 2, tensors, {"w": rows}))
    manifest = Manifest(
        cursor=Cursor(step=4, layer=0, updates=4),
        config={"name": "x", "mesh": {"channel": 2}},
        layers=[LayerState(usual=2.0)],
        shards=shards,
    )
    commit(folder, manifest)
    return folder, json.loads((folder / MANIFEST).read_text())


def load(folder: Path) -> torch.Tensor | None:
    """The whole of w, or None after one clear error."""
    try:
        reader = Reader(folder, read_manifest(folder))
        reader.check_channels("w", 6)
        return reader.rows("w", Rows.all(6))
    except CheckpointError as error:
        one_line(error, folder)
        return None


def refused_or_right(folder: Path, values: dict[str, Any], written: bytes) -> None:
    """With these bytes for a manifest; afterwards the sound one is back."""
    (folder / MANIFEST).write_bytes(written)
    try:
        tensor = load(folder)
    finally:
        (folder / MANIFEST).write_text(json.dumps(values))
    assert tensor is None or torch.equal(tensor, torch.arange(6.0)[:, None])


@fuzz
@given(data=st.data())
def test_manifests_with_other_values(checkpoint: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, values = checkpoint
    refused_or_right(folder, values, json.dumps(data.draw(changed(values))).encode())


@fuzz
@given(data=st.data())
def test_manifests_with_other_bytes(checkpoint: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, values = checkpoint
    refused_or_right(folder, values, data.draw(damage(json.dumps(values).encode())))


@fuzz
@given(data=st.data(), rank=st.sampled_from([0, 1]))
def test_shards_with_other_bytes(checkpoint: tuple[Path, dict[str, Any]], data: st.DataObject, rank: int) -> None:
    folder, _ = checkpoint
    path = folder / f"rank-{rank}-of-2.safetensors"
    content = path.read_bytes()
    damaged = data.draw(damage(content))
    path.write_bytes(damaged)
    try:
        assert (load(folder) is None) == (damaged != content)
    finally:
        path.write_bytes(content)


# -- configurations ----------------------------------------------------------------------------------------------------


def accepted(values: Any) -> RunConfig | None:
    """The configuration, or None after one clear error."""
    try:
        config = parse(RunConfig, values)
        config.check_mesh()
    except ConfigError as error:
        one_line(error)
        return None
    return config


@fuzz
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_configurations_with_other_values(data: st.DataObject, name: str) -> None:
    values = data.draw(changed(read_yaml(CONFIGS / f"{name}.yaml")))
    config = accepted(values)
    if config is not None:  # then it says the same after a round trip through its file
        dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
        assert parse(RunConfig, dumped) == config


@fuzz
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_configurations_with_other_bytes(tmp_path_factory: Any, data: st.DataObject, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(data.draw(damage((CONFIGS / f"{name}.yaml").read_bytes())))
    try:
        values = read_yaml(path)
    except ConfigError as error:
        one_line(error)
        return
    accepted(values)


@fuzz
@given(
    key=st.one_of(
        st.text(max_size=12), st.sampled_from(["mesh.channel", "model.layers.0.pool", "model.layers.9.x", "data"])
    ),
    text=st.text(max_size=12),
)
def test_overrides(key: str, text: str) -> None:
    try:
        values = override(read_yaml(CONFIGS / "digits.yaml"), [f"{key}={text}"])
    except ConfigError as error:
        one_line(error)
        return
    accepted(values)
