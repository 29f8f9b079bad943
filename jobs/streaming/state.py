"""All that follows from a journal, entry by entry: its ledger and its pipeline."""

from __future__ import annotations

from collections.abc import Callable

from jobs.streaming.config import StreamConfig
from jobs.streaming.entries import Entry
from jobs.streaming.ledger import Batch, Ledger
from jobs.streaming.pipeline import Pipeline
from jobs.streaming.snapshots import Snapshot
from simmatch.online.state import joined, part_of


class StreamState:
    """Applies a journal.

    tell: as for `Pipeline`.

    Attributes
    ----------
    ledger: takes its entries; pipeline: applies its batches.
    """

    def __init__(self, config: StreamConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.ledger = Ledger(config.labels.ids, whole=config.data.shape is None)
        self.pipeline = Pipeline(config, tell)

    def take(self, number: int, entry: Entry) -> Batch | None:
        """The next entry of the journal; returns the batch that it ends, for the pipeline to apply."""
        return self.ledger.take(number, entry)

    def due(self, batch: Batch) -> bool:
        """Whether a snapshot follows a batch."""
        return batch.why == "end" or batch.number % self.config.snapshot.every_batches == 0

    def snapshot(self, stream: str) -> Snapshot:
        """The state, once the pipeline has applied the last batch."""
        ledger = self.ledger
        states = {"ledger": ledger.state(), "pipeline": self.pipeline.state()}
        tensors = joined({part: own for part, (own, _) in states.items()})
        plain = {part: own for part, (_, own) in states.items()}
        return Snapshot(stream, ledger.batches, ledger.entries, tensors, plain, dict(ledger.positions))

    def restore(self, snapshot: Snapshot) -> None:
        """As it was when the snapshot was taken."""
        self.ledger.restore(part_of(snapshot.tensors, "ledger"), snapshot.plain["ledger"])
        self.ledger.positions = dict(snapshot.positions)
        self.pipeline.restore(part_of(snapshot.tensors, "pipeline"), snapshot.plain["pipeline"])
