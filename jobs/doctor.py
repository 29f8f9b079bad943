"""Look at a cluster before a run does: `python -m jobs.doctor [--config FILE] [--run-dir DIR]`.

On every node of the cluster at `RAY_ADDRESS`, or on this machine: versions, GPUs, cores and memory, interfaces, links
between ranks, data, disks, the run directory, MLflow, the token. Each finding is a line: ok; a warning, with which a
run would start; or a failure, with which it would not; and what mends it. No file is left behind, and all is over
within two minutes: a check that hangs is a failure with its name.

Exit status: 0, no failure; 1, a failure; 2, bad options or configuration, nothing checked; 130, 143, 129 interrupted by
SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import IO

from cluster.config import RunConfig
from cluster.redaction import Redactor, one_line
from jobs.diagnosis.examination import CHECKS, Examination
from jobs.diagnosis.report import Report
from jobs.entry_point import BAD_INPUT, FAILED, run_main
from jobs.options import add_set, override, read_yaml
from simmatch.config import ConfigError, parse


def main(arguments: list[str] | None = None) -> int:
    """Parse, check. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    with redirect_stdout(JsonOnly(sys.stdout)) if options.json else nullcontext():
        if options.submit:
            return _submitted([word for word in given if word != "--submit"])
        return _examined(options)


def _examined(options: argparse.Namespace) -> int:
    try:
        if options.set and options.config is None:
            raise ConfigError("--set: expected --config FILE, whose keys it overrides")
        values = None if options.config is None else override(read_yaml(Path(options.config)), options.set)
        config = None if values is None else parse(RunConfig, values)
    except (ConfigError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    report = Report(CHECKS, as_json=options.json, hide=Redactor(os.environ))
    with report:
        Examination(config, options.run_dir, report).run()
    return 0 if report.summary() else FAILED


class JsonOnly(io.TextIOBase):
    """Writes objects, a line each, to a stream, and all other lines, such as Ray's own, to standard error.

    >>> print("job 7", file=JsonOnly(sys.stdout))
    >>> print('{"check": "data"}', file=JsonOnly(sys.stdout))
    {"check": "data"}
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        """Write the lines that end in this text, or before."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            print(line, file=self._stream if line.startswith("{") else sys.stderr, flush=True)
        return len(text)

    def isatty(self) -> bool:
        """Whether people read along."""
        return self._stream.isatty()


def _submitted(words: list[str]) -> int:
    """The same as a job of the cluster, where its nodes can be reached. Returns the job's exit status."""
    from jobs import submit

    logging.disable(logging.WARNING)  # Ray tells of every request
    return submit.main(["--wait", "--", "python", "-m", "jobs.doctor", *words])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.doctor",
        allow_abbrev=False,  # a job that is given --sub would submit another one
        description="Check every node of the Ray cluster at RAY_ADDRESS, or this machine, before a run does.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run that is to work; see jobs/configs")
    add_set(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="where the run's files would go (default: as jobs.pretrain)")
    parser.add_argument(
        "--submit",
        action="store_true",
        help="check as a job of the cluster whose dashboard is at RAY_API_SERVER_ADDRESS (see python -m jobs.submit)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for every finding, and a last one")
    return parser


if __name__ == "__main__":
    run_main(main)
