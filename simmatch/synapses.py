"""The synapses of one layer: feedforward weights W, lateral inhibition M, label weights V, and their plasticity.

An owner holds all rows, or the rows of one shard (`rows`), and changes them by the functions of `simmatch.plasticity`.
Owners exchange a certified bound of λmax(M), which the dynamics need, together with the faults of any owner.

A step is arithmetic on the device, counters and revivals included. The host reads the device in two cases only: faults
are raised, not recorded (`simmatch.sharding.faults`), or it asks (`raise_faults`, `dead_channels`, `Bound.value`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from simmatch.arguments import check_dtype, check_statistics
from simmatch.config import LayerArguments
from simmatch.devices import check_device
from simmatch.geometry import PatchConfig
from simmatch.objective import divergence_warning, worse_than_silence
from simmatch.parts import timed
from simmatch.plasticity import (
    RULES,
    Statistics,
    Weights,
    class_frequency_change,
    dead_channels,
    draw_filter,
    learning_rate,
    revived_filters,
    settled_label,
)
from simmatch.precision import eager_full_precision
from simmatch.sharding.exchange import IDENTITY
from simmatch.sharding.faults import LocalFault, status_of
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.recording import FaultRecord, RecordedFault, put
from simmatch.sharding.rows import Rows
from simmatch.sharding.sharing import OwnState
from simmatch.solvers.bound import WARM, Bound, KeptBound, certify, certify_afresh, warm_up

STALE_BOUND = (
    "lateral: expected the rows for which the bound was last certified, got other rows or no bound yet; "
    "call certify() or recertify() on all owners after writing to them"
)
"""Message of the error for a missing bound, or a bound of an earlier M."""


class Synapses(nn.Module):
    """The weights of a layer and the state of their plasticity; base class of `SimilarityMatchingConv2d`.

    Parameters
    ----------
    arguments: the arguments of the layer.
    rows: the channels held here.
    mesh: connects to the owners of the other channels, and to the replicas.
    dtype, device: of all buffers.

    Attributes
    ----------
    feedforward: [K_g, C, k_h, k_w], W.
    lateral: [K_g, K], M: symmetric, positive semidefinite, entrywise nonnegative.
    label: [K_g, num_classes], V.
    whitening, whitening_mean: [P, P] and [P], Π and μ, if whitening is configured.
    input_power: tr C_x, the mean squared norm of a patch after normalisation and whitening; 0 before `calibrate`.
    class_frequency: [num_classes], p̂, the running class frequency.
    silent: [K_g], number of consecutive updates in which a channel was silent on every column.
    perron: [K], approximate Perron vector of M, see `simmatch.solvers.bound.WARM`; together with M it determines the
        bound of λmax(M).
    updates: number of updates.
    rate_from: number of updates from which on the learning rate falls, see `raise_rate`; not saved with the layer.
    revived: number of channels that were drawn anew.
    dead: number of channels, of all owners, that were dead at the last update (and revived, if configured); not saved.
    above_one: whether the relative objective was above 1 in the last update; not saved.

    >>> arguments = LayerArguments(in_channels=3, out_channels=16, kernel_size=5, num_classes=10)
    >>> synapses = Synapses(arguments, Rows.all(16), Mesh(), dtype=torch.float32, device="cpu")
    >>> synapses.feedforward.shape, synapses.lateral.shape, synapses.label.shape
    (torch.Size([16, 3, 5, 5]), torch.Size([16, 16]), torch.Size([16, 10]))
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
    rate_from: Tensor
    revived: Tensor
    dead: Tensor
    above_one: Tensor

    def __init__(
        self,
        arguments: LayerArguments,
        rows: Rows,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        device = check_device(device)
        self.in_channels, self.out_channels = arguments.in_channels, arguments.out_channels
        self.num_classes, self.label_gain = arguments.num_classes, arguments.label_gain
        self.whiten, self.whiten_ridge, self.seed = arguments.whiten, arguments.whiten_ridge, arguments.seed
        self.dynamics, self.plasticity = arguments.dynamics, arguments.plasticity
        self.patch = PatchConfig(
            arguments.in_channels,
            arguments.kernel_size,
            arguments.stride,
            arguments.padding,
            arguments.normalize == "contrast",
            arguments.contrast_floor,
        )
        self.rows, self.mesh, self.exact = rows, mesh, arguments.reduce == "exact"
        self._kept = KeptBound()
        self._record: FaultRecord | None = None
        self._register(dtype, device)

    def _register(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Register the buffers with their initial values."""
        own, size = self.rows.count, self.patch.patch_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("feedforward", zeros(own, self.in_channels, *self.patch.kernel))
        self.register_buffer("lateral", zeros(own, self.out_channels))
        self.register_buffer("label", zeros(own, self.num_classes))
        if self.whiten:
            self.register_buffer("whitening", zeros(size, size).fill_diagonal_(1.0))
            self.register_buffer("whitening_mean", zeros(size))
        self.register_buffer("input_power", zeros())
        self.register_buffer("class_frequency", zeros(self.num_classes).add_(1.0 / max(self.num_classes, 1)))
        self.register_buffer("silent", zeros(own, dtype=torch.int64))
        self.register_buffer("perron", zeros(self.out_channels).add_(1.0))
        self.register_buffer("updates", zeros(dtype=torch.int64))
        self.register_buffer("rate_from", zeros(dtype=torch.int64), persistent=False)
        self.register_buffer("revived", zeros(dtype=torch.int64))
        self.register_buffer("dead", zeros(dtype=torch.int64), persistent=False)
        self.register_buffer("above_one", zeros(dtype=torch.bool), persistent=False)
        self.lateral.diagonal(offset=self.rows.start).fill_(1.0)
        for channel in range(self.rows.start, self.rows.stop):
            self.feedforward[channel - self.rows.start] = draw_filter(self.seed, channel, 0, self.feedforward)

    @property
    def dead_channels(self) -> int:
        """Number of channels, of all owners, that were dead at the last update (and revived, if configured)."""
        return int(self.dead)

    @property
    def weights(self) -> Weights:
        """The rows of W, M and V held here: the buffers, not copies."""
        return Weights(self.feedforward, self.lateral, self.label)

    @property
    def alpha(self) -> Tensor:
        """α, the weight of the label term: label_gain times tr C_x / P, the mean variance of an input direction."""
        return self.label_gain * self.input_power / self.patch.patch_size

    # ------------------------------------------------------------------------------------------- the bound of λmax(M)

    @property
    def bound(self) -> Bound:
        """The certified bound of λmax(M), equal on all owners; it depends on `lateral` and `perron` only.

        The next update writes the next bound into the same tensors.

        Raises
        ------
        RuntimeError
            No bound has been certified yet, or the rows of M held here have been written to since.
        """
        if self._kept.bound is None or not self._kept.holds_for(self.lateral):
            raise RuntimeError(STALE_BOUND)
        return self._kept.bound

    @eager_full_precision
    def certify(self) -> None:
        """Certify `bound` from the current `lateral` and `perron`; all owners call this together.

        `update` and `recertify` call it, and so does the first method that needs a bound after construction. A single
        owner calls it whenever M has been written to or loaded since. Several owners raise an error instead, until they
        call `certify` or `recertify`: whether another owner has written to its rows is unknown to them.
        """
        flagged = torch.zeros_like(self.silent)
        perron, _ = warm_up(self.lateral, self.perron, self.rows, flagged=flagged, mesh=self.mesh, exact=self.exact)
        ridge = self.dynamics.ridge
        bound = certify(self.lateral, perron, self.rows, ridge=ridge, mesh=self.mesh, exact=self.exact)
        self._kept.keep(bound, self.lateral)

    @eager_full_precision
    def recertify(self) -> None:
        """Compute the Perron vector of M anew, for the tightest bound, and certify it; all owners call this together.

        Any `perron` gives a valid bound of λmax(M), and the Perron vector of M a tight one. Call this after writing to
        `lateral`.
        """
        ridge = self.dynamics.ridge
        afresh = certify_afresh(self.lateral, self.rows, ridge=ridge, mesh=self.mesh, exact=self.exact)
        self.perron.copy_(afresh.perron)
        self.certify()

    def _own_state(self, fault: LocalFault) -> OwnState:
        """The state with which the next batch is solved; all owners call this together, as M may have to be certified.

        A bound of an earlier M is never used: a single owner certifies M again; several owners, if one of them has
        written to its rows, raise an error at the next exchange.
        """
        if self._kept.bound is None:
            self.certify()
        elif not self._kept.holds_for(self.lateral, look=not fault.recorded):
            if self.mesh.columns.world_size == 1:
                self.certify()
            elif bool(self.lateral.isfinite().all()):  # rows that are not finite are reported by the dynamics
                with fault:
                    raise RuntimeError(STALE_BOUND)
        assert self._kept.bound is not None
        return OwnState(self.weights, self._kept.bound, self.alpha if self.label_gain > 0 else None, fault)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._kept.forget()  # of the owners, perhaps only this one loads: it must not start an exchange
        if self._record is not None:
            self._record.clear()  # faults of weights that are no longer here
        super()._load_from_state_dict(*arguments, **options)

    # ------------------------------------------------------------------------------------------- plasticity

    @eager_full_precision
    @torch.no_grad()
    def update(self, statistics: Statistics) -> None:
        """Make one plasticity step on the rows held here, then revive dead channels; all owners call this together.

        If the new weights of some owner are not finite, or the new M has no bound, nothing changes on any owner.

        Parameters
        ----------
        statistics: sums over the batch, for the rows held here.

        Raises
        ------
        ValueError
            The statistics do not match the layer, or are over no columns.
        SharedFault
            On all owners, if one of them has a fault or weights that are not finite.

        Warns
        -----
        UserWarning
            The relative objective is above 1 although the initial weights no longer matter, see
            `simmatch.objective.divergence_warning`.
        """
        self._learn(statistics, self._own_state(self._fault(recorded=False)))

    def _learn(self, statistics: Statistics | None, state: OwnState) -> None:
        """`update`; without statistics, `state.fault` holds the exception of this owner."""
        rows, fault = self.rows, state.fault
        options: dict[str, Any] = {"mesh": self.mesh, "fault": fault, "exact": self.exact}
        after, dead = {"feedforward": self.feedforward, "lateral": self.lateral, "label": self.label}, self.silent < 0
        with fault:
            if statistics is not None:
                check_statistics(statistics, self.weights)
                after = self._learnt(statistics)
                dead = dead_channels(after["silent"], after["lateral"].diagonal(offset=rows.start), self.plasticity)
        flagged = dead + status_of(after["feedforward"], after["label"])
        with timed("bound"):
            perron, dead = warm_up(after["lateral"], state.bound.perron, rows, flagged=flagged, **options)
        after |= {"perron": WARM * perron, "dead": dead.sum()}
        with fault:
            if self.plasticity.revive and statistics is not None and (fault.recorded or bool(after["dead"])):
                after |= self._revived(after, dead)
        with timed("bound"):
            bound = certify(after["lateral"], perron, rows, ridge=self.dynamics.ridge, **options)
        ok = fault.settle()
        for name, value in after.items():
            put(getattr(self, name), value, ok)
        self._kept.keep(bound, self.lateral, ok)
        if self.mesh.columns is IDENTITY and statistics is not None:  # else the mesh's provider measures the objective
            self.above_one.copy_(worse_than_silence(statistics, self.alpha))
            if ok is None:
                self._warn_of_divergence(stacklevel=6)  # the call of `partial_fit` or `update`

    def _learnt(self, statistics: Statistics) -> dict[str, Tensor]:
        """New values of the buffers that a step of plasticity changes; the buffers are not changed."""
        lr = self._rate(statistics)
        change = RULES[self.plasticity.rule](self.weights, statistics, self.class_frequency, lr, self.plasticity)
        active = statistics.yy.diagonal(offset=self.rows.start) > 0
        return {
            "feedforward": change.feedforward.add_(self.feedforward),  # in place, as W may be large
            "lateral": change.lateral.add_(self.lateral),
            "label": change.label.add_(self.label),
            "class_frequency": self.class_frequency + class_frequency_change(statistics, self.class_frequency, lr),
            "silent": (self.silent + 1).masked_fill_(active, 0),
            "updates": self.updates + 1,
        }

    def _rate(self, statistics: Statistics) -> float | Tensor:
        """η of the next update, times the largest weight of an image."""
        return self.learning_rate if statistics.largest is None else statistics.largest * self.learning_rate

    @property
    def learning_rate(self) -> float | Tensor:
        """η of the next update: a number, or, where it falls, 0-d on the device."""
        return learning_rate(self.plasticity, (self.updates - self.rate_from).clamp(min=0))

    def raise_rate(self, hold: int = 0) -> None:
        """Start the learning rate anew: `plasticity.lr` for `hold` updates, then falling as from the first update on.

        >>> arguments = LayerArguments(in_channels=1, out_channels=4, kernel_size=3)
        >>> synapses = Synapses(arguments, Rows.all(4), Mesh(), dtype=torch.float32, device="cpu")
        >>> synapses.raise_rate(hold=10)
        >>> int(synapses.rate_from)
        10
        """
        self.rate_from.copy_(self.updates + hold)

    def _revived(self, after: dict[str, Tensor], dead: Tensor) -> dict[str, Tensor]:
        """Reset dead channels, bool [K]: a newly drawn row of W, M_ii = 1, and no other lateral or label weights.

        Every owner knows all dead channels and clears its part of the rows and columns, so that M stays symmetric,
        positive semidefinite and nonnegative. Without dead channels, nothing changes.
        """
        rows, own = self.rows, dead[self.rows.start : self.rows.stop].unsqueeze(1)
        channels = torch.arange(rows.start, rows.stop, device=dead.device)
        drawn = revived_filters(self.seed, channels, after["updates"], self.feedforward)
        unit = torch.zeros_like(after["lateral"])
        unit.diagonal(offset=rows.start).fill_(1.0)
        return {
            "feedforward": torch.where(own.view(-1, 1, 1, 1), drawn, after["feedforward"]),
            "lateral": torch.where(own | dead, unit, after["lateral"]),
            "label": after["label"].masked_fill(own, 0.0),
            "silent": after["silent"].masked_fill(own.squeeze(1), 0),
            "revived": self.revived + dead.sum(),
        }

    def _learn_label(self, statistics: Statistics | None, state: OwnState) -> None:
        """The step of V and of the class frequency alone; without statistics, `state.fault` holds the exception."""
        ranks, fault = self.mesh.columns, state.fault
        statuses, label, frequency = self.lateral.new_zeros(ranks.world_size), self.label, self.class_frequency
        with fault:
            if statistics is not None:
                check_statistics(statistics, self.weights)
                after = self._learnt(statistics)
                label, frequency = after["label"], after["class_frequency"]
        own = statuses[ranks.rank : ranks.rank + 1]
        own += status_of(label)
        fault.mark(own)
        ranks.all_gather(statuses).wait()
        fault.raise_shared(statuses, "label weights")
        self.label.copy_(label)
        self.class_frequency.copy_(frequency)

    # ------------------------------------------------------------------------------------------- what the host looks at

    def _fault(self, *, recorded: bool) -> LocalFault:
        """Where the faults of one update go."""
        if not recorded:
            if self._record is not None:  # this update must not follow one with a fault
                self._record.raise_first(self.updates)
            return LocalFault(self.mesh.columns)
        if self._record is None or self._record.ok.device != self.lateral.device:
            self._record = FaultRecord(self.lateral.device)
        return RecordedFault(self.mesh.columns, self._record)

    def raise_faults(self) -> None:
        """Raise the fault that an update has recorded, if one has; all owners call this together.

        Since that update nothing has changed on any owner: the weights are those before it. Where no faults have been
        recorded, or others have been loaded since, this does nothing; else the host waits for the device.

        Raises
        ------
        SharedFault
            As `partial_fit` would have raised it, with the number of the update.
        RuntimeError
            M was written to between two updates with `recorded=True`.

        Warns
        -----
        UserWarning
            As `update`, for the last update.
        """
        if self._record is not None:
            self._record.raise_first(self.updates)
            if not self._kept.forgotten and not self._kept.holds_for(self.lateral):
                raise RuntimeError(STALE_BOUND)
            self._warn_of_divergence(stacklevel=3)

    def _warn_of_divergence(self, stacklevel: int) -> None:
        if not bool(self.above_one):
            return
        warning = divergence_warning(self.plasticity, int(self.updates), above_one=True)
        if warning is not None:
            warnings.warn(warning, stacklevel=stacklevel)

    @torch.no_grad()
    def settle_label(self, yz: Tensor, zz: Tensor) -> None:
        """Scale V to label-free activity, see `simmatch.plasticity.settled_label`.

        It is called once after learning, on a layer that holds all rows, with sums over label-free activities.

        Parameters
        ----------
        yz, zz: [K, num_classes] and [num_classes, num_classes], as in `Statistics`.
        """
        self.label.copy_(settled_label(self.label, yz, zz))
