"""The local working folder of a run whose run directory is in an object store.

A spool grows line by line, but an object store only takes whole files. So records are written to the working folder and
new ones are copied to the run directory before every checkpoint is committed (`cluster.tracking.spool_parts`), and all
at the end: a machine that continues from a checkpoint then has all records up to it. Checkpoints and the model do not
pass through here: ranks write them directly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.fence import UNFENCED, Unfenced
from cluster.profiles import FOLDER
from cluster.storage import AnyPath, copy_whole, exists, fetch, is_local, write_whole
from cluster.tracking.delivery import PROGRESS_NAME
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.tracking.spool_parts import SpoolParts
from simmatch.model import MODEL_FILES
from simmatch.remote import retry

SMALL = ("config.yaml", "summary.json")


class Mirror:
    """Keeps a run directory and the working folder of this machine alike; does nothing if they are the same.

    Parameters
    ----------
    destination: the run directory.
    work: the working folder.
    patience_s: how long a store that does not answer is asked again, once training is over.
    flush: called before records are copied, to write those that are still in memory.
    pushed: called with the number of bytes of the spool that another machine can read.
    fence: of this attempt; `pull` comes after its `begin`. Once it has lost the run, nothing is copied there any more.
    """

    def __init__(
        self,
        destination: AnyPath,
        work: Path,
        *,
        patience_s: float = 0.0,
        flush: Callable[[], object] = lambda: None,
        pushed: Callable[[int], None] = lambda _: None,
        fence: Unfenced = UNFENCED,
    ) -> None:
        self._fence = fence
        self.destination, self.work, self._patience_s = destination, work, patience_s
        self._flush, self._pushed = flush, pushed
        self.remote = not is_local(destination)
        self._lock = threading.Lock()
        self._records = SpoolParts(destination)
        self._copied: dict[str, bytes] = {}

    def pull(self) -> None:
        """Copy the records of the run directory here, unless those here begin with them.

        Raises
        ------
        SpoolBusyError
            Another process uses the working folder.
        OSError
            The run directory does not answer.
        """
        if not self.remote:
            return
        spool = self.work / SPOOL_NAME
        Spool(spool).open().close()
        self._records.attempt = self._fence.attempt
        theirs = self._records.read()
        self._pushed(len(theirs))
        if spool.read_bytes().startswith(theirs):
            return
        write_whole(spool, theirs)
        (self.work / PROGRESS_NAME).unlink(missing_ok=True)
        if exists(self.destination / PROGRESS_NAME):
            copy_whole(self.destination / PROGRESS_NAME, self.work / PROGRESS_NAME)

    def push(self, *, whole: bool = False) -> None:
        """Copy what is new to the run directory; `whole`: the records as one file.

        The offset is copied last: it must not be ahead of its spool.

        Raises
        ------
        OSError
            The run directory does not answer.
        AttemptLostError
            Another attempt has taken over the run.
        """
        self._flush()
        if not self.remote:
            return
        self._fence.check(sure=True)
        offset, spool = self.work / PROGRESS_NAME, self.work / SPOOL_NAME
        with self._lock:
            sent = offset.read_bytes() if offset.exists() else None
            for name in SMALL:
                if (self.work / name).exists():
                    self._copy(name, (self.work / name).read_bytes())
            if spool.exists():
                self._pushed(self._records.close(spool) if whole else self._records.append(spool))
            if sent is not None:
                self._copy(PROGRESS_NAME, sent)

    def _copy(self, name: str, content: bytes) -> None:
        """Write a small file, unless this was its content the last time."""
        if self._copied.get(name) != content:
            write_whole(self.destination / name, content)
            self._copied[name] = content

    def fetch_model(self) -> Path:
        """The exported model on this machine."""
        return self.fetch("model", MODEL_FILES)

    def fetch(self, name: str, files: Sequence[str]) -> Path:
        """A folder of the run directory on this machine, with these files that ranks have written."""
        folder = self.work / name
        if self.remote:
            retry(
                lambda: [fetch(self.destination / name / file, lambda: folder) for file in files],
                self._patience_s,
            )
        return folder

    def close(self) -> None:
        """Copy the rest, with figures and tables; raises as `push` does."""
        if not self.remote:
            return
        retry(partial(self.push, whole=True), self._patience_s)
        for folder, pattern in (("figures", "*"), (FOLDER, "*.json"), (FOLDER, "*.md")):  # ranks have written traces
            for file in sorted((self.work / folder).glob(pattern)):
                copy_whole(file, self.destination / folder / file.name)
