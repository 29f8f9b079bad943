"""Where a run goes: each rule of `--run-dir` and `--resume`, with real checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cluster.checkpoints.committer import commit
from cluster.checkpoints.manifest import Cursor, LayerState, Manifest, folder_of
from cluster.checkpoints.shard_writer import write_shard
from cluster.config import RunConfig
from cluster.fence import Fence
from cluster.holder import Holder
from jobs.ray_job import job_metadata
from jobs.run_directory import RunStart, as_begun, choose, default_root
from simmatch.config import ConfigError
from simmatch.sharding.rows import Rows

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return folder


def test_threads_are_those_that_the_run_began_with(work: Path, make_config: MakeConfig) -> None:
    """Counted on another host they would be others, and with them the last bits."""

    def threads(*assignments: str, run_dir: str = "run", resume: str = "auto") -> int | None:
        start = as_begun(choose(make_config(*assignments), run_dir, resume))
        notes.append(start.note)
        return start.config.cluster.threads_per_rank

    notes: list[str] = []

    assert threads() is None
    leave(work / "run", make_config("cluster.threads_per_rank=3"))
    assert threads() == 3
    assert not any("threads_per_rank" in note for note in notes)
    assert threads("cluster.threads_per_rank=5") == 5
    assert notes[-1].endswith("\ncluster.threads_per_rank is 5, it was 3: the last bits will differ")
    leave(work / "other", make_config("cluster.threads_per_rank=7"), "FINISHED", steps=(4,))
    assert threads(run_dir="new", resume="other") == 7
    assert threads(run_dir="new", resume="other/checkpoints/step-00000004") == 7
    assert threads(run_dir="new") is None
    leave(work / "old", make_config(), steps=(4,))
    assert threads(run_dir="old") is None  # of a version that did not count once and for all


def leave(run_dir: Path, config: RunConfig, status: str | None = None, steps: tuple[int, ...] = ()) -> Path:
    """What a run that has ended so far leaves behind."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    if status is not None:
        (run_dir / "summary.json").write_text(json.dumps({"status": status}))
    for step in steps:
        folder = folder_of(run_dir, step)
        tensors = {"layers.0.feedforward": torch.zeros(16, 1, 3, 3)}
        shard = write_shard(folder, 0, 1, tensors, {"layers.0.feedforward": Rows.all(16)})
        cursor = Cursor(step=step, layer=0, updates=step)
        values = config.model_dump(mode="json")
        states = [LayerState(usual=1.0)]
        commit(
            folder,
            Manifest(cursor=cursor, config=values, layers=states, shards=[shard]),
        )
    return run_dir


def test_a_new_run_goes_below_runs_and_makes_nothing(work: Path, make_config: MakeConfig) -> None:
    run_dir = work / "runs" / "digits"
    assert choose(make_config(), None, "auto") == RunStart(run_dir, None, f"a new run in {run_dir}", make_config())
    assert choose(make_config(), "elsewhere/x", "auto").run_dir == work / "elsewhere" / "x"
    assert list(work.iterdir()) == []


def test_an_empty_folder_is_used_as_it_is(work: Path, make_config: MakeConfig) -> None:
    (work / "mine").mkdir()
    assert choose(make_config(), "mine", "auto").run_dir == work / "mine"


