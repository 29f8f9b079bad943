"""A rank's connections along the axes of the mesh, made of groups of torch.distributed; and what they have moved.

    everyone    all ranks
    owners      of one replica and stage          columns   of one stage
    replicas    of one stage and owner            links     two ranks of neighbouring stages, of one replica and owner

All ranks make all groups, in one order, as torch demands; a group whose ranks are those of another is not made again,
and a rank alone gets the identity. So a mesh that has the axis `channel` only uses a single group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from cluster.collectives import Connection, DeviceCounter, TorchExchange, TorchLink
from cluster.mesh import MeshConfig
from cluster.waiting import LINK
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import named
from simmatch.sharding.mesh import Mesh


class _Groups:
    """Makes the groups of a mesh, each once.

    Parameters
    ----------
    everyone: connects all ranks.
    device: of the tensors that are exchanged.
    """

    def __init__(self, everyone: TorchExchange, device: torch.device) -> None:
        self._everyone, self._device = everyone, device
        self._made: dict[tuple[int, ...], Exchange] = {tuple(range(everyone.world_size)): everyone}

    def exchange(self, ranks: Sequence[int]) -> Exchange:
        """Collectives of these ranks; where this rank is none of them, one that must not be used."""
        key = tuple(ranks)
        if len(key) == 1:
            return IDENTITY
        if key not in self._made:
            group = self._group(key)
            self._made[key] = TorchExchange(group, **self._settings(named(key))) if self._member(key) else IDENTITY
        return self._made[key]

    def link(self, lower: int, upper: int, timeout_s: float) -> TorchLink | None:
        """From one rank to another; None where this rank is neither."""
        group = self._group((lower, upper), timeout_s)
        settings = self._settings(f"{LINK} from rank {lower} to rank {upper}") | {"timeout_s": timeout_s}
        return TorchLink(group, **settings) if self._member((lower, upper)) else None

    def _member(self, ranks: Sequence[int]) -> bool:
        return self._everyone.rank in ranks

    def _group(self, ranks: Sequence[int], timeout_s: float | None = None) -> dist.ProcessGroup:
        limit = timedelta(seconds=timeout_s or self._everyone.timeout_s)
        return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=limit))

    def _settings(self, name: str) -> dict[str, Any]:
        """Of a connection of this rank."""
        everyone = self._everyone
        counter = DeviceCounter(self._device) if everyone.capturable else None
        return {"timeout_s": everyone.timeout_s, "counter": counter, "name": name, "own_name": everyone.own_name}


def join_mesh(everyone: TorchExchange, config: MeshConfig, device: torch.device, *, link_timeout_s: float) -> Mesh:
    """This rank's place in a mesh. All ranks call it, once they have joined one group.

    Parameters
    ----------
    device: of the tensors that are exchanged.
    link_timeout_s: limit on a wait for another stage. It may calibrate a layer meanwhile, which takes as long as it
        takes; the controller tells a stage that works from one that does not.
    """
    groups, place = _Groups(everyone, device), config.place(everyone.rank)
    stages, replicas, owners = range(config.layer), range(config.data), range(config.channel)
    mesh = Mesh(everyone=everyone, stage=place.stage, stages=config.layer)
    for stage in stages:
        at_stage = groups.exchange(config.ranks(stage=stage))
        by_replica = [groups.exchange(config.ranks(stage=stage, replica=replica)) for replica in replicas]
        by_owner = [groups.exchange(config.ranks(stage=stage, owner=owner)) for owner in owners]
        if stage == place.stage:
            mesh = replace(mesh, columns=at_stage, owners=by_replica[place.replica], replicas=by_owner[place.owner])
    for rank in config.ranks(stage=0):
        for stage in stages[1:]:
            lower, upper = (config.rank(replace(config.place(rank), stage=other)) for other in (stage - 1, stage))
            link = groups.link(lower, upper, link_timeout_s)
            if everyone.rank == lower:
                mesh = replace(mesh, above=link)
            elif everyone.rank == upper:
                mesh = replace(mesh, below=link)
    return mesh


class Traffic:
    """What one rank has exchanged over all its connections.

    Attributes
    ----------
    started: exchanges that the rank, or its device, has come to, by the name of the connection: "" for that of all
        ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        every = (mesh.everyone, mesh.owners, mesh.replicas, mesh.columns, mesh.below, mesh.above)
        distinct: dict[object, None] = dict.fromkeys(every)
        self.connections = [one for one in distinct if isinstance(one, Connection)]
        self._ranks = mesh.everyone.world_size // mesh.stages

    @property
    def started(self) -> dict[str, int]:
        return {connection.name: connection.num_started for connection in self.connections}

    @property
    def mark(self) -> tuple[int, ...]:
        """Changes with every exchange that the rank or its device starts or ends."""
        counts = ((one.num_exchanges, one.num_started, one.num_completed) for one in self.connections)
        return tuple(number for numbers in counts for number in numbers)

    @property
    def num_exchanges(self) -> int:
        """Exchanges of this rank's stage, as its first rank counts them: of each connection that it is the first rank
        of, times the number of such connections in the stage, which all make the same."""
        counts = (one.num_exchanges * self._alike(one) for one in self.connections if one.rank == 0)
        return sum(counts)

    def _alike(self, connection: Connection) -> int:
        """Connections of the stage along the same axis; that of all ranks is the first stage's."""
        if isinstance(connection, TorchLink):
            return self._ranks
        return max(1, self._ranks // connection.world_size)

    @property
    def bytes_exchanged(self) -> int:
        return sum(connection.bytes_exchanged for connection in self.connections)

    @property
    def waited_s(self) -> float:
        return sum(connection.waited_s for connection in self.connections)
