"""The local working folder of a run whose run directory is in an object store.

A spool grows line by line, but an object store only takes whole files. So records are written to the working folder and
copied to the run directory before every checkpoint is committed, and at the end: a machine that continues from a
checkpoint then has all records up to it. Checkpoints and the model do not pass through here: ranks write them directly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.profiles import FOLDER
from cluster.storage import AnyPath, copy_whole, exists, fetch, is_local, read, write_whole
from cluster.tracking.delivery import PROGRESS_NAME
from cluster.tracking.spool import SPOOL_NAME, Spool
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
    """

    def __init__(
        self,
        destination: AnyPath,
        work: Path,
        *,
        patience_s: float = 0.0,
        flush: Callable[[], object] = lambda: None,
        pushed: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.destination, self.work, self._patience_s = destination, work, patience_s
        self._flush, self._pushed = flush, pushed
        self.remote = not is_local(destination)
        self._lock = threading.Lock()

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
        theirs = read(self.destination / SPOOL_NAME) if exists(self.destination / SPOOL_NAME) else b""
        Spool(spool).open().close()
        self._pushed(theirs.rfind(b"\n") + 1)
        if spool.read_bytes().startswith(theirs):
            return
        write_whole(spool, theirs)
        (self.work / PROGRESS_NAME).unlink(missing_ok=True)
        if exists(self.destination / PROGRESS_NAME):
            copy_whole(self.destination / PROGRESS_NAME, self.work / PROGRESS_NAME)

    def push(self) -> None:
        """Copy all records so far to the run directory.

        The offset is copied last: it must not be ahead of its spool.

        Raises
        ------
        OSError
            The run directory does not answer.
        """
        self._flush()
        if not self.remote:
            return
        offset = self.work / PROGRESS_NAME
        with self._lock:
            sent = offset.read_bytes() if offset.exists() else None
            for name in (*SMALL, SPOOL_NAME):
                if (self.work / name).exists():
                    content = (self.work / name).read_bytes()
                    write_whole(self.destination / name, content)
                    if name == SPOOL_NAME:
                        self._pushed(content.rfind(b"\n") + 1)
            if sent is not None:
                write_whole(self.destination / PROGRESS_NAME, sent)

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
        retry(self.push, self._patience_s)
        for folder, pattern in (("figures", "*"), (FOLDER, "*.json"), (FOLDER, "*.md")):  # ranks have written traces
            for file in sorted((self.work / folder).glob(pattern)):
                copy_whole(file, self.destination / folder / file.name)
