"""Own images: which format a place holds, what is in it, and which images are for training and which for testing.

To add a format, write a function `(path, config) -> (samples, classes, number of other files)`, as in `folders`, `tars`
and `parquet`, and add it to `FORMATS` and to `DataConfig.format`. What an image file becomes is in `decoding`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.folders import list_folder
from simmatch.data.formats import DataError, errors_name
from simmatch.data.parquet import list_parquet
from simmatch.data.places import absolute, contents, is_folder, is_pattern
from simmatch.data.samples import Samples
from simmatch.data.tars import list_tars
from simmatch.documents import shortened
from simmatch.labels import UNLABELLED
from simmatch.remote import is_remote

ListFormat = Callable[[str, DataConfig], tuple[Samples, tuple[str, ...], int]]

FORMATS: dict[str, ListFormat] = {"folder": list_folder, "tar": list_tars, "parquet": list_parquet}
"""Value of `data.format` → what lists the images of such a place, their classes and the number of other files."""

TEST_NAMES = ("test", "val", "valid", "validation")
"""Parts of names that mark test images, beside `train`; of several, the first one is used."""


MOST_CLASSES = 100_000
"""Where the files do not name the classes, a larger label is taken for a mistake."""


@dataclass(frozen=True, eq=False)
class Listing:
    """Own images that have not been read yet.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for index in range(10):
    ...         os.makedirs(f"{folder}/{index % 2}", exist_ok=True)
    ...         open(f"{folder}/{index % 2}/{index}.jpg", "w").close()
    ...     listing = list_samples(DataConfig(path=folder, test_fraction=0.2))
    >>> len(listing.train), len(listing.test), listing.classes
    (8, 2, ('0', '1'))
    """

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    """Names of the classes; none if no image has a label."""

    note: str
    """One line that says what was found."""


def list_samples(config: DataConfig) -> Listing:
    """Find the images of `data.path`, and of `data.test_path` if it is given; no image is read.

    Raises
    ------
    ConfigError
        The configuration does not say how to understand what is there, for example which images are test images.
    DataError
        There are no images, labels are missing or of one class only, or a file cannot be read. One line.

    >>> list_samples(DataConfig(path="/nowhere/photos", test_fraction=0.1))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: data.path: /nowhere/photos: no such folder
    """
    assert config.path is not None, "own images have a path"
    if config.signals:
        raise ConfigError(f"data: expected images, got signals ({shortened(config.path)})")
    with errors_name("data.path"):
        path = absolute(config.path)
        kind = _format(path) if config.format == "auto" else config.format
        train_path, test_path, test_key = split_places(config, path, (".tar", ".parquet"), "images")
        named = train_path != path
        if named and config.format == "auto" and is_folder(train_path):
            kind = _format(train_path)
        train, classes, ignored = FORMATS[kind](train_path, config)
        _check_labels(train, classes, train_path)
    if test_path is not None:
        with errors_name(test_key):
            test_path = absolute(test_path)
            test, test_classes, more = FORMATS[kind](test_path, config)
            _check_labels(test, test_classes, test_path)
            test, ignored = _as_in(test, test_classes, classes, train_path), ignored + more
        how = "by their names" if named else f"data.test_path: {test_path}"
    elif config.test_fraction is not None:
        train, test = train.split(config.test_fraction, config.split_seed)
        how = f"data.test_fraction: {config.test_fraction:g}"
    else:
        raise no_test_data(path, "images")
    with errors_name("data.path"):
        classes = _checked_classes(train, test, classes, train_path, config)
    if not len(test):
        raise ConfigError(
            f"data.test_fraction: expected a share that gives one test image of {len(train)}, got "
            f"{config.test_fraction:g}"
        )
    labelled = int((train.labels != UNLABELLED).sum() + (test.labels != UNLABELLED).sum())
    note = (
        f"{shortened(path)}: {kind}, {len(train):,} training images, {len(test):,} test images ({shortened(how)}), "
        f"{len(classes)} classes, {labelled:,} images labelled, {ignored:,} other files left out"
    )
    return Listing(train, test, classes, note)


def _format(path: str) -> str:
    """The format of a place, by the names of its files."""
    suffixes = {".tar": "tar", ".parquet": "parquet"}
    if is_pattern(path) or not is_folder(path):
        kind = suffixes.get(os.path.splitext(path)[1].lower())
        if kind is None and is_pattern(path):
            raise ConfigError(f"data.path: expected a pattern of files .tar or .parquet, got {shortened(path)}")
        return kind or "folder"
    found = sorted({kind for name in contents(path)[1] if (kind := suffixes.get(os.path.splitext(name)[1].lower()))})
    if len(found) > 1:
        raise ConfigError(f"data.format: expected one of {', '.join(found)}, as {shortened(path)} holds both, got auto")
    return found[0] if found else "folder"


def split_places(config: DataConfig, path: str, endings: tuple[str, ...], what: str) -> tuple[str, str | None, str]:
    """The places of training and of test data, and the key that gives the latter; None: there is no place of its own.

    Parameters
    ----------
    path: of `data.path`, as every process can use it.
    endings: of the files to look at.
    what: the data, in messages.

    Raises
    ------
    ConfigError
        The place holds both, and another one, or a share, is given for testing.

    >>> split_places(DataConfig(path="/nowhere", test_path="/elsewhere"), "/nowhere", (".tar",), "images")
    ('/nowhere', '/elsewhere', 'data.test_path')
    """
    named = _named_split(path, endings)
    if named is None:
        return path, config.test_path, "data.test_path"
    if config.test_path is not None or config.test_fraction is not None:
        key = "test_fraction" if config.test_path is None else "test_path"
        raise ConfigError(
            f"data.{key}: expected null, as {shortened(path)} holds train and test {what} (or name one part of it in "
            f"data.path), got {getattr(config, key)}"
        )
    return *named, "data.path"


def no_test_data(path: str, what: str) -> ConfigError:
    """What is wrong where nothing says which data is for testing.

    >>> str(no_test_data("/photos", "images")).partition(", or")[0]
    'data.test_path: expected test images'
    """
    return ConfigError(
        f"data.test_path: expected test {what}, or a share of {shortened(path)} for testing in data.test_fraction, got "
        "neither"
    )


def _named_split(path: str, endings: tuple[str, ...]) -> tuple[str, str] | None:
    """The places of training and test data in a folder that names them so."""
    if is_pattern(path) or not is_folder(path):
        return None
    folders, files = contents(path)
    for test in TEST_NAMES:
        if "train" in folders and test in folders:
            return f"{path}/train", f"{path}/{test}"
    shards = [name for name in files if name.lower().endswith(endings)]
    parts = {
        part: [name for name in shards if part in re.split(r"[-_.]", name.lower())] for part in ("train", *TEST_NAMES)
    }
    for test in TEST_NAMES:
        if parts["train"] and parts[test]:
            below = path if is_remote(path) else glob.escape(path)
            train_files, test_files = (f"{below}/{{{','.join(parts[part])}}}" for part in ("train", test))
            return train_files, test_files
    return None


def _as_in(test: Samples, own: tuple[str, ...], classes: tuple[str, ...], train_path: str) -> Samples:
    """Test images with the numbers that their classes have among the training images."""
    if not own or own == classes:
        return test
    number = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in own if name not in number]
    if unknown:
        raise DataError(
            f"class '{shortened(unknown[0])}' of the test images: expected one of the training images' classes, "
            f"got none of this name in {shortened(train_path)}"
        )
    numbers = np.array([number[name] for name in own] + [UNLABELLED])  # index −1 for unlabelled
    return Samples(test.origin, test.keys, test.locations, numbers[test.labels])


def _check_labels(samples: Samples, names: tuple[str, ...], path: str) -> None:
    lowest, largest = int(samples.labels.min()), int(samples.labels.max())
    most = len(names) or MOST_CLASSES
    if lowest < UNLABELLED or largest >= most:
        wrong = lowest if lowest < UNLABELLED else largest
        raise DataError(f"{shortened(path)}: expected labels 0 to {most - 1}, or {UNLABELLED} for none, got {wrong}")


def _checked_classes(
    train: Samples, test: Samples, names: tuple[str, ...], path: str, config: DataConfig
) -> tuple[str, ...]:
    """The names of the classes; numbers where the files hold no names."""
    largest, where = max(int(train.labels.max()), int(test.labels.max(initial=UNLABELLED))), shortened(path)
    found = np.unique(train.labels[train.labels != UNLABELLED])
    if len(found) == 0:
        if config.labels is True or largest != UNLABELLED:
            raise DataError(f"{where}: expected training images with labels, got none")
        return ()
    if len(found) == 1:
        name = names[found[0]] if names else str(found[0])
        raise DataError(
            f"{where}: expected labels of two classes at least, got '{shortened(name)}' only; set data.labels: false "
            "to use the images without labels"
        )
    return names or tuple(map(str, range(largest + 1)))
