"""The manifest of a checkpoint: what its shards hold and where training stood. A checkpoint without one is none.

    RUN_DIR/checkpoints/step-00000123/
        rank-0-of-2.safetensors     rows of rank 0, and the tensors that are equal on all ranks
        rank-1-of-2.safetensors     rows of rank 1
        manifest.json               absent until every shard is whole
    RUN_DIR/checkpoints/constants/
        SHA256.safetensors          a layer that has learnt, or a whitening: written once, named in many manifests

Ranks write shards and report their digests (`shard_writer`); the controller, having heard from all of them, writes the
manifest (`committer`); any number of ranks reads the tensors by row range (`reader`). Where two attempts work in one
run directory, `cluster.fence` decides whose checkpoints count. RUN_DIR may be a folder or a URI (`cluster.storage`).

Nothing random is stored: every draw is a pure function of the seed and of how many updates are done, so a cursor is
all that training needs to continue bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field

from cluster.storage import AnyPath, is_local, read, write_whole
from simmatch.config import ConfigError, Frozen, NonNegativeFloat, NonNegativeInt, parse
from simmatch.documents import DocumentError, dump_json, load_json, quoted

FORMAT = 4
MANIFEST = "manifest.json"
CONSTANTS = "constants"
DIGEST = "sha256"
"""Key of the manifest's own digest, over everything else in it."""

RETIRED = {"seed", "world_size", "mlflow_run_id", "mlflow_layer_run_ids", "last_step_sent"}
RETIRED_OF_A_LAYER = {"bound", "ridge"}
"""Keys of format 2 that nothing reads: the configuration holds the first two, the spool's offset file the ids, and the
bound follows from M."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class DamagedError(CheckpointError):
    """A shard that is missing or not what its manifest says: an earlier checkpoint may be sound."""


class TensorFile(Frozen):
    """A file of a checkpoint: its digest, its tensors, and the rows it holds of the sharded ones, as [start, stop)."""

    sha256: str
    size_bytes: NonNegativeInt | None = None
    """None in checkpoints of earlier versions."""
    rows: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    shapes: dict[str, list[NonNegativeInt]]


class Shard(TensorFile):
    """One rank's file."""

    rank: NonNegativeInt
    file: Annotated[str, Field(pattern=r"^rank-\d+-of-\d+(-\w+)?\.safetensors$")]
    arithmetic: str | None = None
    """What the last bits depend on, see `simmatch.devices.arithmetic`; None where an earlier version wrote it."""

    def path(self, folder: AnyPath) -> AnyPath:
        """Where it is; `folder` is that of the checkpoint."""
        return folder / self.file


class Constant(TensorFile):
    """Tensors that do not change any more, in a file beside the checkpoints, named by its content."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.sha256}.safetensors"

    def path(self, folder: AnyPath) -> AnyPath:
        """Where it is; `folder` is that of a checkpoint."""
        return folder.parent / CONSTANTS / self.file


class Cursor(Frozen):
    """Where training stood: `updates` of layer `layer` are done, `step` updates of `images` images in all.

    The data cursor is part of it: the next batch is number `updates` modulo the batches of an epoch, in the order that
    is drawn from (seed, epoch), see `simmatch.data.order`.
    """

    step: NonNegativeInt
    layer: NonNegativeInt
    updates: NonNegativeInt
    images: NonNegativeInt = 0
    """0 where an earlier version wrote it."""


class LayerState(Frozen):
    """What is recorded of a layer beside its tensors.

    usual: bound that its growth is measured from while it learns, see `cluster.monitors.GrowthMonitor`.
    """

    usual: NonNegativeFloat | None = None


class Manifest(Frozen):
    """The commit of one checkpoint."""

    format: int = FORMAT
    cursor: Cursor
    config: dict[str, Any]
    layers: list[LayerState]
    shards: list[Shard]
    constants: list[Constant] = Field(default_factory=list)
    """None in checkpoints of earlier versions, whose shards hold everything."""

    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rates in force, over those of the configuration."""

    data: str | None = None
    """Digest of the data set, see `simmatch.data.sources.Dataset.digest`; None where an earlier version wrote it."""

    @property
    def files(self) -> list[Shard | Constant]:
        """All files that the checkpoint consists of."""
        return [*self.shards, *self.constants]


def folder_of(run_dir: AnyPath, step: int) -> AnyPath:
    """The folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def digest_of(values: dict[str, Any]) -> str:
    """Digest of a manifest's content, independent of its layout."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_values(manifest: Manifest) -> dict[str, Any]:
    """What is written of a manifest: its content and its digest."""
    values = manifest.model_dump(mode="json")
    return {DIGEST: digest_of(values), **values}


def write_manifest(folder: AnyPath, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint with its digest.

    Raises
    ------
    OSError
        The disk, or the object store, did not take it.
    """
    write_whole(folder / MANIFEST, dump_json(manifest_values(manifest)))


def read_manifest(folder: AnyPath) -> Manifest:
    """The manifest of a checkpoint, of this version or an earlier one.

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
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the manifest of a checkpoint, found no such file") from None
    except DocumentError as error:
        raise CheckpointError(f"{path}: expected a manifest, {error}") from None
    except OSError as error:
        if not is_local(path):
            raise
        raise CheckpointError(f"{path}: expected a manifest that can be read, {error.strerror or error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a manifest, got {type(values).__name__}")
    if values.get("format") not in (2, 3, FORMAT):
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {quoted(values.get('format'))}")
    digest = values.pop(DIGEST, None)
    try:
        manifest = parse(Manifest, _of_this_format(values))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if digest != digest_of(values):
        raise CheckpointError(f"{path}: expected a manifest as it was written, got one whose sha256 is another")
    return manifest


def readable_manifest(folder: AnyPath | None) -> Manifest | None:
    """The manifest of a checkpoint; None without a checkpoint, or where it cannot be read, which the ranks report."""
    try:
        return None if folder is None else read_manifest(folder)
    except (CheckpointError, OSError):
        return None


def cursor_of(manifest: Manifest | None) -> Cursor:
    """Where training stood; at the beginning without a manifest."""
    return Cursor(step=0, layer=0, updates=0) if manifest is None else manifest.cursor


def _of_this_format(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of an earlier format as one of this: format 2 without its retired keys, format 3 as it is."""
    layers = values.get("layers")
    if values["format"] != 2 or not isinstance(layers, list):
        return {**values, "format": FORMAT}
    kept = [_without(layer, RETIRED_OF_A_LAYER) if isinstance(layer, dict) else layer for layer in layers]
    return {**_without(values, RETIRED), "format": FORMAT, "layers": kept}


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
