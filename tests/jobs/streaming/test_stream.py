"""`python -m jobs.stream`: what it says, its exit statuses, and a run directory that goes on."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.signals import CONTINUES
from jobs.stream import main
from jobs.streaming.candidate import Candidate
from jobs.streaming.records import LateLabel, Record, Source
from jobs.streaming.service import Service
from simmatch.documents import dump_yaml
from simmatch.files import locked
from simmatch.online.stack import OnlineStack
from tests.jobs.streaming.streams import Item, journalled, small, wait_until, waves

SIX_GPUS = "candidates={main: [], other: [rate.kind=falling]}", "mesh.data=3", "device=cuda"


def lines(items: list[Item]) -> str:
    """Records and labels as a file of JSON lines."""
    texts = []
    for item in items:
        match item:
            case Record():
                fields: dict[str, Any] = {"id": item.id, "time": item.time, "values": item.values.tolist()}
                texts.append(json.dumps(fields | ({"label": item.label} if item.label else {})) + "\n")
            case LateLabel():
                texts.append(json.dumps({"id": item.id, "label": item.label}) + "\n")
    return "".join(texts)


def command(folder: Path, *options: str, follow: bool = False) -> list[str]:
    """Arguments of a job that reads `waves.jsonl` in a folder."""
    source = {"lines": {"path": str(folder / "waves.jsonl"), "follow": follow}}
    path = folder / "stream.yaml"
    path.write_text(dump_yaml(small(source=source).model_dump(mode="json")))
    return ["--config", str(path), "--run-dir", str(folder / "run"), *options]


def summary(folder: Path) -> dict[str, Any]:
    """Of the run there."""
    values: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return values


def test_modules_are_no_part_of_collections_while_records_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, whole = [], Service.run

    def run(service: Service, source: Source) -> None:
        frozen.append(gc.get_freeze_count())
        assert "river.drift" in sys.modules
        whole(service, source)

    monkeypatch.setattr(Service, "run", run)
    (tmp_path / "waves.jsonl").write_text(lines(waves(40)))
    before = len(gc.get_objects())
    assert main(command(tmp_path)) == 0
    assert frozen[0] > before // 2
    assert gc.get_freeze_count() == 0


def test_a_file_is_learnt_replayed_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = waves(120, labelled=0.5)
    (tmp_path / "waves.jsonl").write_text(lines(items) + '{"id": "x"\n')
    assert main(command(tmp_path)) == 0
    first = summary(tmp_path)
    assert (first["status"], first["records"], first["set_aside"], first["champion"]) == ("FINISHED", 120, 1, "main")
    assert first["accuracy"]["main"] > 0.8
    [aside] = (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(aside)["raw"] == '{"id": "x"'
    capsys.readouterr()
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 0
    assert f"digest {first['digest']}\nequal to the digest of 3 snapshots\n" in capsys.readouterr().out
    with (tmp_path / "waves.jsonl").open("a") as file:
        file.write(lines(waves(150)[120:]))
    assert main(command(tmp_path)) == 0
    assert summary(tmp_path)["records"] == 150
    assert summary(tmp_path)["set_aside"] == 1
    assert len((tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()) == 1
    assert len(journalled(tmp_path / "run")) == len(items) + 1 + 30


def test_a_restarted_stream_shows_what_was_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").write_text(lines(waves(120)) + "x\n")
    assert main(command(tmp_path)) == 0
    before = [line for line in capsys.readouterr().out.splitlines() if line.startswith("120 records")][-1]
    with (tmp_path / "waves.jsonl").open("a") as file:
        file.write('{"id": "r120", "time": 120, "values": ' + json.dumps([[0.5]] * 16) + "}\n")  # without a label
    assert main(command(tmp_path)) == 0
    after = [line for line in capsys.readouterr().out.splitlines() if line.startswith("121 records")][-1]
    assert [part for part in before.split(" · ") if "main" in part or "aside" in part] == [
        part for part in after.split(" · ") if "main" in part or "aside" in part
    ]
    assert "1 set aside" in after
    assert main(command(tmp_path)) == 0  # no new record: nothing to show
    assert " records · " not in capsys.readouterr().out


def test_another_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").write_text(lines(waves(30)))
    assert main(command(tmp_path)) == 0
    assert main(command(tmp_path, "--set", "seed=1", "--set", "max_wait_s=2")) == 2
    assert capsys.readouterr().err == (
        f"error: --resume: {tmp_path / 'run'} belongs to another configuration: seed: expected 0, got 1; "
        "use --resume never or --run-dir\n"
    )
    assert main(command(tmp_path, "--set", "max_wait_s=2")) == 0
    assert main(command(tmp_path, "--set", "seed=1", "--resume", "never")) == 0
    assert (tmp_path / "run-2" / "summary.json").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                                   "79.11 GiB of which 1.50 GiB is free. If reserved but"),
            "out of GPU memory (asked for 2 GiB, 1.5 GiB of 79.1 GiB free)",
        ),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cuda"),
         "AcceleratorError: CUDA error: unspecified launch failure"),
    ],
    ids=["memory", "launch"],
)  # fmt: skip
def test_a_device_that_fails_ends_the_stream_with_one_line(
    error: RuntimeError, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a batch; nothing is asked of it after that, and the same command goes on."""
    (tmp_path / "waves.jsonl").write_text(lines(waves(60)))
    learn, batches = Candidate.learn, []

    def failing(*_: Any) -> Any:
        raise error

    def broken(self: Candidate, *arguments: Any) -> None:
        batches.append(1)
        if len(batches) == 6:
            monkeypatch.setattr(OnlineStack, "state", failing)
            monkeypatch.setattr(OnlineStack, "export", failing)
            raise error
        learn(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Candidate, "learn", broken)
        assert main(command(tmp_path)) == 1
    monkeypatch.undo()
    assert capsys.readouterr().err == f"error: device: {said}\n"
    failed = summary(tmp_path)
    assert (failed["status"], failed["digest"]) == ("FAILED", None)
    assert not (tmp_path / "run" / "model").exists()
    assert main(command(tmp_path)) == 0
    assert summary(tmp_path)["records"] == len(journalled(tmp_path / "run")) == 60
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 0


