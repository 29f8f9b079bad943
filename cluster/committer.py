"""Commits checkpoints beside the controller's rounds: a store that is slow or hangs keeps nobody from being polled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.checkpoint import Manifest, commit, folder_of, prune
from cluster.storage import AnyPath, persist


@dataclass(frozen=True)
class Committed:
    """What became of a checkpoint that all ranks have written: `why` it is none, or None where it is one."""

    step: int
    why: str | None = None


class Committer:
    """Writes manifests in the order they come, and deletes what is old.

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
        self._due: queue.SimpleQueue[Manifest] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Committed] = queue.SimpleQueue()
        self._open = 0
        self._thread: threading.Thread | None = None

    def submit(self, manifest: Manifest) -> None:
        """Commit this one, after those before it."""
        self._open += 1
        self._due.put(manifest)
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
            manifest = self._due.get()
            step, why = manifest.cursor.step, None
            try:
                persist(partial(self._commit, manifest), self._patience_s)
            except OSError as error:  # full, gone or away: that costs checkpoints, not the run
                why = " ".join(str(error).split())
            if why is None:
                self._prune(step)
            self._outcomes.put(Committed(step, why))

    def _commit(self, manifest: Manifest) -> None:
        self._before()
        commit(folder_of(self._run_dir, manifest.cursor.step), manifest)

    def _prune(self, step: int) -> None:
        try:
            prune(self._run_dir, self._keep, step)
        except OSError:
            return  # what could not be deleted now is deleted after a later commit
