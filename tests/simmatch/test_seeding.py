"""The counter-based generator. Oracles: published outputs, the same arithmetic in whole numbers, and statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from simmatch.geometry import draw_positions
from simmatch.plasticity import revived_filters
from simmatch.seeding import folded, stream, uniform

WORD = (1 << 64) - 1


def mixed(state: int) -> int:
    """`splitmix64.c` for one state, in whole numbers of any size."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def by_hand(key: int, *counters: int) -> int:
    for counter in counters:
        key = mixed((key + (counter + 1) * 0x9E3779B97F4A7C15) & WORD)
    return key


def unsigned(value: int | torch.Tensor) -> int:
    return int(value) & WORD


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_one_counter_gives_the_outputs_of_splitmix64(seed: int, expected: list[int]) -> None:
    """First outputs, as in the tests of other implementations of the published program."""
    assert [unsigned(value) for value in folded(seed, torch.arange(4))] == expected


def test_keys_equal_those_computed_by_hand() -> None:
    counters = [0, 1, 2, 63, 1 << 31, (1 << 32) + 5, (1 << 62) - 1]
    for key in (0, 1, -1, stream("test", 3), -(1 << 63), (1 << 63) - 1):
        for first, second in itertools.product(counters, repeat=2):
            assert unsigned(folded(key, first, second)) == by_hand(key & WORD, first, second)


def test_a_key_does_not_depend_on_shape_or_on_what_is_computed_beside_it() -> None:
    """Vectorised arithmetic and its remainder, rows and columns, numbers and tensors."""
    key = stream("test", 0)
    whole = folded(key, torch.tensor(5), torch.arange(7).unsqueeze(1), torch.arange(131))
    assert whole.shape == (7, 131)
    for row, column in itertools.product(range(7), range(131)):
        assert int(whole[row, column]) == int(folded(key, 5, row, column))
    assert torch.equal(folded(folded(key, 5), torch.arange(7)), folded(key, 5, torch.arange(7)))


def test_counters_keep_their_values() -> None:
    update, columns = torch.tensor(5), torch.arange(4)
    folded(folded(stream("test"), update), columns)
    assert int(update) == 5
    assert torch.equal(columns, torch.arange(4))


def test_purposes_and_numbers_give_other_keys() -> None:
    keys = [stream(purpose, number) for purpose in ("positions", "revived") for number in range(1000)]
    assert len(set(keys)) == 2000
    assert -(1 << 63) <= min(keys) < 0 < max(keys) < 1 << 63


def test_numbers_are_the_upper_bits_of_the_keys() -> None:
    """Both ends and the sign: exact in float64."""
    keys = torch.tensor([0, (1 << 11) - 1, 1 << 11, -1, -(1 << 63)])
    assert uniform(keys).tolist() == [0.0, 0.0, 2.0**-53, 1.0 - 2.0**-53, 0.5]


def test_every_bit_is_a_fair_coin() -> None:
    """2¹⁶ keys over two counters: each of 64 bits is set in half of them, to 5 deviations of 128."""
    keys = folded(stream("test"), torch.arange(256).unsqueeze(1), torch.arange(256)).flatten()
    bits = (keys.unsqueeze(1) >> torch.arange(64)) & 1
    assert (bits.sum(dim=0) - 32768).abs().amax() < 5 * 128
    # and any two of them are equal in half of the keys
    signs = (2 * bits - 1).double()
    together = (signs.T @ signs).fill_diagonal_(0.0)
    assert together.abs().amax() < 6 * 256


