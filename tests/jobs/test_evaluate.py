"""The comparison as a person runs it, small: the table, its files, its record, and going on where it stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from socket import gethostname
from typing import Any

import psutil
import pytest
import torch
import yaml

from cluster.tracking.config import TrackingConfig
from cluster.tracking.tracker import Tracker
from jobs.evaluate import main
from jobs.evaluation.config import read
from jobs.evaluation.material import Labelled, Material
from jobs.evaluation.ray_units import _prepared
from jobs.evaluation.resume import identity, write_identity
from jobs.evaluation.rows import FeatureRun, NetworkRun, only, rows_of
from jobs.evaluation.stacks import StackLearner
from jobs.options import read_yaml
from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset, load_dataset
from simmatch.model import InputConfig

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "evaluate_digits.yaml"
FASHION = CONFIG.with_name("evaluate_fashion_mnist.yaml")
DEPTH = CONFIG.with_name("evaluate_depth.yaml")
CIFAR = CONFIG.with_name("evaluate_cifar10.yaml")

SMALL = [
    "data.train_images=400",
    "data.test_images=150",
    "held_out=60",
    "seeds=[0]",
    "budgets=[5]",
    "tuning_images=150",
    "corrupted_images=10",
    "outlier_images=100",
    "outlier_shares=[0.05]",
    "rivals=[kmeans, pixels]",
    "networks=[]",
    "stacks.nsm.model.layers.0.train.epochs=1",
    "tracking.enabled=false",
]


def arguments(run_dir: Path, *more: str) -> list[str]:
    """Of a small evaluation."""
    sets = [word for assignment in (*SMALL, *more) for word in ("--set", assignment)]
    return ["--config", str(CONFIG), "--run-dir", str(run_dir), "--threads", "1", *sets]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(arguments(folder)) == 0
    return folder


def results(run_dir: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((run_dir / "results").glob("*.json"))}


@pytest.mark.slow
def test_every_row_has_its_result(run_dir: Path) -> None:
    found = results(run_dir)
    assert sorted(found) == ["kmeans-0", "nsm_1-0", "nsm_2-0", "nsm_decode-0", "pixels-0"]
    decoded = found.pop("nsm_decode-0")
    assert decoded["decode"] > 0.5
    assert len(decoded["active_fraction"]) == 3
    assert not decoded["accuracy"]
    for cost in ("operations", "parameters_trained", "fit_seconds"):  # each row has what its layers take
        assert found["nsm_1-0"][cost] < found["nsm_2-0"][cost] < decoded[cost], cost
    for name, each in found.items():
        assert each["decode"] is None
        assert set(each["accuracy"]) == {"5", "all"} == set(each["kernel"]), name
        assert set(each["held_out"]) == {"5", "all", "kernel 5", "kernel all", "logistic"}, name
        assert each["kernel"]["all"] > 0.5, name
        assert each["logistic"] > 0.5, name
        assert 0.1 < each["accuracy"]["5"] <= 1, name
        assert len(each["corruptions"]) == 16, name
        assert set(each["outliers"]) == {"0", "0.05"}, name
    assert found["nsm_1-0"]["accuracy"]["all"] > found["pixels-0"]["accuracy"]["all"]
    assert len(found["nsm_2-0"]["active_fraction"]) == 2


@pytest.mark.slow
def test_tables_and_figures(run_dir: Path) -> None:
    text = (run_dir / "table.md").read_text()
    for name in ("nsm_1", "nsm_2", "kmeans", "pixels"):
        assert f"| {name} |" in text
    figures = {path.name for path in (run_dir / "figures").glob("*.png")}
    assert {"label-efficiency.png", "corruptions.png", "corrupted-images.png", "activations-nsm.png"} <= figures
    assert {f"filters-nsm-layer-{index}.png" for index in range(3)} <= figures


@pytest.mark.slow
def test_a_second_call_computes_what_is_missing_and_nothing_else(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "results").glob("*.json")}
    lost = run_dir / "results" / "kmeans-0.json"
    known = json.loads(lost.read_text())
    lost.write_text("{")
    config = run_dir / "config.yaml"  # as a version has left it that knew fewer keys
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "max_skipped" not in line))
    with closing(Tracker(run_dir, TrackingConfig(enabled=False))) as other:  # as a process has it that measures
        other.start("other", layers=0)
        events = (run_dir / "events.jsonl").read_bytes()
        assert main([*arguments(run_dir), "--report"]) == 0
        assert main(arguments(run_dir)) == 2
        assert "error: --run-dir: another process works in" in capsys.readouterr().err
        assert (run_dir / "events.jsonl").read_bytes() == events
    assert lost.read_text() == "{"
    text = (run_dir / "table.md").read_text()
    assert "| nsm_1 |" in text
    assert "kmeans" not in text
    assert main(arguments(run_dir)) == 0
    again = json.loads(lost.read_text())
    assert again["accuracy"] == known["accuracy"]
    assert {path.name for path, time in before.items() if path.stat().st_mtime_ns != time} == {"kmeans-0.json"}
    assert "kmeans, seed 0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_record_names_the_data_as_pretraining_does_and_shows_the_table(run_dir: Path) -> None:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    recorded, *_ = (each for each in events if each["kind"] == "dataset")  # another for every call
    known = load_dataset(DataConfig(name="digits", train_images=400, test_images=150))
    assert recorded["num_images"] == 400
    assert recorded["digest"] == known.digest()
    shown = [each["values"]["mlflow.note.content"] for each in events if each["kind"] == "tags"]
    for name in ("nsm_1", "nsm_2", "kmeans", "pixels"):
        assert shown[0].count(f"| {name} |") == 2  # ridge and kernel
    assert "active" not in shown[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_side_by_side_gives_what_one_after_the_other_gives(run_dir: Path, tmp_path: Path) -> None:
    """Units as Ray tasks, a thread each: equal in every figure, and a row that misses its library is left out."""
    (tmp_path / "pynsm.py").write_text("raise ImportError")
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.evaluate", *arguments(folder, "rivals=[pynsm, kmeans, pixels]")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"PYTHONPATH": str(tmp_path), "RAY_AUTH_MODE": "token"},
        cwd=CONFIG.parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "pynsm is left out: pynsm is not installed" in done.stdout
    alone, beside = results(run_dir), results(folder)
    assert sorted(beside) == sorted(alone)
    timed = {"fit_seconds", "images_per_second"}
    for name, each in alone.items():
        assert {key: value for key, value in beside[name].items() if key not in timed} == {
            key: value for key, value in each.items() if key not in timed
        }, name
    assert json.loads((folder / "settings.json").read_text()) == json.loads((run_dir / "settings.json").read_text())
    drawn = {path.name for path in (run_dir / "figures").glob("*.png")}
    assert {path.name for path in (folder / "figures").glob("*.png")} == drawn


DYING = """
import os, sys
from pathlib import Path

