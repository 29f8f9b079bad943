"""`python -m jobs.chaos`: what it takes for a recovery, and a short soak on the digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.chaos import main
from jobs.soak.strikes import ENDS_DRIVER, STRIKES
from jobs.soak.watched import Watched

RANKS = "ranks: 0 on node (pid 71), 1 on node (pid 72)"


@pytest.fixture
def job() -> Watched:
    """A job that has not said anything yet."""
    found = Watched.__new__(Watched)
    found.pids, found.every_pid, found.said, found.trace = {}, set(), [], []
    found.step = found.origin = 0
    found.working_since = None
    return found


def say(job: Watched, *lines: dict | str) -> None:  # type: ignore[type-arg]
    for line in lines:
        job._hear(line if isinstance(line, str) else json.dumps(line))


def test_a_job_works_once_its_ranks_tell_something(job: Watched) -> None:
    say(job, {"time": 10.0, "note": "a new run in /x"}, {"time": 12.0, "note": RANKS})
    assert (job.pids, job.working_since) == ({0: 71, 1: 72}, None)
    say(job, {"time": 13.0, "phase": "learn", "done": 1, "total": 9, "step": 41})
    assert (job.working_since, job.step, job.trace) == (13.0, 41, [(13.0, 41)])
    say(job, {"time": 14.0, "phase": "encode", "done": 1, "total": 9})  # no update, so no step
    assert (job.working_since, job.step) == (13.0, 41)


@pytest.mark.parametrize(
    ("note", "origin"),
    [
        ("rank 1 (pid 72 on node) was lost: killed; starting a new group from step-00000040, 3 updates again", 40),
        ("rank 1 (pid 72 on node) was lost: killed; starting a new group from the beginning, 3 updates again", 0),
        ("continuing the unfinished run in /x, from step-00000040", 40),
        ("continuing the unfinished run in /x, no checkpoint: from the beginning", 0),
    ],
)
def test_a_job_that_begins_again_does_not_work_until_its_new_ranks_do(job: Watched, note: str, origin: int) -> None:
    say(job, {"time": 1.0, "note": RANKS}, {"time": 2.0, "phase": "learn", "done": 1, "total": 9, "step": 43})
    say(job, {"time": 3.0, "note": note})
    assert (job.pids, job.working_since, job.origin) == ({}, None, origin)
    say(job, {"time": 4.0, "note": RANKS.replace("7", "8")}, {"time": 5.0, "phase": "learn", "done": 2, "total": 9})
    assert (job.pids, job.working_since) == ({0: 81, 1: 82}, 5.0)
    assert job.every_pid == {71, 72, 81, 82}


def test_lines_that_are_none_of_ours_are_kept_for_people(job: Watched) -> None:
    say(job, "error: mesh: no\n")
    assert job.said == ["error: mesh: no"]


def test_every_strike_at_a_driver_knows_its_status() -> None:
    assert set(ENDS_DRIVER) == {kind for kind in STRIKES if kind.startswith("driver")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gap", "5", "1"), "--gap: expected two rising numbers of seconds above 0, got [5.0, 1.0]"),
        (("--run-dir", "s3://bucket/x"), "--run-dir: expected a folder of this machine, got s3://bucket/x"),
        (("--set", "mesh.chanel=2"), "mesh.chanel: "),
        (("--config", "nowhere.yaml"), "--config: expected a YAML file, got nowhere.yaml"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, tmp_path: Path, digits_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--run-dir", str(tmp_path / "chaos"), "--config", str(digits_yaml), *arguments]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "chaos").exists()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_soak_on_the_digits(tmp_path: Path, digits_yaml: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "jobs.chaos", "--config", str(digits_yaml), "--run-dir", str(tmp_path / "chaos")]
    command += ["--minutes", "0.7", "--gap", "0.5", "2", "--seed", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [row for row in rows if row.get("kind") == "run"]
    assert all(row["same_weights"] and row["same_records"] and row["orphans"] == [] for row in runs)
    (total,) = [row for row in rows if row.get("kind") == "summary" and row["struck_by"] == "all"]
    assert total["strikes"] == total["survived"] > 0
    assert "every run ended with the weights and records of the undisturbed one" in done.stderr
    assert len(list((tmp_path / "chaos" / "figures").glob("disturbed-*.png"))) == len(runs)
    strikes = [row for row in rows if row.get("kind") == "strike" and row["recovered_s"] is not None]
    assert all(0 < row["recovered_s"] < 300 and 0 <= row["again"] <= 29 for row in strikes)
