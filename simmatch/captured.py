"""Updates of one layer, replayed as a CUDA graph.

An update of a small layer is a few hundred kernels of some microseconds each. The host needs longer to start them than
the device to run them. Captured once in a CUDA graph, they are started together.

A graph has fixed shapes and addresses. So an update that is captured keeps all state in tensors that it changes in
place, never waits for the device (`partial_fit(…, recorded=True)`), and reads its batch from tensors into which each
batch is copied. The first updates, and batches of another size, run uncaptured. The same updates in the same order
give the same bits either way.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from simmatch.inputs import Staged
from simmatch.parts import recording
from simmatch.sharding.exchange import Exchange

T = TypeVar("T")

WARM_UP = 3
"""Uncaptured updates of a batch size before one is captured: kernels get compiled, and libraries their workspaces."""


class Graph(Protocol):
    """Work of a device that is recorded once and then repeated.

    >>> graph: Graph | None = new_graph(torch.device("cpu"))
    >>> graph is None
    True
    """

    def capture(self, function: Callable[[], T]) -> T:
        """Record what the function starts, without running it; its result is filled by `replay`."""
        ...

    def replay(self) -> None:
        """Run what was recorded, on the tensors that were used then."""

    def close(self) -> None:
        """Release the memory that the recorded work uses."""


class CudaGraph:
    """`torch.cuda.CUDAGraph` as a `Graph`, of work on one device, which need not be torch's current one.

    >>> graph = CudaGraph(torch.device("cuda", 0))  # doctest: +SKIP
    >>> total = graph.capture(lambda: x + y)  # doctest: +SKIP
    >>> graph.replay()  # doctest: +SKIP
    """

    def __init__(self, device: torch.device) -> None:
        self._graph, self._device = torch.cuda.CUDAGraph(), device

    def capture(self, function: Callable[[], T]) -> T:
        # torch's own stream for captures belongs to the device that was the current one at the first capture
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # the outer context restores the stream if capturing fails; other threads may use the device meanwhile
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        self._graph.reset()


def new_graph(device: torch.device) -> Graph | None:
    """A graph of work on a device; None where work is not started separately.

    >>> new_graph(torch.device("cpu")) is None
    True
    """
    return CudaGraph(device) if device.type == "cuda" else None


class Updates(Generic[T]):
    """Makes the updates of a layer, captured if there is a graph.

    Parameters
    ----------
    make: makes the update of a batch on the device, and returns tensors in any form. A captured update overwrites what
        the one before it returned.
    graph: from `new_graph`; None: updates are not captured.
    exchanges: those of the layer, which count the exchanges of replays too.

    Warns
    -----
    UserWarning
        Once, if an update cannot be captured. Updates then go on uncaptured.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> updates = Updates(lambda batch: batch.source.sum(), graph=None, exchanges=[IDENTITY])
    >>> updates(Staged(torch.ones(5, 2), labels=None, images=5))
    tensor(10.)
    >>> updates.close()
    """

    def __init__(self, make: Callable[[Staged], T], graph: Graph | None, exchanges: Sequence[Exchange]) -> None:
        self._make, self._graph, self._exchanges = make, graph, exchanges
        self._seen: Counter[Any] = Counter()
        self._captured: tuple[Staged, T] | None = None
        self._made: list[tuple[int, int]] = []  # exchanges and bytes of one replay

    def __call__(self, batch: Staged) -> T:
        """Make one update."""
        if self._graph is None or recording():  # a replay has no parts that a profiler could tell apart
            return self._make(batch)
        if self._captured is None:
            self._seen[_shape(batch)] += 1
            if self._seen[_shape(batch)] > WARM_UP:
                self._capture(self._graph, batch)
        if self._captured is None or _shape(self._captured[0]) != _shape(batch):
            return self._make(batch)
        inputs, result = self._captured
        for target, given in zip(_tensors(inputs), _tensors(batch), strict=True):
            if target is not None:
                assert given is not None
                target.copy_(given)
        self._graph.replay()
        for exchange, made in zip(self._exchanges, self._made, strict=True):
            exchange.count(*made)
        return result

    def _capture(self, graph: Graph, batch: Staged) -> None:
        with torch.inference_mode(False):  # so that batches can be copied there in inference mode and outside of it
            source, labels, weights = (None if each is None else each.clone() for each in _tensors(batch))
        assert source is not None
        inputs = replace(batch, source=source, labels=labels, weights=weights)
        before = [(exchange.num_exchanges, exchange.bytes_exchanged) for exchange in self._exchanges]
        try:
            self._captured = inputs, graph.capture(lambda: self._make(inputs))
        except Exception as error:
            self.close()
            errors = [error, error.__context__]  # ending a capture in which something failed is an error of its own
            why = ", after ".join(f"{type(one).__name__}: {one}" for one in errors if one is not None)
            warnings.warn(f"updates are not captured in a CUDA graph, and take longer: {why}", stacklevel=3)
        self._made = []
        for exchange, (exchanges, received) in zip(self._exchanges, before, strict=True):
            made = exchange.num_exchanges - exchanges, exchange.bytes_exchanged - received
            exchange.count(-made[0], -made[1])  # captured, not made
            self._made.append(made)

    def close(self) -> None:
        """Release the memory of the graph. Updates after it are not captured."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._captured = None


def _shape(batch: Staged) -> tuple[Any, ...]:
    """What a captured update has fixed of its batch."""
    return batch.source.shape, batch.source.dtype, batch.labels is None, batch.weights is None, batch.images


def _tensors(batch: Staged) -> tuple[Tensor | None, ...]:
    return batch.source, batch.labels, batch.weights
