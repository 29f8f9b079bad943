"""Writes a rank's shards of checkpoints, in a thread beside training.

The training thread only pays for a copy of its rows. Nothing is exchanged between ranks here: the controller, which is
told of every shard, knows when all ranks have written theirs.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoints.manifest import Cursor, LayerState, Shard, folder_of
from cluster.messages import Outbox, ShardFailed, ShardWritten
from cluster.storage import AnyPath, write_whole
from simmatch.remote import retry
from simmatch.sharding.rows import Rows

WriteShard = Callable[[AnyPath, int, int, dict[str, Tensor], dict[str, Rows]], Shard]


def write_shard(
    folder: AnyPath, rank: int, world_size: int, tensors: dict[str, Tensor], rows: dict[str, Rows], token: str = ""
) -> Shard:
    """Write one rank's tensors, whole or not at all; `rows` names those that are row ranges of a larger tensor.

    token: of the group that writes. A rank of an abandoned group may still run; it never touches a later group's files.

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
    except SafetensorError as error:  # which the library raises on a full disk
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


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The content of a rank's shard; nobody changes the tensors.

    Attributes
    ----------
    rows: of the tensors that are row ranges of a larger one.
    layers: goes into the manifest.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, Rows]
    layers: list[LayerState]


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
            self._report.send(ShardWritten(cursor, shard, snapshot.layers))

    def _note_failing(self, _: OSError) -> None:
        self._failing = True

    def _lost(self, cursor: Cursor, reason: str) -> None:
        self._report.send(ShardFailed(cursor.step, reason))
