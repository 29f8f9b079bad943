"""Windows of a signal whose samples are still arriving.

The windows are those that `simmatch.data.windows` cuts from the whole recording (`runs`, `starts_in`, `filled`,
`scaled`), bit by bit, however the samples are divided into chunks. A window that ends among missing values which may
yet be filled waits until their number is known.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from simmatch.data.recordings import GAP
from simmatch.data.series import Array
from simmatch.data.windows import WindowShape, filled, scaled

Cuts = list[tuple[Tensor, int]]
"""Windows float32 [C, 1, length], each with the number of its last sample."""


class Cutter:
    """Cuts the signal of one machine, or group of channels, into windows.

    Parameters
    ----------
    shape: of the windows, how they are scaled, and how many missing samples in a row are filled.
    channels: C.
    period_s: time from sample to sample. A step of more than 1.5 periods is a gap, which no window contains. None:
        samples follow each other without gaps.

    Attributes
    ----------
    samples: the number of samples so far; the first one has number 0.

    >>> cutter = Cutter(WindowShape(length=4, hop=2, scale="none"), channels=1)
    >>> cutter.add(np.arange(3.0)[:, None], np.arange(3.0))
    []
    >>> [(window.flatten().tolist(), last) for window, last in cutter.add(np.arange(3.0, 7.0)[:, None], np.arange(4.0))]
    [([0.0, 1.0, 2.0, 3.0], 3), ([2.0, 3.0, 4.0, 5.0], 5)]
    """

    def __init__(self, shape: WindowShape, channels: int, period_s: float | None = None) -> None:
        self._shape, self._channels, self._period_s = shape, channels, period_s
        self.samples = 0
        self._time = np.nan
        """Of the last sample."""
        self._rows = np.empty((0, channels), np.float64)
        """Samples of the present run, filled; from `_begin` to `_end` they are in use: of the next windows, and at
        least the last sample. None in use: no run."""
        self._begin = self._end = 0
        self._first = 0
        """Number of the first sample in use."""
        self._skip = 0
        """Samples from there to the next window, which may be more than there are."""
        self._held = 0
        """Filled samples at the end. If too many follow, the run has ended before them."""

    def add(self, values: Array, times: Array) -> Cuts:
        """The windows that are complete with these samples.

        Parameters
        ----------
        values: [T, C], NaN or infinite where a value is missing.
        times: [T], ascending, in seconds; not used without a period.

        Raises
        ------
        ValueError
            `values` are not of C channels, or there is not one time for each sample.
        """
        if values.ndim != 2 or values.shape[1] != self._channels or times.shape != values.shape[:1]:
            raise ValueError(
                f"expected values [T, {self._channels}] and times [T], got {list(values.shape)} and {list(times.shape)}"
            )
        cuts: Cuts = []
        edges = [0, *self._gaps(times), len(values)]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            if number > 0:
                cuts += self.end()
            cuts += self._add_piece(values[start:stop])
        return cuts

    def end(self) -> Cuts:
        """The recording ends here: the windows that waited. The next sample begins another one."""
        self._held = 0
        cuts = self._cut()
        self._begin = self._end = 0
        return cuts

    def state(self) -> dict[str, Tensor]:
        """All that later windows depend on.

        >>> Cutter(WindowShape(4, 2), channels=3).state()["rows"].shape
        torch.Size([0, 3])
        """
        numbers = {"samples": self.samples, "first": self._first, "skip": self._skip, "held": self._held}
        return {
            "rows": torch.from_numpy(self._rows[self._begin : self._end].copy()),
            "time": torch.tensor(self._time, dtype=torch.float64),
            **{name: torch.tensor(number) for name, number in numbers.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            It is of another number of channels.
        """
        if state["rows"].ndim != 2 or state["rows"].shape[1] != self._channels:
            raise ValueError(f"expected samples [T, {self._channels}], got {list(state['rows'].shape)}")
        self._rows = state["rows"].numpy().copy()
        self._begin, self._end = 0, len(self._rows)
        names = ("samples", "first", "skip", "held")
        self.samples, self._first, self._skip, self._held = (int(state[name]) for name in names)
        self._time = float(state["time"])

    def _gaps(self, times: Array) -> list[int]:
        """Samples of a chunk before which time has a gap; the first one may be among them."""
        if self._period_s is None or not len(times):
            return []
        steps = np.diff(times, prepend=self._time)  # without a sample before it NaN, which is no gap
        self._time = float(times[-1])
        return [int(gap) for gap in np.flatnonzero(steps > GAP * self._period_s)]

    def _add_piece(self, values: Array) -> Cuts:
        """Add samples without a gap in time."""
        if not len(values):
            return []
        cuts: Cuts = []
        missing = np.asarray(~np.isfinite(values).all(axis=1))
        edges = [0, *(np.flatnonzero(np.diff(missing)) + 1).tolist(), len(values)]
        for start, stop in itertools.pairwise(edges):
            if not missing[start]:
                self._append(values[start:stop], held=0)
            elif self._begin < self._end and self._held + stop - start <= self._shape.hold:
                last = self._rows[self._end - 1 : self._end]
                self._append(filled(np.concatenate([last, values[start:stop]]))[1:], held=self._held + stop - start)
            else:
                self._end -= self._held
                cuts += self.end()
            self.samples += stop - start
        return cuts + self._cut()

    def _append(self, rows: Array, held: int) -> None:
        """Add samples of a run, the last `held` of which are filled."""
        if self._begin == self._end:
            self._begin = self._end = self._skip = 0
            self._first = self.samples
        if self._end + len(rows) > len(self._rows):
            used = self._rows[self._begin : self._end]
            self._rows = np.empty((2 * (len(used) + len(rows)), self._channels), np.float64)
            self._rows[: len(used)] = used
            self._begin, self._end = 0, len(used)
        self._rows[self._end : self._end + len(rows)] = rows
        self._end += len(rows)
        self._held = held

    def _cut(self) -> Cuts:
        """The windows that are complete, none of them with a filled sample that may yet be none."""
        length, hop, begin = self._shape.length, self._shape.hop, self._begin + self._skip
        count = max(0, (self._end - self._held - begin - length) // hop + 1)
        if not count:
            return []
        windows = np.empty((count, self._channels, length), np.float64)
        for number, window in enumerate(windows):
            window[...] = self._rows[begin + number * hop : begin + number * hop + length].T
        last = self._first + self._skip + length - 1
        self._skip += count * hop
        unused = min(self._skip, self._end - self._begin - 1)
        self._begin, self._first, self._skip = self._begin + unused, self._first + unused, self._skip - unused
        images = torch.from_numpy(scaled(windows, self._shape)[:, :, None])
        return [(image, last + number * hop) for number, image in enumerate(images)]
