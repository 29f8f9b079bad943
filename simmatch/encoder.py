"""Feedforward approximation of a learnt layer by one convolution: for fast encoding, and to initialise a network.

The dynamics compute y*(x̃) = argmin over y ≥ 0 of ½ yᵀMy − yᵀW x̃, a continuous, piecewise linear function: on the face
of the active channels S, y_S = M_SS⁻¹ W_S x̃. It is approximated by a rectified affine function of the patch,

    ŷ = relu(A v + b)        v = J x / s, the patch before whitening (`simmatch.geometry`); v = x for a `Filter`

Where learning has converged, W = ⟨y x̃ᵀ⟩. Then W C⁻¹, with C = ⟨x̃ x̃ᵀ⟩, is the linear least-squares predictor of y:
the *linear* population with the same Hebbian statistics ⟨ŷ x̃ᵀ⟩ as the layer. Here the *rectified* population must have
the same statistics:

    ⟨ŷ vᵀ⟩ = ⟨y vᵀ⟩,   ⟨ŷ⟩ = ⟨y⟩                                                                    (1)

A feedforward population that learnt by the layer's rule would have the same W and the same mean activities as the
layer. (1) is the stationarity condition of a convex function, the matching loss ⟨½ relu(u)² − y u⟩ of u = A v + b, so
the result does not depend on the starting point. Its gradient is local, ΔA = η (y − ŷ) vᵀ: a delta rule with the
recurrent activity as the target. Whitening needs no special treatment: x̃ is an affine function of v, which A and b
absorb. M is needed only to compute y.

The mean and all first-order statistics of every channel are matched. Its mean square is lower than that of y, by the
part that a function of this form cannot explain. Where M is diagonal, y* has this form itself, and ŷ = y*.

**Empty patches.** Images with a background have many equal patches, v = 0, at which ŷ = relu(b): the sign of b alone
decides whether a channel is active on all of them. If they are more than 1 / (P + 1) of the sample, ŷ is made exact
there: b = y*(0) for channels with y*(0) > 0, and for channels whose fitted b > 0 although y*(0) = 0. This uses one of
the P + 1 parameters of a channel.

`LOG.md` compares this fit with A = W/diag M, (M + λI)⁻¹W and W C⁻¹, with inhibition replaced by its mean (each with
gain and threshold matched per channel), and with least squares on y > 0 and of ŷ.

Sources: Auer, Herbster & Warmuth, "Exponentially many local minima for single neurons" (1996), for the matching loss;
Brillinger (1982) for the direction of W C⁻¹ under a nonlinearity; Kavukcuoglu, Ranzato & LeCun, "Fast inference in
sparse coding algorithms" (2008), for encoders that predict codes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.geometry import PatchConfig, Patches, draw_positions, inverse_contrast, prepare
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import stream
from simmatch.solvers.quadratic import ConvergenceWarning, solve

SAMPLE_COLUMNS = 20_000
"""Approximate number of patches that an encoder is fitted to."""

EXACT = DynamicsConfig(tolerance=1e-4, max_iterations=10_000)
"""The dynamics that compute the exact activities, independent of the layer's configuration."""

TOLERANCE = 1e-3
"""Mismatch of (1) at which a fit stops, relative to the channel's root-mean-square activity."""

QUIET = 0.1
"""Floor of a channel's root-mean-square activity, relative to the layer's: for a channel that is hardly ever active
the fit is slow and does not matter."""

MAX_ITERATIONS = 1000
"""Maximum number of iterations of a fit."""

EMPTY = 1e-3
"""A patch counts as empty if its norm is at most this share of the root-mean-square norm."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Approximate activities of a layer without dynamics: ŷ = relu(conv(x, A) / s + b).

    Attributes
    ----------
    weight: [K, C, k, k], A, including mean removal and whitening.
    bias: [K], b, the response to an empty patch.
    patch: geometry and contrast normalisation of the layer.

    >>> encoder = Encoder(torch.ones(5, 1, 3, 3), torch.zeros(5), PatchConfig(in_channels=1, kernel_size=3))
    >>> encoder(torch.ones(2, 1, 8, 8)).shape, encoder.operations
    (torch.Size([2, 5, 6, 6]), 45)
    """

    weight: Tensor
    bias: Tensor
    patch: PatchConfig

    def __call__(self, x: Tensor) -> Tensor:
        """Activities [B, K, H', W'] ≥ 0 of images [B, C, H, W]."""
        height, width = self.patch.map_size((x.shape[2], x.shape[3]))
        scale = inverse_contrast(x, self.patch) if self.patch.contrast else None
        columns = self.patch.convolution.forward(x, self.weight, scale, self.bias).clamp_(min=0.0)
        return rearrange(columns, "k (b h w) -> b k h w", h=height, w=width)

    @property
    def operations(self) -> int:
        """Multiply–adds per position: K P, and with contrast 2 P for the sums of x and x² and K for the division.

        The dynamics take K P + T K² for T iterations of a gradient method.
        """
        channels, size = self.weight.shape[0], self.patch.patch_size
        return channels * size + (2 * size + channels if self.patch.contrast else 0)


