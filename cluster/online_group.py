"""The ranks of a stream as one group of Ray actors: each call goes to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from cluster.group import WorkerGroup
from cluster.online_rank import Arrays, Header, Reply


@dataclass(frozen=True)
class Call:
    """One call of all ranks."""

    name: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def header(self) -> Header:
        """Names, dtypes and shapes of the tensors, for all ranks."""
        return [(name, str(each.dtype).removeprefix("torch."), list(each.shape)) for name, each in self.tensors.items()]

    @property
    def arrays(self) -> Arrays:
        """The tensors, for rank 0."""
        return {name: each.detach().cpu().numpy() for name, each in self.tensors.items()}


class StreamGroup(WorkerGroup):
    """The ranks of one generation, which are called for every batch."""

    def _write_nonce(self) -> str:
        return ""

    def _check_run_dir(self, nonce: str) -> None:
        """Ranks of a stream write nothing."""

    def perform(self, call: Call) -> Reply:
        """Call all ranks; the answer of rank 0.

        Raises
        ------
        GroupFailure
            A rank died, raised an exception, or did not answer within `stall_timeout_s`.
        """
        header, arrays = call.header, call.arrays
        refs = [
            actor.perform.remote(call.name, dict(call.options), header, arrays if rank == 0 else None)
            for rank, actor in enumerate(self._actors)
        ]
        reply, *seconds = self._gather(refs, call.name, limit_s=self.config.stall_timeout_s)
        assert isinstance(reply, Reply)
        return replace(reply, seconds=reply.seconds + sum(seconds))
