"""`python -m jobs.prepare`: own images to shards by Ray tasks, interrupted, repeated, and beside each other.

Oracle: the same images loaded into memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs.prepare
import jobs.pretrain
from simmatch.data.config import DataConfig
from simmatch.data.preparation import LOCK, in_threads
from simmatch.data.shards import MANIFEST
from simmatch.data.sources import load_dataset
from simmatch.files import locked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RUN = """\
name: photos
seed: 1
data: {path: PATH, test_fraction: 0.25}
model: {layers: [{out_channels: 4, kernel_size: 3, pool: 2, train: {batch_size: 20}}]}
probe: {readout: ridge}
tracking: {enabled: false}
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty grey images of two classes, and a configuration for them."""
    generator = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "photos" / f"class{index % 2}" / f"{index:03d}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 16 16 255 " + generator.integers(0, 256, 256, dtype=np.uint8).tobytes())
    (tmp_path / "run.yaml").write_text(RUN.replace("PATH", str(tmp_path / "photos")))
    return tmp_path / "photos"


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> list[str]:
    return ["--config", str(tmp_path / "run.yaml")]


def test_a_place_that_cannot_be_written_is_named(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.prepare.main([*config, "--out", "/proc/shards"]) == 2
    expected = "expected a folder that can be written, got /proc/shards: No such file or directory"
    assert capsys.readouterr().err == f"error: --out: {expected}\n"
    (tmp_path / "file").touch()
    assert jobs.prepare.main([*config, "--out", str(tmp_path / "file" / "shards")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out: {tmp_path}/file/shards")
    assert "Not a directory" in error
    assert error.count("\n") == 1


def test_prepare_then_train_without_the_source(
    photos: Path, config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = load_dataset(DataConfig(path=str(photos), test_fraction=0.25))
    out = str(tmp_path / "prepared")
    other = photos / "class0" / "998.pgm"
    other.write_bytes(b"P5 2 2 255 abcd")
    assert jobs.prepare.main([*config, "--out", out, "--workers", "2"]) == 2  # what a task raises
    error = capsys.readouterr().err
    assert "expected images of one size, got 16 × 16 in " in error
    assert error.count("\n") == 1
    other.unlink()
    assert jobs.prepare.main([*config, "--out", out, "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    assert "prepare 40/40" in shown
    assert "prepared: photos: 30 training and 10 test images [1, 16, 16]" in shown
    assert f"to use it: --set data.path={out}" in shown
    data = load_dataset(DataConfig(path=out))
    assert torch.equal(data.train_images[:], memory.train_images)
    assert torch.equal(data.test_labels, memory.test_labels)

    shutil.rmtree(photos)
    started = time.monotonic()
    assert jobs.prepare.main([*config, "--out", out]) == 0  # it is all there: no listing, no Ray
    assert time.monotonic() - started < 5
    assert "prepared: photos" in capsys.readouterr().out
    run = [*config, "--set", f"data.path={out}", "--run-dir", str(tmp_path / "run")]
    assert jobs.pretrain.main([*run, "--set", "data.order=blocks"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.path=null", "data.test_fraction=null", "data.name=digits"], "data.path: expected own images"),
        (["data.path=/nowhere"], "data.path: /nowhere: no such folder"),
        (["data.sise=3"], "data.sise: unknown key"),
        (["data.size=0"], "data.size"),
    ],
)
def test_bad_input_is_one_line(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], assignments: list[str], message: str
) -> None:
    more = [word for assignment in assignments for word in ("--set", assignment)]
    assert jobs.prepare.main([*config, *more, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_named(
    photos: Path,
    config: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs.prepare, "start_ray", lambda cpus, limit_s: "threads")
    monkeypatch.setattr(jobs.prepare, "OnRay", lambda workers: in_threads)
    (photos / "class1" / "007.pgm").write_bytes(b"P5 16 16 255 short")
    out = str(tmp_path / "prepared")
    assert jobs.prepare.main([*config, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "007.pgm: cannot be decoded" in error
    assert "; data.damaged: skip leaves such images out" in error
    assert not Path(out, MANIFEST).exists()
    assert jobs.prepare.main([*config, "--out", out, "--set", "data.damaged=skip"]) == 0
    assert "1 damaged image left out" in capsys.readouterr().out


def test_two_that_prepare_the_same_folder_at_once(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prepared"
    out.mkdir()
    with locked(out / LOCK, 0.0):
        assert jobs.prepare.main([*config, "--out", str(out)]) == 2
    assert f"--out: expected a folder that nobody else prepares, got {out}" in capsys.readouterr().err


KILLED = """\
import sys
import simmatch.data.shards
simmatch.data.shards.SHARD_BYTES = 256  # an image each
import jobs.prepare
from simmatch.data.preparation import in_threads
jobs.prepare.start_ray = lambda cpus, limit_s: "threads"
jobs.prepare.OnRay = lambda workers: in_threads
sys.exit(jobs.prepare.main(sys.argv[1:]))
"""


def test_killed_in_the_middle_it_goes_on(
    photos: Path, config: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "prepared"
    command = [sys.executable, "-c", KILLED, *config, "--out", str(out)]
    process = subprocess.Popen(command, env=environment, cwd=Path(jobs.prepare.__file__).parents[1])
    deadline = time.monotonic() + 120
    while len(list(out.glob("parts/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert len(kept) >= 5
    assert not (out / MANIFEST).exists()
    done = subprocess.run(command, env=environment, cwd=Path(jobs.prepare.__file__).parents[1], check=False)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    memory = load_dataset(DataConfig(path=str(photos), test_fraction=0.25))
    data = load_dataset(DataConfig(path=str(out)))
    assert torch.equal(data.train_images[:], memory.train_images)
    assert os.listdir(out / "parts") != []