def test_without_snapshots_the_journal_is_applied_to_another_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How a stream is moved to another device; as that needs one, here to another seed."""
    (tmp_path / "waves.jsonl").write_text(lines(waves(60)))
    assert main(command(tmp_path)) == 0
    shutil.rmtree(tmp_path / "run" / "snapshots")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    with (tmp_path / "waves.jsonl").open("a") as file:
        file.write(lines(waves(90)[60:]))
    assert main(command(tmp_path, "--set", "seed=1")) == 0
    assert summary(tmp_path)["records"] == len(journalled(tmp_path / "run")) == 90
    capsys.readouterr()
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 0
    assert f"digest {summary(tmp_path)['digest']}\n" in capsys.readouterr().out


def test_a_replay_that_differs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").write_text(lines(waves(60)))
    assert main(command(tmp_path)) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 1
    assert "error: the replay differs from the snapshots of batches " in capsys.readouterr().err


def test_a_second_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").touch()
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / "lock", 0.0):
        assert main(command(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"error: --run-dir: another process works in {tmp_path / 'run'}; end it, or use another --run-dir\n"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("batch_sise=3", "batch_sise: unknown key; expected one of"),
        ("data.split=time", "data: expected none of columns, time_column, label_pattern, split, turn for a stream"),
        ("champion=other", "champion: expected one of main, got 'other'"),
        ("candidates.main=[seed=1]", "candidates.main: expected a key below model, rate, readout, novelty, drift"),
        ("candidates.main=[rate.knd=constant]", "candidates.main: rate.knd: unknown key; expected one of"),
        ("source.lines=null", "source: expected one of"),
        ("data.window=4", "model.layers.0.kernel_size: expected at most 1 × 4"),
        ("candidates={}", "candidates: expected at least one, got none"),
        (
            "source.lines.path=/nowhere/log.jsonl",
            "source.lines.path: expected a file, got /nowhere/log.jsonl, which does",
        ),
        ("source.lines.path=/", "source.lines.path: expected a file, got /, a folder; see source.folder"),
        (
            "source={mqtt: {host: localhost, topics: [a], client_id: a, most_unacknowledged: 100001}}",
            "source.mqtt.most_unacknowledged: expected",
        ),
        (
            "source={mqtt: {host: localhost, topics: [a], client_id: a, most_unacknowledged: 60000}}",
            "labels.ids: expected at least source.mqtt.most_unacknowledged=60000, as so many may come again, got 1000",
        ),
        (
            "source={mqtt: {host: localhost, topics: [a], client_id: a, user: u, password_variable: SIMMATCH_NO_SUCH}}",
            "source.mqtt.password_variable: expected a variable that holds a password, got SIMMATCH_NO_SUCH, which is",
        ),
        ("device=gpu", "device: expected 'cpu' or 'cuda', got 'gpu'"),
        ("snapshot.keep=1", "snapshot.keep: expected greater than or equal to 2, got 1"),
    ],
)
def test_bad_configuration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    (tmp_path / "waves.jsonl").touch()  # that it is there is looked at last
    assert main([*command(tmp_path), "--set", "labels.ids=1000", "--set", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_device_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether this process or ranks would use it; and another one for a stream that has begun."""
    (tmp_path / "waves.jsonl").write_text(lines(waves(30)))
    empty = torch.empty

    def refused(*options: str) -> str:
        assert main(command(tmp_path, *(part for each in options for part in ("--set", each)))) in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("error: ").removesuffix("\n")

    def broken(*size: int, device: str | torch.device = "cpu", **options: Any) -> torch.Tensor:
        if torch.device(device).type == "cuda":
            raise torch.AcceleratorError(
                "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously"
            )
        return empty(*size, device=device, **options)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch, "empty", broken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for mesh in ("mesh={}", "mesh.channel=2"):
        reason = "torch sees no CUDA device, for want of a driver or because CUDA_VISIBLE_DEVICES hides it"
        expected = f"device: expected one that torch can use here, got 'cuda': {reason}"
        assert refused("device=cuda", mesh) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert refused("device=cuda") == "device: AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    assert refused(*SIX_GPUS) == "mesh: expected a GPU for each of 6 ranks, got 5 on this machine"
    assert not (tmp_path / "run").exists()
    assert main(command(tmp_path)) == 0
    capsys.readouterr()
    other = f"{tmp_path / 'run'} belongs to another configuration: device: expected 'cpu', got 'cuda'"
    assert refused("device=cuda") == f"--resume: {other}; use --resume never or --run-dir"


