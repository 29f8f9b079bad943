"""Collects the ranks' reports about their shards, and has complete checkpoints and the exported model committed."""

from __future__ import annotations

from collections.abc import Callable

from cluster.checkpoints.committer import Committer
from cluster.checkpoints.manifest import LayerState, Manifest
from cluster.config import RunConfig, public
from cluster.messages import ShardFailed, ShardWritten


class CheckpointCollector:
    """The checkpoints of a run, as the controller knows them.

    Parameters
    ----------
    committer: writes manifests, in a thread of its own.
    note: shows a line to a person.
    data: digest of the data set, for the manifests.

    Attributes
    ----------
    committed_step: of the newest checkpoint committed here, or None.
    settled_step: of the newest checkpoint that is committed, or known never to be.
    model_error: why the exported model is not published; None where it is, or none has been exported.
    """

    def __init__(self, committer: Committer, note: Callable[[str], None], data: str | None) -> None:
        self._committer, self._note, self._data = committer, note, data
        self._shards: dict[int, dict[int, ShardWritten]] = {}
        self.committed_step: int | None = None
        self.settled_step = 0
        self.model_error: str | None = None

    def start_group(self, step: int) -> None:
        """A new group starts from `step`: its shards never complete a checkpoint of the group before."""
        self._shards.clear()
        self.settled_step = step
        self._committer.start_group()

    def shard_written(self, rank: int, written: ShardWritten, config: RunConfig, rate: float) -> None:
        """Commit the checkpoint if this is its last shard: of the first replica, as the others hold the same rows."""
        step = written.cursor.step
        shards = self._shards.setdefault(step, {})
        shards[rank] = written
        if len(shards) < config.mesh.layer * config.mesh.channel:
            return
        del self._shards[step]
        states = {index: state for each in shards.values() for index, state in each.layers.items()}
        manifest = Manifest(
            cursor=written.cursor,
            config=public(config),
            layers=[states.get(index, LayerState()) for index in range(max(states) + 1)],
            shards=[shards[number].shard for number in sorted(shards)],
            constants=[constant for number in sorted(shards) for constant in shards[number].constants],
            rate=rate,
            data=self._data,
        )
        self._committer.submit(manifest)

    def shard_failed(self, rank: int, failed: ShardFailed) -> None:
        """The checkpoint of this step will not be complete."""
        self._shards.pop(failed.step, None)
        self.settled_step = max(self.settled_step, failed.step)
        self._note(f"rank {rank}: the checkpoint of step {failed.step} was not written: {failed.reason}")

    def model_exported(self, folder: str) -> None:
        """Publish the model in this folder of the run directory."""
        self.model_error = "no answer"
        self._committer.submit(folder)

    def settle(self, limit_s: float) -> bool:
        """Take in the outcomes of commits, waiting `limit_s` for each. Returns whether one was a new checkpoint."""
        committed = False
        for outcome in self._committer.settled(limit_s):
            if outcome.step is None:
                self.model_error = outcome.reason
                continue
            self.settled_step = max(self.settled_step, outcome.step)
            if outcome.reason is None:
                self.committed_step, committed = outcome.step, True
            else:
                self._note(f"the checkpoint of step {outcome.step} was not written: {outcome.reason}")
        return committed
