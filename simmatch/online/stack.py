"""A stack that learns from a stream: every batch is encoded first, to be tested on, and then learnt from.

    encoded = stack.encode(x)                # label-free, with the weights as they are
    stack.learn(encoded, labels, weights)    # one update of all layers: that of `schedule: together`

The updates are those of the trainer (`simmatch.stage_layers`): the same batches in the same order give the same bits.
What `encode` has solved is not solved again by `learn` where the bits are the same.

A layer is calibrated when it begins, on the first records as the layers below encode them then, and stays so. These
records are kept until the last layer has begun.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from simmatch.arguments import check_classes, check_images
from simmatch.config import ModelConfig, Reduce
from simmatch.data.sources import to_unit
from simmatch.data.staging import moved
from simmatch.features import FeatureStore
from simmatch.inputs import Staged
from simmatch.learning import Setup
from simmatch.memory import MemoryWatch
from simmatch.model import InputConfig, Stack, readout_input
from simmatch.observer import Observer
from simmatch.online.arguments import (
    check_calibrated,
    check_records,
    check_uncalibrated,
    learnable,
    learnable_labels,
    streaming,
)
from simmatch.online.encoded import Encoded
from simmatch.online.label_sums import LabelSums
from simmatch.online.rate import RateConfig
from simmatch.online.signals import label_free_signals
from simmatch.online.state import State, part_of
from simmatch.plasticity import Weights
from simmatch.schedule import learning_updates
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import gather_layer, gather_rows, load_rows, whole_state
from simmatch.stage_layers import StageLayers

ENDLESS = 1 << 62
"""Updates of a pass that does not end."""


class OnlineStack:
    """A stack of layers that learns from batches of a stream.

    Parameters
    ----------
    model: the layers; several layers need `schedule: together`. Of `train` only `positions` and `start_after` are used.
    source: channels, size and number of classes of the records.
    seed: of the weights and of drawn positions, as for `Stack`.
    rate: how the learning rates change.
    mesh: connects to the other ranks, all of which call the same methods with the same arguments. None: a single
        process.
    reduce: as for `Trainer`.
    dtype, device: of all weights.

    Attributes
    ----------
    stack: in a single process the layers that learn; `export` gives a copy to keep, with any number of ranks.
    source: as given, with the classes that were added since.
    updates: number of updates so far.

    Raises
    ------
    ConfigError
        A layer does not fit its input, several layers without `schedule: together`, or a layer that cannot have
        `reduce: exact`.

    >>> from simmatch.config import LayerConfig
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=(1, 5), pool=(1, 2)),))
    >>> online = OnlineStack(model, InputConfig(in_channels=1, height=1, width=32, num_classes=2))
    >>> windows = torch.rand(40, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    >>> online.calibrate(windows[:20])
    >>> for batch in windows.split(10):
    ...     encoded = online.encode(batch)
    ...     online.learn(encoded)
    >>> online.updates, encoded.features.shape, sorted(encoded.signals)
    (4, torch.Size([10, 16]), ['active', 'objective', 'residual'])
    """

    def __init__(
        self,
        model: ModelConfig,
        source: InputConfig,
        *,
        seed: int = 0,
        rate: RateConfig | None = None,
        mesh: Mesh | None = None,
        reduce: Reduce = "fast",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        model.check_reduce(reduce)
        self.rate, self.updates = rate or RateConfig(), 0
        self.stack = Stack(streaming(model, self.rate), source, seed=seed, dtype=dtype, device=device)
        self._mesh, self._reduce = mesh, reduce
        self._ranges = learning_updates(self.stack.config, ENDLESS)
        last = self.stack.layer(-1)
        self._label_sums = LabelSums(last.label, last.plasticity.lr)
        self._version, self._calibrated = 0, False
        shape = source.in_channels, source.height, source.width
        self._begin(torch.zeros(0, *shape, dtype=dtype, device=device))

    @property
    def source(self) -> InputConfig:
        return self.stack.source

    @property
    def calibrated(self) -> bool:
        """Whether the first layer has been calibrated, so that records can be encoded."""
        if not self._calibrated:  # once it is, the device is not asked again
            self._calibrated = self._layers.layers[0].calibrated
        return self._calibrated

    @property
    def learning_rate(self) -> float:
        """η of the next update of the first layer."""
        return float(self._layers.layers[0].learning_rate)

    def _begin(self, images: Tensor) -> None:
        """Make this rank's layers, to be calibrated on these images."""
        stack, ranks = self.stack, self._mesh or Mesh()
        like = stack.layer(0).feedforward
        batch = 500  # as a trainer's `encode_batch`
        self._setup = Setup(
            stack=stack,
            layers=stack.config.layers,
            store=FeatureStore(images, ranks.everyone, batch=batch, dtype=like.dtype, device=like.device),
            labels=None,
            blocks=None,
            mesh=ranks,
            alone=self._mesh is None and self._reduce == "fast",
            reduce=self._reduce,
            observer=Observer(),
            memory=MemoryWatch(like.device),
            measure_every=None,
            to_tolerance=True,
        )
        self._layers = StageLayers(self._setup, range(len(stack.config.layers)), self._ranges)
        self._calibrated = False

    def _unit(self, x: Tensor) -> Tensor:
        """Checked records, in the dtype and on the device of the weights."""
        check_records(x, self.source)
        like = self.stack.layer(0).feedforward
        x = to_unit(moved(x, like.device), like.dtype)
        check_images(x, self.source.in_channels, like)
        return x

    # ------------------------------------------------------------------------------------------- calibration

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Calibrate the first layer on the first records, and keep them for layers that begin later.

        Parameters
        ----------
        x: [N, C, H, W]; of each layer the first `whiten_images` are used.

        Raises
        ------
        RuntimeError
            It has been calibrated already.
        """
        check_uncalibrated(self.calibrated)
        most = max(layer.whiten_images for layer in self.stack.config.layers)
        self._begin(self._unit(x[:most]).clone())
        self._layers.agree()
        self._layers.calibrate(0)
        self._layers.agree()
        self._drop_images()

    def _drop_images(self) -> None:
        """Once all layers have been calibrated, forget the first records."""
        if all(layer.calibrated for layer in self._layers.layers.values()):
            self._setup.store.images = self._images[:0].clone()

    @property
    def _images(self) -> Tensor:
        images = self._setup.store.images
        assert isinstance(images, Tensor)
        return images

    # ------------------------------------------------------------------------------------------- test, then learn

    @torch.no_grad()
    def encode(self, x: Tensor) -> Encoded:
        """Encode records, label-free, with the weights as they are.

        Parameters
        ----------
        x: [B, C, H, W], uint8 or floating-point.

        Raises
        ------
        ValueError
            Records of another shape, or none.
        RuntimeError
            The stack has not been calibrated.
        """
        check_calibrated(self.calibrated)
        unit, model, solved = self._unit(x), self.stack.config, {}
        passed = unit
        for index in range(len(model.layers)):
            solved[index] = self._layers.solve(index, passed)
            passed = solved[index].passed
        maps = [
            readout_input(solved[index].passed, model.layers[index], model.feature_pool)
            for index in model.feature_layers()
        ]
        activity = reduce(solved[len(model.layers) - 1].solution.y, "b k h w -> b k", "mean")
        first = solved[0]
        return Encoded(
            x=unit,
            features=torch.cat(maps, dim=1),
            signals=label_free_signals(first.patches, first.solution.y, self._whole_weights(0)),
            label_scores=self._label_scores(activity),
            activity=activity,
            solved=solved,
            version=self._version,
        )

    def _whole_weights(self, index: int) -> Weights:
        """All rows of W and M of a layer, on every rank."""
        layer = self._layers.layers[index]
        if layer.rows.count == layer.out_channels:
            return layer.weights
        w, m = (gather_rows(each, layer.rows, layer.mesh.owners) for each in (layer.feedforward, layer.lateral))
        return Weights(w, m, m[:, :0])

    def _label_scores(self, activity: Tensor) -> Tensor | None:
        if not self.stack.config.layers[-1].supervised:
            return None
        last = self._layers.layers[len(self.stack.config.layers) - 1]
        return self._label_sums.scores(gather_rows(last.label, last.rows, last.mesh.owners), activity)

    @torch.no_grad()
    def learn(self, encoded: Encoded, labels: Tensor | None = None, weights: Tensor | None = None) -> None:
        """One update of all layers from a batch that was encoded. Where all weights are 0, nothing.

        Parameters
        ----------
        encoded: from `encode`. If the stack has learnt since, the records are encoded once more.
        labels: [B], classes, `UNLABELLED` where unknown; used by supervised layers. None: no labels.
        weights: [B], 0 ≤ w ≤ 1, how much each record counts, see `simmatch.plasticity`. None: 1 each.

        Raises
        ------
        ValueError
            Labels or weights do not match the records.
        SharedFault
            Values that are not finite, on some rank; no weights have changed.
        """
        model, device = self.stack.config, encoded.x.device
        known = learnable(model, self.source, len(encoded.x), labels, weights)
        if known is None:
            return
        encoded = self._current(encoded)
        labels, weights = (None if each is None else moved(each, device) for each in known)
        number = self.updates + 1
        self._layers.update(number, Staged(encoded.x, labels, len(encoded.x), weights), encoded.solved)
        self.updates, self._version = number, self._version + 1
        if labels is not None and model.layers[-1].supervised:
            self._label_sums.add(encoded.activity, labels, weights)
        if len(self._images) > 0:
            self._drop_images()

    def _current(self, encoded: Encoded) -> Encoded:
        """Records as the stack encodes them now."""
        return encoded if encoded.version == self._version else self.encode(encoded.x)

    @torch.no_grad()
    def learn_labels(self, encoded: Encoded, labels: Tensor) -> None:
        """Learn V alone from labels that arrived late: W and M have learnt from these records already.

        Parameters
        ----------
        encoded: the records, encoded anew. If the stack has learnt since, they are encoded once more.
        labels: [B], their classes, `UNLABELLED` where unknown.
        """
        known = learnable_labels(self.stack.config, self.source, len(encoded.x), labels)
        if known is None:
            return
        encoded = self._current(encoded)
        known, number = moved(known, encoded.x.device), max(self.updates, 1)
        for index, config in enumerate(self.stack.config.layers):
            if config.supervised and number in self._ranges[index]:
                self._layers.layers[index].learn_labels(encoded.solved[index].patches, known)
        if self.stack.config.layers[-1].supervised:
            self._label_sums.add(encoded.activity, known)

    def raise_rate(self) -> None:
        """After a drift: with `rate.kind: after_drift`, the rates of all layers rise to `lr`, and fall again."""
        if self.rate.kind == "after_drift":
            for layer in self._layers.layers.values():
                layer.raise_rate(self.rate.hold)

    @torch.no_grad()
    def grow(self, num_classes: int) -> None:
        """Add classes to V.

        Raises
        ------
        ValueError
            There are more classes already.
        """
        check_classes(num_classes, self.source.num_classes)
        for index, config in enumerate(self.stack.config.layers):
            if config.supervised:
                for layer in {self._layers.layers[index], self.stack.layer(index)}:  # one and the same without ranks
                    layer.grow(num_classes)
        self._layers.close()  # what was captured has other shapes
        self._label_sums.grow(self.stack.layer(-1).num_classes)
        self.stack.source = self.source.model_copy(update={"num_classes": num_classes})

    # ------------------------------------------------------------------------------------------- state

    @torch.no_grad()
    def state(self) -> State:
        """All that later updates depend on, whole on every rank; restoring it gives the same bits ever after."""
        state: State = {
            "updates": torch.tensor(self.updates),
            "label_yz": self._label_sums.yz.clone(),
            "label_zz": self._label_sums.zz.clone(),
            "images": self._images.clone(),
        }
        for index, layer in self._layers.layers.items():
            layer.raise_faults()
            for name, tensor in (*whole_state(layer), ("rate_from", layer.rate_from)):
                state[f"layers.{index}.{name}"] = tensor.clone()
        return state

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go on from a state, of any number of ranks.

        Raises
        ------
        ValueError
            The state is that of another model.
        """
        like, layers = self.stack.layer(0).feedforward, self.stack.config.layers
        names = [f"layers.{index}.label" for index, each in enumerate(layers) if each.supervised]
        classes = max(self.source.num_classes, *(state[name].shape[-1] for name in names if name in state), 0)
        expected, given = self._shapes(classes), {name: list(tensor.shape) for name, tensor in state.items()}
        expected["images"] = given.get("images", [0])[:1] + expected["images"][1:]
        for name in dict.fromkeys([*expected, *given]):
            wanted, found = expected.get(name, "nothing"), given.get(name, "nothing")
            if wanted != found:
                raise ValueError(f"{name}: expected {wanted}, got {found} in the state")
        self._layers.close()
        self._begin(state["images"].to(like))
        if classes > self.source.num_classes:
            self.grow(classes)
        for index, layer in self._layers.layers.items():
            whole = part_of(state, f"layers.{index}")
            layer.rate_from.copy_(whole.pop("rate_from"))
            load_rows(layer, whole)
        self.updates, self._version = int(state["updates"]), self._version + 1
        self._label_sums.restore(state["label_yz"], state["label_zz"])
        self._layers.agree()

    def _shapes(self, classes: int) -> dict[str, list[int]]:
        """Of the tensors of a state with so many classes, and no images."""
        layers, source = self.stack.config.layers, self.source
        last = classes if layers[-1].supervised else 0
        shapes = {"updates": [], "label_yz": [layers[-1].out_channels, last], "label_zz": [last]}
        shapes["images"] = [0, source.in_channels, source.height, source.width]
        for index, config in enumerate(layers):
            whole = self.stack.layer(index)
            for name, tensor in (*whole.state_dict().items(), ("rate_from", whole.rate_from)):
                by_class = name in ("label", "class_frequency") and config.supervised
                shapes[f"layers.{index}.{name}"] = [*tensor.shape[:-1], classes] if by_class else list(tensor.shape)
        return shapes

    @torch.no_grad()
    def export(self) -> Stack:
        """A copy of the stack in evaluation mode, to save (`save_model`); V is scaled to label-free activity."""
        stack = self.stack
        whole = Stack(
            stack.config, stack.source, seed=stack.seed, dtype=stack.dtype, device=stack.layer(0).lateral.device
        )
        for index, layer in self._layers.layers.items():
            gather_layer(layer, whole.layer(index))
        if stack.config.layers[-1].supervised:
            whole.layer(-1).settle_label(self._label_sums.yz, self._label_sums.zz.diag())
        return whole.eval()
