"""The parts of a stack that different ranks hold (axis `layer`): contiguous runs of layers, of about equal cost.

With `schedule: together` a batch goes from stage to stage, and the slowest stage sets the pace. So the layers are split
where the largest cost of a stage is smallest: a function of the configuration and the number of stages only.
"""

from __future__ import annotations

from itertools import accumulate

from simmatch.config import ConfigError, ModelConfig
from simmatch.geometry import PatchConfig
from simmatch.model import InputConfig, layer_inputs

ITERATIONS = 60
"""Iterations of the dynamics to a tolerance, about; see `jobs/README.md`."""


def layer_costs(model: ModelConfig, source: InputConfig) -> list[int]:
    """Multiply–adds of each layer for one image: an update, and where a layer is above, the encoding for it.

    >>> from simmatch.config import LayerConfig
    >>> layers = LayerConfig(out_channels=64, kernel_size=5, pool=7), LayerConfig(out_channels=256, kernel_size="full")
    >>> model = ModelConfig(layers=layers)
    >>> layer_costs(model, InputConfig(in_channels=1, height=28, width=28, num_classes=10))
    [217460736, 5603328]
    """
    costs = []
    for index, (channels, size) in enumerate(layer_inputs(model, source)):
        config = model.layers[index]
        patch, neurons = PatchConfig.of_layer(config, channels, size), config.out_channels
        height, width = patch.map_size(size)
        every = height * width
        some = min(config.train.positions or every, every)
        cost = some * neurons * (2 * patch.patch_size + (1 + ITERATIONS) * neurons)
        if index + 1 < len(model.layers):
            cost += every * neurons * (patch.patch_size + config.dynamics.encode_iterations * neurons)
        costs.append(cost)
    return costs


def stages_of(model: ModelConfig, source: InputConfig, stages: int) -> list[range]:
    """The layers of each stage.

    Raises
    ------
    ConfigError
        More stages than layers, or several stages where the layers learn one after the other.

    >>> from simmatch.config import LayerConfig
    >>> layer = LayerConfig(out_channels=8, kernel_size=1)
    >>> model = ModelConfig(layers=(layer,) * 5, schedule="together")
    >>> stages_of(model, InputConfig(in_channels=8, height=8, width=8, num_classes=10), stages=2)
    [range(0, 2), range(2, 5)]
    """
    count = len(model.layers)
    if not 1 <= stages <= count:
        raise ConfigError(f"mesh.layer: expected 1 to {count}, the layers of the model, got {stages}")
    if stages > 1 and model.schedule != "together":
        raise ConfigError(f"mesh.layer: expected 1 with model.schedule: {model.schedule}, got {stages}")
    before = [0, *accumulate(layer_costs(model, source))]
    # best[stop]: (largest cost of a stage, where the stages begin) for the layers before `stop`
    best: dict[int, tuple[int, tuple[int, ...]]] = {stop: (before[stop], (0,)) for stop in range(1, count + 1)}
    for number in range(1, stages):
        best = {
            stop: min(
                (max(best[start][0], before[stop] - before[start]), (*best[start][1], start))
                for start in range(number, stop)
            )
            for stop in range(number + 1, count + 1)
        }
    starts = best[count][1]
    return [range(start, stop) for start, stop in zip(starts, (*starts[1:], count), strict=True)]
