"""Checkpoints: every rank writes its rows, a manifest written last commits them, any shard count reads them.

    RUN_DIR/checkpoints/step-00000123/
        rank-0-of-2.safetensors     rows of rank 0, and the tensors that are equal on all ranks
        rank-1-of-2.safetensors     rows of rank 1
        manifest.json               what they hold; absent until every shard is whole

Ranks write shards and report their digests; the controller, having heard from all, writes the manifest. RUN_DIR may be
a folder or a URI (`cluster.storage`); shards of an object store are read through a local copy.

Nothing random is stored: every draw is a pure function of the seed and of how many updates are done, so a cursor is
all that training needs to go on bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.storage import (
    AnyPath,
    exists,
    fetch,
    find,
    is_local,
    move_files,
    read,
    remove,
    retry,
    size_bytes,
    write_whole,
)
from simmatch.config import NonNegativeFloat, NonNegativeInt
from simmatch.documents import DocumentError, load_json
from simmatch.model import MODEL_FILES
from simmatch.sharding.rows import Rows

FORMAT = 2
MANIFEST = "manifest.json"
MODEL = "model"
"""Folder of the exported model."""
MODEL_OF_A_GROUP = re.compile(rf"{MODEL}-[0-9a-f]{{8}}")
"""Folders of models that have not got this place, by the token of their group; a person's own are left alone."""
DIGEST = "sha256"
"""Key of the manifest's own digest, over everything else in it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class DamagedError(CheckpointError):
    """A shard that is missing or not what its manifest says: an earlier checkpoint may be sound."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One rank's file: its digest, and the rows it holds of every sharded tensor, as [start, stop)."""

    rank: NonNegativeInt
    file: Annotated[str, Field(pattern=r"^rank-\d+-of-\d+(-\w+)?\.safetensors$")]
    sha256: str
    size_bytes: NonNegativeInt | None = None
    """None in checkpoints of earlier versions."""
    rows: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    shapes: dict[str, list[NonNegativeInt]]


class Cursor(_Record):
    """Where training stood: `updates` of layer `layer` are done, `step` updates of `images` images in all.

    The data cursor is part of it: the next batch is number `updates` modulo the batches of an epoch, in the order that
    is drawn from (seed, epoch), see `simmatch.data.order`.
    """

    step: NonNegativeInt
    layer: NonNegativeInt
    updates: NonNegativeInt
    images: NonNegativeInt = 0
    """0 where an earlier version wrote it."""


