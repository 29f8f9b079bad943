"""Bad input: one line that names it, exit status 2, no run directory, no Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs.pretrain
import jobs.training_job
from cluster.checkpoints.committer import commit
from cluster.checkpoints.manifest import FORMAT, Cursor, LayerState, Manifest
from cluster.checkpoints.shard_writer import write_shard
from cluster.config import RunConfig
from simmatch.data.sources import Dataset
from simmatch.sharding.rows import split_rows
from tests.image_files import IDX_FILES, idx_bytes

Refuse = Callable[..., str]


def _no_ray(cpus: int) -> str:
    raise AssertionError("Ray was about to start")


@pytest.fixture
def refuse(
    digits_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """(arguments) → the one line on stderr, once everything that must hold of a refusal has been checked."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(jobs.training_job, "start_ray", _no_ray)

    def call(*arguments: str) -> str:
        before = sorted(folder.rglob("*")), "ray" in sys.modules
        given = () if "--config" in arguments else ("--config", str(digits_yaml))
        assert jobs.pretrain.main([*given, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert (sorted(folder.rglob("*")), "ray" in sys.modules) == before
        return err.removeprefix("error: ").rstrip()

    return call


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "mesh.chanel=2",
            "mesh.chanel: unknown key; expected one of channel, data, layer; got 'chanel'; did you mean 'channel'?",
        ),
        ("model.layers.0.out_chanels=8", "got 'out_chanels'; did you mean 'out_channels'?"),
        ("model.layers.1.train.epoch=8", "got 'epoch'; did you mean 'epochs'?"),
        ("seed=abc", "seed: expected a"),
        ("seed=1.5", "integer, got 1.5"),
        ("seed=true", "integer, got True"),
        ("log_every='5'", "log_every: expected a"),
        ("model=3", "model: expected a"),
        ("model.layers=5", "model.layers: expected a"),
        ("model.layers.0=5", "model.layers.0: expected a"),
        ("model.layers=[]", "model.layers: expected"),
        ("data=null", "data: expected a"),
        ("model.layers.0.out_channels=-3", "model.layers.0.out_channels: expected greater than 0, got -3"),
        ("model.layers.0.out_channels=0", "model.layers.0.out_channels: expected greater than 0, got 0"),
        ("model.layers.0.train.batch_size=0", "model.layers.0.train.batch_size: expected greater than 0, got 0"),
        ("model.layers.0.padding=-1", "model.layers.0.padding: expected greater than or equal to 0, got -1"),
        ("model.layers.0.plasticity.tau=-0.5", "model.layers.0.plasticity.tau: expected greater than 0, got -0.5"),
        ("model.layers.0.plasticity.tau=.nan", "model.layers.0.plasticity.tau: expected"),
        ("model.layers.0.plasticity.tau=0.05", "expected lr / tau at most 1, got lr=0.1 with tau=0.05"),
        ("mesh.channel=0", "mesh.channel: expected greater than 0, got 0"),
        ("mesh.channel=17", "mesh.channel: expected at most 16, the out_channels of model.layers.0, got 17"),
        ("cluster.min_shards=3", "cluster.min_shards: expected at most mesh.channel=2, got 3"),
        (
            "mesh.layer=2",
            "mesh.layer: expected at most 1, as layers learn one after the other (model.schedule: greedy), got 2; the "
            "nearest mesh that fits is data 1 × layer 1 × channel 2",
        ),
        (
            "mesh.data=51",
            "mesh.data: expected at most 50, the images of a batch of model.layers.0, got 51; the nearest mesh that "
            "fits is data 50 × layer 1 × channel 2",
        ),
        ("data.train_images=30 --set mesh.data=40", "mesh.data: expected at most 30, the images of a batch of"),
        ("mesh.data=2 --set cluster.min_shards=1", "cluster.min_shards: expected none with data 2 × layer 1 × channel"),
        (
            "reduce=exact",
            "reduce: expected fast with model.layers.0.dynamics.exchange: every_iteration, got exact, which needs "
            "gather_state",
        ),
        (
            "model.layers.0.kernel_size=11",
            "model.layers.0.kernel_size: expected at most 10 for images of 8 × 8 with padding 1, got 11",
        ),
        (
            "model.layers.0.train.positions=65",
            "model.layers.0.train.positions: expected at most 64, the map of 8 × 8 activities, got 65",
        ),
        (
            "model.layers.1.train.positions=2",
            "model.layers.1.train.positions: expected at most 1, the map of 1 × 1 activities, got 2",
        ),
        ("model.layers.0.train.positions=0", "model.layers.0.train.positions: expected greater than 0, got 0"),
        ("model.layers.0.pool=9", "model.layers.0.pool: expected at most 8, the map of activities, got 9"),
        ("model.layers.1.supervised=false", "expected supervised: true with label_gain=100, got supervised: false"),
        ("data.name=digit", "data.name: expected one of cifar10, digits, fashion_mnist, mnist, got 'digit'; did you"),
        ("data.train_images=1438", "data.train_images: expected at most 1437, got 1438"),
        ("data.test_images=361", "data.test_images: expected at most 360, got 361"),
        ("model.layers.0.train.images=5000", "model.layers.0.train.images: expected 1 to 1437 images per epoch, got"),
        ("name=a/b", "name: expected"),
        ("device=tpu", "device: expected 'cpu' or 'cuda', got 'tpu'"),
        ("tracking.uri=nonsense", "tracking.uri: expected a URI of scheme http, https, sqlite"),
        ("tracking.uri='http://'", "tracking.uri: expected http://HOST[:PORT], got 'http://'"),
        ("tracking.uri='https://ada:secret@:80'", "tracking.uri: expected https://HOST[:PORT], got 'https://***@:80'"),
        ("tracking.uri='sqlite://'", "tracking.uri: expected sqlite:///PATH, got 'sqlite://'"),
        ("seed", "--set: expected dotted.key=value, got 'seed'"),
        ("seed=[", "--set seed: expected a YAML value, got '['"),
        ("model.layers.2.pool=1", "--set model.layers.2: expected a number from 0 to 1, got '2'"),
    ],
)
def test_a_wrong_value_is_named(refuse: Refuse, assignment: str, message: str) -> None:
    assert message in refuse(*f"--set {assignment}".split(" ") if "--set" in assignment else ("--set", assignment))


