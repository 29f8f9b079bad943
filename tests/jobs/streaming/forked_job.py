"""Starts `jobs.stream` again and again without its imports: for each line of JSON, a list of arguments, a process is
forked; its number, and its status once it has ended, are written as a line each.

    python tests/jobs/streaming/forked_job.py LOG FILE.yaml FOLDER

First it learns from the configuration in a folder, in this process, so that all is imported and compiled.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

from jobs.entry_point import run_main
from jobs.stream import main


def start(log: str, arguments: list[str]) -> int:
    """Returns the number of the process."""
    number = os.fork()
    if number == 0:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run_main(partial(main, arguments))
    return number


if __name__ == "__main__":
    log, config, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    assert main(["--config", config, "--run-dir", folder]) == 0
    for line in sys.stdin:
        number = start(log, json.loads(line))
        print(number, file=answers, flush=True)
        print(os.waitpid(number, 0)[1], file=answers, flush=True)
