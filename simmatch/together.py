"""The schedule `together`: all layers learn in one pass over the images.

For update u of the pass, each layer from the first one on makes one local update from batch u, which is then replaced
by its label-free, pooled activity after this update, for the layer above (`simmatch.stage_layers`).

Nothing flows backward. So the layers can be split into stages on different ranks (axis `layer`): a stage sends batch u
on and learns from batch u + 1, while the stage above learns from batch u. Weights are the same bits at any number of
stages. Messages from stage to stage, in this order, for every update: the batch (empty while no layer above has begun);
then, for each layer above that begins, the images from which it is calibrated, in blocks. A replica reads, encodes and
sends on its own images of every batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing

from torch import Tensor

from simmatch.data.staging import Tensors
from simmatch.inputs import Staged
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.learning import Setup
from simmatch.model import layer_inputs
from simmatch.observer import Pass
from simmatch.schedule import learning_updates
from simmatch.sharding.columns import Part
from simmatch.sharding.passing import Inlet, Outlet
from simmatch.stage_layers import StageLayers
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
        self._layers: StageLayers
        self._below: Inlet | None = None
        self._above: Outlet | None = None

    def learn(self) -> dict[int, SimilarityMatchingConv2d]:
        """Make the remaining updates of the pass; returns this rank's rows of the layers of its stage."""
        setup = self._setup
        self._layers = StageLayers(setup, self._own, self.updates, part=self._part)
        for index, layer in self._layers.layers.items():
            setup.observer.restore(index, layer)
        first = self._layers.agree()
        self._below = self._inlet(first)
        if self._below is not None:
            self._layers.receive = self._below.receive
        self._above = None if setup.mesh.above is None else Outlet(setup.mesh.above)
        with ExitStack() as stack:
            batches = stack.enter_context(closing(self._staged(first)))
            stack.callback(self._layers.close)
            for number, parts in enumerate(batches, first + 1):
                if self._update(number, parts):
                    break
            self._wait_for_stages_above()
        return self._layers.layers

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
            yield number, size if self._layers.begun(number) >= self._own.start else 0
            for index in self._layers.begin(number, range(self._own.start, len(self.updates))):
                for block in self._layers.blocks(index):
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
                yield *images, *(() if labels is None else (labels.index_select(0, chosen),))

        return setup.store.staged(selected())

    def _read(self, number: int, parts: Tensors) -> tuple[Tensor, Tensor | None, bool]:
        """Input of the first layer of this stage, labels, and whether learning stops after this update."""
        if self._below is None:
            stop = self._setup.observer.stop_after(number)
            x, *labels = parts
            return self._setup.store.unit(x), labels[0] if labels else None, stop
        x, stop = self._below.receive()
        return x, parts[0] if parts else None, stop

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
        setup, layers = self._setup, self._layers
        x, labels, stop = self._read(number, parts)
        count = self._batches.size(number - 1)
        x = layers.update(number, Staged(x, labels, count))
        if self._above is not None:
            self._above.send(x if layers.begun(number) >= self._own.stop else x[:0], stop=stop)
            for index in layers.begin(number, range(self._own.stop, len(self.updates))):
                for _, x in layers.sample(index):
                    self._above.send(x, stop=stop)
            if stop or number == self.total:
                self._above.flush()
        setup.observer.passed(Pass(number, self.total, layers.layers, count, stop))
        return stop
