"""Faults on purpose: a plan says which rank fails, at which layer and update, and how.

The faults enter where real ones would: a value in a rank's rows, an exception in a rank's own arithmetic, a process
that is gone. What the program then does is its own code.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.inputs import LayerInputs
from cluster.training import Training
from cluster.worker import Worker
from simmatch.geometry import Patches
from simmatch.layer import SimilarityMatchingConv2d

HOLD_S = 60.0
"""How long a held rank stays away: longer than every limit in the tests, and the test kills it anyway."""

Kind = Literal["nan feedforward", "nan lateral", "nan label", "explode", "exception", "error", "kill", "hold"]
"""
nan …       a NaN in the last own row of W, M or V, before the update
explode     the own rows of W a million times too large, before the update
exception   the rank's statistics raise, in the middle of the update
error       the rank's next batch raises, outside of what the ranks tell each other
kill        the process ends, by SIGKILL
hold        the training thread stays away for `HOLD_S`
"""


class InjectedError(RuntimeError):
    """What a planned exception raises."""


@dataclass(frozen=True)
class FaultPlan:
    """Rank `rank` fails at update `step` (the first is 1) of layer `layer`, in the group of one generation."""

    rank: int
    layer: int
    step: int
    kind: Kind
    generation: int = 0


class FaultyTraining(Training):
    """The program of `cluster.training`, with faults where its plans say."""

    plans: tuple[FaultPlan, ...] = ()

    def update(
        self, index: int, layer: SimilarityMatchingConv2d, inputs: LayerInputs, chosen: Tensor, labels: Tensor | None
    ) -> tuple[Patches, Any]:
        here = (self.assignment.rank, index, int(layer.updates) + 1, self.assignment.generation)
        for plan in self.plans:
            if (plan.rank, plan.layer, plan.step, plan.generation) == here:
                inject(plan.kind, layer, inputs)
        return super().update(index, layer, inputs, chosen, labels)


def inject(kind: Kind, layer: SimilarityMatchingConv2d, inputs: LayerInputs) -> None:
    """Let one rank's layer, or its process, suffer one fault now."""
    if kind == "error":
        inputs.batch = _raise  # type: ignore[method-assign]
    elif kind == "exception":
        layer._statistics = _raise  # type: ignore[method-assign]
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hold":
        time.sleep(HOLD_S)
    elif kind == "explode":
        with torch.no_grad():
            layer.feedforward *= 1e6
    else:
        with torch.no_grad():
            getattr(layer, kind.removeprefix("nan "))[-1].view(-1)[0] = torch.nan


def _raise(*_: Any) -> Any:
    raise InjectedError("injected")


def faulty_training(*plans: FaultPlan) -> type[FaultyTraining]:
    """The program with these faults."""
    return type("PlannedTraining", (FaultyTraining,), {"plans": plans})


def faulty_worker(*plans: FaultPlan) -> type[Worker]:
    """A worker that runs the program with these faults."""
    return type("PlannedWorker", (Worker,), {"training_class": faulty_training(*plans)})
