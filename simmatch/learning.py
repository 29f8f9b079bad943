"""What the schedules of learning share: the layers of this rank, their calibration, their updates, and their end.

A schedule (`simmatch.greedy`, `simmatch.together`) decides which layer learns when, and from which batches. How a layer
is made, calibrated, updated, measured and completed is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simmatch.captured import Updates, new_graph
from simmatch.config import LayerConfig, Reduce, TrainConfig
from simmatch.data.order import Batches
from simmatch.features import FeatureStore
from simmatch.geometry import Patches
from simmatch.inputs import Staged
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import measure
from simmatch.memory import Lever, MemoryWatch
from simmatch.model import Stack, build_layer, layer_inputs
from simmatch.observer import Observer, Update
from simmatch.parts import timed
from simmatch.sharding.blocks import aligned
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from simmatch.sharding.state import Numbered, gather_layer, moments_over_ranks
from simmatch.solvers.dynamics import Solution

LOOK_EVERY = 100
"""Updates between two looks at recorded faults, if none of them is measured."""

MEASURED = ("whitening", "whitening_mean", "input_power")
"""Buffers that calibration fills, if they exist."""


@dataclass(frozen=True)
class Setup:
    """What a stack learns from and with, on this rank.

    Attributes
    ----------
    stack: the stack; its layers are complete once they have learnt.
    layers: configurations of the layers to train, from the first one on.
    store: the images, and later their features.
    labels: [N], on the host, or None.
    blocks: as for `Trainer`.
    mesh: this rank's connections.
    alone: whether a single process trains the stack's own layers.
    reduce: as for `Trainer`.
    observer: follows the training.
    memory: names what runs where memory does not suffice.
    measure_every, to_tolerance: as for `Trainer`.

    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig, ModelConfig
    >>> images = torch.rand(250, 1, 8, 8)
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> len(setup.batches(model.layers[0].train)), setup.new_layer(0).feedforward.shape
    (3, torch.Size([8, 1, 3, 3]))
    """

    stack: Stack
    layers: tuple[LayerConfig, ...]
    store: FeatureStore
    labels: Tensor | None
    blocks: Tensor | None
    mesh: Mesh
    alone: bool
    reduce: Reduce
    observer: Observer
    memory: MemoryWatch
    measure_every: int | None
    to_tolerance: bool

    @property
    def device(self) -> torch.device:
        return self.stack.layer(0).feedforward.device

    def batches(self, train: TrainConfig) -> Batches:
        """The batches from which a layer learns."""
        count = self.store.count
        images = None if train.images is None else min(train.images, count)
        return Batches(
            count, train.batch_size, epochs=train.epochs, seed=self.stack.seed, images=images, blocks=self.blocks
        )

    def new_layer(self, index: int) -> SimilarityMatchingConv2d:
        """This rank's rows of an untrained layer; in a single process, the stack's own layer."""
        if self.alone:
            return self.stack.layer(index)
        channels = Lever(f"model.layers.{index}.out_channels", self.layers[index].out_channels)
        self.memory.begin(f"layer {index}, making its weights", channels)
        stack, shards = self.stack, split_rows(self.layers[index].out_channels, self.mesh.owners.world_size)
        return build_layer(
            stack.config,
            stack.source,
            index,
            seed=stack.seed,
            dtype=stack.dtype,
            device=self.device,
            rows=shards[self.mesh.owners.rank],
            mesh=self.mesh,
            reduce=self.reduce,
        )

    def encoded(self, layer: SimilarityMatchingConv2d, x: Tensor) -> Tensor:
        """Label-free activities [B, K, H', W'] of a layer for its input."""
        x = aligned(x) if self.reduce == "exact" else x
        activities: Tensor = layer.solve(x).y if self.to_tolerance else layer(x)
        return activities

    def begin(self, index: int) -> None:
        """Note that a layer learns from now on, for the error where memory does not suffice."""
        key, train = f"model.layers.{index}.train", self.layers[index].train
        levers = [Lever(f"{key}.batch_size", min(train.batch_size, self.store.count))]
        levers += [] if train.positions is None else [Lever(f"{key}.positions", train.positions)]
        self.memory.begin(f"layer {index}, learning", *levers, otherwise="use more ranks")

    def calibrate(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """Calibrate a layer on the first images of the store, of which each rank measures its own."""
        self.calibrate_from(index, layer, self.store.first(self.sample_size(index)), self.mesh.everyone)

    def calibrate_from(
        self,
        index: int,
        layer: SimilarityMatchingConv2d,
        parts: Generator[tuple[slice, Tensor]],
        ranks: Exchange,
    ) -> None:
        """Sum the moments of the patches that each rank has, solve for the whitening, and use the result of rank 0.

        Parameters
        ----------
        parts: of the images from which the layer is calibrated, this rank's: their range, and the layer's input.
        ranks: connects those that calibrate the layer together.
        """
        count = self.sample_size(index)
        self.memory.begin(f"layer {index}, calibrating", Lever("encode_batch", min(self.store.batch, self.store.count)))
        _, size = layer_inputs(self.stack.config, self.stack.source)[index]
        sample = layer.patch_sample(count, size, self.layers[index].whiten_patches)

        def rows() -> Generator[tuple[int, Tensor]]:
            for part, x in parts:
                yield part.start, x.new_zeros(0, 1)  # a block is a step for all ranks, whatever they have of it
                for some in sample.rows(x, part.start):
                    yield part.start, some
                self.observer.progress("calibrate", part.start, count, layer=index)

        order = Numbered(self.store.batch, count) if self.reduce == "exact" else None
        with closing(parts), closing(rows()) as blocks:
            moments = moments_over_ranks(blocks, sample.moments(self.device), ranks, order=order)
        self.observer.on_one_rank(partial(layer.set_input, moments) if ranks.rank == 0 else None, ranks)
        for name in MEASURED:
            if hasattr(layer, name):
                ranks.broadcast(getattr(layer, name), source=0).wait()
        self.observer.progress("calibrate", count, count, layer=index)

    def sample_size(self, index: int) -> int:
        """Number of images from which a layer is calibrated."""
        return min(self.layers[index].whiten_images, self.store.count)

    def complete(self, index: int, layer: SimilarityMatchingConv2d | None, stage: int = 0) -> None:
        """Gather all rows of a layer that has learnt, so that every rank can encode images alone.

        Parameters
        ----------
        layer: this rank's rows; None on the ranks of other stages.
        stage: the stage that holds the layer.
        """
        whole, mesh = self.stack.layer(index), self.mesh
        if layer is whole:
            layer.recertify()  # activities are then equal to those of the exported model
        elif layer is not None:
            gather_layer(layer, whole)
        if mesh.stages > 1:
            for tensor in whole.state_dict().values():
                mesh.everyone.broadcast(tensor, source=stage * mesh.columns.world_size).wait()
            whole.recertify()
        self.observer.learnt(index, whole)


class Learner:
    """Makes the updates of one layer, and tells the observer of them.

    Parameters
    ----------
    setup: what the stack learns with.
    index, layer: the layer, calibrated.
    total: number of updates of the layer.
    prepare: patches of a batch on the device.
    capture: whether `prepare` starts work on the device only, so that it may be part of a CUDA graph.

    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig, ModelConfig
    >>> images = torch.rand(20, 1, 8, 8)
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> layer = setup.new_layer(0)
    >>> learner = Learner(setup, 0, layer, total=1, prepare=lambda batch: layer.prepare(batch.source), capture=True)
    >>> learner.update(1, iter([Staged(images, labels=None, images=20)]))
    >>> learner.close()
    >>> int(layer.updates)
    1
    """

    def __init__(
        self,
        setup: Setup,
        index: int,
        layer: SimilarityMatchingConv2d,
        *,
        total: int,
        prepare: Callable[[Staged], Patches],
        capture: bool,
    ) -> None:
        self._setup, self.index, self.layer, self.total = setup, index, layer, total
        self._recorded = recorded = layer.by_kernel  # the host then never waits for the device within an update
        exchanges = layer.mesh.learning
        capture = recorded and capture and all(exchange.capturable for exchange in exchanges)

        def make(batch: Staged) -> tuple[Patches, Solution]:
            with timed("input"):
                patches = prepare(batch)
            return patches, layer.partial_fit(patches, batch.labels, batch.weights, recorded=recorded)

        self._updates = Updates(make, new_graph(setup.device) if capture else None, exchanges)

    def update(self, number: int, batches: Iterator[Staged], solved: tuple[Patches, Solution] | None = None) -> None:
        """Make one update, from the next batch; `number` counts from 1.

        solved: patches of the whole batch and their solution, as for `partial_fit`, where they are known already.
        """
        layer, every = self.layer, self._setup.measure_every
        last = number == self.total
        measured = every is not None and (last or number % every == 0)
        look = measured or last or number % LOOK_EVERY == 0
        with self._setup.observer.updating(self.index, layer):
            with timed("input"):
                batch = next(batches)
            if solved is None:
                patches, solution = self._updates(batch)
            else:
                patches, known = solved
                options: dict[str, Any] = {"solution": known, "recorded": self._recorded}
                solution = layer.partial_fit(patches, batch.labels, batch.weights, **options)
            if look:
                layer.raise_faults()
        measurement = measure(layer, patches, solution, batch.labels) if measured else None
        looked = look or not self._recorded
        self._setup.observer.updated(Update(self.index, layer, number, self.total, batch.images, measurement, looked))

    def close(self) -> None:
        """Release the memory of a captured update."""
        self._updates.close()
