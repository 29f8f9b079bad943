"""Encoded images on the disk of a node: the same bits whoever made them; nothing twice; no fault ends a run."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch import ModelConfig, Stack, features
from simmatch.chunks import ChunkLost, Chunks
from simmatch.config import parse
from simmatch.data.feature_cache import FeatureCache
from simmatch.data.sources import Dataset
from simmatch.features import FeatureStore
from simmatch.fit import Trainer
from simmatch.model import InputConfig
from simmatch.observer import Observer
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from tests.exchanges import ThreadExchange, results, run_owners
from tests.live_bytes import LiveBytes

CPU = torch.device("cpu")
COUNT, BATCH = 230, 50
MODEL = parse(
    ModelConfig,
    {
        "layers": [
            {"out_channels": 6, "kernel_size": 3, "pool": 3, "supervised": True, "train": {"images": 60}},
            {"out_channels": 5, "kernel_size": 2, "pool": 1, "train": {"images": 60, "positions": 3}},
            {"out_channels": 4, "kernel_size": "full", "whiten": True, "supervised": True, "train": {"images": 60}},
        ]
    },
)


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    return digits.train_images[:COUNT]


@pytest.fixture(scope="module")
def labels(digits: Dataset) -> Tensor:
    return digits.train_labels[:COUNT]


class Counter(Observer):
    """Counts encoded images of every layer, and may end the training after some of them."""

    def __init__(self, last: tuple[int, int] | None = None) -> None:
        self.encoded_images, self.found, self.features = [0, 0, 0], [0, 0, 0], dict[int, Tensor]()
        self.last = last

    def encoded(self, index: int, activities: Tensor, passed: Tensor) -> None:
        if self.last is not None and self.last[0] == index and self.encoded_images[index] >= self.last[1]:
            raise KeyboardInterrupt
        self.encoded_images[index] += len(passed)

    def keeps(self, index: int) -> bool:
        return True

    def advanced(self, index: int, features: Chunks) -> None:
        self.found[index] = features.found
        own = [features.content(number) for number in features.numbers if features.find(number)]
        self.features[index] = torch.cat(own)


def cache_in(folder: Path, said: list[str] | None = None, *, budget: int = 2**30, data: str = "digits") -> FeatureCache:
    return FeatureCache(folder, budget, data=data, warn=[].append if said is None else said.append)


def train(
    images: Tensor,
    labels: Tensor,
    cache: FeatureCache | None,
    exchange: Exchange = IDENTITY,
    observer: Counter | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Counter]:
    observer = observer or Counter()
    stack = Stack(MODEL, InputConfig.of(images, 10), dtype=torch.float64)
    trained = Trainer(
        stack,
        images,
        labels,
        mesh=Mesh.of_owners(exchange),
        observer=observer,
        encode_batch=BATCH,
        encode_last=True,
        feature_cache=cache,
        **options,
    ).fit()
    return trained.state_dict(), observer


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features/*/*.bin"))


def test_the_disk_changes_nothing_and_a_second_run_encodes_nothing(
    images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    """Three layers' outputs, and the dense layer's whitened patches, in five chunks each; V of two layers is scaled."""
    expected, counted = train(images, labels, None)
    assert (counted.encoded_images, counted.found) == ([COUNT] * 3, [0, 0, 0])
    said: list[str] = []
    first, counted = train(images, labels, cache_in(tmp_path, said))
    assert (counted.encoded_images, counted.found) == ([COUNT] * 3, [0, 0, 0])
    again, counted = train(images, labels, cache_in(tmp_path, said))
    assert (counted.encoded_images, counted.found) == ([0, 0, 0], [COUNT] * 3)
    same(first, expected)
    same(again, expected)
    assert (len(files(tmp_path)), said) == (4 * 5, [])
    _other, counted = train(images, labels, cache_in(tmp_path, said, data="other images"))
    assert counted.found == [0, 0, 0]


@pytest.mark.parametrize("last", [(0, 100), (1, 0), (2, 200)])
def test_after_a_kill_nothing_is_encoded_twice(
    images: Tensor, labels: Tensor, tmp_path: Path, last: tuple[int, int]
) -> None:
    """In the middle of encoding, and between layers. The run that goes on learns the same weights again."""
    expected, _ = train(images, labels, None)
    killed, counted = Counter(last), Counter()
    with pytest.raises(KeyboardInterrupt):
        train(images, labels, cache_in(tmp_path), observer=killed)
    weights, counted = train(images, labels, cache_in(tmp_path))
    same(weights, expected)
    assert [one + other for one, other in zip(killed.encoded_images, counted.encoded_images, strict=True)] == [
        COUNT
    ] * 3
    assert counted.found == killed.encoded_images


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("nodes", ["one", "each its own", "none"])
def test_any_number_of_ranks_and_nodes_encodes_the_same(
    images: Tensor, labels: Tensor, tmp_path: Path, ranks: int, nodes: str
) -> None:
    """With the weights of one rank: the same bytes in every chunk. Seven ranks, five chunks: two ranks make none."""
    stack = Stack(MODEL, InputConfig.of(images, 10), dtype=torch.float64)
    folders = {"one": lambda rank: tmp_path, "each its own": lambda rank: tmp_path / str(rank)}

    def encode(exchange: Exchange, folder: Path | None) -> tuple[Tensor, int, list[int]]:
        cache = None if folder is None else cache_in(folder)
        store = FeatureStore(images, exchange, batch=BATCH, dtype=torch.float64, device=CPU, cache=cache)
        made: list[int] = []

        def outputs(x: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            made.extend(range(part.start, part.stop))
            return stack.below(x, 1), torch.full((3,), float(part.start), dtype=x.dtype)

        store.advance(outputs, (6, 3, 3), lambda done: None, extra=3)
        assert store.features is not None
        store.share(store.features, lambda done: None)
        chosen = torch.tensor([229, 0, 50, 51, 0, 149])
        assert store.features.extras(4).tolist() == [200.0] * 3
        whole = store.features.whole(CPU)
        assert torch.equal(store.features[chosen], whole[chosen])
        return whole, store.features.found, made

    with torch.no_grad():
        expected, found, _ = encode(IDENTITY, None)
        assert found == 0

        def owner(exchange: ThreadExchange) -> tuple[Tensor, int, list[int]]:
            with torch.no_grad():
                return encode(exchange, folders[nodes](exchange.rank) if nodes in folders else None)

        outcomes = results(run_owners(ranks, owner))
        for features, found, _ in outcomes:
            assert torch.equal(features, expected)
            assert found == 0
        assert sorted(image for _, _, made in outcomes for image in made) == list(range(COUNT))
        if nodes == "one":  # another number of ranks goes on with what is there
            for features, found, made in results(run_owners(2, owner)):
                assert torch.equal(features, expected)
                assert (found, made) == (COUNT, [])


def test_ranks_learn_the_same_from_the_disk(images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    """Two ranks with a disk against two without: the same bits; each image is encoded by one of them."""

    def owner(disk: bool) -> Callable[[ThreadExchange], Any]:
        return lambda exchange: train(images, labels, cache_in(tmp_path) if disk else None, exchange)

    with_disk, without = results(run_owners(2, owner(True))), results(run_owners(2, owner(False)))
    for rank in range(2):
        same(with_disk[rank][0], without[rank][0])
    assert with_disk[0][1].encoded_images == [130] * 3
    assert with_disk[1][1].encoded_images == [100] * 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_chunks_are_encoded_again_with_one_line_for_each_layer(
    images: Tensor, labels: Tensor, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    expected, _ = train(images, labels, cache_in(tmp_path))
    counts = {path.parent: 0 for path in files(tmp_path)}
    damaged = [folder / "000002.bin" for folder in counts]
    for path in damaged:
        damage(path)
        damage(path.with_name("000003.bin"))
    said: list[str] = []
    weights, counted = train(images, labels, cache_in(tmp_path, said))
    same(weights, expected)
    assert counted.encoded_images == [2 * BATCH] * 3
    assert counted.found == [COUNT - 2 * BATCH] * 3
    assert sorted(line.partition(": ")[2] for line in said) == sorted(
        f"{path} is damaged: it is made again, as are others beside it" for path in damaged
    )
    assert train(images, labels, cache_in(tmp_path, said))[1].encoded_images == [0, 0, 0]


def test_a_chunk_that_is_lost_after_it_was_found_is_encoded_again_by_the_next_run(
    images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    """When the second layer begins with it. The error is one that a new group may overcome."""
    expected, _ = train(images, labels, None)

    class Damages(Counter):
        def restore(self, index: int, layer: Any) -> None:
            if index == 1:
                for path in files(tmp_path):
                    path.write_bytes(b"")

    with pytest.raises(ChunkLost, match=r"^encoded images"):
        train(images, labels, cache_in(tmp_path), observer=Damages())
    weights, _ = train(images, labels, cache_in(tmp_path))
    same(weights, expected)


def test_a_chunk_that_was_removed_is_lost_unless_it_is_open(tmp_path: Path) -> None:
    chunks = Chunks(6, (2,), torch.float32, batch=2, extra=1, features=cache_in(tmp_path).open("key"))
    for number in chunks.numbers:
        chunks.put(number, torch.full((2, 2), float(number)), torch.ones(1))
    assert float(chunks.extras(2)) == 1.0
    for path in files(tmp_path):
        path.unlink()
    assert chunks[torch.tensor([5])].tolist() == [[2.0, 2.0]]
    with pytest.raises(ChunkLost, match=r"^encoded images 0 to 1: expected a chunk in the cache, found none$"):
        chunks[torch.tensor([5, 0])]


def test_another_version_of_the_program_encodes_again(
    images: Tensor, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(images, labels, cache_in(tmp_path))
    monkeypatch.setattr(features, "program", lambda: "another")
    assert train(images, labels, cache_in(tmp_path))[1].found == [0, 0, 0]


def test_a_folder_that_cannot_be_written_costs_memory(images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    expected, _ = train(images, labels, None)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file in the way")
    said: list[str] = []
    weights, _ = train(images, labels, cache_in(blocked, said))
    same(weights, expected)
    (line,) = said
    assert "encoded images are kept in memory, not in the cache: " in line
    assert str(blocked) in line


def test_a_full_disk_costs_memory(
    images: Tensor, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some chunks."""
    expected, _ = train(images, labels, None)
    real, left, said = Path.replace, [7], list[str]()

    def replace(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    weights, _counted = train(images, labels, cache_in(tmp_path, said))
    same(weights, expected)
    (line,) = said
    assert line.endswith("000002.bin: No space left on device")
    assert len(files(tmp_path)) == 7
    assert not list(tmp_path.glob("features/*/*partial"))
    monkeypatch.undo()
    assert train(images, labels, cache_in(tmp_path))[1].found == [COUNT, 2 * BATCH, 0]


def test_a_small_budget_removes_what_was_used_longest_ago(images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    """What this run uses stays; chunks that do not fit are kept in memory."""
    expected, _ = train(images, labels, cache_in(tmp_path, data="older"))
    of_a_run = sum(path.stat().st_size for path in files(tmp_path))
    said: list[str] = []
    weights, _ = train(images, labels, cache_in(tmp_path, said, budget=int(1.2 * of_a_run)))
    same(weights, expected)
    assert said == []
    assert train(images, labels, cache_in(tmp_path))[1].found == [COUNT] * 3
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 1.2 * of_a_run
    weights, _ = train(images, labels, cache_in(tmp_path / "other", said, budget=of_a_run // 2))
    same(weights, expected)
    (line,) = said
    assert line.endswith(f"data.cache_bytes={of_a_run // 2} is taken by what is in use")


def test_the_members_of_a_group_can_share_a_cache(tmp_path: Path) -> None:
    """Under a umask that lets the group write, it can write to every lock file, too; and may read without writing."""
    before = os.umask(0o002)
    try:
        features = cache_in(tmp_path).open("key")
        assert features is not None
        assert features.write(0, [memoryview(b"maps")])
    finally:
        os.umask(before)
    assert {stat.filemode(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {"-rw-rw-r--"}


def test_two_runs_at_once_share_a_key(images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    """Two runs in threads, each on its own: the same weights as one, and whole chunks."""
    expected, _ = train(images, labels, None)
    for weights, _ in results(run_owners(2, lambda _: train(images, labels, cache_in(tmp_path)))):
        same(weights, expected)
    assert train(images, labels, cache_in(tmp_path))[1].found == [COUNT] * 3
    assert len(files(tmp_path)) == 4 * 5


def peak(count: int, folder: Path | None, ranks: int = 1) -> int:
    """Bytes of tensors that the first rank holds at its most while images are encoded and shared."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)

    def owner(exchange: ThreadExchange) -> int:
        cache = None if folder is None else cache_in(folder / str(count))
        store = FeatureStore(images, exchange, batch=100, dtype=torch.float32, device=CPU, cache=cache)
        with LiveBytes() as live:
            for depth in range(2):
                store.advance(
                    lambda x, part: (x.new_full((len(x), 8, 8, 8), part.start), x.new_empty(0)),
                    (8, 8, 8),
                    lambda done: None,
                    by=(depth,),
                )
            assert store.features is not None
            store.share(store.features, lambda done: None)
            assert float(store.features[torch.tensor([count - 1])].max()) == count - 100
        return live.peak

    return int(results(run_owners(ranks, owner))[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_flat_in_the_images_and_the_ranks(tmp_path: Path, ranks: int) -> None:
    """2,000 and 20,000 images, whose features take 41 MB; in memory they are held twice while they are encoded."""
    few, many = peak(2000, tmp_path / str(ranks), ranks), peak(20_000, tmp_path / str(ranks), ranks)
    assert many < 1.05 * few
    assert many < 8 * 100 * 512 * 4  # a few blocks
    assert peak(20_000, None) > 20_000 * 512 * 4
