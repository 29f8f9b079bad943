"""Changes in the distribution of signals of a stream, found by the detectors of `river`: ADWIN and Page–Hinkley.

Each signal is watched by itself. What a detector sees is a number in [0, 1] with a variance of at most 1/12, whatever
the signal is, so that one setting gives one rate of false alarms:

    error (0 or 1)       e / max(1, √12 s), s the standard deviation of the reference
    any other signal     its rank among the values of the reference, as a share: uniform where nothing changes

Detectors assume independent numbers. Where those of the reference depend on each other, as in records that come in
runs, detectors see means of blocks, whose length is the correlation time τ: such a mean is as certain as one
independent number. With independent values blocks have length one.

The reference is the first values of the signal, and later its last `keep` blocks: the newest are then the reference,
and both detectors start anew from them. So what a detector knows is a function of a bounded list of last values, which
is all that is stored; a monitor that is restored goes on with the same bits.

Sources: Bifet & Gavaldà, "Learning from time-changing data with adaptive windowing" (2007); Page, "Continuous
inspection schemes" (1954); means of blocks: Kim, Alexopoulos, Tsui & Wilson, "A distribution-free tabular CUSUM chart
for autocorrelated data" (2007).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from simmatch.config import Frozen, NonNegativeInt, PositiveFloat, PositiveInt
from simmatch.extras import extra
from simmatch.online.dependence import correlation_time
from simmatch.online.state import State

Values = NDArray[np.float64]

ERROR = "error"
"""Name of the signal that is 1 where an answer was wrong and 0 where it was right."""

RECENT = 50
"""Last blocks whose mean is `Drift.after`."""

INDEPENDENT = 1.5
"""Correlation time below which values count as independent: that of 300 independent ones is estimated with an error of
up to 0.4."""

UNIFORM_DEVIATION = 12**-0.5
"""Standard deviation of a number that is uniform in [0, 1]."""


class DriftConfig(Frozen):
    """How changes are looked for; the defaults are those whose false alarms are measured in the README.

    >>> DriftConfig(detectors=("page_hinkley",)).reference
    300
    """

    detectors: Annotated[tuple[Literal["adwin", "page_hinkley"], ...], Field(strict=False, min_length=1)] = (
        "adwin",
        "page_hinkley",
    )
    """Which detectors watch each signal; the first that finds a change raises the alarm."""

    signals: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (ERROR, "novelty", "objective")
    """Which signals are watched. `residual` and `active` are at hand too, but change as long as the model learns."""

    rising: Annotated[tuple[str, ...], Field(strict=False)] = (ERROR, "novelty", "objective", "residual")
    """Signals of which only a rise is an alarm: they fall where the model learns. Where ADWIN finds that one has
    fallen, it is watched from there. Others are watched in both directions."""

    begin: NonNegativeInt = 3000
    """Records at the very start that are not watched: a model that begins to learn changes all signals."""

    reference: PositiveInt = 300
    """Blocks of a signal from which its reference is taken, at the start and after a drift; no alarm before."""

    keep: PositiveInt = 1000
    """Last blocks of a signal from which reference and detectors are rebuilt, whenever there are twice as many."""

    block: PositiveInt = 50
    """Most values in a block; 1: values are taken for independent."""

    adwin_delta: PositiveFloat = 1e-4
    """δ of ADWIN: bound of the probability of a false alarm at each of its looks."""

    adwin_clock: PositiveInt = 8
    """ADWIN looks at every that many values."""

    tolerance: PositiveFloat = 0.05
    """δ of Page–Hinkley: deviations from the mean, as shares of the reference, that do not count."""

    threshold: PositiveFloat = 11.0
    """λ of Page–Hinkley: the sum of the deviations at which it raises the alarm."""

    @model_validator(mode="after")
    def _kept(self) -> DriftConfig:
        if self.reference > self.keep:
            raise ValueError(f"reference: expected at most keep, {self.keep}, got {self.reference}")
        return self


@dataclass(frozen=True)
class Drift:
    """A change that was found.

    Attributes
    ----------
    signal: which one changed.
    number: of the record at which it was found.
    before, after: means of the signal, in its own unit: `after` of its last 50 blocks, `before` of those before them.
    detector: which one found it.

    >>> Drift("error", number=1200, before=0.02, after=0.4, detector="adwin").number
    1200
    """

    signal: str
    number: int
    before: float
    after: float
    detector: str


class DriftMonitor:
    """Watches signals of a stream, each by itself; after a drift all of them start anew.

    Parameters
    ----------
    config: detectors and their settings.

    Raises
    ------
    ImportError
        `river` is missing.

    >>> generator = torch.Generator().manual_seed(0)
    >>> monitor = DriftMonitor(DriftConfig(begin=0))
    >>> monitor.add({"objective": torch.rand(1000, generator=generator)}, number=0)
    []
    >>> drift = monitor.add({"objective": 0.5 + torch.rand(1000, generator=generator)}, number=1000)[0]
    >>> drift.signal, drift.number < 1100
    ('objective', True)
    """

    def __init__(self, config: DriftConfig) -> None:
        self.config = config
        self._watches: dict[str, _Watch] = {}
        self._records = 0
        with extra("stream"):
            import river.drift  # noqa: F401

    def add(self, values: Mapping[str, Tensor], number: int) -> list[Drift]:
        """Look at the values of a batch of records.

        Parameters
        ----------
        values: name → [n], a signal of each record; NaN for a record without a value. Those that are not among
            `config.signals` are ignored.
            `error` may be longer, with values of earlier records whose labels came late.
        number: of the record that the first values belong to; value i belongs to record number + i.

        Returns
        -------
        The changes that were found, at most one per signal. If there is any, what came before this batch is forgotten.
        """
        drifts: list[Drift] = []
        self._records += min((len(signal) for signal in values.values()), default=0)
        if self._records <= self.config.begin:
            return drifts
        for name in self.config.signals:
            if name not in values:
                continue
            signal = values[name]
            numbers = torch.isfinite(signal).nonzero()[:, 0]
            watch = self._watches.setdefault(name, _Watch(name, self.config))
            found = watch.add(signal[numbers].double().cpu().numpy())
            if found is not None:
                place, before, after, detector = found
                drifts.append(Drift(name, number + int(numbers[place]), before, after, detector))
        if drifts:
            self._watches.clear()
        return drifts

    def state(self) -> State:
        """The values from which `restore` rebuilds all: at most 3 `keep` · `block` numbers per signal.

        >>> monitor = DriftMonitor(DriftConfig(begin=0))
        >>> monitor.add({"novelty": torch.rand(400, generator=torch.Generator().manual_seed(0))}, number=0)
        []
        >>> {name: tensor.numel() for name, tensor in monitor.state().items()}
        {'records': 1, 'novelty.values': 400, 'novelty.block': 1, 'novelty.reference': 300}
        """
        state: State = {"records": torch.tensor(self._records)}
        for name, watch in self._watches.items():
            state[f"{name}.values"] = torch.tensor(watch.values, dtype=torch.float64)
            state[f"{name}.block"] = torch.tensor(watch.block)
            if watch.reference is not None:
                state[f"{name}.reference"] = torch.from_numpy(watch.reference.copy())
        return state

    def restore(self, state: State) -> None:
        """Go on where the monitor was that gave this state, with the same bits.

        >>> monitor, other = DriftMonitor(DriftConfig(begin=0)), DriftMonitor(DriftConfig(begin=0))
        >>> monitor.add({"novelty": torch.rand(400)}, number=0)
        []
        >>> other.restore(monitor.state())
        >>> later = {"novelty": torch.full((100,), 2.0)}
        >>> other.add(later, 400) == monitor.add(later, 400)
        True
        """
        self._watches.clear()
        self._records = int(state["records"])
        for key in state:
            name, _, what = key.rpartition(".")
            if what == "values":
                watch = self._watches[name] = _Watch(name, self.config)
                reference = state.get(f"{name}.reference")
                watch.block = int(state.get(f"{name}.block", torch.tensor(1)))  # earlier versions had none
                watch.rebuild(state[key].numpy(), None if reference is None else reference.numpy())


class _Watch:
    """One signal: its last values, the reference, and the detectors, which are a function of both."""

    def __init__(self, name: str, config: DriftConfig) -> None:
        self.config, self.is_error, self.rising = config, name == ERROR, name in config.rising
        self.values: list[float] = []
        self.block = 1
        self.reference: Values | None = None
        self.detectors: dict[str, Any] = {}
        self._begun: list[float] = []
        """Shares of a block that has not ended."""

    def add(self, values: Values) -> tuple[int, float, float, str] | None:
        """Look at the next values: place of an alarm among them, means before and after, detector; None: no alarm."""
        done = 0
        while done < len(values):
            part = values[done : done + self._room()]
            used, name = self._watched(part)
            self.values.extend(part[:used].tolist())
            done += used
            if name is not None:
                recent = RECENT * self.block
                width = int(self.detectors[name].width) * self.block if name == "adwin" else recent
                if not self.rising or _mean(self.values[-width:]) > _mean(self.values[:-width]):
                    return done - 1, _mean(self.values[:-recent]), _mean(self.values[-recent:]), name
                # earlier ones of the window may be from before the fall
                self.restart(np.asarray(self.values[-min(width, recent) :]))
            elif self._room() == 0:
                self.restart(np.asarray(self.values[-self.config.keep * self.block :]))
        return None

    def _room(self) -> int:
        """Values that fit until the reference is taken."""
        blocks = self.config.reference if self.reference is None else 2 * self.config.keep
        return max(0, blocks * self.block - len(self.values))

    def restart(self, values: Values) -> None:
        """Start anew from these last values, if they are enough for a reference."""
        self.block = 1
        if len(values) >= self.config.reference and self.config.block > 1:
            time = correlation_time(np.asarray(self._shares(values, np.sort(values))))
            self.block = 1 if time < INDEPENDENT else min(self.config.block, ceil(time))
        values = values[-self.config.keep * self.block :]
        enough = len(values) >= self.config.reference * self.block
        self.rebuild(values, np.sort(values) if enough else None)

    def rebuild(self, values: Values, reference: Values | None) -> None:
        """Go on from these last values; what the detectors find in them is no alarm."""
        self.values, self.reference, self.detectors, self._begun = values.tolist(), reference, {}, []
        if reference is not None:
            self.detectors = {name: self._detector(name) for name in self.config.detectors}
            for share in self._shares(values, reference):
                self._update(share)

    def _watched(self, values: Values) -> tuple[int, str | None]:
        """Number of values used, up to the first alarm, and its detector."""
        if self.reference is not None:
            for index, share in enumerate(self._shares(values, self.reference)):
                alarm = self._update(share)
                if alarm is not None:
                    return index + 1, alarm
        return len(values), None

    def _update(self, share: float) -> str | None:
        """Show the detectors the mean of a block where it ends; the first that raises an alarm."""
        self._begun.append(share)
        if len(self._begun) < self.block:
            return None
        mean, self._begun = sum(self._begun) / self.block, []
        for detector in self.detectors.values():
            detector.update(mean)
        return next((name for name, detector in self.detectors.items() if detector.drift_detected), None)

    def _shares(self, values: Values, reference: Values) -> list[float]:
        """What the detectors see: numbers in [0, 1] with a variance of at most 1/12."""
        if self.is_error:
            shares = values * min(1.0, UNIFORM_DEVIATION / max(float(reference.std()), 1e-9))
        else:
            below = np.searchsorted(reference, values, "left") + np.searchsorted(reference, values, "right")
            shares = below / (2.0 * len(reference))
        return list(shares.tolist())

    def _detector(self, name: str) -> Any:
        from river import drift

        config, of_river = self.config, cast(Any, drift)  # parts of river have no types
        if name == "adwin":
            return of_river.ADWIN(delta=config.adwin_delta, clock=config.adwin_clock)
        mode = "up" if self.rising else "both"
        # alpha < 1, river's default, holds the sum at −δ / (1 − α), where δ no longer makes it fall
        return of_river.PageHinkley(delta=config.tolerance, threshold=config.threshold, alpha=1.0, mode=mode)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
