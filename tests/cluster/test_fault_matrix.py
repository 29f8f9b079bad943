"""The fault matrix: every kind of fault at every moment of a run, each run whole in the end.

A cell is `python -m jobs.pretrain` on a lasting cluster of this module's own, two shards of the digits. A fault that
ends the driver is followed by the same command, as a user would give it. At the end the weights are those of an
undisturbed run, bit by bit, every metric is recorded once, and nothing is left on the cluster.

The cells of `FAST` run in `make test`, all of them in `make test-faults`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from cluster.checkpoints.manifest import MANIFEST, folder_of
from cluster.checkpoints.reader import newest_good
from cluster.config import RunConfig
from cluster.storage import AnyPath, find, locate, read
from cluster.tracking.events import MetricsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from tests.cluster.actors import embedded_ray, pids_in
from tests.faults import COMMIT_S, HOLD_S, MOMENTS, FaultPlan, Kind, wait_for
from tests.object_store import BUCKET, ObjectStore, object_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
CPUS, LIMIT_S = 4, 180.0
ROWS = [(0, 5), (0, 10), (1, 5), (1, 10), (1, 12)]
"""(layer, step) of every record of the run."""

AWAY_S = 6.0
"""How long a server stays away."""

SECRET = "simmatch-secret"

LOST = ("kill", "stop", "corrupt shard", "corrupt manifest", "corrupt constant")
"""Faults that cost a group: the run replaces it by itself."""

FAST = [
    ("driver SIGKILL", "in mid-epoch"),
    ("corrupt shard", "between layers"),
    ("S3 server away", "during a save"),
]


@dataclass(frozen=True)
class Outside:
    """A fault that comes from outside, when a rank says that the moment has come.

    Attributes
    ----------
    status: exit status of the driver that it ends, or 0 where the run goes on.
    """

    strike: Callable[[Cell], None]
    status: int = 0
    remote: bool = False


@dataclass
class Cell:
    """One run that is disturbed once."""

    run_dir: AnyPath
    work: Path
    config: Path
    environment: dict[str, str]
    store: ObjectStore
    process: subprocess.Popen[str] | None = None
    out: list[str] = field(default_factory=list)

    def start(self, plan: FaultPlan | str | None) -> None:
        values = asdict(plan) if isinstance(plan, FaultPlan) else plan
        command = [sys.executable, "-m", "tests.faulty_job", json.dumps(values)]
        command += ["--config", str(self.config), "--run-dir", str(self.run_dir)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=self.work, env=self.environment, **pipes)

    def end(self) -> int:
        """Wait for the driver; returns its status."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=LIMIT_S)
        self.out.append(out)
        return self.process.returncode

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def local(self, name: str) -> Path:
        """A file that is written bit by bit."""
        if isinstance(self.run_dir, Path):
            return self.run_dir / name
        (folder,) = (self.work / "runs" / "remote").iterdir()
        return folder / name


def signal_driver(number: signal.Signals) -> Callable[[Cell], None]:
    def strike(cell: Cell) -> None:
        assert cell.process is not None
        cell.process.send_signal(number)

    return strike


def store_goes_away(cell: Cell) -> None:
    cell.store.stop()
    timer = threading.Timer(AWAY_S, cell.store.start)
    timer.daemon = True
    timer.start()


OUTSIDE = {
    "driver SIGKILL": Outside(signal_driver(signal.SIGKILL), status=-signal.SIGKILL),
    "SIGTERM": Outside(signal_driver(signal.SIGTERM), status=128 + signal.SIGTERM),
    "S3 server away": Outside(store_goes_away, remote=True),
}
TRACKERS = ("MLflow down", "MLflow hanging", "MLflow answers 500")
RANK_KINDS: tuple[Kind, ...] = ("kill", "exception", "stop", "disk full", "corrupt shard", "corrupt manifest")
CELLS = [(fault, moment) for fault in (*RANK_KINDS, *OUTSIDE, *TRACKERS) for moment in MOMENTS]
CELLS.append(("corrupt constant", "in mid-epoch"))  # the first layer has none; this begins again, and writes it again


# -- the cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """Made before the cluster, whose actors learn of it from their environment."""
    with object_store() as found:
        yield found


@pytest.fixture(scope="module")
def ray(store: ObjectStore) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # actors find the planned faults
        with embedded_ray(CPUS) as ray:
            patch.undo()
            yield ray


