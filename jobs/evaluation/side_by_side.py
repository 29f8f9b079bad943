"""Units of an evaluation side by side, each a Ray task: on the cluster of `RAY_ADDRESS`, or on this machine's cores.

Rows share nothing, and one thread each uses cores better than many threads in one row. A row's seeds wait for its
settings. A task whose node is lost is done again by Ray. Driver and tasks exchange configuration, results and figures;
images are loaded where they are needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from socket import gethostname
from typing import Any, Protocol

from cluster.controller import RunFailed
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.material import Material, digest_of
from jobs.evaluation.measuring import Outcome, Unit, load, perform
from jobs.evaluation.rows import Row, rows_of
from jobs.evaluation.together import threads_of
from jobs.ray_session import start_ray
from simmatch.config import parse
from simmatch.data.formats import DataError

START_S = 60.0
"""Longest wait for the cluster at the start."""

BOARD_S = 5.0
"""Longest wait for what tasks tell of their progress."""

POLL_S = 0.5
"""Between two looks at what tasks tell of their progress; a task tells no more often."""


class Watching(Protocol):
    """Who is told of progress."""

    def tell(self, key: str, what: str, done: int, total: int) -> None: ...

    def ended(self, key: str) -> None: ...

    def note(self, text: str) -> None: ...


class Choosing(Protocol):
    """Settings known by now."""

    def known(self, row: str) -> object: ...


class Board:
    """Where tasks write how far they are; an actor."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[str, int, int]] = {}

    def tell(self, key: str, what: str, done: int, total: int) -> None:
        self._latest[key] = (what, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """What is new since the last reading."""
        latest, self._latest = self._latest, {}
        return latest


def side_by_side(
    config: EvaluationConfig,
    units: Sequence[Unit],
    choices: Choosing,
    watch: Watching,
    *,
    workers: int,
    threads: int,
    data: str,
) -> Iterator[tuple[Unit, Outcome]]:
    """What each unit gives, as it comes; begun in their order, but for those whose settings are not known yet.

    The caller records what is chosen, in `choices`, before it asks for the next. A row that misses something is not
    begun again.

    Parameters
    ----------
    workers: units at a time; threads: of each.
    data: digest of the data that every node must hold, see `digest_of`.

    Raises
    ------
    ConfigError, RunFailed
        No cluster, or no node with so many cores; a task that Ray gave up; a node without the data, or with other data.
    """
    place = start_ray(workers * threads, START_S)
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if not any(node["Alive"] and node["Resources"].get("CPU", 0) >= threads for node in nodes):
        raise RunFailed(f"--threads: expected at most as many as a node of the cluster has cores, got {threads}")
    watch.note(f"ray: {place}; {workers} at a time, {threads} thread{'' if threads == 1 else 's'} each")
    # one that is lost with its node begins anew; progress is worth no run
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
    task = ray.remote(num_cpus=threads)(_task)
    text, waiting = config.model_dump_json(), list(units)
    running: dict[Any, Unit] = {}
    try:
        while waiting or running:
            ready = [unit for unit in waiting if unit.seed is None or choices.known(unit.row) is not None]
            for unit in ready[: workers - len(running)]:
                waiting.remove(unit)
                running[task.remote(text, unit, choices.known(unit.row), threads, board, data)] = unit
            done, _ = ray.wait(list(running), timeout=POLL_S)
            told: dict[str, tuple[str, int, int]] = {}
            with suppress(RayActorError, GetTimeoutError):
                told = ray.get(board.read.remote(), timeout=BOARD_S)
            for key in {str(unit) for unit in running.values()} & told.keys():
                watch.tell(key, *told[key])
            for ref in done:
                unit = running.pop(ref)
                watch.ended(str(unit))
                outcome: Outcome = ray.get(ref)
                if outcome.missing is not None:
                    waiting = [each for each in waiting if each.row != unit.row]
                yield unit, outcome
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise RunFailed(str(error.cause)) from error
        raise  # an error of ours, with its traceback
    except RayError as error:
        raise RunFailed(f"Ray: expected tasks to come to their end, got {error}") from error


def _task(text: str, unit: Unit, chosen: object, threads: int, board: Any, data: str) -> Outcome:
    """A unit, in a process of Ray's."""
    last = 0.0

    def seen(what: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= POLL_S:
            last = now
            board.tell.remote(str(unit), what, done, total)

    with threads_of(threads):
        config, rows, material = _prepared(text, data)
        return perform(rows, unit, chosen, material, seen, draw=unit.seed == config.seeds[0])


@lru_cache(maxsize=1)
def _prepared(text: str, data: str) -> tuple[EvaluationConfig, list[Row], Material]:
    """Once a process: Ray gives the next task to one that has done the last."""
    config = parse(EvaluationConfig, json.loads(text))
    material, other = load(config)
    if (found := digest_of(material, other)) != data:
        raise DataError(
            f"{config.data.name} on {gethostname()}: expected the data of this comparison, {data}, got {found}"
        )
    return config, rows_of(config, material, other), material