from jobs.evaluate import main
from jobs.evaluation import ray_units

marks = Path(sys.argv[1])


class Dying(ray_units.ProgressBoard):
    def read(self):
        if not list(marks.iterdir()):
            (marks / str(os.getpid())).touch()
            os._exit(1)
        return super().read()


ray_units.ProgressBoard = Dying
sys.exit(main(sys.argv[2:]))
"""
"""An evaluation whose progress board ends its process once."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lost_progress_board_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    marks, folder = tmp_path / "marks", tmp_path / "run"
    marks.mkdir()
    few = ("corrupted_images=0", "outlier_images=0", "candidates=1")
    command = [sys.executable, str(tmp_path / "dying.py"), str(marks), *arguments(folder, *few)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, "--workers", "2", "--rows", "kmeans", "pixels"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"PYTHONPATH": str(CONFIG.parents[2]), "RAY_AUTH_MODE": "token"},
        cwd=CONFIG.parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert len(list(marks.iterdir())) == 1
    assert sorted(results(folder)) == ["kmeans-0", "pixels-0"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_keeps_what_is_known(workers: str, tmp_path: Path) -> None:
    """Ended once the first settings are known; no process is left, the record says KILLED."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.evaluate", *arguments(folder, "seeds=[0, 1, 2]"), "--workers", workers]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"RAY_AUTH_MODE": "token"},
        cwd=CONFIG.parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("memory: up to ")  # before anything starts
        first = process.stdout.readline()
        if workers == "2":
            assert first == "ray: embedded; 2 at a time, 1 thread each\n"
            first = process.stdout.readline()
        row, is_chosen, _ = first.partition(", settings: ")
        assert is_chosen
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "interrupted; all results so far are kept, the same command continues" in err
    assert "Traceback" not in err
    assert row in json.loads((folder / "settings.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [each["status"] for each in events if each["kind"] == "finish"] == ["KILLED"]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_workers_and_threads_are_whole_numbers(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([option, "0"])
    assert ended.value.code == 2
    assert f"{option}: expected an integer of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("budgets=[4]", "budgets"),
        ("seeds=[1]", "first_seed"),
        ("stacks.nsm.model.layers.0.out_channels=16", "rows.nsm"),
        ("stacks.nsm.pool=2", "rows.nsm"),
        ("stacks.nsm.candidates=[[layers.0.whiten=false]]", "rows.nsm"),
        ("candidates=1", "candidates, rows.kmeans"),
    ],
)
def test_results_of_another_configuration_are_not_mixed(
    assignment: str, key: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "config.yaml").read_bytes()
    assert main(arguments(run_dir, assignment)) == 2
    assert f"got {run_dir}, which differs in {key}\n" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_results_of_other_data_are_not_mixed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the files have changed since; an earlier version kept no digest, and is gone on with."""
    config = run_dir / "config.yaml"
    before = config.read_bytes()
    line = next(line for line in config.read_text().splitlines(True) if line.startswith("data_digest: "))
    config.write_text(config.read_text().replace(line, "data_digest: 0123456789abcdef\n"))
    assert main(arguments(run_dir)) == 2
    assert "got " + f"{run_dir}, whose results are of 0123456789abcdef\n" in capsys.readouterr().err
    config.write_text(config.read_text().replace("data_digest: 0123456789abcdef\n", ""))
    assert main(arguments(run_dir)) == 0
    assert config.read_bytes() == before


def test_a_node_with_other_data_is_named() -> None:
    text = read(read_yaml(CONFIG), [], quick=False).model_dump_json()
    expected = f"^digits on {re.escape(gethostname())}: expected the data of this comparison, 0123456789abcdef, got "
    with pytest.raises(DataError, match=expected):
        _prepared(text, "0123456789abcdef")


def test_what_an_earlier_version_did_not_know_is_at_its_default(tmp_path: Path) -> None:
    """Results of 10,000 outlier images, the default, are not those of 500."""
    config = read(read_yaml(CONFIG), ["outlier_images=10000", "candidates=4"], quick=False)
    values = identity(tmp_path, config, [])
    del values["outlier_images"], values["candidates"], values["first_seed"], values["rows"]
    write_identity(tmp_path, values)
    (tmp_path / "settings.json").write_text("{}")
    assert identity(tmp_path, config, []) == identity(tmp_path / "new", config, [])
    other = read(read_yaml(CONFIG), ["outlier_images=500", "candidates=1"], quick=False)
    with pytest.raises(ConfigError, match=r"which differs in candidates, outlier_images$"):
        identity(tmp_path, other, [])


def test_rows_are_added_to_those_that_are_known(tmp_path: Path, digits: Dataset) -> None:
    config = read(read_yaml(CONFIG), [], quick=False)
    rows = {row.name: row for row in rows_of(config, Material.of(digits, 150), None)}
    for names in (["nsm", "lenet"], ["kmeans"]):
        write_identity(tmp_path, identity(tmp_path, config, [rows[name] for name in names]))
        (tmp_path / "settings.json").write_text("{}")
    assert set(identity(tmp_path, config, [])["rows"]) == {"nsm", "lenet", "kmeans"}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("budgets=[10, 5]", "expected rising budgets"),
        ("budgets=[90]", "budgets.0: expected at most"),
        ("held_out=4000", "held_out: expected less than the 400 training images, got 4000"),
        ("rivals=[kmean]", "rivals: expected some of autoencoder"),
        ("networks=[alexnet]", "networks: expected some of lenet"),
        ("stacks.nsm.rows.nsm_2=[2]", "expected rows.nsm_2 to name unsupervised layers"),
        ("stacks.nsm.model.layers.0.kernel_size=20", "stacks.nsm.model.layers.0.kernel_size: expected at most 12"),
        ("stacks.nsm.candidates=[[layers.0.stride=0]]", "stacks.nsm.layers.0.stride: expected greater than 0, got 0"),
        ("shape.chanels=3", "shape.chanels: unknown key"),
        ("seeds=[]", "seeds: expected"),
        ("seeds=[0, 0]", "expected seeds that differ, got [0, 0]"),
        ("rivals=[kmeans, kmeans]", "expected rivals that differ"),
        ("stacks.nsm.rows.kmeans=[0]", "stacks: expected rows whose names differ from all others, got 'kmeans' twice"),
        ("shape.kernel_size=20", "shape.kernel_size: expected at most 12 for images of 8 × 8 with padding 2, got 20"),
    ],
)
def test_bad_input_is_one_line(
    assignment: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", assignment)) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("path", [CONFIG, FASHION, DEPTH, CIFAR], ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_have_a_quick_form(path: Path) -> None:
    whole, quick = read(read_yaml(path), [], quick=False), read(read_yaml(path), [], quick=True)
    assert len(whole.seeds) >= 3 > len(quick.seeds)
    for row in whole.stacks.values():
        assert len(row.models()) <= 4


def test_a_report_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path / "run"), "--report"]) == 2
    assert f"--report: expected results in {tmp_path / 'run' / 'results'}, found none" in capsys.readouterr().err


