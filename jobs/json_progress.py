"""Progress of a training run for programs that watch it, such as `jobs.chaos`.

`python -m jobs.json_progress …` is `python -m jobs.pretrain …` that writes progress and notes to standard output as
JSON lines: `{"time": Unix time, "type": class of the message, …its fields}`. `read_line` reads one of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import get_args

from pydantic import TypeAdapter
from rich.console import Console

from cluster.messages import GroupStarted, Note, Progress, StartingPoint
from jobs.entry_point import run_main


@dataclass(frozen=True)
class Text:
    """A note without fields of its own."""

    text: str


Shown = Progress | StartingPoint | GroupStarted | Text

READERS = {shown.__name__: TypeAdapter(shown) for shown in get_args(Shown)}


def write_line(message: Shown) -> str:
    """A message as one line, with the present time; fields that are None are left out."""
    fields = {name: value for name, value in asdict(message).items() if value is not None}
    return json.dumps({"time": time.time(), "type": type(message).__name__} | fields)


def read_line(line: str) -> tuple[float, Shown]:
    """When a message was written, in Unix time, and the message.

    Raises
    ------
    ValueError
        The line holds no such message.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("type") not in READERS or "time" not in fields:
        raise ValueError(f"expected a message of type {', '.join(READERS)}, got {line!r}")
    written = float(fields.pop("time"))
    return written, READERS[fields.pop("type")].validate_python(fields)


class JsonDisplay:
    """Messages as lines on standard output; progress that is repeated is left out."""

    def __init__(self, _: Console, hide: Callable[[str], str]) -> None:
        self._hide = hide
        self._last: Progress | None = None

    def __enter__(self) -> JsonDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def progress(self, latest: Progress) -> None:
        if latest != self._last:
            self._last = latest
            print(write_line(latest), flush=True)

    def note(self, note: Note) -> None:
        self._last = None  # a new group's first progress is written even where it repeats the last one
        match note:
            case GroupStarted():
                shown: Shown = note
            case StartingPoint(text=text):
                shown = replace(note, text=self._hide(text))
            case str():
                shown = Text(self._hide(note))
        print(write_line(shown), flush=True)


if __name__ == "__main__":
    from jobs.pretrain import main  # a program that only reads lines need not import it

    run_main(partial(main, make_display=JsonDisplay))
