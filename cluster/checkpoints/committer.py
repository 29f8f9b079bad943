"""Commits checkpoints, publishes the model and deletes old checkpoints, in a thread of the controller's process.

A store that is slow or hangs does not keep the controller from polling its ranks.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from cluster.checkpoints.manifest import (
    CONSTANTS,
    MANIFEST,
    CheckpointError,
    Manifest,
    Shard,
    folder_of,
    manifest_values,
    read_manifest,
    write_manifest,
)
from cluster.fence import UNFENCED, AttemptLostError, Entry, Unfenced
from cluster.storage import AnyPath, copy_whole, exists, find, remove, size_bytes, write_whole
from simmatch.documents import dump_json
from simmatch.model import MODEL_FILES
from simmatch.remote import retry

MODEL = "model"
"""Folder of the exported model."""
MODEL_OF_A_GROUP = re.compile(rf"{MODEL}-[0-9a-f]{{8}}")
"""Folders of models that are not published, by the token of their group; a person's own folders do not match."""
CONSTANT = re.compile(r"[0-9a-f]{64}\.safetensors(\.partial)?")
"""Files of constants; nobody else's match, wherever a link in place of their folder leads."""


def commit(folder: AnyPath, manifest: Manifest, fence: Unfenced = UNFENCED) -> None:
    """Write the manifest, which commits the checkpoint, once every shard is visible here as its rank wrote it.

    Shards of an abandoned group may lie in the same folder; no manifest names them, and they are deleted with it.

    Raises
    ------
    AttemptLostError
        Another attempt has taken over the run.
    OSError
        A shard is not there, because the rank that wrote it reaches another folder under the same name; or the disk or
        the object store did not take the manifest.
    """
    for file in manifest.files:
        size = size_bytes(path := file.path(folder))
        if size is None or file.size_bytes not in (None, size):
            rank = file.rank if isinstance(file, Shard) else 0
            difference = f"expected {file.size_bytes} bytes of rank {rank}, got {size or 'nothing'}"
            raise OSError(f"{path}: {difference}; does every node reach the same run directory?")
    fence.commit("checkpoint", step=manifest.cursor.step, manifest=manifest_values(manifest))
    write_manifest(folder, manifest)


def complete_commit(run_dir: AnyPath, entry: Entry | None) -> bool:
    """Write the manifest of a checkpoint whose attempt took its entry and ended before it had written that.

    Only once another attempt has begun, for which `entry` was the newest one. Returns whether there was one to write.

    Raises
    ------
    OSError
        The disk, or the object store, does not answer.
    """
    if entry is None or entry.manifest is None or entry.step is None:
        return False
    path = folder_of(run_dir, entry.step) / MANIFEST
    if exists(path):
        return False
    write_whole(path, dump_json(entry.manifest))
    return True


def publish_model(run_dir: AnyPath, name: str, fence: Unfenced = UNFENCED) -> None:
    """Copy the model that one group has written to folder `name` into `model`, and remove the folders of all groups.

    Raises
    ------
    AttemptLostError
        Another attempt has taken over the run.
    OSError
        It is not there, or the disk or the object store did not take it.
    """
    for file in MODEL_FILES:
        if size_bytes(run_dir / name / file) is None:
            raise OSError(f"{run_dir / name / file}: expected the model of rank 0, got nothing")
    for file in MODEL_FILES:
        fence.check()
        copy_whole(run_dir / name / file, run_dir / MODEL / file)
    with suppress(OSError):
        for left in find(run_dir, f"{MODEL}-*"):
            if MODEL_OF_A_GROUP.fullmatch(left.name):
                fence.check()
                remove(left)


