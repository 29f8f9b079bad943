"""A convolutional autoencoder, trained by backpropagation.

    encoder  y = relu(W x̃ + b) at every position, K filters
    decoder  D, untied: a transposed convolution of y, at every pixel the mean of what the positions that cover it say
    loss     mean over pixels of (decoder − target)² + sparsity · mean of y

The encoder sees patches x̃ as the other learners do. The target is the image that these patches make up, at every pixel
the mean of the patches that cover it: the image itself where patches are raw, else a normalised and whitened one.
With `noise`, the encoder sees x̃ plus Gaussian noise and the target does not.

Sources: Masci et al., "Stacked convolutional auto-encoders for hierarchical feature extraction" (2011); Vincent et al.
(2010) for denoising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.patches import PatchView, Preprocessing
from jobs.evaluation.rivals.visits import Visits
from simmatch.geometry import PatchConfig

VISITS = Visits(images=100, columns=10_000, updates=1500, passes=10)
"""12 images an update at the 784 positions of 28 × 28 images: 18,000 images."""


@dataclass(frozen=True)
class AutoencoderSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    lr: of Adam at the first step; falls to 0 as a cosine.
    noise: standard deviation added to each value of x̃.
    sparsity: weight of the mean activity.
    """

    lr: float = 3e-3
    noise: float = 0.0
    sparsity: float = 0.0


class Coder(nn.Module):
    """Encoder and decoder; patches of B images as x̃ [P, N] → reconstruction [B, C, H, W], activities [K, N].

    Parameters
    ----------
    config: geometry.
    image_size: height and width of the images.
    """

    def __init__(
        self, channels: int, config: PatchConfig, image_size: tuple[int, int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size
        encoder, decoder = torch.randn(2, channels, config.patch_size, generator=generator)
        self.filters = nn.Parameter(encoder / config.patch_size**0.5)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.decoder = nn.Parameter(decoder / channels**0.5)
        self.decoder_bias = nn.Parameter(torch.zeros(config.in_channels))
        height, width = config.map_size(image_size)
        self.positions = height * width
        self.coverage = self._fold(torch.ones(config.patch_size, self.positions))

    def _fold(self, columns: Tensor) -> Tensor:
        """Sum of patches [P, N] where they overlap: [B, C, H, W]."""
        geometry = self.config.convolution
        by_image = rearrange(columns, "p (b l) -> b p l", l=self.positions)
        return F.fold(by_image, self.image_size, geometry.kernel, padding=geometry.margins, stride=geometry.strides)

    def joined(self, columns: Tensor) -> Tensor:
        """Mean of patches [P, N] where they overlap: [B, C, H, W]; 0 where there is none."""
        return self._fold(columns) / self.coverage.clamp(min=1.0)

    def forward(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(torch.addmm(self.bias.unsqueeze(1), self.filters, columns))
        # the transposed convolution as a product and a sum over overlaps: several times faster than the library's
        return self.joined(self.decoder.T @ y) + rearrange(self.decoder_bias, "c -> c 1 1"), y


class Autoencoder(Convolutional[AutoencoderSettings]):
    """Learns by steps of Adam on batches of images, as many as `VISITS` says.

    Attributes
    ----------
    coder: what was trained; None before learning.
    losses: mean squared error per pixel of each step.
    """

    name = "autoencoder"
    candidates: ClassVar[tuple[AutoencoderSettings, ...]] = (
        AutoencoderSettings(contrast_floor=0.03),
        AutoencoderSettings(noise=0.5, contrast_floor=0.03),
        AutoencoderSettings(lr=1e-2, noise=0.5, contrast_floor=0.03),
        AutoencoderSettings(lr=1e-2, noise=0.5, sparsity=0.1, contrast_floor=0.03),
    )

    coder: Coder | None = None
    losses: Sequence[float] = ()

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        coder = Coder(self.shape.channels, view.config, (images.shape[2], images.shape[3]), generator)
        adam = torch.optim.Adam(coder.parameters(), lr=self.settings.lr)
        batches = VISITS.batches(len(images), coder.positions, self.seed)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(batches))
        losses = []
        for indices in batches:
            losses.append(self._step(coder, view.all(images[indices]).T, adam, generator))
            schedule.step()
        self.coder, self.losses = coder.requires_grad_(False), losses
        return Learnt(coder.filters, coder.bias, sum(parameter.numel() for parameter in coder.parameters()))

    def _step(self, coder: Coder, patches: Tensor, adam: torch.optim.Adam, generator: torch.Generator) -> float:
        """One step of Adam on x̃ [P, N] of a batch; returns the squared error."""
        seen = patches
        if self.settings.noise > 0:
            seen = patches + self.settings.noise * torch.randn(patches.shape, generator=generator)
        decoded, y = coder(seen)
        covered = coder.coverage > 0
        error = ((decoded - coder.joined(patches)) * covered).square().sum() / (covered.sum() * len(decoded))
        adam.zero_grad()
        (error + self.settings.sparsity * y.mean()).backward()
        adam.step()
        return float(error.detach())
