"""`python -m jobs.submit` without a cluster: what it refuses, what it would upload, and how it follows a job."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus

from jobs import submit, submitted_job
from jobs.origin import git_commit
from jobs.signals import Interrupted
from jobs.submitted_job import SubmittedJob
from jobs.working_dir import JOBS_API_BYTES, check_upload, measure
from simmatch.config import ConfigError

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in (*names, "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


# --- what is uploaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heed_git", [True, False])
def test_the_size_is_that_of_rays_archive(heed_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0" if heed_git else "1")
    folder = tmp_path / "checkout"
    kept = {"a.py": 10, "deep/er/b.bin": 70_000, "größe/ü.txt": 3, "empty.txt": 0}
    left_out = {".git/objects/pack": 9_000, "data/images.gz": 8_000, "deep/er/c.log": 7_000, "deep/big.bin": 6_000}
    for name, num_bytes in (kept | left_out).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(num_bytes))
    (folder / "nothing").mkdir()
    (folder / ".gitignore").write_text("/data/\n*.log\n")
    (folder / "deep" / ".rayignore").write_text("big.bin\n")
    upload = measure(folder)
    create_package(str(folder), tmp_path / "archive.zip", include_gitignore=heed_git, excludes=[".git"])
    assert upload.size_bytes == (tmp_path / "archive.zip").stat().st_size
    assert upload.largest[0] == ("deep/er", 70_000 if heed_git else 77_000)
    assert upload.files == len(kept) + 2 + (0 if heed_git else 2)  # two files name what is left out


def test_too_much_is_refused_with_the_largest_folders(tmp_path: Path) -> None:
    """Ray 55877: the documented limit is that of `ray.init`; the jobs API takes less, and says so only after the upload
    with `Request Entity Too Large`."""
    assert ray_constants.DASHBOARD_CLIENT_MAX_SIZE == JOBS_API_BYTES
    for name, num_bytes in (("runs/old/model.bin", 90), ("photos/a.jpg", 20), ("b.bin", 5), ("c/d", 1)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(num_bytes * 2**20)
    with pytest.raises(ConfigError) as caught:
        check_upload("--working-dir", measure(tmp_path), JOBS_API_BYTES)
    assert str(caught.value) == (
        "--working-dir: expected a folder of less than 100 MiB, which is what Ray takes, got 122 MB in 4 files below "
        f"{tmp_path}; largest: runs/old (94.4 MB), photos (21 MB), . (5.24 MB); leave out what the job does not need "
        "in .rayignore or .gitignore"
    )
    (tmp_path / ".rayignore").write_text("/runs/\n")
    check_upload("--working-dir", measure(tmp_path), JOBS_API_BYTES)


def test_a_name_that_no_archive_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(ConfigError, match="expected names of files in UTF-8, got 'caf"):
        measure(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


class Dashboard(BaseHTTPRequestHandler):
    """Answers as one that has a token, or that takes no jobs."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 401 if given is None else 200 if given == f"Bearer {TOKEN}" else 403
        self.send_response(status if self.path.startswith("/api/jobs") else 404)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


