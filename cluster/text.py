"""Numbers in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless the number is 1.

    >>> count(1, "rank"), count(0, "record"), count(12345, "image")
    ('1 rank', '0 records', '12,345 images')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(num_bytes: float) -> str:
    """Bytes in three significant digits.

    >>> size(3_500_000)
    '3.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def spans(numbers: Iterable[int]) -> str:
    """Numbers in order, three or more neighbours by the first and the last.

    >>> spans([0, 1, 2, 3]), spans([0, 1, 4, 6, 7, 8])
    ('0 to 3', '0, 1, 4, 6 to 8')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
