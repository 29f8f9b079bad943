"""The end of a run, with a controller that has done its work: what signals, servers and disks may do to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

import cluster.fence
import cluster.tracking.tracker
import jobs.pretrain
import jobs.run_results
import jobs.training_job
from cluster.checkpoints.manifest import (
    Cursor,
    LayerState,
    Manifest,
    Shard,
    folder_of,
    manifest_values,
    write_manifest,
)
from cluster.checkpoints.shard_writer import write_shard
from cluster.config import RunConfig, public
from cluster.controller import RunFailed, RunStopped
from cluster.fence import Commits, Fence, Unfenced
from cluster.holder import Holder
from cluster.lease import LEASE
from cluster.messages import ReadoutScored
from cluster.storage import copy_whole, exists, locate, read
from cluster.summary import RunRecord
from cluster.tracking.delivery import PROGRESS_NAME
from cluster.tracking.mlflow_model import ModelLogger
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.tracking.tracker import Tracker
from jobs.display import JobDisplay
from jobs.finished import report_finished
from jobs.ray_session import own_signals
from jobs.run_directory import choose
from jobs.run_results import RunResults, lines_of
from jobs.signals import CONTINUES, termination_signals
from jobs.training_job import TrainingJob
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset
from simmatch.model import Stack, save_model
from simmatch.remote import StorageError
from simmatch.sharding.rows import Rows
from tests.object_store import BUCKET, object_store

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAYER = {"objective": 0.5, "residual": 1e-3, "num_iters": 9.0, "active_fraction": 0.1, "dead_channels": 0.0}

Deed = Callable[["Scripted"], None]


class Scripted:
    """A controller whose ranks have done everything by the time that `deed` is done."""

    def __init__(self, config: RunConfig, deed: Deed, trains: bool) -> None:
        self.config, self.record, self.finished = config, RunRecord(), False
        self._deed, self._trains = deed, trains

    def run(self) -> RunRecord:
        self.record.curves[0], self.record.steps = [(87, LAYER)], 87
        self.record.readout = ReadoutScored("ridge", 100, accuracy=0.9)
        self._deed(self)
        self.finished = True
        return self.record

    def stop(self) -> bool:
        return self._trains


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Of signals: those of the tests again, once a job has put its own in place."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def make_job(
    make_config: Callable[..., RunConfig], digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrainingJob]:
    """(assignments, deed, whether ranks train when a signal comes, load) → a job without Ray."""

    def make(*assignments: str, deed: Deed = lambda _: None, trains: bool = False, load: Any = None) -> TrainingJob:
        def controller(config: RunConfig, *_: object, **__: object) -> Scripted:
            return Scripted(config, deed, trains)

        monkeypatch.setattr(jobs.training_job, "start_ray", lambda *_: "nowhere")
        monkeypatch.setattr(jobs.training_job, "shut_down_ray", lambda: True)
        monkeypatch.setattr(jobs.training_job, "Controller", controller)
        config = make_config(*(assignments or ["tracking.enabled=false"]))
        start = choose(config, str(tmp_path / "r"), "auto")
        fence = Fence(start.destination, Holder.here())
        logger = None if load is None else ModelLogger(load)
        tracker = Tracker(start.run_dir, config.tracking, logger, owned=fence.owned)
        return TrainingJob(config, digits, start, tracker, Console(width=200), fence=fence)

    return make


@pytest.fixture
def hanging() -> Iterator[str]:
    """URI of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def summary_of(job: TrainingJob) -> dict[str, Any]:
    return json.loads((job.run_dir / "summary.json").read_text())


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_the_wait_for_mlflow(
    make_job: Callable[..., TrainingJob],
    hanging: str,
    signum: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A finished run stays one: its summary and its table were there before the wait."""
    job = make_job(f"tracking.uri={hanging}", "tracking.timeout_s=30")
    monkeypatch.setattr(cluster.tracking.tracker, "HURRY_S", 0.1)
    whole, before = Tracker.close, {}

    def close(tracker: Tracker) -> int:
        before.update(summary_of(job))
        threading.Timer(0.2, os.kill, (os.getpid(), signum)).start()
        return whole(tracker)

    monkeypatch.setattr(Tracker, "close", close)
    began = time.monotonic()
    assert job.run() == 0
    assert time.monotonic() - began < 20
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    result = lines.index("test accuracy, ridge readout on frozen features: 0.9000")
    sending = lines.index("sending records to MLflow (at most 90 s; Ctrl-C stops waiting)")
    assert result < sending
    assert f"; send them with: python -m jobs.sync {job.run_dir}" in out
    assert (before["status"], before["accuracy"], before["mlflow_run_id"]) == ("FINISHED", 0.9, None)
    assert before.items() <= summary_of(job).items()
    assert choose(job.config, str(job.run_dir), "auto").finished


MOMENTS = {
    "figures": (RunResults, "_draw"),
    "records": (Tracker, "finish"),
    "summary": (jobs.run_results, "write_whole"),
    "leaving the cluster": (jobs.training_job, "shut_down_ray"),
    "the wait": (Tracker, "close"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_signals_at_the_end_change_nothing(
    make_job: Callable[..., TrainingJob],
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job()
    place, name = MOMENTS[moment]
    whole = getattr(place, name)

    def struck(*arguments: Any, **named: Any) -> Any:
        for signum in termination_signals():
            signal.raise_signal(signum)
            signal.raise_signal(signum)
        return whole(*arguments, **named)

    monkeypatch.setattr(place, name, struck)
    assert job.run() == 0
    assert (summary_of(job)["status"], summary_of(job)["accuracy"]) == ("FINISHED", 0.9)
    kinds = [json.loads(line)["kind"] for line in (job.run_dir / "events.jsonl").read_text().splitlines()]
    assert "finish" in kinds
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("moment", ["close", "push"])
@pytest.mark.parametrize("away", [True, False])
def test_a_store_at_the_end_is_waited_for_once_at_most(
    make_job: Callable[..., TrainingJob],
    moment: str,
    away: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It hangs until a signal comes, or says no: while figures are brought, or the summary after the wait."""
    job, asked = make_job(), []

    def bring(name: str) -> None:
        asked.append(name)
        if name == moment and "close" in asked:  # the one before is at the start
            if away:
                raise StorageError("s3://b/r: no answer")
            signal.raise_signal(signal.SIGINT)

    for name in ("close", "push"):
        monkeypatch.setattr(job.mirror, name, partial(bring, name))
    assert job.run() == 0
    assert asked == ["push", "close", *(["push"] if moment == "push" else [])]
    why = "s3://b/r: no answer" if away else "ended by SIGINT"
    assert f"\nthe last records are in {job.run_dir} only: {why}\n" in capsys.readouterr().out
    assert summary_of(job)["status"] == "FINISHED"


def asked_twice(controller: Scripted) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def asked(controller: Scripted) -> None:
    signal.raise_signal(signal.SIGTERM)
    raise RunStopped("the newest checkpoint is of step 20")


def hung_up(controller: Scripted) -> None:
    signal.raise_signal(signal.SIGHUP)  # of the system's
    signal.raise_signal(signal.SIGHUP)  # of the shell's
    raise RunStopped("the newest checkpoint is of step 20")


def failed(controller: Scripted) -> None:
    raise RunFailed("rank 1 was lost")


def struck_while_the_group_ends(controller: Scripted) -> None:
    controller.finished = True
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("unreachable: there is nothing to ask for a checkpoint any more")


@pytest.mark.parametrize(
    ("deed", "trains", "code", "status", "message"),
    [
        (asked, True, 143, "KILLED", "ended by SIGTERM; the newest checkpoint is of step 20"),
        (asked_twice, True, 130, "KILLED", "ended by SIGINT"),
        (asked_twice, False, 143, "KILLED", "ended by SIGTERM"),
        (hung_up, True, 129, "KILLED", "ended by SIGHUP; the newest checkpoint is of step 20"),
        (failed, True, 1, "FAILED", "rank 1 was lost"),
        (struck_while_the_group_ends, False, 0, "FINISHED", None),
    ],
)
def test_the_status_is_that_of_the_training(
    make_job: Callable[..., TrainingJob],
    deed: Deed,
    trains: bool,
    code: int,
    status: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Though a signal comes while it is being recorded."""
    job, whole = make_job(deed=deed, trains=trains), Tracker.finish

    def finish(tracker: Tracker, status: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        whole(tracker, status)

    monkeypatch.setattr(Tracker, "finish", finish)
    assert job.run() == code
    summary = summary_of(job)
    assert (summary["status"], summary.get("message")) == (status, message)
    shown = capsys.readouterr()
    assert shown.err == ("" if message is None else f"error: {message}\n")
    assert (f"{CONTINUES} (--resume auto, the default)" in shown.out.splitlines()) == (status == "KILLED")


def test_a_signal_before_anything_is_shown(
    make_job: Callable[..., TrainingJob], capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*_: object) -> JobDisplay:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("unreachable")

    job = make_job()
    job._make_display = shown
    assert job.run() == 143
    assert summary_of(job)["status"] == "KILLED"
    assert capsys.readouterr().err == "error: ended by SIGTERM\n"


def test_two_signals_while_ray_starts(make_job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes while the first is on its way up; Ray would answer it by a handler of its own."""

    def starts(*_: object) -> str:
        with own_signals():
            signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)
        return "somewhere"

    job = make_job()
    monkeypatch.setattr(jobs.training_job, "start_ray", starts)
    assert job.run() == 130
    assert summary_of(job)["status"] == "KILLED"


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_that_ray_turns_into_its_own_exception(
    make_job: Callable[..., TrainingJob], signum: signal.Signals, trains: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ray.wait` raises a KeyboardInterrupt of its own in place of any that a handler raises in it."""

    def wait(_: Scripted) -> None:
        if trains:
            signal.raise_signal(signal.SIGINT)  # the first asks for a last checkpoint, the next one ends the run
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
        raise KeyboardInterrupt

    job = make_job(deed=wait, trains=trains)
    assert job.run() == 128 + signum
    assert summary_of(job)["status"] == "KILLED"
    assert capsys.readouterr().err == f"error: ended by {signum.name}\n"


def test_a_run_without_a_readout_is_shown_and_recorded(
    make_job: Callable[..., TrainingJob], capsys: pytest.CaptureFixture[str]
) -> None:

    def without_readout(controller: Scripted) -> None:
        controller.record.readout = None

    job = make_job(deed=without_readout)
    assert job.run() == 0
    assert (summary_of(job)["status"], summary_of(job)["accuracy"]) == ("FINISHED", None)
    assert "test accuracy" not in capsys.readouterr().out
    events = [json.loads(line) for line in (job.run_dir / "events.jsonl").read_text().splitlines()]
    [final] = [event["values"] for event in events if event["kind"] == "metrics"]
    assert "accuracy" not in final
    assert final["num_exchanges"] == 0
    assert lines_of({"accuracy": None, "accuracy_decode": 0.5, "probe": None}) == [
        "test accuracy, nearest column of V, no classifier: 0.5000"
    ]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no model")])
def test_what_comes_after_learning_costs_no_run(
    make_job: Callable[..., TrainingJob],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(RunResults, "_draw", fail)
    if isinstance(error, OSError):
        monkeypatch.setattr(jobs.run_results, "write_whole", fail)
    job = make_job()
    assert job.run() == 0
    out = capsys.readouterr().out
    assert f"figures are left out: {type(error).__name__}: {error}" in out
    assert ("summary.json is not written" in out) == isinstance(error, OSError)
    assert "test accuracy, ridge readout" in out


@pytest.mark.fault
def test_an_interrupted_wait_leaves_a_finished_run_and_one_model(
    make_job: Callable[..., TrainingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SQLite, interrupted while the model is traced; `jobs.sync` completes it, once."""
    from mlflow import MlflowClient

    import jobs.sync

    left = threading.Event()

    def load(_: str) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        left.wait(60)
        raise ValueError("the process would be gone by now")

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = make_job(f"tracking.uri={uri}", load=load)
    config = job.config
    save_model(Stack(config.model, job.dataset.source, seed=0), job.run_dir / "model")
    assert job.run() == 0
    client = MlflowClient(uri, registry_uri=uri)
    [experiment] = [each for each in client.search_experiments() if each.name == "simmatch"]

    def in_mlflow() -> tuple[set[str], list[str], int]:
        runs = client.search_runs([experiment.experiment_id])
        models = client.search_logged_models([experiment.experiment_id])
        parent = client.get_run(summary_of(job)["mlflow_run_id"])
        linked = parent.outputs.model_outputs if parent.outputs else []
        return {run.info.status for run in runs}, [model.status for model in models], len(linked)

    assert in_mlflow() == ({"FINISHED"}, [], 0)
    left.set()
    assert "send them with: python -m jobs.sync" in capsys.readouterr().out
    for _ in range(2):
        assert jobs.sync.main([str(job.run_dir)]) == 0
        assert in_mlflow() == ({"FINISHED"}, ["READY"], 1)


# -- two attempts, and a run that has finished -------------------------------------------------------------------------

FAR = Holder(host="far", pid=7, user="ada", since="2026-01-02 03:04:05 UTC", machine="another")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("ends", ["well", "with a failure", "by a signal"])
def test_an_attempt_that_has_lost_the_run_stops_and_changes_nothing(
    make_job: Callable[..., TrainingJob],
    ends: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It learns so when it would record its end, if not before."""
    monkeypatch.setattr(cluster.fence, "VERIFY_S", 0.0)
    before: dict[str, bytes] = {}

    def overtaken(controller: Scripted) -> None:
        other = Fence(job.run_dir, FAR)
        other.begin(Commits(job.run_dir).newest()[0])
        Spool(job.run_dir / SPOOL_NAME).take_over()
        job.tracker.metrics(5, {"objective": 1.0}, layer=0)
        before.update(content(job.run_dir))
        if ends == "with a failure":
            raise RunFailed("rank 1 was lost")
        if ends == "by a signal":
            signal.raise_signal(signal.SIGTERM)

    job = make_job(deed=overtaken)
    assert job.run() == 1
    assert content(job.run_dir) == before
    out, err = capsys.readouterr()
    assert err == (
        "error: another attempt took over this run: ada, process 7 on far, since 2026-01-02 03:04:05 UTC; "
        "this one stops and changes nothing\n"
    )
    assert "test accuracy" not in out
    assert not (job.run_dir / "summary.json").exists()


def test_a_run_that_another_command_has_just_begun(
    make_job: Callable[..., TrainingJob], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    Fence(job.run_dir, FAR).begin(0)
    before = content(job.run_dir)
    assert job.run() == 2
    assert content(job.run_dir) == before
    assert capsys.readouterr().err.startswith(f"error: --run-dir: another attempt has begun in {job.run_dir}: ada, pro")


def test_an_attempt_goes_on_where_the_one_before_was_cut_off(
    make_job: Callable[..., TrainingJob], capsys: pytest.CaptureFixture[str]
) -> None:
    """That had taken the number of a checkpoint, had not written its manifest yet, and still holds the spool."""

    def cut_off(controller: Scripted) -> None:
        shard = write_shard(folder_of(job.run_dir, 20), 0, 1, {"w": torch.zeros(2)}, {"w": Rows.all(2)})
        cursor = Cursor(step=20, layer=0, updates=20)
        manifest = Manifest(cursor=cursor, config=public(job.config), layers=[LayerState(usual=1.0)], shards=[shard])
        job.fence.commit("checkpoint", step=20, manifest=manifest_values(manifest))
        job.fence = Unfenced()  # type: ignore[assignment]  # its end is not recorded
        raise RunFailed("cut off")

    job = make_job(deed=cut_off)
    assert job.run() == 1
    (job.run_dir / "summary.json").unlink()
    held = Spool(job.run_dir / SPOOL_NAME).open()
    again = make_job()
    assert again.start.resume is None
    assert again.run() == 0
    assert again.start.resume == folder_of(job.run_dir, 20)
    assert f"continuing the unfinished run in {job.run_dir}, from step-00000020" in capsys.readouterr().out
    held.close()
    kinds = [json.loads(line)["kind"] for line in (job.run_dir / SPOOL_NAME).read_text().splitlines()]
    assert kinds.count("start") == 2
    assert kinds[-2:] == ["finish", "model"]
    _, entry = Commits(job.run_dir).newest()
    assert (entry and entry.kind, entry and entry.status) == ("end", "FINISHED")
    assert not (job.run_dir / LEASE).exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_finished_job_that_is_submitted_again_trains_nothing(
    make_job: Callable[..., TrainingJob],
    digits_yaml: Path,
    resume: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As by a cluster that has lost sight of it. It says where the result is, and takes nothing of the cluster."""
    job = make_job()
    assert job.run() == 0
    before, begun = content(job.run_dir), []
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_again"}}')
    monkeypatch.setattr(TrainingJob, "run", lambda again: begun.append(again) or 0)
    capsys.readouterr()
    options = ["--config", str(digits_yaml), "--set", "tracking.enabled=false", "--run-dir", str(job.run_dir)]
    assert jobs.pretrain.main([*options, "--resume", resume]) == 0
    assert content(job.run_dir) == before
    if resume == "never":
        (again,) = begun
        assert (again.run_dir, again.fence.holder.job) == (job.run_dir.with_name("r-2"), "raysubmit_again")
        return
    assert begun == []
    assert capsys.readouterr().out == (
        f"already finished, see {job.run_dir}: test accuracy 0.9000 (ridge readout); model: {job.run_dir}/model "
        "(--resume never starts a new run)\n"
    )


def test_a_run_that_has_finished_with_other_data_is_another_one(
    make_job: Callable[..., TrainingJob], digits: Dataset
) -> None:
    """The manifest says so; no shard, which may be large and far away, is read."""
    job = make_job()
    assert job.run() == 0
    shards = [Shard(rank=0, file="rank-0-of-1.safetensors", sha256="0", rows={}, shapes={})]
    cursor = Cursor(step=4, layer=0, updates=4)
    write_manifest(folder_of(job.run_dir, 4), Manifest(cursor=cursor, config={}, layers=[], shards=shards, data="d1"))
    start = choose(job.config, str(job.run_dir), "auto")
    with pytest.raises(DataError, match=r"has finished: .*expected the data of this run, d1, got .*; use --resume"):
        report_finished(start, digits, Console(width=200))


def test_the_same_command_sends_what_mlflow_has_not_got(
    make_job: Callable[..., TrainingJob], digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server was away to the end. The command trains nothing any more, and is done once all is sent."""
    job = make_job("tracking.uri=http://127.0.0.1:1", "tracking.flush_s=0.1", "tracking.timeout_s=0.5")
    assert job.run() == 0
    assert summary_of(job)["unsent_records"] > 0
    capsys.readouterr()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = job.config.model_copy(update={"tracking": job.config.tracking.model_copy(update={"uri": uri})})
    console = Console(width=200)
    for first in (True, False):
        start = choose(config, str(job.run_dir), "auto")
        assert start.finished
        assert report_finished(start, digits, console) == 0
        out, err = capsys.readouterr()
        assert err.startswith("refused: model: ") == first  # no rank has written one
        out = out.splitlines()
        summary = summary_of(job)
        assert summary["unsent_records"] == 0
        assert MlflowClient(uri).get_run(summary["mlflow_run_id"]).info.status == "FINISHED"
        run_id, events = summary["mlflow_run_id"], Spool(job.run_dir / SPOOL_NAME).count(0) - 1
        assert out[:-1] == ([f"{events} events sent to {uri}, run {run_id}"] if first else [])
        assert out[-1] == (
            f"already finished, see {job.run_dir}: test accuracy 0.9000 (ridge readout); model: {job.run_dir}/model; "
            f"MLflow run: {run_id} (mlflow ui --backend-store-uri {uri}) (--resume never starts a new run)"
        )


def test_another_machine_sends_what_mlflow_has_not_got(
    make_job: Callable[..., TrainingJob],
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run directory is in an object store, and the machine that trained is gone with what it had there."""
    job = make_job("tracking.uri=http://127.0.0.1:1", "tracking.flush_s=0.1", "tracking.timeout_s=0.5")
    assert job.run() == 0
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = job.config.model_copy(update={"tracking": job.config.tracking.model_copy(update={"uri": uri})})
    monkeypatch.chdir(tmp_path)
    with object_store():
        place = locate(f"s3://{BUCKET}/run")
        for path in job.run_dir.rglob("*"):
            if path.is_file():
                copy_whole(path, place / str(path.relative_to(job.run_dir)))
        for _ in range(2):
            start = choose(config, str(place), "auto")
            assert start.finished
            assert report_finished(start, digits, Console(width=200)) == 0
        summary = json.loads(read(place / "summary.json"))
        assert exists(place / PROGRESS_NAME)
    assert summary["unsent_records"] == 0
    assert MlflowClient(uri).get_run(summary["mlflow_run_id"]).info.status == "FINISHED"
    assert capsys.readouterr().out.count(f"already finished, see {place}: test accuracy 0.9000") == 2
