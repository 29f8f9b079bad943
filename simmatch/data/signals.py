"""Signals as a data set: recordings cut into windows, with their classes, split into training and test.

Test windows are of other recordings (`test_path`, `test_fraction` with `split: recordings`), or of a later time of the
same ones (`split: time`): neighbouring windows of one recording are nearly equal, and say nothing about others.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError, errors_name
from simmatch.data.listing import no_test_data, split_places
from simmatch.data.recordings import ENDINGS, Recording, list_recordings, place_of
from simmatch.data.samples import Names
from simmatch.data.series import OpenRecordings
from simmatch.data.windows import Integers, Windows, WindowShape, in_turn, runs, starts_in
from simmatch.documents import shortened
from simmatch.labels import UNLABELLED

READ_AT_ONCE = 1 << 18
"""Samples that are read at a time while a recording is looked through."""


@dataclass(frozen=True, eq=False)
class Signals:
    """Windows for training and for testing, with their labels int64 [N].

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", on_1=np.ones(50), on_2=np.ones(50), off_1=np.ones(40), off_2=np.ones(40))
    ...     config = DataConfig(path=folder, window=10, label_pattern="/([a-z]+)_", test_fraction=0.5)
    ...     signals = load_signals(config)
    >>> signals.classes, len(signals.train), len(signals.test), signals.train_labels.bincount().tolist()
    (('off', 'on'), 9, 9, [4, 5])
    """

    train: Windows
    train_labels: Tensor
    test: Windows
    test_labels: Tensor
    classes: tuple[str, ...]
    note: str
    """One line that says what was found."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A recording that has been looked through: its runs [R, 2], the windows in them, and a hash of its samples.

    >>> from simmatch.data.series import Series
    >>> recording = Recording("a", Series.of(np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0])))
    >>> cut = cut_recording(recording, DataConfig(path="a", window=2, missing="cut"), WindowShape(2, 1))
    >>> cut.runs.tolist(), cut.starts.tolist(), cut.missing
    ([[0, 2], [3, 6]], [0, 3, 4], 1)
    """

    recording: Recording
    runs: Integers
    starts: Integers
    missing: int
    digest: str


def load_signals(config: DataConfig) -> Signals:
    """Find, look through and split the recordings of `data.path`.

    Every recording is read once, for missing values and a hash. Only what is in compressed or text files is held.

    Raises
    ------
    ConfigError
        The configuration does not say how to understand what is there, or no window fits.
    DataError
        Recordings cannot be read, do not agree, or have missing values.

    >>> load_signals(DataConfig(path="/nowhere", window=8, test_fraction=0.1))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: data.path: /nowhere: no such file or folder
    """
    files, path = OpenRecordings(), place_of(str(config.path))
    with errors_name("data.path"):
        train_path, test_path, test_key = split_places(config, path, ENDINGS, "recordings")
        train = list_recordings(train_path, config, files)
    with errors_name(test_key):
        test = [] if test_path is None else list_recordings(test_path, config, files)
    by_time = config.split == "time" and not test
    if not test and config.test_fraction is None:
        raise no_test_data(path, "recordings")
    if not test and not by_time:
        train, test = _split(train, config)
    with errors_name("data.path"):
        classes, shape = _classes(train, config), _shape(train + test, config)
        cuts = [cut_recording(recording, config, shape) for recording in train]
    with errors_name(test_key if test_path is not None else "data.path"):
        test_cuts = cuts if by_time else [cut_recording(recording, config, shape) for recording in test]
    kept, tested = [cut.starts for cut in cuts], [cut.starts for cut in test_cuts]
    if by_time:
        halves = [_in_time(cut.starts, config, shape) for cut in cuts]
        kept, tested = [before for before, _ in halves], [after for _, after in halves]
    with errors_name(test_key if test_path is not None else "data.path"):
        parts = [
            _windows(own, starts, shape, classes, config, what)
            for own, starts, what in ((cuts, kept, "training"), (test_cuts, tested, "test"))
        ]
    every = cuts if by_time else cuts + test_cuts
    missing, short = sum(cut.missing for cut in every), sum(not len(cut.starts) for cut in every)
    note = (
        f"{shortened(path)}: {len(cuts)} training and {len(test_cuts)} test recordings"
        f"{', split in time' if by_time else ''}, {len(parts[0][0]):,} and {len(parts[1][0]):,} windows of "
        f"{shape.length} samples, {parts[0][0].shape[1]} channels, {len(classes)} classes, {missing:,} samples with "
        f"missing values{f'; recordings too short for a window: {short}' if short else ''}"
    )
    return Signals(*parts[0], *parts[1], classes, note)


def cut_recording(recording: Recording, config: DataConfig, shape: WindowShape) -> Cut:
    """Look through a recording.

    Raises
    ------
    DataError
        A value is missing, with `missing: stop`.

    >>> from simmatch.data.series import Series
    >>> recording = Recording("a.npy", Series.of(np.array([1.0, np.nan])))
    >>> cut_recording(recording, DataConfig(path="a.npy", window=2), WindowShape(2, 2))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: a.npy: expected finite values, got nan in channel 0 of sample 1; see data.missing
    """
    length = recording.series.shape[0]
    missing, digest = np.zeros(length, dtype=bool), sha256(repr((recording.series.shape, recording.name)).encode())
    for start in range(0, length, READ_AT_ONCE):
        rows = recording.series.read(start, min(start + READ_AT_ONCE, length))
        digest.update(rows.data)
        missing[start : start + len(rows)] = ~np.isfinite(rows).all(axis=1)
    if config.missing == "stop" and missing.any():
        first = int(missing.argmax())
        values = recording.series.read(first, first + 1)[0]
        channel = int(np.isfinite(values).argmin())
        raise DataError(
            f"{shortened(recording.name)}: expected finite values, got {values[channel]} in channel {channel} of "
            f"sample {first}; see data.missing"
        )
    found = runs(missing, recording.gaps, shape.hold)
    starts = np.concatenate([np.empty(0, np.int64), *(starts_in(run, shape) for run in found)])
    return Cut(recording, found, starts, int(missing.sum()), digest.hexdigest())


def _shape(recordings: list[Recording], config: DataConfig) -> WindowShape:
    """The windows, of recordings that agree."""
    first = recordings[0]
    for each in recordings:
        if each.series.shape[1] != first.series.shape[1]:
            raise DataError(
                f"expected recordings of one number of channels, got {first.series.shape[1]} in "
                f"{shortened(first.name)} and {each.series.shape[1]} in {shortened(each.name)}"
            )
        if each.channels != first.channels and sorted(each.channels) == sorted(first.channels):
            raise DataError(
                f"{shortened(each.name)}: expected the order of the columns of {shortened(first.name)}, "
                f"{shortened(', '.join(first.channels))}, got another; see data.columns"
            )
        if config.window is None and each.series.shape[0] != first.series.shape[0]:
            raise ConfigError(
                f"data.window: expected a number of samples, as recordings differ in length, "
                f"{first.series.shape[0]} in {shortened(first.name)} and {each.series.shape[0]} in "
                f"{shortened(each.name)}, got null"
            )
    length = config.window or first.series.shape[0]
    hold = config.hold_samples if config.missing == "hold" else 0
    return WindowShape(length, config.hop or length, config.window_scale, config.window_floor, hold)


def _split(recordings: list[Recording], config: DataConfig) -> tuple[list[Recording], list[Recording]]:
    """Whole recordings for training and for testing: of each class those whose names have the smallest hashes."""
    assert config.test_fraction is not None
    hashes = Names.of([recording.name.encode() for recording in recordings]).hashes(config.split_seed)
    chosen: set[int] = set()
    for label in {recording.label for recording in recordings}:
        members = [index for index, recording in enumerate(recordings) if recording.label == label]
        count = min(round(config.test_fraction * len(members)), len(members) - 1)
        chosen |= set(sorted(members, key=lambda index: int(hashes[index]))[:count])
    if not chosen:
        raise ConfigError(
            f"data.test_fraction: expected a share that gives one test recording of {len(recordings)}, or "
            f"data.split: time, got {config.test_fraction:g}"
        )
    numbered = list(enumerate(recordings))
    return [each for index, each in numbered if index not in chosen], [recordings[index] for index in sorted(chosen)]


def _in_time(starts: Integers, config: DataConfig, shape: WindowShape) -> tuple[Integers, Integers]:
    """Windows of a recording to learn from and to test with: the last ones, and those that end before they begin."""
    assert config.test_fraction is not None
    first = len(starts) - round(config.test_fraction * len(starts))
    if first == len(starts):
        return starts, starts[:0]
    return starts[starts + shape.length <= starts[first]], starts[first:]


def _classes(recordings: list[Recording], config: DataConfig) -> tuple[str, ...]:
    """Names of the classes: numbers by their value, others by the alphabet."""
    names: set[str] = set()
    for recording in recordings:
        names |= {recording.label or ""} if recording.labels is None else set(recording.labels.tolist())
    names -= {""}
    if not names and config.labels:
        raise DataError("expected training recordings with labels, as data.labels: true asks for, got none")
    if len(names) == 1:
        raise DataError(
            f"expected labels of two classes at least, got '{shortened(names.pop())}' only; set data.labels: false to "
            "use the recordings without labels"
        )
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def _windows(
    cuts: list[Cut],
    starts: list[Integers],
    shape: WindowShape,
    classes: tuple[str, ...],
    config: DataConfig,
    what: str,
) -> tuple[Windows, Tensor]:
    """The windows of some recordings in turn, and their labels."""
    counts = [len(each) for each in starts]
    if not sum(counts):
        longest = max((int((cut.runs[:, 1] - cut.runs[:, 0]).max(initial=0)) for cut in cuts), default=0)
        raise ConfigError(
            f"data.window: expected at most {longest}, the longest run of samples without a gap in the {what} "
            f"recordings, got {shape.length}"
            if longest < shape.length
            else f"data.test_fraction: expected a share that leaves {what} windows, got {config.test_fraction}"
        )
    places = np.stack([np.repeat(np.arange(len(cuts)), counts), np.concatenate(starts)], axis=1)
    number = {name: index for index, name in enumerate(classes)} | {"": UNLABELLED}
    labels = []
    for cut, own in zip(cuts, starts, strict=True):
        per_sample = cut.recording.labels
        last = [cut.recording.label or ""] * len(own) if per_sample is None else per_sample[own + shape.length - 1]
        if unknown := sorted({str(name) for name in last} - number.keys()):
            raise DataError(
                f"{shortened(cut.recording.name)}: expected one of the training recordings' classes "
                f"{shortened(', '.join(classes))}, got '{shortened(unknown[0])}'"
            )
        labels += [number[str(name)] for name in last]
    order = in_turn(places[:, 0], np.concatenate([np.arange(count) for count in counts]), config.turn)
    windows = Windows(
        [cut.recording.series for cut in cuts],
        [cut.runs[:, 0] for cut in cuts],
        places[order],
        shape,
        digest=sha256("".join(cut.digest for cut in cuts).encode()).hexdigest(),
    )
    return windows, torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(order)]
