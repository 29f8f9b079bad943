"""`python -m jobs.json_progress …` is `python -m jobs.pretrain …` whose progress and notes go to standard output as
JSON lines, each with its Unix time: for programs that watch a job, such as `jobs.chaos`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from cluster.messages import Progress
from jobs.pretrain import main
from jobs.program import run_program


class JsonDisplay:
    """One JSON object per line: `{"time", "note"}` or `{"time", "phase", "done", "total", …}`; repetitions are left
    out."""

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
            self._write({name: value for name, value in asdict(latest).items() if value is not None})

    def note(self, text: str) -> None:
        self._last = None  # a new group begins anew, even where it says the same
        self._write({"note": self._hide(text)})

    @staticmethod
    def _write(values: dict[str, Any]) -> None:
        print(json.dumps({"time": time.time(), **values}), flush=True)


if __name__ == "__main__":
    run_program(partial(main, make_display=JsonDisplay))
