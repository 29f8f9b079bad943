"""Results of the benchmark of streams: one file for each (stream, labels, row, seed), tables, and paired differences.

What has a file is not measured again. An interval of a difference is Student's t over seeds: of each seed, the
accuracies of two rows that saw the same records and the same labels are subtracted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student

from jobs.benchmarks.stream.prequential import Result
from jobs.reporting import Table, save_figure
from simmatch.config import ConfigError
from simmatch.files import make_folder, write_whole

CONFIDENCE = 0.95

CURVE = 500
"""Records of a point of a curve."""

SHOWN = 0.6
"""Rows with less than this part of the best accuracy do not set the scale of a figure."""


@dataclass(frozen=True)
class Store:
    """A folder with a file for each result.

    Attributes
    ----------
    folder: made when the first result is kept.
    """

    folder: Path

    def path(self, stream: str, labels: str, row: str, seed: int) -> Path:
        """
        >>> Store(Path("results")).path("bearings, types", "1% late 500", "random, whitened", 0).as_posix()
        'results/bearings-types/1-late-500/random-whitened-seed0.json'
        """
        return self.folder / _plain(stream) / _plain(labels) / f"{_plain(row)}-seed{seed}.json"

    def find(self, stream: str, labels: str, row: str, seed: int) -> Result | None:
        """A result that was kept."""
        path = self.path(stream, labels, row, seed)
        try:
            return Result.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise ConfigError(f"--run-dir: expected a result of this benchmark in {path}, got something else") from None

    def keep(self, result: Result) -> None:
        """Write a result."""
        path = self.path(result.stream, result.labels, result.row, result.seed)
        make_folder(path.parent)
        write_whole(path, result.model_dump_json().encode())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def table(results: Sequence[Result], rows: Sequence[str]) -> Table:
    """One line for each row; results of one stream and one labelling."""
    lines = []
    for row in rows:
        own = [result for result in results if result.row == row]
        if own:
            values = [[each.accuracy for each in own], _known(own, "final"), _known(own, "forgotten")]
            numbers = [_mean(own, name) for name in ("labels_used", "us_per_record", "state_bytes")]
            settings = ", ".join(sorted({each.settings for each in own} - {""}))
            lines.append([row, len(own), *map(spread, values), *map(round, numbers), settings or None])
    first = results[0]
    columns = [
        "row", "seeds", "prequential accuracy", "held out, at the end", "forgotten", "labels", "µs / record",
        "bytes of state", "settings",
    ]  # fmt: skip
    return Table(f"{first.stream}, {first.labels} of labels", columns, lines)


def held_out_table(results: Sequence[Result], rows: Sequence[str]) -> Table:
    """Accuracy on every held-out part after every segment, mean over seeds; results of one stream and one labelling."""
    first, lines = results[0], list[list[object]]()
    parts = list(first.held_out[0])
    for row in rows if parts else ():
        own = [result.held_out for result in results if result.row == row]
        for number, segment in enumerate(first.segments if own else ()):
            means = (sum(each[number][part] for each in own) / len(own) for part in parts)
            lines.append([row, segment, *means])
    return Table(f"{first.stream}, {first.labels} of labels: held out", ["row", "after", *parts], lines)


def _known(results: Sequence[Result], name: str) -> list[float]:
    return [value for result in results if (value := getattr(result, name)) is not None]


def _mean(results: Sequence[Result], name: str) -> float:
    return sum(float(getattr(result, name)) for result in results) / len(results)


def spread(values: Sequence[float]) -> str | None:
    """Mean ± standard deviation.

    >>> spread([0.5, 0.7]), spread([0.5]), spread([])
    ('0.600 ± 0.141', '0.500', None)
    """
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((each - mean) ** 2 for each in values) / (len(values) - 1)):.3f}"


def difference(results: Sequence[Result], row: str, other: str) -> tuple[float, float] | None:
    """Mean difference of `Result.figure` of two rows, and half the width of its interval.

    None: fewer than two seeds have both.
    """
    accuracy = {(result.row, result.seed): result.figure for result in results}
    seeds = [seed for name, seed in accuracy if name == row and (other, seed) in accuracy]
    if len(seeds) < 2:
        return None
    values = torch.tensor([accuracy[row, seed] - accuracy[other, seed] for seed in seeds], dtype=torch.float64)
    factor = float(student.ppf(0.5 + CONFIDENCE / 2, len(seeds) - 1))
    return float(values.mean()), factor * float(values.std()) / math.sqrt(len(seeds))


def differences(results: Sequence[Result], row: str, others: Sequence[str]) -> Table:
    """What a row has over each of the others."""
    lines = []
    for other in others:
        if other != row and (found := difference(results, row, other)) is not None:
            mean, half = found
            lines.append([other, f"{100 * mean:+.1f}", f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"])
    first = results[0]
    figure = "held out, at the end" if first.by_final else "prequential"
    title = f"{row}, {first.stream}, {first.labels}: points above, {figure}"
    return Table(title, ["row", "mean over seeds", f"{CONFIDENCE:.0%} interval"], lines)


def curves(results: Sequence[Result], rows: Sequence[str], path: Path) -> None:
    """Prequential accuracy along a stream, mean over seeds, with the ends of its segments; ours, the first, is bold."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes, lowest = figure.subplots(), 1.0
    for number, row in enumerate(rows):
        own = [result for result in results if result.row == row]
        if own:
            lines = [_curve(result) for result in own]
            values = torch.tensor([line for _, line in lines]).mean(dim=0)
            dashes, width = "-" if number < 10 else ":", 1.2 if number else 2.4
            axes.plot(lines[0][0], values, dashes, color=f"C{number % 10}", label=row, linewidth=width)
            if float(values.mean()) > SHOWN * max(result.accuracy for result in results):
                lowest = min(lowest, float(values.min()))
    begun = 0
    for end, name in zip(results[0].segment_ends, results[0].segments, strict=True):
        axes.axvline(end, color="0.8", linewidth=0.8)
        middle = ((begun + end) / 2, 1.01)
        axes.annotate(name, middle, xycoords=("data", "axes fraction"), ha="center", fontsize=7, color="0.4")
        begun = end
    axes.set_xlim(0, sum(results[0].sizes))
    axes.set_ylim(max(0.0, lowest - 0.02), 1.005)
    axes.set_xlabel("records")
    axes.set_ylabel(f"prequential accuracy of {CURVE} records")
    axes.set_title(f"{results[0].stream}, {results[0].labels} of labels", fontsize=10, pad=16)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _curve(result: Result) -> tuple[list[int], list[float]]:
    """Records so far, and accuracy of the last `CURVE` of them."""
    places, values, right, records, seen = list[int](), list[float](), 0, 0, 0
    for hits, size in zip(result.right, result.sizes, strict=True):
        right, records, seen = right + hits, records + size, seen + size
        if records >= CURVE:
            places.append(seen)
            values.append(right / records)
            right, records = 0, 0
    return places, values
