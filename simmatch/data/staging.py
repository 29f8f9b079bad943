"""Batches on their way from the host to the device: each is read and copied one ahead of its use.

Where images are read from a disk, or the device is not the CPU, a thread prepares the next batch while the current one
is used: it reads the images as stored, copies them into pinned memory, and from there to the device on a stream of its
own. So neither the reading nor the copy is in the way of an update. Where images are in the CPU's own memory, there is
nothing to hide: they are selected when they are needed, without a thread.

What is handed out, and in which order, does not depend on the thread. An exception while a batch is prepared is raised
where that batch is asked for.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

THREAD = "simmatch-input"
"""Name of the thread."""

IN_FLIGHT = 3
"""Batches between those that the host has received and those that the device has used."""


class Images(Protocol):
    """Images wherever they are stored: their number, and some of them by index. A tensor [N, C, H, W] is one.

    Several threads may read them at the same time: one of those that `staged` starts, and another that is about to end.

    >>> images: Images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    >>> len(images), images[torch.tensor([3, 7])].shape
    (10, torch.Size([2, 1, 8, 8]))
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Images [n, C, H, W], uint8 or floating-point in [0, 1], with indices int64 [n]."""
        ...


def select(images: Images, chosen: Tensor | slice) -> Tensor:
    """Images [n, C, H, W] as stored, by index or range; a range of a tensor is a view.

    Raises
    ------
    ValueError
        Images that are no tensor return something else.

    >>> select(torch.zeros(10, 1, 8, 8), torch.tensor([3, 7])).shape, select(torch.zeros(10, 1, 8, 8), slice(4)).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([4, 1, 8, 8]))
    """
    if not isinstance(images, Tensor):
        indices = torch.arange(*chosen.indices(len(images))) if isinstance(chosen, slice) else chosen
        found = images[indices]
        if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != len(indices):
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"images: expected a tensor [{len(indices)}, C, H, W] for as many indices, got {given}")
        return found
    if isinstance(chosen, slice):
        return images[chosen]
    return images.index_select(0, moved(chosen, images.device))  # several times as fast as `images[chosen]`


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the host to a CUDA device through pinned memory, so that the host does not wait.

    >>> moved(torch.zeros(2), torch.device("cpu"))
    tensor([0., 0.])
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    # the allocator keeps a pinned block until the copy from it has ended
    return tensor.pin_memory().to(device, non_blocking=True)


def in_memory(images: Images, device: torch.device) -> bool:
    """Whether selecting images is all there is to do before a device can use them.

    >>> in_memory(torch.zeros(10, 1, 8, 8), torch.device("cpu"))
    True
    """
    return isinstance(images, Tensor) and images.device.type == device.type


def staged(batches: Iterator[Tensors], device: torch.device, *, ahead: bool) -> Generator[Tensors]:
    """The tensors of every batch on the device, in order; ready for what the caller starts on its current stream.

    Parameters
    ----------
    batches: prepares the tensors of one batch after the other, on the host.
    device: where they are needed.
    ahead: whether a thread prepares each batch while the one before it is used. The iterator's `close` ends it.

    >>> batches = ((torch.full((2,), number),) for number in range(3))
    >>> [values.tolist() for (values,) in staged(batches, torch.device("cpu"), ahead=True)]
    [[0, 0], [1, 1], [2, 2]]
    """
    if not ahead:
        for tensors in batches:
            yield tuple(moved(tensor, device) for tensor in tensors)
        return
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    transfer = Transfer(device)

    def prepare() -> None:
        with transfer.stream():
            while wanted.get():
                try:
                    ready.put((transfer.send(next(batches)), None))
                except BaseException as fault:
                    ready.put((None, fault))

    # a read that never returns does not delay the program's exit
    threading.Thread(target=prepare, name=THREAD, daemon=True).start()
    wanted.put(True)
    try:
        while True:
            sent, fault = ready.get()
            if isinstance(fault, StopIteration):
                return
            if fault is not None:
                raise fault
            wanted.put(True)
            yield transfer.receive(sent)
    finally:
        wanted.put(False)


class Transfer:
    """Copies from the host to a device; to a CUDA device through pinned memory, on a stream of its own.

    The host may start many updates before the device makes them. So the thread that sends waits until the device is no
    more than `IN_FLIGHT` batches behind: else every batch in between would take memory there.

    >>> transfer = Transfer(torch.device("cpu"))
    >>> with transfer.stream():
    ...     sent = transfer.send((torch.zeros(2),))
    >>> transfer.receive(sent)
    (tensor([0., 0.]),)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._used: deque[torch.cuda.Event] = deque()  # each: all batches before the one that was received then

    def stream(self) -> Any:
        """The context in which batches are prepared and sent."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, tensors: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        """Start the copies; the event is recorded when they have arrived."""
        if self._stream is None:
            return tensors, None
        if len(self._used) > IN_FLIGHT:
            self._used.popleft().synchronize()
        return tuple(moved(tensor, self._device) for tensor in tensors), self._stream.record_event()

    def receive(self, sent: tuple[Tensors, torch.cuda.Event | None]) -> Tensors:
        """Let the current stream wait for the copies; the host does not."""
        tensors, arrived = sent
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._used.append(current.record_event(done))
            for tensor in tensors:
                tensor.record_stream(current)  # its memory serves another batch only when this stream is done with it
        return tensors
