"""A stack of similarity-matching layers, each reading the label-free, pooled activity of the one below.

    images → layer 0 → pool → layer 1 → pool → … → features (what readouts see), scores (decoded from V)

Nothing flows backward: a layer learns from its own input, its own output and the label.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simmatch.config import ConfigError, Frozen, LayerConfig, ModelConfig, PositiveInt, parse
from simmatch.documents import DocumentError, dump_yaml, load_yaml_file
from simmatch.files import write_whole
from simmatch.geometry import PatchConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.readout import decode
from simmatch.solvers.bound import check_lateral

EXPORTED = ("feedforward", "lateral", "label", "whitening", "whitening_mean")
"""Tensors of a layer that an exported model holds, where they exist."""


MODEL_FILES = ("model.safetensors", "config.yaml")
"""Files of an exported model's folder."""


class InputConfig(Frozen):
    """What a model was built for."""

    in_channels: PositiveInt
    height: PositiveInt
    width: PositiveInt
    num_classes: PositiveInt

    @classmethod
    def of(cls, images: Tensor, num_classes: int) -> InputConfig:
        """For images [N, C, H, W]."""
        channels, height, width = images.shape[1:]
        return cls(in_channels=channels, height=height, width=width, num_classes=num_classes)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.height, self.width


class ExportConfig(Frozen):
    """`model/config.yaml` beside the weights of an exported model."""

    input: InputConfig
    model: ModelConfig


def layer_inputs(model: ModelConfig, source: InputConfig) -> list[tuple[int, tuple[int, int]]]:
    """Channels and map size that each layer reads, checked against its kernel.

    Raises
    ------
    ConfigError
        A kernel larger than its input, or a pooled map larger than the map.
    """
    channels, size = source.in_channels, source.image_size
    inputs = []
    for index, config in enumerate(model.layers):
        inputs.append((channels, size))
        where = f"model.layers.{index}"
        try:
            height, width = PatchConfig.of_layer(config, channels, size).map_size(size)
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from None
        if config.pool is not None and config.pool > min(height, width):
            raise ConfigError(
                f"{where}.pool: expected at most {min(height, width)}, the map of activities, got {config.pool}"
            )
        channels = config.out_channels
        size = (height, width) if config.pool is None else (config.pool, config.pool)
    return inputs


def pooled(activities: Tensor, config: LayerConfig) -> Tensor:
    """What is passed on of activities [B, K, H, W]: averages [B, K, pool, pool], raised to the configured power."""
    passed = activities if config.pool is None else F.adaptive_avg_pool2d(activities, config.pool)
    return passed if config.power == 1.0 else passed.pow(config.power)


def readable(passed: Tensor, config: LayerConfig, pool: int | None) -> Tensor:
    """What a readout sees of what a layer passes on, [B, F]: maps averaged down to `pool`, then raised to the power."""
    if pool is None or max(passed.shape[2:]) <= pool:
        return passed.flatten(1)
    maps = passed if config.power == 1.0 else passed.pow(1 / config.power)
    small = F.adaptive_avg_pool2d(maps, pool)
    return (small if config.power == 1.0 else small.pow(config.power)).flatten(1)


class Stack(nn.Module):
    """Layers with their pooling.

    Parameters
    ----------
    model: the layers' configuration.
    source: channels, size and classes of the images.
    seed: layer i starts from seed + i.

    Attributes
    ----------
    layers: `SimilarityMatchingConv2d` each, all rows of them.
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
        self.layers = nn.ModuleList(
            SimilarityMatchingConv2d.from_config(
                config,
                channels,
                size,
                num_classes=source.num_classes,
                seed=seed + index,
                dtype=dtype,
                device=device,
            )
            for index, (config, (channels, size)) in enumerate(
                zip(model.layers, layer_inputs(model, source), strict=True)
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
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
        """One pass: `features` [B, F] and, where the last layer is supervised, `scores` [B, num_classes]."""
        maps, activities = [], x
        for index, config in enumerate(self.config.layers):
            activities = self.layer(index)(x)
            x = pooled(activities, config)
            maps.append(readable(x, config, self.config.feature_pool))
        result = {"features": torch.cat([maps[index] for index in self.config.feature_layers()], dim=1)}
        if self.config.layers[-1].supervised:
            result["scores"] = decode(reduce(activities, "b k h w -> b k", "mean"), self.layer(-1).label)
        return result

    def features(self, x: Tensor) -> Tensor:
        """[B, F], what the readouts see: pooled activities of the layers that `ModelConfig.features` names."""
        return self.outputs(x)["features"]

    def decode(self, x: Tensor) -> Tensor:
        """Class scores [B, num_classes] from the label weights V of the last layer; argmax is the class.

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
    """`Stack.outputs` as a module's forward, the form in which a stack is exported."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.stack.outputs(x)


def save_model(stack: Stack, path: str | Path) -> None:
    """Write `model.safetensors` (unsharded tensors `layers.{i}.…`) and `config.yaml` into the folder `path`."""
    folder = Path(path)
    tensors = {
        f"layers.{index}.{name}": getattr(layer, name).contiguous().cpu()
        for index, layer in enumerate(stack.layers)
        for name in EXPORTED
        if hasattr(layer, name)
    }
    export = ExportConfig(input=stack.source, model=stack.config)
    write_whole(folder / "model.safetensors", partial(save_file, tensors))
    write_whole(folder / "config.yaml", dump_yaml(export.model_dump(mode="json")))


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> Stack:
    """The exported stack of a run, in evaluation mode.

    Parameters
    ----------
    path: the folder `RUN_DIR/model`, holding `model.safetensors` and `config.yaml`.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ConfigError
        The configuration is not one of ours, the tensors do not have the shapes it asks for, or an M is not symmetric
        positive semidefinite.
    """
    folder = Path(path)
    try:
        values = load_yaml_file(folder / "config.yaml")
    except DocumentError as error:
        raise ConfigError(f"{folder / 'config.yaml'}: expected YAML, got: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.yaml'}: expected a mapping, got {type(values).__name__}")
    export = parse(ExportConfig, values)
    tensors = load_file(folder / "model.safetensors")
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
