"""The folder on this machine in which a run with a remote directory keeps what is written bit by bit.

A spool grows line by line, an object store takes whole files only. So records are written here and brought to the run
directory every so often, and at the end; another machine that continues the run begins with what was brought.
Checkpoints and the model do not pass through here: ranks write them where they belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from cluster.spool import PROGRESS_NAME, SPOOL_NAME, Spool
from cluster.storage import AnyPath, exists, fetch, find, is_local, publish_folder, read, write_whole

EVERY_S = 30.0
LAST_S = 120.0
"""Longest wait at the end for what is being brought just then."""

SMALL = ("config.yaml", "summary.json")


class Mirror:
    """Keeps a run directory and the working folder of this machine alike; nothing to do where they are one.

    Parameters
    ----------
    place: the run directory.
    work: the folder of this machine.
    note: told, in one line, what could not be brought; it is tried again.
    """

    def __init__(self, place: AnyPath, work: Path, note: Callable[[str], None]) -> None:
        self.place, self.work, self.note = place, work, note
        self.remote = not is_local(place)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def pull(self) -> None:
        """Begin with the records of the run directory, unless those here are the same and more.

        Raises
        ------
        SpoolBusyError
            Another process works here.
        OSError
            The run directory does not answer.
        """
        if not self.remote:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        spool = self.work / SPOOL_NAME
        theirs = read(self.place / SPOOL_NAME) if exists(self.place / SPOOL_NAME) else b""
        Spool(spool).open().close()
        if spool.read_bytes().startswith(theirs):
            return
        spool.write_bytes(theirs)
        (self.work / PROGRESS_NAME).unlink(missing_ok=True)
        if exists(self.place / PROGRESS_NAME):
            fetch(self.place / PROGRESS_NAME, lambda: self.work)

    def push(self) -> None:
        """Bring the records to the run directory. The offset goes last: it must not be ahead of its spool.

        Raises
        ------
        OSError
            The run directory does not answer.
        """
        if not self.remote:
            return
        offset = self.work / PROGRESS_NAME
        sent = offset.read_bytes() if offset.exists() else None
        for name in (*SMALL, SPOOL_NAME):
            if (self.work / name).exists():
                write_whole(self.place / name, (self.work / name).read_bytes())
        if sent is not None:
            write_whole(self.place / PROGRESS_NAME, sent)

    def start(self) -> None:
        """Bring records every so often, beside the run."""
        if self.remote:
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()

    def fetch_model(self) -> Path:
        """The exported model on this machine."""
        folder = self.work / "model"
        if self.remote:
            for file in find(self.place / "model", "*"):
                fetch(file, lambda: folder)
        return folder

    def close(self) -> None:
        """Bring what is left, figures too; says so where that fails."""
        if not self.remote:
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join(LAST_S)
        try:
            self.push()
            if (self.work / "figures").exists():
                publish_folder(self.work / "figures", self.place / "figures")
        except OSError as error:
            self.note(f"the last records are in {self.work} only: {error}")

    def _run(self) -> None:
        failing = False
        while not self._over.wait(EVERY_S):
            try:
                self.push()
                failing = False
            except OSError as error:
                if not failing:
                    self.note(f"records wait in {self.work}: {error}")
                failing = True
