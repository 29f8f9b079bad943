"""The benchmark of streams: its loop on rows whose results are known, its results kept, and the command."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from torch import Tensor

import jobs.benchmark
from jobs.benchmarks.stream import readouts, speed
from jobs.benchmarks.stream.prequential import Result, run_stream
from jobs.benchmarks.stream.readouts import encoded, remembered
from jobs.benchmarks.stream.results import Store, difference, held_out_table
from jobs.benchmarks.stream.rivals import AdaptiveForest, Network, NetworkSettings
from jobs.benchmarks.stream.rows import Fixed, NoChange, WithReadout
from jobs.benchmarks.stream.streams import Labelling, Part, Stream
from simmatch.labels import UNLABELLED
from simmatch.online.readout import ReadoutConfig


def part(name: str, labels: list[int]) -> Part:
    """Records [N, 1, 1, 2]: their class in the first value, twice their number in the second."""
    x = torch.tensor([[label, 2.0 * number] for number, label in enumerate(labels)])
    return Part(name, x.reshape(-1, 1, 1, 2), torch.tensor(labels))


def stream(*segments: list[int], batch: int = 2) -> Stream:
    parts = tuple(part(f"segment {number}", labels) for number, labels in enumerate(segments))
    return Stream("example", 3, part("warm-up", [0, 0]), parts, (part("held out", [0, 1, 1, 1]),), batch)


@dataclass
class Diary:
    """A row that writes down what it is told, and always predicts class 1."""

    lines: list[str] = field(default_factory=list)
    nbytes: int = 12

    def predict(self, x: Tensor) -> Tensor:
        self.lines.append(f"predict {numbers(x)}")
        return torch.ones(len(x), dtype=torch.int64)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        self.lines.append(f"learn {numbers(x)} {labels.tolist()}")

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        self.lines.append(f"late {numbers(x)} {labels.tolist()}")

    def end_segment(self, number: int) -> None:
        self.lines.append(f"end {number}")


def numbers(x: Tensor) -> list[int]:
    return [round(value / 2) for value in x[:, 0, 0, 1].tolist()]


def test_a_batch_is_tested_before_it_is_learnt_and_held_out_parts_only_tested() -> None:
    row = Diary()
    result = run_stream(stream([0, 1, 2], [1]), row, Labelling(), seed=0)
    assert row.lines == [
        "learn [0, 1] [0, 0]", "end -1",  # the warm-up is not scored
        "predict [0, 1]", "learn [0, 1] [0, 1]", "predict [2]", "learn [2] [2]", "end 0", "predict [0, 1, 2, 3]",
        "predict [0]", "learn [0] [1]", "end 1", "predict [0, 1, 2, 3]",
    ]  # fmt: skip
    assert (result.right, result.sizes, result.segment_ends) == ([1, 0, 1], [2, 1, 1], [3, 4])
    assert result.accuracy == 2 / 4
    assert result.segments == {"segment 0": 1 / 3, "segment 1": 1.0}
    assert result.held_out == [{"held out": 0.75}, {"held out": 0.75}]
    assert (result.labels_used, result.state_bytes, result.forgotten) == (6, 12, 0.0)


def test_late_labels_come_as_many_records_late() -> None:
    row = Diary()
    result = run_stream(stream([0, 1, 2, 1]), row, Labelling(delay=3), seed=0)
    given = [line for line in row.lines if not line.startswith(("predict", "end"))]
    assert given == [
        "learn [0, 1] [-1, -1]",
        "learn [0, 1] [-1, -1]", "late [0] [0]",  # 3 records arrived behind it
        "learn [2, 3] [-1, -1]", "late [1, 0] [0, 0]",
    ]  # fmt: skip
    assert result.labels_used == 3


def test_a_share_of_the_labels_is_given_the_same_for_every_row() -> None:
    labelling, labels = Labelling(0.3), torch.ones(1000, dtype=torch.int64)
    whole = labelling.given(labels, 0, seed=1)
    assert 0.25 < float((whole != UNLABELLED).double().mean()) < 0.35
    parts = [labelling.given(labels[start : start + 100], start, seed=1) for start in range(0, 1000, 100)]
    assert torch.equal(torch.cat(parts), whole)


def test_no_change_and_a_readout_of_the_class_itself() -> None:
    """Oracles: by hand; and features that hold the class, of which the readout needs one record of each."""
    labels = [0, 0, 1, 1, 1, 2, 2, 0, 1, 2] * 20
    result = run_stream(stream(labels, batch=1), NoChange(), Labelling(), seed=0)
    hits = sum(now == last for last, now in zip([0, *labels], labels, strict=False))
    assert result.accuracy == hits / len(labels)
    encode = Fixed(lambda x: torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float())
    row = WithReadout(encode, ReadoutConfig())
    result = run_stream(stream(labels, batch=1), row, Labelling(), seed=0)
    assert result.accuracy == pytest.approx(1 - 2 / len(labels))  # the first record of classes 1 and 2
    assert row.names == [0, 1, 2]
    assert result.state_bytes == row.readout.nbytes if row.readout else False


def test_frozen_features_stop_after_the_first_segment() -> None:
    learnt = []

    class Counting(Fixed):
        def learn(self, x: Tensor, labels: Tensor) -> None:
            learnt.append(len(x))

    row = WithReadout(Counting(lambda x: x.flatten(1)), ReadoutConfig(), frozen_after=0)
    run_stream(stream([0, 1, 2, 0], [1, 2, 0, 1]), row, Labelling(), seed=0)
    assert sum(learnt) == 2 + 4


@pytest.mark.parametrize("replay", [0, 5])
def test_rivals_learn_what_is_easy(replay: int) -> None:
    """Classes that differ in their mean: both are far above the share of the largest class."""
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, 2, 300))
    x = torch.from_numpy(draws.normal(size=(300, 1, 1, 2))).float() + 3.0 * labels[:, None, None, None]
    data = Stream("tones", 2, Part("warm-up", x[:20], labels[:20]), (Part("all", x, labels),), (), 10)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 8), torch.nn.ReLU())
    network = Network(net, 8, 2, NetworkSettings(lr=0.02, steps=5, replay=replay), seed=0)
    assert run_stream(data, network, Labelling(), seed=0).accuracy > 0.8
    assert len(network.kept) == replay


def test_networks_learn_the_warm_up_in_passes_when_it_ends() -> None:
    """So many passes in steps of 50, over labelled records of the warm-up alone; then the readout is made anew."""
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, 2, 480))
    x = torch.from_numpy(draws.normal(size=(480, 1, 1, 2))).float() + 3.0 * labels[:, None, None, None]
    warm_up, part = Part("warm-up", x[:240], labels[:240]), Part("all", x[240:], labels[240:])
    data = Stream("tones", 2, warm_up, (part, part), (), 10)
    seen: list[Tensor] = []

    class Counted(Network):
        def _step(self, x: Tensor, labels: Tensor) -> None:
            seen.append(x)
            super()._step(x, labels)

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 8), torch.nn.ReLU())
    network = Counted(net, 8, 2, NetworkSettings(epochs=3), seed=0)
    row = WithReadout(network, ReadoutConfig(reservoir=100), recompute_every=1_000)
    labelling = Labelling(0.5)
    given = labelling.given(labels[:240], 0, seed=0) != UNLABELLED
    moments: list[tuple[int, bool]] = []
    row._recompute = lambda: moments.append((len(seen), row.learning))  # type: ignore[method-assign]
    run_stream(data, row, labelling, seed=0)
    count, batches = int(given.sum()), sum(bool(part.any()) for part in given.split(10))
    steps = seen[batches : batches + 3 * -(-count // 50)]
    for passed in torch.cat(steps).split(count):
        assert torch.equal(passed.flatten(1).sort(dim=0).values, x[:240][given].flatten(1).sort(dim=0).values)
    assert moments == [(batches + len(steps), True)]
    assert all(len(each) <= 10 for each in seen[batches + len(steps) :])


def test_trees_of_a_forest_are_replaced_only_if_they_are_to_be() -> None:
    """Two classes change places: a forest that replaces trees makes fewer errors afterwards."""
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, 2, 2_000))
    x = torch.from_numpy(draws.normal(size=(2_000, 1, 1, 2))).float() + 3.0 * labels[:, None, None, None]
    swapped = torch.cat([labels[:1_000], 1 - labels[1_000:]])
    data = Stream("tones", 2, Part("warm-up", x[:20], labels[:20]), (Part("all", x, swapped),), (), 50)
    forests = [AdaptiveForest(lambda x: x.flatten(1), 3, drifts, seed=0) for drifts in (True, False)]
    replaced, kept = (run_stream(data, forest, Labelling(), seed=0).right for forest in forests)
    assert min(sum(replaced[:20]), sum(kept[:20])) > 950
    assert sum(replaced[21:26]) > sum(kept[21:26]) + 25
    assert forests[0].forest.n_drifts_detected() > 0 == forests[1].forest.n_drifts_detected()


def result(row: str, seed: int, accuracy: float) -> Result:
    return Result(
        stream="example", row=row, seed=seed, labels="1%", settings="", accuracy=accuracy, segments={"a": accuracy},
        held_out=[{}], labels_used=1, us_per_record=1.0, state_bytes=1, right=[1], sizes=[2], segment_ends=[2],
    )  # fmt: skip


def test_results_are_kept_and_differences_are_paired(tmp_path: Path) -> None:
    """Oracle of the interval: SciPy's t test of the differences."""
    ours, theirs = [0.9, 0.8, 0.95], [0.85, 0.79, 0.9]
    results = [result("ours", seed, value) for seed, value in enumerate(ours)]
    results += [result("theirs", seed, value) for seed, value in enumerate(theirs)]
    store = Store(tmp_path)
    for each in results:
        store.keep(each)
    assert store.find("example", "1%", "ours", 1) == results[1]
    assert store.find("example", "1%", "ours", 3) is None
    found = difference(results, "ours", "theirs")
    interval = ttest_1samp(np.subtract(ours, theirs), 0).confidence_interval(0.95)
    assert found is not None
    assert (found[0] - found[1], found[0] + found[1]) == pytest.approx((interval.low, interval.high))


