"""The mesh: how many parts every parallel axis has. Pure arithmetic, checked before any process starts.

layer     stages of the stack, which learn at the same time (`schedule: together`)
data      replicas: each learns from a part of every batch, and their statistics are summed once per update
channel   shards of a layer's output channels

The outermost axis comes first. Neighbours in rank share a node where they can (`cluster.placement`), so the innermost
axis is the one whose ranks wait for each other most: owners within the dynamics, replicas once per update, and a stage
only for a slower one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simmatch.config import ConfigError, Frozen, ModelConfig, PositiveInt


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank: which replica, which stage, and which owner of the stage's channels."""

    replica: int
    stage: int
    owner: int


class MeshConfig(Frozen):
    """Extent of every axis. Ranks are numbered rank = (stage × data + replica) × channel + owner.

    >>> mesh = MeshConfig(data=2, layer=3, channel=2)
    >>> mesh.place(7), mesh.rank(Place(replica=1, stage=1, owner=1))
    (Place(replica=1, stage=1, owner=1), 7)
    """

    channel: PositiveInt = 1
    """Shards of the output channels of every layer."""

    data: PositiveInt = 1
    """Replicas: each learns from its part of every batch."""

    layer: PositiveInt = 1
    """Stages of the stack, which learn at the same time; needs `schedule: together`."""

    @property
    def world_size(self) -> int:
        return self.channel * self.data * self.layer

    def place(self, rank: int) -> Place:
        """The coordinates of a rank."""
        rest, owner = divmod(rank, self.channel)
        stage, replica = divmod(rest, self.data)
        return Place(replica, stage, owner)

    def rank(self, place: Place) -> int:
        """The rank with these coordinates."""
        return (place.stage * self.data + place.replica) * self.channel + place.owner

    def ranks(self, replica: int | None = None, stage: int | None = None, owner: int | None = None) -> tuple[int, ...]:
        """The ranks with these coordinates, in order; None: any.

        >>> MeshConfig(data=2, layer=2, channel=2).ranks(stage=1)
        (4, 5, 6, 7)
        """
        wanted = (replica, stage, owner)
        places = ((rank, self.place(rank)) for rank in range(self.world_size))
        return tuple(
            rank
            for rank, at in places
            if all(want in (None, got) for want, got in zip(wanted, (at.replica, at.stage, at.owner), strict=True))
        )

    def check_stream(self) -> None:
        """Check that a stream can have these axes: it has no stages.

        >>> MeshConfig(layer=2).check_stream()
        Traceback (most recent call last):
        simmatch.config.ConfigError: mesh.layer: expected 1 for a stream, got 2
        """
        if self.layer > 1:
            raise ConfigError(f"mesh.layer: expected 1 for a stream, got {self.layer}")

    def check(self, model: ModelConfig, images: int | None = None) -> None:
        """Check that every axis fits every layer.

        images: number of training images, where it is known; no batch has more.

        Raises
        ------
        ConfigError
            One line with the axis, the layer that it does not fit, and the nearest mesh that fits.
        """
        for index, layer in enumerate(model.layers):
            dynamics = layer.dynamics
            if self.channel > 1 and dynamics.solver == "coordinate_descent" and dynamics.exchange != "gather_state":
                raise ConfigError(
                    f"model.layers.{index}.dynamics.solver: expected auto or accelerated with mesh.channel="
                    f"{self.channel} and exchange: {dynamics.exchange}, got coordinate_descent, which needs all "
                    "channels in one place (exchange: gather_state)"
                )
        limits = self._limits(model, images)
        for axis, (most, what) in limits.items():
            given = getattr(self, axis)
            if given > most:
                raise ConfigError(f"mesh.{axis}: expected at most {most}, {what}, got {given}{self._nearest(limits)}")

    def _limits(self, model: ModelConfig, images: int | None) -> dict[str, tuple[int, str]]:
        """Axis → its greatest extent, and what that is."""
        widths = [(layer.out_channels, f"the out_channels of model.layers.{i}") for i, layer in enumerate(model.layers)]
        batches = []
        for index, layer in enumerate(model.layers):
            most = min(filter(None, (layer.train.batch_size, layer.train.images, images)))
            batches.append((most, f"the images of a batch of model.layers.{index}"))
        stages = len(model.layers), "the number of layers"
        if model.schedule == "greedy":  # without stages each layer learns when the one below has ended
            stages = 1, "as layers learn one after the other (model.schedule: greedy)"
        return {"layer": stages, "channel": min(widths), "data": min(batches)}

    def _nearest(self, limits: Mapping[str, tuple[int, str]]) -> str:
        """The nearest mesh that fits, for a message: of as many ranks, where replicas can take the place of shards."""
        clipped = {axis: min(getattr(self, axis), most) for axis, (most, _) in limits.items()}
        parts = [part for part in range(1, clipped["channel"] + 1) if self.channel % part == 0]
        data = self.data * self.channel // parts[-1]
        if data <= limits["data"][0] and self.channel > clipped["channel"]:
            clipped |= {"channel": parts[-1], "data": data}
        return f"; the nearest mesh that fits is {self.model_copy(update=clipped)}"

    def __str__(self) -> str:
        return f"data {self.data} × layer {self.layer} × channel {self.channel}"
