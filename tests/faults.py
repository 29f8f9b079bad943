"""Faults on purpose: a plan says which rank fails, when, and how.

The faults enter where real ones would: a value in a rank's rows, an exception in a rank's own arithmetic, a process
that is gone, a disk that takes no more. What the program then does is its own code. Faults from outside (a driver that
is killed, a server that goes away) wait for a rank to tell that the moment has come: kind `tell`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cluster.checkpoints.manifest import CONSTANTS, MANIFEST, Shard, folder_of
from cluster.storage import AnyPath, find
from cluster.training import Training
from cluster.worker import Worker
from simmatch.layer import SimilarityMatchingConv2d

HOLD_S = 60.0
"""How long a held rank stays away: longer than every limit in the tests, and the test kills it anyway."""

Kind = Literal[
    "nan feedforward",
    "nan lateral",
    "nan label",
    "explode",
    "exception",
    "card",
    "memory",
    "error",
    "kill",
    "hold",
    "stop",
    "tell",
    "disk full",
    "corrupt shard",
    "corrupt manifest",
    "corrupt constant",
]
"""
nan …       a NaN in the last own row of W, M or V, before the update
explode     the own rows of W a million times too large, before the update
exception   the rank's statistics raise, in the middle of the update; elsewhere the rank raises on the spot
card        the same, with what torch raises when a GPU has failed
memory      the same, with what torch raises when a GPU has too little memory
error       the rank's next update raises before its batch is made, outside of what the ranks tell each other
kill        the process ends, by SIGKILL
hold        the training thread stays away for `HOLD_S`
stop        the process stands still, by SIGSTOP
tell        the rank tells the test that it is there, and waits for its word to go on
disk full   the shard being written, or the next one, finds no room
corrupt …   a bit of the newest committed checkpoint flips, and the process ends, by SIGKILL
"""

Phase = Literal["update", "save", "encode"]
"""Before an update, half way through writing a shard, or before the images are encoded for the next layer."""

MOMENTS: dict[str, tuple[Phase, int, int]] = {
    "before the first checkpoint": ("update", 0, 2),
    "in mid-epoch": ("update", 1, 9),
    "during a save": ("save", 0, 8),
    "between layers": ("encode", 0, 0),
}
"""Phase, layer and update in the run of `digits_config`, which writes a checkpoint every four updates."""


OF_A_LAYER = ("nan feedforward", "nan lateral", "nan label", "explode", "exception", "card", "memory", "error")
"""Kinds that a rank's layer or its batches suffer."""


COMMITTED: dict[tuple[Phase, int, int], int] = {("update", 1, 9): 16, ("save", 0, 8): 4, ("encode", 0, 0): 10}
"""Moment → step of the newest checkpoint that the controller will have committed by then, or soon."""

COMMIT_S = 30.0


class InjectedError(RuntimeError):
    """What a planned exception raises."""


ERRORS: dict[str, Exception] = {
    "exception": InjectedError("injected"),
    "card": torch.AcceleratorError(
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"
    ),
    "memory": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.10 GiB. GPU 0 has a total capacity of 79.19 GiB of which 812.06 MiB "
        "is free. Including non-PyTorch memory, this process has 78.30 GiB memory in use. Of the allocated memory "
        "70.10 GiB is allocated by PyTorch, and 3.20 GiB is reserved by PyTorch but unallocated."
    ),
}
"""What a rank's own arithmetic raises."""


@dataclass(frozen=True)
class FaultPlan:
    """Rank `rank` fails at update `step` (the first is 1) of layer `layer`, in the group of one generation.

    Attributes
    ----------
    phase: `save`: while it writes the shard of that update; `encode`: before it encodes behind the layer, at step 0.
    signals: folder for kind `tell`.
    """

    rank: int
    layer: int
    step: int
    kind: Kind
    generation: int = 0
    phase: Phase = "update"
    signals: str = ""

    @classmethod
    def at(cls, moment: str, kind: Kind, rank: int = 1, signals: str = "") -> FaultPlan:
        """The plan for one of the `MOMENTS`."""
        phase, layer, step = MOMENTS[moment]
        return cls(rank=rank, layer=layer, step=step, kind=kind, phase=phase, signals=signals)


