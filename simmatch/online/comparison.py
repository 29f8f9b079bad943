"""Champion and challengers: who answers is changed only on evidence that may be looked at after every record.

Of each record with a label, d ∈ {−1, 0, 1} is the difference of a challenger's 0/1 correctness and the champion's. Who
holds that d is more than m on average, and bets a fraction λ > 0 of a capital of 1 on it, has after t records

    K_t(m, λ) = Π (1 + λ (dᵢ − m)) = (1 + λ(1 − m))^p (1 − λ m)^z (1 − λ(1 + m))^n

with p, z and n the numbers of differences 1, 0 and −1. Fractions λ = 2⁻¹ … 2⁻⁸ share the capital equally:
K_t(m) = ⅛ Σ K_t(m, λ). The limits of the mean difference at error ε are where K_t(m) = 1/ε, on either side.

*Valid at all times, under drift.* Let μᵢ be the mean of dᵢ given what was before, and μ̄_t that of μ₁ … μ_t, which may
change as they like. As 1 + x ≤ eˣ,

    K_t(m, λ) = Π (1 + λ(dᵢ − m)) / (1 + λ(μᵢ − m)) · Π (1 + λ(μᵢ − m)) ≤ [a martingale with mean 1] · e^(λ t (μ̄_t − m))

so with m ≥ μ̄_t the capital is at most a mean of martingales, and passes 1/ε at any time with probability at most ε
(Ville's inequality). Each limit therefore holds at all times together with probability 1 − ε.

*Split.* The comparison begins anew with every switch, and every `horizon` records. Number k has the error
α_k = α · 6 / (π² k²), which add up to α, and each challenger an equal share of it. So, for as long as a stream lasts, a
challenger that was not better on average since its comparison began becomes champion with probability at most α.

Source: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (2024), the capital process of
section 4; mixtures of fixed bets as in Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences" (2021); means that change as in Choe & Ramdas, "Comparing sequential forecasters" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from simmatch.config import Frozen, NonNegativeInt, PositiveInt
from simmatch.online.state import State

FRACTIONS = tuple(2.0**-power for power in range(1, 9))
"""λ. At most ½, so that no capital is ever negative, for any m in [−1, 1]."""

HALVINGS = 50
"""Steps of the search for a limit."""


class ComparisonConfig(Frozen):
    """When a challenger becomes the champion.

    >>> ComparisonConfig(alpha=0.01).min_records
    100
    """

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """α, the probability of a false switch over the life of a stream."""

    min_records: NonNegativeInt = 100
    """Labelled records of a comparison before a switch."""

    margin: float = Field(default=0.0, ge=0, lt=1)
    """Difference of accuracies that a challenger must exceed."""

    horizon: PositiveInt | None = 20_000
    """Labelled records after which a comparison begins anew, so that those of long ago do not outweigh a change. None:
    it begins anew at a switch only."""


@dataclass(frozen=True)
class Switch:
    """A challenger has become the champion.

    Attributes
    ----------
    before, after: names of the champions.
    interval: limits of the mean difference of accuracies, `after` minus `before`, over these records. Each holds at
        all times with probability 1 − error.
    records: labelled records of this comparison.
    error: ε, what this comparison may spend on this challenger.

    >>> Switch("a", "b", (0.01, 0.09), records=800, error=0.03).after
    'b'
    """

    before: str
    after: str
    interval: tuple[float, float]
    records: int
    error: float


class Comparison:
    """Who answers: a function of the correctness of all candidates, record after record.

    Parameters
    ----------
    names: of the candidates.
    champion: who answers first.
    config: when that changes.

    Attributes
    ----------
    champion: who answers now.
    records: labelled records of the present comparison.

    >>> comparison = Comparison(["a", "b"], "a", ComparisonConfig())
    >>> right = {"a": torch.tensor([1, 0, 0, 1]).repeat(50), "b": torch.ones(200)}
    >>> switch = comparison.add(right)
    >>> switch.after, comparison.champion, switch.interval[0] > 0.2
    ('b', 'b', True)
    """

    def __init__(self, names: Sequence[str], champion: str, config: ComparisonConfig) -> None:
        if champion not in names or len(set(names)) < len(names):
            raise ValueError(f"champion: expected one of {', '.join(names)}, all different, got {champion!r}")
        self.config = config
        self.names = tuple(names)
        self.champion = champion
        self._number = 0
        self._begin()

    def _begin(self) -> None:
        self._number += 1
        self.records = 0
        self._counts = dict.fromkeys(self.names, (0, 0))  # differences 1 and −1

    @property
    def error(self) -> float:
        """ε of each limit of each challenger in the present comparison."""
        challengers = max(1, len(self.names) - 1)
        return self.config.alpha * 6 / (math.pi * self._number) ** 2 / challengers

    def add(self, right: Mapping[str, Tensor]) -> Switch | None:
        """Count labelled records [n] that each candidate has got right (1) or wrong (0).

        Returns
        -------
        The switch if there is one: then the next records are compared with the new champion.

        Raises
        ------
        ValueError
            A candidate is missing, or their numbers of records differ.
        """
        if set(right) != set(self.names) or len({len(values) for values in right.values()}) > 1:
            given = ", ".join(f"{name} {list(values.shape)}" for name, values in right.items())
            raise ValueError(f"right: expected as many records of each of {', '.join(self.names)}, got {given}")
        champion = right[self.champion].bool()
        for name, (more, less) in self._counts.items():
            own = right[name].bool()
            self._counts[name] = more + int((own & ~champion).sum()), less + int((champion & ~own).sum())
        self.records += len(champion)
        switch = self._switch()
        if switch is not None:
            self.champion = switch.after
        if switch is not None or (self.config.horizon is not None and self.records >= self.config.horizon):
            self._begin()
        return switch

    def _switch(self) -> Switch | None:
        if self.records < self.config.min_records:
            return None
        enough, capital, best = -math.log(self.error), -math.inf, None
        for name in self.challengers:
            more, less = self._counts[name]
            own = log_capital(self.config.margin, more, self.records - more - less, less)
            if own >= enough and own > capital:
                capital, best = own, name
        if best is None:
            return None
        return Switch(self.champion, best, self.interval(best), self.records, self.error)

    @property
    def challengers(self) -> tuple[str, ...]:
        """All candidates but the champion."""
        return tuple(name for name in self.names if name != self.champion)

    def interval(self, name: str) -> tuple[float, float]:
        """Limits of the mean difference of accuracies since the comparison began, challenger's minus champion's."""
        more, less = self._counts[name]
        same = self.records - more - less
        return lower_limit(more, same, less, self.error), -lower_limit(less, same, more, self.error)

    def difference(self, name: str) -> float:
        """Mean difference of accuracies, a challenger's minus the champion's, since the comparison began."""
        more, less = self._counts[name]
        return (more - less) / max(self.records, 1)

    def state(self) -> State:
        """Everything that changes, in int64: a few numbers for each candidate."""
        return {
            "champion": torch.tensor(self.names.index(self.champion)),
            "number": torch.tensor(self._number),
            "records": torch.tensor(self.records),
            "counts": torch.tensor([self._counts[name] for name in self.names]),
        }

    def restore(self, state: State) -> None:
        """Set what `state` gave."""
        self.champion = self.names[int(state["champion"])]
        self._number, self.records = int(state["number"]), int(state["records"])
        pairs = ((int(more), int(less)) for more, less in state["counts"])
        self._counts = dict(zip(self.names, pairs, strict=True))


def log_capital(mean: float, more: int, same: int, less: int) -> float:
    """log K_t(m), a decreasing function of m.

    Parameters
    ----------
    mean: m, in [−1, 1].
    more, same, less: p, z and n, the numbers of differences 1, 0 and −1.

    >>> log_capital(0.0, more=0, same=10, less=0), log_capital(0.0, more=100, same=0, less=0) > 35
    (0.0, True)
    """
    logs = [
        _power(more, 1 + bet * (1 - mean)) + _power(same, 1 - bet * mean) + _power(less, 1 - bet * (1 + mean))
        for bet in FRACTIONS
    ]
    top = max(logs)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(each - top) for each in logs) / len(logs))


def _power(count: int, base: float) -> float:
    """count · log(base), 0 if the count is 0."""
    return 0.0 if count == 0 else -math.inf if base <= 0 else count * math.log(base)


def lower_limit(more: int, same: int, less: int, error: float) -> float:
    """The smallest m that is not ruled out: K_t(m) < 1 / error above it.

    >>> round(lower_limit(more=60, same=900, less=40, error=0.05), 3), lower_limit(0, 0, 0, error=0.05)
    (-0.011, -1.0)
    """
    enough = -math.log(error)
    low, high = -1.0, 1.0
    if log_capital(low, more, same, less) < enough:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if log_capital(middle, more, same, less) >= enough:
            low = middle
        else:
            high = middle
    return low
