"""Files of earlier versions, see `tests/fixtures`: each loads, and each unfinished run ends as an uninterrupted one.

Golden values were computed on one kind of CPU; on another one rounding differs, and the tolerances allow for that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import jobs.evaluate
import jobs.finetune
import jobs.sync
from cluster.config import RunConfig
from cluster.messages import Outbox, ReadoutScored
from cluster.training import Assignment, Training
from jobs.options import read_yaml
from jobs.run_directory import as_begun, choose
from simmatch import load_model
from simmatch.config import parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import ExportConfig
from simmatch.seeding import seeded
from simmatch.sharding.mesh import Mesh
from tests.exchanges import of_type

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
FINISHED, UNFINISHED = V1 / "finished", V1 / "unfinished"

RESUMED_S = 180.0


@pytest.fixture
def unfinished(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the run directory that the test names; it was written elsewhere."""
    return Path(shutil.copytree(UNFINISHED / request.param, tmp_path / request.param))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor to `tolerance` of its largest value."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * scale, msg=name)


# -- exported models ---------------------------------------------------------------------------------------------------


# float32: where a restart test is zero to rounding, one machine restarts a column and another does not
@pytest.mark.parametrize(("name", "tolerance"), [("two_ranks", 1e-9), ("one_rank", 1e-3)])
def test_an_exported_model_gives_the_same_outputs(name: str, tolerance: float, digits: Dataset) -> None:
    model = load_model(FINISHED / name / "model")
    x = to_unit(digits.test_images[:16]).to(model.dtype)
    with torch.no_grad():
        outputs = {"activities": model(x), "features": model.features(x), "scores": model.decode(x)}
    golden = load_file(V1 / "outputs.safetensors")
    assert_close(outputs, {key: golden[f"{name}.{key}"] for key in outputs}, tolerance)


# -- unfinished runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(RESUMED_S + 20)
@pytest.mark.parametrize("unfinished", ["two_ranks"], indirect=True)
def test_an_unfinished_run_of_two_ranks_ends_as_the_uninterrupted_one(
    unfinished: Path, environment: dict[str, str]
) -> None:
    """float64, so that rounding flips no decision."""
    command = [
        sys.executable,
        "-m",
        "jobs.pretrain",
        "--config",
        str(V1 / "two_ranks.yaml"),
        "--run-dir",
        str(unfinished),
    ]
    done = subprocess.run(
        command, env=environment, cwd=unfinished.parent, capture_output=True, text=True, timeout=RESUMED_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].endswith("from step-00000024")
    assert "layer 0 · learn" not in done.stdout
    summary, golden = read_json(unfinished / "summary.json"), read_json(FINISHED / "two_ranks" / "summary.json")
    same = ("status", "steps", "world_size", "mesh", "probe")
    assert {key: summary[key] for key in same} == {key: golden[key] for key in same}
    # 200 test images: the fit of a readout may end so that one of them falls on the other side
    assert summary["accuracy"] == pytest.approx(golden["accuracy"], abs=1.001 / 200)
    assert summary["accuracy_decode"] == golden["accuracy_decode"]
    for layer, expected in zip(summary["layers"], golden["layers"], strict=True):
        for metric in ("objective", "residual", "num_iters", "active_fraction", "dead_channels"):
            assert layer[metric] == pytest.approx(expected[metric], rel=1e-6), metric
    model = Path("model") / "model.safetensors"
    assert_close(load_file(unfinished / model), load_file(FINISHED / "two_ranks" / model), 1e-9)
    exports = [read_yaml(run_dir / "model" / "config.yaml") for run_dir in (unfinished, FINISHED / "two_ranks")]
    assert parse(ExportConfig, exports[0]) == parse(ExportConfig, exports[1])
    events = map(json.loads, (unfinished / "events.jsonl").read_text().splitlines())
    starts = [event for event in events if event["kind"] == "start"]
    assert [start["attempt"] for start in starts] == [1, 2]
    assert len({start["run_key"] for start in starts}) == 1


