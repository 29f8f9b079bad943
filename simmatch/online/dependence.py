"""How far values of a signal depend on those before them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 10
"""Lags that are summed, as a multiple of the sum. The usual 5 misses runs that are a small part of the variance."""


def correlation_time(values: NDArray[np.float64]) -> float:
    """Number of values whose mean is as certain as one independent value: the integrated autocorrelation time.

        τ = 1 + 2 Σ_{k=1..m} ρ_k,    m the least with m ≥ WINDOW · τ(m)

    ρ_k is the autocorrelation at lag k of what is left when a linear trend is taken off: a model that learns would
    make values of any signal depend on each other. The mean of n values has variance τ σ² / n.
    Values that alternate have τ < 1; 1 is returned for them, and for values on a line.

    values: [n], n much larger than τ.

    Source: Sokal, "Monte Carlo methods in statistical mechanics: foundations and new algorithms" (1997), section 3.

    >>> generator = np.random.default_rng(0)
    >>> noise = generator.standard_normal(20_000)
    >>> round(correlation_time(noise), 1)
    1.0
    >>> round(correlation_time(np.repeat(noise, 5)))  # each five times
    5
    """
    count = len(values)
    times = np.arange(count) - (count - 1) / 2
    deviations = values - values.mean()
    deviations -= times * (times @ deviations / max(float(times @ times), 1.0))
    size = 1 << (2 * count - 1).bit_length()  # zeros behind, so that the end does not meet the beginning
    covariances = np.fft.irfft(np.abs(np.fft.rfft(deviations, size)) ** 2, size)[:count]
    if covariances[0] <= np.finfo(np.float64).eps * count * float(values.mean()) ** 2:
        return 1.0
    sums = 2.0 * np.cumsum(covariances / covariances[0]) - 1.0
    enough = np.arange(count) >= WINDOW * sums
    return max(1.0, float(sums[np.argmax(enough) if enough.any() else count - 1]))
