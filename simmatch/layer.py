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

import torch
from einops import rearrange
from torch import Tensor

from simmatch.arguments import check_activities, check_images, check_patches, check_positions, check_some
from simmatch.batch import Batch, batch_drive, batch_statistics
from simmatch.config import DynamicsConfig, LayerArguments, LayerConfig, LayerOptions, PlasticityConfig, parse
from simmatch.geometry import PatchConfig, Patches, Whitening, drive, prepare, sample_patches, zca
from simmatch.labels import one_hot
from simmatch.objective import batch_objective
from simmatch.plasticity import Statistics, Weights
from simmatch.precision import eager_full_precision
from simmatch.seeding import seeded
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.rows import Rows
from simmatch.sharding.sharing import ColumnSharing, RowSharing, Sharing
from simmatch.solvers.bound import traced_bound
from simmatch.solvers.dynamics import Solution, unrolled
from simmatch.synapses import Synapses


class SimilarityMatchingConv2d(Synapses):
    """Convolutional nonnegative similarity matching (ConvNSM).

    Parameters
    ----------
    in_channels, out_channels: C and K.
    kernel_size, stride, padding: of the k × k patches.
    num_classes: classes of the label weights V; 0 for none.
    label_gain: variance of a label direction over the mean variance of an input direction, α = label_gain · tr C_x / P,
        so that rescaling the input does not change its meaning.
    dynamics, plasticity: how activities are solved for, and how weights learn.
    normalize: 'none', or 'contrast' for patches of zero mean and unit deviation.
    contrast_floor: least deviation a patch is divided by.
    whiten, whiten_ridge: ZCA whitening of the patches, regularised; see `calibrate`.
    seed: of the initial weights and of every re-drawn row.
    dtype, device: of all buffers.
    rows, exchange: the channels held here and the way to the others. Default: all of them, and no exchange,
        which lets `solver: auto` choose what is fastest here. Given an exchange, be it of a single owner, it chooses by
        configuration alone, so that the number of owners changes nothing.

    Attributes: see `Synapses`.
    """

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
        super().__init__(arguments, rows or Rows.all(out_channels), exchange or IDENTITY, dtype=dtype, device=device)
        self.sharing: Sharing
        if self.dynamics.exchange == "gather_state":
            filters = (in_channels, kernel_size, kernel_size)
            self.sharing = ColumnSharing(self.dynamics, self.rows, self.exchange, filters, num_classes)
        else:
            self.sharing = RowSharing(self.dynamics, self.rows, self.exchange, alone=exchange is None)

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

    # ------------------------------------------------------------------------------------------- input

    @property
    def _whitening(self) -> Whitening | None:
        return Whitening(self.whitening, self.whitening_mean) if self.whiten else None

    @eager_full_precision
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
        return prepare(x, self.patch, self._whitening, positions)

    def explicit_patches(self, matrix: Tensor, *, whitened: bool = True) -> Patches:
        """Normalised patches [B, P], one per image, as `Patches`; `whitened` where Π and μ are applied, if any."""
        return Patches(self.patch, self._whitening, (1, 1), matrix=matrix, whitened=whitened or not self.whiten)

    def _patches(self, x: Tensor | Patches) -> Patches:
        if not isinstance(x, Patches):
            return self.prepare(x)
        check_patches(x, self.patch, self._whitening)
        return x

    @eager_full_precision
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
            whitening = zca(sample, self.whiten_ridge)
            sample = (sample - whitening.mean) @ whitening.matrix.T
            self.whitening.copy_(whitening.matrix)
            self.whitening_mean.copy_(whitening.mean)
        self.input_power.copy_(sample.square().sum(dim=1).mean())

    @property
    def calibrated(self) -> bool:
        return bool(self.input_power > 0)

    # ------------------------------------------------------------------------------------------- fast: dynamics

    def _one_hot(self, labels: Tensor | None, images: int) -> Tensor | None:
        return None if labels is None else one_hot(labels, self.num_classes, self.label, images=images)

    @eager_full_precision
    def drive(self, x: Tensor | Patches, labels: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        """d = W x̃ + α V z of the own channels, or of the rows in `weights`: [K_g, N], columns as in 'b h w'."""
        patches = self._patches(x)
        batch = Batch(patches, self._one_hot(labels, patches.batch_size))
        return batch_drive(batch, weights or self.weights, self.alpha if self.label_gain > 0 else None)

    @eager_full_precision
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
        patches, fault, z = self._patches(x), LocalFault(self.exchange), None
        with fault:
            z = self._one_hot(labels, patches.batch_size)
        solution = self.sharing.solve(Batch(patches, z), self._own_state(fault))
        height, width = patches.map_size
        residual = rearrange(solution.residual, "(b h w) -> b h w", h=height, w=width)
        return Solution(_as_maps(solution.y, patches), solution.num_iters, residual)

    @eager_full_precision
    def forward(self, x: Tensor | Patches) -> Tensor:
        """Label-free activities [B, K, H', W'] after the fixed number of iterations used in evaluation."""
        patches = self._patches(x)
        if torch.compiler.is_exporting():
            bound, ridge = traced_bound(self.lateral, self.perron, ridge=self.dynamics.ridge)
            columns = drive(patches, self.feedforward)
            return _as_maps(unrolled(columns, self.lateral, self.dynamics, bound=bound, ridge=ridge), patches)
        state = self._own_state(LocalFault(self.exchange))
        solution = self.sharing.solve(Batch(patches), state, fixed=True)
        return _as_maps(solution.y, patches)

    # ------------------------------------------------------------------------------------------- slow: plasticity

    @eager_full_precision
    def statistics(self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None) -> Statistics:
        """Sums over the columns of a batch; y [B, K, H', W'] as from `solve`.

        Raises
        ------
        ValueError
            Images, activities or labels that do not fit this layer or each other.
        """
        patches = self._patches(x)
        check_activities(y, (patches.batch_size, self.out_channels, *patches.map_size), self.feedforward)
        batch = Batch(patches, self._one_hot(labels, patches.batch_size))
        return batch_statistics(batch, rearrange(y, "b k h w -> k (b h w)"), self.rows, self.num_classes)

    @eager_full_precision
    @torch.no_grad()
    def partial_fit(self, x: Tensor | Patches, labels: Tensor | None = None) -> Solution:
        """Learn from one batch: solve, statistics, update. Returns the columns' solution, y [K, N], residual [N].

        Where columns are split (`exchange: gather_state`) these are own columns only, N of them the range
        `split_columns(…)[rank]`: learning does not need the others. `simmatch.measurement.measure` looks at all.

        A layer that whitens, or has a label gain, calibrates itself on its first batch if `calibrate` was not called.

        Raises
        ------
        ValueError
            A batch that does not fit (see `solve`), or of size 0. Nothing has changed.
        SharedFault
            On all owners alike: one of them met an exception or a non-finite value. No weights have changed.
        """
        if not isinstance(x, Patches):
            check_images(x, self.in_channels, self.feedforward)
        images, fault, z = x.batch_size if isinstance(x, Patches) else x.shape[0], LocalFault(self.exchange), None
        check_some(images)
        with fault:
            z = self._one_hot(labels, images)
        if not self.calibrated and isinstance(x, Tensor) and (self.whiten or self.label_gain > 0):
            self.calibrate(x)
        state = self._own_state(fault)
        solution, statistics = self.sharing.learn(Batch(self._patches(x), z), state)
        self._learn(statistics, state)
        return solution

    @eager_full_precision
    def objective(self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None, *, columns: int = 4096) -> float:
        """Relative similarity-matching objective on the first images of a batch, about `columns` columns of it.

        y: [K, N], activities of all channels as returned by `partial_fit`.
        """
        patches = self._patches(x)
        check_some(patches.batch_size)
        batch = Batch(patches, self._one_hot(labels, patches.batch_size))
        return batch_objective(batch, y, float(self.alpha), columns=columns)


def _as_maps(columns: Tensor, patches: Patches) -> Tensor:
    height, width = patches.map_size
    return rearrange(columns, "k (b h w) -> b k h w", h=height, w=width)
