"""Inject random faults into a training run and check that its results do not change: `python -m jobs.chaos`.

First one undisturbed run, then the same run again and again while its ranks and drivers are killed, suspended and asked
to end; a driver that has ended is started again. Prints one JSON object per strike and per run and a table, and draws a
timeline. The weights at the end of each run are compared with those of the undisturbed run, bit by bit.

Exit status: 0 every run survived and ended with the same weights and records, 1 one did not, 2 bad input (one line,
nothing started), 130, 143 or 129: interrupted (Ctrl-C, SIGTERM, a closed terminal).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count as counting
from pathlib import Path

from cluster.config import RunConfig, public
from cluster.redaction import one_line
from cluster.text import count
from jobs.display import ProgressBars
from jobs.entry_point import BAD_INPUT, run_main
from jobs.options import add_set, amount, at_least, override, read_yaml
from jobs.preflight import check
from jobs.reporting import Report
from jobs.run_directory import default_root, local_folder
from jobs.signals import SignalHandler
from jobs.watched_job import ENDS_DRIVER, STRIKES, Strike, WatchedJob, recorded
from simmatch.config import ConfigError, parse
from simmatch.data.formats import DataError
from simmatch.documents import load_json

DEFAULT = Path(__file__).parent / "configs" / "fashion_mnist.yaml"
LIMITS = ("cluster.max_restarts=1000", "cluster.heartbeat_s=5")
"""Overrides before the user's own: there may be more strikes than checkpoints."""