def test_numbers_are_uniform_and_their_pairs_too() -> None:
    """χ² of 100 cells with 99 degrees of freedom, mean 99 and deviation 14, for numbers and for pairs of neighbours.

    A pair: of consecutive updates at one place, of consecutive places in one update, of two purposes.
    """
    numbers = uniform(folded(stream("test"), torch.arange(200).unsqueeze(1), torch.arange(200)))
    other = uniform(folded(stream("other"), torch.arange(200).unsqueeze(1), torch.arange(200)))
    tenths = (numbers * 10).long()
    cells = [
        (numbers * 100).long(),
        10 * tenths[1:] + tenths[:-1],
        10 * tenths[:, 1:] + tenths[:, :-1],
        10 * tenths + (other * 10).long(),
    ]
    for cell in cells:
        counts = cell.flatten().bincount(minlength=100).double()
        expected = cell.numel() / 100
        assert float(((counts - expected).square() / expected).sum()) < 99 + 5 * 14


@pytest.mark.parametrize("place", [0, 1])
def test_one_bit_of_a_counter_changes_half_of_the_key(place: int) -> None:
    """Avalanche: over 1000 counters and each of their lowest 32 bits, 32 of 64 bits, deviation of the mean 0.13."""
    counters = torch.arange(1000)
    for bit in range(32):
        pairs = [(counters, counters), (counters, counters)]
        pairs[1] = (counters ^ (1 << bit), counters) if place == 0 else (counters, counters ^ (1 << bit))
        one, two = (folded(stream("test"), *pair) for pair in pairs)
        changed = (((one ^ two).unsqueeze(1) >> torch.arange(64)) & 1).sum(dim=1).double()
        assert abs(float(changed.mean()) - 32) < 6 * 0.13


# -- what is drawn from them -------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_largest_keys() -> None:
    """By hand: of 6 positions of an image the 2 with the largest signed keys, their lowest three bits replaced."""

    def rank(key: int, image: int, position: int) -> int:
        value = by_hand(key, (image << 32) + position)
        return ((value - (1 << 64) if value >> 63 else value) & ~7) | position

    for key in range(20):
        drawn = draw_positions(2, 5, (2, 3), key)
        for image in range(5):
            order = sorted(range(6), key=lambda position: rank(key, image, position))
            assert drawn[image].tolist() == sorted(order[-2:])


def test_positions_of_an_image_do_not_depend_on_its_batch_mates() -> None:
    key = folded(stream("test"), torch.tensor(7))
    assert torch.equal(draw_positions(5, 40, (6, 6), key)[:13], draw_positions(5, 13, (6, 6), key))


def test_a_map_of_one_position() -> None:
    assert torch.equal(draw_positions(1, 3, (1, 1), 0), torch.zeros(3, 1, dtype=torch.int64))


def test_revived_filters_are_uniform_of_unit_norm() -> None:
    """400 rows of 75 entries uniform on ±√(3/P): norms² of mean 1 and deviation √(0.8/P); bounds; no correlation."""
    like = torch.zeros(400, 3, 5, 5)
    rows = revived_filters(0, torch.arange(400), 50, like)
    assert rows.shape == like.shape
    flat = rows.flatten(1).double()
    assert abs(float(flat.square().sum(dim=1).mean()) - 1.0) < 5 * math.sqrt(0.8 / 75 / 400)
    limit = math.sqrt(3 / 75)
    assert 0.999 * limit < float(flat.abs().amax()) <= limit * (1 + 1e-6)
    assert float((flat @ flat.T).fill_diagonal_(0).abs().amax()) < 6 / math.sqrt(75)


def test_a_revived_filter_depends_on_seed_channel_and_update_alone() -> None:
    like = torch.zeros(8, 3, 5, 5, dtype=torch.float64)
    one = revived_filters(0, torch.arange(20), torch.tensor(50), like)
    for channel in (0, 7, 19):
        assert torch.equal(revived_filters(0, torch.tensor([channel]), 50, like)[0], one[channel])
    assert torch.equal(one.float(), revived_filters(0, torch.arange(20), 50, like.float()))
    for others in (revived_filters(1, torch.arange(20), 50, like), revived_filters(0, torch.arange(20), 51, like)):
        assert not (others == one).any()
    assert revived_filters(0, torch.arange(0), 50, like).shape == (0, 3, 5, 5)