class LayerState(_Record):
    """What is recorded of a layer beside its tensors; M and `perron`, among these, determine the bound.

    bound, ridge: see `simmatch.solvers.bound.Bound`.
    usual: bound that its growth is measured from while it learns, see `cluster.watch.Growth`.
    """

    bound: NonNegativeFloat
    ridge: NonNegativeFloat
    usual: NonNegativeFloat | None = None


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
    mlflow_layer_run_ids: dict[str, str] = {}
    last_step_sent: dict[str, int] = {}
    """Layer → last step of its metrics that the tracking server has confirmed."""

    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rates in force, over those of the configuration."""

    data: str | None = None
    """Digest of the data set, see `simmatch.data.sources.Dataset.digest`; None where an earlier version wrote it."""


def folder_of(run_dir: AnyPath, step: int) -> AnyPath:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def write_shard(
    folder: AnyPath, rank: int, world_size: int, tensors: dict[str, Tensor], rows: dict[str, Rows], token: str = ""
) -> Shard:
    """Write one rank's tensors, whole or not at all; `rows` tells which of them are row ranges of a larger tensor.

    token: of the group that writes. A rank that was given up but still runs never touches what a later group writes.

    Raises
    ------
    OSError
        The disk, or the object store, did not take it.
    """
    name = f"rank-{rank}-of-{world_size}{f'-{token}' if token else ''}.safetensors"
    written: list[tuple[str, int]] = []

    def save(file: Path) -> None:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)
        with file.open("rb") as content:
            written.append((hashlib.file_digest(content, "sha256").hexdigest(), file.stat().st_size))

    try:
        write_whole(folder / name, save)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{folder / name}: {error}") from error
    ((digest, size_bytes),) = written
    return Shard(
        rank=rank,
        file=name,
        sha256=digest,
        size_bytes=size_bytes,
        rows={name: [part.start, part.stop] for name, part in rows.items()},
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
    )


def commit(folder: AnyPath, manifest: Manifest) -> None:
    """Write the manifest, which makes the checkpoint one, once every shard is seen from here as its rank wrote it.

    Shards of a group that was given up at this step may lie beside it; nobody names them, and they go with the folder.

    Raises
    ------
    OSError
        A shard is not there: the rank that wrote it reaches another place under the same name. Or what the disk says.
    """
    for shard in manifest.shards:
        found = size_bytes(folder / shard.file)
        if found is None or shard.size_bytes not in (None, found):
            told = f"expected {shard.size_bytes} bytes of rank {shard.rank}, got {found or 'nothing'}"
            raise OSError(f"{folder / shard.file}: {told}; does every node reach the same run directory?")
    values = manifest.model_dump(mode="json")
    write_whole(folder / MANIFEST, json.dumps({DIGEST: _digest(values), **values}, indent=1).encode())


def publish_model(run_dir: AnyPath, name: str) -> None:
    """Give the model in folder `name`, which one group has written, its place, and remove those of other groups.

    Raises
    ------
    OSError
        It is not there, or the disk or the object store says no.
    """
    for file in MODEL_FILES:
        if size_bytes(run_dir / name / file) is None:
            raise OSError(f"{run_dir / name / file}: expected the model of rank 0, got nothing")
    move_files(run_dir / name, run_dir / MODEL, MODEL_FILES)
    with suppress(OSError):
        for left in find(run_dir, f"{MODEL}-*"):
            if MODEL_OF_A_GROUP.fullmatch(left.name):
                remove(left)


def prune(run_dir: AnyPath, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and what was left uncommitted before them.

    Later ones are of an attempt that had gone further, and was perhaps given up because they are damaged: they neither
    count nor are deleted; training will write them anew.
    """
    newest = folder_of(run_dir, step).name
    folders = [folder for folder in find(run_dir / "checkpoints", "step-*") if folder.name <= newest]
    committed = [folder for folder in folders if exists(folder / MANIFEST)]
    if len(committed) > keep:
        for folder in folders[: folders.index(committed[-keep])]:
            remove(folder)


