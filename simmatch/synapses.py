"""The synapses of one layer: feedforward weights W, lateral inhibition M and label weights V, and how they learn.

All rows of them, or the rows of one shard (`rows`), the rest being reached through the injected `exchange`. Thin state
around the functions of `simmatch.plasticity`: an owner changes its rows by its statistics; what owners exchange is a
certified bound of λmax(M), which the dynamics need, and with it whether any of them has failed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from simmatch.arguments import check_dtype, check_statistics
from simmatch.config import LayerArguments
from simmatch.geometry import PatchConfig
from simmatch.objective import diverging, worse_than_silence
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
    "lateral: expected the rows that a bound was last certified of, got others or no bound yet; "
    "call certify() or recertify() on all owners after writing to them"
)
"""Message of a bound that is asked for, or needed by several owners, and is not that of M."""


class Synapses(nn.Module):
    """The weights of a layer with the state of their plasticity.

    Parameters
    ----------
    arguments: of the layer.
    rows, exchange: the channels held here and the way to the others.
    dtype, device: of all buffers.

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
    dead_channels: channels of all owners that were dead at the last update (and then revived, if so configured).
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
        self._certified: tuple[Bound, tuple[int, float]] | None = None
        self.dead_channels = 0
        self._register(dtype, device)

    def _register(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """The buffers, as they are before anything is learnt."""
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
        """Own rows of W, M and V; the buffers themselves."""
        return Weights(self.feedforward, self.lateral, self.label)

    @property
    def alpha(self) -> Tensor:
        """α, weight of the label term: label_gain times the mean variance tr C_x / P of a direction of the input."""
        return self.label_gain * self.input_power / self.patch.patch_size

    # ------------------------------------------------------------------------------------------- the bound of λmax(M)

    @property
    def bound(self) -> Bound:
        """The certified bound of λmax(M), equal on all owners: a function of `lateral` and `perron` alone.

        Raises
        ------
        RuntimeError
            None was certified yet, or own rows of M have been written to since.
        """
        if self._certified is None or fingerprint(self.lateral) != self._certified[1]:
            raise RuntimeError(STALE_BOUND)
        return self._certified[0]

    @eager_full_precision
    def certify(self) -> None:
        """Certify `bound` from `lateral` and `perron` as they are; all owners together.

        `update` and `recertify` do so, and the first call that needs a bound after construction or loading. A single
        owner does so whenever M has been written to; several owners refuse to go on until one of both is called.
        """
        bound = certify(self.lateral, self.perron, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange)
        self._certified = bound, fingerprint(self.lateral)

    @eager_full_precision
    def recertify(self) -> None:
        """Find the Perron vector of M anew, for the tightest bound, and certify that; all owners together.

        Any `perron` bounds λmax(M), tightly where it is that of M; worth a call after writing to `lateral`.
        """
        afresh = certify_afresh(self.lateral, self.rows, ridge=self.dynamics.ridge, exchange=self.exchange)
        self.perron.copy_(afresh.perron)
        self.certify()

    def _own_state(self, fault: LocalFault) -> OwnState:
        """What the next batch is solved with; all owners together, for M may have to be certified first.

        A bound that is not that of M is never used: one owner certifies M again; several, one of whom has written to
        its rows, raise at the next exchange.
        """
        alone = self.exchange.world_size == 1
        if self._certified is None or (alone and fingerprint(self.lateral) != self._certified[1]):
            self.certify()
        assert self._certified is not None
        bound, certified = self._certified
        if not alone and fingerprint(self.lateral) != certified and bool(self.lateral.isfinite().all()):
            with fault:  # rows that are not finite are reported by the dynamics
                raise RuntimeError(STALE_BOUND)
        return OwnState(self.weights, bound, self.alpha if self.label_gain > 0 else None, fault)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._certified = None
        super()._load_from_state_dict(*arguments, **options)

    # ------------------------------------------------------------------------------------------- plasticity

    @eager_full_precision
    @torch.no_grad()
    def update(self, statistics: Statistics) -> None:
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
        self._learn(statistics, self._own_state(LocalFault(self.exchange)))

    def _learn(self, statistics: Statistics | None, state: OwnState) -> None:
        """`update` from a state that holds this owner's fault where there are no statistics."""
        after, perron = {name: getattr(self, name) for name in PLASTIC}, state.bound.perron
        with state.fault:
            if statistics is not None:
                check_statistics(statistics, self.weights)
                after = self._learnt(statistics)
        dead = dead_channels(after["silent"], after["lateral"].diagonal(offset=self.rows.start), self.plasticity)
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
        self._certified = bound, fingerprint(self.lateral)
        channels = torch.nonzero(bound.flagged).flatten().tolist()
        self.dead_channels = len(channels)
        if channels and self.plasticity.revive:
            self._revive(channels)
        if self.exchange is IDENTITY:  # given an exchange, who gave it watches the objective of all owners
            above_one = worse_than_silence(statistics, self.alpha)
            complaint = diverging(self.plasticity, int(self.updates), above_one=above_one)
            if complaint is not None:
                warnings.warn(complaint, stacklevel=5)  # the call of `partial_fit` or `update`

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
                self.feedforward[row] = draw_filter(self.seed, channel, int(self.updates), self.feedforward)
                self.lateral[row] = 0.0
                self.lateral[row, channel] = 1.0
                self.label[row] = 0.0
                self.silent[row] = 0
        self.perron.fill_(1.0)
        self.certify()

    @torch.no_grad()
    def settle_label(self, yz: Tensor, zz: Tensor) -> None:
        """Bring V to the length of label-free activity, see `simmatch.plasticity.settled_label`.

        Called once after learning, on a layer that holds all rows, with sums over label-free activities.
        """
        self.label.copy_(settled_label(self.label, yz, zz))