@dataclass(frozen=True, eq=False)
class Filter:
    """A plain convolution with ReLU, relu(conv(x, weight) + bias), with the stride and padding of its layer.

    Attributes
    ----------
    weight: [K, C, k, k].
    bias: [K].

    >>> Filter(torch.ones(5, 1, 3, 3), torch.zeros(5)).operations
    45
    """

    weight: Tensor
    bias: Tensor

    @property
    def operations(self) -> int:
        """Multiply–adds per position: K P."""
        return self.weight.numel()


def feedforward_encoder(layer: SimilarityMatchingConv2d, images: Tensor) -> Encoder:
    """Fit an encoder that reproduces the layer's statistics (1) on a sample of its input.

    Parameters
    ----------
    layer: a trained layer that holds all of its channels.
    images: [B, C, H, W], a sample of the layer's input; no labels are needed. About `SAMPLE_COLUMNS` patches are used,
        which should be many times P.

    Raises
    ------
    ValueError
        The images have the wrong shape, there are none, or the layer holds only a shard of its channels.

    Warns
    -----
    ConvergenceWarning
        The fit of some channel did not converge.

    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> encoder = feedforward_encoder(layer, torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> encoder(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 4, 6, 6])
    """
    images = layer.as_images(images)
    positions = _draw(layer, images)
    patches = layer.prepare(images, positions)
    weight, bias = match(_matrix(patches), true_activities(layer, patches), _empty_response(layer))
    if layer.patch.contrast:  # the patches that the convolution sees still have their mean
        weight = weight - weight.mean(dim=1, keepdim=True)
    return Encoder(weight.reshape(layer.feedforward.shape), bias, layer.patch)


def feedforward_filter(layer: SimilarityMatchingConv2d, images: Tensor) -> Filter:
    """Fit a filter on raw patches that reproduces the layer's statistics (1), scaled like He's initialisation.

    With weights drawn after He et al. (2015) the mean square of each channel after ReLU equals that of the input
    pixels. Weight and bias of every channel are scaled to match this, so that a network initialised with the filter
    trains at the same learning rates. The scaling does not change where a channel is active: somewhat more often than
    in the layer, since the filter does not normalise contrast, and less often than the half of a random filter.

    Parameters and errors are those of `feedforward_encoder`, with images scaled as the network will receive them. A
    layer trained on images in [0, 1] accepts standardised images only if it ignores mean and gain
    (`normalize: contrast`).

    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> feedforward_filter(layer, images).weight.shape
    torch.Size([4, 1, 3, 3])
    """
    images = layer.as_images(images)
    positions = _draw(layer, images)
    y = true_activities(layer, layer.prepare(images, positions))
    raw = _matrix(prepare(images, replace(layer.patch, contrast=False), None, positions))
    weight, bias = match(raw, y, _empty_response(layer))
    power = (raw @ weight.T + bias).clamp_(min=0.0).square().mean(dim=0)
    gain = (images.square().mean() / power.clamp(min=torch.finfo(power.dtype).tiny)).sqrt()
    gain = torch.where(power > 0, gain, 1.0)  # a channel that is silent on the sample cannot be scaled
    return Filter((weight * gain.unsqueeze(1)).reshape(layer.feedforward.shape), bias * gain)


def _matrix(patches: Patches) -> Tensor:
    assert patches.matrix is not None
    return patches.matrix