def test_rows_may_be_asked_for_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*arguments(folder, "corrupted_images=0", "outlier_images=0"), "--rows", "pixels"]) == 0
    assert list(results(folder)) == ["pixels-0"]
    assert "| pixels |" in (folder / "table.md").read_text()
    assert main([*arguments(folder, "corrupted_images=0", "outlier_images=0"), "--rows", "pixels", "nmf"]) == 2
    wanted = "error: --rows: expected some of nsm, nsm_1, nsm_2, nsm_decode, kmeans, pixels, got 'nmf'"
    assert capsys.readouterr().err.strip() == wanted


def test_a_stack_is_measured_whole_whichever_of_its_rows_is_asked_for(digits: Dataset) -> None:
    config = read(read_yaml(CONFIG), [], quick=True)
    rows = rows_of(config, Material.of(digits, config.held_out), None)
    for names in (["nsm_1"], ["nsm"], ["nsm_2", "nsm_1"]):
        assert [row.views for row in only(rows, names)] == [("nsm_1", "nsm_2", "nsm_decode")]
    assert [row.name for row in only(rows, ["lenet", "nsm_2", "kmeans"])] == ["nsm", "kmeans", "lenet"]


def test_every_row_has_the_same_search_budget(digits: Dataset) -> None:
    for count in (1, 3):
        config = read(read_yaml(FASHION), [f"candidates={count}"], quick=False)
        material = Material.of(digits, 150)
        for row in rows_of(config, material, None):
            if isinstance(row, FeatureRun):
                assert len(row.row.settings) == (1 if row.name == "pixels" else count)
            else:
                assert isinstance(row, NetworkRun)
                assert row.config.candidates == count
    config = read(read_yaml(CONFIG), ["candidates=1"], quick=False)
    [network] = [row for row in rows_of(config, material, None) if row.name == "lenet"]
    assert network.tune(lambda *_: None) == {"10": 0, "50": 0, "all": 0}  # at once: nothing is trained