COMMAND = ["--", "python", "-m", "jobs.pretrain"]
EXPECTED = "expected the address of the cluster's dashboard, such as http://10.0.0.7:8265, got"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "expected a command after --, such as: -- python -m jobs.pretrain --config FILE, got none"),
        (["--"], {}, "expected a command after --"),
        (["--working-dir", "/none", *COMMAND], {}, "--working-dir: expected a folder or a URI, got /none"),
        (["--env", "NOT_SET_HERE", *COMMAND], {}, "--env: expected NAME=VALUE, or the NAME of a variable that is set"),
        (["--env", "a b=c", *COMMAND], {}, "--env: expected NAME=VALUE"),
        (["--metadata-json", "[1]", *COMMAND], {}, "--metadata-json: expected a JSON object of names and"),
        (["--metadata-json", '{"a": 1}', *COMMAND], {}, "--metadata-json: expected a JSON object of names and texts"),
        (["--entrypoint-resources", '{"a": true}', *COMMAND], {}, "--entrypoint-resources: expected a JSON object of"),
        (["--address", "ray://head:10001", *COMMAND], {}, f"--address: {EXPECTED} ray://head:10001, of Ray Client"),
        (["--address", "http://head:x", *COMMAND], {}, f"--address: {EXPECTED} http://head:x"),
        (["--submission-id", "../x; rm", *COMMAND], {}, "--submission-id: expected letters, digits, "),
        (["--env", "a-b=s3cret", *COMMAND], {}, "--env: expected NAME=VALUE, or the NAME of"),
        (COMMAND, {"RAY_ADDRESS": "10.0.0.7:6379"}, f"RAY_ADDRESS: {EXPECTED} 10.0.0.7:6379"),
        (COMMAND, {"RAY_API_SERVER_ADDRESS": "auto", "RAY_ADDRESS": "x"}, f"RAY_API_SERVER_ADDRESS: {EXPECTED} auto"),
        (["--address", "http://127.0.0.1:1", *COMMAND], {}, "expected a cluster that takes jobs at http://127.0.0.1:1"),
        (["--address", "{0}/x", *COMMAND], {}, "expected a cluster that takes jobs at {0}/x, got the answer 404"),
        (["--address", "{0}", *COMMAND], {}, "RAY_AUTH_TOKEN: expected the token of the cluster at {0}, which asks"),
        (["--address", "{0}/", *COMMAND], {"RAY_AUTH_TOKEN": "f" * 64}, "RAY_AUTH_TOKEN: expected the token of the"),
        (["--address", "{0}", *COMMAND], {"RAY_AUTH_TOKEN": "a\nb"}, "RAY_AUTH_TOKEN: expected the token of the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], variables: dict[str, str], message: str, dashboard: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(submit, "_submit", lambda *_: pytest.fail("it was submitted"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert submit.main([word.replace("{0}", dashboard) for word in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.replace('{0}', dashboard)}")
    assert "f" * 64 not in line
    assert "s3cret" not in line


def test_what_is_submitted(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(submit, "_submit", lambda _, request: taken.append(request) or (None, "raysubmit_7"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("MINE", "b=c")
    (tmp_path / "job.py").write_text("1")
    words = ["--address", dashboard, "--working-dir", str(tmp_path), "--env", "A=1", "--env", "MINE"]
    words += ["--entrypoint-num-cpus", "0.5", "--entrypoint-resources", '{"disk": 2}', "--stop-grace-s", "90"]
    words += ["--metadata-json", '{"project": "x", "simmatch.owner": "ada"}']
    assert submit.main([*words, "--", "sh", "-c", "echo $HOME; true"]) == 0
    [request] = taken
    assert request["entrypoint"] == "sh -c 'echo $HOME; true'"
    assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "1", "MINE": "b=c"}
    assert request["runtime_env"]["working_dir"] == str(tmp_path)
    assert (request["entrypoint_num_cpus"], request["entrypoint_resources"]) == (0.5, {"disk": 2})
    assert {"project": "x", "simmatch.owner": "ada"}.items() <= request["metadata"].items()
    assert request["metadata"]["job_name"] == "sh"
    assert request["metadata"]["simmatch.git_commit"] == "unknown"  # of that folder, not of this checkout
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"working directory: 111 B in 1 file from {tmp_path}"
    assert (
        second == f"job raysubmit_7 at {dashboard}; output: ray job logs -f raysubmit_7; stop: ray job stop raysubmit_7"
    )


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m jobs.pretrain --config jobs/configs/digits.yaml --set a=b", "pretrain digits"),
        ("python -m jobs.prepare --out x --config=y.yaml", "prepare"),
        ("/usr/bin/env python -m", "env"),
    ],
)
def test_the_name_that_the_dashboard_shows(command: str, name: str) -> None:
    assert submit._name(command.split()) == name


def test_a_file_that_is_no_commit_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "COMMIT").write_bytes(b"\xff\xfe")
    assert git_commit(tmp_path) is None


def test_a_cluster_that_fails_is_one_line(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)

    def fail(*_: object) -> None:
        raise RuntimeError(f"500:\nTraceback of {TOKEN}")

    monkeypatch.setattr(submit, "_submit", fail)
    assert submit.main(["--address", dashboard, "--working-dir", "", *COMMAND]) == 1
    line = f"error: the cluster at {dashboard} did not take the job: 500: Traceback of ***\n"
    assert capsys.readouterr().err == line


