"""Sharded and replicated tensors of a layer, and exchanges of whole tensors between ranks.

A rank holds rows of W, M, V and of the counters `silent`. All other tensors are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from simmatch.layer import SimilarityMatchingConv2d
from simmatch.moments import ROWS, Moments
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.rows import Rows, join_rows
from simmatch.sharding.sums import OrderedSum, sum_over_ranks

SHARDED = ("feedforward", "lateral", "label", "silent")
"""Buffers whose first dimension runs over the layer's own channels."""


def shard_state(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    """The rows of a layer's sharded buffers that this rank holds.

    >>> sorted(shard_state(SimilarityMatchingConv2d(1, 4, kernel_size=3)))
    ['feedforward', 'label', 'lateral', 'silent']
    """
    return {name: getattr(layer, name) for name in SHARDED}


def replicated_state(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    """The buffers of a layer that are equal on all ranks.

    >>> sorted(replicated_state(SimilarityMatchingConv2d(1, 4, kernel_size=3)))
    ['class_frequency', 'input_power', 'perron', 'revived', 'updates']
    """
    return {name: tensor for name, tensor in layer.state_dict().items() if name not in SHARDED}


def gather_padded(own: Tensor, length: int, exchange: Exchange) -> Tensor:
    """Gather tensors [n, …] of all owners, each padded with zeros to n = `length`: [G, length, …], on every owner.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> gather_padded(torch.ones(3), 4, IDENTITY)
    tensor([[1., 1., 1., 0.]])
    """
    gathered = own.new_zeros(exchange.world_size, length, *own.shape[1:])
    gathered[exchange.rank, : len(own)] = own
    exchange.all_gather(gathered).wait()
    return gathered


def gather_rows(tensor: Tensor, rows: Rows, exchange: Exchange) -> Tensor:
    """Gather the rows [K_g, …] of every owner into the whole tensor [K, …], on every owner.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> gather_rows(torch.zeros(10, 7), Rows.all(10), IDENTITY).shape
    torch.Size([10, 7])
    """
    return join_rows(gather_padded(tensor, rows.padded, exchange), rows.total)


def whole_state(layer: SimilarityMatchingConv2d) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a layer that are saved, whole, one after the other, on every rank.

    >>> [name for name, _ in whole_state(SimilarityMatchingConv2d(1, 4, kernel_size=3))][:3]
    ['feedforward', 'lateral', 'label']
    """
    for name, tensor in layer.state_dict().items():
        yield name, gather_rows(tensor, layer.rows, layer.mesh.owners) if name in SHARDED else tensor


def load_rows(layer: SimilarityMatchingConv2d, whole: Mapping[str, Tensor]) -> None:
    """Load what `whole_state` has given: the rows that this rank holds, and all that is equal on all ranks.

    >>> one, other = (SimilarityMatchingConv2d(1, 4, kernel_size=3, seed=seed) for seed in (0, 1))
    >>> load_rows(other, dict(whole_state(one)))
    >>> torch.equal(other.feedforward, one.feedforward)
    True
    """
    own = slice(layer.rows.start, layer.rows.stop)
    layer.load_state_dict({name: tensor[own] if name in SHARDED else tensor for name, tensor in whole.items()})


def gather_layer(source: SimilarityMatchingConv2d, target: SimilarityMatchingConv2d) -> None:
    """Fill `target`, a layer that holds all rows, from the shards of `source`, on every rank.

    The bound of λmax(M) is certified from a new Perron vector, as for a loaded model, so that both give equal codes.

    >>> source, target = (SimilarityMatchingConv2d(1, 4, kernel_size=3, seed=seed) for seed in (0, 1))
    >>> gather_layer(source, target)
    >>> torch.equal(source.feedforward, target.feedforward)
    True
    """
    with torch.no_grad():
        for name, tensor in whole_state(source):
            getattr(target, name).copy_(tensor)
    target.recertify()


def gather_from_ranks(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Gather one tensor per rank, all of one shape: [G, …], equal on every rank.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> gather_from_ranks(torch.zeros(3), IDENTITY).shape
    torch.Size([1, 3])
    """
    return gather_padded(tensor.unsqueeze(0), 1, exchange).squeeze(1)


@dataclass(frozen=True)
class Numbered:
    """Blocks of `batch` consecutive images, of which rank n mod R has block n: `images` images in all.

    >>> Numbered(batch=500, images=1800).rounds(ranks=3)
    2
    """

    batch: int
    images: int

    def rounds(self, ranks: int) -> int:
        """Most blocks of a rank."""
        return -(-self.images // (self.batch * ranks))


def moments_over_ranks(
    blocks: Iterable[tuple[int, Tensor]], moments: Moments, exchange: Exchange, *, order: Numbered | None = None
) -> Moments:
    """The moments of the rows of all ranks together, equal on every rank.

    A rank adds its blocks in their order, and the sums of the ranks are added in the order of ranks. With `order`, the
    sums of the blocks are added in the order of their numbers, so that no bit depends on the number of ranks.

    Parameters
    ----------
    blocks: of this rank, in order: the number of the first image of a block, and its rows [n, P], perhaps in parts.
        Which images are a block does not depend on the number of ranks.
    moments: empty, of this width; it is used up.
    order: which blocks there are. An exchange for every block of a rank. None: two in all.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> rows = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> moments_over_ranks([(0, rows), (500, rows)], Moments(2), IDENTITY).mean.tolist()
    [1.0, 1.0]
    """
    if order is not None:
        return _moments_in_order(blocks, moments, exchange, order)
    for _, rows in blocks:
        moments.add(rows)
    sums = sum_over_ranks(
        torch.cat([moments.mean * moments.count, moments.mean.new_full((1,), moments.count)]), exchange
    )
    total = Moments(0, moments.mean.device)
    total.count, total.mean = int(sums[-1]), sums[:-1] / sums[-1]
    shift = moments.mean - total.mean
    total.scatter = sum_over_ranks(moments.scatter.addr_(shift, shift, alpha=moments.count), exchange)
    return total


def _moments_in_order(
    blocks: Iterable[tuple[int, Tensor]], empty: Moments, exchange: Exchange, order: Numbered
) -> Moments:
    """Count, Σ x and Σ x xᵀ of block after block: unlike mean and scatter, they add up."""
    ranks, size = exchange.world_size, len(empty.mean)
    total = OrderedSum(empty.mean.new_zeros(1 + size + size * size), exchange)
    own = groupby(blocks, key=lambda block: block[0] // (order.batch * ranks))
    number, group = next(own, (-1, iter(())))
    for each in range(order.rounds(ranks)):
        moments = Moments(size, empty.mean.device)
        if each == number:
            for _, rows in group:
                moments.add(rows)
            number, group = next(own, (-1, iter(())))
        count, mean = moments.count, moments.mean
        raw = moments.scatter.addr_(mean, mean, alpha=count)
        total.add(torch.cat([mean.new_full((1,), count), mean * count, raw.flatten()]))
    sums = total.result()
    result = Moments(0, empty.mean.device)
    result.count, result.mean = int(sums[0]), sums[1 : size + 1] / sums[0]
    result.scatter = sums[size + 1 :].view(size, size).addr(result.mean, result.mean, alpha=-result.count)
    return result


def rows_at_first(rows: Tensor, places: Tensor, exchange: Exchange) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of all ranks, with their places, on rank 0; the others get none, and no rank more than about `ROWS`.

    Parameters
    ----------
    rows: [n, …] of this rank.
    places: [n], int64 ≥ 0, say, where rank 0 puts each row.

    Yields
    ------
    Rows [m, …] and places [m]: as often on every rank.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> [(part.shape, places) for part, places in rows_at_first(torch.rand(2, 5), torch.tensor([3, 7]), IDENTITY)]
    [(torch.Size([2, 5]), tensor([3, 7]))]
    """
    most = int(gather_from_ranks(places.new_full((1,), len(places)), exchange).max())
    height = min(most, max(1, ROWS // exchange.world_size))
    first = exchange.rank == 0
    for start in range(0, most, max(1, height)):
        gathered = []
        for own, filler in ((rows, 0), (places, -1)):
            part = own.new_full((height, *own.shape[1:]), filler)
            some = own[start : start + height]
            part[: len(some)] = some
            whole = part.new_empty(exchange.world_size if first else 0, *part.shape)
            exchange.gather(part, whole).wait()
            gathered.append(whole.flatten(0, 1))
        kept = gathered[1] >= 0
        yield gathered[0][kept], gathered[1][kept]