def test_the_command_measures_what_is_missing_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = np.random.default_rng(0)
    for rpm in (1797, 1772, 1750, 1730):
        folder = tmp_path / "bearings"
        folder.mkdir(exist_ok=True)
        tones = {"B_07": 9.0, "IR_07": 5.0}
        time = np.arange(17 * 51 * 128)
        np.savez(
            folder / f"rpm{rpm}.npz",
            **{name: np.sin(2 * np.pi * time / tone) + draws.normal(size=len(time)) for name, tone in tones.items()},
        )
    words = ["stream", "--quick", "--data", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    words += ["--streams", "bearings-types", "--labels", "5%", "--parts", "rows"]
    assert jobs.benchmark.main([*words, "--rows", "spectrum", "no-change"]) == 0
    [path, _] = sorted((tmp_path / "run" / "quick").rglob("*.json"), reverse=True)
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert jobs.benchmark.main([*words, "--rows", "spectrum", "random"]) == 0
    assert path.stat().st_mtime_ns == before
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    accuracy = {row["row"]: row["accuracy"] for row in rows if row["kind"] == "result"}
    assert accuracy["spectrum"] > 0.9  # chance: 0.5; the first records have no label
    assert "| spectrum | 1 |" in (tmp_path / "run" / "tables.md").read_text()
    assert (tmp_path / "run" / "figures" / "bearings-types-5.png").stat().st_size > 5000
    monkeypatch.setattr(speed, "UPDATES", 3)
    assert jobs.benchmark.main([*words, "--parts", "speed"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [timed] = [row for row in rows if row["kind"] == "speed"]
    assert timed["windows_per_second"] > 100
    cost = {(row["part"], row["of"], row["batch"]): row["us_per_record"] for row in rows if row["kind"] == "cost"}
    assert cost["layer", "coordinate descent", 64] < cost["layer", "coordinate descent", 1]
    assert cost["readout", "128", 64] < cost["readout", "128", 1]
    assert min(cost.values()) > 0
    monkeypatch.setattr(readouts, "SHARES", (1.0,))
    assert jobs.benchmark.main([*words, "--parts", "readouts"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["row"]: row["accuracies"]["100"] for row in rows if row["kind"] == "readouts"}
    assert list(found) == [*readouts.KINDS, *readouts.MOVING, "random filters, nothing forgotten"]
    assert all(min(accuracies) > 0.75 for accuracies in found.values())  # chance: 0.5
    assert jobs.benchmark.main([*words, "--rows", "nothing"]) == 2
    assert "--rows: expected some of similarity matching; " in capsys.readouterr().err


def test_a_readout_of_what_was_encoded_before_is_the_one_beside_the_features() -> None:
    """Features that move: what a row learns together with them, and what it learns from a record of them."""

    class Moving(Fixed):
        seen = 0

        def learn(self, x: Tensor, labels: Tensor) -> None:
            Moving.seen += len(x)

    def moving() -> Moving:
        Moving.seen = 0
        return Moving(lambda x: torch.cat([x.flatten(1), x[..., 0].flatten(1) * Moving.seen], dim=1))

    data = stream([0, 1, 2, 0, 1, 2, 2], [1, 2, 0, 1], batch=3)
    known = encoded(data, moving())
    assert not torch.equal(known[1][:, 2], known[1][:, 0])
    rows = [WithReadout(moving(), ReadoutConfig()), remembered(known, ReadoutConfig())]
    one, other = (run_stream(replace(data, held_out=()), row, Labelling(), seed=0) for row in rows[::-1])
    assert one.right == other.right
    assert sum(one.right) > 3


def test_what_was_forgotten_is_seen_in_the_table_of_held_out_parts() -> None:
    results = [
        run_stream(stream([0, 1, 2], [1]), row, Labelling(), seed=0).model_copy(update={"row": "constant"})
        for row in (Diary(), NoChange())
    ]
    found = held_out_table(results, ["constant", "not measured"])
    assert (found.columns, found.rows) == (
        ["row", "after", "held out"],
        [["constant", "segment 0", (0.75 + 0.0) / 2], ["constant", "segment 1", (0.75 + 0.75) / 2]],
    )


def test_classes_that_come_last_are_not_forgotten_before() -> None:
    held_out = [{"a": 0.9, "b": 0.0}, {"a": 0.7, "b": 0.8}]
    result = run_stream(stream([0], [1]), Diary(), Labelling(), seed=0).model_copy(update={"held_out": held_out})
    assert result.forgotten == pytest.approx(0.2)
