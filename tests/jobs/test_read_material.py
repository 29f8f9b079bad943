"""Comparisons on prepared images, read a few at a time as they are needed: the results of images in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.evaluate import main
from jobs.evaluation import features
from jobs.evaluation.config import EvaluationConfig, read
from jobs.evaluation.finetuning import FinetuneConfig, Trial, held_bytes
from jobs.evaluation.learners import no_progress
from jobs.evaluation.material import Material, ReadImages, in_batches, resized
from jobs.evaluation.memory import VALUE_BYTES, image_bytes, memory_line
from jobs.evaluation.networks import NETWORKS
from jobs.evaluation.rivals.patches import sampled
from jobs.evaluation.rows import FeatureRun, rows_of
from jobs.options import read_yaml
from simmatch.config import ConfigError, parse
from simmatch.data.cache import OpenShards
from simmatch.data.location import Location
from simmatch.data.prepared import PreparedImages
from simmatch.data.shards import Shard
from simmatch.data.sources import Dataset
from simmatch.geometry import PatchConfig, sample_patches
from simmatch.model import InputConfig
from tests.live_bytes import LiveBytes

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
BRIEF = ["seeds=[0]", "budgets=[10]", "tuning_images=200", "corrupted_images=20", "outlier_images=100"]
MOST_AT_ONCE = 500
"""Images that anybody may read together of these sets: those of a selection, or of a batch."""


class Counted(PreparedImages):
    """Prepared images that note how many are read together."""

    most = 0

    def __getitem__(self, indices: torch.Tensor | slice) -> torch.Tensor:
        images = super().__getitem__(indices)
        Counted.most = max(Counted.most, len(images))
        return images


@pytest.fixture(scope="module")
def stored(digits: Dataset) -> Dataset:
    """The digits as uint8, as a prepared data set has them."""
    train, test = ((each[:] * 255).round().to(torch.uint8) for each in (digits.train_images, digits.test_images))
    return replace(digits, train_images=train, test_images=test)


@pytest.fixture(scope="module")
def in_memory(stored: Dataset) -> Material:
    return Material.of(stored, 150)


@pytest.fixture
def on_disk(stored: Dataset, tmp_path: Path) -> Material:
    parts = []
    for name, images in (("train", stored.train_images), ("test", stored.test_images)):
        half, shards = len(images) // 2, []
        for number, some in enumerate((images[:half], images[half:])):
            shard = Shard(file=f"{name}-{number:05d}.bin", count=len(some), sha256=64 * "0")
            (tmp_path / shard.file).write_bytes(some.numpy().tobytes())
            shards.append(shard)
        opened = OpenShards(Location(tmp_path), image_bytes=images[0].numel())
        parts.append(Counted(opened, shards, images.shape[1:], digest=name))
    Counted.most = 0
    return Material.of(replace(stored, train_images=parts[0], test_images=parts[1]), 150)


def config_of(*assignments: str) -> EvaluationConfig:
    return read(read_yaml(CONFIGS / "evaluate_digits.yaml"), [*BRIEF, *assignments], quick=False)


def test_some_of_the_images_are_those_of_a_tensor(in_memory: Material, on_disk: Material) -> None:
    index = torch.tensor([5, 0, 1200, 5])
    for one, other in ((in_memory.train, on_disk.train), (in_memory.held_out, on_disk.held_out)):
        some, same = one.take(slice(2, 9)), other.take(slice(2, 9))
        assert isinstance(same.images, ReadImages)
        assert torch.equal(some.images[:], same.images[:])
        assert torch.equal(some.labels, same.labels)
    assert Counted.most == 7  # nothing was read to take some
    assert torch.equal(in_memory.train.images[index], on_disk.train.images[index])
    assert torch.equal(in_memory.train.take(index).images[1:3], on_disk.train.take(index).images[1:3])
    wide = InputConfig(in_channels=3, height=12, width=9, num_classes=10)
    enlarged = resized(on_disk.test.images, wide)
    assert enlarged.shape == (len(on_disk.test), 3, 12, 9)
    assert torch.equal(enlarged[:20], resized(in_memory.test.images[:20], wide))
    parts = list(in_batches(on_disk.test.images, 100))
    assert [len(part) for part in parts] == [100, 100, 100, 60]
    assert torch.equal(torch.cat(parts), in_memory.test.images[:])


@pytest.mark.parametrize("count", [300, 50_000])
def test_patches_are_drawn_as_from_a_tensor(
    in_memory: Material, on_disk: Material, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them, and all that there are."""
    monkeypatch.setattr("jobs.evaluation.rivals.patches.IMAGES_AT_ONCE", 100)
    config = PatchConfig(1, 5, 1, 0, "contrast", 0.1)
    expected = sample_patches(in_memory.train.images[:], config, count, torch.Generator().manual_seed(1))
    found = sampled(on_disk.train.images, config, count, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert Counted.most == 100


@pytest.mark.parametrize("name", ["nsm", "kmeans", "nmf", "autoencoder"])
def test_a_row_has_the_results_of_images_in_memory(
    name: str, in_memory: Material, on_disk: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal accuracies: the same images in the same order, through the same arithmetic."""
    monkeypatch.setattr("jobs.evaluation.rivals.patches.IMAGES_AT_ONCE", 100)
    config, found = config_of("candidates=2"), []
    for material in (in_memory, on_disk):
        [row] = [each for each in rows_of(config, material, material) if each.name == name]
        results, _ = row.run(row.tune(no_progress), 0, no_progress)
        for result in results:
            result.fit_seconds = result.images_per_second = 0.0
        found.append(results)
    assert found[0] == found[1]
    assert 0 < Counted.most <= MOST_AT_ONCE


def test_a_network_has_the_results_of_images_in_memory(in_memory: Material, on_disk: Material) -> None:
    config, found = config_of("candidates=1"), []
    for material in (in_memory, on_disk):
        network = NETWORKS["lenet"]
        result, net = network.evaluate({"10": 0, "all": 0}, material, config, 0)
        found.append((result.accuracy, result.held_out, result.neighbours, net.dense[0].weight.sum().item()))
    assert found[0] == found[1]
    assert 0 < Counted.most <= MOST_AT_ONCE


def test_fine_tuning_has_the_filters_of_images_in_memory(
    in_memory: Material, on_disk: Material, tmp_path: Path
) -> None:
    layer = {"train": {"images": 200, "positions": 4}}
    values = {**read_yaml(CONFIGS / "finetune_digits.yaml"), "layers": [layer, layer]}
    config = parse(FinetuneConfig, values)
    name, found = next(iter(config.networks)), []
    for number, material in enumerate((in_memory, on_disk)):
        trial = Trial.of(config, name, 0, material, tmp_path / f"{number}.safetensors")
        found.append([values for pair in trial.pretrained.filters for values in pair])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert Counted.most == 200
    # 200 images of 64 values, and the 4 × 4 maps that the wider network's 32 channels pass on
    assert held_bytes(config, on_disk)["similarity matching"] == VALUE_BYTES * 200 * (64 + 32 * 16)


@pytest.mark.parametrize("name", ["nsm", "kmeans", "pixels"])
def test_memory_is_what_a_row_allocates(name: str, on_disk: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two; few patches are drawn, because their number does not grow with that of the images."""
    monkeypatch.setattr("jobs.evaluation.rivals.patches.PATCHES", 1000)
    few = [f"stacks.nsm.model.layers.{index}.whiten_patches=500" for index in range(3)]
    config = config_of("candidates=1", "corrupted_images=0", "outlier_images=0", *few)
    [row] = [each for each in rows_of(config, on_disk, None) if each.name == name]
    assert isinstance(row, FeatureRun)
    with LiveBytes() as live:
        features.evaluate(row.row, 0, on_disk, config, 0)
    assert 0.5 < live.peak / row.held_bytes() < 2


def test_the_line_names_the_unit_that_takes_most(in_memory: Material, on_disk: Material) -> None:
    count = 1437 + 360
    assert image_bytes(in_memory) == VALUE_BYTES * 64 * count
    assert image_bytes(on_disk) == 0
    held = {"small": 10, "large": 3_000_000_000}
    line = memory_line(held, on_disk, None, limit=None)
    assert line == "memory: up to 3 GB for 1,797 images; 0 B are images, most of the rest is for large"
    with pytest.raises(ConfigError, match=r"data\.train_images: .* memory of 8 GB, got 9 GB .* 3 units .* for large"):
        memory_line(held, on_disk, limit=8e9, workers=3)
    assert memory_line(held, in_memory, limit=1e10, workers=3).startswith("memory: up to 9 GB")


def test_a_comparison_too_large_for_the_machine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.evaluate.machine_bytes", lambda: 1000)
    arguments = ["--config", str(CONFIGS / "evaluate_digits.yaml"), "--quick", "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: data.train_images: expected a comparison that fits this machine's memory of 1 kB")
    assert written.count("\n") == 1
    assert not (tmp_path / "run").exists()
