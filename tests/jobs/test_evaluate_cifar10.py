"""The comparison on CIFAR-10: rows of one geometry, long learning that differs in length alone, the command, small."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.evaluate import main
from jobs.evaluation.config import read
from jobs.evaluation.rivals import RIVALS
from jobs.options import read_yaml
from tests.own_images import Item, write_parquet

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "evaluate_cifar10.yaml"

SMALL = [
    "data.train_images=90",
    "data.test_images=40",
    "held_out=30",
    "tuning_images=40",
    "budgets=[2]",
    "candidates=1",
    "shape.channels=8",
    "stacks.nsm.model.layers.0.out_channels=8",
    "stacks.nsm_long.model.layers.0.out_channels=8",
    "stacks.nsm.model.layers.0.train.epochs=1",
    "stacks.nsm_long.model.layers.0.train.epochs=1",
    "tracking.enabled=false",
]


def test_rows_have_one_geometry_and_long_learning_differs_in_its_length() -> None:
    config = read(read_yaml(CONFIG), [], quick=False)
    assert set(config.rivals) - set(RIVALS) == {"pixels"}
    short, long = (config.stacks[name].models() for name in ("nsm", "nsm_long"))
    assert len(short) == len(long) == config.candidates
    for one, other in zip(short, long, strict=True):
        [layer], [longer] = one.layers, other.layers
        shape = (layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        assert shape == (config.shape.channels, config.shape.kernel_size, config.shape.stride, config.shape.padding)
        assert shape == (256, 6, 1, 0)
        for each, visits in ((layer, 5000), (longer, 20_000)):
            assert each.train.images is not None
            assert each.train.images <= config.tuning_images  # as long on the images that settings are chosen with
            assert each.train.images * each.train.epochs == visits
        slower = {"lr_decay_steps": 400}
        assert layer.plasticity.lr_decay_steps == 100
        assert longer.plasticity == layer.plasticity.model_copy(update=slower)
        assert longer.model_copy(update={"train": layer.train, "plasticity": layer.plasticity}) == layer


def jpegs(count: int, seed: int) -> list[Item]:
    """Noise of ten mean colours, stored as JPEG."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(9).integers(40, 216, (10, 3))
    some = []
    for index in range(count):
        file = io.BytesIO()
        pixels = (colours[index % 10] + generator.integers(-40, 40, (32, 32, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        some.append((f"{index}.jpg", index % 10, file.getvalue()))
    return some


@pytest.mark.slow
def test_the_command_measures_ridge_alone(tmp_path: Path) -> None:
    for part, count in (("train", 90), ("test", 40)):
        write_parquet(
            tmp_path / "images" / f"{part}-00000-of-00001.parquet", jpegs(count, count), names=list("abcdefghij")
        )
    sets = [word for each in (f"data.path={tmp_path / 'images'}", *SMALL) for word in ("--set", each)]
    command = ["--config", str(CONFIG), "--quick", "--run-dir", str(tmp_path / "run"), "--threads", "1", *sets]
    assert main(command) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "run" / "results").glob("*.json")}
    config = read(read_yaml(CONFIG), [], quick=True)
    assert set(found) == {f"{name}-0" for name in (*config.stacks, *config.rivals)}
    for name, each in found.items():
        assert set(each["accuracy"]) == set(each["held_out"]) == {"2", "all"}, name
        assert each["features"] == (3 * 32 * 32 if name == "pixels-0" else 8 * 4 * 4), name
        assert (each["kernel"], each["logistic"], each["neighbours"]) == ({}, None, None), name
    sparse, dense = found["kmeans_sparse-0"], found["kmeans-0"]
    assert sparse["parameters_trained"] == dense["parameters_trained"]
    assert sparse["active_fraction"][0] < dense["active_fraction"][0]
