"""Wall-clock time of several candidates side by side.

A machine's speed drifts while it is measured (other work, temperature, frequency), so candidates take turns,
A B C A B C …, and a ratio is formed within each round, between neighbours in time. What is quoted is the median of
those ratios, with the least and the greatest beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

MIN_ROUNDS = 5
"""A median of fewer rounds follows a single disturbance."""


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of one figure per round."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def fields(self, name: str) -> dict[str, float]:
        """For a row: `name`, `name_min` and `name_max`.

        >>> Spread.of([1.0, 3.0, 2.0]).fields("speedup")
        {'speedup': 2.0, 'speedup_min': 1.0, 'speedup_max': 3.0}
        """
        return {name: self.median, f"{name}_min": self.min, f"{name}_max": self.max}


@dataclass(frozen=True)
class Timings:
    """Seconds per call of every candidate, one value per round."""

    seconds: dict[str, list[float]]

    def spread(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def rate(self, name: str, amount: float) -> Spread:
        """`amount` per second, if one call does so much of it."""
        return Spread.of([amount / taken for taken in self.seconds[name]])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`: seconds of `over` / seconds of `name` of the same round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return Spread.of([other / own for other, own in pairs])


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = MIN_ROUNDS,
    *,
    min_s: float = 0.0,
    warm_up: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> Timings:
    """Time the candidates in turns, after one warm-up round that is not counted.

    Parameters
    ----------
    candidates: name → what to time.
    rounds: at least `MIN_ROUNDS`.
    min_s: a short candidate is called so many times per round that they last at least so long together, by what its
        last warm-up call took; its seconds are per call.
    warm_up: what to call in the warm-up instead, where the candidates change what they work on.
    clock: seconds since whenever.
    after_round: called after the warm-up and after every round, outside of the timed parts.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: expected at least {MIN_ROUNDS}, got {rounds}")
    if not candidates:
        raise ValueError("candidates: expected at least one, got none")

    def timed(action: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            action()
        return clock() - start

    calls = {}
    for name, action in (warm_up or candidates).items():
        taken = timed(action, 1)
        if taken < min_s:  # the first call also allocates and compiles: time a second one
            taken = timed(action, 1)
        calls[name] = max(1, round(min_s / taken)) if taken > 0 else 1
    after_round()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, values in seconds.items():
            values.append(timed(candidates[name], calls[name]) / calls[name])
        after_round()
    return Timings(seconds)
