"""Checkpoints: every rank writes its rows, a manifest written last commits them, any shard count reads them.

    RUN_DIR/checkpoints/step-00000123/
        rank-0-of-2.safetensors     rows of rank 0, and the tensors that are equal on all ranks
        rank-1-of-2.safetensors     rows of rank 1
        manifest.json               what they hold; absent until every shard is whole

Ranks write shards and report their digests; the controller, having heard from all, writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simmatch.rows import Rows

FORMAT = 2
MANIFEST = "manifest.json"
DIGEST = "sha256"
"""Key of the manifest's own digest, over everything else in it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One rank's file: its digest, and the rows it holds of every sharded tensor, as [start, stop)."""

    rank: int
    file: str
    sha256: str
    rows: dict[str, list[int]]
    shapes: dict[str, list[int]]


class Cursor(_Record):
    """Where training stood: `updates` of layer `layer` are done, `step` updates in all."""

    step: int
    layer: int
    updates: int


class LayerState(_Record):
    """What a layer needs beside its tensors to continue bit by bit: the bound its next dynamics use."""

    bound: float
    ridge: float


class Manifest(_Record):
    """The commit of one checkpoint."""

    format: int
    cursor: Cursor
    seed: int
    world_size: int
    config: dict[str, Any]
    layers: list[LayerState]
    shards: list[Shard]
    mlflow_run_id: str | None = None
    rate: float = 1.0
    """Learning rates in force, over those of the configuration."""


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def write_shard(folder: Path, rank: int, world_size: int, tensors: dict[str, Tensor], rows: dict[str, Rows]) -> Shard:
    """Write one rank's tensors, atomically; `rows` tells which of them are row ranges of a larger tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}-of-{world_size}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Shard(
        rank=rank,
        file=path.name,
        sha256=digest,
        rows={name: [part.start, part.stop] for name, part in rows.items()},
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
    )


def commit(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the checkpoint one."""
    partial = folder / (MANIFEST + ".partial")
    values = manifest.model_dump(mode="json")
    with partial.open("w") as file:
        json.dump({DIGEST: _digest(values), **values}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


def prune(run_dir: Path, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and what was left uncommitted before them.

    Later ones are of an attempt that had gone further, and was perhaps given up because they are damaged: they neither
    count nor are deleted; training will write them anew.
    """
    folders = sorted(
        folder for folder in (run_dir / "checkpoints").glob("step-*") if folder <= folder_of(run_dir, step)
    )
    committed = [folder for folder in folders if (folder / MANIFEST).exists()]
    if len(committed) > keep:
        for folder in folders[: folders.index(committed[-keep])]:
            shutil.rmtree(folder)


def _digest(values: dict[str, Any]) -> str:
    """Of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def newest_good(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Folder of the newest checkpoint of a run that is what its manifest says, every shard read and compared.

    warn: told, in one line that names the file, why a newer one is passed over.
    """
    for path in sorted((run_dir / "checkpoints").glob(f"step-*/{MANIFEST}"), reverse=True):
        try:
            Reader(path.parent, read_manifest(path.parent))
        except CheckpointError as error:
            warn(f"{path.parent.name} is damaged and passed over: {error}")
        else:
            return path.parent
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its shards' presence checked.

    Raises
    ------
    CheckpointError
        It is missing, not ours, or names files that are not there.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text())
        digest = values.pop(DIGEST, None) if isinstance(values, dict) else None
        manifest = Manifest.model_validate(values)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the manifest of a checkpoint, found no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a manifest, {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a manifest that can be read, {error.strerror or error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {manifest.format}")
    if digest != _digest(values):
        raise CheckpointError(f"{path}: expected a manifest as it was written, got one whose sha256 is another")
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or not (folder / shard.file).is_file():
            raise CheckpointError(f"{path}: expected the shard {shard.file} beside it, found no such file")
    return manifest


class Reader:
    """Tensors of a checkpoint by row range, whatever the number of shards that wrote it.

    Raises
    ------
    CheckpointError
        A shard is not the file that the manifest describes, or a tensor has another shape than asked for.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        for shard in manifest.shards:
            try:
                with (folder / shard.file).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{folder / shard.file}: expected a shard, {error.strerror or error}") from None
            if digest != shard.sha256:
                raise CheckpointError(
                    f"{folder / shard.file}: expected sha256 {shard.sha256[:12]}…, got {digest[:12]}…"
                )

    def rows(self, key: str, rows: Rows) -> Tensor:
        """Rows start … stop − 1 of a sharded tensor, from whichever files hold them."""
        parts = []
        for shard in self._holding(key):
            start, stop = shard.rows[key]
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                with self._open(shard) as file:
                    parts.append(file.get_slice(key)[first - start : last - start])
        found = torch.cat(parts) if parts else torch.empty(0)
        if found.shape[0] != rows.count:
            raise CheckpointError(
                f"{self.folder}: expected rows {rows.start} to {rows.stop} of {key}, found {found.shape[0]} of them"
            )
        return found

    def whole(self, key: str) -> Tensor:
        """A tensor that is equal on all ranks."""
        for shard in self._holding(key):
            with self._open(shard) as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        raise CheckpointError(f"{self.folder}: expected the tensor {key}, found none")

    def check_channels(self, key: str, channels: int) -> None:
        """Refuse a sharded tensor that does not have this many rows in all."""
        found = sum(stop - start for start, stop in (shard.rows[key] for shard in self._holding(key)))
        if found != channels:
            raise CheckpointError(f"{self.folder}: expected {channels} channels in {key}, got {found}")

    def _holding(self, key: str) -> Iterable[Shard]:
        return [shard for shard in sorted(self.manifest.shards, key=lambda shard: shard.rank) if key in shard.shapes]

    def _open(self, shard: Shard) -> Any:
        try:
            return safe_open(self.folder / shard.file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / shard.file}: {error}") from None


def load_into(target: Tensor, found: Tensor, key: str, folder: Path) -> None:
    """Copy a tensor of a checkpoint into a buffer of the same shape and dtype."""
    if found.shape != target.shape or found.dtype != target.dtype:
        raise CheckpointError(
            f"{folder}: {key}: expected shape {list(target.shape)} of {target.dtype}, "
            f"got {list(found.shape)} of {found.dtype}"
        )
    target.copy_(found)
