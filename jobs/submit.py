"""Submit a command as a job of a Ray cluster: `python -m jobs.submit --wait -- python -m jobs.pretrain --config FILE`.

The same as `ray job submit`, whose options have the same names here, and more: what is uploaded is measured, and
refused before it is packed where Ray would refuse it; the commit and who submitted the job are its metadata and reach
MLflow; a job that is stopped has time for its last checkpoint; with `--wait` the exit status is that of the job.

Exit status without `--wait`: 0, submitted; 1, the cluster failed; 2, bad input, nothing submitted. With it: that of the
command; 143 if the job was stopped; 1 if it never ran, or if the cluster was lost (the job may still run).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from cluster.holder import user_name
from cluster.redaction import one_line
from cluster.timeouts import run_with_timeout
from jobs.entry_point import BAD_INPUT, FAILED, run_main
from jobs.options import amount, at_least
from jobs.origin import git_commit
from jobs.ray_job import COMMIT, OWNER
from jobs.ray_token import check_token
from jobs.submitted_job import ANSWER_S, SubmittedJob
from jobs.working_dir import JOBS_API_BYTES, check_upload, measure
from simmatch.config import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's supervisor of the job reads it from the job's own runtime environment."""

GRACE_S = 40
"""More than `cluster.grace_s`, in which a run writes its last checkpoint."""

NAME = "job_name"
"""Metadata that Ray's dashboard shows as the name of a job."""

SUBMIT_S = 600.0
"""Longest that packing, uploading and submitting may take."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, submit, and wait if asked to. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        request = _request(options)
        address = _address(options.address)
        shown = one_line(address)
        _find_mode(address, shown)
        if (folder := request["runtime_env"].get("working_dir")) and "://" not in folder:
            upload = measure(Path(folder))
            check_upload("--working-dir", upload, JOBS_API_BYTES)
            print(f"working directory: {upload} from {upload.folder}", flush=True)
    except (ConfigError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    try:
        job = SubmittedJob(shown, run_with_timeout(SUBMIT_S, "ray", lambda: _submit(address, request)))
    except Exception as error:  # whatever Ray and its server make of it
        print(f"error: the cluster at {shown} did not take the job: {one_line(error)}", file=sys.stderr)
        return FAILED
    print(f"job {job.id} at {shown}; output: ray job logs -f {job.id}; stop: ray job stop {job.id}", flush=True)
    return job.follow() if options.wait else 0


def _request(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `JobSubmissionClient.submit_job`.

    Raises
    ------
    ConfigError
        A value is of another kind than its option's.
    """
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise ConfigError("expected a command after --, such as: -- python -m jobs.pretrain --config FILE, got none")
    metadata = _json("--metadata-json", options.metadata_json, "names and texts", lambda value: isinstance(value, str))
    resources = _json("--entrypoint-resources", options.entrypoint_resources, "names and numbers", _isamount)
    if (name := options.submission_id) is not None and not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ConfigError(f"--submission-id: expected letters, digits, '_', '.' and '-', got {name!r}")
    runtime_env: dict[str, Any] = {"env_vars": {GRACE: str(options.stop_grace_s), **_variables(options.env)}}
    origin = {NAME: _name(command), OWNER: user_name() or "unknown"}
    if folder := options.working_dir:
        runtime_env["working_dir"] = folder
        if "://" not in folder:
            if not Path(folder).is_dir():
                raise ConfigError(f"--working-dir: expected a folder or a URI, got {folder}")
            origin[COMMIT] = git_commit(Path(folder)) or "unknown"
    return {
        "entrypoint": shlex.join(command),
        "submission_id": options.submission_id,
        "runtime_env": runtime_env,
        "metadata": {**origin, **metadata},
        "entrypoint_num_cpus": options.entrypoint_num_cpus,
        "entrypoint_num_gpus": options.entrypoint_num_gpus,
        "entrypoint_memory": options.entrypoint_memory,
        "entrypoint_resources": resources or None,
    }


def _name(command: list[str]) -> str:
    """For the dashboard's list of jobs: `pretrain digits`, of `python -m jobs.pretrain --config …/digits.yaml`."""

    def after(option: str) -> str | None:
        return command[command.index(option) + 1] if option in command[:-1] else None

    config = after("--config")
    words = [(after("-m") or Path(command[0]).name).removeprefix("jobs."), Path(config).stem if config else ""]
    return " ".join(words).strip()


