"""Greedy, layer-wise training of a stack, without a backward pass.

    for each layer:
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

import time
from contextlib import closing
from functools import partial

import torch
from einops import reduce
from torch import Tensor

from simmatch.captured import Graph, Updates, new_graph
from simmatch.config import LayerConfig, ModelConfig
from simmatch.data.order import Batches
from simmatch.data.staging import Images, select
from simmatch.features import FeatureStore, LayerInputs, Staged
from simmatch.geometry import Patches
from simmatch.labels import check_labels, one_hot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import measure
from simmatch.memory import Lever, MemoryWatch
from simmatch.model import InputConfig, Stack, build_layer, pooled
from simmatch.observer import Observer, Update
from simmatch.parts import timed
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from simmatch.sharding.state import gather_layer, sum_over_ranks
from simmatch.solvers.dynamics import Solution

LOOK_EVERY = 100
"""Updates between two looks at recorded faults, if none of them is measured."""

MEASURED = ("whitening", "whitening_mean", "input_power")
"""Buffers that calibration fills, if they exist."""


class Trainer:
    """Trains the layers of a stack, one after the other.

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
    encode_last: whether to encode with the last layer too, for an observer that uses `encoded`.
    to_tolerance: whether to encode by solving to the layer's tolerance, as learning does. False: by the fixed number of
        iterations of an exported model.
    cache: whether every rank keeps the encoded input of a layer in memory while the layer learns. False: each batch is
        encoded anew.
    measure_every: number of updates of a layer between two measurements; the last update is always measured. None: no
        update is measured. Where a kernel solves the dynamics on a GPU, faults are recorded there, and raised when an
        update is measured and every `LOOK_EVERY` updates; see `simmatch.captured` for how updates are started.

    Raises
    ------
    ValueError
        The images do not match the stack, labels are missing or are not one class per image, or a number is below 1.

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
        measure_every: int | None = None,
    ) -> None:
        self.stack, self.labels, self.observer = stack, labels, observer or Observer()
        self.layers = stack.config.layers[:depth]
        self._check(images)
        for name, number in (("encode_batch", encode_batch), ("measure_every", measure_every)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.mesh, self._alone = mesh or Mesh(), mesh is None
        self._settled, self._encode_last, self._to_tolerance = settled, encode_last, to_tolerance
        self._cache, self._measure_every, self._blocks = cache, measure_every, blocks
        self._encode_batch = encode_batch
        self.device = stack.layer(0).feedforward.device
        self.store = FeatureStore(images, self.mesh.everyone, batch=encode_batch, dtype=stack.dtype, device=self.device)
        self._memory = MemoryWatch(self.device)

    def _check(self, images: Images) -> None:
        source = self.stack.source
        expected = [source.in_channels, source.height, source.width]
        shape = list(images.shape) if isinstance(images, Tensor) else _shape(images)
        if shape[1:] != expected or shape[0] == 0:
            raise ValueError(f"images: expected [N, {', '.join(map(str, expected))}], got {shape}")
        for index, config in enumerate(self.layers):
            if config.supervised and self.labels is None:
                raise ValueError(f"labels: expected one for every image, layer {index} is supervised, got none")
        if self.labels is not None:
            check_labels(self.labels, source.num_classes, len(images))

    @torch.no_grad()
    def fit(self) -> Stack:
        """Train the layers and return the stack, in evaluation mode."""
        with self._memory:
            for index, config in enumerate(self.layers):
                layer = self._layer(index)
                self.observer.restore(index, layer)
                self._learn(index, layer)
                whole = self.stack.layer(index)
                if layer is whole:
                    layer.recertify()  # activities are then equal to those of the exported model
                else:
                    gather_layer(layer, whole)
                self.observer.learnt(index, whole)
                if config.supervised or self._encode_last or index + 1 < len(self.layers):
                    self._encode(index)
        return self.stack.eval()

    def _layer(self, index: int) -> SimilarityMatchingConv2d:
        """This rank's rows of an untrained layer; in a single process, the stack's own layer."""
        if self._alone:
            return self.stack.layer(index)
        channels = Lever(f"model.layers.{index}.out_channels", self.layers[index].out_channels)
        self._memory.begin(f"layer {index}, making its weights", channels)
        stack, shards = self.stack, split_rows(self.layers[index].out_channels, self.mesh.owners.world_size)
        return build_layer(
            stack.config,
            stack.source,
            index,
            seed=stack.seed,
            dtype=stack.dtype,
            device=self.device,
            rows=shards[self.mesh.owners.rank],
            exchange=self.mesh.owners,
        )

    # ------------------------------------------------------------------------------------------- learning

    def _learn(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """Make the remaining updates of one layer."""
        config, train = self.layers[index], self.layers[index].train
        images = None if train.images is None else min(train.images, self.store.count)
        batches = Batches(
            self.store.count,
            train.batch_size,
            epochs=train.epochs,
            seed=self.stack.seed,
            images=images,
            blocks=self._blocks,
        )
        first = int(layer.updates)
        if first >= len(batches):
            return
        key = f"model.layers.{index}"
        if not layer.calibrated:
            sample = Lever(f"{key}.whiten_images", min(config.whiten_images, self.store.count))
            self._memory.begin(f"layer {index}, calibrating", sample)
            self._calibrate(index, config, layer)
        self._memory.begin(f"layer {index}, caching its input", otherwise="set cache_features to false")
        below = None if self._cache or index == 0 else partial(self._below, index)
        inputs = LayerInputs(
            layer,
            self.store,
            positions=train.positions,
            below=below,
            on_progress=lambda done: self.observer.progress("cache", done, self.store.count, layer=index),
            labels=self.labels if config.supervised else None,
        )
        levers = [Lever(f"{key}.train.batch_size", min(train.batch_size, self.store.count))]
        levers += [] if train.positions is None else [Lever(f"{key}.train.positions", train.positions)]
        self._memory.begin(f"layer {index}, learning", *levers, otherwise="use more ranks")
        self.observer.started(index, layer)
        recorded = layer.by_kernel  # the host then never waits for the device within an update
        graph = new_graph(self.device) if recorded and below is None and layer.exchange.capturable else None
        with (
            closing(inputs.staged(batches, first)) as staged,
            closing(self._updates(layer, inputs, graph, recorded=recorded)) as updates,
        ):
            for number in range(first + 1, len(batches) + 1):
                last, every = number == len(batches), self._measure_every
                measured = every is not None and (last or number % every == 0)
                look = measured or last or number % LOOK_EVERY == 0
                with self.observer.updating(index, layer):
                    with timed("input"):
                        batch = next(staged)
                    patches, solution = updates(batch)
                    if look:
                        layer.raise_faults()
                measurement = measure(layer, patches, solution, batch.labels) if measured else None
                looked = look or not recorded
                self.observer.updated(Update(index, layer, number, len(batches), batch.images, measurement, looked))

    def _updates(
        self, layer: SimilarityMatchingConv2d, inputs: LayerInputs, graph: Graph | None, *, recorded: bool
    ) -> Updates[tuple[Patches, Solution]]:
        """Updates of one layer, each from a batch on the device."""

        def make(batch: Staged) -> tuple[Patches, Solution]:
            with timed("input"):
                patches = inputs.prepare(batch)
            return patches, layer.partial_fit(patches, batch.labels, recorded=recorded)

        return Updates(make, graph, layer.exchange)

    def _labels(self, chosen: slice) -> Tensor:
        assert self.labels is not None
        return self.labels[chosen].to(self.device)

    def _calibrate(self, index: int, config: LayerConfig, layer: SimilarityMatchingConv2d) -> None:
        """Rank 0 calibrates the layer, and all ranks use its result."""
        self.observer.progress("calibrate", 0, 1, layer=index)
        sample = self.store.first(min(config.whiten_images, self.store.count))
        work = partial(layer.calibrate, sample, config.whiten_patches)
        self.observer.on_one_rank(work if self.mesh.everyone.rank == 0 else None)
        for name in MEASURED:
            if hasattr(layer, name):
                self.mesh.everyone.broadcast(getattr(layer, name), source=0).wait()
        self.observer.progress("calibrate", 1, 1, layer=index)

    # ------------------------------------------------------------------------------------------- encoding

    def activities(self, index: int, x: Tensor) -> Tensor:
        """Label-free activities [B, K, H', W'] of a trained layer for its input."""
        layer = self.stack.layer(index)
        activities: Tensor = layer.solve(x).y if self._to_tolerance else layer(x)
        return activities

    def _below(self, index: int, x: Tensor) -> Tensor:
        """The input of a layer for images."""
        for number, config in enumerate(self.layers[:index]):
            x = pooled(self.activities(number, x), config)
        return x

    def _encode(self, index: int) -> None:
        """Encode all images with one layer, and scale its V to label-free activity, unless that has been done."""
        layer, config = self.stack.layer(index), self.layers[index]
        settling = config.supervised and index >= self._settled
        yz = torch.zeros_like(layer.label)
        zz = yz.new_zeros(layer.num_classes, layer.num_classes)
        started = time.monotonic()

        def encode(x: Tensor, images: slice) -> Tensor:
            activities = self.activities(index, x)
            if settling:
                z = one_hot(self._labels(images), layer.num_classes, layer.label)
                yz.add_(reduce(activities, "b k h w -> k b", "mean") @ z.T)
                zz.add_(z @ z.T)
            passed = pooled(activities, config)
            self.observer.encoded(index, activities, passed)
            return passed

        def on_progress(done: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            self.observer.progress("encode", done, self.store.count, layer=index, images_per_second=rate)
            self._memory.proceed(done / self.store.count)

        size = Lever("encode_batch", min(self._encode_batch, self.store.count))
        self._memory.begin(f"layer {index}, encoding", size, otherwise="use more ranks")
        self.store.advance(encode, on_progress)
        if settling:
            layer.settle_label(sum_over_ranks(yz, self.mesh.everyone), sum_over_ranks(zz, self.mesh.everyone))


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
