"""What a learnt layer computes, approximated by one convolution: for cheap encoding, and to initialise a network.

The dynamics find y*(x̃) = argmin over y ≥ 0 of ½ yᵀMy − yᵀW x̃, a continuous, piecewise linear function: on the face of
the active channels S, y_S = M_SS⁻¹ W_S x̃. Sought is the rectified affine function of the patch nearest to it,

    ŷ = relu(A v + b)        v = J x / s, the patch before whitening (`simmatch.geometry`); v = x for a `Filter`

Where learning is at rest W = ⟨y x̃ᵀ⟩, so W C⁻¹, C = ⟨x̃ x̃ᵀ⟩, is the linear least-squares predictor of y: the *linear*
population whose Hebbian statistics ⟨ŷ x̃ᵀ⟩ are those of the layer. Asked of the *rectified* population, the same gives

    ⟨ŷ vᵀ⟩ = ⟨y vᵀ⟩,   ⟨ŷ⟩ = ⟨y⟩                                                                    (1)

A feedforward population that learnt by the layer's rule would have the layer's W, and the layer's mean activities. (1)
is the minimum of a convex function, the matching loss ⟨½ relu(u)² − y u⟩ of u = A v + b, so nothing depends on a start.
Its gradient is local, ΔA = η (y − ŷ) vᵀ: a delta rule with the recurrent activity as the teacher. Whitening needs no
treatment of its own: v and x̃ are affine in each other, A absorbs it. M acts through y, and is gone afterwards.

Every channel's mean and all its first-order statistics are matched; its mean square comes out lower, by what a function
of this form cannot explain. Where M is diagonal, y* is itself of this form, and ŷ = y*.

**Empty patches.** Images with a background have many equal patches, v = 0, at which ŷ = relu(b): the sign of b alone
decides whether a channel is active on all of them. There ŷ is made exact: b = y*(0) for channels that are active at
v = 0, or would be and should not. This takes one of the P + 1 parameters of a channel, and is done where that one
patch makes up more than its share, 1 / (P + 1), of the sample.

Compared with A = W/diag M, (M + λI)⁻¹W, W C⁻¹, with inhibition replaced by its mean, each with gain and threshold
matched per channel, and with least squares on y > 0 and of ŷ: see `LOG.md`.

Sources: Auer, Herbster & Warmuth, "Exponentially many local minima for single neurons" (1996), for the matching loss;
Brillinger (1982) for the direction of W C⁻¹ under a nonlinearity; Kavukcuoglu, Ranzato & LeCun, "Fast inference in
sparse coding algorithms" (2008), for encoders that predict codes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.geometry import PatchConfig, Patches, draw_positions, inverse_contrast, prepare
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import seeded
from simmatch.solvers.quadratic import ConvergenceWarning, solve

SAMPLE_COLUMNS = 20_000
"""Patches that an encoder is fitted to, at most about."""

EXACT = DynamicsConfig(tolerance=1e-4, max_iterations=10_000)
"""The dynamics that define the true activities, whatever the layer's own configuration."""

TOLERANCE = 1e-3
"""Mismatch of (1) at which a fit is done, relative to the channel's root-mean-square activity."""

QUIET = 0.1
"""A channel's root-mean-square activity counts as no less than this share of the layer's: where a channel is hardly
ever active, the fit is slow and of no consequence."""

