"""A profile of some updates: a trace of torch's profiler, and where their time went."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from simmatch.layer import SimilarityMatchingConv2d
from simmatch.observer import Observer, Update
from simmatch.parts import ENCODING, OTHERS, UPDATE, longest_kernels, time_per_part, timed

WARM_UP = 3
"""Updates of a layer before those that are recorded: in the first ones buffers are made and solvers compiled."""


class Trace:
    """A Chrome trace, which Perfetto (https://ui.perfetto.dev) opens.

    Parameters
    ----------
    text: the trace as JSON.

    Attributes
    ----------
    content: the trace as a file, JSON compressed by gzip.
    parts: time of every part of the recorded updates, see `simmatch.parts`.
    kernels: (name, calls, seconds) of the longest kernels on a device.

    >>> Trace(b'{"traceEvents": []}').parts["dynamics"].count
    0
    """

    def __init__(self, text: bytes) -> None:
        events = [event for event in json.loads(text)["traceEvents"] if "dur" in event]
        self.parts, self.kernels = time_per_part(events), longest_kernels(events)
        self.content = gzip.compress(text, mtime=0)


class Recorder:
    """Records what this thread does, and what it starts on a device, from `start` to `stop`.

    >>> recorder = Recorder(torch.device("cpu"))
    >>> recorder.start()
    >>> with timed("update"), timed("drive"):
    ...     product = torch.ones(3) @ torch.ones(3)
    >>> trace = recorder.stop()
    >>> trace.parts["drive"].count
    1
    """

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._prepared = self._started = False

    def prepare(self) -> None:
        """What takes long about the start, a second in a new process."""
        if not self._prepared:
            self._profiler.prepare_trace()
            self._prepared = True

    def start(self) -> None:
        self.prepare()
        self._profiler.start_trace()
        self._started = True

    def stop(self) -> Trace:
        """Raises `OSError` if there is no room for a temporary file."""
        self._profiler.stop_trace()
        with tempfile.TemporaryDirectory(prefix="simmatch-") as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))  # does not raise if it could not write
            try:
                return Trace(path.read_bytes())
            except ValueError as error:
                raise OSError(f"{path} is not complete: {error}") from error

    def abandon(self) -> None:
        """Stop without a trace."""
        if not self._started:
            self.start()  # what is only prepared cannot be stopped
        self._profiler.stop_trace()


@dataclass(frozen=True, eq=False)
class Recording:
    """The recorded updates of a layer.

    Attributes
    ----------
    layer: index of the layer in the stack.
    first: number of the first recorded update, counted from 1.
    updates: number of recorded updates, consecutive ones.
    trace: what was recorded; None if nothing was.
    missing: why nothing was recorded.

    >>> Recording(layer=0, first=4, updates=20, trace=Trace(b'{"traceEvents": []}')).updates
    20
    """

    layer: int
    first: int
    updates: int
    trace: Trace | None = None
    missing: str = ""


class Profile(Observer):
    """Records updates of every layer that learns, after `WARM_UP` updates of it, or as many as the layer still makes.
    Of layers that learn together, one after the other is recorded.

    A recorded update computes the same weights. It takes longer by about 2 µs for every operation of torch, and those
    after the recorded ones take no longer.

    Parameters
    ----------
    updates: number of updates of a layer to record.
    done: called for every layer, once its updates are recorded.

    Raises
    ------
    ValueError
        The number of updates is below 1.

    >>> from simmatch import LayerConfig, ModelConfig, fit_stack
    >>> recordings = []
    >>> model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3, pool=2),))
    >>> stack = fit_stack(model, torch.rand(1000, 1, 8, 8), observer=Profile(5, recordings.append))
    >>> [(recording.layer, recording.first, recording.updates) for recording in recordings]
    [(0, 4, 5)]
    >>> recordings[0].trace.parts["dynamics"].count
    5
    """

    def __init__(self, updates: int, done: Callable[[Recording], None]) -> None:
        if updates < 1:
            raise ValueError(f"updates: expected at least 1, got {updates}")
        self._updates, self._done = updates, done
        self._recorder: Recorder | None = None
        self._first = self._last = 0
        self._layer: int | None = None  # the one whose turn it is
        self._seen: dict[int, int] = {}  # updates of the layers that have not been recorded

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self._seen[index] = 0

    def encoding(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
        return timed(ENCODING)

    @contextmanager
    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        own = self._layer in (None, index)
        try:
            with timed(UPDATE if own else OTHERS):
                yield
                device, recorder = layer.feedforward.device, self._recorder if own else None
                if device.type == "cuda" and recorder is not None and int(layer.updates) == self._last:
                    torch.cuda.synchronize(device)  # its time is complete once the device is done
        except BaseException:
            if self._recorder is not None:
                self._recorder.abandon()
                self._recorder = None
            raise

    def updated(self, update: Update) -> None:
        index, left = update.index, update.total - update.number
        if self._layer == index and self._recorder is not None and update.number == self._last:
            recorder, self._recorder, self._layer = self._recorder, None, None
            self._finish(index, recorder)
            return
        if index not in self._seen:  # recorded, or being recorded
            return
        self._seen[index] += 1
        seen = self._seen[index]
        warm_up = min(WARM_UP, seen + left - 1)
        if left == 0 or warm_up == 0:
            del self._seen[index]
            single = "the layer had a single update left"
            self._done(
                Recording(index, update.number, 0, missing=single if seen == 1 else "other layers were recorded")
            )
        elif seen >= warm_up - 1 and self._layer in (None, index):
            self._layer = index
            self._recorder = self._recorder or Recorder(update.layer.feedforward.device)
            self._recorder.prepare()  # one update earlier, so that ranks do not wait for each other's in the first one
            if seen >= warm_up:
                del self._seen[index]
                self._first, self._last = update.number + 1, update.number + min(self._updates, left)
                self._recorder.start()

    def _finish(self, index: int, recorder: Recorder) -> None:
        """Hand out what was recorded."""
        count = self._last - self._first + 1
        try:
            recording = Recording(index, self._first, count, recorder.stop())
        except OSError as error:
            recording = Recording(index, self._first, 0, missing=f"no temporary file: {error}")
        self._done(recording)
