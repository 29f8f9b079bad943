"""Whole tensors between ranks: what arrives, and that nothing grows with the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.sharding.exchange import IDENTITY, Done, Exchange
from simmatch.sharding.sums import sum_over_ranks
from tests.exchanges import ThreadExchange, results, run_owners
from tests.live_bytes import LiveBytes

SHAPES = [(1,), (7,), (5, 3), (4, 0), (101,)]


def drawn(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_has_the_bits_of_adding_in_the_order_of_ranks(world_size: int, shape: tuple[int, ...]) -> None:
    expected = drawn(0, shape)
    for rank in range(1, world_size):
        expected = expected + drawn(rank, shape)

    def owner(exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        own = drawn(exchange.rank, shape)
        return sum_over_ranks(own, exchange if world_size > 1 else IDENTITY), own

    for rank, (total, own) in enumerate(results(run_owners(world_size, owner))):
        assert torch.equal(total, expected)
        assert torch.equal(own, drawn(rank, shape))


@pytest.mark.parametrize("source", [0, 2])
def test_a_broadcast_is_in_place_and_costs_one_tensor(source: int) -> None:
    def owner(exchange: ThreadExchange) -> tuple[Tensor, int]:
        tensor = drawn(exchange.rank, (5, 3))
        exchange.broadcast(tensor, source).wait()
        return tensor, exchange.bytes_exchanged

    for rank, (tensor, received) in enumerate(results(run_owners(4, owner))):
        assert torch.equal(tensor, drawn(source, (5, 3)))
        assert received == (0 if rank == source else tensor.nbytes)


class SilentExchange:
    """One of many owners, of which the others send zeros; counts the bytes that they send."""

    rank, asynchronous, num_exchanges, waited_s = 0, False, 0, 0.0

    def __init__(self, world_size: int) -> None:
        self.world_size, self.bytes_exchanged = world_size, 0

    def all_gather(self, gathered: Tensor) -> Done:
        self.bytes_exchanged += gathered[1:].nbytes
        return Done()

    def all_to_all(self, received: Tensor, sent: Tensor) -> Done:
        received.zero_()[self.rank].copy_(sent[self.rank])
        self.bytes_exchanged += received[1:].nbytes
        return Done()

    def broadcast(self, tensor: Tensor, source: int) -> Done:
        raise AssertionError("no sum needs it")

    def gather(self, own: Tensor, gathered: Tensor) -> Done:
        raise AssertionError("no sum needs it")


@pytest.mark.parametrize("world_size", [2, 64, 512])
def test_the_memory_of_a_sum_does_not_grow_with_the_ranks(world_size: int) -> None:
    tensor = torch.ones(256, 256)
    exchange: Any = SilentExchange(world_size)
    checked: Exchange = exchange
    with LiveBytes() as live:
        total = sum_over_ranks(tensor, checked)
    assert total.shape == tensor.shape
    assert live.peak <= 2.01 * tensor.nbytes  # gathered, it would be `world_size` of them
    assert exchange.bytes_exchanged <= 2 * tensor.nbytes
