"""The synapses of one layer: feedforward weights W, lateral inhibition M, label weights V, and their plasticity.

An owner holds all rows, or the rows of one shard (`rows`), and changes them by the functions of `simmatch.plasticity`.
Owners exchange a certified bound of λmax(M), which the dynamics need, together with the faults of any owner.
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
    settled_label,
)
from simmatch.precision import eager_full_precision
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault, status_of
from simmatch.sharding.rows import Rows
from simmatch.sharding.sharing import OwnState
from simmatch.solvers.bound import Bound, certify, certify_afresh, fingerprint

PLASTIC = ("feedforward", "lateral", "label", "class_frequency", "silent")
"""Buffers that a step of plasticity changes."""

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
    exchange: connects to the owners of the other channels.
    dtype, device: of all buffers.

    Attributes
    ----------
    feedforward: [K_g, C, k, k], W.
    lateral: [K_g, K], M: symmetric, positive semidefinite, entrywise nonnegative.
    label: [K_g, num_classes], V.
    whitening, whitening_mean: [P, P] and [P], Π and μ, if whitening is configured.
    input_power: tr C_x, the mean squared norm of a patch after normalisation and whitening; 0 before `calibrate`.
    class_frequency: [num_classes], p̂, the running class frequency.
    silent: [K_g], number of consecutive updates in which a channel was silent on every column.
    perron: [K], approximate Perron vector of M; together with M it determines the bound of λmax(M).
    updates: number of updates.
    revived: number of channels that were drawn anew.
    dead_channels: number of channels, of all owners, that were dead at the last update (and revived, if configured).

    >>> arguments = LayerArguments(in_channels=3, out_channels=16, kernel_size=5, num_classes=10)
    >>> synapses = Synapses(arguments, Rows.all(16), IDENTITY, dtype=torch.float32, device="cpu")
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
    revived: Tensor

    def __init__(
        self,
        arguments: LayerArguments,
        rows: Rows,
        exchange: Exchange,
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
        self.rows, self.exchange = rows, exchange
        self._bound: Bound | None = None
        self._bounded: tuple[Tensor, tuple[int, float]] | None = None  # the M of this bound, and its fingerprint
        self.dead_channels = 0
        self._register(dtype, device)

    def _register(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Register the buffers with their initial values."""
        own, size, kernel = self.rows.count, self.patch.patch_size, self.patch.kernel_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("feedforward", zeros(own, self.in_channels, kernel, kernel))
        self.register_buffer("lateral", zeros(own, self.out_channels))
        self.register_buffer("label", zeros(own, self.num_classes))
        if self.whiten:
            self.register_buffer("whitening", zeros(size, size).fill_diagonal_(1.0))
            self.register_buffer("whitening_mean", zeros(size))
        self.register_buffer("input_power", zeros())
        self.register_buffer("class_frequency", zeros(self.num_classes).add_(1.0 / max(self.num_classes, 1)))
        self.register_buffer("silent", zeros(own, dtype=torch.int64))
        self.register_buffer("perron", zeros(self.out_channels).add_(1.0))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("revived", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.lateral.diagonal(offset=self.rows.start).fill_(1.0)
        for channel in range(self.rows.start, self.rows.stop):
            self.feedforward[channel - self.rows.start] = draw_filter(self.seed, channel, 0, self.feedforward)

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

        Raises
        ------
        RuntimeError
            No bound has been certified yet, or the rows of M held here have been written to since.
        """
        if self._bound is None or not self._bound_is_valid():
            raise RuntimeError(STALE_BOUND)
        return self._bound

    def _bound_is_valid(self) -> bool:
        """Whether `lateral` is the tensor that was certified last, and has not been written to since."""
        if self._bounded is None:
            return False
        lateral, written = self._bounded
        return lateral is self.lateral and written == fingerprint(lateral)

    def _keep(self, bound: Bound) -> None:
        """Keep the certified bound of the current `lateral`."""
        self._bound, self._bounded = bound, (self.lateral, fingerprint(self.lateral))

    @eager_full_precision
    def certify(self) -> None:
        """Certify `bound` from the current `lateral` and `perron`; all owners call this together.

        `update` and `recertify` call it, and so does the first method that needs a bound after construction. A single
        owner calls it whenever M has been written to or loaded since. Several owners raise an error instead, until they
        call `certify` or `recertify`: whether another owner has written to its rows is unknown to them.
        """
        self._keep(certify(self.lateral, self.perron, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange))

    @eager_full_precision
    def recertify(self) -> None:
        """Compute the Perron vector of M anew, for the tightest bound, and certify it; all owners call this together.

        Any `perron` gives a valid bound of λmax(M), and the Perron vector of M a tight one. Call this after writing to
        `lateral`.
        """
        afresh = certify_afresh(self.lateral, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange)
        self.perron.copy_(afresh.perron)
        self.certify()

    def _own_state(self, fault: LocalFault) -> OwnState:
        """The state with which the next batch is solved; all owners call this together, as M may have to be certified.

        A bound of an earlier M is never used: a single owner certifies M again; several owners, if one of them has
        written to its rows, raise an error at the next exchange.
        """
        if self._bound is None:
            self.certify()
        elif not self._bound_is_valid():
            if self.exchange.world_size == 1:
                self.certify()
            elif bool(self.lateral.isfinite().all()):  # rows that are not finite are reported by the dynamics
                with fault:
                    raise RuntimeError(STALE_BOUND)
        assert self._bound is not None
        return OwnState(self.weights, self._bound, self.alpha if self.label_gain > 0 else None, fault)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._bounded = None  # of the owners, perhaps only this one loads: it must not start an exchange
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
        self._learn(statistics, self._own_state(LocalFault(self.exchange)))

    def _learn(self, statistics: Statistics | None, state: OwnState) -> None:
        """`update`; without statistics, `state.fault` holds the exception of this owner."""
        after, perron = {name: getattr(self, name) for name in PLASTIC}, state.bound.perron
        with state.fault:
            if statistics is not None:
                check_statistics(statistics, self.weights)
                after = self._learnt(statistics)
        dead = dead_channels(after["silent"], after["lateral"].diagonal(offset=self.rows.start), self.plasticity)
        with timed("bound"):
            bound = certify(
                after["lateral"],
                perron,
                self.rows,
                ridge=self.dynamics.ridge,
                exchange=self.exchange,
                flagged=dead + status_of(after["feedforward"], after["label"]),
                fault=state.fault,
            )
        assert statistics is not None  # else the fault has been raised
        for name, value in after.items():
            getattr(self, name).copy_(value)
        self.perron.copy_(perron)
        self.updates.add_(1)
        self._keep(bound)
        channels = torch.nonzero(bound.flagged).flatten().tolist()
        self.dead_channels = len(channels)
        if channels and self.plasticity.revive:
            self._revive(channels)
        if self.exchange is IDENTITY:  # with an exchange, its provider measures the objective of all owners
            above_one = worse_than_silence(statistics, self.alpha)
            warning = divergence_warning(self.plasticity, int(self.updates), above_one=above_one)
            if warning is not None:
                warnings.warn(warning, stacklevel=5)  # the call of `partial_fit` or `update`

    def _learnt(self, statistics: Statistics) -> dict[str, Tensor]:
        """New values of the buffers in `PLASTIC` after a step; the buffers are not changed."""
        lr = learning_rate(self.plasticity, int(self.updates))
        change = RULES[self.plasticity.rule](self.weights, statistics, self.class_frequency, lr, self.plasticity)
        active = statistics.yy.diagonal(offset=self.rows.start) > 0
        return {
            "feedforward": change.feedforward.add_(self.feedforward),  # in place, as W may be large
            "lateral": change.lateral.add_(self.lateral),
            "label": change.label.add_(self.label),
            "class_frequency": self.class_frequency + class_frequency_change(statistics, self.class_frequency, lr),
            "silent": (self.silent + 1).masked_fill_(active, 0),
        }

    def _revive(self, channels: list[int]) -> None:
        """Reset dead channels: a newly drawn row of W, M_ii = 1, and no other lateral or label weights.

        Every owner has the same list and clears its part of the rows and columns, so that M stays symmetric, positive
        semidefinite and nonnegative.
        """
        for channel in channels:
            self.revived.add_(1)
            self.lateral[:, channel] = 0.0
            row = channel - self.rows.start
            if 0 <= row < self.rows.count:
                self.feedforward[row] = draw_filter(self.seed, channel, int(self.updates), self.feedforward)
                self.lateral[row] = 0.0
                self.lateral[row, channel] = 1.0
                self.label[row] = 0.0
                self.silent[row] = 0
        self.perron.fill_(1.0)
        self.certify()

    @torch.no_grad()
    def settle_label(self, yz: Tensor, zz: Tensor) -> None:
        """Scale V to label-free activity, see `simmatch.plasticity.settled_label`.

        It is called once after learning, on a layer that holds all rows, with sums over label-free activities.

        Parameters
        ----------
        yz, zz: [K, num_classes] and [num_classes, num_classes], as in `Statistics`.
        """
        self.label.copy_(settled_label(self.label, yz, zz))
