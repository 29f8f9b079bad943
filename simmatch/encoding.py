"""Encoding all images with a layer that has learnt, and scaling the label weights of a supervised one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from einops import reduce
from torch import Tensor

from simmatch.labels import one_hot
from simmatch.learning import Setup
from simmatch.memory import Lever
from simmatch.model import EXPORTED, layer_inputs, output_shape, pooled
from simmatch.sharding.sums import OrderedSum, sum_over_ranks


@dataclass(frozen=True)
class Encoder:
    """Encodes with the complete layers of a stack; every rank encodes its share of the images.

    Attributes
    ----------
    setup: what the stack learns with.
    settled: number of layers, from the first one on, whose label weights have been scaled already.

    >>> from simmatch import LayerConfig, ModelConfig, Stack
    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig
    >>> images = torch.rand(20, 1, 8, 8)
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3, pool=2),))
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> encoder = Encoder(setup, settled=0)
    >>> encoder.below(1, images).shape
    torch.Size([20, 8, 2, 2])
    >>> with torch.no_grad():
    ...     encoder.encode(0)
    >>> setup.store.depth
    1
    """

    setup: Setup
    settled: int

    def below(self, index: int, x: Tensor) -> Tensor:
        """The input of a layer for images."""
        for number, config in enumerate(self.setup.layers[:index]):
            x = pooled(self.setup.encoded(self.setup.stack.layer(number), x), config)
        return x

    def encode(self, index: int) -> None:
        """Replace the images by the output of a layer, and scale its V to label-free activity, unless that is done.

        Of the last layer no output is kept unless the observer reads it.
        """
        setup, layer, config = self.setup, self.setup.stack.layer(index), self.setup.layers[index]
        store, observer, memory = setup.store, setup.observer, setup.memory
        classes, started = layer.num_classes, time.monotonic()
        kept = index + 1 < len(setup.layers) or observer.keeps(index)

        def targets(images: slice) -> Tensor:
            assert setup.labels is not None
            return one_hot(setup.labels[images].to(setup.device), classes, layer.label)

        def encode(x: Tensor, images: slice) -> tuple[Tensor, Tensor]:
            activities = setup.encoded(layer, x)
            passed = pooled(activities, config)
            observer.encoded(index, activities, passed)
            values = passed if kept else x.new_empty(len(x), 0)
            if not config.supervised:
                return values, x.new_empty(0)
            return values, (reduce(activities, "b k h w -> k b", "mean") @ targets(images).T).flatten()

        def on_progress(done: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            observer.progress("encode", done, store.count, layer=index, images_per_second=rate)
            memory.proceed(done / store.count)

        lever = Lever("encode_batch", min(store.batch, store.count))
        memory.begin(f"layer {index}, encoding", lever, otherwise="use more ranks")
        _, size = layer_inputs(setup.stack.config, setup.stack.source)[index]
        weights = [getattr(layer, name) for name in (*EXPORTED, "perron") if name != "label" and hasattr(layer, name)]
        store.advance(
            encode,
            output_shape(config, layer.patch, size) if kept else (0,),
            on_progress,
            by=(*(() if kept else ("no values",)), config, setup.to_tolerance, setup.reduce, *weights),
            extra=layer.label.numel() if config.supervised else 0,
        )
        assert store.features is not None
        observer.advanced(index, store.features)
        if config.supervised and index >= self.settled:
            everyone = setup.mesh.everyone
            yz = OrderedSum(layer.label, everyone)  # no bit of V depends on the number of ranks
            zz = layer.label.new_zeros(classes, classes)
            for part in store.parts:
                if part.start < part.stop:
                    yz.add(store.features.extras(part.start // store.batch).view_as(layer.label).to(setup.device))
                    z = targets(part)
                    zz += z @ z.T  # whole numbers: their sum is exact in any order
                else:
                    yz.add(layer.label.new_zeros(layer.label.shape))
            layer.settle_label(yz.result(), sum_over_ranks(zz, everyone))