def test_depths_are_compared_at_equal_size_and_operations() -> None:
    config = read(read_yaml(DEPTH), [], quick=False)
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    part = Labelled(images, torch.arange(20) % 10)
    material = Material(InputConfig(in_channels=1, height=28, width=28, num_classes=10), part, part, part, digest="")
    sizes, operations = [], []
    for row in rows_of(config, material, None):
        assert isinstance(row, FeatureRun)
        [view] = row.row.views
        learner = row.row.make(0, 0, lambda *_: None)
        assert isinstance(learner, StackLearner)
        learner.fit(images, part.labels)
        blocks, _ = learner.outputs(images)
        sizes.append(view.of(blocks, view.scales(blocks)).shape[1])
        stack, count, side = learner.stack, 0, 28
        for index, layer in enumerate(map(stack.layer, range(view.depth))):
            iterations = layer.dynamics.encode_iterations
            count += side**2 * layer.out_channels * (layer.patch.patch_size + iterations * layer.out_channels)
            side = stack.config.layers[index].pool or side
        operations.append(count)
    assert sizes == [160 * 5 * 5, 256 * 4 * 4, 256 * 4 * 4]
    assert operations == sorted(operations, reverse=True)  # more layers, no more operations
    assert operations[-1] > 0.7 * operations[0]


def test_a_run_directory_must_be_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "run")) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: --run-dir: expected a folder that can be")
    assert written.count("\n") == 1


def test_quick_needs_overrides(tmp_path: Path) -> None:
    values = {key: value for key, value in yaml.safe_load(CONFIG.read_text()).items() if key != "quick"}
    with pytest.raises(ConfigError, match="--quick: expected a configuration with overrides"):
        read(values, [], quick=True)