@pytest.fixture(scope="module")
def make_cell(
    ray: Any,
    store: ObjectStore,
    digits_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Cell]]:
    """(remote, tracking URI, other changes) → a run that has not started; drivers that still run are ended."""
    cells = ExitStack()

    def make(remote: bool = False, uri: str | None = None, **changes: Any) -> Cell:
        work = tmp_path_factory.mktemp("cell")
        waits = {"poll_s": 0.1, "threads_per_rank": 1, "heartbeat_s": 4.0, "backoff_s": 0.1, "grace_s": 30.0}
        tracking = {"enabled": uri is not None, "uri": uri, "timeout_s": 2.0, "flush_s": 2.0}
        config = digits_config(2, cluster=waits | {"start_timeout_s": 90.0}, tracking=tracking, **changes)
        path = work / "config.json"
        path.write_text(config.model_dump_json(exclude_none=True))  # JSON is YAML
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | {
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        run_dir = locate(f"s3://{BUCKET}/{work.name}/run") if remote else work / "run"
        cell = Cell(run_dir, work, path, environment, store)
        cells.callback(cell.kill)
        return cell

    with cells:
        yield make


def assert_nothing_left(ray: Any, cell: Cell, limit_s: float = 30.0) -> None:
    """No process of a rank, no placement group, no reserved CPU."""
    pids = [pid for out in cell.out for pid in pids_in(out)]
    deadline = time.monotonic() + limit_s
    while True:
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU")
        if not alive and not groups and free == CPUS:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: processes {alive}, placement groups {groups}, free CPUs {free}")
        time.sleep(0.2)


# -- what every run must come to ---------------------------------------------------------------------------------------


def model_of(cell: Cell) -> bytes:
    return read(cell.run_dir / "model" / "model.safetensors")


def recorded(cell: Cell) -> list[tuple[int, int]]:
    """(layer, step) of the metrics in the spool, in its order."""
    events = [event for event, _ in Spool(cell.local(SPOOL_NAME)).read()]
    return [(e.layer, e.step) for e in events if isinstance(e, MetricsEvent) and e.layer is not None]


def assert_whole(ray: Any, cell: Cell, without_ray: bytes, restarts: int) -> None:
    shown = "\n".join(cell.out)
    summary = json.loads(read(cell.run_dir / "summary.json"))
    assert (summary["status"], summary["restarts"], summary["steps"]) == ("FINISHED", restarts, 22), shown
    assert model_of(cell) == without_ray, shown
    assert recorded(cell) == ROWS, shown
    newest = newest_good(cell.run_dir, pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000022", shown
    assert SECRET not in shown
    assert_nothing_left(ray, cell)


def resume(cell: Cell) -> None:
    """The same command again, nothing going wrong."""
    cell.start(None)
    assert cell.end() == 0, cell.out[-1]


def cells(fast: bool) -> list[Any]:
    """The matrix; what is not fast is left to `make test-faults`."""
    marks = [] if fast else [pytest.mark.fault]
    chosen = [cell for cell in CELLS if (cell in FAST) == fast]
    return [pytest.param(fault, moment, marks=marks, id=f"{fault} {moment}") for fault, moment in chosen]


@pytest.mark.parametrize(("fault", "moment"), [*cells(fast=True), *cells(fast=False)])
def test_a_run_ends_as_if_nothing_had_happened(
    ray: Any,
    make_cell: Callable[..., Cell],
    without_ray: bytes,
    request: pytest.FixtureRequest,
    fault: str,
    moment: str,
) -> None:
    if fault in get_args(Kind):
        of_a_rank(ray, make_cell(), without_ray, fault, moment)
    elif fault in OUTSIDE:
        from_outside(ray, make_cell(remote=OUTSIDE[fault].remote), without_ray, fault, moment)
    else:
        server = request.getfixturevalue("bad_servers")[fault]
        tracker_away(ray, make_cell(uri=server), without_ray, moment)


def of_a_rank(ray: Any, cell: Cell, without_ray: bytes, fault: Kind, moment: str) -> None:
    """A rank does it to itself, in the first group only."""
    cell.start(FaultPlan.at(moment, fault))
    status = cell.end()
    shown = cell.out[0]
    if fault == "exception":
        assert status == 1, shown
        summary = json.loads(read(cell.run_dir / "summary.json"))
        assert summary["status"] == "FAILED"
        # within an update all ranks learn whose fault it is; elsewhere the rank itself tells
        phase, layer, step = MOMENTS[moment]
        told = (
            f"layer {layer}, step {step}: exception on rank 1"
            if phase == "update"
            else "rank 1: InjectedError: injected"
        )
        assert told in summary["message"]
        resume(cell)
        assert_whole(ray, cell, without_ray, restarts=0)
        return
    assert status == 0, shown
    assert_whole(ray, cell, without_ray, restarts=int(fault in LOST))
    if fault == "disk full":
        assert " was not written: " in shown
        assert "No space left on device" in shown
    else:
        assert re.search(r"rank 1 \(pid \d+ on \S+\) (was lost|did not answer)", shown), shown
        if fault.startswith("corrupt") and moment != "before the first checkpoint":
            assert re.search(r"step-\d+ is damaged and passed over: \S+", shown), shown


def from_outside(ray: Any, cell: Cell, without_ray: bytes, fault: str, moment: str) -> None:
    """A rank holds on at the moment until the fault has struck."""
    outside, signals = OUTSIDE[fault], cell.work / "signals"
    signals.mkdir()
    cell.start(FaultPlan.at(moment, "tell", signals=str(signals)))
    wait_for(signals / "here", HOLD_S)
    outside.strike(cell)
    (signals / "go").touch()
    status = cell.end()
    assert status == outside.status, cell.out
    if outside.status:
        if outside.status > 0:
            assert json.loads(read(cell.run_dir / "summary.json"))["status"] == "KILLED"
        assert_nothing_left(ray, cell)
        resume(cell)
    assert_whole(ray, cell, without_ray, restarts=0)


def tracker_away(ray: Any, cell: Cell, without_ray: bytes, moment: str) -> None:
    """The server is bad all the time; a rank is killed on top. The records follow later, and once."""
    cell.start(FaultPlan.at(moment, "kill"))
    assert cell.end() == 0, cell.out
    assert "; send them with: python -m jobs.sync" in cell.out[0]
    assert_whole(ray, cell, without_ray, restarts=1)


@pytest.fixture(scope="module")
def bad_servers() -> Iterator[dict[str, str]]:
    """Tracking URIs of servers that are none: a closed port, one that never answers, one that answers 500."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_PATCH = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return None

    broken = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=broken.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        ports = (closed.getsockname()[1], silent.getsockname()[1], broken.server_address[1])
        yield {name: f"http://127.0.0.1:{port}" for name, port in zip(TRACKERS, ports, strict=True)}
    broken.shutdown()
    broken.server_close()


@pytest.mark.fault
def test_another_machine_goes_on(ray: Any, make_cell: Callable[..., Cell], without_ray: bytes) -> None:
    """The driver's machine is gone, and with it every file of the run that is not in the object store."""
    cell = make_cell(remote=True)
    signals = cell.work / "signals"
    signals.mkdir()
    cell.start(FaultPlan.at("in mid-epoch", "tell", signals=str(signals)))
    wait_for(signals / "here", HOLD_S)
    wait_for(
        folder_of(cell.run_dir, 12) / MANIFEST, COMMIT_S
    )  # commits take their time: the updates until here took less
    signal_driver(signal.SIGKILL)(cell)
    assert cell.end() == -signal.SIGKILL
    shutil.rmtree(cell.work / "runs")
    resume(cell)
    assert re.search(r"continuing the unfinished run in s3://\S+, from step-000000(12|16)\n", cell.out[1]), cell.out[1]
    assert_whole(ray, cell, without_ray, restarts=0)  # what was recorded up to the checkpoint came with it


@pytest.mark.fault
def test_a_driver_that_dies_while_it_commits(ray: Any, make_cell: Callable[..., Cell], without_ray: bytes) -> None:
    """Half a manifest is no manifest. Its checkpoint has its number already, so the next driver writes the manifest."""
    cell = make_cell()
    cell.start("crash in commit")
    assert cell.end() == -signal.SIGKILL
    (half,) = Path(str(cell.run_dir)).rglob("manifest.json.partial")  # a rank may have left half a shard as well
    assert not half.with_suffix("").exists()
    resume(cell)
    assert f"continuing the unfinished run in {cell.run_dir}, from step-00000008" in cell.out[1]
    assert_whole(ray, cell, without_ray, restarts=0)
    assert not half.exists()


def files_of(run_dir: AnyPath) -> dict[str, bytes]:
    """All but what ranks write: shards that no manifest names and models that are not published are nobody's."""
    found = [path for depth in range(1, 4) for path in find(run_dir, "/".join("*" * depth)) if path.is_file()]
    ranks = ("rank-", "model-")
    return {str(path): read(path) for path in found if not {path.name[:5], path.parent.name[:6]} & set(ranks)}


@pytest.mark.fault
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "s3"])
def test_two_jobs_of_one_run_overlap(
    ray: Any, make_cell: Callable[..., Cell], without_ray: bytes, remote: bool
) -> None:
    """The first one is frozen, as on a host that is cut off, and goes on once the second one has finished: it stops,
    and changes nothing. Submitted once more, the job trains nothing."""
    first, second = make_cell(remote=remote), make_cell(remote=remote)
    second.run_dir, signals = first.run_dir, first.work / "signals"
    signals.mkdir()
    first.start(FaultPlan.at("in mid-epoch", "tell", signals=str(signals)))
    wait_for(signals / "here", LIMIT_S)
    wait_for(folder_of(first.run_dir, 12) / MANIFEST, LIMIT_S)
    signal_driver(signal.SIGSTOP)(first)
    second.start("impatient")
    assert second.end() == 0, second.out
    before = files_of(first.run_dir)
    (signals / "go").touch()
    signal_driver(signal.SIGCONT)(first)
    assert first.end() == 1, first.out
    assert "another attempt took over this run: " in first.out[0]
    assert "test accuracy" not in first.out[0]
    assert files_of(first.run_dir) == before
    resume(second)
    told = second.out[1].splitlines()
    assert [line for line in told if line.startswith("already finished, see ")] == told[-1:]
    assert files_of(first.run_dir) == before
    assert_whole(ray, second, without_ray, restarts=0)
    assert_nothing_left(ray, first)
