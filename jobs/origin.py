"""What a program comes from: the commit of its checkout or image, and who runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from jobs.ray_job import COMMIT, OWNER, job_metadata


def program_commit() -> str:
    """Of this program: as the job that it runs in was submitted, or as `git_commit`; `unknown` where neither says."""
    return job_metadata().get(COMMIT) or git_commit() or "unknown"


def source_tags(commit: str) -> dict[str, str]:
    """What MLflow's page shows as the source of a run, as its version and as its user.

    commit: of `program_commit`.
    """
    metadata, folder = job_metadata(), Path(__file__).resolve().parents[1]
    spec = sys.modules["__main__"].__spec__  # of `python -m jobs.pretrain`
    program = f"{spec.name.replace('.', '/')}.py" if spec else Path(sys.argv[0]).name
    tags = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    if re.fullmatch(r"[0-9a-f]{7,64}\+?", commit):
        tags |= {"mlflow.source.git.commit": commit.rstrip("+"), "mlflow.source.git.dirty": str("+" in commit).lower()}
    for tag, question in (("branch", ["branch", "--show-current"]), ("repoURL", ["remote", "get-url", "origin"])):
        with suppress(OSError, subprocess.SubprocessError):
            if answer := _git(folder, *question):
                tags[f"mlflow.source.git.{tag}"] = answer
    if metadata.get(OWNER):  # a job runs as a user of the cluster
        tags["mlflow.user"] = metadata[OWNER]
    return tags


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10.0)
    return done.stdout.strip()


def git_commit(folder: Path | None = None) -> str | None:
    """The full hash of the commit of a checkout, by default that of this code, with '+' where files differ from it.

    Outside a checkout what the image says in its file `COMMIT`; None where there is none.
    """
    folder = folder or Path(__file__).resolve().parents[1]
    try:
        return _git(folder, "rev-parse", "HEAD") + ("+" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        with suppress(OSError, ValueError):  # ValueError: no text
            return (folder / "COMMIT").read_text().strip()
    return None
