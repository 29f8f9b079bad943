"""`ray job submit` and `jobs.submit` to clusters of its own on loopback, with a token and without: what users see."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
"""All but tabs and line ends: Ray's own lines, before ours, hold a tab."""

SMALL = (
    "data.train_images=200", "data.test_images=50", "model.layers.0.out_channels=6", "model.layers.1.out_channels=12",
    "model.layers.1.train.epochs=1", "probe.readout=ridge", "tracking.enabled=false", "cluster.poll_s=0.1",
)  # fmt: skip
DECOYS = (".venv/lib/module.py", "data/images.gz", "runs/digits/events.jsonl", ".git/config", "mlflow.db")
"""What lies in a checkout and has no business on a cluster."""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """A Ray head with two CPUs.

    address: of its dashboard, where jobs are submitted; control: of its control service.
    """

    address: str
    control: str
    environment: dict[str, str]
    working_dir: Path

    def submit(self, entrypoint: str) -> tuple[int, str, str]:
        """Submit and wait as the command line does: its exit status, the job's final status, the job's lines."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
        done = subprocess.run(
            [*ray, "submit", "--working-dir", str(self.working_dir), "--", "sh", "-c", entrypoint],
            env=self.environment, cwd=self.working_dir, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        submitted = re.search(r"Job '(\w+)' submitted successfully", done.stdout)
        assert submitted, done.stdout + done.stderr
        job = f"/api/jobs/{submitted[1]}"
        return done.returncode, self.get(job)["status"], self.get(f"{job}/logs")["logs"]

    def submit_ours(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`python -m jobs.submit` from this checkout, where no mode of authentication is set."""
        values = {name: value for name, value in self.environment.items() if name != "RAY_AUTH_MODE"}
        return subprocess.run(
            [sys.executable, "-m", "jobs.submit", *words],
            env=values | (env or {}), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def get(self, path: str, *, token: bool = True, method: str = "GET") -> dict:
        own = self.environment.get("RAY_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {own}"} if token and own else {}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(self.address + path, headers=headers, method=method)
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout: the packages, .gitignore, and what collects beside them."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("simmatch", "cluster", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    for decoy in (*DECOYS, "jobs/__pycache__/left.pyc"):
        (folder / decoy).parent.mkdir(parents=True, exist_ok=True)
        (folder / decoy).touch()
    return folder


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], working_dir: Path) -> Iterator[Cluster]:
    """It asks for a token."""
    with head(environment, working_dir) as found:
        yield found


@pytest.fixture
def open_cluster(environment: dict[str, str], working_dir: Path, tmp_path: Path) -> Iterator[Cluster]:
    """It asks for none, and nobody here has one; the README's user, as of whom nothing is set."""
    kept = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    with head(kept | {"HOME": str(tmp_path)}, working_dir) as found:
        yield found