def _digest(values: dict[str, Any]) -> str:
    """Of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def newest_good(run_dir: AnyPath, warn: Callable[[str], None]) -> AnyPath | None:
    """Folder of the newest checkpoint of a run that is what its manifest says, every shard read and compared.

    warn: told, in one line that names the file, why a newer one is passed over.

    Raises
    ------
    OSError
        An object store does not answer: what it holds is not known, which is not the same as nothing.
    """
    for path in reversed(find(run_dir / "checkpoints", f"step-*/{MANIFEST}")):
        try:
            Reader(path.parent, read_manifest(path.parent)).verify()
        except CheckpointError as error:
            warn(f"{path.parent.name} is damaged and passed over: {error}")
        else:
            return path.parent
    return None


def read_manifest(folder: AnyPath) -> Manifest:
    """The manifest of a checkpoint.

    Raises
    ------
    CheckpointError
        It is missing, damaged or not ours.
    OSError
        An object store does not answer.
    """
    path = folder / MANIFEST
    try:
        values = load_json(read(path))
        digest = values.pop(DIGEST, None) if isinstance(values, dict) else None
        manifest = Manifest.model_validate(values)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the manifest of a checkpoint, found no such file") from None
    except (DocumentError, ValidationError) as error:
        raise CheckpointError(f"{path}: expected a manifest, {str(error).splitlines()[0]}") from None
    except OSError as error:
        if not is_local(path):
            raise
        raise CheckpointError(f"{path}: expected a manifest that can be read, {error.strerror or error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {manifest.format}")
    if digest != _digest(values):
        raise CheckpointError(f"{path}: expected a manifest as it was written, got one whose sha256 is another")
    return manifest


class Reader:
    """Tensors of a checkpoint by row range, whatever the number of shards that wrote it.

    A shard is compared with its digest when it is first read, so that a rank pays for what it needs only; `verify`
    reads all. Shards of an object store are read from copies, which go with the reader; a store that does not answer is
    asked again for `patience_s`.

    Raises
    ------
    CheckpointError
        From any method: a shard is missing or not the file that the manifest describes, or a tensor has another shape
        than asked for.
    OSError
        An object store does not answer.
    """

    def __init__(self, folder: AnyPath, manifest: Manifest, *, patience_s: float = 0.0) -> None:
        self.folder, self.manifest, self._patience_s = folder, manifest, patience_s
        self._copies: Path | None = None
        self._checked: dict[str, Path] = {}

    def verify(self) -> None:
        """Compare every shard with its digest."""
        for shard in self.manifest.shards:
            self._file(shard)

    def rows(self, key: str, rows: Rows) -> Tensor:
        """Rows start … stop − 1 of a sharded tensor, from whichever files hold them."""
        parts = []
        for shard, start, stop in self._rows_of(key):
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                parts.append(self._get(shard, key, slice(first - start, last - start)))
        found = torch.cat(parts) if parts else torch.empty(0)
        if found.shape[0] != rows.count:
            raise CheckpointError(
                f"{self.folder}: expected rows {rows.start} to {rows.stop} of {key}, found {found.shape[0]} of them"
            )
        return found

    def whole(self, key: str) -> Tensor:
        """A tensor that is equal on all ranks."""
        for shard in self._holding(key):
            return self._get(shard, key, None)
        raise CheckpointError(f"{self.folder}: expected the tensor {key}, found none")

    def check_channels(self, key: str, channels: int) -> None:
        """Refuse a sharded tensor that does not have this many rows in all."""
        found = sum(stop - start for _, start, stop in self._rows_of(key))
        if found != channels:
            raise CheckpointError(f"{self.folder}: expected {channels} channels in {key}, got {found}")

    def _holding(self, key: str) -> list[Shard]:
        return [shard for shard in sorted(self.manifest.shards, key=lambda shard: shard.rank) if key in shard.shapes]

    def _rows_of(self, key: str) -> Iterator[tuple[Shard, int, int]]:
        for shard in self._holding(key):
            if key not in shard.rows:
                raise CheckpointError(f"{self.folder}: expected rows of {key} in {shard.file}, found none")
            start, stop = shard.rows[key]
            yield shard, start, stop

    def _file(self, shard: Shard) -> Path:
        """The shard on this machine, its digest compared."""
        if shard.file in self._checked:
            return self._checked[shard.file]
        path = self.folder / shard.file
        try:
            found = retry(lambda: fetch(path, self._folder_of_copies), self._patience_s)
            if found.is_symlink() or (found.exists() and not found.is_file()):  # another file's, or a pipe that hangs
                raise DamagedError(f"{path}: expected a file of the checkpoint, found a link or something else")
            with found.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DamagedError(f"{path}: expected the shard that the manifest names, found no such file") from None
        except OSError as error:
            if not is_local(path):
                raise
            raise DamagedError(f"{path}: expected a shard, {error.strerror or error}") from None
        if digest != shard.sha256:
            raise DamagedError(f"{path}: expected sha256 {shard.sha256[:12]}…, got {digest[:12]}…")
        self._checked[shard.file] = found
        return found

    def _folder_of_copies(self) -> Path:
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="simmatch-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return self._copies

    def _get(self, shard: Shard, key: str, rows: slice | None) -> Tensor:
        try:
            with safe_open(self._file(shard), framework="pt") as file:
                tensor: Tensor = file.get_tensor(key) if rows is None else file.get_slice(key)[rows]
                return tensor
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / shard.file}: {error}") from None


def load_into(target: Tensor, found: Tensor, key: str, folder: AnyPath) -> None:
    """Copy a tensor of a checkpoint into a buffer of the same shape and dtype."""
    if found.shape != target.shape or found.dtype != target.dtype:
        raise CheckpointError(
            f"{folder}: {key}: expected shape {list(target.shape)} of {target.dtype}, "
            f"got {list(found.shape)} of {found.dtype}"
        )
    target.copy_(found)