def prune(run_dir: AnyPath, keep: int, step: int, fence: Unfenced = UNFENCED) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and uncommitted folders before them.

    Also kept is the newest checkpoint of an earlier layer: it is whole where a constant is damaged that all later ones
    name, the layer that has learnt since.

    Later ones belong to an attempt that had gone further, and was perhaps abandoned because they are damaged: they
    neither count nor are deleted; training will write them again.
    """
    newest = folder_of(run_dir, step).name
    folders = [folder for folder in find(run_dir / "checkpoints", "step-*") if folder.name <= newest]
    committed = [folder for folder in folders if exists(folder / MANIFEST)]
    if len(committed) > keep:
        earlier = _of_an_earlier_layer(committed)
        for folder in folders[: folders.index(committed[-keep])]:
            if folder != earlier:
                fence.check()
                remove(folder)


def _of_an_earlier_layer(committed: list[AnyPath]) -> AnyPath | None:
    """The newest of these checkpoints whose layer is before that of the last one; None if there is none."""
    with suppress(CheckpointError, OSError):
        layer = read_manifest(committed[-1]).cursor.layer
        for folder in reversed(committed) if layer > 0 else ():
            if read_manifest(folder).cursor.layer < layer:
                return folder
    return None


def remove_unnamed(run_dir: AnyPath, fence: Unfenced = UNFENCED) -> None:
    """Delete constants that no manifest names.

    Only before a group starts: constants of a group stay in use to its end, and are written before a manifest names
    them.

    Raises
    ------
    AttemptLostError
        Another attempt has taken over the run.
    CheckpointError, OSError
        A manifest cannot be read. What it names is unknown, so nothing is deleted.
    """
    checkpoints = run_dir / "checkpoints"
    present = find(checkpoints / CONSTANTS, "*")
    if present:
        manifests = [read_manifest(path.parent) for path in find(checkpoints, f"*/{MANIFEST}")]
        named = {constant.file for manifest in manifests for constant in manifest.constants}
        for path in present:
            if CONSTANT.fullmatch(path.name) and path.name not in named:
                fence.check()
                remove(path)


@dataclass(frozen=True)
class Committed:
    """The outcome for a checkpoint that all ranks have written, or, without a step, for the exported model.

    reason: the error; None on success.
    """

    step: int | None
    reason: str | None = None


class Committer:
    """Writes manifests in order and deletes old checkpoints; publishes the model.

    Parameters
    ----------
    run_dir: the run's folder.
    keep: number of newest checkpoints kept.
    before: called before each commit, for what has to be stored by then; if it raises OSError, there is no commit.
    patience_s: how long an object store that does not answer is asked again.
    fence: of this attempt. Once it has lost the run, nothing is written or deleted any more.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        keep: int,
        before: Callable[[], None] = lambda: None,
        *,
        patience_s: float = 0.0,
        fence: Unfenced = UNFENCED,
    ) -> None:
        self._run_dir, self._keep, self._before, self._patience_s = run_dir, keep, before, patience_s
        self._fence = fence
        self._due: queue.SimpleQueue[Manifest | str | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Committed] = queue.SimpleQueue()
        self._open = 0
        self._thread: threading.Thread | None = None

    def submit(self, due: Manifest | str) -> None:
        """Commit this checkpoint, or publish the model in this folder, after those before it."""
        self._open += 1
        self._put(due)

    def start_group(self) -> None:
        """A new group starts: delete what groups before it have left, after their commits and before its own."""
        self._put(None)

    def _put(self, due: Manifest | str | None) -> None:
        self._due.put(due)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
            self._thread.start()

    def settled(self, limit_s: float) -> list[Committed]:
        """Outcomes since the last call; waits at most `limit_s` for each that is still open."""
        outcomes = []
        while self._open:
            try:
                outcomes.append(self._outcomes.get(timeout=limit_s))
            except queue.Empty:
                break
            self._open -= 1
        return outcomes

    def _run(self) -> None:
        while True:
            due = self._due.get()
            if due is None:
                with suppress(CheckpointError, OSError, AttemptLostError):  # tried again before the next group
                    remove_unnamed(self._run_dir, self._fence)
                continue
            step, reason = None if isinstance(due, str) else due.cursor.step, None
            try:
                retry(partial(self._commit, due), self._patience_s)
            except (OSError, AttemptLostError) as error:  # a full disk or a lost store costs checkpoints, not the run
                reason = " ".join(str(error).split())
            if reason is None and step is not None:
                with suppress(OSError, AttemptLostError):  # tried again after the next commit
                    prune(self._run_dir, self._keep, step, self._fence)
                    self._fence.prune()
            self._outcomes.put(Committed(step, reason))

    def _commit(self, due: Manifest | str) -> None:
        if isinstance(due, str):
            self._fence.commit("model")
            publish_model(self._run_dir, due, self._fence)
            return
        self._fence.check()
        self._before()
        commit(folder_of(self._run_dir, due.cursor.step), due, self._fence)