@contextmanager
def head(environment: dict[str, str], working_dir: Path) -> Iterator[Cluster]:
    """`ray start --head --block`, its folder and its ports its own."""
    port, dashboard, agent, client = free_ports(4)
    # Ray's sockets lie below it, and the path of a socket may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    options = {
        "--port": port,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--temp-dir": folder,
        "--num-cpus": 2,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"{name}={value}" for name, value in options.items()]
    values = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # jobs bring their own copy
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=values, stdout=output, stderr=output, cwd=folder)
    address = f"http://127.0.0.1:{dashboard}"
    found = Cluster(address, f"127.0.0.1:{port}", values | {"RAY_API_SERVER_ADDRESS": address}, working_dir)
    try:
        wait_until_it_answers(found, process, log)
        yield found
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, left = psutil.wait_procs(children, timeout=5)
        for each in (process, *left):  # nothing of it is needed any more
            each.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_it_answers(cluster: Cluster, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            cluster.get("/api/jobs/")
            return
        except OSError:
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def pretrain(run_dir: Path | str, *assignments: str) -> str:
    """The words of the README, for a small run."""
    words = ["python", "-m", "jobs.pretrain", "--config", "jobs/configs/digits.yaml", "--run-dir", str(run_dir)]
    for assignment in (*SMALL, *assignments):
        words += ["--set", assignment]
    return " ".join(words)


def test_a_stranger_is_refused(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        cluster.get("/api/jobs/", token=False)


def test_a_job_succeeds(cluster: Cluster, tmp_path: Path) -> None:
    code, status, logs = cluster.submit(pretrain(tmp_path / "run"))
    assert (code, status) == (0, "SUCCEEDED"), logs
    lines = logs.splitlines()
    assert not CONTROL.search(logs)
    assert f"a new run in {tmp_path / 'run'}" in lines
    assert any(
        re.match(r"ray: cluster at 127\.0\.0\.1:\d+; mesh: data 1 × layer 1 × channel 2;", line) for line in lines
    )
    assert any(line.startswith("readout 1/1") for line in lines)
    assert f"model, figures, summary: {tmp_path / 'run'}" in lines
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["world_size"]) == ("FINISHED", 8, 2)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_our_submission_ends_as_the_job_does(cluster: Cluster, tmp_path: Path) -> None:
    """Lines, exit status, and what MLflow gets to know of a checkout whose .git stays behind."""
    words = pretrain(tmp_path / "run", "mesh.channel=1").split()
    done = cluster.submit_ours("--wait", "--", *words, env={"LOGNAME": "ada"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"working directory: \S+ MB in [\d,]+ files from {re.escape(str(ROOT))}", lines[0])
    assert f"a new run in {tmp_path / 'run'}" in lines
    assert re.fullmatch(r"job \w+: SUCCEEDED, exit status 0", lines[-1])
    assert not CONTROL.search(done.stdout)
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert start["tags"]["simmatch.git_commit"].rstrip("+") == (commit or "unknown")
    assert start["tags"]["mlflow.user"] == "ada"
    failed = cluster.submit_ours("--wait", "--working-dir", "", "--env", "A=7", "--", "sh", "-c", "exit $A")
    assert failed.returncode == 7, failed.stdout + failed.stderr


def test_the_doctor_as_a_job(cluster: Cluster) -> None:
    """Its objects alone on standard output, and its exit status."""
    values = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    words = ["--submit", "--json", "--config", "jobs/configs/digits.yaml", "--run-dir", "relative"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.doctor", *words],
        env=values, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    *objects, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stderr
    assert objects[2]["message"].startswith(f"cluster at {cluster.control}")
    (failure,) = [each for each in objects if each["status"] == "failure"]
    assert failure["message"].startswith("--run-dir: expected an absolute path inside a Ray job")
    assert (last["check"], last["failures"]) == ("summary", 1)
    assert "FAILED, exit status 1" in done.stderr


STOPPED = """
trap 'touch {0}/asked; python -c "import time; time.sleep(5)"; touch {0}/ended; exit 0' TERM
touch {0}/begun
while true; do sleep 0.1; done
"""
"""Takes 5 s to end when it is asked to; Ray kills after 3 s by itself."""


def test_a_stopped_job_has_the_time_it_was_given(cluster: Cluster, tmp_path: Path) -> None:
    """The variable of the runtime environment reaches Ray's supervisor of the job."""
    words = ["--working-dir", "", "--submission-id", "slow", "--", "sh", "-c", STOPPED.format(tmp_path)]
    done = cluster.submit_ours(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.get("/api/jobs/slow/stop", method="POST")
    while (status := cluster.get("/api/jobs/slow")["status"]) not in ("STOPPED", "FAILED", "SUCCEEDED"):
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    assert (tmp_path / "asked").exists()
    assert (tmp_path / "ended").exists()
    assert status == "STOPPED"


WHERE = """
import importlib.util, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False)
find = ray.remote(num_cpus=1)(lambda names: [importlib.util.find_spec(name).origin for name in names])
print(ray.get(find.remote(sys.argv[2:])))
"""
"""Prints which files a worker takes packages from."""


@pytest.mark.fault
def test_workers_take_the_packages_from_the_working_directory(cluster: Cluster) -> None:
    """Of the job's upload, or of a driver that joins from the checkout. Neither the head's own working directory nor
    what is installed holds them, and an installed `simmatch` is another one."""
    packages = ["simmatch", "cluster", "jobs"]
    (cluster.working_dir / "where.py").write_text(WHERE)
    code, _, logs = cluster.submit(f"python where.py auto {' '.join(packages)}")
    assert code == 0, logs
    joined = subprocess.run(
        [sys.executable, "where.py", cluster.control, *packages],
        env=cluster.environment, cwd=cluster.working_dir, capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    for output, folder in ((logs, r"/\S+/working_dir_files/\w+"), (joined.stdout, re.escape(str(cluster.working_dir)))):
        assert re.search(", ".join(rf"'{folder}/{package}/__init__\.py'" for package in packages), output), output


SENT = """
import importlib.util

from jobs import ray_session

ray_session._other_nodes = lambda *_: ["203.0.113.7"]
print(ray_session.start_ray(1, 60.0))
import ray

print(ray.get(ray.remote(num_cpus=1)(lambda: importlib.util.find_spec("jobs").origin).remote()))
"""
"""A driver that takes the only node for one of another machine. Prints where its worker finds our code."""


@pytest.mark.fault
def test_a_driver_sends_its_checkout_to_other_nodes(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SENT], env=cluster.environment | {"RAY_ADDRESS": cluster.control},
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    said, found = done.stdout.splitlines()
    assert re.search(r", this checkout \(\S+ MB in [\d,]+ files\) sent to 1 other node$", said)
    assert re.search(r"/working_dir_files/\w+/jobs/__init__\.py$", found)


def test_bad_configuration_fails_the_job_and_the_upload_is_lean(cluster: Cluster) -> None:
    """A relative run directory would vanish with the job's copy of the checkout; only a real job can know."""
    # jobs of one upload share Ray's copy of it, in which Python keeps what it compiled: this one is unpacked anew
    (cluster.working_dir / "note.txt").write_text("only of this upload")
    code, status, logs = cluster.submit(f"find . -type f | sort; {pretrain('runs/mine')}; exit $?")
    assert (code, status) == (1, "FAILED"), logs
    errors = [line for line in logs.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: --run-dir: expected an absolute path inside a Ray job")
    assert errors[0].endswith("got 'runs/mine'")
    assert "Traceback" not in logs
    uploaded = {line.removeprefix("./") for line in logs.splitlines() if line.startswith("./")}
    expected = {"jobs/pretrain.py", "jobs/configs/digits.yaml", "simmatch/layer.py", "cluster/group.py", "note.txt"}
    assert expected <= uploaded
    assert not uploaded & set(DECOYS)
    assert not any(name.endswith(".pyc") for name in uploaded)


@pytest.mark.fault
def test_the_readmes_job_succeeds_where_nobody_asks_for_a_token(open_cluster: Cluster, tmp_path: Path) -> None:
    """Its own words, smaller; the run goes below the user's home, since the job's folder is a copy."""
    words = "python -m jobs.pretrain --config jobs/configs/digits.yaml"
    assert f"ray job submit --working-dir . -- {words}  " in (ROOT / "cluster" / "README.md").read_text()
    code, status, logs = open_cluster.submit(f"{words} {' '.join(f'--set {each}' for each in SMALL)}")
    assert (code, status) == (0, "SUCCEEDED"), logs
    assert any(
        line.startswith("ray: cluster at 127.0.0.1:") and "which asks for no token;" in line
        for line in logs.splitlines()
    )
    summary = json.loads((tmp_path / "simmatch" / "runs" / "digits" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("FINISHED", 8)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "RAY_AUTH_TOKEN: expected the token of the cluster at {control}, got one that"),
        ({"RAY_AUTH_TOKEN": ""}, "RAY_AUTH_TOKEN: expected the token of the cluster at {control}, which asks for it"),
        ({"RAY_ADDRESS": "{address}"}, "RAY_ADDRESS: expected host:port of a cluster's control service"),
    ],
    ids=["wrong", "none", "the dashboard's address"],
)  # fmt: skip
def test_a_driver_that_cannot_join_says_why_in_one_line(
    changes: dict[str, str], message: str, cluster: Cluster, tmp_path: Path
) -> None:
    words = pretrain(tmp_path / "run").split()
    places = {"control": cluster.control, "address": cluster.address}
    changes = {name: value.format(**places) for name, value in changes.items()}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        env=cluster.environment | {"HOME": str(tmp_path), "RAY_ADDRESS": cluster.control} | changes,
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: " + message.format(**places))
    assert len(done.stderr.splitlines()) == 1


HOLD = """
import pathlib, sys, time
import ray

ray.init(address="auto", log_to_driver=False)
hold = ray.remote(num_cpus=1)(lambda: time.sleep(600))
taken = hold.remote()
while ray.available_resources().get("CPU", 0.0) > 1:
    time.sleep(0.1)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
"""Another's work that takes one of the two CPUs until its process ends."""


def test_a_failure_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """No room for two ranks beside another's work."""
    (tmp_path / "hold.py").write_text(HOLD)
    held = tmp_path / "held"
    begin = f"{sys.executable} {tmp_path / 'hold.py'} {held} & while [ ! -e {held} ]; do sleep 0.1; done"
    run = pretrain(tmp_path / "run", "cluster.placement_timeout_s=1")
    code, status, logs = cluster.submit(f"{begin}; {run}; status=$?; kill $!; exit $status")
    assert (code, status) == (1, "FAILED"), logs
    [error] = [line for line in logs.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: no room for 2 ranks")
    assert "within 1 s" in error
    assert error.split("free now: ")[1].startswith("1 CPU; ")
    assert "Traceback" not in logs
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["message"]) == ("FAILED", error.removeprefix("error: "))
