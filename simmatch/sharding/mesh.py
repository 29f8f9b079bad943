"""The place of one rank in a mesh of ranks, and its connections along each axis.

    owners      ranks that hold the rows of one layer together (axis `channel`): weights and activities
    replicas    ranks that hold the same rows, each for a part of every batch (axis `data`): sums over columns
    stages      ranks that hold different layers (axis `layer`): activities, from each stage to the next
    everyone    all ranks: what every rank needs, and work that is split by images

The axes are independent of each other: owners of a layer belong to one replica and one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from simmatch.sharding.exchange import IDENTITY, Exchange, Handle


class Link(Protocol):
    """A connection between a stage and the next: tensors arrive in the order in which the other side sent them.

    Both sides know shape and dtype of every tensor beforehand.

    >>> import torch
    >>> def pass_on(activities: Tensor, mesh: Mesh) -> None:
    ...     if mesh.above is not None:
    ...         mesh.above.send(activities.contiguous()).wait()
    >>> pass_on(torch.ones(2, 3), Mesh())  # a single stage has none above
    """

    def send(self, tensor: Tensor) -> Handle:
        """Start to send a contiguous tensor; it must not change before `wait` returns."""

    def receive(self, tensor: Tensor) -> Handle:
        """Start to receive into a contiguous tensor: after `wait` it holds what the other side sent."""


@dataclass(frozen=True)
class Mesh:
    """The connections of one rank.

    Attributes
    ----------
    everyone: connects all ranks.
    owners: connects the owners of this rank's layers, in the order of their rows.
    replicas: connects the ranks that hold the same rows of the same layers.
    columns: connects owners and replicas: all ranks over which columns can be split (`exchange: gather_state`).
    stage, stages: which part of the stack this rank holds, 0 ≤ stage < stages.
    below: from the rank of the stage below whose activities this one learns from; None at the first stage.
    above: to the rank of the stage above; None at the last stage.

    >>> mesh = Mesh.of_owners(IDENTITY)
    >>> mesh.owners.world_size, mesh.replicas.world_size, mesh.stages
    (1, 1, 1)
    """

    everyone: Exchange = IDENTITY
    owners: Exchange = IDENTITY
    replicas: Exchange = IDENTITY
    columns: Exchange = IDENTITY
    stage: int = 0
    stages: int = 1
    below: Link | None = None
    above: Link | None = None

    @classmethod
    def of_owners(cls, exchange: Exchange) -> Mesh:
        """A mesh with the axis `channel` only."""
        return cls(everyone=exchange, owners=exchange, columns=exchange)

    @property
    def learning(self) -> list[Exchange]:
        """The exchanges that an update of a layer uses, each once."""
        distinct = {id(exchange): exchange for exchange in (self.owners, self.replicas, self.columns)}
        return list(distinct.values())


ALONE = Mesh()
"""The mesh of a single process."""
