"""Fixed-point sums: against exact rational arithmetic, at the edge of the bound, in any order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from simmatch.sharding.blocks import COLUMNS, LEAST_IMAGES, MOST_BLOCKS, by_blocks, cut, images_per_block, split_blocks
from simmatch.sharding.exact import BITS, from_fixed, pairwise_sum, shifts, to_fixed

DTYPES = [torch.float32, torch.float64]


def terms_of(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Terms [count, 40] over 60 powers of two, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 40, generator=generator, dtype=torch.float64)
    return (values * torch.exp2(torch.randint(-40, 20, values.shape, generator=generator).double())).to(dtype)


def shift_for(terms: Tensor) -> Tensor:
    return shifts(terms.abs().amax(), len(terms), terms.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 100, 128])
def test_a_sum_is_within_its_bound_of_the_rational_sum(count: int, dtype: torch.dtype) -> None:
    """B · 2^−(s + 1) from the terms, at most A · 2^(2b − 60), and one rounding to the dtype."""
    terms = terms_of(dtype, count)
    shift = shift_for(terms)
    total = to_fixed(terms.clone(), shift).sum(dim=0)
    result = from_fixed(total, shift, dtype)
    spare, largest = (count - 1).bit_length(), Fraction(float(terms.abs().amax()))
    by_terms = Fraction(count) / Fraction(2) ** (int(shift) + 1)
    assert by_terms <= largest * Fraction(2) ** (2 * spare - 60)
    for column in range(terms.shape[1]):
        expected = sum((Fraction(float(value)) for value in terms[:, column]), Fraction(0))
        got = Fraction(float(result[column]))
        once = abs(got) * Fraction(torch.finfo(dtype).eps)
        assert abs(got - expected) <= by_terms + once
        exact_terms = [round(Fraction(float(value)) * Fraction(2) ** int(shift)) for value in terms[:, column]]
        assert int(total[column]) == sum(exact_terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_and_any_grouping_give_the_same_bits(dtype: torch.dtype) -> None:
    """Which sums of floats do not: the test would pass for any rounding otherwise."""
    terms = terms_of(dtype, 97)
    shift = shift_for(terms)
    fixed = to_fixed(terms.clone(), shift)
    expected = from_fixed(fixed.sum(dim=0), shift, dtype)
    differs = False
    for seed in range(5):
        order = torch.randperm(97, generator=torch.Generator().manual_seed(seed))
        groups = [fixed[order[start : start + 10 + seed]].sum(dim=0) for start in range(0, 97, 10 + seed)]
        assert torch.equal(from_fixed(torch.stack(groups).sum(dim=0), shift, dtype), expected)
        one_by_one = terms.new_zeros(40)
        for term in terms[order]:
            one_by_one += term
        differs |= not torch.equal(one_by_one, terms.sum(dim=0))
    assert differs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 127, 128])
@pytest.mark.parametrize("exponent", [-40, 0, 37])
def test_the_largest_terms_do_not_overflow(exponent: int, count: int, dtype: torch.dtype) -> None:
    """A just below a power of two, every term 2 A, which the proof allows: the sum stays below 2^62, and with one more
    bit it would not have stayed below 2^61."""
    bound = torch.nextafter(torch.tensor(2.0**exponent, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    shift = shifts(bound, count, dtype)
    fixed = to_fixed((2 * bound).expand(count, 2) * torch.tensor([1.0, -1.0], dtype=dtype), shift)
    exact = [sum(int(value) for value in fixed[:, column]) for column in (0, 1)]
    assert fixed.sum(dim=0).tolist() == exact
    assert max(map(abs, exact)) < 2**BITS
    power_of_two = 2 ** (count - 1).bit_length()
    assert abs(exact[0]) * power_of_two * 2 > 2 ** (BITS - 1) * count * (1 - 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.0, 1e-38, 3e38])
def test_extreme_bounds(bound: float, dtype: torch.dtype) -> None:
    """The factors stay normal numbers; sums of nothing are zero."""
    bounds = torch.tensor([bound], dtype=dtype)
    shift = shifts(bounds, 128, dtype)[0]
    result = from_fixed(to_fixed(bounds.clone(), shift) * 2, shift, dtype)
    if bound < 1e38:
        torch.testing.assert_close(result, 2 * bounds, rtol=1e-6, atol=2.0**-126)
    assert from_fixed(to_fixed(bounds.clone(), shift), shift, dtype).tolist() == pytest.approx(
        [bound], rel=1e-6, abs=2.0**-126
    )


def test_pairwise_sums_of_rows_do_not_depend_on_the_other_rows() -> None:
    for width in (1, 2, 3, 43, 128, 1000):
        terms = torch.rand(50, width, generator=torch.Generator().manual_seed(width))
        whole = pairwise_sum(terms)
        torch.testing.assert_close(whole.double(), terms.double().sum(dim=1), rtol=2e-6, atol=0)
        for rows in (slice(0, 1), slice(3, 10), slice(25, 50)):
            assert torch.equal(pairwise_sum(terms[rows]), whole[rows])


@pytest.mark.parametrize("images", [1, 2, 7, 100, 1000, 5000])
@pytest.mark.parametrize("positions", [1, 12, 36, 784])
def test_blocks_cover_a_batch_and_runs_of_them_are_parts(images: int, positions: int) -> None:
    size = images_per_block(images, positions)
    whole = cut(images, size)
    assert [number for block in whole for number in range(block.start, block.stop)] == list(range(images))
    assert len(whole) <= MOST_BLOCKS
    assert size * positions >= COLUMNS / 2 or size >= LEAST_IMAGES / 2 or size == images
    for parts in (1, 2, 3, 4, 7, 200):
        runs = split_blocks(images, size, parts)
        assert len(runs) == parts
        joined = [block for run in runs for block in cut(len(run), size) for block in [_moved(block, run.start)]]
        assert joined == whole
        counts = [len(cut(len(run), size)) for run in runs]
        assert max(counts) - min(counts) <= 1


def _moved(block: slice, start: int) -> slice:
    return slice(block.start + start, block.stop + start)


def test_a_function_sees_one_block_at_a_time() -> None:
    seen: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        assert x.data_ptr() % 64 == 0
        return x + 1

    images = torch.rand(11, 3)[1:]
    assert torch.equal(by_blocks(function, images, per_block=4), images + 1)
    assert seen == [(4, 3), (4, 3), (2, 3)]
    assert torch.equal(by_blocks(lambda x: x + 1, images[:0], per_block=4), images[:0])
