"""Recordings of signals: which files hold them, and what each is: its samples, its gaps in time and its classes.

To add a format, write a function `(path, name, config, files) -> recordings of that file`, and add it to `FORMATS` and
to `DataConfig.format`.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.places import Files, absolute, is_folder, is_pattern, matching, message, walk
from simmatch.data.series import OpenRecordings, Series, series_of_npy, series_of_npz
from simmatch.data.windows import Integers
from simmatch.documents import shortened
from simmatch.extras import extra
from simmatch.remote import is_remote

BUNDLED = "aeon:"
"""Begins a `data.path` that names a data set inside the package aeon."""

GAP = 1.5
"""A step in time of more than so many periods is a gap."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One recording.

    Attributes
    ----------
    name: unlike that of any other of the data set.
    series: its samples [T, C].
    label: the name of its class; None: it has none, or `labels` has those of its samples.
    labels: [T], names of classes, '' for none.
    gaps: samples before which time has a gap, ascending.
    times: [T], where the file has some: numbers as they are, or seconds since 1970 of dates.
    channels: names of the channels, where the file has some.

    >>> Recording("pump/monday.npy", Series.of(np.zeros((100, 3))), label="pump").series.shape
    (100, 3)
    """

    name: str
    series: Series
    label: str | None = None
    labels: np.ndarray[Any, np.dtype[np.str_]] | None = None
    gaps: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    times: np.ndarray[Any, np.dtype[np.float64]] | None = None
    channels: tuple[str, ...] = ()


ReadFile = Callable[[str, str, DataConfig, OpenRecordings], Iterator[Recording]]


def read_numpy(path: str, name: str, config: DataConfig, files: OpenRecordings) -> Iterator[Recording]:
    """The array of a `.npy` file, or those of a `.npz` file.

    >>> list(read_numpy("/nowhere.npy", "nowhere.npy", DataConfig(path="/", window=2), OpenRecordings()))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere.npy: cannot be read: No such file or directory
    """
    if is_remote(path):
        raise DataError(f"{shortened(path)}: expected files of this machine for format: numpy, got a URI")
    if path.lower().endswith(".npz"):
        for key, series in series_of_npz(path, name, files):
            yield Recording(f"{name}/{key}", series)
    else:
        yield Recording(name, series_of_npy(path, name, files))


def read_csv(path: str, name: str, config: DataConfig, files: OpenRecordings) -> Iterator[Recording]:
    """A CSV file with a line of names, plain or gzipped: a recording; an empty field is a missing value.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open(f"{folder}/a.csv", "w") as file:
    ...         _ = file.write("time,x,y,label\\n0,1,2,on\\n1,,4,on\\n5,5,6,off\\n")
    ...     config = DataConfig(path=folder, window=2, time_column="time")
    ...     recording = next(read_csv(file.name, "a.csv", config, OpenRecordings()))
    >>> recording.series.read(0, 2).tolist(), recording.labels.tolist(), recording.gaps.tolist()
    ([[1.0, 2.0], [nan, 4.0]], ['on', 'on', 'off'], [2])
    """
    with extra("signals"):
        import pandas as pd

    with Files() as opened:
        content = opened.read(path)
    try:
        gzipped = "gzip" if path.lower().endswith(".gz") else None
        with warnings.catch_warnings():
            # of more fields than names pandas would take the first for names of rows; with False it warns of a loss
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(io.BytesIO(content), compression=gzipped, skipinitialspace=True, index_col=False)
    except pd.errors.ParserWarning:
        raise DataError(f"{shortened(name)}: expected as many fields in every line as names, got more") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shortened(name)}: expected a CSV file: {message(error)}") from None
    known = list(map(str, table.columns))
    labels = None
    if config.labels is not False and (config.labels or config.label_column in known) and config.label_pattern is None:
        labels = _column(table, config.label_column, name).astype(object)
        labels = np.array(["" if value != value or value is None else _class_name(value) for value in labels])
    beside = {config.time_column, config.label_column}
    chosen = config.columns or [column for column in known if column not in beside]
    columns = [_numbers(_column(table, column, name), column, name) for column in chosen]
    if not columns or not len(table):
        raise DataError(f"{shortened(name)}: expected rows with a column of numbers, got columns {', '.join(known)}")
    gaps, times = np.empty(0, np.int64), None
    if config.time_column is not None:
        times = _times(_column(table, config.time_column, name), config.time_column, name)
        gaps = gaps_of(times, config, name)
    series = Series.of(np.stack(columns, axis=1))
    yield Recording(name, series, labels=labels, gaps=gaps, times=times, channels=tuple(chosen))


def read_ts(path: str, name: str, config: DataConfig, files: OpenRecordings) -> Iterator[Recording]:
    """A `.ts` file of the UCR and UEA archives: each case is a recording.

    >>> list(read_ts("/nowhere.ts", "nowhere.ts", DataConfig(path="/", format="ts"), OpenRecordings()))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere.ts: expected a file of this machine
    """
    if not os.path.isfile(path):
        raise DataError(f"{shortened(path)}: expected a file of this machine")
    with extra("signals"):
        from aeon.datasets import load_from_ts_file
    try:
        cases, classes = load_from_ts_file(path)
    except (ValueError, OSError, IndexError) as error:
        raise DataError(f"{shortened(name)}: expected a .ts file: {message(error)}") from None
    for number, (case, label) in enumerate(zip(cases, classes, strict=True)):
        yield Recording(f"{name}/{number}", Series.of(np.asarray(case, dtype=np.float32).T), label=str(label))


FORMATS: dict[str, tuple[tuple[str, ...], ReadFile]] = {
    "numpy": ((".npy", ".npz"), read_numpy),
    "csv": ((".csv", ".csv.gz"), read_csv),
    "ts": ((".ts",), read_ts),
}
"""Value of `data.format` → endings of its files, and what reads one."""

ENDINGS = tuple(ending for endings, _ in FORMATS.values() for ending in endings)
"""Of all files of recordings."""


def list_recordings(place: str, config: DataConfig, files: OpenRecordings) -> list[Recording]:
    """The recordings of a place: of a file, of the files of a folder at any depth, or of a pattern; by name.

    Raises
    ------
    ConfigError
        The place holds files of several formats, and the configuration does not say which.
    DataError
        There are none, or one cannot be read.

    >>> list_recordings("/nowhere", DataConfig(path="/nowhere", window=8), OpenRecordings())
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere: no such file or folder
    """
    path = place_of(place)
    found = _files(path)
    kinds = [kind for kind, (endings, _) in FORMATS.items() if any(name.lower().endswith(endings) for _, name in found)]
    if config.format in FORMATS:
        kinds = [config.format]
    if len(kinds) > 1:
        raise ConfigError(f"data.format: expected one of {', '.join(kinds)}, as {shortened(path)} holds both, got auto")
    endings, read = FORMATS[kinds[0]] if kinds else ((), read_numpy)
    recordings = [
        recording
        for file, name in found
        if name.lower().endswith(endings)
        for recording in read(file, name, config, files)
    ]
    if not recordings:
        raise DataError(f"{shortened(path)}: expected recordings (*{', *'.join(endings or ENDINGS)}), found none")
    return [_labelled(recording, config) for recording in recordings]


def gaps_of(times: np.ndarray[Any, np.dtype[np.float64]], config: DataConfig, name: str) -> Integers:
    """Samples before which time has a gap: a step of more than 1.5 periods.

    Raises
    ------
    DataError
        A time is missing, or not later than the one before it.

    >>> gaps_of(np.array([0.0, 1.0, 2.0, 5.0, 6.0]), DataConfig(path="a.csv", window=2), "a.csv").tolist()
    [3]
    """
    steps = np.diff(times)
    if not bool((steps > 0).all()):
        row = int(np.flatnonzero(~(steps > 0))[0]) + 1
        raise DataError(
            f"{shortened(name)}: expected times that ascend in {config.time_column}, got {times[row]:.15g} in "
            f"sample {row} after {times[row - 1]:.15g}"
        )
    period = config.period or (float(np.median(steps)) if len(steps) else 1.0)
    return np.flatnonzero(steps > GAP * period) + 1


def class_of(name: str, config: DataConfig) -> str | None:
    """The class that the name of a recording or of an image says: by `label_pattern`, or its first folder.

    Raises
    ------
    DataError
        There is none of `label_pattern`.

    >>> class_of("worn/monday.npy", DataConfig(path="pumps", window=2)), class_of("a.npz/b", DataConfig(path="pumps"))
    ('worn', None)
    """
    if config.label_pattern is not None:
        match = re.search(config.label_pattern, name)
        if match is None or match[1] is None:
            raise DataError(
                f"{shortened(name)}: expected a name with a class by data.label_pattern {config.label_pattern!r}, "
                "found none"
            )
        return match[1]
    first, folder, _ = name.partition("/")
    return first if folder and not first.lower().endswith(".npz") else None


def place_of(place: str) -> str:
    """A place as every process can use it; of `aeon:NAME`, the folder inside the package aeon.

    Raises
    ------
    ConfigError
        aeon has no such data set.

    >>> place_of("s3://bucket/pumps/")
    's3://bucket/pumps'
    """
    if not place.startswith(BUNDLED):
        return absolute(place)
    with extra("signals"):
        import aeon.datasets
    folder = os.path.join(os.path.dirname(aeon.datasets.__file__), "data")
    name, _, file = place.removeprefix(BUNDLED).partition("/")
    if name not in (known := sorted(each.name for each in os.scandir(folder) if each.is_dir())):
        raise ConfigError(f"data.path: expected {BUNDLED} and one of {', '.join(known)}, got {shortened(place)}")
    return os.path.join(folder, name, file).rstrip("/")


def _files(path: str) -> list[tuple[str, str]]:
    """(path, name) of the files of a place."""
    if is_pattern(path) or not is_folder(path):
        return [(file, os.path.basename(file)) for file in matching(path, "")]
    return [(f"{path}/{name}", name) for name in sorted(walk(path))]


def _labelled(recording: Recording, config: DataConfig) -> Recording:
    """A recording with its class, by its name, unless its samples or its file have said it."""
    label = recording.label
    if config.labels is False:
        label = None
    elif config.label_pattern is not None or (label is None and recording.labels is None):
        label = class_of(recording.name, config)
    return replace(recording, label=label)


def _column(table: Any, column: str, name: str) -> Any:
    if column not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise DataError(f"{shortened(name)}: expected a column {shortened(column)}, found {shortened(known)}")
    return table[column].to_numpy()


def _numbers(values: Any, column: str, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        return np.asarray(values).astype(np.float32)
    except (ValueError, TypeError):
        raise DataError(f"{shortened(name)}: expected numbers in column {shortened(column)}, got others") from None


def _times(values: Any, column: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers, or dates as seconds."""
    import pandas as pd

    if values.dtype.kind in "fiu":
        return np.asarray(values, dtype=np.float64)
    try:
        dates = pd.to_datetime(values, utc=True)
    except (ValueError, TypeError) as error:
        raise DataError(f"{shortened(name)}: expected times in column {shortened(column)}: {message(error)}") from None
    seconds = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    return np.asarray(seconds, dtype=np.float64)


def _class_name(value: Any) -> str:
    """1.0, which a column with empty fields holds, is the class 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
