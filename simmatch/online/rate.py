"""The learning rate of data that does not end: constant, falling, or raised after a drift.

    constant      η = lr
    falling       η = lr · max(lowest, 1 / (1 + u / decay_steps)),   u the number of updates so far
    after_drift   the same with u counted from the last drift; after a drift η = lr for `hold` updates, then it falls

lr is that of each layer (`plasticity.lr`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from simmatch.config import ConfigError, Frozen, ModelConfig, NonNegativeInt, PositiveInt


class RateConfig(Frozen):
    """How the learning rate of the layers changes.

    >>> RateConfig(kind="after_drift", hold=50).decay_steps
    100
    """

    kind: Literal["constant", "falling", "after_drift"] = "constant"
    """`constant`, `falling` with the number of updates, or falling and raised again after each drift."""

    decay_steps: PositiveInt = 100
    """Updates after which the rate has fallen to a half."""

    lowest: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of lr below which the rate does not fall. With 0, a layer changes less and less until a drift is found."""

    hold: NonNegativeInt = 0
    """With `after_drift`: updates after a drift in which the rate stays at lr before it falls again."""

    def applied(self, model: ModelConfig) -> ModelConfig:
        """The model with the rates of its layers set.

        Raises
        ------
        ConfigError
            A layer has a falling rate of its own.

        >>> from simmatch.config import LayerConfig
        >>> model = ModelConfig(layers=(LayerConfig(out_channels=4, kernel_size=3),))
        >>> RateConfig(kind="falling").applied(model).layers[0].plasticity.lr_decay_steps
        100
        """
        layers = []
        for index, layer in enumerate(model.layers):
            plasticity = layer.plasticity
            if plasticity.lr_decay_steps is not None:
                key, given = f"model.layers.{index}.plasticity.lr_decay_steps", plasticity.lr_decay_steps
                raise ConfigError(f"{key}: expected null, as rate.decay_steps says how rates fall, got {given}")
            if self.kind != "constant":
                changes = {"lr_decay_steps": self.decay_steps, "lr_lowest": self.lowest * plasticity.lr}
                plasticity = plasticity.model_copy(update=changes)
            layers.append(layer.model_copy(update={"plasticity": plasticity}))
        return model.model_copy(update={"layers": tuple(layers)})