def test_a_folder_of_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: other\nepochs: 3\n")
    for arguments in (command(tmp_path), ["--run-dir", str(tmp_path / "run"), "--report"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --run-dir: expected the folder of a stream, got {tmp_path / 'run'}: ")
        assert error.count("\n") == 1


def test_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--dry-run")) == 0
    begins = f"begins in {tmp_path / 'run'}; source: lines; candidates: main; "
    assert f"{begins}layers in this process, device: cpu\n" in capsys.readouterr().out
    assert main(command(tmp_path, "--dry-run", *(part for each in SIX_GPUS for part in ("--set", each)))) == 0
    assert "layers in 6 ranks, device: cuda\n" in capsys.readouterr().out  # a plan: nobody looks for them
    assert not (tmp_path / "run").exists()


def test_a_signal_leaves_a_snapshot(tmp_path: Path) -> None:
    """SIGTERM while it waits for more: exit status 143, and the same command goes on."""
    (tmp_path / "waves.jsonl").write_text(lines(waves(75)))
    arguments = [sys.executable, "-m", "jobs.stream", *command(tmp_path, follow=True)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        run = tmp_path / "run"
        wait_until(lambda: (run / "journal").exists() and len(journalled(run)) == 75, 60)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "error: ended by SIGTERM\n" in output
    assert CONTINUES in output.splitlines()
    ended = summary(tmp_path)
    assert (ended["status"], ended["records"]) == ("KILLED", 75)
    assert (run / "snapshots" / f"{ended['batches']:08d}" / "snapshot.json").exists()
    with (tmp_path / "waves.jsonl").open("a") as file:
        file.write(lines(waves(90)[75:]))
    assert main(command(tmp_path)) == 0
    assert summary(tmp_path)["records"] == 90
