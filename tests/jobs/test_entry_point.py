"""A job as a program: whatever its output or a signal does, it ends as its `main` says, and without a traceback."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import jobs
from cluster.checkpoints.manifest import folder_of
from cluster.checkpoints.reader import newest_good
from jobs.ray_session import own_signals
from jobs.signals import SignalHandler

SHOWS = """
from rich.console import Console
from rich.table import Table
from jobs.entry_point import run_main

def main():
    table = Table("layer")
    table.add_row("0 × 1")
    for _ in range(400):
        print("patch 3 × 3 →", "x" * 100)
        Console().print("┏ τ = 1", table)
        Console(stderr=True).print("× " * 50)
    return 7

run_main(main)
"""

WAITS = """
import sys, time
from jobs.entry_point import run_main

def main():
    print("here", flush=True)
    time.sleep(60)
    return 0

run_main(main)
"""

TRACES = """
import threading, time, torch
from jobs.entry_point import run_main

class Deep(torch.nn.Module):
    def forward(self, x):
        for _ in range(60):
            x = torch.relu(x @ x.T @ x)
        return x

def main():
    begun = threading.Event()
    def trace():
        while True:
            begun.set()
            torch.export.export(Deep(), (torch.rand(8, 8),))
    threading.Thread(target=trace, daemon=True).start()
    begun.wait()
    time.sleep(1.0)
    return 7

run_main(main)
"""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str]) -> Run:
    def begin(code: str, **options: object) -> subprocess.Popen[str]:
        env = environment | options.pop("env", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, errors="replace", **pipes)

    return begin


def test_a_full_disk_costs_the_text(start: Run) -> None:
    with open("/dev/full", "w") as full:
        assert start(SHOWS, stdout=full, stderr=full).wait(60) == 7


def test_a_reader_that_goes_costs_the_text(start: Run) -> None:
    process = start(SHOWS)
    assert process.stdout.readline().startswith("patch 3 × 3")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 7


def test_a_closed_output_costs_the_text(environment: dict[str, str]) -> None:
    words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", SHOWS]
    assert subprocess.run(words, env=environment, timeout=60, check=False).returncode == 7


def test_signs_that_an_encoding_lacks_are_replaced(start: Run) -> None:
    process = start(SHOWS, env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert out.startswith("patch 3 ? 3 ? xxx")
    assert "Traceback" not in err


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_it_with_a_line(start: Run, signum: signal.Signals) -> None:
    process = start(WAITS)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + signum, "", "error: interrupted\n")


def test_signals_of_an_end_call_what_cuts_it_short() -> None:
    before, heard = [signal.getsignal(signum) for signum in SIGNALS], []
    with SignalHandler() as signals:
        signals.on_signal = lambda _: heard.append("hurry")
        for signum in SIGNALS:
            signal.raise_signal(signum)
    assert heard == 3 * ["hurry"]
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_an_ending_remembers_what_ended_it() -> None:
    with SignalHandler() as signals:
        for signum in (signal.SIGHUP, signal.SIGINT):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signum)
        signal.raise_signal(signal.SIGTERM)  # what ends in order may take a while
    assert signals.status == 129


def test_a_signal_while_ray_starts_is_one_of_ours() -> None:
    """Ray puts a handler of its own in place that exits with status 15; the terminal's signal waits."""

    def begin() -> None:
        with own_signals():
            assert signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, set())
            signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
            signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))  # as Ray does for a while
            signal.raise_signal(signal.SIGTERM)

    blocked, put = signal.pthread_sigmask(signal.SIG_BLOCK, set()), signal.signal
    with SignalHandler() as signals:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            begin()
        assert signal.getsignal(signal.SIGTERM) == handler
    assert signals.status == 143
    assert signal.signal is put
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == blocked


def test_what_is_to_outlive_its_terminal_does(start: Run) -> None:
    """As `nohup` begins a program."""
    process = start(WAITS.replace("60", "1"), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.fault
def test_a_closed_terminal_leaves_a_last_checkpoint(
    digits_yaml: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Of a run with an embedded Ray, whose processes belong to the terminal as well; system and shell both tell."""
    ours, theirs = pty.openpty()
    words = ["jobs.pretrain", "--config", str(digits_yaml), "--set", "model.layers.1.train.epochs=40"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words, "--run-dir", str(tmp_path / "run")],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 100
    # one of these: a writer that is busy leaves a checkpoint out, and old ones are pruned
    while not any(path.parent.name >= "step-00000060" for path in tmp_path.glob("run/checkpoints/*/manifest.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        with suppress(BlockingIOError):
            os.read(ours, 65536)
        time.sleep(0.05)
    os.close(ours)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 129
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    step = summary["steps"]
    assert summary["message"] == f"ended by SIGHUP; the newest checkpoint is of step {step}"
    assert newest_good(tmp_path / "run", pytest.fail) == folder_of(tmp_path / "run", step)


@pytest.mark.fault
def test_a_thread_that_traces_a_model_does_not_abort_the_end(start: Run) -> None:
    """The end of the interpreter aborts in most cases while a thread is inside torch's C++ code: status 134."""
    for _ in range(5):
        process = start(TRACES)
        _, err = process.communicate(timeout=100)
        own = [line for line in err.splitlines() if "triton not found" not in line]  # torch says so without Triton
        assert (process.returncode, own) == (7, [])


def test_every_job_is_such_a_program() -> None:
    folder = Path(jobs.__file__).parent
    entries = {}
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                entries[path.stem] = ast.unparse(node.body[-1])
    assert entries.keys() >= {
        "pretrain",
        "json_progress",
        "evaluate",
        "finetune",
        "benchmark",
        "chaos",
        "sync",
        "fetch",
    }
    assert all(call.startswith("run_main(") for call in entries.values()), entries
