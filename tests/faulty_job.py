"""`python -m tests.faulty_job PLAN ARGUMENTS…`: `python -m jobs.pretrain ARGUMENTS…` whose ranks fail as planned.

PLAN: a `FaultPlan` as JSON, `null`, `"crash in commit"`: the driver dies, by SIGKILL, while it writes the manifest of
its second checkpoint, or `"impatient"`: it takes over from an attempt that has not ended without waiting for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cluster.checkpoints.manifest
import cluster.group
import cluster.lease
from jobs.entry_point import run_main
from jobs.pretrain import main
from tests.faults import FaultPlan, faulty_worker

COMMITS = 2


def crash_in_commit() -> None:
    """Half a manifest, and the process is gone."""
    real, done = cluster.checkpoints.manifest.write_whole, []

    def write(path: Any, content: str) -> None:
        done.append(path)
        if len(done) == COMMITS:
            Path(f"{path}.partial").write_text(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, content)

    cluster.checkpoints.manifest.write_whole = write


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    if values == "crash in commit":
        crash_in_commit()
    elif values == "impatient":
        cluster.lease.EXPIRE_S = 0.0
    elif values is not None:
        worker = faulty_worker(FaultPlan(**values))
        cluster.group.WorkerGroup = partial(cluster.group.WorkerGroup, worker_class=worker)
    run_main(partial(main, sys.argv[2:]))