MAX_ITERATIONS = 1000
EMPTY = 1e-3
"""A patch is empty whose norm is below so much of the root-mean-square one."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A layer's activities without its dynamics: ŷ = relu(conv(x, A) / s + b).

    Attributes
    ----------
    weight: [K, C, k, k], A, mean removal and whitening folded in.
    bias: [K], b, the response to an empty patch.
    patch: geometry and contrast normalisation, those of the layer.
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
        """Multiply–adds per position: K P, and with contrast 2 P for the sums of x and x², K for the division.

        The dynamics take K P + T K² for T iterations; see the README for coordinate descent.
        """
        channels, size = self.weight.shape[0], self.patch.patch_size
        return channels * size + (2 * size + channels if self.patch.contrast else 0)


@dataclass(frozen=True, eq=False)
class Filter:
    """A plain convolution with ReLU, relu(conv(x, weight) + bias), at the stride and padding of its layer.

    Attributes
    ----------
    weight: [K, C, k, k].
    bias: [K].
    """

    weight: Tensor
    bias: Tensor

    @property
    def operations(self) -> int:
        """Multiply–adds per position: K P."""
        return self.weight.numel()


def feedforward_encoder(layer: SimilarityMatchingConv2d, images: Tensor) -> Encoder:
    """The encoder that reproduces the layer's statistics (1) on a sample of its input.

    Parameters
    ----------
    layer: learnt, all of its rows.
    images: [B, C, H, W], without labels; about `SAMPLE_COLUMNS` patches of them are used, which should be many times P.

    Raises
    ------
    ValueError
        Images of another shape, none, or a layer that holds a shard of its channels.
    """
    positions = _draw(layer, images)
    patches = layer.prepare(images, positions)
    weight, bias = match(_matrix(patches), true_activities(layer, patches), _empty_response(layer))
    if layer.patch.contrast:  # the patches that the convolution sees still have their mean
        weight = weight - weight.mean(dim=1, keepdim=True)
    return Encoder(weight.reshape(layer.feedforward.shape), bias, layer.patch)


def feedforward_filter(layer: SimilarityMatchingConv2d, images: Tensor) -> Filter:
    """The filter on raw patches that reproduces the layer's statistics (1), on the scale of He's initialisation.

    Weights drawn after He et al. (2015) keep the mean square: that of each channel after ReLU equals that of the input
    pixels. Every channel is scaled to this, weight and bias alike, so that a network initialised with it trains at
    the rates that suit a network initialised by He. When a channel is active is left as fitted: somewhat more often
    than in the layer, since the filter is blind to contrast, and less than the half of the time of one drawn at random.

    Parameters, errors: as for `feedforward_encoder`; images scaled as the network will see them. A layer that learnt
    from [0, 1] may be given standardised images only if it ignores mean and gain (`normalize: contrast`).
    """
    positions = _draw(layer, images)
    y = true_activities(layer, layer.prepare(images, positions))
    raw = _matrix(prepare(images, replace(layer.patch, contrast=False), None, positions))
    weight, bias = match(raw, y, _empty_response(layer))
    power = (raw @ weight.T + bias).clamp_(min=0.0).square().mean(dim=0)
    gain = (images.square().mean() / power.clamp(min=torch.finfo(power.dtype).tiny)).sqrt()
    gain = torch.where(power > 0, gain, 1.0)  # a channel that is silent on the sample has no scale
    return Filter((weight * gain.unsqueeze(1)).reshape(layer.feedforward.shape), bias * gain)


def _matrix(patches: Patches) -> Tensor:
    assert patches.matrix is not None
    return patches.matrix


def _draw(layer: SimilarityMatchingConv2d, images: Tensor) -> Tensor:
    """The positions [B, n] of each image that make up the sample."""
    if layer.rows.count != layer.out_channels:
        raise ValueError(f"expected a layer with all {layer.out_channels} channels, got {layer.rows.count} of them")
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    map_size = layer.patch.map_size((images.shape[2], images.shape[3]))
    count = min(map_size[0] * map_size[1], -(-SAMPLE_COLUMNS // len(images)))
    return draw_positions(count, len(images), map_size, seeded("encoder", layer.seed))


def _empty_response(layer: SimilarityMatchingConv2d) -> Tensor:
    """y*(v = 0), [K]."""
    nothing = layer.feedforward.new_zeros(1, layer.patch.patch_size)
    return true_activities(layer, layer.explicit_patches(nothing, whitened=False)).squeeze(1)


@torch.no_grad()
def true_activities(layer: SimilarityMatchingConv2d, x: Tensor | Patches) -> Tensor:
    """y* [K, N] of images or patches to a residual of 1e-4, in the layer's dtype; columns in the order 'b h w'."""
    return solve(layer.drive(x), layer.lateral, EXACT).y


# -- the fit -----------------------------------------------------------------------------------------------------------


def match(patches: Tensor, y: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """A and b with ⟨ŷ vᵀ⟩ = ⟨y vᵀ⟩ and ⟨ŷ⟩ = ⟨y⟩ for ŷ = relu(A v + b), but for b where it is fixed by empty patches.

    Parameters
    ----------
    patches: [N, P], v.
    y: [K, N], y ≥ 0.
    response: [K], y at v = 0. Not the mean over empty patches: they are empty to rounding, and v is tiny there, not 0.

    Returns
    -------
    A [K, P] and b [K].

    Warns
    -----
    ConvergenceWarning
        A channel ended above `TOLERANCE`.
    """
    with_one = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)
    found = _descend(with_one, y, y.new_zeros(len(y), 1))
    weight, bias = found[:, :-1].clone(), found[:, -1].clone()
    power = patches.square().sum(dim=1)
    empty = power <= EMPTY**2 * power.mean()
    if float(empty.double().mean()) * with_one.shape[1] > 1.0:
        # the loss is convex: where b ≤ 0 is wanted and b > 0 is the free minimum, b = 0 is the minimum
        fixed = (response > 0) | (bias > 0)
        bias[fixed] = response[fixed]
        weight[fixed] = _descend(patches, y[fixed], bias[fixed].unsqueeze(1))
    return weight, bias


