"""Parts of a batch: what a rank reads follows from sizes alone, and every image is read by the ranks that need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simmatch.config import DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.order import Batches
from simmatch.data.sources import Dataset
from simmatch.fit import Trainer
from simmatch.labels import UNLABELLED
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Update
from simmatch.sharding.columns import Part
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import SHARDED, gather_rows
from tests.exchanges import meshes, results, run_meshes

IMAGES, BATCH, POSITIONS = 26, 7, 5  # the last batch has 5 images
SEED = 3


@given(images=st.integers(0, 30), positions=st.integers(1, 40), ranks=st.integers(1, 12))
def test_parts_are_the_columns_of_a_batch_in_order(images: int, positions: int, ranks: int) -> None:
    """And an image is in a part if one of its columns is, or, where images are split, in one part only."""
    for make in (Part.of_columns, Part.of_images):
        following = 0
        for rank in range(ranks):
            part = make(images, positions, ranks=ranks, rank=rank)
            columns = [part.images.start * positions + column for column in part.columns]
            assert columns == list(range(following, following + len(columns)))
            following += len(columns)
            assert sorted({column // positions for column in columns}) == list(range(images))[part.images]
            assert (part.whole, part.count) == (images, len(range(images)[part.images]))
            share = images * positions / ranks if make is Part.of_columns else images / ranks * positions
            assert abs(len(columns) - share) < (1 if make is Part.of_columns else positions)
        assert following == images * positions


class Counted:
    """Images that note which of them are read, and by whom, while a layer learns."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.reads, self.learning = images, [], False  # type: list[list[int]], bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        if self.learning:
            self.reads.append(indices.tolist())
        return self.images.index_select(0, indices)


class Ended(Exception):
    """The training ends after an update."""


class Watch(Observer):
    """Notes reads of learning; continues from the state of an earlier group, and ends with one for the next."""

    def __init__(self, source: Counted | None, begin: dict[str, Tensor] | None = None, last: int | None = None) -> None:
        self.source, self.begin, self.last = source, begin, last
        self.state: dict[str, Tensor] = {}

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        for name, value in (self.begin or {}).items():
            rows = value[layer.rows.start : layer.rows.stop] if name in SHARDED else value
            layer.get_buffer(name).copy_(rows)

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        if self.source is not None:
            self.source.learning = True

    def updated(self, update: Update) -> None:
        if update.number == self.last:
            layer = update.layer
            for name, tensor in layer.state_dict().items():
                whole = gather_rows(tensor, layer.rows, layer.mesh.owners) if name in SHARDED else tensor
                self.state[name] = whole.clone()
            raise Ended

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        if self.source is not None:
            self.source.learning = False


def data(digits: Dataset) -> tuple[Tensor, Tensor]:
    labels = digits.train_labels[:IMAGES].clone()
    labels[::4] = UNLABELLED
    return digits.train_images[:IMAGES], labels


def model(mode: str, *, second: bool = False) -> ModelConfig:
    dynamics = DynamicsConfig(exchange=mode, solver="accelerated", tolerance=0.0, max_iterations=12)
    rates = PlasticityConfig(lr=0.2)
    train = TrainConfig(epochs=2, batch_size=BATCH, positions=POSITIONS)
    layers = [LayerConfig(out_channels=7, kernel_size=3, pool=2, dynamics=dynamics, plasticity=rates, train=train)]
    if second:
        train = TrainConfig(epochs=1, batch_size=BATCH)
        options: dict[str, Any] = {"supervised": True, "label_gain": 0.5, "dynamics": dynamics, "plasticity": rates}
        layers.append(LayerConfig(out_channels=6, kernel_size="full", train=train, **options))
    return ModelConfig(layers=tuple(layers))


def train(
    digits: Dataset, config: ModelConfig, *, cache: bool = True
) -> Callable[[Mesh, Watch, Counted | None], dict[str, Tensor]]:
    images, labels = data(digits)

    def program(mesh: Mesh, watch: Watch, source: Counted | None = None) -> dict[str, Tensor]:
        stack = Stack(config, InputConfig.of(images, 10), seed=SEED, dtype=torch.float64)
        given = images if source is None else source
        trainer = Trainer(stack, given, labels, mesh=mesh, observer=watch, encode_batch=4, cache=cache)
        try:
            trainer.fit()
        except Ended:
            return watch.state
        return {name: tensor.clone() for name, tensor in stack.state_dict().items()}

    return program


def batches() -> list[list[int]]:
    order = Batches(IMAGES, BATCH, epochs=2, seed=SEED)
    return [order[number].tolist() for number in range(len(order))]


@pytest.mark.parametrize(("replicas", "owners"), [(1, 1), (2, 1), (2, 2), (3, 1), (9, 1)])
@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_an_image_is_read_by_the_ranks_that_need_it(mode: str, replicas: int, owners: int, digits: Dataset) -> None:
    """Those whose columns are in it: one of many, and its neighbour; or all owners of one replica."""
    program = train(digits, model(mode))

    def member(mesh: Mesh) -> list[list[int]]:
        source = Counted(data(digits)[0])
        program(mesh, Watch(source), source)
        return source.reads

    ranks = replicas * owners
    reads = results(run_meshes(meshes(replicas, 1, owners), member))
    for number, batch in enumerate(batches()):
        for rank in range(ranks):
            total, place = len(batch) * POSITIONS, rank
            if mode == "every_iteration":
                total, place = len(batch), rank // owners
            parts = ranks if mode == "gather_state" else replicas
            own = range(place * total // parts, (place + 1) * total // parts)
            needed = {batch[unit // (POSITIONS if mode == "gather_state" else 1)] for unit in own}
            assert len(reads[rank][number]) == len(needed)
            assert set(reads[rank][number]) == needed
    assert all(len(each) == len(batches()) for each in reads)


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_another_number_of_ranks_in_mid_epoch_visits_the_same_images(mode: str, digits: Dataset) -> None:
    """2, then 4, then 3 ranks, as replicas and owners: the images and the weights of one rank that is not disturbed."""
    groups = [(2, 1, 1), (2, 2, 3), (3, 1, None)]
    program, state, visited = train(digits, model(mode)), None, []
    for replicas, owners, last in groups:

        def member(mesh: Mesh, begin: Any = state, last: int | None = last) -> tuple[dict[str, Tensor], Any]:
            source = Counted(data(digits)[0])
            made = program(mesh, Watch(source, begin, last), source)
            return made, source.reads

        outcomes = results(run_meshes(meshes(replicas, 1, owners), member))
        state = outcomes[0][0]
        first = len(visited)
        until = len(batches()) if last is None else last
        for number in range(first, until):  # a thread reads one batch ahead of an end
            visited.append(sorted({index for _, reads in outcomes for index in reads[number - first]}))
    assert visited == [sorted(batch) for batch in batches()]
    expected = program(meshes()[0], Watch(None))
    assert state is not None
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("mode", "replicas", "owners"), [("every_iteration", 2, 2), ("gather_state", 2, 1)])
def test_a_stack_learns_from_parts_alike(mode: str, replicas: int, owners: int, cache: bool, digits: Dataset) -> None:
    """Two layers, the second supervised, its input cached or encoded for every batch by the ranks that need it."""
    program = train(digits, model(mode, second=True), cache=cache)
    (single,) = results(run_meshes(meshes(), lambda mesh: program(mesh, Watch(None))))
    for made in results(run_meshes(meshes(replicas, 1, owners), lambda mesh: program(mesh, Watch(None)))):
        for name, value in single.items():
            torch.testing.assert_close(made[name], value, rtol=0, atol=1e-10)
