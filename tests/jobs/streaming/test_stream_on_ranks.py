"""`python -m jobs.stream` with a mesh: the digest of one process, and a replay without ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.stream import main
from jobs.streaming.config import parse_stream
from simmatch.config import ConfigError
from tests.jobs.streaming.streams import small, waves
from tests.jobs.streaming.test_stream import command, lines, summary

EXACT = ("--set", "reduce=exact", "--set", "model.layers.0.dynamics.exchange=gather_state")


@pytest.mark.fault
@pytest.mark.slow
def test_ranks_give_the_digest_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for mesh in ("mesh.channel=1", "mesh.channel=2"):
        folder = tmp_path / mesh
        folder.mkdir()
        (folder / "waves.jsonl").write_text(lines(waves(80, labelled=0.5)))
        arguments = command(folder, *EXACT, "--set", mesh)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.stream", *arguments], capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("ray: embedded" in done.stdout) == (mesh == "mesh.channel=2")
        found[mesh] = summary(folder)["digest"]
    assert len(set(found.values())) == 1
    assert main(["--run-dir", str(tmp_path / "mesh.channel=2" / "run"), "--replay"]) == 0
    assert f"digest {found['mesh.channel=1']}" in capsys.readouterr().out


def test_local_is_one_process_and_may_go_on_with_exact_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With fast sums another mesh has other bits."""
    for options, code in ((EXACT, 0), ((), 2)):
        folder = tmp_path / str(code)
        folder.mkdir()
        (folder / "waves.jsonl").write_text(lines(waves(30)))
        assert main(command(folder, *options, "--set", "mesh.channel=2", "--local")) == 0
        config = folder / "run" / "config.yaml"
        config.write_text(config.read_text().replace("channel: 1", "channel: 2"))
        before = summary(folder)["digest"]
        assert main(command(folder, *options, "--set", "mesh.channel=2", "--local")) == code
        assert ("mesh.channel: expected 2, got 1" in capsys.readouterr().err) == (code == 2)
        assert summary(folder)["digest"] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"layer": 2}}, "mesh.layer: expected at most 1, as layers learn one after the other"),
        ({"mesh": {"channel": 9}}, "mesh.channel: expected at most 8, the out_channels of model.layers.0, got 9"),
        (
            {"reduce": "exact"},
            "reduce: expected fast with model.layers.0.dynamics.exchange: every_iteration, got exact",
        ),
    ],
)
def test_a_mesh_that_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_stream(small(**{}).model_dump(mode="json") | changes)


def test_a_replay_of_other_sums_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "waves.jsonl").write_text(lines(waves(30)))
    assert main(command(tmp_path)) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("channel: 1", "channel: 2"))
    assert main(["--run-dir", str(tmp_path / "run"), "--replay"]) == 2
    assert "error: reduce: expected exact to replay a stream of data 1 × layer 1 × channel 2, got fast" in (
        capsys.readouterr().err
    )
