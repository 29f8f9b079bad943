"""Commits checkpoints beside the controller's rounds: a store that is slow or hangs keeps nobody from being polled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.checkpoints.checkpoint import Manifest, commit, folder_of, prune, publish_model
from cluster.storage import AnyPath, retry


@dataclass(frozen=True)
class Committed:
    """What became of a checkpoint that all ranks have written, or, without a step, of the exported model.

    `why` it is none, or None where it is one.
    """

    step: int | None
    why: str | None = None


class Committer:
    """Writes manifests in the order they come and deletes what is old; gives the model its place.

    Parameters
    ----------
    run_dir: the run's folder.
    keep: newest checkpoints kept.
    before: called before each commit, for what has to be safe by then; where it raises OSError, there is no commit.
    patience_s: how long an object store that is away is asked again.
    """

    def __init__(
        self, run_dir: AnyPath, keep: int, before: Callable[[], None] = lambda: None, *, patience_s: float = 0.0
    ) -> None:
        self._run_dir, self._keep, self._before, self._patience_s = run_dir, keep, before, patience_s
        self._due: queue.SimpleQueue[Manifest | str] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Committed] = queue.SimpleQueue()
        self._open = 0
        self._thread: threading.Thread | None = None

    def submit(self, due: Manifest | str) -> None:
        """Commit this checkpoint, or publish the model in this folder, after those before it."""
        self._open += 1
        self._due.put(due)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
            self._thread.start()

    def settled(self, limit_s: float) -> list[Committed]:
        """What is known since the last call; waits at most `limit_s` for each that is still open."""
        found = []
        while self._open:
            try:
                found.append(self._outcomes.get(timeout=limit_s))
            except queue.Empty:
                break
            self._open -= 1
        return found

    def _run(self) -> None:
        while True:
            due = self._due.get()
            step, why = None if isinstance(due, str) else due.cursor.step, None
            try:
                retry(partial(self._commit, due), self._patience_s)
            except OSError as error:  # full, gone or away: that costs checkpoints, not the run
                why = " ".join(str(error).split())
            if why is None and step is not None:
                self._prune(step)
            self._outcomes.put(Committed(step, why))

    def _commit(self, due: Manifest | str) -> None:
        if isinstance(due, str):
            publish_model(self._run_dir, due)
            return
        self._before()
        commit(folder_of(self._run_dir, due.cursor.step), due)

    def _prune(self, step: int) -> None:
        try:
            prune(self._run_dir, self._keep, step)
        except OSError:
            return  # what could not be deleted now is deleted after a later commit
