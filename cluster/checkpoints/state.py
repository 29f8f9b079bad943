"""What a checkpoint holds of a stack that learns: taken from a rank's layers, and put back into them."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.checkpoints.manifest import LayerState
from cluster.checkpoints.reader import Reader, load_into
from cluster.checkpoints.shard_writer import Snapshot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack
from simmatch.sharding.state import replicated_state, shard_state


def take_snapshot(
    stack: Stack,
    learning: Mapping[int, SimilarityMatchingConv2d],
    states: Mapping[int, LayerState],
    *,
    first: bool,
    learnt: int = 0,
) -> Snapshot:
    """What a rank writes: its rows of the layers that learn, and, as their first owner, what is equal for all owners.

    Whitenings, and the layers that have learnt, whole, are constants, which the first owner writes once.

    Parameters
    ----------
    stack: holds the layers that have learnt, whole.
    learning: by their index, this rank's rows of layers, which may change while the shard is written: they are copied.
    states: goes into the manifest.
    first: whether this rank is the first owner of the layers.
    learnt: number of layers, from the first one on, that have learnt.
    """
    snapshot = Snapshot({}, {}, dict(states))
    for number in [*range(learnt), *learning]:
        layer = learning.get(number) or stack.layer(number)
        own = {f"layers.{number}.{name}": tensor for name, tensor in shard_state(layer).items()}
        rows = dict.fromkeys(own, layer.rows)
        if first:
            equal = {f"layers.{number}.{name}": tensor for name, tensor in replicated_state(layer).items()}
            whitening = {name: equal.pop(name) for name in list(equal) if "whitening" in name and layer.calibrated}
            own |= equal
            if whitening:
                snapshot.constants[f"whitening {number}"] = whitening, {}
            if number < learnt:
                snapshot.constants[f"layer {number}"] = own, rows
        if number >= learnt:
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