@pytest.mark.parametrize(
    ("start_after", "message"),
    [
        (29, "model.layers.1.train.start_after: expected less than 29, the updates of the pass, got 29"),
        (-1, "model.layers.1.train.start_after: expected greater than or equal to 0, got -1"),
    ],
)
def test_a_layer_that_would_begin_after_the_end_is_refused(refuse: Refuse, start_after: int, message: str) -> None:
    """1,437 images by 50."""
    values = (
        "model.schedule=together",
        "model.layers.1.train.epochs=1",
        f"model.layers.1.train.start_after={start_after}",
    )
    assert refuse(*(word for value in values for word in ("--set", value))) == message


def test_devices_that_this_machine_lacks_are_refused_before_anything_starts(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks; no CUDA in this build, no card, one card."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert refuse("--set", "device=cuda").endswith("has no CUDA")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "got 'cuda': torch sees no CUDA device" in refuse("--set", "device=cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refuse("--set", "device=cuda") == "mesh: expected a GPU for each of 2 ranks, got 1 on this machine"
    assert refuse("--set", "device=cuda:1") == "device: expected 'cpu' or 'cuda', got 'cuda:1'"
    assert refuse("--set", "mesh.channel=0.5") == "mesh.channel: expected an integer, got 0.5"


def test_all_faults_are_told_at_once(refuse: Refuse) -> None:
    message = refuse("--set", "seed=-1", "--set", "mesh.channel=x", "--set", "sed=1")
    for part in ("seed: expected", "mesh.channel: expected", "sed: unknown key"):
        assert part in message


def test_the_keys_of_a_mapping_are_listed_once(refuse: Refuse) -> None:
    """Such as with the configuration of another job."""
    wrong = ("sedd=1", "zzz=1", "mesh.zzz=1", "mesh.chanel=2", "model.layers.0.zzz=1", "model.layers.1.zzz=1")
    message = refuse(*(word for each in wrong for word in ("--set", each)))
    assert message.count("; expected one of") == 3  # of the run, of mesh, and of layers
    assert message.endswith("; zzz: unknown key; got 'zzz'")
    assert "mesh.chanel: unknown key; got 'chanel'; did you mean 'channel'?" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--config: expected a YAML file, got {path}, which does not exist"),
        ("model: [1\n", "--config: expected YAML in {path}, got: line 2, column 1: while parsing a flow sequence"),
        ("- digits\n", "--config: expected a mapping (key: value) in {path}, got ['digits']"),
        ("", "--config: expected a mapping (key: value) in {path}, got nothing"),
        ("name: x\n", "data: expected a value, got nothing; model: expected a value, got nothing"),
        ("1: 2\n", "1: expected"),
    ],
)
def test_a_configuration_file_that_is_none(refuse: Refuse, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    assert message.format(path=path) in refuse("--config", str(path))


@pytest.mark.parametrize("place", ["file", "file/below", "", "x" * 300])
def test_a_run_directory_that_cannot_be(refuse: Refuse, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    message = refuse("--run-dir", str(tmp_path / place) if place else "")
    assert message.startswith("--run-dir: expected a folder")


# -- data --------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, images: np.ndarray, labels: list[int]) -> tuple[str, ...]:
    """MNIST's four files, training and test alike; returns what points a run at them."""
    folder.mkdir()
    for file in IDX_FILES:
        content = images if "images" in file else np.array(labels, np.uint8)
        (folder / file).write_bytes(idx_bytes(content))
    return ("--set", "data.name=mnist", "--set", f"data.root={folder}")


def test_files_that_are_nowhere(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMMATCH_DATA", str(tmp_path / "env"))
    message = refuse("--set", "data.name=mnist")
    parts = ("mnist: no files found", f"$SIMMATCH_DATA ({tmp_path / 'env'}: no such folder)", "make data DATASET=mnist")
    for part in (*parts, f"working directory ({tmp_path / 'work' / 'data'}", "set data.root or $SIMMATCH_DATA"):
        assert part in message


@pytest.mark.parametrize("root", ["absent", "~nobody-of-that-name/data"])
def test_a_root_that_is_none(refuse: Refuse, root: str) -> None:
    message = refuse("--set", "data.name=mnist", "--set", f"data.root={root}")
    assert f"looked in data.root ({root}: no such folder)" in message


def test_a_label_outside_the_classes(refuse: Refuse, tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8), np.uint8)
    arguments = write_images(tmp_path / "data", images, [0, 1, 2, 3, 11, 5])
    assert refuse(*arguments) == "mnist train: expected labels 0 to 9, got 11 at index 4"


def test_a_pixel_that_is_not_a_number(refuse: Refuse, tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8), np.float32)
    images[3, 2, 1] = np.nan
    arguments = write_images(tmp_path / "data", images, [0] * 6)
    assert refuse(*arguments) == "mnist train: expected values in [0, 1], got nan in image 3 at [0, 2, 1]"


def test_fewer_labels_than_images(refuse: Refuse, tmp_path: Path) -> None:
    arguments = write_images(tmp_path / "data", np.zeros((6, 8, 8), np.uint8), [0] * 5)
    assert refuse(*arguments) == "mnist train: expected one label per image, got 6 images and 5 labels"


def test_a_file_cut_short(refuse: Refuse, tmp_path: Path) -> None:
    arguments = write_images(tmp_path / "data", np.zeros((6, 8, 8), np.uint8), [0] * 6)
    path = tmp_path / "data" / IDX_FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: expected 384 bytes after the header" in refuse(*arguments)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, config: RunConfig, channels: int = 16, data: str | None = None) -> str:
    """A checkpoint of two shards with this configuration and a first layer of so many channels."""
    shards = []
    for rank, rows in enumerate(split_rows(channels, 2)):
        name = "layers.0.feedforward"
        shards.append(write_shard(folder, rank, 2, {name: torch.zeros(rows.count, 1, 3, 3)}, {name: rows}))
    manifest = Manifest(
        cursor=Cursor(step=20, layer=0, updates=20),
        config=config.model_dump(mode="json"),
        layers=[LayerState(usual=1.0)],
        shards=shards,
        data=data,
    )
    commit(folder, manifest)
    return str(folder)


def test_a_checkpoint_of_another_shape(refuse: Refuse, tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    other = make_config("model.layers.0.out_channels=32")
    message = refuse("--resume", write_checkpoint(tmp_path / "step", other, 32))
    assert f"{tmp_path / 'step'} belongs to another configuration" in message
    assert "model.layers.0.out_channels: expected 32, got 16" in message


def test_a_checkpoint_whose_tensors_are_not_its_configurations(
    refuse: Refuse, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    message = refuse("--resume", write_checkpoint(tmp_path / "step", make_config(), 12))
    assert message == f"{tmp_path / 'step'}: expected 16 channels in layers.0.feedforward, got 12"


def test_a_checkpoint_of_other_data(
    refuse: Refuse, tmp_path: Path, make_config: Callable[..., RunConfig], digits: Dataset
) -> None:
    """The files of the data set have changed since, or this machine has others."""
    folder = write_checkpoint(tmp_path / "step", make_config(), data="0123456789abcdef")
    assert refuse("--resume", folder) == (
        f"--resume: {folder}: digits on {socket.gethostname()}: expected the data of this run, 0123456789abcdef, got "
        f"{digits.digest()}: 1437 + 360 images, 0 damaged left out"
    )


@pytest.mark.parametrize("fault", ["shard", "missing shard", "manifest", "format", "nothing"])
def test_a_damaged_checkpoint(
    refuse: Refuse, tmp_path: Path, make_config: Callable[..., RunConfig], fault: str
) -> None:
    folder = tmp_path / "step"
    write_checkpoint(folder, make_config())
    shard, manifest = folder / "rank-1-of-2.safetensors", folder / "manifest.json"
    if fault == "shard":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    elif fault == "missing shard":
        shard.unlink()
    elif fault == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif fault == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    else:
        manifest.unlink()
    message = refuse("--resume", str(folder))
    assert {
        "shard": f"{shard}: expected sha256 ",
        "missing shard": f"{shard}: expected the file that the manifest names, found none",
        "manifest": f"{manifest}: expected a manifest",
        "format": f"{manifest}: expected format {FORMAT}, got 99",
        "nothing": f"--resume: expected auto, never, a run directory or a checkpoint, got {folder}",
    }[fault] in message


# -- from the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "mesh.chanel=2"), "did you mean 'channel'?"),
        (("--set", "mesh.channel=17"), "mesh.channel: expected at most 16"),
    ],
)
def test_status_and_message_of_the_process(
    digits_yaml: Path, environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", "--config", str(digits_yaml), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert os.listdir(tmp_path) == []
