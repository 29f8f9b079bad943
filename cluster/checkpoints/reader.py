"""Reads checkpoints: tensors by row range, and the newest checkpoint of a run that is sound."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    Constant,
    DamagedError,
    Manifest,
    Shard,
    read_manifest,
)
from cluster.storage import AnyPath, fetch, find, is_local
from simmatch.remote import retry
from simmatch.sharding.rows import Rows

File = Shard | Constant


class Reader:
    """Tensors of a checkpoint by row range, whatever the number of ranks that wrote it.

    A shard is compared with its digest when it is first read, so that a rank only pays for what it needs; `verify`
    reads all of them. Shards of an object store are read from local copies, which are deleted with the reader; a store
    that does not answer is asked again for `patience_s`.

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
        for file in self.manifest.files:
            self._file(file)

    def rows(self, key: str, rows: Rows) -> Tensor:
        """Rows start … stop − 1 of a sharded tensor, from whichever files hold them."""
        parts = []
        for shard, start, stop in self._rows_of(key):
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                parts.append(self._get(shard, key, slice(first - start, last - start)))
        tensor = torch.cat(parts) if parts else torch.empty(0)
        if tensor.shape[0] != rows.count:
            raise CheckpointError(
                f"{self.folder}: expected rows {rows.start} to {rows.stop} of {key}, found {tensor.shape[0]} of them"
            )
        return tensor

    def whole(self, key: str) -> Tensor:
        """A tensor that is equal on all ranks."""
        for shard in self._holding(key):
            return self._get(shard, key, None)
        raise CheckpointError(f"{self.folder}: expected the tensor {key}, found none")

    def check_channels(self, key: str, channels: int) -> None:
        """Refuse a sharded tensor that does not have this many rows in all."""
        stored = sum(stop - start for _, start, stop in self._rows_of(key))
        if stored != channels:
            raise CheckpointError(f"{self.folder}: expected {channels} channels in {key}, got {stored}")

    def _holding(self, key: str) -> list[File]:
        return [file for file in self.manifest.files if key in file.shapes]

    def _rows_of(self, key: str) -> Iterator[tuple[File, int, int]]:
        for file in sorted(self._holding(key), key=lambda file: file.rows.get(key, [0])[0]):
            if key not in file.rows:
                raise CheckpointError(f"{file.path(self.folder)}: expected rows of {key}, found none")
            start, stop = file.rows[key]
            yield file, start, stop

    def _file(self, file: File) -> Path:
        """The file on this machine, its digest compared."""
        path = file.path(self.folder)
        if path.name in self._checked:
            return self._checked[path.name]
        try:
            local = retry(lambda: fetch(path, self._folder_of_copies), self._patience_s)
            if local.is_symlink() or (local.exists() and not local.is_file()):  # another file's, or a pipe that hangs
                raise DamagedError(f"{path}: expected a file of the checkpoint, found a link or something else")
            with local.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except FileNotFoundError:
            raise DamagedError(f"{path}: expected the file that the manifest names, found none") from None
        except OSError as error:
            if not is_local(path):
                raise
            raise DamagedError(f"{path}: expected a file that can be read, {error.strerror or error}") from None
        if digest != file.sha256:
            raise DamagedError(f"{path}: expected sha256 {file.sha256[:12]}…, got {digest[:12]}…")
        self._checked[path.name] = local
        return local

    def _folder_of_copies(self) -> Path:
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="simmatch-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return self._copies

    def _get(self, file: File, key: str, rows: slice | None) -> Tensor:
        try:
            with safe_open(self._file(file), framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
                return tensor
        except SafetensorError as error:
            raise CheckpointError(f"{file.path(self.folder)}: {error}") from None


def load_into(target: Tensor, stored: Tensor, key: str, folder: AnyPath) -> None:
    """Copy a tensor of a checkpoint into a buffer of the same shape and dtype."""
    if stored.shape != target.shape or stored.dtype != target.dtype:
        raise CheckpointError(
            f"{folder}: {key}: expected shape {list(target.shape)} of {target.dtype}, "
            f"got {list(stored.shape)} of {stored.dtype}"
        )
    target.copy_(stored)


def newest_good(run_dir: AnyPath, warn: Callable[[str], None]) -> AnyPath | None:
    """Folder of the newest checkpoint of a run that is what its manifest says, every shard read and compared.

    warn: called with one line, which names the file, for every newer checkpoint that is skipped.

    Raises
    ------
    OSError
        An object store does not answer, so what it holds is unknown.
    """
    for path in reversed(find(run_dir / "checkpoints", f"step-*/{MANIFEST}")):
        try:
            Reader(path.parent, read_manifest(path.parent)).verify()
        except CheckpointError as error:
            warn(f"{path.parent.name} is damaged and passed over: {error}")
        else:
            return path.parent
    return None
