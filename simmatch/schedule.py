"""What a schedule demands of the layers of a stack: checked when a configuration is read, and once the data is known.

With `schedule: together` all layers learn in one pass over the images. Update u of the pass is one of layer l while

    start_after(l) < u ≤ stop(l)        stop(l): the last update of the pass; with freeze_below, start_after(l + 1)

so a layer that begins later makes fewer updates, and counts its own from 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simmatch.data.order import steps_per_epoch

if TYPE_CHECKING:
    from simmatch.config import ModelConfig

SHARED = ("epochs", "images", "batch_size")
"""Keys of `train` that determine the batches: equal for layers that learn together."""


def check_schedule(model: ModelConfig) -> None:
    """Check the keys that belong to a schedule.

    Raises
    ------
    ValueError
        A key that the schedule does not use, or layers that cannot learn from the same batches.

    >>> from simmatch.config import LayerConfig, ModelConfig, TrainConfig
    >>> layers = [LayerConfig(out_channels=8, kernel_size=3, train=TrainConfig(epochs=epochs)) for epochs in (1, 2)]
    >>> ModelConfig(layers=layers, schedule="together")
    Traceback (most recent call last):
    pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
      Value error, expected layers.1.train.epochs=1, as in layers.0, with schedule: together, got 2 ...
    """
    trains = [layer.train for layer in model.layers]
    if model.schedule == "greedy":
        keys: dict[str, int] = {"freeze_below": model.freeze_below}
        keys |= {f"layers.{index}.train.start_after": train.start_after for index, train in enumerate(trains)}
        for key, value in keys.items():
            if value:
                raise ValueError(f"expected schedule: together with {key}={str(value).lower()}, got greedy")
        return
    for index, train in enumerate(trains):
        where = f"layers.{index}.train"
        for name in SHARED:
            given, first = getattr(train, name), getattr(trains[0], name)
            if given != first:
                raise ValueError(
                    f"expected {where}.{name}={first}, as in layers.0, with schedule: together, got {given}"
                )
        given, least = train.start_after, trains[index - 1].start_after + model.freeze_below if index > 0 else 0
        if index == 0 and given > 0:
            raise ValueError(f"expected {where}.start_after=0, as nothing is below the first layer, got {given}")
        if given < least:
            why = "as freeze_below then stops the layer below" if model.freeze_below else "where the layer below begins"
            raise ValueError(f"expected {where}.start_after of at least {least}, {why}, got {given}")


def updates_of_layers(model: ModelConfig, num_images: int) -> list[range]:
    """The updates of the pass, counted from 1, that each layer makes from so many images; none with `schedule: greedy`.

    Raises
    ------
    ValueError
        As for `learning_updates`.

    >>> from simmatch.config import LayerConfig, ModelConfig, TrainConfig
    >>> layers = [LayerConfig(out_channels=8, kernel_size=3, train=TrainConfig(start_after=n)) for n in (0, 60)]
    >>> updates_of_layers(ModelConfig(layers=layers, schedule="together"), num_images=7000)
    [range(1, 71), range(61, 71)]
    >>> updates_of_layers(ModelConfig(layers=layers, schedule="together"), num_images=5000)
    Traceback (most recent call last):
    ValueError: model.layers.1.train.start_after: expected less than 50, the updates of the pass, got 60
    """
    if model.schedule == "greedy":
        return []
    train = model.layers[0].train
    images = None if train.images is None else min(train.images, num_images)
    return learning_updates(model, train.epochs * steps_per_epoch(num_images, train.batch_size, images=images))


def learning_updates(model: ModelConfig, total: int) -> list[range]:
    """The updates of the pass, counted from 1, that each layer makes with `schedule: together`.

    Parameters
    ----------
    total: number of updates of the pass.

    Raises
    ------
    ValueError
        A layer would begin after the pass has ended.

    >>> from simmatch.config import LayerConfig, ModelConfig, TrainConfig
    >>> layers = [LayerConfig(out_channels=8, kernel_size=3, train=TrainConfig(start_after=n)) for n in (0, 60)]
    >>> learning_updates(ModelConfig(layers=layers, schedule="together"), total=100)
    [range(1, 101), range(61, 101)]
    >>> learning_updates(ModelConfig(layers=layers, schedule="together", freeze_below=True), total=100)
    [range(1, 61), range(61, 101)]
    """
    starts = [layer.train.start_after for layer in model.layers]
    for index, start in enumerate(starts):
        if start >= total:
            where = f"model.layers.{index}.train.start_after"
            raise ValueError(f"{where}: expected less than {total}, the updates of the pass, got {start}")
    stops = [*starts[1:], total] if model.freeze_below else [total] * len(starts)
    return [range(start + 1, stop + 1) for start, stop in zip(starts, stops, strict=True)]
