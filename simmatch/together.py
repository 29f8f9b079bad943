"""The schedule `together`: all layers learn in one pass over the images.

    for update u of the pass, for each layer from the first one on:
        calibrate   if the layer begins: on the first images, as the layers below encode them now
        learn       make one local update from batch u
        encode      replace the batch by the label-free, pooled activity after this update, for the layer above

Nothing flows backward. So the layers can be split into stages on different ranks (axis `layer`): a stage sends batch u
on and learns from batch u + 1, while the stage above learns from batch u. Weights are the same bits at any number of
stages. Messages from stage to stage, in this order, for every update: the batch (empty while no layer above has begun);
then, for each layer above that begins, the images from which it is calibrated, in blocks. A replica reads, encodes and
sends on its own images of every batch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing

import torch
from torch import Tensor

from simmatch.data.staging import Tensors
from simmatch.geometry import Patches
from simmatch.inputs import Staged
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.learning import Learner, Setup
from simmatch.model import layer_inputs, pooled
from simmatch.observer import Pass
from simmatch.schedule import learning_updates
from simmatch.sharding.blocks import cut
from simmatch.sharding.columns import Part
from simmatch.sharding.passing import Inlet, Outlet
from simmatch.sharding.state import gather_from_ranks
from simmatch.stages import stages_of


class Together:
    """This rank's part in a pass in which all layers learn.

    Parameters
    ----------
    setup: what the stack learns with.

    Attributes
    ----------
    stages: the layers of each stage.
    updates: the updates of the pass that each layer makes.

    Raises
    ------
    ValueError
        A layer would begin after the pass has ended, or there are more stages than layers.

    >>> from simmatch import LayerConfig, ModelConfig, Stack
    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig
    >>> images = torch.rand(200, 1, 8, 8)
    >>> layers = LayerConfig(out_channels=8, kernel_size=3, pool=2), LayerConfig(out_channels=4, kernel_size=2)
    >>> model = ModelConfig(layers=layers, schedule="together")
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> with torch.no_grad():
    ...     learnt = Together(setup).learn()
    >>> [int(layer.updates) for layer in learnt.values()]
    [2, 2]
    """

    def __init__(self, setup: Setup) -> None:
        model, source = setup.stack.config, setup.stack.source
        self._setup = setup
        self._batches = setup.batches(model.layers[0].train)
        self.updates = learning_updates(model, len(self._batches))[: len(setup.layers)]
        self.total = self.updates[-1].stop - 1
        self.stages = stages_of(model.model_copy(update={"layers": setup.layers}), source, setup.mesh.stages)
        self._own, self._shapes = self.stages[setup.mesh.stage], layer_inputs(model, source)
        self._calibrated_at: list[int | None] = []
        self._layers: dict[int, SimilarityMatchingConv2d] = {}
        self._learners: dict[int, Learner] = {}
        self._below: Inlet | None = None
        self._above: Outlet | None = None

    def learn(self) -> dict[int, SimilarityMatchingConv2d]:
        """Make the remaining updates of the pass; returns this rank's rows of the layers of its stage."""
        setup = self._setup
        self._layers = {index: setup.new_layer(index) for index in self._own}
        for index, layer in self._layers.items():
            setup.observer.restore(index, layer)
        first = self._agree()
        self._below = self._inlet(first)
        self._above = None if setup.mesh.above is None else Outlet(setup.mesh.above)
        with ExitStack() as stack:
            batches = stack.enter_context(closing(self._staged(first)))
            stack.callback(self._close)
            for number, parts in enumerate(batches, first + 1):
                if self._update(number, parts):
                    break
            self._wait_for_stages_above()
        return self._layers

    def _close(self) -> None:
        for learner in self._learners.values():
            learner.close()

    # ------------------------------------------------------------------------------------------- where it stands

    def _agree(self) -> int:
        """The updates of the pass that an earlier run has made, equal on all ranks; and when layers are calibrated.

        Raises
        ------
        ValueError
            Layers that have not been restored from one update.
        """
        known = torch.zeros(2, len(self.updates), dtype=torch.int64, device=self._setup.device)
        for index, layer in self._layers.items():
            known[0, index], known[1, index] = layer.updates, layer.calibrated
        made, calibrated = gather_from_ranks(known, self._setup.mesh.everyone).amax(dim=0).tolist()
        counts = list(zip(self.updates, made, strict=True))
        first = max((each.start - 1 + count for each, count in counts if count), default=0)
        for index, (each, count) in enumerate(counts):
            expected = len(range(each.start, min(each.stop, first + 1)))
            if count != expected:
                raise ValueError(f"layer {index}: expected {expected} updates after {first} of the pass, got {count}")
        self._calibrated_at = [
            None if count or done else each.start for (each, count), done in zip(counts, calibrated, strict=True)
        ]
        return first

    def _begun(self, number: int) -> int:
        """The last layer that has begun by this update of the pass."""
        return max(index for index, each in enumerate(self.updates) if each.start <= number)

    def _blocks(self, index: int) -> list[slice]:
        """The images from which a layer is calibrated, in the parts in which they are encoded."""
        return cut(self._setup.sample_size(index), self._setup.store.batch)

    def _begins(self, number: int, layers: range) -> list[int]:
        """Those of the layers that are calibrated in this update of the pass."""
        return [index for index in layers if self._calibrated_at[index] == number]

    # ------------------------------------------------------------------------------------------- from stage to stage

    def _inlet(self, first: int) -> Inlet | None:
        link, like = self._setup.mesh.below, self._setup.stack.layer(0).feedforward
        if link is None:
            return None
        channels, (height, width) = self._shapes[self._own.start]
        return Inlet(link, (channels, height, width), self._messages(first), like=like)

    def _messages(self, first: int) -> Iterator[tuple[int, int]]:
        """The update to which every message from the stage below belongs, and its number of images."""
        for number in range(first + 1, self.total + 1):
            size = self._part(self._batches.size(number - 1)).count
            yield number, size if self._begun(number) >= self._own.start else 0
            for index in self._begins(number, range(self._own.start, len(self.updates))):
                for block in self._blocks(index):
                    yield number, block.stop - block.start

    def _part(self, images: int) -> Part:
        """The images of a batch that this replica encodes: its own, or all where a layer splits columns, as its
        label-free encoding is split over all ranks too."""
        replicas = self._setup.mesh.replicas
        apart = all(layer.dynamics.exchange != "gather_state" for layer in self._setup.layers)
        ranks, rank = (replicas.world_size, replicas.rank) if apart else (1, 0)
        return Part.of_images(images, 1, ranks=ranks, rank=rank)

    def _staged(self, first: int) -> Generator[tuple[Tensor, ...]]:
        """Of every batch what this stage reads, on the device: the images, on the first stage, and all labels."""
        setup = self._setup
        supervised = any(setup.layers[index].supervised for index in self._own)
        labels = setup.labels if supervised else None

        def selected() -> Iterator[Tensors]:
            for number in range(first, self.total):
                chosen = self._batches[number]
                own = chosen[self._part(len(chosen)).images]
                images = () if setup.mesh.stage > 0 else (setup.store.stored(own),)
                yield *images, *(() if labels is None else (labels.index_select(0, chosen.to(labels.device)),))

        return setup.store.staged(selected())

    def _read(self, number: int, parts: Tensors) -> tuple[Tensor, Tensor | None, bool]:
        """Input of the first layer of this stage, labels, and whether learning stops after this update."""
        if self._below is None:
            stop = self._setup.observer.stop_after(number)
            x, *labels = parts
            return self._setup.store.unit(x), labels[0] if labels else None, stop
        x, stop = self._below.receive()
        return x, parts[0] if parts else None, stop

    def _sample(self, index: int) -> Generator[tuple[slice, Tensor]]:
        """The images from which a layer is calibrated, as the layers of this stage below it encode them, in blocks."""
        store = self._setup.store
        for block in self._blocks(index):
            if self._below is None:
                x = store.unit(store.stored(block).to(self._setup.device))
            else:
                x, _ = self._below.receive()
            for below in range(self._own.start, min(index, self._own.stop)):
                x = self._encode(below, x)
            yield block, x

    def _shares(self, index: int) -> Generator[tuple[slice, Tensor]]:
        """Of the images from which a layer is calibrated, the blocks that this rank measures; all ranks encode all.

        Of the others none of the images, so that all ranks are at the same block: encoding exchanges activities.
        """
        ranks = self._setup.mesh.columns
        for number, (part, x) in enumerate(self._sample(index)):
            yield part, x if number % ranks.world_size == ranks.rank else x[:0]

    def _wait_for_stages_above(self) -> None:
        """Until they have made their last updates: over the links, as an exchange of all ranks has less time."""
        mesh, token = self._setup.mesh, self._setup.stack.layer(0).feedforward.new_zeros(1)
        if mesh.above is not None:
            mesh.above.receive(token).wait()
            token.cpu()  # the host waits too
        if mesh.below is not None:
            mesh.below.send(token).wait()

    # ------------------------------------------------------------------------------------------- one update

    def _update(self, number: int, parts: Tensors) -> bool:
        """One update of the pass; returns whether learning stops after it."""
        setup, begun = self._setup, self._begun(number)
        x, labels, stop = self._read(number, parts)
        count = self._batches.size(number - 1)
        for index in range(self._own.start, min(begun + 1, self._own.stop)):
            setup.begin(index)
            if self._calibrated_at[index] == number:
                sample, ranks = self._shares(index), setup.mesh.columns
                setup.calibrate_from(index, self._layers[index], sample, ranks)
                setup.begin(index)
            if number in self.updates[index]:
                batch = Staged(x, labels if setup.layers[index].supervised else None, count)
                self._learner(index).update(number - self.updates[index].start + 1, iter([batch]))
            if index < begun:
                x = self._encode(index, x)
        if self._above is not None:
            self._above.send(x if begun >= self._own.stop else x[:0], stop=stop)
            for index in self._begins(number, range(self._own.stop, len(self.updates))):
                for _, x in self._sample(index):
                    self._above.send(x, stop=stop)
            if stop or number == self.total:
                self._above.flush()
        setup.observer.passed(Pass(number, self.total, self._layers, count, stop))
        return stop

    def _learner(self, index: int) -> Learner:
        """Makes the updates of a layer; from its first one on."""
        if index not in self._learners:
            layer, positions = self._layers[index], self._setup.layers[index].train.positions

            columns = positions or math.prod(layer.patch.map_size(self._shapes[index][1]))

            def prepare(batch: Staged) -> Patches:
                part, first = layer.sharing.part(batch.images, columns), self._part(batch.images).images.start
                inside = slice(part.images.start - first, part.images.stop - first)
                return layer.prepare(batch.source[inside], positions, part=part)

            self._setup.observer.started(index, layer)
            total = len(self.updates[index])
            self._learners[index] = Learner(self._setup, index, layer, total=total, prepare=prepare, capture=True)
        return self._learners[index]

    def _encode(self, index: int, x: Tensor) -> Tensor:
        """Label-free, pooled activities of a layer as it is now; laid out as those that arrive from another stage."""
        layer = self._layers[index]
        with self._setup.observer.encoding(index, layer):
            return pooled(self._setup.encoded(layer, x), self._setup.layers[index]).contiguous()
