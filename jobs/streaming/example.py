"""An example of a stream, to try: `python -m jobs.streaming.example FILE`.

Windows of 32 samples, one JSON line each: noisy waves of two kinds, three in four with their class. Half-way the waves
change their shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.entry_point import BAD_INPUT, run_main
from jobs.options import at_least

SAMPLES = 32


def records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Fields of records as a source of JSON reads them.

    >>> record = next(records(1))
    >>> sorted(record), len(record["values"])
    (['id', 'label', 'time', 'values'], 32)
    """
    draw = np.random.default_rng(seed)
    for number in range(count):
        kind = int(draw.integers(2))
        phase = (0.3 + 0.5 * kind) * np.arange(SAMPLES) + 2 * np.pi * draw.random()
        wave = np.sin(phase) if 2 * number < count else np.sign(np.sin(phase))
        values = wave + 0.3 * draw.standard_normal(SAMPLES)
        label = {"label": ("slow", "fast")[kind]} if number % 4 < 3 else {}
        yield {"id": number, "time": number, "values": values.round(4)[:, None].tolist(), **label}


def main(arguments: list[str] | None = None) -> int:
    """Append records to a file. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with Path(options.file).open("a", buffering=1, encoding="utf-8") as file:
            for record in records(options.records, options.seed):
                file.write(json.dumps(record) + "\n")
                if options.per_second:
                    time.sleep(1 / options.per_second)
    except OSError as error:
        print(f"error: expected a file to append to, got {options.file}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.streaming.example", description="Append an example of a stream to a file."
    )
    parser.add_argument("file", metavar="FILE", help="where to append lines of JSON")
    parser.add_argument("--records", type=at_least(1), default=2000, metavar="N", help="how many (default: 2000)")
    parser.add_argument("--per-second", type=at_least(1), metavar="N", help="default: as fast as possible")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="another seed: other records")
    return parser


if __name__ == "__main__":
    run_main(main)