class FaultyTraining(Training):
    """The program of `cluster.training`, with faults where its plans say."""

    plans: tuple[FaultPlan, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._real_write, self._writes_lost = self.writer._write, 0
        self.writer._write = self._write_shard  # type: ignore[method-assign]

    @contextmanager
    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        plans = self._due("update", index, int(layer.updates) + 1)
        for plan in plans:
            if plan.kind not in OF_A_LAYER:
                self._strike(plan)
        with super().updating(index, layer):
            for plan in plans:
                if plan.kind in OF_A_LAYER:
                    inject(plan.kind, layer)
            yield

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        for plan in self._due("encode", index, 0):
            self._strike(plan)
        super().learnt(index, layer)

    def _write_shard(self, folder: AnyPath, *arguments: Any) -> Shard:
        """What `write_shard` does; a plan strikes when half a file lies there."""
        cursor = self.writer._writing
        assert cursor is not None
        for plan in self._due("save", cursor.layer, cursor.updates):
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"rank-{self.assignment.rank}-half.partial").write_bytes(b"half")
            self._strike(plan)
        if self._writes_lost > 0:
            self._writes_lost -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return self._real_write(folder, *arguments)

    def _due(self, phase: Phase, layer: int, step: int) -> list[FaultPlan]:
        here = (self.assignment.rank, phase, layer, step, self.assignment.generation)
        return [plan for plan in self.plans if (plan.rank, plan.phase, plan.layer, plan.step, plan.generation) == here]

    def _strike(self, plan: FaultPlan) -> None:
        """One fault of a whole process, now."""
        if plan.kind == "disk full":
            self._writes_lost = 1
        elif plan.kind == "tell":
            tell_and_wait(Path(plan.signals))
        elif plan.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif plan.kind in ("exception", "error"):
            raise InjectedError("injected")
        elif plan.kind == "hold":
            time.sleep(HOLD_S)
        else:
            if plan.kind != "kill":
                step = COMMITTED.get((plan.phase, plan.layer, plan.step))
                if step is not None:  # a later one would be taken in place of the damaged one
                    wait_for(folder_of(self.assignment.run_dir, step) / MANIFEST, COMMIT_S)
                corrupt_newest(self.assignment.run_dir, plan.kind.removeprefix("corrupt "))
            os.kill(os.getpid(), signal.SIGKILL)


def corrupt_newest(run_dir: AnyPath, what: str) -> None:
    """Flip a bit in the middle of a file of the newest committed checkpoint, if there is one: a shard, the manifest, or
    a constant, which the checkpoints before name as well.
    """
    committed = find(run_dir / "checkpoints", f"step-*/{MANIFEST}")
    if committed:
        folder = run_dir / "checkpoints" / CONSTANTS if what == "constant" else committed[-1].parent
        path = committed[-1] if what == "manifest" else find(folder, "*.safetensors")[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))


def tell_and_wait(signals: Path) -> None:
    """A rank's part of kind `tell`."""
    (signals / "here").touch()
    wait_for(signals / "go", HOLD_S)


def wait_for(path: AnyPath, limit_s: float) -> None:
    """Until a file is there.

    Raises
    ------
    TimeoutError
    """
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not come within {limit_s:g} s")
        time.sleep(0.02)


def inject(kind: Kind, layer: SimilarityMatchingConv2d) -> None:
    """Let one rank's layer, or the making of its batch, suffer one fault now."""
    if kind == "error":
        raise InjectedError("injected")
    elif kind in ERRORS:
        layer._learnt = partial(_raise, ERRORS[kind])  # type: ignore[method-assign]
    elif kind == "explode":
        with torch.no_grad():
            layer.feedforward *= 1e6
    else:
        with torch.no_grad():
            getattr(layer, kind.removeprefix("nan "))[-1].view(-1)[0] = torch.nan


def _raise(error: Exception, *_: Any) -> Any:
    raise error


def faulty_training(*plans: FaultPlan) -> type[FaultyTraining]:
    """The program with these faults."""
    return type("PlannedTraining", (FaultyTraining,), {"plans": plans})


def faulty_worker(*plans: FaultPlan) -> type[Worker]:
    """A worker that runs the program with these faults."""
    return type("PlannedWorker", (Worker,), {"training_class": faulty_training(*plans)})
