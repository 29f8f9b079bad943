"""Own images, decoded into tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmatch.data.config import DataConfig
from simmatch.data.decoding import LEAVE_OUT, ImagePolicy, Pixels, decode
from simmatch.data.formats import DataError
from simmatch.data.samples import Samples
from simmatch.documents import listed, shortened
from simmatch.memory import machine_bytes

MOST_NAMED = 5
"""Damaged images that a message names."""

PROGRESS_EVERY = 500
"""Images between two reports."""


def decoded(samples: Samples, policy: ImagePolicy) -> Iterator[tuple[str, Pixels | DataError]]:
    """(name, pixels) of images, in the order given; where one cannot be decoded, its error in place of the pixels.

    Raises
    ------
    DataError
        A file cannot be read. The message names it.

    >>> from simmatch.data.folders import list_folder
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.pgm").write_bytes(b"P5 1 1 255 " + bytes([7]))
    ...     samples, _, _ = list_folder(folder, DataConfig(path=folder))
    ...     [pixels.tolist() for name, pixels in decoded(samples, ImagePolicy())]
    [[[[7]]]]
    """
    with samples.origin.open() as read:
        for sample in samples:
            name, data = shortened(samples.origin.name(sample)), read(sample)
            try:
                yield name, decode(data, policy)
            except DataError as error:
                yield name, DataError(f"{name}: {error}")


class Shape:
    """The shape that all images must have: that of the first.

    >>> shape = Shape()
    >>> shape.check("a.png", np.zeros((3, 8, 8), np.uint8))
    >>> shape.check("b.png", np.zeros((3, 9, 8), np.uint8))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: expected images of one size, got 8 × 8 in a.png and 9 × 8 in b.png; set data.size
    """

    def __init__(self) -> None:
        self._name = ""
        self.shape: tuple[int, int, int] | None = None
        """[C, H, W]."""

    @property
    def known(self) -> tuple[int, int, int]:
        """[C, H, W], after an image was checked."""
        assert self.shape is not None, "no image was checked"
        return self.shape

    def check(self, name: str, pixels: Pixels) -> None:
        """Raise DataError unless an image has the shape of the first one."""
        channels, height, width = pixels.shape
        if self.shape is None:
            self._name, self.shape = name, (channels, height, width)
        if (height, width) != self.shape[1:]:
            raise DataError(
                f"expected images of one size, got {self.shape[1]} × {self.shape[2]} in {self._name} and "
                f"{height} × {width} in {name}; set data.size"
            )
        if channels != self.shape[0]:
            raise DataError(
                f"expected images of one number of channels, got {self.shape[0]} in {self._name} and {channels} in "
                f"{name}; set data.channels"
            )


class Loader:
    """Decodes the images of a data set; both of its parts have one shape.

    Parameters
    ----------
    config: size, channels, what to do with damaged images, and the seed by which images are mixed.
    progress: called with the number of images done, and of all that this call loads.

    Attributes
    ----------
    damaged: one line for each image that was left out.

    >>> Loader(DataConfig(path="photos", size=32), print).damaged
    []
    """

    def __init__(self, config: DataConfig, progress: Callable[[int, int], None]) -> None:
        self._config, self._progress, self._policy = config, progress, ImagePolicy.of(config)
        self._shape = Shape()
        self.damaged: list[str] = []

    def load(self, samples: Samples, most: int | None) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, H, W] and labels [N], mixed by the seed; the first `most` of that order, None for all.

        Raises
        ------
        DataError
            An image cannot be decoded, or more than `data.max_skipped` or all; sizes differ; the memory is too small.
        """
        order = samples.mixed(self._config.split_seed)
        rows = np.arange(min(most or len(order), len(order)))
        labels = np.empty(len(rows), dtype=np.int64)
        images: Pixels | None = None
        taken, free = 0, rows
        while len(free) and taken < len(order):  # again only to replace damaged images
            chosen = order[taken : taken + len(free)]
            taken += len(chosen)
            in_place = np.argsort(chosen)
            lost = set(free[len(chosen) :].tolist())
            part = samples.take(chosen[in_place])
            for index, (name, pixels) in enumerate(decoded(part, self._policy)):
                row = int(free[in_place[index]])
                if isinstance(pixels, DataError):
                    self._leave_out(pixels)
                    lost.add(row)
                    continue
                self._shape.check(name, pixels)
                if images is None:
                    images = _room(len(rows), pixels)
                images[row], labels[row] = pixels, part.labels[index]
                if (index + 1) % PROGRESS_EVERY == 0 or index + 1 == len(part) > PROGRESS_EVERY:
                    self._progress(index + 1, len(part))
            free = np.array(sorted(lost), dtype=np.int64)
        if images is None:
            raise DataError(f"expected images, got none that can be decoded; the first: {self.damaged[0]}")
        kept = np.setdiff1d(rows, free)
        if len(kept) < len(rows):
            images, labels = images[kept], labels[kept]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _leave_out(self, error: DataError) -> None:
        if self._config.damaged == "stop":
            raise DataError(f"{error}; {LEAVE_OUT}") from None
        self.damaged.append(str(error))
        if len(self.damaged) > self._config.max_skipped:
            most = f"data.max_skipped={self._config.max_skipped}"
            raise DataError(f"{self._config.title}: expected at most {most} damaged images, got more; {self._named()}")

    def _named(self) -> str:
        return listed(self.damaged, MOST_NAMED, "; ")

    def notes(self) -> list[str]:
        """A line that names damaged images, if there were any."""
        return [f"left out: {self._named()}"] if self.damaged else []


def _room(count: int, pixels: Pixels) -> np.ndarray[Any, np.dtype[np.uint8]]:
    needed, memory = count * pixels.nbytes, machine_bytes()
    if needed > memory // 2:
        raise DataError(
            f"expected images that fill at most half of this machine's memory of {memory / 1e9:.1f} GB, got {count:,} "
            f"of {pixels.nbytes:,} bytes, {needed / 1e9:.1f} GB; set data.size or data.train_images"
        )
    return np.empty((count, *pixels.shape), np.uint8)
