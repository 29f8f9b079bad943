"""Configuration of the data: which images or signals to use, how they are read, and where copies are kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from simmatch.config import Frozen, NonNegativeInt, PositiveFloat, PositiveInt

LARGEST_SIDE = 8192
"""Pixels; such an image of three channels takes 200 MB."""


def _size(value: object) -> object:
    """`DataConfig.size`, checked: the union's own messages would name every alternative."""
    sides: Any = [value, value] if type(value) is int else value
    pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if value is None or (pair and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)):
        return value
    raise ValueError(f"expected 1 to {LARGEST_SIDE} pixels, or [height, width], got {value!r}")


def _pattern(value: str | None) -> str | None:
    """`SignalKeys.label_pattern`, checked."""
    try:
        groups = 1 if value is None else re.compile(value).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {value!r}: {error}") from None
    if groups < 1:
        raise ValueError(f"expected a group (…) that is the name of the class, got {value!r}")
    return value


ImageSize = Annotated[int | Annotated[tuple[int, int], Field(strict=False)] | None, BeforeValidator(_size)]
"""Height and width, or one number for both."""

ClassPattern = Annotated[str | None, AfterValidator(_pattern)]
"""A regular expression whose first group is the name of a class."""


class SignalKeys(Frozen):
    """Keys of `DataConfig` for signals: how recordings are cut into windows [C, 1, T], see `simmatch.data.windows`.

    >>> SignalKeys(window=256, hop=64).window_scale
    'standard'
    """

    window: PositiveInt | None = None
    """T, samples per window. None: each recording is one window, where all are of one length."""

    hop: PositiveInt | None = None
    """Samples from the start of a window to that of the next one of the recording. None: `window`, no overlap."""

    window_scale: Literal["standard", "center", "none"] = "standard"
    """What is done to each channel x of a window, with its mean m and standard deviation s over the window. `standard`:
    (x − m) / max(s, window_floor); `center`: x − m, where the amplitude matters; `none`: x."""

    window_floor: PositiveFloat = 1e-6
    """Smallest standard deviation to divide by, in units of the recording."""

    columns: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """The channels of a CSV file, by the names of its columns. None: all but those of times and labels."""

    time_column: str | None = None
    """Column of a CSV file with the time of each sample: numbers, or dates. A step to the next sample of more than 1.5
    `period` is a gap, which no window contains. None: samples follow each other without gaps."""

    period: PositiveFloat | None = None
    """Time from sample to sample, in units of `time_column` (of dates: seconds). None: the median of a recording."""

    missing: Literal["stop", "cut", "hold"] = "stop"
    """What to do where a channel has no finite value. `stop`: end with an error that names the first such sample.
    `cut`: no window contains such a sample; the next window begins behind it. `hold`: the channel keeps its last value
    for at most `hold_samples` samples in a row; more are cut."""

    hold_samples: PositiveInt = 1
    """Longest run of samples with missing values that is filled, with `missing: hold`."""

    label_pattern: ClassPattern = None
    """Regular expression that is searched for in the names of recordings, `folder/file.npy` or `file.npz/array`; its
    first group is the class. None: the first folder of the name, if there is one."""

    split: Literal["recordings", "time"] = "recordings"
    """What `test_fraction` is a share of. `recordings`: whole recordings of each class, those with the smallest hashes
    of their names. `time`: the last windows of every recording; windows that overlap with them are left out. Windows of
    a recording are never mixed between training and test."""

    turn: PositiveInt = 50
    """Windows are in the order of their recordings in turn: so many of one, then of the next."""


