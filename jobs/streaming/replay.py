"""Applies a run's journal from its beginning, or from the oldest snapshot that it reaches back to, without the run.

The digest after each batch that has a snapshot must be that of the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.mesh import MeshConfig
from jobs.streaming.config import StreamConfig
from jobs.streaming.journal import JournalError, list_segments, read_entries
from jobs.streaming.keeper import FOLDER
from jobs.streaming.outcome import Outcome
from jobs.streaming.snapshots import Snapshot, listed, load
from jobs.streaming.state import StreamState
from simmatch.config import ConfigError


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes
    ----------
    batches, entries: of the journal.
    digest: of the state after the last entry.
    begun: the batch after whose snapshot the replay began; 0: it began with the first entry.
    compared: batches whose snapshots were compared.
    differing: those of them whose digests differ.
    """

    batches: int
    entries: int
    digest: str
    begun: int
    compared: tuple[int, ...]
    differing: tuple[int, ...]


def replay(run_dir: Path, config: StreamConfig, see: Callable[[Outcome], None] = lambda _: None) -> Replayed:
    """Apply a journal and compare with the snapshots.

    see: is given every outcome.

    Raises
    ------
    JournalError
        There is no journal, it is damaged, or its beginning was removed and no snapshot takes its place.
    ConfigError
        The stream was learnt by ranks whose sums differ from those of one process in their last bits.
    """
    if config.mesh.world_size > 1 and config.reduce != "exact":
        why = "as a replay runs in one process, whose last bits differ"
        raise ConfigError(f"reduce: expected exact to replay a stream of {config.mesh}, got {config.reduce}, {why}")
    config = config.model_copy(update={"mesh": MeshConfig()})
    segments = list_segments(run_dir / "journal")
    if not segments:
        raise JournalError(f"{run_dir / 'journal'}: expected a journal, got nothing")
    stream = segments[0].stream
    known = {snapshot.batch: snapshot for snapshot in _good(run_dir / FOLDER) if snapshot.stream == stream}
    state, begun = StreamState(config), 0
    if segments[0].first > 0:
        usable = [snapshot for snapshot in known.values() if snapshot.entries >= segments[0].first]
        if not usable:
            raise JournalError(f"{segments[0].path}: expected a snapshot of what was before, got none that is good")
        first = min(usable, key=lambda snapshot: snapshot.batch)
        state.restore(first)
        begun = first.batch
    compared, differing = [], []
    for number, entry in read_entries(segments, state.ledger.entries):
        batch = state.take(number, entry)
        if batch is None:
            continue
        see(state.pipeline.apply(batch))
        if (snapshot := known.get(batch.number)) is not None:
            compared.append(batch.number)
            if state.snapshot(stream).digest != snapshot.digest:
                differing.append(batch.number)
    if later := [batch for batch in known if batch > state.ledger.batches]:
        raise JournalError(
            f"{segments[-1].path}: expected entries of batch {max(later)}, got {state.ledger.batches} last"
        )
    digest = state.snapshot(stream).digest
    return Replayed(state.ledger.batches, state.ledger.entries, digest, begun, tuple(compared), tuple(differing))


def _good(folder: Path) -> list[Snapshot]:
    found = []
    for path in listed(folder):
        try:
            found.append(load(path))
        except ValueError:  # a damaged one says nothing
            continue
    return found
