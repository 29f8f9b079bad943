"""The schedule `greedy`: one layer learns after the other, with a pass of encoding between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from torch import Tensor

from simmatch.inputs import LayerInputs
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.learning import Learner, Setup
from simmatch.model import layer_inputs


def learn_layer(
    setup: Setup, index: int, layer: SimilarityMatchingConv2d, below: Callable[[Tensor], Tensor] | None
) -> None:
    """Make the remaining updates of one layer.

    Parameters
    ----------
    layer: this rank's rows.
    below: function from images to the input of the layer, called for every batch. None: the input of all images can
        be read.

    >>> import torch
    >>> from simmatch import LayerConfig, ModelConfig, Stack
    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig
    >>> images = torch.rand(200, 1, 8, 8)
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> layer = setup.new_layer(0)
    >>> learn_layer(setup, 0, layer, below=None)
    >>> int(layer.updates)
    2
    """
    config, train, store, observer = setup.layers[index], setup.layers[index].train, setup.store, setup.observer
    batches = setup.batches(train)
    first, total = int(layer.updates), len(batches)
    if first >= total:
        return
    if not layer.calibrated:
        setup.calibrate(index, layer)
    setup.memory.begin(f"layer {index}, caching its input", otherwise="set cache_features to false")
    inputs = LayerInputs(
        layer,
        store,
        size=layer_inputs(setup.stack.config, setup.stack.source)[index][1],
        positions=train.positions,
        below=below,
        on_progress=lambda done: observer.progress("cache", done, store.count, layer=index),
        labels=setup.labels if config.supervised else None,
    )
    learner = Learner(setup, index, layer, total=total, prepare=inputs.prepare, capture=below is None)
    setup.begin(index)
    observer.started(index, layer)
    with closing(inputs.staged(batches, first)) as staged, closing(learner):
        for number in range(first + 1, total + 1):
            learner.update(number, staged)
