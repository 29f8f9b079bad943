"""The convolutional nonnegative similarity-matching layer (ConvNSM).

    min over Y ≥ 0 of ‖XᵀX + α Zᵀ C_z⁻¹ Z − YᵀY‖²_F

is solved online by neurons with feedforward weights W, lateral inhibition M and label weights V. The dynamics compute
the activities y for the patches of a batch, and plasticity changes the weights by the statistics of the batch. A
synapse uses only the activities of the two neurons that it connects.

A layer holds all rows of W, M and V, or the rows of one shard (`rows`), and reaches the others through a `mesh`, and
its replicas, each of which learns from a part of every batch.
It does not depend on processes.

Source: Bahroun et al., arXiv:2308.02427 (ConvNSM); Pehlevan & Chklovskii (2014, 2019) for the min–max derivation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from simmatch.arguments import (
    check_activities,
    check_classes,
    check_images,
    check_not_empty,
    check_patches,
    check_positions,
    check_weights,
)
from simmatch.batch import Batch, batch_drive, batch_statistics
from simmatch.calibration import PatchSample
from simmatch.config import DynamicsConfig, LayerArguments, LayerConfig, LayerOptions, PlasticityConfig, Reduce, parse
from simmatch.extent import Extent
from simmatch.geometry import PatchConfig, Patches, draw_positions, prepare
from simmatch.labels import check_labels, one_hot
from simmatch.moments import Moments
from simmatch.objective import batch_objective
from simmatch.parts import timed
from simmatch.plasticity import Statistics
from simmatch.precision import eager_full_precision
from simmatch.seeding import folded, seeded, stream
from simmatch.sharding.block_sharing import BlockSharing
from simmatch.sharding.columns import Part
from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import Rows
from simmatch.sharding.sharing import ColumnSharing, RowSharing, Sharing
from simmatch.solvers.bound import traced_bound
from simmatch.solvers.dynamics import Solution, unrolled
from simmatch.synapses import Synapses
from simmatch.whitening import Whitening, zca


class SimilarityMatchingConv2d(Synapses):
    """Convolutional nonnegative similarity matching (ConvNSM).

    Parameters
    ----------
    in_channels: C, the number of channels of the images.
    out_channels: K, the number of channels of the activities.
    kernel_size, stride, padding: k × k patches, taken every `stride` pixels from images padded with zeros; or (height,
        width) of each.
    num_classes: number of classes of the labels; 0 for a layer without label weights.
    label_gain: variance of a label direction relative to the mean variance of an input direction. It sets
        α = label_gain · tr C_x / P, so that its meaning does not change if the input is rescaled.
    dynamics: how activities are solved for.
    plasticity: how weights learn.
    normalize: 'none', or 'contrast' for patches of zero mean and unit standard deviation.
    contrast_floor: smallest standard deviation to divide by, in units of the input.
    whiten: whether patches are ZCA-whitened; see `calibrate`.
    whiten_ridge: regularisation of the whitening, relative to the mean eigenvalue of the covariance of the patches.
    seed: of the initial weights and of every row that is drawn anew.
    dtype: float32 or float64, of all weights.
    device: of all weights.
    rows: the channels held here. None: all of them.
    mesh: connects to the owners of the other channels, and to the replicas. None: there are no others, and `solver:
        auto` selects the fastest solver for the device. With a mesh, even of a single rank, the selection depends on
        the configuration only, so that the number of ranks does not change the result.

    reduce: `exact` for weights that are the same, bit by bit, for any number of ranks; see `simmatch.sharding.blocks`.
        It needs `exchange: gather_state`.

    Raises
    ------
    ConfigError
        An argument is invalid; the message names it.

    Attributes: see `Synapses`.

    >>> layer = SimilarityMatchingConv2d(in_channels=3, out_channels=16, kernel_size=5, padding=2)
    >>> x = torch.rand(10, 3, 32, 32)
    >>> solution = layer.partial_fit(x)  # solve, statistics, update
    >>> solution.y.shape, solution.residual.shape
    (torch.Size([16, 10240]), torch.Size([10240]))
    >>> layer(x).shape
    torch.Size([10, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extent,
        *,
        stride: Extent = 1,
        padding: Extent = 0,
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
        mesh: Mesh | None = None,
        reduce: Reduce = "fast",
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
                "reduce": reduce,
            },
        )
        super().__init__(arguments, rows or Rows.all(out_channels), mesh or Mesh(), dtype=dtype, device=device)
        self._alone = mesh is None
        self.sharing = self._new_sharing()

    def _new_sharing(self) -> Sharing:
        if self.dynamics.exchange == "gather_state":
            filters = (self.in_channels, *self.patch.kernel)
            by_columns = BlockSharing if self.exact else ColumnSharing
            return by_columns(self.dynamics, self.rows, self.mesh, filters, self.num_classes)
        return RowSharing(self.dynamics, self.rows, self.mesh, alone=self._alone)

    @classmethod
    def from_config(
        cls,
        config: LayerConfig,
        in_channels: int,
        map_size: tuple[int, int],
        *,
        num_classes: int = 0,
        **others: Any,
    ) -> SimilarityMatchingConv2d:
        """Build the layer that a configuration describes, for inputs [B, in_channels, *map_size].

        Parameters
        ----------
        config: the layer.
        in_channels: C, the number of channels of the input.
        map_size: height and width of the input.
        num_classes: number of classes of the data; a layer that is not `supervised` has no label weights.
        others: `seed`, `dtype`, `device`, `rows`, `mesh` and `reduce`, as for the constructor.

        Raises
        ------
        ValueError
            The kernel does not fit the input.

        >>> config = LayerConfig(out_channels=16, kernel_size="full", supervised=True)
        >>> layer = SimilarityMatchingConv2d.from_config(config, in_channels=8, map_size=(7, 7), num_classes=10)
        >>> layer.feedforward.shape, layer.label.shape
        (torch.Size([16, 8, 7, 7]), torch.Size([16, 10]))
        """
        options = {name: getattr(config, name) for name in LayerOptions.model_fields}
        options["kernel_size"] = PatchConfig.of_layer(config, in_channels, map_size).kernel_size
        return cls(in_channels, num_classes=num_classes if config.supervised else 0, **options, **others)

    # ------------------------------------------------------------------------------------------- input

    def as_images(self, x: Tensor) -> Tensor:
        """The layer's input, or activities, as maps [B, C, H, W]: as they are. A 1-D layer takes signals."""
        return x

    def of_maps(self, maps: Tensor) -> Tensor:
        """Maps [B, K, H', W'] as the layer returns them: as they are. A 1-D layer returns signals."""
        return maps

    def _as_maps(self, columns: Tensor, patches: Patches) -> Tensor:
        height, width = patches.map_size
        return self.of_maps(rearrange(columns, "k (b h w) -> b k h w", h=height, w=width))

    @property
    def _whitening(self) -> Whitening | None:
        return Whitening(self.whitening, self.whitening_mean) if self.whiten else None

    @eager_full_precision
    def prepare(self, x: Tensor, positions: Tensor | int | None = None, *, part: Part | None = None) -> Patches:
        """Prepare images as `Patches`, which all other methods accept in place of images.

        Parameters
        ----------
        x: [B, C, H, W]. With `part`, only its images.
        positions: [B, n], integers h · W' + w: the positions of each image to use; activities are then maps of 1 × n.
            A number: that many of each image, drawn anew for every update of the layer. None: all.
        part: this rank's part of a batch, `layer.sharing.part(B, n)`: all that `partial_fit` needs here. None: x is a
            batch.

        Raises
        ------
        ValueError
            Images or positions have the wrong shape, dtype or device, the map has fewer positions, or images require a
            gradient.

        >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
        >>> patches = layer.prepare(torch.rand(2, 1, 8, 8), positions=torch.tensor([[0, 7, 9], [3, 4, 35]]))
        >>> layer.solve(patches).y.shape, layer.prepare(torch.rand(2, 1, 8, 8), positions=5).map_size
        (torch.Size([2, 4, 1, 3]), (1, 5))
        """
        x = self.as_images(x)
        check_images(x, self.in_channels, self.feedforward)
        if isinstance(positions, int):
            positions = self.draw_positions(positions, x, first=0 if part is None else part.images.start)
        elif positions is not None:
            check_positions(positions, x.shape[0], self.patch.map_size((x.shape[2], x.shape[3])))
        whole = x.shape[0] if part is None else part.whole
        size = x.shape[2], x.shape[3]
        columns = math.prod(self.patch.map_size(size)) if positions is None else positions.shape[1]
        block = self.sharing.block(whole, columns)
        return replace(prepare(x, self.patch, self._whitening, positions, block=block), part=part)

    def draw_positions(self, count: int, x: Tensor, *, first: int = 0) -> Tensor:
        """The positions [B, count] that `prepare` draws: a function of the layer's seed and number of updates, for the
        images of a batch from number `first` on.

        >>> SimilarityMatchingConv2d(1, 4, kernel_size=3).draw_positions(5, torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 5])
        """
        x = self.as_images(x)
        map_size = self.patch.map_size((x.shape[2], x.shape[3]))
        key = folded(stream("positions", self.seed), self.updates)
        return draw_positions(count, range(first, first + x.shape[0]), map_size, key, x.device)

    def explicit_patches(self, matrix: Tensor, *, whitened: bool = True) -> Patches:
        """Normalised patches [B, P], one per image, as `Patches`; `whitened` if Π and μ have been applied.

        >>> SimilarityMatchingConv2d(1, 4, kernel_size=3).explicit_patches(torch.rand(5, 9)).batch_size
        5
        """
        return Patches(self.patch, self._whitening, (1, 1), matrix=matrix, whitened=whitened or not self.whiten)

    def _batch(
        self,
        x: Tensor | Patches,
        labels: Tensor | None = None,
        fault: LocalFault | None = None,
        *,
        weights: Tensor | None = None,
        in_part: bool = False,
    ) -> Batch:
        """The checked patches, one-hot labels and weights of a batch. `fault` holds what is wrong with them.

        With `in_part`, the patches may be those of a part of the batch.

        Images that do not match the layer raise an error at once: how many columns they have is unknown.
        """
        patches, z = x if isinstance(x, Patches) else self.prepare(x), None
        batch = Batch(patches)
        with fault or LocalFault(IDENTITY):
            check_patches(patches, self.patch, self._whitening)
            if not in_part and patches.batch_size != batch.images:
                raise ValueError(f"patches: expected those of {batch.images} images, got {patches.batch_size}")
            if labels is not None:
                if fault is None or not fault.recorded:
                    check_labels(labels, self.num_classes, batch.images)
                z = one_hot(labels, self.num_classes, self.label)
            if weights is not None:
                if fault is None or not fault.recorded:
                    check_weights(weights, batch.images)
                weights = weights.to(self.lateral)
        return replace(batch, z=z, weights=weights)

    @eager_full_precision
    def calibrate(self, x: Tensor, num_patches: int = 200_000) -> None:
        """Measure statistics of the input, once before learning: tr C_x, and Π and μ if whitening is configured.

        Parameters
        ----------
        x: [B, C, H, W], a sample of the input.
        num_patches: number of patches to use, at random positions.

        Raises
        ------
        ValueError
            There are no images or patches, they have the wrong shape or dtype, or values are not finite.

        >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3, whiten=True)
        >>> layer.calibrate(torch.rand(100, 1, 8, 8))
        >>> layer.calibrated, layer.whitening.shape
        (True, torch.Size([9, 9]))
        """
        x = self.as_images(x)
        check_images(x, self.in_channels, self.feedforward)
        check_not_empty(x.shape[0])
        if num_patches < 1:
            raise ValueError(f"num_patches: expected at least 1, got {num_patches}")
        sample = self.patch_sample(len(x), (x.shape[2], x.shape[3]), num_patches)
        moments = sample.moments(x.device)
        for rows in sample.rows(x):
            moments.add(rows)
        self.set_input(moments)

    def patch_sample(self, images: int, size: tuple[int, int], num_patches: int) -> PatchSample:
        """The patches that `calibrate` measures in `images` images [H, W] of this size.

        >>> layer, x = SimilarityMatchingConv2d(1, 4, kernel_size=3, whiten=True), torch.rand(10, 1, 8, 8)
        >>> [rows.shape for rows in layer.patch_sample(10, (8, 8), 50).rows(x)]
        [torch.Size([50, 9])]
        """
        generator = seeded("calibrate", self.seed)
        return PatchSample(self.patch, self.whiten, images=images, size=size, count=num_patches, generator=generator)

    def set_input(self, moments: Moments) -> None:
        """Set what `calibrate` sets, from the moments of the rows of a `patch_sample`.

        >>> layer, x = SimilarityMatchingConv2d(1, 4, kernel_size=3), torch.ones(10, 1, 8, 8)
        >>> sample = layer.patch_sample(10, (8, 8), 50)
        >>> layer.set_input(Moments.of(torch.cat(list(sample.rows(x)))))
        >>> float(layer.input_power)
        9.0
        """
        if not self.whiten:
            self.input_power.copy_(moments.mean[0])
            return
        whitening, power = zca(moments, self.whiten_ridge, self.feedforward.dtype)
        self.whitening.copy_(whitening.matrix)
        self.whitening_mean.copy_(whitening.mean)
        self.input_power.fill_(power)

    @property
    def calibrated(self) -> bool:
        return bool(self.input_power > 0)

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel solves the dynamics of an update, all channels on this device, so that it needs no host."""
        return self.sharing.by_kernel(self.lateral)

    # ------------------------------------------------------------------------------------------- fast: dynamics

    @eager_full_precision
    def drive(self, x: Tensor | Patches, labels: Tensor | None = None) -> Tensor:
        """d = W x̃ + α V z for the channels held here: [K_g, N], in the order 'b h w'.

        >>> SimilarityMatchingConv2d(1, 4, kernel_size=3).drive(torch.rand(2, 1, 8, 8)).shape
        torch.Size([4, 72])
        """
        return batch_drive(self._batch(x, labels), self.weights, self.alpha if self.label_gain > 0 else None)

    @eager_full_precision
    def solve(self, x: Tensor | Patches, labels: Tensor | None = None) -> Solution:
        """Solve for the activities of all channels, to the configured tolerance.

        Parameters
        ----------
        x: [B, C, H, W], or `Patches`.
        labels: [B], classes that drive the activities, `UNLABELLED` where unknown. None: no labels.

        Returns
        -------
        `Solution`: y [B, K, H', W'], num_iters, residual [B, H', W'].

        Raises
        ------
        ValueError
            Images have the wrong shape, dtype or device, or require a gradient; or labels are not one class per image.
        SharedFault
            On all owners, if one of them has an exception or values that are not finite.

        >>> solution = SimilarityMatchingConv2d(1, 4, kernel_size=3).solve(torch.rand(2, 1, 8, 8))
        >>> solution.y.shape, solution.residual.shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 6, 6]))
        """
        fault = LocalFault(self.sharing.solves)
        batch = self._batch(x, labels, fault)
        solution = self.sharing.solve(batch, self._own_state(fault))
        height, width = batch.patches.map_size
        residual = rearrange(solution.residual, "(b h w) -> b 1 h w", h=height, w=width)
        return Solution(self._as_maps(solution.y, batch.patches), solution.iterations, self.of_maps(residual)[:, 0])

    @eager_full_precision
    def forward(self, x: Tensor | Patches) -> Tensor:
        """Label-free activities [B, K, H', W'] after the fixed number of iterations used in evaluation.

        >>> SimilarityMatchingConv2d(1, 4, kernel_size=3)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
        """
        fault = LocalFault(self.sharing.solves)
        batch = self._batch(x, fault=fault)
        if torch.compiler.is_exporting():
            bound, ridge = traced_bound(self.lateral, self.perron, ridge=self.dynamics.ridge)
            drive = batch_drive(batch, self.weights)
            return self._as_maps(unrolled(drive, self.lateral, self.dynamics, bound=bound, ridge=ridge), batch.patches)
        return self._as_maps(self.sharing.solve(batch, self._own_state(fault), fixed=True).y, batch.patches)

    # ------------------------------------------------------------------------------------------- slow: plasticity

    @eager_full_precision
    def statistics(
        self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Statistics:
        """Sums over the columns of a batch, from which `update` learns.

        Parameters
        ----------
        x: [B, C, H, W], or `Patches`.
        y: [B, K, H', W'], from `solve`.
        labels: [B], as for `solve`.
        weights: [B], as for `partial_fit`.

        Raises
        ------
        ValueError
            Images, activities, labels or weights do not match this layer or each other.

        >>> layer, x = SimilarityMatchingConv2d(1, 4, kernel_size=3), torch.rand(2, 1, 8, 8)
        >>> statistics = layer.statistics(x, layer.solve(x).y)
        >>> statistics.yx.shape, statistics.yy.shape, statistics.count
        (torch.Size([4, 1, 3, 3]), torch.Size([4, 4]), 72)
        >>> layer.update(statistics)
        """
        batch, y = self._batch(x, labels, weights=weights), self.as_images(y)
        shape = (batch.patches.batch_size, self.out_channels, *batch.patches.map_size)
        check_activities(y, shape, self.feedforward)
        return batch_statistics(batch, rearrange(y, "b k h w -> k (b h w)"), self.rows, self.num_classes)

    @eager_full_precision
    @torch.no_grad()
    def partial_fit(
        self,
        x: Tensor | Patches,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        solution: Solution | None = None,
        recorded: bool = False,
    ) -> Solution:
        """Learn from one batch: `solve`, `statistics` and `update` in one call.

        A layer with whitening or a label gain calibrates itself on its first batch if `calibrate` was not called.

        Parameters
        ----------
        x: [B, C, H, W], or `Patches`, of the whole batch or of this rank's part of it (`prepare`).
        labels: [B], as for `solve`, of the whole batch.
        weights: [B], 0 ≤ w ≤ 1, of the whole batch, one of them above 0: an image counts w times in the means, and the
            rate is multiplied by the largest. None: 1 of each, with the same bits.
        solution: of the whole batch, as `solve` has returned it for the present weights, where no labels drive it: the
            batch is not solved again. The update has the same bits if `learns_from_solutions`.
        recorded: whether faults are recorded on the device and raised by `raise_faults`, so that the host need not wait
            for the device. An update with a fault, and all later ones, then change nothing. Labels and weights must
            be valid, as they are not checked. Dynamics that no kernel solves need the host, and may raise faults at
            once.

        Returns
        -------
        `Solution`: y [K, N], num_iters, residual [N]. Where columns are split (`exchange: gather_state`, replicas),
        only those of this rank's part, `layer.sharing.part(B, N / B)`; `simmatch.measurement.measure` includes all.

        Raises
        ------
        ValueError
            The batch is empty or does not match the layer, see `solve`. Nothing has changed.
        SharedFault
            On all owners, if one of them has an exception or values that are not finite. No weights have changed.

        >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
        >>> layer.partial_fit(torch.rand(2, 1, 8, 8)).y.shape, int(layer.updates)
        (torch.Size([4, 72]), 1)
        """
        fault = self._fault(recorded=recorded)
        batch = self._batch(x, labels, fault, weights=weights, in_part=True)
        check_not_empty(batch.images)
        if (self.whiten or self.label_gain > 0) and isinstance(x, Tensor) and not self.calibrated:
            self.calibrate(x)
            batch = replace(batch, patches=self.prepare(x))  # the patches of a dense layer are whitened already
        state = self._own_state(fault)
        solution, statistics = self.sharing.learn(batch, state, self._as_columns(solution))
        with timed("plasticity"):
            self._learn(statistics, state)
        return solution

    @property
    def learns_from_solutions(self) -> bool:
        """Whether `partial_fit` gives the same bits with the `solution` of `solve`: not where replicas split images."""
        return not isinstance(self.sharing, RowSharing) or self.mesh.replicas.world_size == 1

    def _as_columns(self, solution: Solution | None) -> Solution | None:
        """The solution of `solve` with y [K, N] and residual [N]."""
        if solution is None:
            return None
        y = rearrange(self.as_images(solution.y), "b k h w -> k (b h w)")
        return Solution(y, solution.iterations, solution.residual.flatten())

    @eager_full_precision
    @torch.no_grad()
    def learn_labels(self, x: Tensor | Patches, labels: Tensor) -> None:
        """Learn V and the class frequency from labels that arrive late; W and M have learnt from the images already.

        Parameters
        ----------
        x: [B, C, H, W], or `Patches`.
        labels: [B], as for `solve`.

        Raises
        ------
        ValueError, SharedFault
            As for `partial_fit`.

        >>> layer, x = SimilarityMatchingConv2d(1, 4, kernel_size=3, num_classes=2), torch.rand(2, 1, 8, 8)
        >>> layer.learn_labels(x, torch.tensor([0, 1]))
        >>> bool((layer.label != 0).any()), int(layer.updates)
        (True, 0)
        """
        fault = self._fault(recorded=False)
        batch = self._batch(x, labels, fault, in_part=True)
        check_not_empty(batch.images)
        state = self._own_state(fault)
        self._learn_label(self.sharing.learn(batch, state)[1], state)

    def grow(self, num_classes: int) -> None:
        """Add classes: their columns of V are zero, and each is expected as often as the average class so far.

        Raises
        ------
        ValueError
            There are more classes already.

        >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3, num_classes=2)
        >>> layer.grow(3)
        >>> layer.label.shape, layer.class_frequency
        (torch.Size([4, 3]), tensor([0.3333, 0.3333, 0.3333]))
        """
        before = self.num_classes
        check_classes(num_classes, before)
        label = self.label.new_zeros(len(self.label), num_classes)
        label[:, :before] = self.label
        frequency = self.class_frequency.new_full((num_classes,), 1.0 / max(num_classes, 1))
        frequency[:before] = self.class_frequency * (before / max(num_classes, 1))
        self.label, self.class_frequency, self.num_classes = label, frequency, num_classes
        self.sharing = self._new_sharing()

    @eager_full_precision
    def objective(self, x: Tensor | Patches, y: Tensor, labels: Tensor | None = None, *, columns: int = 4096) -> float:
        """Relative similarity-matching objective on the first images of a batch, about `columns` columns.

        Parameters
        ----------
        x: [B, C, H, W], or `Patches`.
        y: [K, N], activities of all channels, as returned by `partial_fit`.
        labels: [B], as for `solve`.
        columns: approximate number of columns; at least one image is used.

        >>> layer, x = SimilarityMatchingConv2d(1, 4, kernel_size=3), torch.rand(2, 1, 8, 8)
        >>> layer.objective(x, torch.zeros(4, 72))
        1.0
        """
        batch = self._batch(x, labels)
        check_not_empty(batch.patches.batch_size)
        return batch_objective(batch, y, float(self.alpha), columns=columns)