def _descend(inputs: Tensor, y: Tensor, offset: Tensor) -> Tensor:
    """Θ [K, Q] that minimises the matching loss of u = Θ z + offset over inputs z [N, Q], y [K, N], offset [K, 1].

    Nesterov's accelerated gradient in the metric C = ⟨z zᵀ⟩, which bounds the loss's curvature ⟨1[u > 0] z zᵀ⟩: step 1
    never diverges, and z might be whitened without a change. Momentum restarts channel by channel, so that channels do
    not depend on each other. It starts from Θ = 0, so what no input spans stays zero.
    """
    count = len(inputs)
    covariance = (inputs.T @ inputs).double() / count
    ridge = 1e-6 * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    metric = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).to(covariance)).to(inputs.dtype)
    power = y.square().mean(dim=1)
    wanted = TOLERANCE * power.clamp(min=float(power.mean()) * QUIET**2).sqrt() if len(y) else power
    theta: Tensor = y.new_zeros(len(y), inputs.shape[1])
    previous = theta
    k = y.new_zeros(len(y), 1)
    worst = 0.0
    for _ in range(MAX_ITERATIONS):
        z = theta + k / (k + 3.0) * (theta - previous)
        mismatch = (y - torch.addmm(offset, z, inputs.T).clamp_(min=0.0)) @ inputs / count
        change = mismatch @ metric
        following = z + change
        # what is left to match, in the inputs' own units: the length of the change in u
        remaining = (mismatch * change).sum(dim=1).clamp(min=0.0).sqrt()
        previous, theta = theta, following
        worst = float((remaining / wanted.clamp(min=torch.finfo(y.dtype).tiny)).amax()) if len(y) else 0.0
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


# -- how good it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How well ŷ reproduces y over the columns of some images. All are 1, the error 0, where both are the same.

    Attributes
    ----------
    cosine: mean over columns of the cosine of ŷ and y; 1 where both are silent, 0 where one is.
    correlation: mean over channels of the correlation over columns; 1 where both are constant, 0 where one is.
    support: mean over columns of the Jaccard index, channels active in both over channels active in either; 1 where
        both are silent.
    error: ‖ŷ − y‖ / ‖y‖ over everything; 0/0 = 0.
    """

    cosine: float
    correlation: float
    support: float
    error: float


def agreement(encoded: Encoder | Filter, layer: SimilarityMatchingConv2d, images: Tensor) -> Agreement:
    """Compare with the true activities of the layer on images [B, C, H, W], all positions of them.

    A filter's scale is a convention, so each of its channels first takes its least-squares gain.
    """
    if isinstance(encoded, Encoder):
        maps = encoded(images)
    else:
        maps = F.conv2d(images, encoded.weight, encoded.bias, layer.patch.stride, layer.patch.padding).relu()
    y, found = true_activities(layer, images).double(), rearrange(maps, "b k h w -> k (b h w)").double()
    if isinstance(encoded, Filter):
        found = found * _ratio((found * y).sum(dim=1), found.square().sum(dim=1), 0.0).unsqueeze(1)
    return compare(found, y)


def compare(found: Tensor, y: Tensor) -> Agreement:
    """`Agreement` of activities ŷ and y, both [K, N] ≥ 0."""
    either, both = (found > 0) | (y > 0), (found > 0) & (y > 0)
    centred, found_centred = (values - values.mean(dim=1, keepdim=True) for values in (y, found))
    spread = torch.stack([values.amax(dim=1) > values.amin(dim=1) for values in (found, y)])
    correlation = _ratio((found_centred * centred).sum(dim=1), found_centred.norm(dim=1) * centred.norm(dim=1), 0.0)
    correlation = torch.where(spread.all(dim=0), correlation, (~spread.any(dim=0)).to(correlation))
    cosine = _ratio((found * y).sum(dim=0), found.norm(dim=0) * y.norm(dim=0), 0.0)
    cosine = torch.where(either.any(dim=0), cosine, 1.0)
    error, length = float((found - y).norm()), float(y.norm())
    return Agreement(
        cosine=float(cosine.mean()),
        correlation=float(correlation.mean()),
        support=float(_ratio(both.sum(dim=0).double(), either.sum(dim=0).double(), 1.0).mean()),
        error=error / length if length > 0 else (0.0 if error == 0 else float("inf")),
    )


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """numerator / denominator, and `otherwise` where the denominator is zero."""
    some = denominator > 0
    return torch.where(some, numerator / torch.where(some, denominator, 1.0), otherwise)
