"""Vibration of a motor's bearing while its load changes: 0 → 1 → 2 → 3 → 0 hp.

Each recording, of one fault at one load, is cut into stretches of 50 windows that share no sample. Recordings take
turns, a stretch of each; no stretch is both learnt from and held out. The first stretches at load 0 are the warm-up,
those that follow the first segment, the last ones the return to load 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from jobs.benchmarks.stream.streams import Part, Stream
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset
from simmatch.data.windows import Integers, Windows

FILES = ("rpm1797.npz", "rpm1772.npz", "rpm1750.npz", "rpm1730.npz")
"""At 0, 1, 2 and 3 hp."""

WINDOW, HOP, STRETCH = 256, 128, 50
"""Samples of a window, from one to the next, and windows of a stretch; the window between two stretches is left out."""

HELD_OUT, SCORED = 4, 3
"""Every fourth stretch, and of it every third window."""

WARM_UP, FIRST = (0, 5), (5, 12)
"""Stretches of load 0: before the stream begins, and of its first segment; the others come at its end."""

CLASSES = {"types": r"/(\w+?)_\w+$", "faults": r"/(\w+)$"}
"""What is told apart, and where the name of a recording says it: ball, inner or outer race; and its size, too."""


def bearings(folder: Path, classes: str, *, quick: bool = False) -> Stream:
    """The stream.

    Parameters
    ----------
    folder: holds the files.
    classes: `types` (3) or `faults` (9).
    quick: every segment is cut to two stretches of each recording.

    Raises
    ------
    DataError
        A file is missing.
    """
    loads = [each for pair in (FILES[:2], FILES[2:]) for each in _loads(folder, pair, CLASSES[classes])]
    count = int(loads[0].labels.max()) + 1

    def part(load: int, name: str, stretches: tuple[int, int | None], *, held_out: bool = False) -> Part:
        stretch = _stretch(loads[load])
        first, last = stretches
        chosen = (stretch >= first) & (stretch < (int(stretch.max()) + 1 if last is None else last))
        own = stretch % HELD_OUT == HELD_OUT - 1
        index = np.flatnonzero(chosen & (own if held_out else ~own))
        if held_out:
            index = index[::SCORED]
        if quick:
            index = index[np.isin(stretch[index], np.unique(stretch[index])[:2])]
        return _some(loads[load], name, index)

    segments = [part(0, "load 0", FIRST)]
    segments += [part(load, f"load {load}", (0, None)) for load in (1, 2, 3)]
    segments.append(part(0, "load 0 again", (FIRST[1], None)))
    held_out = [part(0, "load 0", (FIRST[0], None), held_out=True)]
    held_out += [part(load, f"load {load}", (0, None), held_out=True) for load in (1, 2, 3)]
    warm_up = part(0, "warm-up", WARM_UP)
    return Stream(f"bearings, {classes}", count, warm_up, tuple(segments), tuple(held_out), STRETCH)


def _loads(folder: Path, files: tuple[str, ...], pattern: str) -> list[Part]:
    """All windows at two loads, in whole stretches."""
    first, second = (str(folder / "bearings" / name) for name in files)
    dataset = load_dataset(
        DataConfig(path=first, test_path=second, window=WINDOW, hop=HOP, label_pattern=pattern, turn=STRETCH + 1)
    )
    parts = []
    pairs = ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    for name, (windows, labels) in zip(files, pairs, strict=True):
        assert isinstance(windows, Windows)
        number = windows.places[:, 1] // HOP
        whole = np.bincount(windows.places[:, 0]).min() // (STRETCH + 1) * (STRETCH + 1)
        index = np.flatnonzero((number < whole) & (number % (STRETCH + 1) < STRETCH))
        parts.append(Part(name, windows.take(torch.from_numpy(index)), labels[torch.from_numpy(index)]))
    return parts


def _stretch(part: Part) -> Integers:
    assert isinstance(part.x, Windows)
    stretch: Integers = part.x.places[:, 1] // HOP // (STRETCH + 1)
    return stretch


def _some(part: Part, name: str, index: Integers) -> Part:
    assert isinstance(part.x, Windows)
    chosen = torch.from_numpy(index)
    return Part(name, part.x.take(chosen)[:], part.labels[chosen])
