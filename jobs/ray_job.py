"""What a program knows about the job of Ray's jobs API that it runs in."""

from __future__ import annotations

import json
import os
from pathlib import Path

COMMIT, OWNER = "simmatch.git_commit", "simmatch.owner"
"""Metadata of a job: the commit of the files that were uploaded, and who submitted it."""

SUBMISSION = "job_submission_id"
"""Ray's own metadata: the name under which the job was submitted."""

VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray leaves a job's metadata and runtime environment for its driver."""


def in_ray_job() -> bool:
    """Whether Ray's jobs API started this program."""
    return VARIABLE in os.environ


def in_throw_away_copy() -> bool:
    """Whether the working directory is one that Ray has unpacked for a job and will delete."""
    return "runtime_resources" in Path.cwd().parts and in_ray_job()


def job_metadata() -> dict[str, str]:
    """What was given with the job, see `ray job submit --metadata-json`; empty outside a job."""
    try:
        values = json.loads(os.environ.get(VARIABLE, "{}")).get("metadata")
    except (ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}
