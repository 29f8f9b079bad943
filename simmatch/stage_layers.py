"""The layers of a stage, which learn together: one update of each of them from one batch.

    for each layer that has begun, from the first one on:
        calibrate   if it begins: on the first images, as the layers below encode them now
        learn       make one local update
        encode      replace the batch by the label-free, pooled activity after this update, for the layer above

A pass over images (`simmatch.together`) and a stream of batches that does not end (`simmatch.online`) are the same
updates, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simmatch.geometry import Patches
from simmatch.inputs import Staged
from simmatch.learning import Learner, Setup
from simmatch.model import layer_inputs, pooled
from simmatch.sharding.blocks import aligned, cut
from simmatch.sharding.columns import Part
from simmatch.sharding.state import gather_from_ranks
from simmatch.solvers.dynamics import Solution


@dataclass(frozen=True, eq=False)
class Solved:
    """What a layer has made of a whole batch without labels, with its weights as they are.

    Attributes
    ----------
    patches, solution: of the batch: what the layer learns from, as long as neither its weights nor those below change.
    passed: [B, K, *pool], the output of the layer.

    >>> from simmatch import SimilarityMatchingConv2d
    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> patches = layer.prepare(torch.rand(2, 1, 8, 8))
    >>> solution = layer.solve(patches)
    >>> Solved(patches, solution, passed=solution.y).passed.shape
    torch.Size([2, 4, 6, 6])
    """

    patches: Patches
    solution: Solution
    passed: Tensor


class StageLayers:
    """Makes the updates of the layers of a stage.

    Parameters
    ----------
    setup: what the stack learns with.
    own: the layers of this stage.
    updates: the updates of the pass that each layer of the stack makes.
    part: of a batch of so many images, those that this rank has; None: all.

    Attributes
    ----------
    layers: this rank's rows of the layers of this stage.
    receive: gets the activities of the next block of images, and a flag, from the stage below; None at the first stage.

    >>> from simmatch import LayerConfig, ModelConfig, Stack
    >>> from simmatch.fit import Trainer
    >>> from simmatch.model import InputConfig
    >>> images, layer = torch.rand(20, 1, 8, 8), LayerConfig(out_channels=8, kernel_size=3, pool=2)
    >>> model = ModelConfig(layers=(layer, layer.model_copy(update={"kernel_size": 2, "pool": None})))
    >>> setup = Trainer(Stack(model, InputConfig.of(images, num_classes=0)), images).setup
    >>> layers = StageLayers(setup, range(2), [range(1, 10), range(1, 10)])
    >>> layers.agree()
    0
    >>> with torch.no_grad():
    ...     layers.update(1, Staged(images, labels=None, images=20)).shape
    torch.Size([20, 8, 2, 2])
    """

    def __init__(
        self, setup: Setup, own: range, updates: Sequence[range], *, part: Callable[[int], Part] | None = None
    ) -> None:
        self.layers = {index: setup.new_layer(index) for index in own}
        self.receive: Callable[[], tuple[Tensor, bool]] | None = None
        self._setup, self._own, self._updates, self._part = setup, own, updates, part
        self._shapes = layer_inputs(setup.stack.config, setup.stack.source)
        self._calibrated_at: list[int | None] = []
        self._learners: dict[int, Learner] = {}

    def close(self) -> None:
        """Release the memory of captured updates."""
        for learner in self._learners.values():
            learner.close()
        self._learners.clear()

    # ------------------------------------------------------------------------------------------- where it stands

    def agree(self) -> int:
        """The updates of the pass that an earlier run has made, equal on all ranks; and when layers are calibrated.

        Raises
        ------
        ValueError
            Layers that have not been restored from one update.
        """
        known = torch.zeros(2, len(self._updates), dtype=torch.int64, device=self._setup.device)
        for index, layer in self.layers.items():
            known[0, index], known[1, index] = layer.updates, layer.calibrated
        made, calibrated = gather_from_ranks(known, self._setup.mesh.everyone).amax(dim=0).tolist()
        counts = list(zip(self._updates, made, strict=True))
        first = max((each.start - 1 + count for each, count in counts if count), default=0)
        for index, (each, count) in enumerate(counts):
            expected = len(range(each.start, min(each.stop, first + 1)))
            if count != expected:
                raise ValueError(f"layer {index}: expected {expected} updates after {first} of the pass, got {count}")
        self._calibrated_at = [
            None if count or done else each.start for (each, count), done in zip(counts, calibrated, strict=True)
        ]
        return first

    def begun(self, number: int) -> int:
        """The last layer of the stack that has begun by this update of the pass."""
        return max(index for index, each in enumerate(self._updates) if each.start <= number)

    def begin(self, number: int, layers: range) -> list[int]:
        """Those of the layers that are calibrated in this update of the pass."""
        return [index for index in layers if self._calibrated_at[index] == number]

    # ------------------------------------------------------------------------------------------- calibration

    def blocks(self, index: int) -> list[slice]:
        """The images from which a layer is calibrated, in the parts in which they are encoded."""
        return cut(self._setup.sample_size(index), self._setup.store.batch)

    def sample(self, index: int) -> Generator[tuple[slice, Tensor]]:
        """The images from which a layer is calibrated, as the layers of this stage below it encode them, in blocks."""
        store = self._setup.store
        for block in self.blocks(index):
            if self.receive is None:
                x = store.unit(store.stored(block).to(self._setup.device))
            else:
                x, _ = self.receive()
            for below in range(self._own.start, min(index, self._own.stop)):
                x = self._encode(below, x)
            yield block, x

    def _shares(self, index: int) -> Generator[tuple[slice, Tensor]]:
        """Of the images from which a layer is calibrated, the blocks that this rank measures; all ranks encode all.

        Of the others none of the images, so that all ranks are at the same block: encoding exchanges activities.
        """
        ranks = self._setup.mesh.columns
        for number, (part, x) in enumerate(self.sample(index)):
            yield part, x if number % ranks.world_size == ranks.rank else x[:0]

    def calibrate(self, index: int) -> None:
        """Calibrate a layer, as the layers below are now."""
        self._setup.calibrate_from(index, self.layers[index], self._shares(index), self._setup.mesh.columns)

    # ------------------------------------------------------------------------------------------- one update

    def update(self, number: int, batch: Staged, solved: Mapping[int, Solved] | None = None) -> Tensor:
        """One update of the pass; returns the output of the last layer of this stage that has one above it.

        Parameters
        ----------
        number: of the update of the pass, from 1.
        batch: its source is this rank's input of the first layer of the stage, and its labels are those of all images.
        solved: by layer, what it has made of the whole batch with its present weights.
        """
        setup, begun, x, known = self._setup, self.begun(number), batch.source, dict(solved or {})
        for index in range(self._own.start, min(begun + 1, self._own.stop)):
            setup.begin(index)
            if self._calibrated_at[index] == number:
                self.calibrate(index)
                setup.begin(index)
                known.clear()
            if number in self._updates[index]:
                labels = batch.labels if setup.layers[index].supervised else None
                own, ready = replace(batch, source=x, labels=labels), self._ready(index, labels, known)
                self._learner(index).update(number - self._updates[index].start + 1, iter([own]), ready)
                known.clear()  # of this layer and those above
            if index < begun:
                x = known[index].passed if index in known else self._encode(index, x)
        return x

    def _ready(self, index: int, labels: Tensor | None, known: Mapping[int, Solved]) -> tuple[Patches, Solution] | None:
        """What an update need not solve again: the same bits, where no label drives it and all positions are used."""
        layer, config = self.layers[index], self._setup.layers[index]
        driven = labels is not None and layer.label_gain > 0
        if index not in known or driven or config.train.positions is not None or not layer.learns_from_solutions:
            return None
        return known[index].patches, known[index].solution

    def _learner(self, index: int) -> Learner:
        """Makes the updates of a layer; from its first one on."""
        if index not in self._learners:
            layer, positions = self.layers[index], self._setup.layers[index].train.positions
            columns = positions or math.prod(layer.patch.map_size(self._shapes[index][1]))

            def prepare(batch: Staged) -> Patches:
                part = layer.sharing.part(batch.images, columns)
                first = 0 if self._part is None else self._part(batch.images).images.start
                inside = slice(part.images.start - first, part.images.stop - first)
                return layer.prepare(batch.source[inside], positions, part=part)

            self._setup.observer.started(index, layer)
            total = len(self._updates[index])
            self._learners[index] = Learner(self._setup, index, layer, total=total, prepare=prepare, capture=True)
        return self._learners[index]

    # ------------------------------------------------------------------------------------------- encoding

    def _encode(self, index: int, x: Tensor) -> Tensor:
        """Label-free, pooled activities of a layer as it is now; laid out as those that arrive from another stage."""
        layer = self.layers[index]
        with self._setup.observer.encoding(index, layer):
            return pooled(self._setup.encoded(layer, x), self._setup.layers[index]).contiguous()

    def solve(self, index: int, x: Tensor) -> Solved:
        """`_encode`, with all that the layer would otherwise have to compute again to learn from these images."""
        layer, setup = self.layers[index], self._setup
        patches = layer.prepare(aligned(x) if setup.reduce == "exact" else x)
        solution = layer.solve(patches)
        return Solved(patches, solution, pooled(solution.y, setup.layers[index]).contiguous())
