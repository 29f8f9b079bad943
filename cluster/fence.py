"""Which attempt may change a run directory: numbered entries, each created exclusively.

    RUN_DIR/commits/00000001.json   attempt 1 begins
    RUN_DIR/commits/00000002.json   commits a checkpoint
    RUN_DIR/commits/00000003.json   attempt 3 begins: it takes the run over
    RUN_DIR/commits/00000004.json   …

An attempt, which is one process that runs a job, is known by the number of its first entry. Before whatever others must
not do any more once it has happened (a checkpoint, the model, the end), it creates the entry after its newest one. If
that is taken, another attempt has begun since, and this one has lost the run: nothing of it counts from there on.

No clock is read and no lock is held, so an attempt that was frozen or cut off for any time loses as well. An attempt
deletes only its own entries of checkpoints and models, and never the newest of them: its last entry, and what follows
that, the first of another, stay taken, whatever it knows of them.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from contextlib import suppress
from typing import Any, Literal

from pydantic import ConfigDict, Field

from cluster.holder import Holder
from cluster.storage import AnyPath, create_whole, exists, find, read_as, remove
from simmatch.config import Frozen, NonNegativeInt
from simmatch.documents import dump_json

COMMITS = "commits"
NAME = re.compile(r"(\d{8})\.json")
Kind = Literal["attempt", "checkpoint", "model", "end"]

VERIFY_S = 1.0
"""So long `check` relies on what it has found before."""

LOOKS, PAUSE_S = 5, 0.1
"""At an entry that is not whole."""


class AttemptLostError(RuntimeError):
    """Another attempt has taken over the run; the message says who."""


class Entry(Frozen):
    """One entry. `attempt` is the number of the attempt's first one, `token` its own."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    kind: Kind
    attempt: NonNegativeInt
    token: str
    holder: Holder
    step: NonNegativeInt | None = None
    manifest: dict[str, Any] | None = Field(default=None)
    """Of a checkpoint, whole: an attempt that takes over can complete the commit."""
    status: str | None = None
    """Of the end."""


class Commits:
    """The entries of a run directory."""

    def __init__(self, run_dir: AnyPath) -> None:
        self.folder = run_dir / COMMITS

    def path(self, number: int) -> AnyPath:
        """Of an entry."""
        return self.folder / f"{number:08d}.json"

    def newest(self) -> tuple[int, Entry | None]:
        """Number and content of the newest entry; 0 and None in a new run directory or one of an earlier version.

        Raises
        ------
        OSError
            The disk, or the object store, does not answer.
        """
        numbers = [int(name[1]) for path in find(self.folder, "*.json") if (name := NAME.fullmatch(path.name))]
        return (max(numbers), self.read(max(numbers))) if numbers else (0, None)

    def read(self, number: int) -> Entry | None:
        """An entry; None if it is not there, or not an entry."""
        return read_as(Entry, self.path(number))


class Unfenced:
    """What fences nothing: a run of which there is one attempt."""

    attempt = 0
    winner: str | None = None

    @property
    def lost(self) -> str | None:
        """That another attempt has taken over the run, and who makes it; None while nobody is known to."""
        return self.winner and f"another attempt took over this run: {self.winner}; this one stops and changes nothing"

    def commit(self, kind: Kind, **fields: Any) -> None:
        """Take the next entry; raises AttemptLostError if another attempt has begun."""

    def check(self, *, sure: bool = False) -> None:
        """Raise AttemptLostError if another attempt is known to have begun."""

    def owned(self) -> bool:
        """Whether `check` raises nothing."""
        with suppress(AttemptLostError):
            self.check()
            return True
        return False

    def prune(self) -> None:
        """Delete entries that nobody needs any more."""


UNFENCED = Unfenced()


class Fence(Unfenced):
    """An attempt's own view of the entries. Threads may share it.

    Parameters
    ----------
    run_dir: a folder or a URI.
    holder: who makes the attempt.

    Attributes
    ----------
    attempt: number of its first entry; 0 before `begin`.
    winner: who has taken over the run; None while nobody is known to have.
    """

    def __init__(self, run_dir: AnyPath, holder: Holder) -> None:
        self.commits, self.holder = Commits(run_dir), holder
        self.attempt, self.winner = 0, None
        self._token = secrets.token_hex(8)
        self._number = 0
        self._spent: list[int] = []
        self._verified_s = -VERIFY_S
        self._lock = threading.Lock()

    def begin(self, newest: int) -> Entry | None:
        """Take over the run, whose newest entry was number `newest` when it was decided to. Returns that entry.

        Raises
        ------
        AttemptLostError
            Another attempt has made an entry since.
        OSError
            The disk, or the object store, did not take it.
        """
        self._number = newest
        before = self.commits.read(newest) if newest else None
        self.attempt = newest + 1
        self.commit("attempt")
        latest, entry = self.commits.newest()
        if latest > self._number:  # the one that was taken had been deleted, or another attempt has begun since
            self.winner = "unknown" if entry is None else str(entry.holder)
            self._refuse()
        return before

    def commit(self, kind: Kind, **fields: Any) -> None:
        """Take the next entry.

        Raises
        ------
        AttemptLostError
            Another attempt has taken it.
        OSError
            The disk, or the object store, did not take it. Whether it has is unknown; the call may be repeated.
        """
        self._refuse()
        entry = Entry(kind=kind, attempt=self.attempt, token=self._token, holder=self.holder, **fields)
        content = dump_json(entry.model_dump(mode="json")).encode()
        while True:
            number = self._number + 1
            try:
                create_whole(self.commits.path(number), content)
            except FileExistsError:
                self._look(number)  # or our own: another thread's, or one whose answer was lost
                continue
            with self._lock:
                self._number = max(self._number, number)
                if kind in ("checkpoint", "model"):
                    self._spent.append(number)
            return

    def check(self, *, sure: bool = False) -> None:
        """Look for an entry of another attempt, unless that was done a moment ago; while the store does not answer,
        the run counts as ours, unless `sure`.

        Raises
        ------
        AttemptLostError
            There is one.
        OSError
            The store does not answer, and only a look is enough.
        """
        self._refuse()
        if self.attempt and time.monotonic() - self._verified_s >= VERIFY_S:
            started_s, number = time.monotonic(), self._number + 1
            try:
                if exists(self.commits.path(number)) and self.commits.read(number) is not None:
                    self._look(number)
                self._verified_s = started_s
            except OSError:
                if sure:
                    raise

    def prune(self) -> None:
        """Delete this attempt's entries of checkpoints and models before the newest, which are complete by now.

        Raises
        ------
        AttemptLostError
            Another attempt has begun.
        """
        self.check()
        with self._lock:
            spent, self._spent = self._spent[:-1], self._spent[-1:]
        with suppress(OSError):
            for number in spent:
                remove(self.commits.path(number))

    def _look(self, number: int) -> None:
        """Go on after an entry of this attempt; lose the run to one of another."""
        entry = self.commits.read(number)
        for _ in range(LOOKS):
            if entry is not None:
                break
            time.sleep(PAUSE_S)  # without links another thread's is not whole at once
            entry = self.commits.read(number)
        if entry is not None and entry.token == self._token:
            with self._lock:
                self._number = max(self._number, number)
            return
        self.winner = "unknown" if entry is None else str(entry.holder)
        self._refuse()

    def _refuse(self) -> None:
        if self.lost is not None:
            raise AttemptLostError(self.lost)
