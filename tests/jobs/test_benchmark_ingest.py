"""The benchmark of reading: every way reads the same images, and its figures are what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import jobs.benchmarks.ingest
import simmatch.data.shards
from jobs.benchmark import main
from jobs.benchmarks.ingest import write_images
from jobs.benchmarks.ingest_readers import READERS, measure
from simmatch.data.config import DataConfig
from simmatch.data.listing import list_samples
from simmatch.data.location import Location
from simmatch.data.preparation import in_threads, prepare
from simmatch.data.preparing import Plan

IMAGES = 330


@pytest.fixture(params=[1, 3])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(simmatch.data.shards, "SHARD_BYTES", 100 * 64 * request.param)
    write_images(tmp_path / "jpeg", tmp_path / "tar", IMAGES, 8, request.param, seed=0)
    prepare_here(tmp_path / "jpeg", tmp_path / "prepared")
    return tmp_path


def prepare_here(source: Path, to: Path) -> None:
    config = DataConfig(path=str(source), test_fraction=0.1)
    prepare(Plan(config, list_samples(config)), Location(to), in_threads, lambda done, total: None)


def test_every_way_reads_the_same_images(folder: Path) -> None:
    own = list(READERS["prepared"](folder / "prepared", 1000, 0))
    assert [len(pixels) for pixels, _ in own] == [100, 100, 100]
    for (pixels, labels), (others, known) in zip(own, READERS["memmap"](folder / "prepared", 1000, 0), strict=True):
        assert torch.equal(pixels, others)
        assert torch.equal(labels, known)
    both = [Path(folder, "jpeg"), Path(folder, "prepared")]
    means = [
        torch.cat([part.double().mean(dim=(1, 2, 3)) for part, _ in READERS[name](place, 1000, 0)]).unique()
        for name, place in zip(("imagefolder", "prepared"), both, strict=True)
    ]
    assert torch.isin(means[1], means[0]).all()
    result = measure(READERS["prepared"], folder / "prepared", 200, 0)
    assert result["images_per_second"] > 0
    assert 2**24 < result["pss_bytes"] < 2**34


def test_the_report_holds_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"prepared": 3000, "memmap": 1500, "imagefolder": 1000, "webdataset": 500}

    def process(command: list[str]) -> str:
        if command[0] == "jobs.prepare":
            prepare_here(Path(command[2]).parent / "jpeg", Path(command[-1]))
            return ""
        _, reader, folder, images, _ = command
        assert Path(folder).is_dir()
        assert int(images) == 100
        return json.dumps({"images_per_second": rates[reader], "pss_bytes": 10**8})

    monkeypatch.setattr(jobs.benchmarks.ingest, "_process", process)
    memory = {"driver": 3 * 10**8, "rank 0": 2 * 10**8, "together": 5 * 10**9}
    monkeypatch.setattr(jobs.benchmarks.ingest, "_run_memory", lambda config, folder: memory)
    arguments = ["ingest", "--quick", "--counts", "300", "--side", "8", "--epoch", "100", "--run-dir", str(tmp_path)]
    assert main([*arguments, "--folder", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "ingest.jsonl").read_text().splitlines()]
    readers = {row["way"]: row for row in rows if row["kind"] == "reader"}
    assert readers["memmap + DataLoader"]["own_speedup"] == 2
    assert readers["ImageFolder, 2 processes"]["own_speedup"] == 3
    assert readers["this project"]["pss_bytes"] == 10**8
    prepared = next(row for row in rows if row["kind"] == "prepare")
    saved_s = 300 / 1000 - 300 / 3000  # each epoch
    assert prepared["epochs_until_paid"] == pytest.approx(prepared["seconds"] / saved_s, rel=1e-3)
    row = next(row for row in rows if row["kind"] == "memory")
    assert row["pss_bytes"] == memory
    assert row["within"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["ingest.jsonl"]  # nothing is left of the images


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_the_small_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", "--quick", "--run-dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "ingest.jsonl").read_text().splitlines()]
    memory = next(row for row in rows if row["kind"] == "memory")
    assert memory["within"] is True
    assert {"driver", "rank 0", "rank 1", "together"} <= memory["pss_bytes"].keys()