# --- how a job is followed -------------------------------------------------------------------------------------------


class Client:
    """Of a job whose lines come over connections that break.

    connections: the chunks of each; None at the end: it breaks.
    """

    def __init__(self, connections: list[list[str | None]], **info: Any) -> None:
        self._connections = iter(connections)
        self._info = SimpleNamespace(**{"message": None, "driver_exit_code": None} | info)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for chunk in next(self._connections, [None]):
            if chunk is None:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield chunk

    def get_job_info(self, _: str) -> SimpleNamespace:
        return self._info


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitted_job, "PAUSE_S", 0.01)
    monkeypatch.setattr(submitted_job, "PATIENCE_S", 0.2)


@pytest.mark.parametrize(
    ("info", "status"),
    [
        ({"status": JobStatus.SUCCEEDED, "driver_exit_code": 0}, 0),
        ({"status": JobStatus.FAILED, "driver_exit_code": 2}, 2),
        ({"status": JobStatus.FAILED, "driver_exit_code": -9}, 137),
        ({"status": JobStatus.STOPPED}, 143),
        ({"status": JobStatus.FAILED, "message": "no room\nfor it"}, 1),
    ],
)
def test_the_exit_status_is_the_jobs(info: dict[str, Any], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert SubmittedJob("http://head", (Client([["one\n"]], **info), "j")).follow() == status
    out, err = capsys.readouterr()
    if "message" in info:
        assert (out, err) == ("one\n", "error: job j failed: no room for it\n")
    else:
        assert (out, err) == (f"one\njob j: {info['status'].value}, exit status {status}\n", "")


def test_lines_are_shown_once_over_broken_connections(capsys: pytest.CaptureFixture[str]) -> None:
    """Each connection begins with the first line, in chunks of its own."""
    connections: list[list[str | None]] = [["a\nb", None], [None], ["a", "\nb\nc\n", "d", None], ["a\nb\nc\nd\ne\n"]]
    client = Client(connections, status=JobStatus.SUCCEEDED, driver_exit_code=0)
    assert SubmittedJob("http://head", (client, "j")).follow() == 0
    assert capsys.readouterr().out.splitlines() == ["a", "b", "c", "d", "e", "job j: SUCCEEDED, exit status 0"]


def test_a_cluster_that_is_gone_ends_the_wait(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(Client):
        def get_job_info(self, _: str) -> SimpleNamespace:
            raise ConnectionError("refused")

    assert SubmittedJob("http://head", (Gone([]), "j")).follow() == 1
    assert capsys.readouterr().err == (
        "error: the cluster at http://head has not answered for 0.2 s: refused; job j may still run\n"
    )


def test_a_job_whose_output_is_lost_keeps_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    """As where the node of the command died, with its log."""
    client = Client([["a\n", None]], status=JobStatus.FAILED, driver_exit_code=3)
    assert SubmittedJob("http://head", (client, "j")).follow() == 3
    out, err = capsys.readouterr()
    assert out == "a\njob j: FAILED, exit status 3\n"
    assert err == (
        "warning: the output of job j cannot be shown to its end: WebSocket connection closed unexpectedly\n"
    )


def test_a_signal_ends_the_wait_and_not_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupting(Client):
        def get_job_info(self, _: str) -> SimpleNamespace:
            raise Interrupted(signal.SIGINT)

    client = Interrupting([["a\n"]])
    assert SubmittedJob("http://head", (client, "j")).follow() == 130
    assert capsys.readouterr().err == "error: ended by SIGINT; the job goes on: ray job stop j ends it\n"


def test_the_names_of_rays_own_command() -> None:
    """Whoever knows `ray job submit` knows these options."""
    from ray.dashboard.modules.job.cli import submit as rays

    theirs = {name for parameter in rays.params for name in parameter.opts}
    ours = {name for action in submit._parser()._actions for name in action.option_strings} - {"-h", "--help"}
    assert ours - theirs == {"--env", "--stop-grace-s", "--wait"}
    assert json.dumps(sorted(ours & theirs)).count("entrypoint") == 4
