"""`python -m jobs.chaos`: what it takes for a recovery, and a short soak on the digits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.allocation import Allocation
from cluster.layout import RankInfo
from cluster.messages import GroupStarted, Progress, StartingPoint
from jobs.chaos import main
from jobs.json_progress import JsonDisplay, Shown, Text, read_line, write_line
from jobs.watched_job import ENDS_DRIVER, STRIKES, WatchedJob


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> WatchedJob:
    """A job that has not reported anything yet."""
    monkeypatch.setattr(WatchedJob, "start", lambda _: None)
    return WatchedJob([])


def started(*pids: int) -> GroupStarted:
    return GroupStarted(tuple(RankInfo(rank, pid, Allocation("node", "127.0.0.1", 2)) for rank, pid in enumerate(pids)))


def report(job: WatchedJob, *messages: tuple[float, Shown]) -> None:
    """Give the job messages of these times, as lines."""
    for when, message in messages:
        job._take_in(json.dumps(json.loads(write_line(message)) | {"time": when}))


LEARN = Progress("learn", 1, 9, layer=0, step=41)


@pytest.mark.parametrize(
    "message",
    [LEARN, Progress("readout", 0, 1), started(71, 72), StartingPoint(40, "goes on"), Text("a {note}\nof two lines")],
)
def test_a_message_comes_back_from_its_line(message: Shown) -> None:
    before = time.time()
    line = write_line(message)
    assert "\n" not in line
    when, again = read_line(line)
    assert again == message
    assert before <= when <= time.time()


@pytest.mark.parametrize(
    "line", ["", "Traceback", "7", '{"time": 1}', '{"time": 1, "type": "Unknown"}', '{"type": "Text"}']
)
def test_a_line_that_is_no_message_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|expected a message of type Progress, StartingPoint"):
        read_line(line)


def test_a_field_of_the_wrong_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="total"):
        read_line('{"time": 1, "type": "Progress", "phase": "learn", "done": 1}')


def test_progress_that_is_repeated_is_written_once_for_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay(Console(), lambda text: text.replace("secret", "***"))
    display.progress(LEARN)
    display.progress(LEARN)
    display.note("a secret")
    display.note(StartingPoint(40, "from a secret"))
    display.progress(LEARN)
    lines = [read_line(line)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [LEARN, Text("a ***"), StartingPoint(40, "from a ***"), LEARN]


def test_a_job_works_once_its_ranks_report_progress(job: WatchedJob) -> None:
    report(job, (10.0, Text("a new run in /x")), (12.0, started(71, 72)))
    assert (job.pids, job.working_since) == ({0: 71, 1: 72}, None)
    report(job, (13.0, LEARN))
    assert (job.working_since, job.step, job.trace) == (13.0, 41, [(13.0, 41)])
    report(job, (14.0, Progress("encode", 1, 9, layer=0)))  # no update, so no step
    assert (job.working_since, job.step) == (13.0, 41)


@pytest.mark.parametrize("step", [40, 0])
def test_a_job_that_starts_again_does_not_work_until_its_new_ranks_do(job: WatchedJob, step: int) -> None:
    report(job, (1.0, started(71, 72)), (2.0, Progress("learn", 1, 9, step=43)))
    report(job, (3.0, StartingPoint(step, "rank 1 was lost; starting a new group")))
    assert (job.pids, job.working_since, job.start_step) == ({}, None, step)
    report(job, (4.0, started(81, 82)), (5.0, Progress("learn", 2, 9)))
    assert (job.pids, job.working_since) == ({0: 81, 1: 82}, 5.0)
    assert job.every_pid == {71, 72, 81, 82}


def test_lines_that_are_no_messages_are_kept_for_people(job: WatchedJob) -> None:
    job._take_in("error: mesh: no\n")
    assert job.lines == ["error: mesh: no"]


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


@pytest.mark.parametrize(
    "arguments", [("--minutes", "-1"), ("--minutes", "nan"), ("--gap", "1", "x"), ("--seed", "-1")]
)
def test_numbers_are_checked(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(list(arguments))
    assert f"argument {arguments[0]}: expected a" in capsys.readouterr().err


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
