"""A rank that holds a stack which learns from a stream: the driver calls it for every batch.

Nothing here depends on Ray, as in `cluster.worker`. A batch comes to rank 0, which broadcasts it over the mesh; rank 0
alone answers with tensors. All ranks get the same calls in the same order.
"""

from __future__ import annotations

import faulthandler
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.training import Assignment
from cluster.worker import Worker
from simmatch.data.staging import moved
from simmatch.model import InputConfig
from simmatch.online.encoded import Encoded
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.precision import exact_float32

Arrays = dict[str, np.ndarray[Any, Any]]
"""Tensors by name, as they travel to and from rank 0."""

Header = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of every tensor of a call."""


@dataclass(frozen=True)
class StreamAssignment(Assignment):
    """What a rank of a stream has to do; of `config` what says how stacks are built and ranks meet is used.

    Attributes
    ----------
    source: the records.
    rate: how learning rates change.
    """

    source: InputConfig = field(kw_only=True)
    rate: RateConfig = field(kw_only=True)


@dataclass(frozen=True)
class Reply:
    """Of rank 0 to a call.

    Attributes
    ----------
    updates, learning_rate, calibrated: of the stack after the call.
    seconds: of processor time for the call.
    """

    tensors: Arrays
    updates: int
    learning_rate: float
    calibrated: bool
    seconds: float = 0.0


class OnlineRank(Worker):
    """One rank of a group that learns from a stream."""

    assignment: StreamAssignment

    def _folder_error(self) -> str:
        return ""  # ranks of a stream write nothing

    def begin(self, threads: int, *, samples: bool = False) -> None:
        """Build this rank's part of the stack."""
        self._renew()
        torch.set_num_threads(threads)
        exact_float32()
        config = self.assignment.config
        self.stack = OnlineStack(
            config.model,
            self.assignment.source,
            seed=config.seed,
            rate=self.assignment.rate,
            mesh=self._mesh,
            reduce=config.reduce,
            dtype=getattr(torch, config.dtype),
            device=self._device,
        )
        self._last: tuple[int, Encoded] | None = None

    def perform(self, name: str, options: dict[str, Any], header: Header, arrays: Arrays | None) -> Reply | float:
        """One call of all ranks: a method of the stack, with plain options and tensors that rank 0 has. The others
        answer with their seconds of processor time."""
        began = time.process_time()
        faulthandler.cancel_dump_traceback_later()  # exchanges have limits of their own
        try:
            result = getattr(self, f"_{name}")(**options, **self._received(header, arrays))
        finally:
            self._renew()
        if self.assignment.rank > 0:
            return time.process_time() - began
        tensors = {key: tensor.detach().cpu().numpy() for key, tensor in (result or {}).items()}
        stack, seconds = self.stack, time.process_time() - began
        return Reply(tensors, stack.updates, stack.learning_rate, stack.calibrated, seconds)

    def _received(self, header: Header, arrays: Arrays | None) -> dict[str, Tensor]:
        tensors = {}
        for name, dtype, shape in header:
            if arrays is not None:
                tensor = moved(torch.from_numpy(arrays[name].copy()), self._device)
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            if tensor.numel() > 0:
                self._mesh.everyone.broadcast(tensor, source=0).wait()
            tensors[name] = tensor
        return tensors

    # ------------------------------------------------------------------------------------------- what is called

    def _calibrate(self, x: Tensor) -> None:
        self.stack.calibrate(x)

    def _encode(self, number: int, x: Tensor) -> dict[str, Tensor]:
        encoded = self.stack.encode(x)
        self._last = number, encoded
        found = {"features": encoded.features, "activity": encoded.activity}
        found |= {f"signals.{name}": value for name, value in encoded.signals.items()}
        return found if encoded.label_scores is None else {**found, "scores": encoded.label_scores}

    def _learn(self, number: int, x: Tensor | None = None, **known: Tensor) -> None:
        self.stack.learn(self._encoded(number, x), known.get("labels"), known.get("weights"))

    def _learn_labels(self, number: int, labels: Tensor, x: Tensor | None = None) -> None:
        self.stack.learn_labels(self._encoded(number, x), labels)

    def _encoded(self, number: int, x: Tensor | None) -> Encoded:
        """The batch that was encoded last, unless there is another x; it is learnt from once."""
        if x is not None:
            self._encode(number, x)
        assert self._last is not None
        last, encoded = self._last
        assert last == number
        self._last = None
        return encoded

    def _raise_rate(self) -> None:
        self.stack.raise_rate()

    def _grow(self, num_classes: int) -> None:
        self.stack.grow(num_classes)

    def _state(self) -> dict[str, Tensor]:
        return self.stack.state()

    def _restore(self, **state: Tensor) -> None:
        self.stack.restore(state)
