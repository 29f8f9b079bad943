"""What a checkpoint holds of a stack that learns: taken from a rank's layers, and put back into them."""

from __future__ import annotations

from cluster.checkpoints.manifest import LayerState
from cluster.checkpoints.reader import Reader, load_into
from cluster.checkpoints.shard_writer import Snapshot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack
from simmatch.sharding.state import replicated_state, shard_state


def take_snapshot(stack: Stack, index: int, learning: SimilarityMatchingConv2d, usual: float | None) -> Snapshot:
    """What a rank writes: its rows of layer `index`, and on rank 0 what is equal on all ranks.

    Whitenings, and the finished layers, whole, are constants, which rank 0 writes once.

    Parameters
    ----------
    stack: holds the finished layers, whole.
    learning: this rank's rows of layer `index`, which may change while the shard is written: they are copied.
    usual: the bound that the layer's growth is measured from.
    """
    snapshot = Snapshot({}, {}, [*[LayerState()] * index, LayerState(usual=usual)])
    for number in range(index + 1):
        layer = learning if number == index else stack.layer(number)
        own = {f"layers.{number}.{name}": tensor for name, tensor in shard_state(layer).items()}
        rows = dict.fromkeys(own, layer.rows)
        if learning.mesh.owners.rank == 0:
            equal = {f"layers.{number}.{name}": tensor for name, tensor in replicated_state(layer).items()}
            whitening = {name: equal.pop(name) for name in list(equal) if "whitening" in name}
            own |= equal
            if whitening:
                snapshot.constants[f"whitening {number}"] = whitening, {}
            if number < index:
                snapshot.constants[f"layer {number}"] = own, rows
        if number == index:
            snapshot.tensors.update({name: tensor.to("cpu", copy=True) for name, tensor in own.items()})
            snapshot.rows.update(rows)
    return snapshot


def restore_layer(layer: SimilarityMatchingConv2d, index: int, reader: Reader) -> None:
    """Fill a rank's rows of a layer from a checkpoint, if the checkpoint holds that layer."""
    if index >= len(reader.manifest.layers):
        return
    for name, target in replicated_state(layer).items():
        load_into(target, reader.whole(f"layers.{index}.{name}"), name, reader.folder)
    for name, target in shard_state(layer).items():
        load_into(target, reader.rows(f"layers.{index}.{name}", layer.rows), name, reader.folder)
