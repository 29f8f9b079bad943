"""Sums whose bits do not depend on the order of their terms: fixed-point numbers, added as integers.

    q_b = round(x_b · 2^s)      every term, the sum over one block of columns, as an int64; s is the same on all ranks
    Σ x_b ≈ 2^−s · Σ q_b        int64 additions are associative: any order, any number of ranks

**No overflow.** Let A bound the sum of the magnitudes that add up to any x_b, so that |x_b| ≤ 2 A as computed with
rounding; let A < 2^e, and B ≤ 2^b be the number of terms. With s = 60 − b − e every |q_b| ≤ 2^(61 − b) + ½, so that
|Σ q_b| ≤ 2^61 + B/2 < 2^62, and so is every partial sum.

**Rounding.** A term is rounded by at most 2^−(s + 1), exactly none of it where |x_b| ≥ 2^(p − s) with p the digits of
the dtype (24 or 53). The sum is therefore off by at most B · 2^−(s + 1) < A · 2^(2b − 60): 2^−46 A for 128 terms. A sum
in float32 is off by up to (B − 1) 2^−24 Σ |x_b|, and in float64 by 2^−53, so for float64 the integers are the coarser
ones. The result is rounded to the dtype once.

Source: fixed-point accumulation, Kulisch, "Computer arithmetic and validity" (2008); here with one word, and a bound of
the magnitudes in place of all exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 62
"""No partial sum reaches 2^`BITS`."""

_LARGEST_SHIFT = {torch.float32: 126, torch.float64: 1022}
"""2^s and 2^−s are normal numbers of the dtype."""


def shifts(bounds: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """s of every sum: int64, as many as there are bounds. It waits for no device.

    Parameters
    ----------
    bounds: A of every sum, finite; equal on all ranks. Others give numbers without meaning.
    terms: B, the number of terms of all ranks together.
    dtype: float32 or float64, of the terms.

    >>> shifts(torch.tensor([0.9, 1.0]), terms=4, dtype=torch.float32)
    tensor([58, 57])
    """
    _, exponent = torch.frexp(bounds.double())  # bounds < 2^exponent
    spare = max(terms - 1, 0).bit_length()
    largest = _LARGEST_SHIFT[dtype]
    return (BITS - 2 - spare - exponent.long()).clamp(-largest, largest)


def to_fixed(terms: Tensor, shift: Tensor) -> Tensor:
    """round(x · 2^s), half to even, as int64. Multiplying by a power of two is exact. Overwrites the terms.

    Parameters
    ----------
    terms: floats of any shape, |x| ≤ 2 A.
    shift: s, 0-d.

    >>> to_fixed(torch.tensor([0.5, -0.75]), torch.tensor(2))
    tensor([ 2, -3])
    """
    return terms.mul_(_power_of_two(shift, terms.dtype)).round_().long()


def from_fixed(total: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """2^−s · q, rounded once to the dtype.

    >>> from_fixed(torch.tensor([2, -3]), torch.tensor(2), torch.float32)
    tensor([ 0.5000, -0.7500])
    """
    return total.to(dtype).mul_(_power_of_two(-shift, dtype))


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, from its bits: no function of a library is trusted with its last digit."""
    return (exponent + 1023).bitwise_left_shift(52).view(torch.float64).to(dtype)


def pairwise_sum(terms: Tensor) -> Tensor:
    """The sum over the last dimension, halves added to each other, [..., n] → [...].

    Each addition is one of numbers, not of vectors, so the bits of a row do not depend on how many rows there are, as
    they do in a product of a matrix and a vector. Relative error of nonnegative terms: at most 2 log2 n roundings.

    >>> pairwise_sum(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([ 6., 15.])
    """
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        added = terms[..., :half] + terms[..., half : 2 * half]
        if terms.shape[-1] % 2:
            added[..., -1] += terms[..., -1]
        terms = added
    return terms.sum(dim=-1)