GAP_S = (45.0, 90.0)
LONGEST_RECOVERY_S = 300.0
LISTEN_S = 0.1
MARKERS = "xov^sDP"
"""Of the kinds of strikes in a timeline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    assignments = [*LIMITS, *options.set]
    try:
        if not 0 < options.gap[0] <= options.gap[1]:
            raise ConfigError(f"--gap: expected two rising numbers of seconds above 0, got {options.gap}")
        config = parse(RunConfig, override(read_yaml(Path(options.config)), assignments))
        check(config)
        run_dir = local_folder("--run-dir", options.run_dir, default_root() / f"chaos-{config.name}").absolute()
        report = Report("chaos", run_dir)
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    command = ["--config", str(Path(options.config).absolute())]
    command += [word for assignment in assignments for word in ("--set", assignment)]
    with report, SignalHandler() as signals:
        report.environment(vars(options))
        chaos = Chaos(command, config, run_dir, report, random.Random(options.seed))
        try:
            chaos.undisturbed()
            return chaos.run(60 * options.minutes, tuple(options.gap), options.kinds)
        except KeyboardInterrupt:
            print("interrupted; the rows so far are kept", file=sys.stderr)
            return signals.status
        finally:
            chaos.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(DEFAULT), metavar="FILE", help="YAML file (default: %(default)s)")
    add_set(parser)
    parser.add_argument(
        "--minutes", type=amount, default=20.0, metavar="M", help="how long to inject faults (default: 20)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of the faults and their times (default: 0)"
    )
    parser.add_argument(
        "--gap", type=amount, nargs=2, default=list(GAP_S), metavar=("MIN", "MAX"),
        help="seconds between a recovery and the next fault (default: 45 90)",
    )  # fmt: skip
    parser.add_argument(
        "--kinds", nargs="+", choices=sorted(STRIKES), default=sorted(STRIKES), help="kinds of fault (default: all)"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="folder of runs and results (default: runs/chaos-<name>)")
    return parser


class Chaos:
    """Runs a job again and again and strikes it.

    Parameters
    ----------
    command: arguments of `jobs.pretrain` without the run directory.
    """

    def __init__(
        self, command: list[str], config: RunConfig, run_dir: Path, report: Report, rng: random.Random
    ) -> None:
        self.command, self.config, self.run_dir, self.report, self.rng = command, config, run_dir, report, rng
        self.strikes: list[Strike] = []
        self.problems: list[str] = []
        self._job: WatchedJob | None = None
        self._runs = 0
        self._open: Strike | None = None
        self._due: float | None = None

    def end(self) -> None:
        """End a job that still runs."""
        if self._job is not None:
            self._job.end()

    def undisturbed(self) -> None:
        """The run to compare with; one that has finished before is used again."""
        folder = self.run_dir / "undisturbed"
        if not _finished(folder, self.config):
            self.report.note(f"the undisturbed run, in {folder}")
            job = self._start(folder, "--resume", "auto")
            while not job.listen(LISTEN_S):
                pass
            if job.process.returncode != 0:
                raise SystemExit("\n".join([*job.lines, "error: the undisturbed run failed"]))
        summary = json.loads((folder / "summary.json").read_text())
        self.report.row(kind="undisturbed", seconds=summary["seconds"], steps=summary["steps"])

    def run(self, seconds: float, gap_s: tuple[float, float], kinds: Sequence[str]) -> int:
        """Disturbed runs until the time is over; the last one runs to its end. Returns the exit status."""
        self._gap_s, self._kinds = gap_s, kinds
        with ProgressBars(self.report.console) as bars:
            begun = time.monotonic()
            self._deadline = begun + seconds
            while time.monotonic() < self._deadline and not self.problems:
                self._runs += 1

                def watch(job: WatchedJob) -> None:
                    doing = f"run {self._runs}, update {job.step}, {count(len(self.strikes), 'strike')}"
                    bars.update("seconds", time.monotonic() - begun, seconds, details=doing)

                self._one(watch)
        print_table(self.report, f"{count(self._runs, 'run')} of {self.config.name}: seconds to recover", self.strikes)
        verdict = "every run ended with the weights and records of the undisturbed one"
        self.report.note("\n".join(self.problems) or verdict)
        self.report.note(f"rows, timelines: {self.run_dir}")
        return 1 if self.problems else 0

    def _one(self, watch: Callable[[WatchedJob], None]) -> None:
        """One disturbed run, from its start to its end."""
        folder = next(path for number in counting(1) if not (path := self.run_dir / f"disturbed-{number}").exists())
        job, begun, first = self._start(folder), time.monotonic(), len(self.strikes)
        self._open, self._due = None, None
        while True:
            ended = job.listen(LISTEN_S)
            self._note_recovery(job)
            if ended:
                if self._open is None or job.process.returncode != ENDS_DRIVER.get(self._open.kind):
                    break
                job.start()
            watch(job)
            if self._open is not None:
                if time.time() - self._open.time > LONGEST_RECOVERY_S:
                    self.problems.append(f"strike {self._open.number}: no recovery within {LONGEST_RECOVERY_S:g} s")
                    job.end()
                    break
            elif job.working_since is not None and job.pids:
                self._strike_if_due(job)
        if self._open is not None and job.process.returncode == 0:  # nothing was left to do for a new group
            self._survived(self._open)
        self._check(job, folder, self.strikes[first:], time.monotonic() - begun)

    def _note_recovery(self, job: WatchedJob) -> None:
        """Note a recovery from the latest strike."""
        strike = self._open
        if strike is not None and job.working_since is not None and job.working_since > strike.time:
            strike.recovered_s = job.working_since - strike.time
            strike.again = max(0, strike.step - job.start_step)
            self._survived(strike)
            self._open, self._due = None, None

    def _survived(self, strike: Strike) -> None:
        strike.survived = True
        self.report.row(kind="strike", **strike.fields())

    def _strike_if_due(self, job: WatchedJob) -> None:
        """Strike once the pause that was drawn is over."""
        now = time.monotonic()
        self._due = self._due if self._due is not None else now + self.rng.uniform(*self._gap_s)
        if self._due < now < self._deadline:
            kind = self.rng.choice(list(self._kinds))
            self._open = Strike(kind, len(self.strikes) + 1, self._runs, time.time(), job.step)
            self.strikes.append(self._open)
            self.report.note(f"run {self._runs}, update {job.step}: {kind}")
            job.strike(kind, self.rng)

    def _start(self, folder: Path, *more: str) -> WatchedJob:
        self._job = WatchedJob([*self.command, "--run-dir", str(folder), *more])
        return self._job

    def _check(self, job: WatchedJob, folder: Path, strikes: Sequence[Strike], seconds: float) -> None:
        """Whether a run has ended with the result of the undisturbed one."""
        reference = self.run_dir / "undisturbed"
        finished = job.process.returncode == 0
        weights = [path / "model" / "model.safetensors" for path in (reference, folder)]
        checks = {
            "finished": finished,
            "same_weights": finished and weights[0].read_bytes() == weights[1].read_bytes(),
            "same_records": finished and recorded(reference) == recorded(folder),
        }
        orphans = job.orphans()
        self.report.row(
            kind="run", disturbed_run=self._runs, strikes=len(strikes), seconds=seconds, orphans=orphans, **checks
        )
        failed = [name.replace("_", " ") for name, passed in checks.items() if not passed]
        self.problems += [f"run {self._runs}: not {name}" for name in failed]
        self.problems += [f"run {self._runs}: processes {orphans} outlived it"] if orphans else []
        if not finished:
            self.report.note("\n".join(job.lines))
        draw_timeline(self.report, folder.name, job.trace, strikes)


def _finished(folder: Path, config: RunConfig) -> bool:
    """Whether a run with this configuration has finished there."""
    try:
        status = load_json((folder / "summary.json").read_bytes())["status"]
        return bool(status == "FINISHED" and read_yaml(folder / "config.yaml") == public(config))
    except (OSError, ValueError, KeyError):
        return False


def draw_timeline(report: Report, name: str, trace: Sequence[tuple[float, int]], strikes: Sequence[Strike]) -> None:
    """Updates done over the seconds of one run, with its strikes: `figures/<name>.png`."""
    start = trace[0][0] if trace else 0.0
    with report.figure(name) as figure:
        axes = figure.subplots()
        axes.plot([at - start for at, _ in trace], [step for _, step in trace], color="black", lw=1)
        for number, kind in enumerate(sorted({strike.kind for strike in strikes})):
            points = [(strike.time - start, strike.step) for strike in strikes if strike.kind == kind]
            axes.plot(*zip(*points, strict=True), MARKERS[number % len(MARKERS)], label=kind, ms=7)
        axes.set(xlabel="seconds", ylabel="updates done", title=f"{name}: {count(len(strikes), 'strike')}")
        if strikes:
            axes.legend()


def print_table(report: Report, title: str, strikes: Sequence[Strike]) -> None:
    """Strikes by kind and all together: how many were survived, seconds to recover, updates done again."""
    rows = []
    for kind in [*sorted({strike.kind for strike in strikes}), "all"]:
        these = [strike for strike in strikes if kind in ("all", strike.kind)]
        seconds = [strike.recovered_s for strike in these if strike.recovered_s is not None]
        again = [strike.again for strike in these if strike.again is not None]
        values = {
            "strikes": len(these),
            "survived": sum(strike.survived for strike in these),
            "median_s": statistics.median(seconds) if seconds else None,
            "worst_s": max(seconds, default=None),
            "median_again": statistics.median(again) if again else None,
            "worst_again": max(again, default=None),
        }
        report.row(kind="summary", struck_by=kind, **values)
        rows.append([kind, *values.values()])
    columns = ("strike", "number", "survived", "median, s", "worst, s", "updates repeated, median", "worst")
    report.table(title, columns, rows)


if __name__ == "__main__":
    run_main(main)
