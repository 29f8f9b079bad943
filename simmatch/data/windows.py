"""Windows of recordings: where they are, and their samples, read and scaled when they are needed.

A recording [T, C] is cut into *runs*: where a gap in time or a missing value interrupts it, see `runs`. Within a run,
windows of `window` samples begin every `hop` samples, the first one with the run. No window contains a gap. A missing
value is inside a window only where it is filled with the last value of its channel.

A window x [C, T] is scaled by itself, channel by channel: with m and s the mean and the standard deviation over its T
samples,

    standard   (x − m) / max(s, floor)        center   x − m        none   x

in float64, then rounded to float32. So it does not depend on other windows. Of a window only its place is held, 16
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from simmatch.data.series import Array, Series

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class WindowShape:
    """How recordings are cut and scaled; see `simmatch.data.config.SignalKeys`.

    >>> WindowShape(length=256, hop=128).scale
    'standard'
    """

    length: int
    hop: int
    scale: Literal["standard", "center", "none"] = "standard"
    floor: float = 1e-6
    hold: int = 0
    """Longest run of samples with missing values that is filled."""


def runs(missing: Array, gaps: Sequence[int] | Integers = (), hold: int = 0) -> Integers:
    """The runs of a recording in which windows lie: [R, 2], first sample and the one behind the last.

    Parameters
    ----------
    missing: bool [T], samples without a finite value in some channel.
    gaps: samples before which time has a gap, ascending.
    hold: at most so many missing samples in a row are filled with what is before them, so that the run goes on.

    >>> missing = np.array([0, 0, 1, 0, 0, 1, 1, 0, 0], dtype=bool)
    >>> runs(missing).tolist()
    [[0, 2], [3, 5], [7, 9]]
    >>> runs(missing, gaps=[4], hold=1).tolist()
    [[0, 4], [4, 5], [7, 9]]
    """
    edges = np.unique([0, *np.asarray(gaps, dtype=np.int64), len(missing)])
    found = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        change = np.flatnonzero(np.diff(missing[start:stop].astype(np.int8), prepend=0, append=0))
        first, last = start + change[::2], start + change[1::2]
        cut = (last - first > hold) | (first == start)  # nothing to hold at the start
        begin, end = np.append(start, last[cut]), np.append(first[cut], stop)
        found.append(np.stack([begin, end], axis=1)[begin < end])
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def starts_in(run: Sequence[int] | Integers, shape: WindowShape) -> Integers:
    """The first samples of the windows of a run.

    >>> starts_in((10, 20), WindowShape(length=4, hop=3)).tolist()
    [10, 13, 16]
    """
    return np.arange(run[0], run[1] - shape.length + 1, shape.hop, dtype=np.int64)


def in_turn(recording: Integers, number: Integers, block: int) -> Integers:
    """The order in which recordings take turns: `block` windows of the first one, of the second, …, then the next ones.

    Parameters
    ----------
    recording, number: [N], the recording of each window, and its number within it.

    >>> recording, number = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    >>> in_turn(recording, number, block=2).tolist()
    [0, 1, 3, 4, 2, 5]
    """
    return np.lexsort((number, recording, number // block))


class Windows:
    """Windows as images [N, C, 1, T] that are read when they are indexed; see `simmatch.data.prepared.StoredImages`.

    Parameters
    ----------
    series: the recordings.
    starts: of each recording, the first sample of each of its runs, ascending: held values come from the same run.
    places: [N, 2], recording and first sample of each window.
    shape: how they are scaled.
    digest: of the content of the recordings.

    Attributes
    ----------
    shape: torch.Size([N, C, 1, T]); ndim: 4; dtype: torch.float32.

    >>> series = Series.of(np.array([1.0, 3.0, 1.0, 3.0, 5.0, 9.0]))
    >>> windows = Windows([series], [np.array([0])], np.array([[0, 0], [0, 4]]), WindowShape(2, 2), digest="")
    >>> windows.shape, windows[torch.tensor([1])]
    (torch.Size([2, 1, 1, 2]), tensor([[[[-1.,  1.]]]]))
    """

    ndim, dtype = 4, torch.float32

    def __init__(
        self, series: Sequence[Series], starts: Sequence[Integers], places: Integers, shape: WindowShape, *, digest: str
    ) -> None:
        self._series, self._starts, self.places, self._how, self._content = series, starts, places, shape, digest
        self.shape = torch.Size((len(places), series[0].shape[1], 1, shape.length))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.places.nbytes + sum(series.nbytes for series in self._series)

    @property
    def digest(self) -> str:
        """A hash of the windows: of the recordings, the places and the scale."""
        digest = sha256(repr((self._content, self._how)).encode())
        digest.update(np.ascontiguousarray(self.places).data)
        return digest.hexdigest()[:16]

    def take(self, chosen: Tensor | slice) -> Windows:
        """Some of the windows, which are not read."""
        index = chosen if isinstance(chosen, slice) else chosen.cpu().numpy()
        return Windows(self._series, self._starts, self.places[index], self._how, digest=self._content)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Windows with these indices, int64 or bool [n], or a slice, in this order: float32 [n, C, 1, T].

        Raises
        ------
        IndexError
            There are no such windows.
        DataError
            A file cannot be read; the message names it.
        """
        index = indices if isinstance(indices, slice) else indices.cpu().numpy()
        places = self.places[index]
        values = np.empty((len(places), self.shape[1], self.shape[3]), np.float64)
        for window, (recording, start) in zip(values, places.tolist(), strict=True):
            window[...] = self._read(recording, start).T
        return torch.from_numpy(scaled(values, self._how)[:, :, None])

    def _read(self, recording: int, start: int) -> Array:
        """The samples [T, C] of a window, missing ones filled."""
        series, length, hold = self._series[recording], self._how.length, self._how.hold
        if hold == 0:
            return series.read(start, start + length)
        begun = self._starts[recording]
        before = min(hold, start - int(begun[np.searchsorted(begun, start, side="right") - 1]))
        return filled(series.read(start - before, start + length))[before:]


def scaled(windows: Array, shape: WindowShape) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Windows [n, C, T] in float64, each channel of each scaled by itself, as float32.

    >>> scaled(np.array([[[1.0, 3.0], [5.0, 5.0]]]), WindowShape(length=2, hop=2)).tolist()
    [[[-1.0, 1.0], [0.0, 0.0]]]
    """
    if shape.scale != "none":
        windows = windows - windows.mean(axis=2, keepdims=True)
    if shape.scale == "standard":
        deviation = np.sqrt(np.square(windows).mean(axis=2, keepdims=True))
        windows = windows / np.maximum(deviation, shape.floor)
    return windows.astype(np.float32)


def filled(samples: Array) -> Array:
    """Samples [T, C] in which each value that is not finite is replaced by the last finite one of its channel.

    >>> filled(np.array([[1.0, 2.0], [np.nan, 3.0], [np.nan, np.inf]])).tolist()
    [[1.0, 2.0], [1.0, 3.0], [1.0, 3.0]]
    """
    known = np.isfinite(samples)
    if known.all():
        return samples
    last = np.maximum.accumulate(np.where(known, np.arange(len(samples))[:, None], 0), axis=0)
    return np.take_along_axis(samples, last, axis=0)
