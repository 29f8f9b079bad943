"""Signals through the entry points: planned, learnt from, read out, exported and drawn; the same on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

import jobs.benchmark
import jobs.pretrain
from cluster.config import RunConfig
from cluster.messages import Outbox, ReadoutScored
from cluster.training import Assignment, Training
from jobs.benchmarks import windows
from jobs.options import override, read_yaml
from jobs.preflight import check
from simmatch.config import parse
from simmatch.data.sources import load_dataset
from simmatch.fit import Trainer
from simmatch.model import Stack, load_model
from simmatch.parts import PARTS
from simmatch.sharding.mesh import Mesh
from tests.exchanges import meshes, of_type, results, run_meshes

BEARINGS = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "bearings.yaml"

SHORT = [
    "data.window=64",
    "data.hop=16",
    "model.layers.0.out_channels=16",
    "model.layers.0.kernel_size=[1, 16]",
    "model.layers.0.whiten_ridge=1.0",
    "model.layers.0.train={images: 300, epochs: 3, batch_size: 20, positions: 8}",
    "encode_batch=50",
]


def sine(period: float, generator: np.random.Generator, samples: int = 1000) -> np.ndarray[Any, Any]:
    return np.sin(2 * np.pi * np.arange(samples) / period) + 0.2 * generator.normal(size=samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two loads to learn from and one to test with; a fault is a tone, a little faster with every load."""
    place = tmp_path_factory.mktemp("bearings")
    generator = np.random.default_rng(0)
    for load in range(3):
        tones = {"A_07": 10.0, "B_07": 6.0, "C_07": 4.0}
        np.savez(
            place / f"load{load}.npz", **{name: sine(tone - 0.1 * load, generator) for name, tone in tones.items()}
        )
    return place


def config_of(folder: Path, *assignments: str) -> RunConfig:
    data = [f"data.path={folder}/load{{0,1}}.npz", f"data.test_path={folder}/load2.npz"]
    return parse(RunConfig, override(read_yaml(BEARINGS), [*data, *SHORT, *assignments]))


def test_windows_are_learnt_and_read_out(folder: Path, tmp_path: Path) -> None:
    """Oracle: tones that differ are told apart, by filters of no more than two periods."""
    config = config_of(folder, "mesh.channel=1")
    dataset = check(config)
    assert dataset.train_images.shape == (6 * 59, 1, 1, 64)
    outbox = Outbox()
    with torch.no_grad():
        Training(Assignment(config, tmp_path, 0), Mesh(), outbox, torch.device("cpu")).run()
    [scored] = of_type(outbox.messages, ReadoutScored)
    assert scored.accuracy is not None
    assert scored.accuracy > 0.95


@pytest.mark.parametrize("exchange", ["every_iteration", "block", "gather_state"])
@pytest.mark.parametrize("layout", [{"owners": 2}, {"replicas": 2}], ids=str)
def test_ranks_learn_what_one_rank_does(folder: Path, exchange: str, layout: dict[str, int]) -> None:
    """In float64, to a residual of 1e-10: weights agree to that times the condition of M, below 1e4."""
    dynamics = f"{{exchange: {exchange}, tolerance: 1.0e-10, max_iterations: 20000}}"
    second = "{out_channels: 6, kernel_size: full, supervised: true, label_gain: 1.0, dynamics: %s}" % dynamics  # noqa: UP031
    config = config_of(folder, f"model.layers.0.dynamics={dynamics}", "model.layers.0.pool=[1, 3]")
    model = override(config.model.model_dump(mode="json"), [])
    model["layers"] = [*model["layers"], read_text(second)]
    shape = parse(type(config.model), model)
    dataset = load_dataset(config.data)

    def train(mesh: Mesh) -> dict[str, torch.Tensor]:
        stack = Stack(shape, dataset.source, dtype=torch.float64)
        Trainer(stack, dataset.train_images, dataset.train_labels, mesh=mesh, encode_batch=50).fit()
        return stack.state_dict()

    one = train(Mesh())
    for state in results(run_meshes(meshes(**layout), train)):
        for name in ("layers.0.feedforward", "layers.0.lateral", "layers.1.feedforward", "layers.1.label"):
            torch.testing.assert_close(state[name], one[name], rtol=0, atol=1e-6)


def read_text(text: str) -> Any:
    return override({}, [f"value={text}"])["value"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_on_two_ranks_leaves_a_model_of_signals(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assignments = [
        f"data.path={folder}/load{{0,1}}.npz",
        f"data.test_path={folder}/load2.npz",
        *SHORT,
        "tracking.uri=null",
    ]
    arguments = ["--config", str(BEARINGS), "--run-dir", str(tmp_path / "run")]
    for assignment in assignments:
        arguments += ["--set", assignment]
    assert jobs.pretrain.main([*arguments, "--dry-run"]) == 0
    assert "6 training and 3 test recordings" in " ".join(capsys.readouterr().out.split())
    assert jobs.pretrain.main(arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"] > 0.95
    model = load_model(tmp_path / "run" / "model")
    images = load_dataset(config_of(folder).data).test_images[:5]
    assert model(images).shape == (5, 16, 1, 13)
    assert model.features(images).shape == (5, 16)
    assert (tmp_path / "run" / "figures" / "filters-layer-0.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_benchmark_compares_one_readout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: scikit-learn's ridge classifier on the spectrum, and on torch's own convolution with ReLU."""
    monkeypatch.setattr(windows, "WARM", 2)
    monkeypatch.setattr(windows, "UPDATES", 3)
    monkeypatch.setattr(windows, "KERNEL", 16)
    config = config_of(folder)
    words = ["signals", "--quick", "--run-dir", str(tmp_path), "--config", str(BEARINGS)]
    places = [f"data.path={config.data.path}", f"data.test_path={config.data.test_path}"]
    for assignment in [*places, *SHORT, "data.hop=8"]:
        words += ["--set", assignment]
    assert jobs.benchmark.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    accuracy = {row["row"]: row["accuracy"] for row in rows if row["kind"] == "accuracy"}
    assert set(accuracy) == {"similarity matching", "random", "random, whitened", "spectrum"}
    dataset = load_dataset(config_of(folder, "data.hop=8").data)
    spectra = [np.abs(np.fft.rfft(images[:][:, 0, 0])) for images in (dataset.train_images, dataset.test_images)]
    scale = StandardScaler().fit(spectra[0])
    ridge = RidgeClassifier(alpha=0.01 * len(spectra[0])).fit(scale.transform(spectra[0]), dataset.train_labels)
    expected = ridge.score(scale.transform(spectra[1]), dataset.test_labels)
    assert accuracy["spectrum"] == pytest.approx(expected, abs=1 / len(spectra[1]))
    speed = [row for row in rows if row["kind"] == "speed"]
    assert [row["solver"] for row in speed] == ["coordinate_descent", "accelerated"]
    for row in speed:
        assert row["windows_per_second"] == pytest.approx(1e6 / row["update_us"], rel=0.5)
    parts = [row for row in rows if row["kind"] == "part"]
    assert all(0.9 < sum(row[name] for name in PARTS if name in row) <= 1.001 for row in parts)