class DataConfig(SignalKeys):
    """Which data to use: a built-in data set by its `name`, own images or signals by their `path`.

    >>> DataConfig(name="fashion_mnist", train_images=10_000).damaged
    'stop'
    >>> DataConfig(path="s3://bucket/photos/", size=96, test_fraction=0.1).title
    'photos'
    >>> DataConfig(path="bearings", window=256, hop=128, test_path="bearings/rpm1730.npz").signals
    True
    """

    name: str | None = None
    """Name of the data set in `simmatch.data.builtin.DATASETS`."""

    root: str | None = None
    """Folder of its files. None: `$SIMMATCH_DATA`, then the folder of the Debian package, then a download."""

    path: str | None = None
    """Own images: a folder, a file, or a pattern of files with `*`, `?`, `[…]`, `{a,b}` or `{000..009}`; local, or a
    URI such as `s3://bucket/photos`. If a folder holds `train` and `test` (or `val`, `valid`, `validation`), as folders
    or in the names of its tar or Parquet files, these are the training and test images."""

    format: Literal["auto", "folder", "tar", "parquet", "numpy", "csv", "ts"] = "auto"
    """Of images, see `simmatch.data.listing.FORMATS`. `folder`: image files; an image is of the class of the first
    folder below. `tar`: files `*.tar` in the WebDataset layout, `key.jpg` with `key.cls` or `key.json`. `parquet`:
    files `*.parquet` with image bytes, in the Hugging Face layout. `auto`: `tar` or `parquet` if there are such files,
    otherwise `folder`.
    Of signals, see `simmatch.data.recordings.FORMATS`. `numpy`: files `*.npy` and `*.npz`, each array [T] or [T, C] a
    recording. `csv`: files `*.csv` and `*.csv.gz` with a line of names, each a recording. `ts`: files `*.ts` of the UCR
    and UEA archives, each case a recording; `path: aeon:NAME` is a data set inside the package aeon. With `window`,
    `auto` goes by the names of the files."""

    labels: bool | None = None
    """Whether to read labels. False: all images are unlabelled. True: some must be labelled. None: as found; a folder
    with images both beside and in folders is an error. An image without a label is used as unlabelled."""

    image_column: str = "image"
    """Column of the images, for `format: parquet`: structs of `bytes` and `path`, or binary values."""

    label_column: str = "label"
    """Column of the labels, for `format: parquet`; key of the label in `key.json`, for `format: tar`. Integers, −1 for
    unlabelled. Of a CSV file, integers or names, an empty field for unlabelled: a window is of the class of its last
    sample."""

    size: ImageSize = None
    """Height and width of all images, or [height, width], at most 8192: the short side is resized (bilinear,
    antialiased), the long side is cropped around the centre. None: as stored, where all have one size."""

    channels: Literal[1, 3] | None = None
    """1: grey, RGB as luma (ITU-R BT.601); 3: RGB, grey repeated. None: as stored, where all are grey or all are not.
    See `simmatch.data.decoding.decode` for transparency, 16 bits, CMYK and orientation."""

    test_path: str | None = None
    """The test images, a place as for `path`, of the same format."""

    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the images of `path` to use as test images: of each class, and of the unlabelled images, those whose
    names have the smallest hashes. It depends on nothing but names, labels and `split_seed`."""

    split_seed: NonNegativeInt = 0
    """Of the hashes, which also mix the images of `path`: `train_images: 100` are a random sample, of all classes."""

    train_images: PositiveInt | None = None
    """Use only this many training images, the first ones. None: all."""

    test_images: PositiveInt | None = None
    """Use only this many test images, the first ones. None: all."""

    damaged: Literal["stop", "skip"] = "stop"
    """What to do if an image cannot be decoded, has values that are not finite or outside [0, 1], or has a label that
    is no class. `stop`: end with an error that names the first such image. `skip`: leave such images out, before
    `train_images` are counted. A file of several images that is truncated or not of its format is always an error."""

    max_skipped: PositiveInt = 100
    """Maximum number of images to leave out; more are an error of the data set."""

    order: Literal["permutation", "blocks"] = "permutation"
    """Order of the images of an epoch. `permutation`: of all images. `blocks`: the shards of a prepared data set in
    random order, and the images of some shards at a time in random order; for data in an object store. Own images that
    are in memory have no shards: for them it is the permutation, and a note says so."""

    cache_dir: str | None = None
    """Folder on each node for copies of shards from an object store, for encoded images, and for images prepared on the
    way. None: `$SIMMATCH_CACHE`, or else `~/.cache/simmatch`."""

    cache_bytes: PositiveInt = 2**36
    """Bytes that copies of shards and encoded images may take on each node; the least recently used are removed."""

    @model_validator(mode="after")
    def _one_place(self) -> DataConfig:
        if (self.name is None) == (self.path is None):
            raise ValueError(f"expected either name or path, got {'neither' if self.name is None else 'both'}")
        if self.path is not None and self.root is not None:
            raise ValueError("expected root with name only, got path and root")
        if self.test_path is not None and self.test_fraction is not None:
            raise ValueError("expected test_path or test_fraction, got both")
        if self.path is None:
            fields = type(self).model_fields
            given = [key for key in OF_OWN_IMAGES if getattr(self, key) != fields[key].default]
            if given:
                raise ValueError(f"expected path with {', '.join(given)}, got name")
            if self.order != "permutation":
                raise ValueError(f"expected path with order: {self.order}, got name")
        self._one_kind()
        for key in ("path", "test_path"):
            if getattr(self, key) == "":
                raise ValueError(f"expected a folder, a file or a URI as {key}, got nothing")
        return self

    def _one_kind(self) -> None:
        """Keys of images with images, keys of signals with signals."""
        kind, other = ("signals", OF_IMAGES_ONLY) if self.signals else ("images", tuple(SignalKeys.model_fields))
        given = [key for key in other if getattr(self, key) != type(self).model_fields[key].default]
        if given and self.signals:
            raise ValueError(f"expected images with {', '.join(given)}, got {kind} ({self._signal_keys})")
        if given:
            raise ValueError(f"expected window, for signals, with {', '.join(given)}, got none")

    @property
    def _signal_keys(self) -> str:
        """What makes these signals."""
        return f"window: {self.window}" if self.window is not None else f"format: {self.format}"

    @property
    def signals(self) -> bool:
        """Whether `path` names signals."""
        return self.window is not None or self.format in ("numpy", "csv", "ts")

    @property
    def title(self) -> str:
        """What the images are called in tables and records: `name`, or the last part of `path`."""
        return self.name or str(self.path).rstrip("/").rpartition("/")[2]


OF_OWN_IMAGES = (
    "format",
    "labels",
    "image_column",
    "label_column",
    "size",
    "channels",
    "test_path",
    "test_fraction",
    "split_seed",
)
"""Keys of `DataConfig` that apply to images named by `path`."""

OF_IMAGES_ONLY = ("image_column", "size", "channels", "damaged", "order")
"""Keys of `DataConfig` that do not apply to signals."""
