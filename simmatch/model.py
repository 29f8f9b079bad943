"""Stacks of similarity-matching layers: the input of a layer is the label-free, pooled activity of the one below.

    images → layer 0 → pool → layer 1 → pool → … → features (what readouts see), scores (decoded from V)

Nothing flows backward: a layer learns from its own input, its own output and the label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from safetensors.torch import load_file
from torch import Tensor, nn

from simmatch.config import ConfigError, Frozen, LayerConfig, ModelConfig, NonNegativeInt, PositiveInt, parse
from simmatch.data.prepared import StoredImages
from simmatch.devices import check_device
from simmatch.documents import DocumentError, dump_yaml, load_yaml_file
from simmatch.extent import Extent, at_most, pooled_size, shown
from simmatch.files import write_whole
from simmatch.geometry import PatchConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.memory import Lever, MemoryWatch
from simmatch.readout import decode
from simmatch.solvers.bound import check_lateral
from simmatch.tensor_files import write_tensors

EXPORTED = ("feedforward", "lateral", "label", "whitening", "whitening_mean")
"""Tensors of a layer that are saved with an exported model, if they exist."""

MODEL_FILES = ("model.safetensors", "config.yaml")
"""Files in the folder of an exported model."""


class InputConfig(Frozen):
    """Shape and number of classes of the images that a model is built for.

    >>> InputConfig.of(torch.zeros(100, 3, 32, 32), num_classes=10).image_size
    (32, 32)
    """

    in_channels: PositiveInt
    """C, the number of channels of an image."""

    height: PositiveInt
    """H, in pixels."""

    width: PositiveInt
    """W, in pixels."""

    num_classes: NonNegativeInt
    """Number of classes of the labels; 0 for images without labels."""

    @classmethod
    def of(cls, images: StoredImages, num_classes: int) -> InputConfig:
        """The configuration for images [N, C, H, W]."""
        channels, height, width = images.shape[1:]
        return parse(cls, {"in_channels": channels, "height": height, "width": width, "num_classes": num_classes})

    @property
    def image_size(self) -> tuple[int, int]:
        return self.height, self.width


class ExportConfig(Frozen):
    """Content of `config.yaml` in the folder of an exported model.

    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> export = ExportConfig(input=InputConfig(in_channels=1, height=8, width=8, num_classes=10), model=model)
    >>> sorted(export.model_dump())
    ['input', 'model']
    """

    input: InputConfig
    """The images."""

    model: ModelConfig
    """The layers."""


def layer_inputs(model: ModelConfig, source: InputConfig) -> list[tuple[int, tuple[int, int]]]:
    """Channels and map size of the input of each layer, checked against its kernel.

    Raises
    ------
    ConfigError
        A kernel is larger than its input, or a pooled map larger than the map of activities.

    >>> layers = LayerConfig(out_channels=64, kernel_size=5, pool=7), LayerConfig(out_channels=256, kernel_size="full")
    >>> layer_inputs(ModelConfig(layers=layers), InputConfig(in_channels=1, height=28, width=28, num_classes=10))
    [(1, (28, 28)), (64, (7, 7))]
    """
    channels, size = source.in_channels, source.image_size
    inputs = []
    for index, config in enumerate(model.layers):
        inputs.append((channels, size))
        where = f"model.layers.{index}"
        try:
            patch = PatchConfig.of_layer(config, channels, size)
            height, width = patch.map_size(size)
            above, beside = patch.convolution.margins
            if size[0] == patch.kernel[0] == 1 < patch.kernel[1] and above > 0:
                raise ValueError(f"padding: expected [0, {beside}] for signals, got {shown(config.padding)}")
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from None
        small, large = pooled_size((height, width), config.pool), (height, width)
        if small[0] > height or small[1] > width:
            most = min(large) if isinstance(config.pool, int) else large
            hint = f"; [1, {config.pool}] for signals" if height == 1 and isinstance(config.pool, int) else ""
            raise ConfigError(
                f"{where}.pool: expected at most {shown(most)}, the map of activities, got {shown(small)}{hint}"
            )
        channels, *extent = output_shape(config, patch, size)
        size = (extent[0], extent[1])
    return inputs


def build_layer(
    model: ModelConfig, source: InputConfig, index: int, *, seed: int = 0, **options: Any
) -> SimilarityMatchingConv2d:
    """Layer `index` of a stack with this seed; `options` as for `SimilarityMatchingConv2d`.

    Raises
    ------
    ConfigError
        As for `layer_inputs`.

    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3, pool=2),))
    >>> build_layer(model, InputConfig(in_channels=1, height=8, width=8, num_classes=10), 0).feedforward.shape
    torch.Size([8, 1, 3, 3])
    """
    channels, size = layer_inputs(model, source)[index]
    return SimilarityMatchingConv2d.from_config(
        model.layers[index], channels, size, num_classes=source.num_classes, seed=seed + index, **options
    )


def pooled(activities: Tensor, config: LayerConfig) -> Tensor:
    """Output of a layer from its activities [B, K, H, W]: averages [B, K, *pool], raised to `config.power`.

    >>> pooled(torch.ones(2, 8, 6, 6), LayerConfig(out_channels=8, kernel_size=3, pool=2)).shape
    torch.Size([2, 8, 2, 2])
    """
    passed = activities if config.pool is None else F.adaptive_avg_pool2d(activities, config.pool)
    return passed if config.power == 1.0 else passed.pow(config.power)


def output_shape(config: LayerConfig, patch: PatchConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """[K, H', W'] of what a layer passes on for an input of this height and width.

    >>> config = LayerConfig(out_channels=8, kernel_size=3, pool=2)
    >>> output_shape(config, PatchConfig.of_layer(config, 1, (8, 8)), (8, 8))
    (8, 2, 2)
    """
    return config.out_channels, *pooled_size(patch.map_size(size), config.pool)


def readout_input(passed: Tensor, config: LayerConfig, pool: Extent | None) -> Tensor:
    """Input of a readout [B, F] from the output of a layer: larger axes of its maps are averaged down to `pool`.

    The average is taken of activities: `config.power` is undone before it and applied again after it.

    >>> readout_input(torch.ones(2, 8, 6, 6), LayerConfig(out_channels=8, kernel_size=3), pool=2).shape
    torch.Size([2, 32])
    """
    size = passed.shape[2], passed.shape[3]
    small_size = at_most(size, pool)
    if small_size == size:
        return passed.flatten(1)
    maps = passed if config.power == 1.0 else passed.pow(1 / config.power)
    small = F.adaptive_avg_pool2d(maps, small_size)
    return (small if config.power == 1.0 else small.pow(config.power)).flatten(1)


class Stack(nn.Module):
    """A stack of layers with pooling between them.

    Parameters
    ----------
    model: the configuration of the layers.
    source: channels, size and number of classes of the images.
    seed: the weights of layer i are drawn with seed + i.
    dtype, device: of all weights.

    Attributes
    ----------
    layers: the `SimilarityMatchingConv2d` layers, each with all of its channels.

    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3, pool=2, supervised=True),))
    >>> stack = Stack(model, InputConfig(in_channels=1, height=8, width=8, num_classes=10))
    >>> x = torch.rand(5, 1, 8, 8)
    >>> stack(x).shape, stack.features(x).shape, stack.decode(x).shape
    (torch.Size([5, 8, 6, 6]), torch.Size([5, 32]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        model: ModelConfig,
        source: InputConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.source, self.seed = model, source, seed
        self.layers = nn.ModuleList()
        with MemoryWatch(check_device(device)) as memory:
            for index, config in enumerate(model.layers):
                channels = Lever(f"model.layers.{index}.out_channels", config.out_channels)
                memory.begin(f"layer {index}, making its weights", channels)
                self.layers.append(build_layer(model, source, index, seed=seed, dtype=dtype, device=device))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights."""
        return self.layer(0).feedforward.dtype

    def layer(self, index: int) -> SimilarityMatchingConv2d:
        """Layer `index`; −1 is the last."""
        layer = self.layers[index]
        assert isinstance(layer, SimilarityMatchingConv2d)
        return layer

    def below(self, x: Tensor, index: int) -> Tensor:
        """Input of layer `index`: images [B, C, H, W] through the layers below it, label-free and pooled."""
        for number, config in enumerate(self.config.layers[:index]):
            x = pooled(self.layer(number)(x), config)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Activities [B, K, H', W'] of the last layer for images [B, C, H, W] in [0, 1]."""
        result: Tensor = self.layer(-1)(self.below(x, len(self.layers) - 1))
        return result

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """`features` [B, F] and, if the last layer is supervised, `scores` [B, num_classes], in one pass."""
        maps, activities = [], x
        for index, config in enumerate(self.config.layers):
            activities = self.layer(index)(x)
            x = pooled(activities, config)
            maps.append(readout_input(x, config, self.config.feature_pool))
        result = {"features": torch.cat([maps[index] for index in self.config.feature_layers()], dim=1)}
        if self.config.layers[-1].supervised:
            result["scores"] = decode(reduce(activities, "b k h w -> b k", "mean"), self.layer(-1).label)
        return result

    def features(self, x: Tensor) -> Tensor:
        """Input of a readout [B, F]: pooled activities of the layers selected by `ModelConfig.features`."""
        return self.outputs(x)["features"]

    def decode(self, x: Tensor) -> Tensor:
        """Class scores [B, num_classes] from the label weights V of the last layer; their argmax is the class.

        Raises
        ------
        ValueError
            The last layer is not supervised.
        """
        outputs = self.outputs(x)
        if "scores" not in outputs:
            raise ValueError("decode: expected a supervised last layer, got one without label weights")
        return outputs["scores"]


class Outputs(nn.Module):
    """A module whose forward is `Stack.outputs`, for the export of a stack.

    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> stack = Stack(model, InputConfig(in_channels=1, height=8, width=8, num_classes=10))
    >>> Outputs(stack)(torch.rand(5, 1, 8, 8))["features"].shape
    torch.Size([5, 288])
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.stack.outputs(x)


def save_model(stack: Stack, path: str | Path) -> None:
    """Save a stack: write `model.safetensors` (tensors `layers.{i}.…`) and `config.yaml` into the folder `path`.

    >>> import tempfile
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3),))
    >>> stack = Stack(model, InputConfig(in_channels=1, height=8, width=8, num_classes=10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(stack, folder)
    ...     load_model(folder).layer(0).feedforward.shape
    torch.Size([8, 1, 3, 3])
    """
    folder = Path(path)
    tensors = {
        f"layers.{index}.{name}": getattr(layer, name).contiguous().cpu()
        for index, layer in enumerate(stack.layers)
        for name in EXPORTED
        if hasattr(layer, name)
    }
    export = ExportConfig(input=stack.source, model=stack.config)
    write_tensors(folder / "model.safetensors", tensors)
    write_whole(folder / "config.yaml", dump_yaml(export.model_dump(mode="json")))


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> Stack:
    """Load a stack, in evaluation mode.

    Parameters
    ----------
    path: a folder with `model.safetensors` and `config.yaml`, such as `model` in the directory of a run.
    device: of all weights.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ConfigError
        The folder is that of a run, not of its model; the configuration is invalid, a tensor does not have the shape
        that it requires, or a lateral matrix M is not symmetric positive semidefinite.

    >>> load_model("missing")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing/config.yaml'
    """
    folder = Path(path)
    if not (folder / MODEL_FILES[0]).exists() and (folder / "model" / MODEL_FILES[0]).exists():
        raise ConfigError(f"{folder}: expected the folder of a model, got that of a run; its model: {folder / 'model'}")
    try:
        values = load_yaml_file(folder / "config.yaml")
    except DocumentError as error:
        raise ConfigError(f"{folder / 'config.yaml'}: expected YAML, got: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.yaml'}: expected a mapping, got {type(values).__name__}")
    export = parse(ExportConfig, values)
    tensors = load_file(folder / MODEL_FILES[0])
    if "layers.0.feedforward" not in tensors:
        raise ConfigError("layers.0.feedforward: expected a tensor, got nothing")
    stack = Stack(export.model, export.input, dtype=tensors["layers.0.feedforward"].dtype, device=device)
    for index in range(len(export.model.layers)):
        layer = stack.layer(index)
        for name in EXPORTED:
            if hasattr(layer, name):
                _copy_checked(getattr(layer, name), tensors, f"layers.{index}.{name}")
        try:
            check_lateral(layer.lateral)
        except ValueError as error:
            raise ConfigError(f"layers.{index}.{error}") from None
        layer.recertify()
    return stack.eval()


def _copy_checked(target: Tensor, tensors: dict[str, Tensor], key: str) -> None:
    tensor = tensors.get(key)
    if tensor is None or tensor.shape != target.shape:
        given = "nothing" if tensor is None else str(list(tensor.shape))
        raise ConfigError(f"{key}: expected a tensor of shape {list(target.shape)}, got {given}")
    if not bool(tensor.isfinite().all()):
        raise ConfigError(f"{key}: expected finite values, got NaN or infinity")
    target.copy_(tensor)
