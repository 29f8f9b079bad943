"""The mesh: how many parts every parallel axis has. Pure arithmetic, checked before any process starts.

    data      replicas of the group: the batch is split, statistics are reduced once per update
    layer     stages of the stack
    channel   shards of a layer's output channels (the innermost axis: neighbours in rank)

Only `channel` may exceed 1 so far; the other axes exist so that adding them changes neither ranks nor messages.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from simmatch.config import ConfigError, Frozen, ModelConfig, PositiveInt

NotYetSplit = Annotated[int, Field(ge=1, le=1)]


class MeshConfig(Frozen):
    """Extent of every axis."""

    channel: PositiveInt = 1
    """Shards of the output channels of every layer."""

    data: NotYetSplit = 1
    """Replicas over the batch: 1."""

    layer: NotYetSplit = 1
    """Stages of the stack: 1."""

    @property
    def world_size(self) -> int:
        return self.channel * self.data * self.layer

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError where a layer has fewer channels than shards, or a solver that cannot be sharded."""
        for index, layer in enumerate(model.layers):
            dynamics = layer.dynamics
            if self.channel > 1 and dynamics.solver == "coordinate_descent" and dynamics.exchange != "gather_state":
                raise ConfigError(
                    f"model.layers.{index}.dynamics.solver: expected auto or accelerated with mesh.channel="
                    f"{self.channel} and exchange: {dynamics.exchange}, got coordinate_descent, which needs all "
                    "channels in one place (exchange: gather_state)"
                )
            if self.channel > layer.out_channels:
                raise ConfigError(
                    f"mesh.channel: expected at most {layer.out_channels}, the out_channels of model.layers.{index}, "
                    f"got {self.channel}"
                )

    def __str__(self) -> str:
        return f"data {self.data} × layer {self.layer} × channel {self.channel}"
