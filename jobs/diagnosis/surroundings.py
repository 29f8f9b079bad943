"""What a run needs besides a cluster: its directory, room on disks, MLflow. A job looks at the same before it starts.

Nothing is left behind: files that are written are removed, and so are folders that were made for them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from cluster.config import RunConfig
from cluster.redaction import one_line
from cluster.shared_folder import check_copies, write_nonce
from cluster.storage import AnyPath, check_exclusive, is_local
from cluster.tracking.config import TrackingConfig
from cluster.tracking.server_check import ask_server
from jobs.diagnosis.findings import Finding, ok
from jobs.diagnosis.judge import judge_room
from jobs.diagnosis.node import room, try_run_dir
from jobs.diagnosis.nodes import Answers, Nodes
from jobs.plan_memory import plan_disk
from jobs.run_directory import RunStart
from simmatch.data.sources import Dataset

RUN_DIR = "run directory"
NO_ANSWER = "no answer"

WRITE_FIX = "a folder that can be written to, or s3://bucket/prefix of a bucket that exists, with credentials for it"
SHARED_FIX = "a folder that all nodes mount at the same place, or --run-dir s3://bucket/prefix"
EXCLUSIVE_FIX = "another file system or store, or make sure that nobody starts the same run twice"


def look_at_tracking(config: TrackingConfig, run_dir: Path, limit_s: float) -> Finding:
    """What the MLflow server says.

    run_dir: folder of this machine, beside which the default data base lies.
    """
    answer = ask_server(config, run_dir, limit_s=limit_s)
    status = {"ok": "ok", "away": "warning", "refused": "failure"}[answer.verdict]
    return Finding("mlflow", status, answer.text, answer.fix, values={"verdict": answer.verdict})  # type: ignore[arg-type]


def look_at_room(config: RunConfig, dataset: Dataset, run_dir: AnyPath) -> list[Finding]:
    """Room for checkpoints, model and records on the driver's side."""
    local = working_folder(config, run_dir)
    disk = plan_disk(config, dataset.source)
    needed = disk.kept + disk.model if is_local(run_dir) else 0.0
    what = RUN_DIR if is_local(run_dir) else "records"
    return judge_room("disk", {"": room([(what, local)])}, {what: needed})


def working_folder(config: RunConfig, run_dir: AnyPath) -> Path:
    """Where a run keeps records on the driver's machine."""
    return RunStart(run_dir, None, "", config).run_dir


def look_at_run_dir(run_dir: AnyPath, nodes: Nodes | None = None, limit_s: float = 0.0) -> list[Finding]:
    """Whether the driver, and all nodes, can write there, and each sees what the others have written.

    limit_s: longest wait for a node.
    """
    token, made = token_hex(8), _missing(run_dir)
    names = [] if nodes is None else [node.name for node in nodes.nodes]
    try:
        unprotected = check_exclusive(run_dir)
        nonce = write_nonce(run_dir, token)  # removed by `check_copies`
        answers = Answers()
        if nodes is not None:
            answers = nodes.ask(RUN_DIR, limit_s, try_run_dir, lambda node: (run_dir, token, names.index(node.name)))
        told = [answers.by_node.get(name, (NO_ANSWER, "")) for name in names]
        errors = check_copies(run_dir, token, nonce, [error for error, _ in told])
    except OSError as error:
        return [Finding(RUN_DIR, "failure", f"{run_dir}: {one_line(error)}", WRITE_FIX)]
    finally:
        for folder in made:
            with suppress(OSError):  # a run that begins meanwhile keeps it
                folder.rmdir()
    findings = list(answers.faults)
    if unprotected:
        findings.append(Finding(RUN_DIR, "warning", unprotected, EXCLUSIVE_FIX))
    for name, why, (_, replaced) in zip(names, errors, told, strict=True):
        if why and why != NO_ANSWER:
            fix = SHARED_FIX if "this job" in why else WRITE_FIX
            findings.append(Finding(RUN_DIR, "failure", f"{run_dir}: {why}", fix, (name,)))
        elif replaced and not unprotected:
            findings.append(Finding(RUN_DIR, "warning", replaced, EXCLUSIVE_FIX, (name,)))
    if not findings:
        where = f" from the driver and {len(names)} nodes" if len(names) > 1 else ""
        findings.append(ok(RUN_DIR, f"{run_dir}: written, created exclusively and read{where}"))
    return findings


def _missing(run_dir: AnyPath) -> list[Path]:
    """Folders that a first file there makes, the innermost first."""
    if not isinstance(run_dir, Path):
        return []
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
