"""Training of a stack without a backward pass, one layer after the other or all layers together.

    for each layer (`schedule: greedy`; for `together` see `simmatch.together`):
        calibrate   measure tr C_x, and the whitening if configured, once, on the first images
        learn       make one local update per batch. With sharding by rows, every iteration of the dynamics gathers
                    activities; by columns (`gather_state`), every update gathers weights and scatters statistics
        finish      gather the layer's rows, so that every rank can encode images alone
        encode      replace the images by the label-free, pooled activity of the layer, the input of the next layer;
                    scale V of a supervised layer to that activity

`fit_stack` trains in this process with few arguments; `Trainer` has them all. A single process and the ranks of a group
run the same code. Ranks communicate through the mesh only, and all their decisions depend on the configuration or
on gathered bytes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from simmatch.config import LayerConfig, ModelConfig, Reduce
from simmatch.data.feature_cache import FeatureCache
from simmatch.data.staging import Images, select
from simmatch.encoding import Encoder
from simmatch.features import FeatureStore
from simmatch.greedy import learn_layer
from simmatch.labels import check_labels
from simmatch.learning import Setup
from simmatch.memory import MemoryWatch
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer
from simmatch.sharding.mesh import Mesh
from simmatch.together import Together


class Trainer:
    """Trains the layers of a stack by its schedule: one after the other, or all together.

    Parameters
    ----------
    stack: the stack to train. Its seed determines the order of the data, drawn positions and initial weights.
    images: [N, C, H, W], uint8 or floating-point in [0, 1]; only their number and `images[indices]` are used.
    labels: [N], classes of the images for supervised layers, `UNLABELLED` where unknown.
    blocks: indices at which blocks of images begin that are read together, see `simmatch.data.order`; None: any order.
    mesh: connects to the other ranks. None: a single process, in which `solver: auto` selects the fastest solver.
    observer: follows the training.
    depth: number of layers to train, from the first one on; None: all.
    settled: number of layers, from the first one on, whose label weights an earlier run has scaled already.
    encode_batch: number of images that a rank encodes at a time.
    encode_last: whether to encode with the last layer too, for an observer that uses `encoded` or `keeps` its output.
    to_tolerance: whether to encode by solving to the layer's tolerance, as learning does. False: by the fixed number of
        iterations of an exported model.
    cache: whether every rank can read the encoded input of all images while a layer learns. False: each batch is
        encoded anew. Layers that learn together need no cache.
    feature_cache: where encoded images are kept, and looked for. None: in memory.
    reduce: `exact` for one result, bit by bit, at any number of ranks, on machines of one type with as many threads per
        rank: products are computed by fixed blocks of images, and sums over ranks do not depend on their order. Every
        layer must have `exchange: gather_state`.
    measure_every: number of updates of a layer between two measurements; the last update is always measured. None: no
        update is measured. Where a kernel solves the dynamics on a GPU, faults are recorded there, and raised when an
        update is measured and every `LOOK_EVERY` updates; see `simmatch.captured` for how updates are started.

    Raises
    ------
    ValueError
        The images do not match the stack, labels are missing or are not one class per image, a number is below 1, or a
        layer would begin after the pass in which all layers learn has ended.
    ConfigError
        `reduce: exact` with a layer that cannot give it, or more stages than layers.

    >>> layer = LayerConfig(out_channels=8, kernel_size=3, pool=2)
    >>> stack = Stack(ModelConfig(layers=(layer,)), InputConfig(in_channels=1, height=8, width=8, num_classes=10))
    >>> stack = Trainer(stack, torch.rand(200, 1, 8, 8)).fit()
    >>> int(stack.layer(0).updates), stack.features(torch.rand(5, 1, 8, 8)).shape
    (2, torch.Size([5, 32]))
    """

    def __init__(
        self,
        stack: Stack,
        images: Images,
        labels: Tensor | None = None,
        *,
        blocks: Tensor | None = None,
        mesh: Mesh | None = None,
        observer: Observer | None = None,
        depth: int | None = None,
        settled: int = 0,
        encode_batch: int = 500,
        encode_last: bool = False,
        to_tolerance: bool = False,
        cache: bool = True,
        feature_cache: FeatureCache | None = None,
        reduce: Reduce = "fast",
        measure_every: int | None = None,
    ) -> None:
        layers, device = stack.config.layers[:depth], stack.layer(0).feedforward.device
        _check(stack, layers, images, labels)
        stack.config.check_reduce(reduce)
        for name, number in (("encode_batch", encode_batch), ("measure_every", measure_every)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.stack, ranks = stack, mesh or Mesh()
        self.store = FeatureStore(
            images, ranks.everyone, batch=encode_batch, dtype=stack.dtype, device=device, cache=feature_cache
        )
        self.setup = Setup(
            stack=stack,
            layers=layers,
            store=self.store,
            labels=None if labels is None else labels.cpu(),  # batches are sent from there
            blocks=blocks,
            mesh=ranks,
            alone=mesh is None and reduce == "fast",
            reduce=reduce,
            observer=observer or Observer(),
            memory=MemoryWatch(device),
            measure_every=measure_every,
            to_tolerance=to_tolerance,
        )
        self._encoder = Encoder(self.setup, settled)
        self._encode_last, self._cache, self._begun = encode_last, cache, False
        self._together = Together(self.setup) if stack.config.schedule == "together" else None

    @torch.no_grad()
    def fit(self) -> Stack:
        """Train the layers and return the stack, in evaluation mode. Once: the images become features as layers learn.

        Raises
        ------
        RuntimeError
            It was called before.
        """
        if self._begun:
            raise RuntimeError("fit: expected one call, got another; train on with a new Trainer of the same stack")
        self._begun = True
        with self.setup.memory:
            if self.stack.config.schedule == "together":
                self._learn_together()
            else:
                self._learn_greedily()
        return self.stack.eval()

    def _learn_greedily(self) -> None:
        setup = self.setup
        for index in range(len(setup.layers)):
            layer = setup.new_layer(index)
            setup.observer.restore(index, layer)
            below = None if self._cache or index == 0 else partial(self._encoder.below, index)
            learn_layer(setup, index, layer, below)
            setup.complete(index, layer)
            self._encode(index)

    def _learn_together(self) -> None:
        assert self._together is not None
        learnt = self._together.learn()
        for stage, layers in enumerate(self._together.stages):
            for index in layers:
                self.setup.complete(index, learnt.get(index), stage)
        for index in range(len(self.setup.layers)):
            self._encode(index)

    def _encode(self, index: int) -> None:
        """Encode all images with a layer, where something needs it."""
        if self.setup.layers[index].supervised or self._encode_last or index + 1 < len(self.setup.layers):
            self._encoder.encode(index)


def _check(stack: Stack, layers: tuple[LayerConfig, ...], images: Images, labels: Tensor | None) -> None:
    source = stack.source
    expected = [source.in_channels, source.height, source.width]
    shape = list(images.shape) if isinstance(images, Tensor) else _shape(images)
    if shape[1:] != expected or shape[0] == 0:
        raise ValueError(f"images: expected [N, {', '.join(map(str, expected))}], got {shape}")
    for index, config in enumerate(layers):
        if config.supervised and labels is None:
            raise ValueError(f"labels: expected one for every image, layer {index} is supervised, got none")
    if labels is not None:
        check_labels(labels, source.num_classes, len(images))


def _shape(images: Images) -> list[int]:
    """[N, C, H, W] of images that are no tensor, by reading the first."""
    return [len(images), *(select(images, slice(1)).shape[1:] if len(images) else ())]


def fit_stack(
    model: ModelConfig,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observer: Observer | None = None,
    measure_every: int | None = None,
) -> Stack:
    """Build a stack and train it in this process; see `Trainer` for more options.

    Parameters
    ----------
    model: the layers, how they learn, and the input of a readout.
    images: [N, C, H, W], uint8 or floating-point in [0, 1].
    labels: [N], classes 0, 1, … of the images, `UNLABELLED` where unknown; only supervised layers use them.
    seed: of weights, order of the data and drawn positions.
    device: of all weights.
    observer, measure_every: as for `Trainer`.

    Returns
    -------
    The trained stack, in evaluation mode.

    Raises
    ------
    ValueError
        Images or labels have the wrong shape, or labels are missing for a supervised layer.
    ConfigError
        A layer does not fit its input.

    Examples
    --------
    >>> from simmatch import LayerConfig, ModelConfig
    >>> layer = LayerConfig(out_channels=8, kernel_size=3, pool=2)
    >>> stack = fit_stack(ModelConfig(layers=(layer,)), torch.rand(200, 1, 8, 8))
    >>> stack.features(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 32])
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor [N, C, H, W], got {given}")
    largest = int(labels.max()) if isinstance(labels, Tensor) and len(labels) > 0 else 0
    stack = Stack(model, InputConfig.of(images, max(0, largest) + 1), seed=seed, device=device)
    return Trainer(stack, images, labels, observer=observer, measure_every=measure_every).fit()
