"""`python -m jobs.stream` with `device: cuda`: on a GPU that is pretended, and on a CUDA device."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.stream import main
from jobs.streaming.candidate import Candidate
from jobs.streaming.config import StreamConfig
from jobs.streaming.journal import list_segments, read_entries
from jobs.streaming.served import Snapshot
from jobs.streaming.state import StreamState
from simmatch.documents import dump_yaml
from simmatch.model import load_model
from tests.jobs.streaming.streams import small, waves
from tests.jobs.streaming.test_stream import lines, summary
from tests.pretended import Place, pretended

pytest.importorskip("river", reason="needs river, whose detectors watch every stream")

LAYER: dict[str, Any] = {"out_channels": 8, "kernel_size": [1, 8], "stride": [1, 4], "pool": [1, 1]}
SUPERVISED: dict[str, Any] = {"out_channels": 6, "kernel_size": "full", "supervised": True, "label_gain": 1.0}


def config_of(folder: Path, device: str) -> StreamConfig:
    """Two candidates, one of them with labels that drive its second layer; a readout with a reservoir."""
    layers = json.dumps([LAYER, SUPERVISED])
    return small(
        device=device,
        source={"lines": {"path": str(folder / "waves.jsonl"), "follow": False}},
        candidates={"main": [], "labels": [f"model.layers={layers}", "model.schedule=together"]},
        rate={"kind": "after_drift"},
        readout={"reservoir": 20},
        drift={"begin": 0, "reference": 20},
        recompute_every=5,
        max_wait_s=60.0,
        snapshot={"every_batches": 4},
    )


def run(folder: Path, device: str) -> dict[str, Any]:
    """A stream to its end, in `folder`/run; its summary."""
    folder.mkdir(exist_ok=True)
    (folder / "stream.yaml").write_text(dump_yaml(config_of(folder, device).model_dump(mode="json")))
    with (folder / "waves.jsonl").open("a") as file:
        file.write(lines(waves(62)[50:] if file.tell() else waves(50, labelled=0.5)))
    assert main(["--config", str(folder / "stream.yaml"), "--run-dir", str(folder / "run")]) == 0
    return summary(folder)


def test_a_stream_is_learnt_replayed_and_continued(
    card: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it learns is what it learns on the CPU, and where it is killed it goes on."""
    own, other = run(tmp_path / "own", "cuda"), run(tmp_path / "other", "cpu")
    for name, accuracy in other["accuracy"].items():
        assert own["accuracy"][name] == pytest.approx(accuracy, abs=0.1), name
    folder = tmp_path / "own" / "run"
    assert load_model(folder / "model").layer(0).lateral.device.type == "cpu"
    (max((folder / "snapshots").iterdir()) / "snapshot.json").unlink()  # as if it had been killed before it was whole
    assert run(tmp_path / "own", "cuda")["records"] == 62
    capsys.readouterr()
    assert main(["--run-dir", str(folder), "--replay"]) == 0
    said = capsys.readouterr().out
    assert f"digest {summary(tmp_path / 'own')['digest']}\nequal to the digest of " in said


def test_requests_are_answered_on_the_card(card: Place, tmp_path: Path) -> None:
    """By a copy of each candidate, in another thread, as the candidate itself says."""
    run(tmp_path, "cuda")
    config = config_of(tmp_path, "cuda")
    state = StreamState(config)
    for number, entry in read_entries(list_segments(tmp_path / "run" / "journal")):
        batch = state.take(number, entry)
        if batch is not None:
            state.pipeline.apply(batch)
    x = torch.rand(5, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    for name, candidate in state.pipeline.candidates.items():
        own = config.candidate(name)
        copied = Snapshot(name, own, candidate, batch=1, classes=["a", "b"], shape=[1, 1, 16])
        if card.real:
            with ThreadPoolExecutor(1) as pool:
                answers = pool.submit(copied.score, x, features=True).result()
        else:
            answers = copied.score(x, features=True)
        built = copied._built().stack
        assert built.stack.layer(0).lateral.device.type == "cuda"
        said = candidate.say(x)
        assert said.scores is not None
        for index, answer in enumerate(answers):
            assert list(answer["scores"].values()) == pytest.approx(said.scores[index].tolist(), rel=1e-3, abs=1e-4)
            assert answer["features"] == pytest.approx(said.encoded.features[index].tolist(), rel=1e-3, abs=1e-5)
            assert answer["novelty"] == pytest.approx(float(said.novelty[index]), rel=1e-3, abs=1e-5)


SOLVE = ["bound.holds_for", "dynamics._by_kernel"]
"""M may have been written to; values may not be finite."""

TELL = ["encoded.told", *3 * ["encoded.<dictcomp>"]]
"""Features, and three signals."""


@pytest.mark.parametrize(
    ("layers", "say", "learn"),
    [
        ([LAYER], [*SOLVE, *TELL], []),
        ([LAYER, SUPERVISED], [*SOLVE, *SOLVE, "label_sums.scores", "encoded.told", *TELL], SOLVE),
    ],
    ids=["one layer", "two layers"],
)
def test_what_the_host_waits_for(
    layers: list[dict[str, Any]], say: list[str], learn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch; to learn, only for an upper layer, whose input is solved for by the lower one after its update."""
    config = small(device="cuda", model={"layers": layers, "schedule": "together"})
    x, labels = torch.rand(48, 1, 1, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    with pretended(monkeypatch) as card:
        candidate = Candidate(config, [1, 1, 16], 2, print)
        candidate.calibrate(x[:20])
        for part in x.split(8):
            card.waits.clear()
            said = candidate.say(part)
            told = list(card.waits)
            candidate.watch(said, torch.zeros(len(part)))
            assert card.waits == told
            candidate.learn(part, said, labels)
            candidate.batches = 1  # at multiples of 64 its size is looked at
    assert sorted(told) == sorted(say)
    assert card.waits == told + learn
