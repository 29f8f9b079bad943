"""Writes a rank's shards of checkpoints, in a thread beside training.

The training thread only pays for a copy of its rows. Nothing is exchanged between ranks here: the controller, which is
told of every shard, knows when all ranks have written theirs.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.checkpoints.manifest import CONSTANTS, Constant, Cursor, LayerState, Shard, folder_of
from cluster.messages import Outbox, ShardFailed, ShardWritten
from cluster.storage import AnyPath, copy_whole, size_bytes, write_whole
from simmatch.files import make_folder
from simmatch.remote import retry
from simmatch.sharding.rows import Rows
from simmatch.tensor_files import save_tensors

WriteShard = Callable[[AnyPath, int, int, dict[str, Tensor], dict[str, Rows]], Shard]


def write_shard(
    folder: AnyPath,
    rank: int,
    world_size: int,
    tensors: dict[str, Tensor],
    rows: dict[str, Rows],
    token: str = "",
    arithmetic: str | None = None,
) -> Shard:
    """Write one rank's tensors, whole or not at all; `rows` names those that are row ranges of a larger tensor.

    token: of the group that writes. A rank of an abandoned group may still run; it never touches a later group's files.
    arithmetic: what the last bits depend on here, for the manifest.

    Raises
    ------
    OSError
        The disk, or the object store, did not take it.
    """
    name = f"rank-{rank}-of-{world_size}{f'-{token}' if token else ''}.safetensors"
    written: list[dict[str, Any]] = []
    write_whole(folder / name, lambda file: written.append(_save(tensors, rows, file, folder / name)))
    return Shard(rank=rank, file=name, arithmetic=arithmetic, **written[0])


def write_constant(folder: AnyPath, tensors: dict[str, Tensor], rows: dict[str, Rows]) -> Constant:
    """Write tensors that will not change into a file named by its content, beside the checkpoint `folder`.

    Raises
    ------
    OSError
        The disk, or the object store, did not take it.
    """
    local = folder if isinstance(folder, Path) else None  # what is left there if killed goes with the checkpoint
    if local is not None:
        make_folder(local)
    with tempfile.TemporaryDirectory(prefix="simmatch-", dir=local) as own:
        file = Path(own) / "constant"
        constant = Constant(**_save(tensors, rows, file, folder.parent / CONSTANTS))
        copy_whole(file, constant.path(folder))
    return constant


def _save(tensors: dict[str, Tensor], rows: dict[str, Rows], file: Path, target: AnyPath) -> dict[str, Any]:
    """Save tensors to a file of this machine; returns what a manifest says of them. `target` is for the message."""
    save_tensors(file, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, target=target)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {
        "sha256": digest,
        "size_bytes": file.stat().st_size,
        "rows": {name: [part.start, part.stop] for name, part in rows.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a rank has to write; nobody changes the tensors.

    Attributes
    ----------
    rows: of the tensors that are row ranges of a larger one.
    layers: by their index, what goes into the manifest.
    constants: tensors that will not change, and their rows, by a name; they are written once.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, Rows]
    layers: dict[int, LayerState]
    constants: dict[str, tuple[dict[str, Tensor], dict[str, Rows]]] = field(default_factory=dict)


class ShardWriter:
    """Writes one rank's shards, one at a time, and reports each.

    A disk that is full or gone costs checkpoints, not the run: a shard that cannot be written is reported as
    `ShardFailed`, and so is one that is due while the one before it is still not written. An object store that does not
    answer is asked again for `patience_s`; training does not wait for it meanwhile.

    Parameters
    ----------
    run_dir: the run's folder; rank, world_size: whose shards these are.
    patience_s: longest wait of training for the previous checkpoint; for a store that hangs it waits once.
    write: writes a shard; tests replace it.

    Attributes
    ----------
    seconds: spent here by the training thread.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        rank: int,
        world_size: int,
        report: Outbox,
        *,
        patience_s: float,
        write: WriteShard = write_shard,
    ) -> None:
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.seconds = 0.0
        self._report, self._patience_s, self._write = report, patience_s, write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._writing: Cursor | None = None
        self._hangs = self._failing = False
        self._constants: dict[str, Constant] = {}

    def submit(self, cursor: Cursor, take: Callable[[], Snapshot], *, needed: bool = False) -> None:
        """Write the snapshot that `take` returns now, as the checkpoint of `cursor`.

        needed: wait for the previous one even if its store hangs or does not answer, for no other will follow soon.

        Raises
        ------
        Exception
            The error of an earlier write, unless the disk or the store raised it.
        """
        with self._timed():
            stuck = self._hangs or self._failing
            if self._finish(0.0 if stuck and not needed else self._patience_s):
                self._writing = cursor
                self._thread = threading.Thread(target=self._run, args=(cursor, take()), name="shards", daemon=True)
                self._thread.start()
            else:
                reason = ": its store does not answer" if self._failing else f" after {self._patience_s:g} s"
                self._lost(cursor, f"the one before it is not written{reason}")

    def close(self) -> None:
        """Wait for the last shard, as long as `patience_s` allows; raises as `submit` does."""
        with self._timed():
            if not self._finish(self._patience_s) and self._writing is not None:
                self._lost(self._writing, f"it is not written after {self._patience_s:g} s")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started

    def _finish(self, limit_s: float) -> bool:
        """Wait for the present write; returns whether it has ended."""
        if self._thread is not None:
            self._thread.join(limit_s)
            self._hangs = self._thread.is_alive()
            if self._hangs:
                return False
            self._thread = None
        if self._error is not None:
            raise self._error
        return True

    def _run(self, cursor: Cursor, snapshot: Snapshot) -> None:
        folder = folder_of(self.run_dir, cursor.step)
        self._failing = False
        try:
            constants = retry(
                lambda: [self._constant(folder, name, *part) for name, part in snapshot.constants.items()],
                self._patience_s,
                self._note_failing,
            )
            shard = retry(
                lambda: self._write(folder, self.rank, self.world_size, snapshot.tensors, snapshot.rows),
                self._patience_s,
                self._note_failing,
            )
        except OSError as error:
            self._lost(cursor, " ".join(str(error).split()))
        except BaseException as error:
            self._error = error
        else:
            self._report.send(ShardWritten(cursor, shard, snapshot.layers, constants))

    def _constant(self, folder: AnyPath, name: str, tensors: dict[str, Tensor], rows: dict[str, Rows]) -> Constant:
        """Write a constant, unless this writer has done so and the file is still there."""
        known = self._constants.get(name)
        if known is None or size_bytes(known.path(folder)) != known.size_bytes:
            known = self._constants[name] = write_constant(folder, tensors, rows)
        return known

    def _note_failing(self, _: OSError) -> None:
        self._failing = True

    def _lost(self, cursor: Cursor, reason: str) -> None:
        self._report.send(ShardFailed(cursor.step, reason))
