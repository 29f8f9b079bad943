"""LeNets from different starts: what pairs share, what stays frozen, intervals, and going on where a run stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from cluster.tracking.config import TrackingConfig
from cluster.tracking.tracker import Tracker
from jobs import finetune
from jobs.evaluation import finetuning, finetuning_tables
from jobs.evaluation.finetuning import (
    STARTS,
    FinetuneConfig,
    StartName,
    StartResult,
    Trial,
    chosen_candidate,
)
from jobs.evaluation.finetuning_start import PretrainedFilters
from jobs.evaluation.finetuning_tables import estimates, paired_difference
from jobs.evaluation.material import Material
from jobs.evaluation.resume import ChosenSettings, has_results, write_identity
from jobs.options import override, read_yaml
from simmatch.config import ConfigError, parse
from simmatch.data.sources import load_dataset

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "finetune_digits.yaml"

SMALL = [
    "networks={lenet: [3, 4]}",
    "budgets=[{labels: 3, seeds: 2}]",
    "tuning_seeds=1",
    "data.train_images=300",
    "data.test_images=100",
    "held_out=50",
    "layers.0.train.images=200",
    "layers.1.train.images=200",
    "tracking.enabled=false",
]


def arguments(run_dir: Path, *more: str) -> list[str]:
    sets = [word for assignment in (*SMALL, *more) for word in ("--set", assignment)]
    return ["--config", str(CONFIG), "--run-dir", str(run_dir), "--threads", "2", *sets]


@pytest.fixture(scope="module")
def config() -> FinetuneConfig:
    return parse(FinetuneConfig, override(read_yaml(CONFIG), SMALL))


@pytest.fixture(scope="module")
def trial(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    material = Material.of(load_dataset(config.data), config.held_out)
    path = tmp_path_factory.mktemp("filters") / "lenet-0.safetensors"
    return Trial.of(config, "lenet", 0, material, path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    assert finetune.main(arguments(folder)) == 0
    return folder


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_starts_differ_in_their_convolutions_alone(trial: Trial) -> None:
    nets = {start: trial.net(start) for start in STARTS}
    for start, net in nets.items():
        for name, values in net.dense.state_dict().items():
            assert torch.equal(values, nets["random"].dense.state_dict()[name]), (start, name)
        for index, convolution in enumerate(net.convolutions):
            learnt = start in ("nsm", "nsm_frozen")
            expected = trial.pretrained.filters[index][0] if learnt else nets["random"].convolutions[index].weight
            assert torch.equal(convolution.weight, expected), (start, index)
    assert not torch.equal(nets["nsm"].convolutions[0].weight, nets["random"].convolutions[0].weight)


@pytest.mark.parametrize("start", STARTS)
def test_frozen_convolutions_stay_and_others_move(trial: Trial, start: StartName) -> None:
    before, after = trial.net(start), trial.trained(3, start, 0)
    frozen = start.endswith("frozen")
    for old, new in zip(before.convolutions, after.convolutions, strict=True):
        assert torch.equal(old.weight, new.weight) == frozen
    assert not torch.equal(next(iter(before.dense.parameters())), next(iter(after.dense.parameters())))


def test_starts_are_the_same_when_made_again_and_when_read_again(
    config: FinetuneConfig, trial: Trial, tmp_path: Path
) -> None:
    again = Trial.of(config, "lenet", 0, trial.material, tmp_path / "lenet-0.safetensors")
    kept = PretrainedFilters.load(tmp_path / "lenet-0.safetensors")
    assert kept is not None
    for found in (again.pretrained, kept):
        for mine, theirs in zip(found.filters, trial.pretrained.filters, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
        assert found.agreements == trial.pretrained.agreements
    other = Trial.of(config, "lenet", 1, trial.material, tmp_path / "lenet-1.safetensors")
    assert not torch.equal(other.pretrained.filters[0][0], trial.pretrained.filters[0][0])


def test_a_file_of_something_else_is_no_start(tmp_path: Path) -> None:
    assert PretrainedFilters.load(tmp_path / "none") is None
    (tmp_path / "torn").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    assert PretrainedFilters.load(tmp_path / "torn") is None


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_students_for_pairs() -> None:
    """d̄ ± t(0.975, 4) s / √5; the quantile is a table's, not the library's that computes the interval."""
    first, second = [0.71, 0.75, 0.69, 0.74, 0.78], [0.70, 0.72, 0.70, 0.71, 0.73]
    mean, half = paired_difference(first, second)
    differences = [1.0, 3.0, -1.0, 3.0, 5.0]
    assert mean == pytest.approx(statistics.fmean(differences))
    assert half == pytest.approx(2.776445105 * statistics.stdev(differences) / math.sqrt(5))
    oracle = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((oracle.low, oracle.high))


def test_equal_differences_have_an_interval_of_length_zero() -> None:
    assert paired_difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == pytest.approx((10.0, 0.0))


def test_one_seed_has_no_interval_and_pairs_must_match() -> None:
    assert paired_difference([0.5], [0.25]) == pytest.approx((25.0, math.nan), nan_ok=True)
    with pytest.raises(ValueError, match="as many seeds of both"):
        paired_difference([0.5, 0.6], [0.5])
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])


def result(seed: int, start: StartName, accuracy: float) -> StartResult:
    return StartResult(network="net", labels=10, seed=seed, start=start, settings=0, accuracy=accuracy)


def test_only_seeds_that_all_starts_have_are_compared() -> None:
    results = [result(seed, start, 0.5 + 0.1 * seed) for start in STARTS for seed in (0, 1)]
    results.append(result(2, "random", 0.0))
    known = estimates(results)
    assert list(known.index) == [("net", 10, start) for start in STARTS]
    random = known.loc[("net", 10, "random")]
    assert (random["mean"], random["std"]) == pytest.approx((0.55, 0.1 / math.sqrt(2)))
    assert set(known["count"]) == {2}
    assert estimates([result(0, "nsm", 0.5)]).empty


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_highest_mean(tmp_path: Path) -> None:
    assert chosen_candidate([[0.5, 0.9, 0.6], [0.5, 0.3, 0.7]])["chosen"] == 2
    assert chosen_candidate([[0.5, 0.5]])["chosen"] == 0  # of equals the first
    settings = ChosenSettings(tmp_path)
    assert settings.known("net/10/nsm") is None
    settings.keep("net/10/nsm", {"chosen": 2})
    settings.keep("net/10/random", {"chosen": 0})
    again = ChosenSettings(tmp_path)
    assert (again.known("net/10/nsm"), again.known("net/10/random")) == ({"chosen": 2}, {"chosen": 0})
    (tmp_path / "settings.json").write_text("{")  # cut off: chosen again
    assert again.known("net/10/nsm") is None


def test_a_result_that_cannot_be_read_is_measured_again(tmp_path: Path) -> None:
    store = finetune.start_results(tmp_path)
    store.save(result(0, "nsm", 0.5))
    assert store.load("net", 10, 0, "nsm") == result(0, "nsm", 0.5)
    (file,) = tmp_path.glob("results/net-10-0-nsm.json")
    file.rename(file.with_name("net-10-1-nsm.json"))
    assert store.load("net", 10, 1, "nsm") is None
    file.write_text("{")
    assert store.load("net", 10, 0, "nsm") is None


# -- the command -------------------------------------------------------------------------------------------------------


def results_of(run_dir: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (run_dir / "results").glob("*.json")}


@pytest.mark.slow
def test_every_start_has_its_result_table_and_figure(run_dir: Path) -> None:
    found = results_of(run_dir)
    assert sorted(found) == sorted(f"lenet-3-{seed}-{start}" for seed in (0, 1) for start in STARTS)
    assert all(0.1 < each["accuracy"] < 1 for each in found.values())
    text = (run_dir / "table.md").read_text()
    assert "| NSM, fine-tuned − random, points |" in text
    mean = sum(found[f"lenet-3-{seed}-nsm"]["accuracy"] for seed in (0, 1)) / 2
    assert f"{mean:.3f}" in text
    assert (run_dir / "figures" / "differences.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_second_call_trains_only_what_is_missing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results_of(run_dir)
    (run_dir / "results" / "lenet-3-1-nsm.json").unlink()
    trained: list[StartName] = []
    whole = Trial.result

    def counted(self: Trial, labels: int, start: StartName, settings: int) -> StartResult:
        trained.append(start)
        return whole(self, labels, start, settings)

    monkeypatch.setattr(Trial, "result", counted)
    monkeypatch.setattr(Trial, "tune", lambda *_: pytest.fail("settings were known"))
    monkeypatch.setattr(finetuning, "pretrain", lambda *_: pytest.fail("filters were known"))
    assert finetune.main(arguments(run_dir)) == 0
    assert trained == ["nsm"]
    assert results_of(run_dir) == before


@pytest.mark.slow
def test_an_interrupted_call_keeps_what_it_found(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_of(run_dir)
    for name in ("lenet-3-0-nsm", "lenet-3-1-nsm"):
        (run_dir / "results" / f"{name}.json").unlink()
    whole = Trial.result

    def interrupted(self: Trial, labels: int, start: StartName, settings: int) -> StartResult:
        if self.seed == 1:
            raise KeyboardInterrupt
        return whole(self, labels, start, settings)

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "result", interrupted)
        assert finetune.main(arguments(run_dir)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert "lenet-3-1-nsm" not in results_of(run_dir)
    assert finetune.main(arguments(run_dir)) == 0
    assert results_of(run_dir) == before


@pytest.mark.slow
def test_results_of_another_configuration_are_not_mixed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(arguments(run_dir, "held_out=60")) == 2
    assert "which differs in held_out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("budgets=[{labels: 9, seeds: 1}, {labels: 3, seeds: 1}]", "expected rising budgets, got [9, 3]"),
        ("budgets=[{labels: 90, seeds: 1}]", "budgets.0.labels: expected at most"),
        ("budgets=[]", "budgets: expected"),
        ("networks={}", "networks: expected"),
        ("networks={lenet: [6]}", "networks.lenet"),
        ("layers.0.gain=-1", "layers.0.gain: expected"),
        ("layers.0.normalise=contrast", "layers.0.normalise: unknown key"),
        ("held_out=4000", "held_out: expected less than the 300 training images, got 4000"),
    ],
)
def test_bad_input_is_one_line(
    assignment: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(arguments(tmp_path / "run", assignment)) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_threads_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune.main([*arguments(tmp_path / "run"), "--threads", "0"])
    assert ended.value.code == 2
    assert "--threads: expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_keys_that_a_folder_does_not_know_count_at_their_defaults(config: FinetuneConfig, tmp_path: Path) -> None:
    values = config.comparable()
    write_identity(tmp_path, {key: value for key, value in values.items() if key != "tuning_seeds"})
    (tmp_path / "settings.json").write_text("{}")
    assert finetune.identity(tmp_path, config.model_copy(update={"tuning_seeds": 2}))["tuning_seeds"] == 2
    with pytest.raises(ConfigError, match=r"which differs in tuning_seeds$"):
        finetune.identity(tmp_path, config)  # 1, where the default is 2


@pytest.mark.parametrize("text", ["[]", "{"])
def test_results_without_their_configuration_are_refused(text: str, config: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^--run-dir: expected a (mapping|folder that can be read)"):
        finetune.identity(tmp_path, config)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(ConfigError, match=r"^--run-dir: expected a folder that can be read, got .*Permission denied"):
        has_results(tmp_path)


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one changes nothing there."""
    tracker = Tracker(tmp_path, TrackingConfig(enabled=False))
    tracker.start("other", layers=0, tags={})
    try:
        assert finetune.main(arguments(tmp_path)) == 2
    finally:
        tracker.close()
    assert "error: --run-dir: another process works in" in capsys.readouterr().err
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_sigterm_is_an_interruption(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_of(run_dir)
    for seed in (0, 1):
        (run_dir / "results" / f"lenet-3-{seed}-nsm.json").unlink()
    whole = Trial.result

    def ended(self: Trial, labels: int, start: StartName, settings: int) -> StartResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, labels, start, settings)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "result", ended)
        assert finetune.main(arguments(run_dir)) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "the same command continues" in capsys.readouterr().err
    assert finetune.main(arguments(run_dir)) == 0
    assert results_of(run_dir) == before


def test_the_chart_shows_every_network_and_start() -> None:
    results = [result(seed, start, 0.5 + 0.01 * seed) for start in STARTS for seed in (0, 1)]
    figure = finetuning_tables.difference_figure(estimates(results))
    (axes,) = figure.axes
    assert axes.get_title() == "net"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        finetuning_tables.WORDS[start] for start in STARTS if start != "random"
    ]