def _draw(layer: SimilarityMatchingConv2d, images: Tensor) -> Tensor:
    """The positions [B, n] of each image in the sample."""
    if layer.rows.count != layer.out_channels:
        raise ValueError(f"expected a layer with all {layer.out_channels} channels, got {layer.rows.count} of them")
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    map_size = layer.patch.map_size((images.shape[2], images.shape[3]))
    count = min(map_size[0] * map_size[1], -(-SAMPLE_COLUMNS // len(images)))
    return draw_positions(count, len(images), map_size, stream("encoder", layer.seed), images.device)


def _empty_response(layer: SimilarityMatchingConv2d) -> Tensor:
    """y*(v = 0), [K]."""
    empty = layer.feedforward.new_zeros(1, layer.patch.patch_size)
    return true_activities(layer, layer.explicit_patches(empty, whitened=False)).squeeze(1)


@torch.no_grad()
def true_activities(layer: SimilarityMatchingConv2d, x: Tensor | Patches) -> Tensor:
    """y* [K, N] of images or patches, solved to a residual of 1e-4; columns in the order 'b h w'.

    >>> true_activities(SimilarityMatchingConv2d(1, 4, kernel_size=3), torch.ones(2, 1, 8, 8)).shape
    torch.Size([4, 72])
    """
    return solve(layer.drive(x), layer.lateral, EXACT).y


def match(patches: Tensor, y: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ŷ = relu(A v + b) such that ⟨ŷ vᵀ⟩ = ⟨y vᵀ⟩ and ⟨ŷ⟩ = ⟨y⟩, except where empty patches determine b.

    Parameters
    ----------
    patches: [N, P], v.
    y: [K, N], y ≥ 0.
    response: [K], y at v = 0 exactly. The mean over empty patches would differ: there v is only nearly 0.

    Returns
    -------
    A [K, P] and b [K].

    Warns
    -----
    ConvergenceWarning
        A channel ended above `TOLERANCE`.

    >>> v = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    >>> weight, bias = match(v, y=2 * v.T, response=torch.zeros(3))
    >>> weight.shape, bias.shape, bool((weight - 2 * torch.eye(3)).abs().max() < 0.01)
    (torch.Size([3, 3]), torch.Size([3]), True)
    """
    with_one = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)
    theta = _descend(with_one, y, y.new_zeros(len(y), 1))
    weight, bias = theta[:, :-1].clone(), theta[:, -1].clone()
    power = patches.square().sum(dim=1)
    empty = power <= EMPTY**2 * power.mean()
    if float(empty.double().mean()) * with_one.shape[1] > 1.0:
        # the loss is convex: where b must be ≤ 0 and its free minimum is above 0, b = 0 is the minimum
        fixed = (response > 0) | (bias > 0)
        bias[fixed] = response[fixed]
        weight[fixed] = _descend(patches, y[fixed], bias[fixed].unsqueeze(1))
    return weight, bias


def _descend(inputs: Tensor, y: Tensor, offset: Tensor) -> Tensor:
    """Θ [K, Q] that minimises the matching loss of u = Θ z + offset over inputs z [N, Q], y [K, N], offset [K, 1].

    Nesterov's accelerated gradient in the metric C = ⟨z zᵀ⟩, which bounds the curvature ⟨1[u > 0] z zᵀ⟩ of the loss:
    a step of 1 cannot diverge, and whitening z would not change the iterates. Momentum restarts separately for every
    channel, so that channels do not depend on each other. Θ starts at 0 and stays 0 in directions that no input has.
    """
    count = len(inputs)
    covariance = (inputs.T @ inputs).double() / count
    ridge = 1e-6 * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    metric = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).to(covariance)).to(inputs.dtype)
    power = y.square().mean(dim=1)
    target = TOLERANCE * power.clamp(min=float(power.mean()) * QUIET**2).sqrt() if len(y) else power
    theta: Tensor = y.new_zeros(len(y), inputs.shape[1])
    previous = theta
    k = y.new_zeros(len(y), 1)
    worst = 0.0
    for _ in range(MAX_ITERATIONS):
        z = theta + k / (k + 3.0) * (theta - previous)
        mismatch = (y - torch.addmm(offset, z, inputs.T).clamp_(min=0.0)) @ inputs / count
        change = mismatch @ metric
        following = z + change
        # the mismatch in units of the activity: the root-mean-square change of u
        remaining = (mismatch * change).sum(dim=1).clamp(min=0.0).sqrt()
        previous, theta = theta, following
        worst = float((remaining / target.clamp(min=torch.finfo(y.dtype).tiny)).amax()) if len(y) else 0.0
        if worst <= 1.0:
            return theta
        uphill = (mismatch * (theta - previous)).sum(dim=1, keepdim=True) < 0
        k = torch.where(uphill, 0.0, k + 1.0)
    warnings.warn(
        f"the encoder's fit reached a mismatch of {worst * TOLERANCE:.1e} after {MAX_ITERATIONS} iterations, above "
        f"{TOLERANCE:.1e}; sample more images",
        ConvergenceWarning,
        stacklevel=4,
    )
    return theta
