"""Which tensors of a layer are split over the channel axis, and how rows are taken and put together.

A rank holds rows of W, M, V and of the silence counters; everything else is equal on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.rows import Rows, join_rows

SHARDED = ("feedforward", "lateral", "label", "silent")
"""Buffers whose first dimension runs over the layer's own channels."""


def shard_state(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    """The own rows of a layer's sharded buffers."""
    return {name: getattr(layer, name) for name in SHARDED}


def replicated_state(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    """The buffers of a layer that are equal on all ranks."""
    return {name: tensor for name, tensor in layer.state_dict().items() if name not in SHARDED}


def take_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of a whole tensor [K, …] that one owner holds."""
    return tensor[rows.start : rows.stop]


def gather_rows(tensor: Tensor, rows: Rows, exchange: Exchange) -> Tensor:
    """Own rows [K_g, …] of every owner → whole tensor [K, …] on every owner."""
    gathered = tensor.new_zeros(exchange.world_size, rows.padded, *tensor.shape[1:])
    gathered[exchange.rank, : rows.count] = tensor
    exchange.all_gather(gathered).wait()
    return join_rows(gathered, rows.total)


def gather_layer(source: SimilarityMatchingConv2d, target: SimilarityMatchingConv2d) -> None:
    """Fill `target`, a layer that holds all rows, from the shards of `source`, on every rank.

    λmax(M) is bounded afresh, as it is when the exported model is loaded: codes are the same.
    """
    with torch.no_grad():
        for name, tensor in replicated_state(source).items():
            getattr(target, name).copy_(tensor)
        for name, tensor in shard_state(source).items():
            getattr(target, name).copy_(gather_rows(tensor, source.rows, source.exchange))
    target.recertify()


def of_every_rank(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Tensors of one shape, one a rank → [G, …], the same on every rank."""
    gathered = tensor.new_zeros(exchange.world_size, *tensor.shape)
    gathered[exchange.rank] = tensor
    exchange.all_gather(gathered).wait()
    return gathered


def sum_over_ranks(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Σ over ranks of their tensors, added in the order of ranks, on every rank."""
    return of_every_rank(tensor, exchange).sum(dim=0)


def from_rank_zero(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Rank 0's values on every rank."""
    return of_every_rank(tensor, exchange)[0]
