"""Signals by configuration: recordings found, classed, split by whole recordings or by time, and learnt from."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmatch.config import ConfigError, LayerConfig, ModelConfig, TrainConfig, parse
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.sources import Dataset, load_dataset
from simmatch.data.windows import Windows
from simmatch.fit import Trainer
from simmatch.labels import UNLABELLED
from simmatch.model import Stack

TRAIN = TrainConfig(batch_size=16, epochs=5)
SHARED = Path(os.environ.get("SIMMATCH_SHARED", Path(__file__).parents[4] / "shared")) / "data"


def load(path: object, **options: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **({"window": 10} | options)))


def machines(folder: Path, recordings: int = 4, samples: int = 95) -> Path:
    """Two machines in `.npz` files: sample s of recording r of machine m is 10⁴ m + 10³ r + s."""
    folder.mkdir(parents=True, exist_ok=True)
    for recording in range(recordings):
        np.savez(
            folder / f"day{recording}.npz",
            **{f"{name}_x": 1e4 * m + 1e3 * recording + np.arange(samples) for m, name in enumerate(("fan", "pump"))},
        )
    return folder


def content(windows: Any) -> list[tuple[int, int, int]]:
    """(machine, recording, first sample) of windows of `machines` that are not scaled."""
    assert isinstance(windows, Windows)
    first = windows[:][:, 0, 0, 0].long()
    assert torch.equal(windows[:][:, 0, 0] - first[:, None], torch.arange(10.0).expand(len(windows), 10))
    return [(value // 10_000, value // 1000 % 10, value % 1000) for value in first.tolist()]


# -- what is found -----------------------------------------------------------------------------------------------------


def test_whole_recordings_are_test_recordings(tmp_path: Path) -> None:
    dataset = load(machines(tmp_path), hop=7, window_scale="none", label_pattern=r"/(\w+)_x$", test_fraction=0.25)
    train, test = content(dataset.train_images), content(dataset.test_images)
    assert dataset.image_size == (1, 10)
    assert dataset.num_classes == 2
    assert dataset.train_labels.tolist() == [machine for machine, _, _ in train]
    assert dataset.test_labels.tolist() == [machine for machine, _, _ in test]
    recordings = [{(machine, recording) for machine, recording, _ in part} for part in (train, test)]
    assert [len(part) for part in recordings] == [6, 2]
    assert not recordings[0] & recordings[1]
    assert {machine for machine, _ in recordings[1]} == {0, 1}
    every = {(machine, recording, start) for machine, recording in recordings[0] for start in range(0, 86, 7)}
    assert sorted(train) == sorted(every)
    others = load(tmp_path, hop=7, window_scale="none", label_pattern=r"/(\w+)_x$", test_fraction=0.25, split_seed=5)
    assert content(others.test_images) != test


def test_the_last_windows_are_test_windows_in_time(tmp_path: Path) -> None:
    """Of 95 samples with hop 5, 18 windows: the last six begin at 60; those that end by then are for training."""
    dataset = load(machines(tmp_path, 1), hop=5, window_scale="none", split="time", test_fraction=1 / 3, labels=False)
    assert {start for _, _, start in content(dataset.train_images)} == set(range(0, 51, 5))
    assert {start for _, _, start in content(dataset.test_images)} == set(range(60, 86, 5))
    assert dataset.num_classes == 0
    assert set(dataset.train_labels.tolist()) == {UNLABELLED}


def test_the_first_windows_are_of_all_recordings(tmp_path: Path) -> None:
    dataset = load(machines(tmp_path, 3), window_scale="none", turn=2, test_path=f"{tmp_path}/day2.npz", train_images=8)
    first = content(dataset.train_images)
    # three days are in the folder, the last of which is tested with: naming it is the caller's choice
    expected = [(m, r, s) for r in range(3) for m in range(2) for s in (0, 10)]
    assert first == expected[:8]


def test_folders_are_classes_and_parts(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("idle", "run"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                np.save(tmp_path / part / name / f"{index}.npy", np.random.default_rng(index).normal(size=(30, 2)))
    dataset = load(tmp_path)
    assert dataset.train_images.shape == (18, 2, 1, 10)
    assert dataset.train_labels.bincount().tolist() == [9, 9]
    assert dataset.test_labels.bincount().tolist() == [6, 6]
    assert "6 training and 4 test recordings" in dataset.notes[0]
    assert load(tmp_path, window=None, format="numpy").train_images.shape == (6, 2, 1, 30)


@pytest.mark.parametrize("gzipped", [False, True])
def test_tables_have_names_times_and_classes(tmp_path: Path, gzipped: bool) -> None:
    """A gap of three hours before row 12; a class for each sample, none for some; a window is of that of its last."""
    hours = [*range(12), *range(15, 31)]
    rows = [
        f"2024-01-{1 + hour // 24:02d} {hour % 24:02d}:00,{hour}.5,{-hour},{'' if hour > 27 else hour // 8}"
        for hour in hours
    ]
    text = "\n".join(["when, load,price,state", *rows])
    path = tmp_path / ("a.csv.gz" if gzipped else "a.csv")
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())
    options = {"window": 4, "hop": 2, "window_scale": "none", "time_column": "when", "label_column": "state"}
    dataset = load(path, **options, split="time", test_fraction=0.1)
    windows = [*dataset.train_images[:], *dataset.test_images[:]]
    assert [window[:, 0, 0].tolist() for window in windows] == [
        [hour + 0.5, -hour]
        for hour in (0, 2, 4, 6, 8, 15, 17, 19, 21, 23, 27)  # 25 overlaps with the test window
    ]
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert dataset.test_labels.tolist() == [UNLABELLED]
    chosen = load(path, **options, split="time", test_fraction=0.1, columns=["price"])
    assert chosen.in_channels == 1
    assert torch.equal(chosen.train_images[:], dataset.train_images[:][:, 1:])


@pytest.mark.parametrize(
    ("missing", "hold", "expected"), [("cut", 1, [0, 7]), ("hold", 1, [0, 7]), ("hold", 2, [0, 5])]
)
def test_missing_values_are_cut_or_held(tmp_path: Path, missing: str, hold: int, expected: list[int]) -> None:
    values = np.arange(12.0)
    values[5:7] = np.nan
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", values)
    dataset = load(
        tmp_path, window=5, missing=missing, hold_samples=hold, window_scale="none", test_path=f"{tmp_path}/b.npy"
    )
    windows = dataset.test_images[:][:, 0, 0]
    starts = [0, 5] if expected[1] == 5 else expected
    assert len(windows) == len(starts)
    held = torch.from_numpy(np.where(np.isnan(values), 4.0, values)).float()
    assert all(torch.equal(window, held[start : start + 5]) for window, start in zip(windows, starts, strict=True))
    assert "4 samples with missing values" in dataset.notes[0] or "6 samples" in dataset.notes[0]


def test_the_digest_is_that_of_content_places_and_scale(tmp_path: Path) -> None:
    folder = machines(tmp_path / "a")
    options: dict[str, Any] = {"label_pattern": r"/(\w+)_x$", "test_fraction": 0.25}
    digests = [load(folder, **options).digest(), load(machines(tmp_path / "b" / "a"), **options).digest()]
    assert digests[0] == digests[1]
    for change in ({"hop": 3}, {"window_scale": "none"}, {"turn": 1}, {"split_seed": 1}, {"window_floor": 1.0}):
        digests.append(load(folder, **options | change).digest())
    machines(folder, samples=96)
    digests.append(load(folder, **options).digest())
    assert len(set(digests)) == len(digests) - 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop": 5, "window": None}, "expected window, for signals, with hop, got none"),
        ({"size": 8}, r"expected images with size, got signals \(window: 10\)"),
        ({"label_pattern": "fan"}, r"label_pattern: expected a group \(…\) that is the name of the class, got 'fan'"),
        ({"label_pattern": "("}, "label_pattern: expected a regular expression, got"),
        ({"window": 0}, "window: .*greater than 0"),
        ({"missing": "drop"}, "missing: .*'stop', 'cut' or 'hold'"),
        ({"columns": []}, "columns: "),
    ],
)
def test_keys_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, {"path": "somewhere", "window": 10} | options)
    with pytest.raises(ConfigError, match="expected window, for signals, with turn, got none"):
        parse(DataConfig, {"name": "digits", "turn": 3})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 96}, ConfigError, r"^data.window: expected at most 95, the longest run .*training.*got 96$"),
        (
            {"label_pattern": "(motor)"},
            DataError,
            r"^data.path: day0.npz/fan_x: expected a name with a class by ",
        ),
        ({"label_pattern": "(day)"}, DataError, r"^data.path: expected labels of two classes at least, got 'day' only"),
        ({"test_fraction": None}, ConfigError, "^data.test_path: expected test recordings, or a share of .*neither$"),
        ({"test_fraction": 0.01}, ConfigError, "^data.test_fraction: expected a share that gives one test recording"),
        (
            {"test_path": "/nowhere/a.npz", "test_fraction": None},
            DataError,
            r"^data.test_path: .*: no such file or folder$",
        ),
        ({"format": "csv"}, DataError, r"expected recordings \(\*.csv, \*.csv.gz\), found none$"),
        ({"train_images": 10_000}, ConfigError, "^data.train_images: expected at most 54, got 10000$"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    defaults = {"label_pattern": r"/(\w+)_x$", "test_fraction": 0.25}
    with pytest.raises(error, match=message):
        load(machines(tmp_path), **defaults | options)


def test_columns_in_another_order_are_not_mixed_up(tmp_path: Path) -> None:
    """Unless the configuration names them, and so their order."""
    for name, header in (("a", "x,y"), ("b", "y,x")):
        rows = [f"{sample},{-sample}" if name == "a" else f"{-sample},{sample}" for sample in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(DataError, match=r"^data.path: ..csv: expected the order of the columns of ..csv, ., ., got"):
        load(tmp_path, test_fraction=0.5)
    dataset = load(tmp_path, test_fraction=0.5, window_scale="none", columns=["x", "y"])
    assert torch.equal(dataset.train_images[:], dataset.test_images[:])


def test_a_recording_without_a_window_is_told(tmp_path: Path) -> None:
    np.savez(machines(tmp_path) / "day9.npz", fan_x=np.zeros(9))
    [note] = load(tmp_path, labels=False, test_fraction=0.25).notes
    assert note.endswith("0 samples with missing values; recordings too short for a window: 1")


def test_recordings_that_do_not_agree_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((20, 2)))
    np.save(tmp_path / "b.npy", np.zeros(25))
    with pytest.raises(DataError, match=r"one number of channels, got . in ..npy and . in ..npy$"):
        load(tmp_path, test_fraction=0.5)
    np.save(tmp_path / "b.npy", np.zeros((25, 2)))
    with pytest.raises(ConfigError, match=r"^data.window: .*2. in ..npy and 2. in ..npy, got null$"):
        load(tmp_path, test_fraction=0.5, window=None, format="numpy")
    np.save(tmp_path / "b.npy", np.full((25, 2), np.inf))
    with pytest.raises(
        DataError, match=r"^data.path: b.npy: expected finite values, got inf in channel 0 of sample 0; see"
    ):
        load(tmp_path, test_fraction=0.5)
    (tmp_path / "c.csv").write_text("x\n1\n")
    with pytest.raises(ConfigError, match=r"^data.format: expected one of numpy, csv, as .* holds both, got auto$"):
        load(tmp_path, test_fraction=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,x\n1,2\n1,3\n", r"a.csv: expected times that ascend in t, got 1 in sample 1 after 1$"),
        ("t,x\n3,2\n,3\n", r"a.csv: expected times that ascend in t, got nan in sample 1 after 3$"),
        ("t,x\n1,2\n2,three\n", r"a.csv: expected numbers in column x, got others$"),
        ("time,x\n1,2\n", r"a.csv: expected a column t, found time, x$"),
        ("t,x\nnoon,2\n", r"a.csv: expected times in column t: "),
        ("", r"a.csv: expected a CSV file: "),
        ("t,x\n1,2,3\n2,3,4\n", r"a.csv: expected as many fields in every line as names, got more$"),
        ("t,x\n1704067201,0\n1704067200,0\n", r"got 1704067200 in sample 1 after 1704067201$"),
        ("t,x\n", r"a.csv: expected rows with a column of numbers, got columns t, x$"),
    ],
)
def test_faulty_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.csv", time_column="t", split="time", test_fraction=0.5)


def test_marks_and_commas_of_spreadsheets(tmp_path: Path) -> None:
    """A mark of the byte order, names in quotes, a comma at the end of each line of values."""
    rows = [f"{sample},{10 * sample}," for sample in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(['"t", "x"', *rows]), encoding="utf-8-sig")
    dataset = load(tmp_path / "a.csv", time_column="t", window_scale="none", split="time", test_fraction=0.5)
    assert dataset.train_images[:][0].tolist() == [[[10.0 * sample for sample in range(10)]]]


def test_endings_of_any_case(tmp_path: Path) -> None:
    """As `list_recordings` takes them."""
    (tmp_path / "A.CSV.GZ").write_bytes(gzip.compress("\n".join(["x", *map(str, range(95))]).encode()))
    assert load(tmp_path / "A.CSV.GZ", split="time", test_fraction=0.5).image_size == (1, 10)
    (machines(tmp_path / "zipped", 1) / "day0.npz").rename(tmp_path / "zipped" / "DAY0.NPZ")
    assert load(tmp_path / "zipped", test_fraction=0.5).in_channels == 1


def test_labels_that_are_asked_for_are_there(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(95))
    with pytest.raises(DataError, match=r"^data.path: expected training recordings with labels, .*true.* got none$"):
        load(tmp_path, labels=True, split="time", test_fraction=0.5)


@pytest.mark.parametrize("ending", ["csv.gz", "npz"])
def test_what_cannot_be_unpacked_is_named(tmp_path: Path, ending: str) -> None:
    """Blocks of an unknown type, in the middle of the content."""
    values, path = np.random.default_rng(0).normal(size=4000), tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez_compressed(path, a=values)
    else:
        path.write_bytes(gzip.compress("\n".join(["x", *map(str, values)]).encode()))
    content = bytearray(path.read_bytes())
    content[1000:1400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^data.path: a\.{ending}.*: expected a"):
        load(path, split="time", test_fraction=0.5)


def test_images_and_signals_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data: expected images, got signals"):
        list_samples(DataConfig(path=str(tmp_path), window=10))
    with pytest.raises(DataError, match="expected recordings"):
        load(tmp_path, test_fraction=0.5)


# -- what is learnt from -----------------------------------------------------------------------------------------------


def test_a_stack_learns_from_windows_as_from_a_tensor(tmp_path: Path) -> None:
    """The same bits, whether windows are read when they are needed or lie in memory."""
    folder = tmp_path / "noise"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        np.savez(folder / f"{index}.npz", a=generator.normal(size=200), b=np.cumsum(generator.normal(size=200)))
    dataset = load(folder, window=32, hop=8, label_pattern="/(.)", test_fraction=0.25)
    layers = (
        LayerConfig(out_channels=6, kernel_size=(1, 8), stride=(1, 2), pool=(1, 4), train=TRAIN),
        LayerConfig(out_channels=5, kernel_size="full", supervised=True, label_gain=5.0, whiten=True, train=TRAIN),
    )
    stacks = [Stack(ModelConfig(layers=layers), dataset.source) for _ in range(2)]
    for stack, images in zip(stacks, (dataset.train_images, dataset.train_images[:]), strict=True):
        Trainer(stack, images, dataset.train_labels).fit()
    states = [stack.state_dict() for stack in stacks]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    right = stacks[0].decode(dataset.test_images[:]).argmax(dim=1) == dataset.test_labels
    assert right.double().mean() > 0.9  # white noise against its sum: one is rough and the other smooth


# -- real data ---------------------------------------------------------------------------------------------------------


def test_bearings_are_recordings_of_nine_faults() -> None:
    if not (SHARED / "bearings").is_dir():
        pytest.skip(f"needs the bearing data in {SHARED}")
    dataset = load(
        SHARED / "bearings", window=256, label_pattern=r"/(\w+)$", test_path=f"{SHARED}/bearings/rpm1730.npz"
    )
    with np.load(SHARED / "bearings" / "rpm1730.npz") as arrays:
        names = sorted(arrays.files)
        window = arrays["IR_14"][50 * 256 : 51 * 256].astype(np.float64)
    assert dataset.num_classes == 9 == len(names)
    index = (dataset.test_labels == names.index("IR_14")).nonzero()[50]  # the first of the second turn
    expected = torch.from_numpy((window - window.mean()) / window.std()).float()
    assert torch.equal(dataset.test_images[index].flatten(), expected)


def test_the_electricity_market_is_one_recording() -> None:
    if not (SHARED / "elec.csv.gz").is_file():
        pytest.skip(f"needs the electricity data in {SHARED}")
    dataset = load(SHARED / "elec.csv.gz", window=48, hop=1, label_column="class", split="time", test_fraction=0.3)
    assert dataset.train_images.shape[1:] == (6, 1, 48)
    assert len(dataset.train_images) + len(dataset.test_images) == 45_312 - 47 - 47
    before = gzip.decompress((SHARED / "elec.csv.gz").read_bytes()).decode().splitlines()[1:]
    assert dataset.train_labels[:100].tolist() == [int(row.rpartition(",")[2]) for row in before[47:147]]


def test_bundled_data_of_aeon() -> None:
    datasets = pytest.importorskip("aeon.datasets")
    dataset = load("aeon:BasicMotions", window=None, format="ts", window_scale="none")
    cases, _ = datasets.load_basic_motions(split="train")
    assert dataset.train_images.shape == (40, 6, 1, 100)
    assert dataset.num_classes == 4
    assert torch.equal(dataset.train_images[:][:, :, 0], torch.from_numpy(cases).float())
    with pytest.raises(ConfigError, match=r"^data.path: expected aeon: and one of ACSF1, .* got aeon:Nothing$"):
        load("aeon:Nothing", format="ts")
