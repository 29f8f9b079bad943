"""A convolutional nonnegative similarity-matching layer: thin state around dynamics and plasticity.

    min over Y ≥ 0 of ‖XᵀX + α Zᵀ C_z⁻¹ Z − YᵀY‖²_F

is solved online by neurons with feedforward weights W, lateral inhibition M and label weights V: the dynamics
find y for the patches of a batch, the plasticity moves the weights by the batch's statistics. Everything that a
synapse needs is at its two ends.

The layer owns W, M and V: all rows, or the rows of one shard (`rows`), the rest being reached through the injected
`exchange`. It knows nothing of processes.

Source: Bahroun et al., arXiv:2308.02427 (ConvNSM); Pehlevan & Chklovskii (2014, 2019) for the min–max derivation.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from simmatch.arguments import (
    check_activities,
    check_dtype,
    check_images,
    check_positions,
    check_some,
    check_statistics,
)
from simmatch.as_written import as_written
from simmatch.config import DynamicsConfig, LayerArguments, LayerConfig, LayerOptions, PlasticityConfig, parse
from simmatch.geometry import (
    PatchConfig,
    Patches,
    Whitening,
    correlate,
    drive,
    explicit,
    prepare,
    sample_patches,
    zca,
)
from simmatch.labels import check_labels, one_hot
from simmatch.objective import diverging, similarity_objective, worse_than_silence
from simmatch.plasticity import RULES, Statistics, Weights, class_frequency_change, learning_rate
from simmatch.seeding import seeded
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.rows import Rows
from simmatch.sharding.sharing import ColumnSharing, RowSharing, Sharing
from simmatch.solvers.bound import Bound, Kept, certify, certify_afresh, traced_bound
from simmatch.solvers.dynamics import Solution, unrolled

PLASTIC = ("feedforward", "lateral", "label", "class_frequency", "silent")
"""Buffers that a step of plasticity changes."""


class SimilarityMatchingConv2d(nn.Module):
    """Convolutional nonnegative similarity matching (ConvNSM).

    Parameters
    ----------
    in_channels, out_channels: C and K.
    kernel_size, stride, padding: of the k × k patches.
    num_classes: classes of the label weights V; 0 for none.
    label_gain: variance of a label direction over the mean variance of an input direction, α = label_gain · tr C_x / P,
        so that rescaling the input does not change its meaning.
    dynamics, plasticity: how activities are found and weights learn.
    normalize: 'none', or 'contrast' for patches of zero mean and unit deviation.
    contrast_floor: least deviation a patch is divided by.
    whiten, whiten_ridge: ZCA whitening of the patches, regularised; see `calibrate`.
    seed: of the initial weights and of every re-drawn row.
    dtype, device: of all buffers.
    rows, exchange: the channels held here and the way to the others. Default: all of them, and nobody to exchange with,
        which lets `solver: auto` choose what is fastest here. Given an exchange, be it of a single owner, it chooses by
        configuration alone, so that the number of owners changes nothing.

    Attributes
    ----------
    feedforward: [K_g, C, k, k], W.
    lateral: [K_g, K], M: symmetric, positive semidefinite, entrywise nonnegative.
    label: [K_g, num_classes], V.
    whitening, whitening_mean: [P, P] and [P], where whitening is on.
    input_power: tr C_x, the mean squared norm of a patch after normalisation and whitening; 0 before `calibrate`.
    class_frequency: [num_classes], p̂.
    silent: [K_g], updates in a row in which the channel was silent on every column.
    perron: [K], approximate Perron vector of M; with M itself it determines the bound of λmax(M).
    updates, revived: counts of updates and of re-drawn channels.
    dead_channels: channels of all owners found dead at the last update (and then revived, if so configured).
    """

    feedforward: Tensor
    lateral: Tensor
    label: Tensor
    whitening: Tensor
    whitening_mean: Tensor
    input_power: Tensor
    class_frequency: Tensor
    silent: Tensor
    perron: Tensor
    updates: Tensor
    revived: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        num_classes: int = 0,
        label_gain: float = 0.0,
        dynamics: DynamicsConfig | None = None,
        plasticity: PlasticityConfig | None = None,
        normalize: str = "none",
        contrast_floor: float = 0.1,
        whiten: bool = False,
        whiten_ridge: float = 0.1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rows: Rows | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        arguments = parse(
            LayerArguments,
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "num_classes": num_classes,
                "label_gain": label_gain,
                "dynamics": dynamics or DynamicsConfig(),
                "plasticity": plasticity or PlasticityConfig(),
                "normalize": normalize,
                "contrast_floor": contrast_floor,
                "whiten": whiten,
                "whiten_ridge": whiten_ridge,
                "seed": seed,
            },
        )
        check_dtype(dtype)
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.label_gain, self.whiten, self.whiten_ridge, self.seed = label_gain, whiten, whiten_ridge, seed
        self.dynamics, self.plasticity = arguments.dynamics, arguments.plasticity
        self.patch = PatchConfig(in_channels, kernel_size, stride, padding, normalize == "contrast", contrast_floor)
        self.rows = rows or Rows.all(out_channels)
        self.exchange = exchange or IDENTITY
        self.sharing: Sharing
        if self.dynamics.exchange == "gather_state":
            filters = (in_channels, kernel_size, kernel_size)
            self.sharing = ColumnSharing(self.dynamics, self.rows, self.exchange, filters, num_classes)
        else:
            self.sharing = RowSharing(self.dynamics, self.rows, self.exchange, alone=exchange is None)
        self._kept: Kept | None = None
        self.dead_channels = 0

        own, size = self.rows.count, self.patch.patch_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("feedforward", zeros(own, in_channels, kernel_size, kernel_size))
        self.register_buffer("lateral", zeros(own, out_channels))
        self.register_buffer("label", zeros(own, num_classes))
        if whiten:
            self.register_buffer("whitening", zeros(size, size).fill_diagonal_(1.0))
            self.register_buffer("whitening_mean", zeros(size))
        self.register_buffer("input_power", zeros())
        self.register_buffer("class_frequency", zeros(num_classes).add_(1.0 / max(num_classes, 1)))
        self.register_buffer("silent", zeros(own, dtype=torch.int64))
        self.register_buffer("perron", zeros(out_channels).add_(1.0))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("revived", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.lateral.diagonal(offset=self.rows.start).fill_(1.0)
        for channel in range(self.rows.start, self.rows.stop):
            self.feedforward[channel - self.rows.start] = self._draw_row(channel, 0)

    @classmethod
    def from_config(
        cls,
        config: LayerConfig,
        in_channels: int,
        map_size: tuple[int, int],
        *,
        num_classes: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rows: Rows | None = None,
        exchange: Exchange | None = None,
    ) -> SimilarityMatchingConv2d:
        """The layer that a configuration describes, for inputs [B, in_channels, *map_size]: all rows, or a shard.

        num_classes: of the data; a layer that is not `supervised` has no label weights.

        Raises
        ------
        ValueError
            A kernel that does not fit the input.
        """
        options = {name: getattr(config, name) for name in LayerOptions.model_fields}
        options["kernel_size"] = PatchConfig.of_layer(config, in_channels, map_size).kernel_size
        return cls(
            in_channels,
            num_classes=num_classes if config.supervised else 0,
            seed=seed,
            dtype=dtype,
            device=device,
            rows=rows,
            exchange=exchange,
            **options,
        )

    def _draw_row(self, channel: int, draw: int) -> Tensor:
        """Row of W at birth (draw 0) and at each revival: Gaussian of expected norm 1, whatever the sharding."""
        generator = seeded("feedforward", self.seed, channel, draw)
        shape = self.feedforward.shape[1:]
        row = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return (row / math.sqrt(self.patch.patch_size)).to(self.feedforward)

    # ------------------------------------------------------------------------------------------- input

    def _whitening(self) -> Whitening | None:
        return Whitening(self.whitening, self.whitening_mean) if self.whiten else None

    @as_written
    def prepare(self, x: Tensor, positions: Tensor | None = None) -> Patches:
        """Images [B, C, H, W] → `Patches`, which every other method takes in place of the images.

        positions: [B, n], the only positions of each image to be driven, solved and learnt from, as h · W' + w;
        activities are then maps of 1 × n. None: all.

        Raises
        ------
        ValueError
            Images or positions of another shape, format or device; images that require a gradient.
        """
        check_images(x, self.in_channels, self.feedforward)
        if positions is not None:
            check_positions(positions, x.shape[0], self.patch.map_size((x.shape[2], x.shape[3])))
        return prepare(x, self.patch, self._whitening(), positions)

    @as_written
    def calibrate(self, x: Tensor, num_patches: int = 200_000) -> None:
        """Measure, once and before learning, what the input looks like: tr C_x, and Π and μ where whitening is on.

        Parameters
        ----------
        x: [B, C, H, W], a sample of the input.
        num_patches: patches taken from it at random positions.

        Raises
        ------
        ValueError
            No images or patches, or of another shape or format, or with values that are not finite.
        """
        check_images(x, self.in_channels, self.feedforward)
        check_some(x.shape[0])
        if num_patches < 1:
            raise ValueError(f"num_patches: expected at least 1, got {num_patches}")
        if not bool(x.isfinite().all()):
            raise ValueError("images: expected finite values, got NaN or infinity")
        sample = sample_patches(x, self.patch, num_patches, seeded("calibrate", self.seed))
        if self.whiten:
            found = zca(sample, self.whiten_ridge)
            sample = (sample - found.mean) @ found.matrix.T
            self.whitening.copy_(found.matrix)
            self.whitening_mean.copy_(found.mean)
        self.input_power.copy_(sample.square().sum(dim=1).mean())

    @property
    def calibrated(self) -> bool:
        return bool(self.input_power > 0)

    @property
    def alpha(self) -> Tensor:
        """α, weight of the label term: label_gain times the mean variance tr C_x / P of a direction of the input."""
        return self.label_gain * self.input_power / self.patch.patch_size

    # ------------------------------------------------------------------------------------------- fast: dynamics

    @property
    def bound(self) -> Bound:
        """Certified bound of λmax(M), equal on all owners: a function of `lateral` and `perron` and of nothing else.

        It is kept. One owner computes it anew where M is another than it is of; several, whom that takes exchanges,
        refuse to go on instead (`check_kept`).
        """
        kept = self._kept
        if kept is None or (self.exchange.world_size == 1 and not kept.holds(self.lateral)):
            kept = self._kept = Kept.of(self._certify(), self.lateral)
        return kept.bound

    def _certify(self) -> Bound:
        return certify(self.lateral, self.perron, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange)

    def check_kept(self) -> None:
        """Raise RuntimeError where several owners keep a bound and own rows of M are not those that it is of.

        Rows that are not finite pass: the dynamics tell all owners of them.
        """
        if self.exchange.world_size == 1 or self._kept is None or self._kept.holds(self.lateral):
            return
        if bool(self.lateral.isfinite().all()):
            raise RuntimeError(
                "lateral: expected the rows that the last update or load left, got others; "
                "call recertify() on all owners after writing to them"
            )

    @as_written
    def recertify(self) -> None:
        """Find the Perron vector of M anew, for the tightest bound; all owners together.

        Any `perron` bounds λmax(M), tightly where it is that of M; worth a call after writing to `lateral`.
        """
        found = certify_afresh(self.lateral, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange)
        self.perron.copy_(found.perron)
        self._kept = None

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*arguments, **options)

    @property
    def weights(self) -> Weights:
        """Own rows of W, M and V; the buffers themselves."""
        return Weights(self.feedforward, self.lateral, self.label)

    @as_written
    def drive(self, x: Tensor | Patches, labels: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        """d = W x̃ + α V z of the own channels, or of the rows in `weights`: [K_g, N], columns as in 'b h w'."""
        patches = x if isinstance(x, Patches) else self.prepare(x)
        weights = weights or self.weights
        result = drive(patches, weights.feedforward, self.patch, self._whitening())
        if labels is None or self.label_gain == 0:
            return result
        driven = (
            self.alpha * weights.label @ one_hot(labels, self.num_classes, self.label)
        )  # [K_g, B]: alike at all positions of an image
        by_image = rearrange(result, "k (b l) -> k b l", l=patches.positions)
        by_image += rearrange(driven, "k b -> k b 1")
        return result

    def check_batch(self, images: int, labels: Tensor | None) -> None:
        """Raise, before anything is computed or changed, what keeps this owner from work on a batch."""
        if labels is not None:
            check_labels(labels, self.num_classes, images)
        self.check_kept()

    @as_written
    def solve(self, x: Tensor | Patches, labels: Tensor | None = None) -> Solution:
        """Activities y [B, K, H', W'] of all channels, with residual [B, H', W'].

        Parameters
        ----------
        x: [B, C, H, W].
        labels: [B], classes that drive the activities (training), `UNLABELLED` where unknown; None for none.

        Raises
        ------
        ValueError
            Images of another shape, format or device, or that require a gradient; labels that are not one known class
            per image.
        SharedFault
            On all owners alike: one of them met an exception or a non-finite value.
        """
        patches = x if isinstance(x, Patches) else self.prepare(x)
        solution = self.sharing.solve(self, patches, labels)
        height, width = patches.map_size
        residual = rearrange(solution.residual, "(b h w) -> b h w", h=height, w=width)
        return Solution(self._as_maps(solution.y, patches), solution.num_iters, residual)

    @staticmethod
    def _as_maps(columns: Tensor, patches: Patches) -> Tensor:
        height, width = patches.map_size
        return rearrange(columns, "k (b h w) -> b k h w", h=height, w=width)

    @as_written
    def forward(self, x: Tensor | Patches) -> Tensor:
        """Label-free activities [B, K, H', W'] after the fixed number of iterations used in evaluation."""
        patches = x if isinstance(x, Patches) else self.prepare(x)
        if not torch.compiler.is_exporting():
            return self._as_maps(self.sharing.solve(self, patches, None, fixed=True).y, patches)
        bound, ridge = traced_bound(self.lateral, self.perron, ridge=self.dynamics.ridge)
        y = unrolled(self.drive(patches), self.lateral, self.dynamics, bound=bound, ridge=ridge)
        return self._as_maps(y, patches)

    # ------------------------------------------------------------------------------------------- slow: plasticity

    @as_written
    def statistics(self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None) -> Statistics:
        """Sums over the columns of a batch; y [B, K, H', W'] as from `solve`.

        Raises
        ------
        ValueError
            Images, activities or labels that do not fit this layer or each other.
        """
        patches = x if isinstance(x, Patches) else self.prepare(x)
        check_activities(y, (patches.batch_size, self.out_channels, *patches.map_size), self.feedforward)
        if labels is not None:
            check_labels(labels, self.num_classes, patches.batch_size)
        return self._statistics(patches, rearrange(y, "b k h w -> k (b h w)"), labels, self.rows)

    def _statistics(self, patches: Patches, y: Tensor, labels: Tensor | None, rows: Rows) -> Statistics:
        """Sums for these rows; y [K, N] of all channels."""
        own = y[rows.start : rows.stop]
        yx = correlate(patches, own, self.patch, self._whitening())
        if labels is None or self.num_classes == 0:
            yz = y.new_zeros(rows.count, self.num_classes)
        else:
            yz = (
                reduce(own, "k (b l) -> k b", "sum", b=patches.batch_size)
                @ one_hot(labels, self.num_classes, self.label).T
            )
        zz, count = self._totals(patches, labels)
        return Statistics(yx, own @ y.T, yz, zz, count)

    def _totals(self, patches: Patches, labels: Tensor | None) -> tuple[Tensor, int]:
        """The statistics that take no activities: Σ z zᵀ and the count of columns."""
        count = patches.batch_size * patches.positions
        if labels is None or self.num_classes == 0:
            return self.label.new_zeros(self.num_classes, self.num_classes), count
        z = one_hot(labels, self.num_classes, self.label)
        return z @ z.T * patches.positions, count

    @as_written
    @torch.no_grad()
    def update(self, statistics: Statistics, fault: Exception | None = None) -> None:
        """One plasticity step on the own rows, then the revival of dead channels.

        Nothing changes on any owner unless the new weights of all owners are finite and the new M has a bound.

        Warns of a relative objective above 1 once the start is forgotten (`simmatch.objective.diverging`).

        Raises
        ------
        ValueError
            Statistics of another layer, or of no columns.
        SharedFault
            On all owners, where one has a fault or non-finite weights.
        """
        perron = self.bound.perron
        after = {name: getattr(self, name) for name in PLASTIC}
        try:
            if fault is None:
                check_statistics(statistics, self.weights)
                after = self._learnt(statistics)
        except Exception as error:
            fault = error
        bound = certify(
            after["lateral"],
            perron,
            self.rows,
            ridge=self.dynamics.ridge,
            exchange=self.exchange,
            flagged=self._dead(after["silent"], after["lateral"]),
            healthy=bool(after["feedforward"].isfinite().all() & after["label"].isfinite().all()),
            fault=fault,
        )
        for name, value in after.items():
            getattr(self, name).copy_(value)
        self.perron.copy_(perron)
        self.updates.add_(1)
        self._kept = Kept.of(bound, self.lateral)
        channels = torch.nonzero(bound.flagged).flatten().tolist()
        self.dead_channels = len(channels)
        if channels and self.plasticity.revive:
            self._revive(channels)
        if self.exchange is IDENTITY:  # given an exchange, who gave it watches the objective of all owners
            above_one = worse_than_silence(statistics, self.alpha)
            complaint = diverging(self.plasticity, int(self.updates), above_one=above_one)
            if complaint is not None:
                warnings.warn(complaint, stacklevel=7)  # the call of `partial_fit`

    def _dead(self, silent: Tensor, lateral: Tensor) -> Tensor:
        """[K_g], own channels that were silent for too long, or have forgotten all activity: M_ii = 0 inhibits nothing.

        The second happens to a channel that is silent for one batch where η/τ = 1.
        """
        return (silent >= self.plasticity.dead_after) | (lateral.diagonal(offset=self.rows.start) <= 0)

    def _learnt(self, statistics: Statistics) -> dict[str, Tensor]:
        """What a step makes of `PLASTIC`; none of it is changed here."""
        lr = learning_rate(self.plasticity, int(self.updates))
        change = RULES[self.plasticity.rule](self.weights, statistics, self.class_frequency, lr, self.plasticity)
        active = statistics.yy.diagonal(offset=self.rows.start) > 0
        return {
            "feedforward": change.feedforward.add_(self.feedforward),  # no further copy of what may be large
            "lateral": change.lateral.add_(self.lateral),
            "label": change.label.add_(self.label),
            "class_frequency": self.class_frequency + class_frequency_change(statistics, self.class_frequency, lr),
            "silent": (self.silent + 1).masked_fill_(active, 0),
        }

    def _revive(self, channels: list[int]) -> None:
        """Dead channels start again: a fresh row of W, no lateral or label weights but M_ii = 1.

        Every owner knows the same list, so each clears its part of the rows and columns: M stays symmetric,
        positive semidefinite and nonnegative.
        """
        for channel in channels:
            self.revived.add_(1)
            self.lateral[:, channel] = 0.0
            row = channel - self.rows.start
            if 0 <= row < self.rows.count:
                self.feedforward[row] = self._draw_row(channel, int(self.updates))
                self.lateral[row] = 0.0
                self.lateral[row, channel] = 1.0
                self.label[row] = 0.0
                self.silent[row] = 0
        self.perron.fill_(1.0)
        self._kept = Kept.of(self._certify(), self.lateral)

    @as_written
    @torch.no_grad()
    def partial_fit(self, x: Tensor | Patches, labels: Tensor | None = None) -> Solution:
        """Learn from one batch: solve, statistics, apply. Returns the columns' solution, y [K, N], residual [N].

        Where columns are split (`exchange: gather_state`) these are own columns only, N of them the range
        `split_columns(…)[rank]`: learning does not need the others. `simmatch.measurement.measure` looks at all.

        A layer that whitens, or has a label gain, calibrates itself on its first batch if nobody did.

        Raises
        ------
        ValueError
            A batch that does not fit (see `solve`), or of size 0. Nothing has changed.
        SharedFault
            On all owners alike: one of them met an exception or a non-finite value. No weights have changed.
        """
        if not isinstance(x, Patches):
            check_images(x, self.in_channels, self.feedforward)
        images = x.batch_size if isinstance(x, Patches) else x.shape[0]
        check_some(images)
        if self.exchange.world_size == 1:  # several owners tell each other
            self.check_batch(images, labels)
        if not self.calibrated and isinstance(x, Tensor) and (self.whiten or self.label_gain > 0):
            self.calibrate(x)
        patches = x if isinstance(x, Patches) else self.prepare(x)
        solution, statistics, fault = self.sharing.learn(self, patches, labels)
        self.update(statistics, fault)  # type: ignore[arg-type]  # a fault is raised before statistics are read
        return solution

    @torch.no_grad()
    def settle_label(self, yz: Tensor, zz: Tensor) -> None:
        """Bring V to the length of label-free activity: V ← g V, g = ⟨C, V⟩ / ⟨V, V⟩ with class means C.

        Called once after learning, on a layer that holds all rows. While labels drive the activities V grows with
        them, and would be too long for the label-free activity that decoding compares it with. One number g moves:
        the least-squares length. The class means themselves decode worse (see `LOG.md`).

        Parameters
        ----------
        yz: [K, num_classes]; zz: [num_classes, num_classes]: sums as in `Statistics`, over label-free activities.
            Classes without images count for nothing.
        """
        means = yz / zz.diagonal().clamp(min=1.0)
        known = self.label * (zz.diagonal() > 0)
        self.label.mul_((means * known).sum() / known.square().sum().clamp(min=torch.finfo(self.label.dtype).tiny))

    @as_written
    def objective(self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None, *, columns: int = 4096) -> float:
        """Relative similarity-matching objective on the first images of a batch, about `columns` columns of it.

        y: [K, N], activities of all channels as returned by `partial_fit`.
        """
        patches = x if isinstance(x, Patches) else self.prepare(x)
        check_some(patches.batch_size)
        positions = patches.map_size[0] * patches.map_size[1]
        images = min(patches.batch_size, max(1, columns // positions))
        found = explicit(patches, self.patch, self._whitening(), images=images)
        z = None
        if labels is not None:
            z = one_hot(labels[:images], self.num_classes, self.label).repeat_interleave(positions, dim=1)
        return float(similarity_objective(found, y[:, : images * positions], z, float(self.alpha)))
