"""What a checkpoint holds of a stack that learns: taken from a rank's layers, and put back into them."""

from __future__ import annotations

from cluster.checkpoints.manifest import LayerState
from cluster.checkpoints.reader import Reader, load_into
from cluster.checkpoints.shard_writer import Snapshot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack
from simmatch.sharding.rows import split_rows
from simmatch.sharding.state import SHARDED, replicated_state, shard_state, take_rows


def take_snapshot(stack: Stack, index: int, learning: SimilarityMatchingConv2d, usual: float | None) -> Snapshot:
    """A rank's shard: its rows of all layers up to `index`, and on rank 0 what is equal on all ranks.

    Parameters
    ----------
    stack: holds the finished layers, whole.
    learning: this rank's rows of layer `index`, which may change while the shard is written: they are copied.
    usual: the bound that the layer's growth is measured from.
    """
    exchange = learning.exchange
    snapshot = Snapshot({}, {}, [])
    for number in range(index + 1):
        layer = learning if number == index else stack.layer(number)
        rows = split_rows(layer.out_channels, exchange.world_size)[exchange.rank]
        tensors = {name: getattr(layer, name) for name in SHARDED}
        if number < index:
            tensors = {name: take_rows(tensor, rows) for name, tensor in tensors.items()}
        snapshot.rows.update(dict.fromkeys((f"layers.{number}.{name}" for name in tensors), rows))
        if exchange.rank == 0:
            tensors |= replicated_state(layer)
        for name, tensor in tensors.items():
            snapshot.tensors[f"layers.{number}.{name}"] = tensor.to("cpu", copy=number == index)
        reference = usual if number == index else None
        snapshot.layers.append(LayerState(usual=reference))
    return snapshot


def restore_layer(layer: SimilarityMatchingConv2d, index: int, reader: Reader) -> None:
    """Fill a rank's rows of a layer from a checkpoint, if the checkpoint holds that layer."""
    if index >= len(reader.manifest.layers):
        return
    for name, target in replicated_state(layer).items():
        load_into(target, reader.whole(f"layers.{index}.{name}"), name, reader.folder)
    for name, target in shard_state(layer).items():
        load_into(target, reader.rows(f"layers.{index}.{name}", layer.rows), name, reader.folder)