def _isamount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _json(option: str, text: str | None, expected: str, fits: Callable[[object], bool]) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(map(fits, values.values())):
        raise ConfigError(f"{option}: expected a JSON object of {expected}, got {text}")
    return values


def _variables(given: list[str]) -> dict[str, str]:
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name in os.environ:
            equals, value = "=", os.environ[name]
        if not equals or not name.isidentifier():
            shown = f"{name}=…" if equals else name  # the value may be a secret
            raise ConfigError(f"--env: expected NAME=VALUE, or the NAME of a variable that is set here, got {shown}")
        values[name] = value
    return values


def _address(given: str | None) -> str:
    """Of the dashboard: the option, else `RAY_API_SERVER_ADDRESS`, else `RAY_ADDRESS` as in Ray, else Ray's default.

    Raises
    ------
    ConfigError
        It is of another kind.
    """
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    name = "--address" if given else next((name for name in names if os.environ.get(name)), "")
    address = (given or os.environ.get(name, DEFAULT_ADDRESS)).rstrip("/")
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        fits = False
    if not fits:
        hint = ", of Ray Client, which takes no jobs" if address.startswith("ray://") else ""
        raise ConfigError(
            f"{name}: expected the address of the cluster's dashboard, such as http://10.0.0.7:8265, "
            f"got {one_line(address)}{hint}"
        )
    return address


def _find_mode(address: str, shown: str) -> None:
    """Set `RAY_AUTH_MODE` to that of the cluster, before Ray is imported.

    shown: the address as it may be shown, without a password.

    Raises
    ------
    ConfigError
        Nothing that takes jobs answers, or the token for it is missing or wrong.
    """
    where = f"a cluster that takes jobs at {shown}"

    def status(token: str | None) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return requests.get(f"{address}/api/jobs/", headers=headers, timeout=ANSWER_S).status_code
        except requests.exceptions.InvalidHeader:  # characters that no header may have
            return 403
        except requests.RequestException as error:
            raise ConfigError(f"expected {where}, got {one_line(error)}") from None

    answer = status(None)
    if answer in (401, 403):
        check_token(shown, lambda token: status(token) == 200)
    elif answer != 200:
        raise ConfigError(f"expected {where}, got the answer {answer}")
    os.environ["RAY_AUTH_MODE"] = "disabled" if answer == 200 else "token"


def _submit(address: str, request: dict[str, Any]) -> Any:
    """The client and the number of the job."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it to its argument
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    return client, client.submit_job(**request)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit", description="Submit a command as a job of a Ray cluster, through its dashboard."
    )
    add = parser.add_argument
    add("--address", metavar="URL", help=f"of the dashboard; default: RAY_API_SERVER_ADDRESS, or {DEFAULT_ADDRESS}")
    add(
        "--working-dir",
        default=".",
        metavar="DIR",
        help="uploaded, less what .gitignore and .rayignore name; default: this folder; '': nothing, nodes have it",
    )
    add("--submission-id", metavar="ID", help="name of the job, which no other job of the cluster has")
    add("--metadata-json", metavar="JSON", help="names and texts to keep with the job, besides commit and owner")
    add("--entrypoint-num-cpus", type=amount, metavar="N", help="CPUs reserved for the command itself")
    add("--entrypoint-num-gpus", type=amount, metavar="N", help="GPUs reserved for it; a run's ranks have their own")
    add("--entrypoint-memory", type=at_least(1), metavar="BYTES", help="memory reserved for it")
    add("--entrypoint-resources", metavar="JSON", help="other resources reserved for it")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of the job's environment, by default as it is here; whoever sees the job on the cluster can "
        "read it: no secrets; repeatable",
    )
    add(
        "--stop-grace-s",
        type=at_least(0),
        default=GRACE_S,
        metavar="S",
        help=f"how long Ray waits for the job to end by itself when it is stopped, default {GRACE_S}",
    )
    add("--wait", action="store_true", help="show the job's output until it ends, then exit with its status")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    return parser


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # Ray tells of every request, and that it leaves .git out
    run_main(main)
