"""The electricity market of New South Wales: does the price rise above the mean of the last day?

Each record is the last half-hours of time of day, prices, demands and transfer of two states. Labels follow each other
in long runs: the class of the record before is right 85 times of 100. So records are tested one by one.

Source: Harries, "Splice-2 comparative evaluation: electricity pricing" (1999).
"""

from __future__ import annotations

from pathlib import Path

from jobs.benchmarks.stream.streams import Part, Stream
from simmatch.data.config import DataConfig
from simmatch.data.sources import load_dataset

FILE = "elec.csv.gz"

COLUMNS = ("period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer")

WINDOW = 8
"""Half-hours of a record. The class compares the last price with a mean of 48: so many would all but tell it."""

WARM_UP, SEGMENTS, QUICK = 4000, 4, 400
"""Records before the stream begins, parts of equal length, and records of each with `--quick`."""


def electricity(folder: Path, *, quick: bool = False) -> Stream:
    """The stream.

    Raises
    ------
    DataError
        The file is missing.
    """
    path = str(folder / FILE)
    dataset = load_dataset(
        DataConfig(path=path, test_path=path, window=WINDOW, hop=1, window_scale="none", columns=COLUMNS,
                   label_column="class", labels=True)
    )  # fmt: skip
    whole = dataset.train_images[:]
    count = (len(whole) - WARM_UP) // SEGMENTS

    def part(name: str, first: int, length: int) -> Part:
        chosen = slice(first, first + min(length, QUICK if quick else length))
        return Part(name, whole[chosen], dataset.train_labels[chosen])

    segments = [part(f"part {number + 1}", WARM_UP + number * count, count) for number in range(SEGMENTS)]
    return Stream("electricity", 2, part("warm-up", 0, WARM_UP), tuple(segments), (), batch_size=1)
