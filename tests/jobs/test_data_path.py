"""Own images through the entry points: planned, trained, read out; what needs labels refuses images without."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jobs.evaluate
import jobs.finetune
import jobs.pretrain
from cluster.config import RunConfig
from cluster.messages import Outbox, ReadoutScored, TrainingWarning
from cluster.training import Assignment, Training
from jobs.preflight import check
from simmatch.config import parse
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset
from simmatch.sharding.mesh import Mesh
from tests.exchanges import of_type

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "jobs" / "configs" / "own_images.yaml"


def as_folder(folder: Path, every: int = 1) -> Path:
    """The digits as PNG files, in folders of their classes; all but one in `every` lie beside them, without a label."""
    digits = load_dataset(DataConfig(name="digits", train_images=240, test_images=60))
    for part, images, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("test", digits.test_images, digits.test_labels),
    ):
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = folder / part / (str(label) if index % every == 0 else "") / f"{index:04d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image[0]).round().byte().numpy()).save(place)
    return folder


def own(config: RunConfig, **data: object) -> RunConfig:
    return parse(RunConfig, config.model_dump(mode="json") | {"data": data})


def read_out(config: RunConfig, run_dir: Path) -> tuple[ReadoutScored, list[TrainingWarning]]:
    outbox = Outbox()
    with torch.no_grad():
        Training(Assignment(config, run_dir, 0), Mesh(), outbox, torch.device("cpu")).run()
    messages = outbox.messages
    [scored] = of_type(messages, ReadoutScored)
    return scored, of_type(messages, TrainingWarning)


def test_images_in_files_are_learnt_as_the_same_images_in_memory(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Oracle: the digits, which scikit-learn holds; the order of the images differs, and they are rounded to 8 bits."""
    short = ["model.layers.1.train.epochs=2", "mesh.channel=1", "data.train_images=240", "data.test_images=60"]
    config = make_config(*short)
    files = own(config, path=str(as_folder(tmp_path / "digits")))
    assert check(files).num_classes == 10
    expected, _ = read_out(config, tmp_path / "a")
    scored, warnings = read_out(files, tmp_path / "b")
    assert warnings == []
    assert expected.accuracy is not None
    assert expected.accuracy_decode is not None
    assert scored.accuracy == pytest.approx(expected.accuracy, abs=0.08)
    assert scored.accuracy_decode == pytest.approx(expected.accuracy_decode, abs=0.12)


def test_images_without_labels_count_neither_in_readouts_nor_in_their_accuracy(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = own(make_config("mesh.channel=1"), path=str(as_folder(tmp_path / "digits", every=2)), labels=True)
    dataset = check(config)
    assert int((dataset.train_labels < 0).sum()) == 120
    scored, warnings = read_out(config, tmp_path / "run")
    assert warnings == []
    assert scored.accuracy is not None
    assert scored.accuracy_decode is not None
    assert scored.accuracy > 0.7
    assert scored.accuracy * 30 == pytest.approx(round(scored.accuracy * 30))  # of the 30 that have a label


def test_no_labels_at_all(
    make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer learns; there is no readout; supervised layers and comparisons refuse, before anything starts."""
    folder = as_folder(tmp_path / "digits")
    layers = [make_config().model.layers[0].model_dump(mode="json")]
    values = make_config("mesh.channel=1").model_dump(mode="json")
    values["model"]["layers"] = layers
    config = own(parse(RunConfig, values), path=str(folder), labels=False)
    scored, warnings = read_out(config, tmp_path / "run")
    assert (scored.accuracy, scored.accuracy_decode) == (None, None)
    assert [warning.text for warning in warnings] == ["the logistic readout is left out: no training image has a label"]

    data = f"data={{path: {folder}, labels: false}}"
    digits = str(ROOT / "jobs/configs/digits.yaml")
    assert jobs.pretrain.main(["--config", digits, "--set", data, "--run-dir", str(tmp_path / "a")]) == 2
    assert "error: model.layers.1.supervised: expected false, as no training image" in capsys.readouterr().err
    for job, file in ((jobs.evaluate, "evaluate_digits.yaml"), (jobs.finetune, "finetune_digits.yaml")):
        options = ["--config", str(ROOT / "jobs/configs" / file), "--set", data, "--run-dir", str(tmp_path / "b")]
        assert job.main(options) == 2
        assert (
            "error: data: expected a label of each training image of digits, got none of 240" in capsys.readouterr().err
        )
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_dry_run_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_folder(tmp_path / "digits")
    data = f"data={{path: {folder}, size: [12, 16], channels: 3}}"
    assert jobs.pretrain.main(["--config", str(OWN), "--set", data, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "digits: folder, 240 training images, 60 test images (by their names), 10 classes, 300 images labelled" in out
    )
    assert "3×12×16" in out


def test_decoding_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(file, "PNG")
    (tmp_path / "blank").mkdir()
    for index in range(1400):
        (tmp_path / "blank" / f"{index}.png").write_bytes(file.getvalue())
    data = f"data={{path: {tmp_path / 'blank'}, test_fraction: 0.1, labels: false}}"
    assert jobs.pretrain.main(["--config", str(OWN), "--set", data, "--dry-run"]) == 0
    assert "decode 500/1260" in capsys.readouterr().out
