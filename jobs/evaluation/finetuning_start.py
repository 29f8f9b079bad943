"""Initial weights from similarity matching: greedy, one convolution of a LeNet after the other, without labels.

    images → NSM layer 0 → filter 0      relu(maxpool(conv(images, filter 0))) → NSM layer 1 → filter 1

A layer learns on what the network's convolution will receive: the second not on the activities of the first NSM layer,
but on the maps of the network's first stage once that holds its filter, max-pooled as the network pools. A filter is
the plain convolution nearest to its layer's activities (`simmatch.encoder.feedforward_filter`); how large the rectified
maps of a convolution are is set by a gain, one number for all of its channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jobs.evaluation.backprop import IMAGES_AT_ONCE
from jobs.evaluation.lenet import Filters, LeNet, initialise
from jobs.evaluation.material import UnitImages
from simmatch.agreement import Agreement, agreement
from simmatch.config import Frozen, LayerConfig, ModelConfig, PlasticityConfig, PositiveFloat, TrainConfig
from simmatch.data.order import epoch_order
from simmatch.encoder import feedforward_filter
from simmatch.fit import fit_stack
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.tensor_files import write_tensors

AGREEMENT_IMAGES = 50
"""Images on which a filter is compared with the activities of its layer, all positions of them."""


class StartConfig(Frozen):
    """How one convolution's initial weights are learnt; kernel, padding and channels are the convolution's own."""

    normalize: Literal["none", "contrast"] = "contrast"
    """This and the next two: as in `simmatch.config.LayerConfig`."""

    whiten: bool = False
    whiten_ridge: PositiveFloat = 1.0

    gain: PositiveFloat = 1.0
    """Root mean square of the rectified maps over that of the input: that of He's initialisation is 1 (up to the mean
    of the input)."""

    train: TrainConfig = TrainConfig(images=2000, positions=16)
    plasticity: PlasticityConfig = PlasticityConfig(lr=0.1, lr_decay_steps=100)

    def model(self, convolution: nn.Conv2d) -> ModelConfig:
        """One NSM layer of the convolution's geometry."""
        layer = LayerConfig(
            out_channels=convolution.out_channels,
            kernel_size=convolution.kernel_size[0],
            padding=int(convolution.padding[0]),
            normalize=self.normalize,
            whiten=self.whiten,
            whiten_ridge=self.whiten_ridge,
            train=self.train,
            plasticity=self.plasticity,
        )
        return ModelConfig(layers=(layer,))


@dataclass(frozen=True, eq=False)
class PretrainedFilters:
    """Initial weights of a network's convolutions, from similarity matching.

    Attributes
    ----------
    filters: weight and bias of each convolution.
    agreements: of each filter with the activities of the NSM layer that it stands for, on images it learnt from.
    """

    filters: tuple[Filters, ...]
    agreements: tuple[Agreement, ...]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            f"{index}.{name}": values.contiguous()
            for index, filters in enumerate(self.filters)
            for name, values in zip(("weight", "bias"), filters, strict=True)
        }
        metadata = {"agreements": json.dumps([asdict(each) for each in self.agreements])}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> PretrainedFilters | None:
        """What was saved; None if there is no file, or it holds something else."""
        try:
            with safe_open(path, "pt") as file:
                known = json.loads((file.metadata() or {}).get("agreements", "[]"))
                pairs = [(file.get_tensor(f"{i}.weight"), file.get_tensor(f"{i}.bias")) for i in range(len(known))]
        except (FileNotFoundError, SafetensorError):
            return None
        return cls(tuple(pairs), tuple(Agreement(**each) for each in known)) if pairs else None


@torch.no_grad()
def pretrain(net: LeNet, images: UnitImages, layers: Sequence[StartConfig], seed: int) -> PretrainedFilters:
    """Learn initial weights for both convolutions and put them into the network.

    Parameters
    ----------
    net: gives the geometry, and takes the filters. Plain convolutions, no `ContrastConv2d`.
    images: [N, C, H, W] in [0, 1], as the network will see them; `train.images` of them are drawn, the same for both.
    layers: how each convolution's weights are learnt.
    seed: of everything drawn at random.
    """
    filters: list[Filters] = []
    agreements = []
    count = max(min(each.train.images or len(images), len(images)) for each in layers)
    x = images[epoch_order(len(images), seed=seed, epoch=0, images=count)]
    for config, convolution in zip(layers, net.convolutions, strict=True):
        assert isinstance(convolution, nn.Conv2d)
        layer = learn(config, convolution, x, seed)
        plain = feedforward_filter(layer, x)
        agreements.append(agreement(plain, layer, x[:AGREEMENT_IMAGES]))
        filters.append((plain.weight * config.gain, plain.bias * config.gain))
        initialise(net, filters)
        x = stage(convolution, x)
    return PretrainedFilters(tuple(filters), tuple(agreements))


def learn(config: StartConfig, convolution: nn.Conv2d, x: Tensor, seed: int) -> SimilarityMatchingConv2d:
    """The NSM layer of a convolution's geometry, learnt from its input [N, C, H, W] without labels."""
    return fit_stack(config.model(convolution), x, seed=seed).layer(0)


@torch.no_grad()
def stage(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """What a LeNet's first convolution passes on of images [N, C, H, W]: [N, K, H // 2, W // 2]."""
    return torch.cat([F.relu(F.max_pool2d(convolution(part), 2)) for part in torch.split(x, IMAGES_AT_ONCE)])