def test_each_new_run_gets_a_number(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FINISHED", (116,))
    leave(work / "r-2", make_config("seed=1"))
    Fence(work / "r-3", Holder.here()).begin(0)  # another command, which has written nothing else yet
    start = choose(make_config(), "r", "never")
    assert (start.run_dir, start.resume, start.finished) == (work / "r-4", None, False)


def test_the_same_command_names_the_run_that_has_finished(work: Path, make_config: MakeConfig) -> None:
    """Each configuration has its own run, and what has finished stands in nobody's way."""
    for _ in range(2):
        for number, change in enumerate(("seed=0", "seed=1", "probe.readout=ridge"), 1):
            run_dir = work / ("r" if number == 1 else f"r-{number}")
            start = choose(make_config(change), "r", "auto")
            assert (start.run_dir, start.finished) == (run_dir, run_dir.exists())
            if not start.finished:
                leave(run_dir, make_config(change), "FINISHED", (116,))
    assert choose(make_config("mesh.channel=1", "tracking.enabled=false"), "r", "auto").run_dir == work / "r"
    leave(work / "r-4", make_config(), "FINISHED")  # by --resume never
    assert choose(make_config(), "r", "auto").run_dir == work / "r-4"
    leave(work / "r-5", make_config(), "KILLED", (20,))
    assert choose(make_config(), "r", "auto").resume == folder_of(work / "r-5", 20)


def test_an_unfinished_run_of_another_configuration_hides_no_finished_one(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config("seed=1"), "KILLED")
    leave(work / "r-2", make_config(), "FINISHED")
    start = choose(make_config(), "r", "auto")
    assert (start.run_dir, start.finished) == (work / "r-2", True)
    with pytest.raises(ConfigError, match=r"seed: expected 1, got 2; use --resume never or --run-dir"):
        choose(make_config("seed=2"), "r", "auto")


@pytest.mark.parametrize("status", [None, "FAILED", "KILLED"])
def test_an_unfinished_run_is_continued(work: Path, make_config: MakeConfig, status: str | None) -> None:
    leave(work / "r", make_config(), status, (20, 40))
    start = choose(make_config(), "r", "auto")
    assert (start.run_dir, start.resume) == (work / "r", work / "r" / "checkpoints" / "step-00000040")
    assert start.note == f"continuing the unfinished run in {work / 'r'}, from step-00000040"
    assert choose(make_config(), "r", "never").run_dir == work / "r-2"


def test_a_checkpoint_without_manifest_is_none(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FAILED", (20, 40))
    for step in (40, 20):
        (folder_of(work / "r", step) / "manifest.json").unlink()
        resume = choose(make_config(), "r", "auto").resume
        assert resume == (folder_of(work / "r", 20) if step == 40 else None)


def test_the_unfinished_one_beside_a_finished_one_is_continued(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FINISHED")
    leave(work / "r-2", make_config(), "KILLED", (20,))
    assert choose(make_config(), "r", "auto").resume == folder_of(work / "r-2", 20)


def test_another_configuration_is_refused_and_named(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FAILED", (20,))
    other = make_config("seed=3", "model.layers.0.plasticity.lr=0.05", "model.layers.1.pool=1")
    with pytest.raises(ConfigError) as caught:
        choose(other, "r", "auto")
    assert str(caught.value) == (
        f"--resume: {work / 'r'} belongs to another configuration: "
        "model.layers.0.plasticity.lr: expected 0.1, got 0.05; model.layers.1.pool: expected None, got 1; "
        "seed: expected 0, got 3; use --resume never or --run-dir"
    )
    assert choose(other, "r", "never").run_dir == work / "r-2"


@pytest.mark.parametrize("damaged", [False, True])
def test_tau_left_out_is_that_of_the_continued_run(work: Path, make_config: MakeConfig, damaged: bool) -> None:
    """Its default was 0.5 in earlier versions, whose runs continue with the same command. A given one must agree."""
    plasticity = "model.layers.0.plasticity={lr: 0.1, lr_decay_steps: 20"
    given = make_config(plasticity + ", tau: 0.5}")
    leave(work / "r", given, "KILLED", (20,))
    if damaged:
        (work / "r" / "config.yaml").write_text("")
    start = choose(make_config(plasticity + "}"), "r", "auto")
    assert (start.resume, start.config) == (folder_of(work / "r", 20), given)
    assert choose(given, "r", "auto").config == given
    fresh = choose(make_config(plasticity + "}"), "r", "never").config
    assert fresh.model.layers[0].plasticity.tau == 1.0
    begun = choose(make_config(plasticity + "}"), "s", str(folder_of(work / "r", 20)))
    assert (begun.run_dir, begun.config) == (work / "s", given)
    with pytest.raises(ConfigError, match=r"plasticity\.tau: expected 0\.5, got 1\.0"):
        choose(make_config(plasticity + ", tau: 1.0}"), "r", "auto")


def test_many_differences_are_counted(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FAILED")
    with pytest.raises(ConfigError, match=r"got 'all'; .* and \d+ more; use --resume never"):
        choose(make_config("model.layers=[{out_channels: 3, kernel_size: 3}]", "model.features=all"), "r", "auto")


@pytest.mark.parametrize(
    "change",
    [
        "mesh.channel=3",
        "cluster.threads_per_rank=2",
        "tracking.enabled=false",
        "checkpoint.every_steps=7",
        "probe.readout=ridge",
        "log_every=3",
        "encode_batch=17",
        "cache_features=false",
        "divergence=lower_rate",
        "name=other",
    ],
)
def test_what_changes_nothing_that_is_learnt_may_differ(work: Path, make_config: MakeConfig, change: str) -> None:
    leave(work / "r", make_config(), "FAILED", (20,))
    assert choose(make_config(change), "r", "auto").resume == folder_of(work / "r", 20)


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FAILED", (20,))
    path = work / "r" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["data"]["damaged"]
    del values["model"]["feature_pool"]
    path.write_text(yaml.safe_dump(values))
    assert choose(make_config(), "r", "auto").resume == folder_of(work / "r", 20)
    with pytest.raises(ConfigError, match=r"data\.damaged: expected 'stop', got 'skip'"):
        choose(make_config("data.damaged=skip"), "r", "auto")


def test_resume_names_a_run_or_a_checkpoint(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FAILED", (20, 40))
    run = choose(make_config(), None, "r")
    assert (run.run_dir, run.resume) == (work / "r", folder_of(work / "r", 40))
    fork = choose(make_config(), "r", str(folder_of(work / "r", 20)))
    assert (fork.run_dir, fork.resume) == (work / "r-2", folder_of(work / "r", 20))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.out_channels: expected 16, got 8"):
        choose(make_config("model.layers.0.out_channels=8"), "new", str(folder_of(work / "r", 20)))
    with pytest.raises(ConfigError, match=r"--resume: expected auto, never, a run directory or a checkpoint, got .*no"):
        choose(make_config(), None, "nothing-there")


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "a: 2020-99-99"])
def test_a_run_whose_configuration_cannot_be_read_is_named(work: Path, make_config: MakeConfig, content: str) -> None:
    leave(work / "r", make_config(), "FAILED")
    (work / "r" / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"--resume: expected the configuration of a run in .*, got [^\n]+$"):
        choose(make_config(), "r", "auto")


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "a: 2020-99-99"])
def test_a_checkpoint_gives_the_configuration_if_its_file_is_damaged(
    work: Path, make_config: MakeConfig, content: str
) -> None:
    """As an interrupted write has left it; the newest manifest is damaged as well."""
    leave(work / "r", make_config(), "FAILED", (20, 40))
    (work / "r" / "config.yaml").write_text(content)
    (folder_of(work / "r", 40) / "manifest.json").write_text("")
    start = choose(make_config(), "r", "auto")
    assert start.resume == folder_of(work / "r", 20)
    first, _, last = start.note.split("\n")
    assert first.startswith(f"{work / 'r' / 'config.yaml'} is damaged (")
    assert first.endswith("): the configuration is that of step-00000020")
    assert last == f"continuing the unfinished run in {work / 'r'}, from step-00000020"
    with pytest.raises(ConfigError, match=r"step-00000020 belongs to another configuration: seed: expected 0, got 1"):
        choose(make_config("seed=1"), "r", "auto")


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", None])
def test_another_folder_begins_a_new_run_from_the_newest_checkpoint(
    work: Path, make_config: MakeConfig, status: str | None
) -> None:
    leave(work / "r", make_config(), status, (20, 40))
    (folder_of(work / "r", 40) / "rank-0-of-1.safetensors").write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in sorted((work / "r").rglob("*")) if path.is_file()}
    start = choose(make_config(), "x", "r")
    assert (start.run_dir, start.resume) == (work / "x", folder_of(work / "r", 20))
    assert "step-00000040 is damaged" in start.note
    assert start.note.endswith(f"a new run in {work / 'x'} from {folder_of(work / 'r', 20)}")
    leave(work / "x", make_config("seed=7"), "KILLED")  # nobody's to change either
    assert choose(make_config(), "x", "r").run_dir == work / "x-2"
    assert before == {path: path.read_bytes() for path in sorted((work / "r").rglob("*")) if path.is_file()}


def test_a_finished_run_that_is_named_begins_another(work: Path, make_config: MakeConfig) -> None:
    finished, other = leave(work / "r", make_config(), "FINISHED", (116,)), work / "runs" / "digits"
    checkpoint = folder_of(finished, 116)
    for run_dir, expected in ((None, other), ("r", work / "r-2")):
        start = choose(make_config(), run_dir, "r")
        assert (start.run_dir, start.resume) == (expected, checkpoint)


def test_an_unfinished_run_that_is_named_twice_goes_on(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "KILLED", (20,))
    (work / "link").symlink_to(work / "r")
    for run_dir in (None, "r", "link"):
        assert choose(make_config(), run_dir, "r").run_dir == work / "r"


def test_a_run_without_a_checkpoint_begins_nothing(work: Path, make_config: MakeConfig) -> None:
    leave(work / "r", make_config(), "FINISHED")
    with pytest.raises(ConfigError, match=r"--resume: expected a run with a checkpoint to begin with, got .*r: it has"):
        choose(make_config(), "x", "r")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": 3}'])
def test_a_broken_summary_is_that_of_an_unfinished_run(work: Path, make_config: MakeConfig, content: str) -> None:
    leave(work / "r", make_config(), None, (20,))
    (work / "r" / "summary.json").write_text(content)
    assert choose(make_config(), "r", "auto").resume == folder_of(work / "r", 20)


def test_a_place_that_cannot_be_a_folder_is_refused(work: Path, make_config: MakeConfig) -> None:
    (work / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"--run-dir: expected a folder, got the file .*file$"):
            choose(make_config(), place, "auto")
    with pytest.raises(ConfigError, match="--run-dir: expected a folder, got nothing"):
        choose(make_config(), "", "auto")
    with pytest.raises(ConfigError, match=r"--run-dir: expected a folder that can be made, .*File name too long"):
        choose(make_config(), "x" * 300, "auto")
    leave(work / "r", make_config(), "FINISHED")
    (work / "r-2").touch()
    with pytest.raises(ConfigError, match=r"--run-dir: expected a folder, got the file .*r-2$"):
        choose(make_config(), "r", "auto")


def test_a_place_that_may_not_be_written_is_refused(
    work: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.run_directory.os.access", lambda path, mode: path != work)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"--run-dir: expected a folder that can be written to, got .*work$"):
        choose(make_config(), "new/r", "auto")


def test_inside_the_copy_of_a_ray_job(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "ray" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert default_root() == Path("runs")  # a folder of that name alone is no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match=r"--run-dir: expected an absolute path inside a Ray job.*got 'runs/mine'"):
        choose(make_config(), "runs/mine", "auto")
    assert choose(make_config(), str(tmp_path / "mine"), "auto").run_dir == tmp_path / "mine"
    assert choose(make_config(), None, "auto").run_dir == tmp_path / "home" / "simmatch" / "runs" / "digits"


@pytest.mark.parametrize(
    ("given", "metadata"),
    [
        (None, {}),
        ("{}", {}),
        ("[]", {}),
        ("{", {}),
        ('{"metadata": {"simmatch.owner": "ada"}}', {"simmatch.owner": "ada"}),
    ],
)
def test_a_job_knows_what_was_given_with_it(
    given: str | None, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", given)
    assert job_metadata() == metadata
