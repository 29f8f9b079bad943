"""What is measured of the service, and of champions on simulated streams.

Oracles: the records that were appended, which a killed stream must know again; the journal's own files; the binomial
distribution of what is drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

import jobs.benchmark
from jobs.benchmarks.stream import asked, comparison, service
from jobs.benchmarks.stream.comparison import constant, switches, until_found, worse_then_better
from jobs.benchmarks.stream.service import Sizes
from jobs.streaming.config import parse_stream


class InThisProcess:
    """Runs the client's program here: what it measures needs no process of its own in a test."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, program: Any, *arguments: Any) -> list[Any]:
        return [program(None, *arguments)]


@pytest.mark.timeout(600)  # processes import torch, one after the other
def test_the_whole_service_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(per_round=320, long=1280, asked=640, requests=20, every_batches=4)
    monkeypatch.setattr(service, "QUICK", sizes)
    blocks = (service._blocks, (service._memory, service._answers, service._restore))
    monkeypatch.setattr(service, "CASES", {"blocks of 32 samples": blocks})  # two processes are enough
    monkeypatch.setattr(asked, "RankGroup", InThisProcess)
    assert jobs.benchmark.main(["stream", "--quick", "--parts", "service", "--run-dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    assert [row["what"] for row in kinds["service rate"]] == ["service", "pipeline alone"]
    whole, alone = kinds["service rate"]
    assert whole["processor_us"] > alone["processor_us"] > 0
    assert whole["times_processor"] > alone["times_processor"] == 1.0
    for row in kinds["journal"]:
        assert 32 * 8 < row["journal"] < 2 * row["json"]  # 32 numbers of 8 bytes, and an id
    assert [row["records"] for row in kinds["memory"]] == list(range(0, 1281, 64))
    assert all(0 < row["own"] < row["resident"] for row in kinds["memory"])
    found = {(row["stream"], row["windows"]): row for row in kinds["answers"]}
    assert sum(found["waits", windows]["requests"] for windows in (1, asked.MANY)) == sizes.requests
    assert 0 < found["waits", 1]["work_p50_ms"] < found["waits", asked.MANY]["work_p50_ms"]
    assert 0 < found["waits", 1]["work_p50_ms"] <= found["waits", 1]["latency_p50_ms"]
    [restore] = kinds["restore"]
    assert restore["since_snapshot"] == (sizes.every_batches - 1) * service.BATCH
    assert restore["records"] >= 3 * sizes.per_round + sizes.asked
    text = (tmp_path / "tables-service.md").read_text()
    assert "2 rounds of 320 records, in turns:" in text
    assert all((tmp_path / "figures" / f"service-{name}.png").exists() for name in ("memory", "answers"))


def test_buffers_are_full_after_a_quarter_of_the_long_stream() -> None:
    config = parse_stream(service._windows(service.FULL))
    assert len(config.candidates) == 2
    assert max(config.labels.ids, config.labels.horizon, config.answers.kept) <= service.FULL.long // 4


def test_simulated_candidates_are_as_different_as_stated() -> None:
    generator = Generator().manual_seed(0)
    for draw, seen, expected in (
        (constant(0.05, 0.3), 0, 0.05),
        (worse_then_better(0.05, 0.3), 0, -0.05),
        (worse_then_better(0.05, 0.3), comparison.LENGTH // 2, 0.05),
    ):
        drawn = torch.cat([draw(seen, generator) for _ in range(4000)]).double()
        deviation = (0.3 / len(drawn)) ** 0.5
        assert float(drawn.mean()) == pytest.approx(expected, abs=4 * deviation)
        assert float(drawn.abs().mean()) == pytest.approx(0.3, abs=4 * deviation)


def test_a_better_challenger_is_found_later_in_a_later_comparison() -> None:
    draw = constant(0.1, 0.3)
    first, tenth = ([until_found(draw, number, seed) for seed in range(5)] for number in (1, 10))
    assert all(100 <= one < ten < 5_000 for one, ten in zip(first, tenth, strict=True))


def test_a_worse_challenger_is_no_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "LENGTH", 2_000)
    assert not any(switches(constant(-0.1, 0.3), seed) for seed in range(3))
    assert all(switches(constant(0.2, 0.3), seed) for seed in range(3))