def as_v1_drew(layer: SimilarityMatchingConv2d, count: int, x: Tensor, *, first: int = 0) -> Tensor:
    """Positions of the largest of uniform numbers from a generator of the host, as in the versions that wrote `v1`."""
    height, width = layer.patch.map_size((x.shape[2], x.shape[3]))
    generator = seeded("positions", layer.seed, int(layer.updates))
    keys = torch.rand(first + len(x), height * width, generator=generator, dtype=torch.float64)[first:]
    return keys.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


@pytest.mark.parametrize("unfinished", ["one_rank"], indirect=True)
@pytest.mark.parametrize("as_before", [True, False], ids=["its_draws", "new_draws"])
def test_an_unfinished_run_of_one_rank_ends_as_the_uninterrupted_one(
    unfinished: Path, as_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the positions that its version would have drawn; with those of today it goes on, and ends as good."""
    if as_before:
        monkeypatch.setattr(SimilarityMatchingConv2d, "draw_positions", as_v1_drew)
    start = as_begun(choose(parse(RunConfig, read_yaml(V1 / "one_rank.yaml")), str(unfinished), "auto"))
    assert start.resume == unfinished / "checkpoints" / "step-00000024"
    assert start.config.cluster.threads_per_rank == 1
    outbox, assignment = Outbox(), Assignment(start.config, unfinished, 0, resume=start.resume)
    with torch.no_grad():
        Training(assignment, Mesh(), outbox, torch.device("cpu")).run()
    assert [each.layer for each in outbox.phases if each.phase == "learn"] == [1, 2]
    model = Path("model") / "model.safetensors"
    found, expected = load_file(unfinished / model), load_file(FINISHED / "one_rank" / model)
    if as_before:
        # 32 updates in float32. Where rounding decides, a column stops an iteration earlier: solving all columns to a
        # tolerance 2 % larger moves 1.3e-3; a batch of other images 0.5.
        assert_close(found, expected, 3e-3)
        return
    learnt_before = {name for name in expected if name.startswith("layers.0.")}
    assert_close(*({name: model[name] for name in learnt_before} for model in (found, expected)), 0.0)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    golden = read_json(FINISHED / "one_rank" / "summary.json")
    (scored,) = of_type(outbox.messages, ReadoutScored)
    # 200 test images: two accuracies of 0.98 differ by 0.014, one deviation; untrained layers give 0.1 by V
    assert scored.accuracy == pytest.approx(golden["accuracy"], abs=0.04)
    assert scored.accuracy_decode == pytest.approx(golden["accuracy_decode"], abs=0.06)


@pytest.mark.parametrize("unfinished", ["two_ranks"], indirect=True)
def test_a_manifest_without_the_newer_keys(unfinished: Path) -> None:
    """As versions before `v1` wrote it; its digest is over what it holds, keys in order, without spaces."""
    path = unfinished / "checkpoints" / "step-00000024" / "manifest.json"
    values = read_json(path)
    assert values.pop("sha256") == sha256_of(values)
    for key in ("mlflow_run_id", "mlflow_layer_run_ids", "last_step_sent", "rate", "data"):
        del values[key]
    for part in (values["cursor"], *values["layers"], *values["shards"]):
        for key in ("images", "usual", "size_bytes"):
            part.pop(key, None)
    path.write_text(json.dumps(values | {"sha256": sha256_of(values)}))
    start = choose(parse(RunConfig, read_yaml(V1 / "two_ranks.yaml")), str(unfinished), "auto")
    assert start.resume == path.parent


def sha256_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- comparisons -------------------------------------------------------------------------------------------------------


def results(run_dir: Path) -> dict[str, Any]:
    return {path.stem: read_json(path) for path in sorted((run_dir / "results").glob("*.json"))}


@pytest.mark.slow
@pytest.mark.parametrize("unfinished", ["evaluate"], indirect=True)
def test_an_unfinished_comparison_measures_what_is_missing(unfinished: Path) -> None:
    kept = ("kmeans-0", "nsm_1-0", "nsm_decode-0", "random-0")
    before = results(unfinished)
    assert tuple(before) == kept
    settings = (unfinished / "settings.json").read_bytes()
    command = ["--config", str(V1 / "evaluate.yaml"), "--run-dir", str(unfinished), "--threads", "1"]
    assert jobs.evaluate.main(command) == 0
    after, golden = results(unfinished), results(FINISHED / "evaluate")
    assert (unfinished / "settings.json").read_bytes() == settings
    assert after.keys() == golden.keys()
    for name, expected in golden.items():
        if name in kept:  # with the seconds that it took then
            assert after[name] == before[name], name
            continue
        for key in ("row", "seed", "settings", "features", "parameters_trained", "parameters_inference"):
            assert after[name][key] == expected[key], f"{name}: {key}"
        for key in ("accuracy", "kernel", "logistic", "decode", "neighbours"):  # 3 of 150 images
            assert after[name][key] == pytest.approx(expected[key], abs=3.001 / 150), f"{name}: {key}"
    table = (unfinished / "table.md").read_text()
    assert all(f"| {row} |" in table for row in ("nsm_1", "nsm_decode", "kmeans", "random", "pixels"))


@pytest.mark.slow
@pytest.mark.parametrize("unfinished", ["finetune"], indirect=True)
def test_an_unfinished_comparison_of_starts_trains_what_is_missing(unfinished: Path) -> None:
    known = {
        path: path.stat().st_mtime_ns for path in [*unfinished.rglob("*.json"), *unfinished.rglob("*.safetensors")]
    }
    assert len(known) == 1 + 3 + 2  # settings, outcomes, filters
    command = ["--config", str(V1 / "finetune.yaml"), "--run-dir", str(unfinished), "--threads", "1"]
    assert jobs.finetune.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in known} == known
    after, golden = results(unfinished), results(FINISHED / "finetune")
    assert after.keys() == golden.keys()
    for name, expected in golden.items():
        assert after[name] | {"accuracy": 0} == expected | {"accuracy": 0}
        # 100 images; training by backpropagation amplifies rounding
        assert after[name]["accuracy"] == pytest.approx(expected["accuracy"], abs=3.001 / 100), name


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unfinished", ["one_rank"], indirect=True)
def test_records_of_which_half_is_sent(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new store stands in for the one that had them: it is given the first half, then the old offset is put back."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{unfinished.parent}/mlflow.db"
    spool, offset = unfinished / "events.jsonl", unfinished / "events.offset"
    everything, progress = spool.read_bytes(), read_json(offset)
    first = everything[: progress["offset"]]
    assert first.endswith(b"\n")
    sent = first.count(b"\n")
    left = everything.count(b"\n") - sent
    spool.write_bytes(first)
    assert jobs.sync.main([str(unfinished), "--uri", uri]) == 0
    assert capsys.readouterr().out.startswith(f"{sent} events sent to {uri}, run ")
    runs = read_json(offset)["runs"]
    assert runs.keys() == progress["runs"].keys() == {"parent", "0", "1", "2"}

    spool.write_bytes(everything)
    offset.write_text(json.dumps(progress | {"destination": uri, "runs": runs}))
    assert jobs.sync.main([str(unfinished), "--uri", uri]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{left} events sent to {uri}, run {runs['parent']}")
    assert "shows it as running" in out
    assert err == ""
    client = MlflowClient(uri, registry_uri=uri)
    for layer, steps in (("0", [4, 8, 12, 16, 20]), ("1", [4])):
        assert [row.step for row in client.get_metric_history(runs[layer], "objective")] == steps
    assert client.get_run(runs["parent"]).data.tags["simmatch.attempts"] == "2"
    assert len(client.search_runs([client.get_run(runs["parent"]).info.experiment_id])) == 4
