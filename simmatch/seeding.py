"""Random numbers that depend only on their purpose, a seed and counters: no global state, equal on every rank.

`seeded` gives a generator of the host, for what is drawn once. What every update draws comes from `folded`, which is
arithmetic on tensors: it runs where its counters are, gives the same bits on a CPU and on a GPU, and may be captured in
a CUDA graph, which then draws anew at each replay if a counter is a tensor of the device.

    key₀ = hash(purpose, seed),   keyₗ = mix(keyₗ₋₁ + (cₗ + 1) γ)   for the counters c₁, c₂, …

With one counter these are the outputs number 0, 1, 2, … of SplitMix64 seeded with key₀: γ is its increment, mix its
finaliser. With several, each key seeds the generator of the next counter.

Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014); Vigna's `splitmix64.c`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def seeded(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of a purpose and numbers, so that different calls give independent streams.

    >>> first, second = (torch.rand(3, generator=seeded("example", 0, 1)) for _ in range(2))
    >>> torch.equal(first, second)
    True
    """
    return torch.Generator("cpu").manual_seed(int.from_bytes(_digest(purpose, *numbers)[:7], "big"))


def stream(purpose: str, *numbers: int) -> int:
    """A key for `folded`, an int64: a hash of a purpose and numbers.

    >>> stream("example", 0) == stream("example", 0), stream("example", 0) == stream("example", 1)
    (True, False)
    """
    return _signed(int.from_bytes(_digest(purpose, *numbers)[:8], "big"))


def _digest(purpose: str, *numbers: int) -> bytes:
    return hashlib.sha256(repr((purpose, *numbers)).encode()).digest()


def folded(key: int | Tensor, *counters: int | Tensor) -> Tensor:
    """Random keys, a function of a key and counters alone: see the equation of this module.

    Parameters
    ----------
    key: from `stream` or `folded`, int64.
    counters: whole numbers ≥ 0, int64 where they are tensors. Key and counters are broadcast against each other.

    Returns
    -------
    int64, uniform over all 2⁶⁴ values, of the common shape, on the device of the tensors (0-d tensors of the CPU go
    with those of any device).

    >>> updates, images = torch.tensor(3), torch.arange(4)
    >>> folded(stream("example", 0), updates, images).shape
    torch.Size([4])
    """
    for counter in counters:
        offset = torch.as_tensor(counter) * GAMMA + GAMMA
        key = _mixed(offset + key)
    return torch.as_tensor(key)


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in place; products are modulo 2⁶⁴."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        z ^= _shifted(z, shift)
        z *= multiplier
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, shift: int) -> Tensor:
    """z / 2^shift, rounded down, z taken as unsigned: `>>` alone repeats the sign."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def uniform(keys: Tensor) -> Tensor:
    """Numbers in [0, 1) from keys: float64, multiples of 2⁻⁵³, exact on every device.

    >>> numbers = uniform(folded(stream("example", 0), torch.arange(1000)))
    >>> numbers.dtype, bool((numbers >= 0).all() and (numbers < 1).all())
    (torch.float64, True)
    """
    return _shifted(keys, 11).double() * 2.0**-53
