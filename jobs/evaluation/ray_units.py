"""Units of a comparison side by side, each a Ray task: on the cluster of `RAY_ADDRESS`, or on this machine's cores.

Rows share nothing, and one thread each uses cores better than many threads in one row. A row's seeds wait for its
settings. Ray repeats a task whose node is lost. Driver and tasks exchange configuration, results and figures; images
are loaded by the tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from socket import gethostname
from typing import Any

from cluster.controller import RunFailed
from jobs.display import ProgressBars
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.material import Material, digest_of
from jobs.evaluation.resume import ChosenSettings
from jobs.evaluation.rows import Row, rows_of
from jobs.evaluation.threads import limited_threads
from jobs.evaluation.units import Unit, UnitResult, load, run_unit
from jobs.ray_session import start_ray
from simmatch.config import parse
from simmatch.data.formats import DataError

START_S = 60.0
"""Longest wait for the cluster at the start."""

BOARD_S = 5.0
"""Longest wait for the progress of the tasks."""

POLL_S = 0.5
"""Time between two looks at the progress of the tasks; a task reports no more often."""


class ProgressBoard:
    """Where tasks report their progress; an actor."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[str, int, int]] = {}

    def report(self, key: str, what: str, done: int, total: int) -> None:
        self._latest[key] = (what, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """What is new since the last reading."""
        latest, self._latest = self._latest, {}
        return latest


def run_side_by_side(
    config: EvaluationConfig,
    units: Sequence[Unit],
    settings: ChosenSettings,
    bars: ProgressBars,
    *,
    workers: int,
    threads: int,
    digest: str,
) -> Iterator[tuple[Unit, UnitResult]]:
    """The result of each unit, as it comes; started in order, except units whose settings are not known yet.

    The caller keeps chosen settings, in `settings`, before it asks for the next result. A row that lacks something is
    not started again.

    Parameters
    ----------
    workers: units at a time; threads: of each.
    digest: of the data that every node must hold, see `digest_of`.

    Raises
    ------
    ConfigError, RunFailed
        No cluster, or no node with so many cores; a task that Ray gave up; a node without the data, or with other data.
    """
    address = start_ray(workers * threads, START_S)
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if not any(node["Alive"] and node["Resources"].get("CPU", 0) >= threads for node in nodes):
        raise RunFailed(f"--threads: expected at most as many as a node of the cluster has cores, got {threads}")
    bars.note(f"ray: {address}; {workers} at a time, {threads} thread{'' if threads == 1 else 's'} each")
    # restarted if its node is lost: a run does not end for its progress bars
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(ProgressBoard).remote()
    task = ray.remote(num_cpus=threads)(_task)
    text, waiting = config.model_dump_json(), list(units)
    running: dict[Any, Unit] = {}
    try:
        while waiting or running:
            ready = [unit for unit in waiting if unit.seed is None or settings.known(unit.row) is not None]
            for unit in ready[: workers - len(running)]:
                waiting.remove(unit)
                running[task.remote(text, unit, settings.known(unit.row), threads, board, digest)] = unit
            done, _ = ray.wait(list(running), timeout=POLL_S)
            reports: dict[str, tuple[str, int, int]] = {}
            with suppress(RayActorError, GetTimeoutError):
                reports = ray.get(board.read.remote(), timeout=BOARD_S)
            for name in {str(unit) for unit in running.values()} & reports.keys():
                what, steps, total = reports[name]
                bars.update(name, steps, total, text=f"{name}: {what}")
            for ref in done:
                unit = running.pop(ref)
                bars.remove(str(unit))
                outcome: UnitResult = ray.get(ref)
                if outcome.missing is not None:
                    waiting = [each for each in waiting if each.row != unit.row]
                yield unit, outcome
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise RunFailed(str(error.cause)) from error
        raise  # an error of ours, with its traceback
    except RayError as error:
        raise RunFailed(f"Ray: expected tasks to finish, got {error}") from error


def _task(text: str, unit: Unit, chosen: object, threads: int, board: Any, digest: str) -> UnitResult:
    """A unit, in a worker process of Ray."""
    last = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= POLL_S:
            last = now
            board.report.remote(str(unit), what, done, total)

    with limited_threads(threads):
        config, rows, material = _prepared(text, digest)
        return run_unit(rows, unit, chosen, material, on_progress, draw=unit.seed == config.seeds[0])


@lru_cache(maxsize=1)
def _prepared(text: str, digest: str) -> tuple[EvaluationConfig, list[Row], Material]:
    """Cached, because Ray runs the next task in a process that is free again."""
    config = parse(EvaluationConfig, json.loads(text))
    material, other = load(config)
    if (own := digest_of(material, other)) != digest:
        raise DataError(
            f"{config.data.title} on {gethostname()}: expected the data of this comparison, {digest}, got {own}"
        )
    return config, rows_of(config, material, other), material
