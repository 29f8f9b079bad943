"""Profiles of updates.

Oracles: a slow count, microsecond by microsecond; the clock around the updates; the same training without a profile.
"""

import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from simmatch import LayerConfig, ModelConfig, SimilarityMatchingConv2d, Stack, Update, fit_stack
from simmatch.config import TrainConfig
from simmatch.parts import (
    BETWEEN,
    ENCODING,
    OTHERS,
    PARTS,
    PREFIX,
    REST,
    longest_kernels,
    recording,
    time_per_part,
    timed,
)
from simmatch.profile import WARM_UP, Profile, Recording

EPOCHS = 3
UPDATES = EPOCHS * 5
MODEL = ModelConfig(
    layers=(
        LayerConfig(out_channels=8, kernel_size=3, pool=2, train=TrainConfig(epochs=EPOCHS, batch_size=40)),
        LayerConfig(out_channels=8, kernel_size=2, train=TrainConfig(epochs=EPOCHS, batch_size=40)),
    )
)


def images() -> torch.Tensor:
    return torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def profiled(updates: int) -> tuple[Stack, list[Recording]]:
    recordings: list[Recording] = []
    return fit_stack(MODEL, images(), observer=Profile(updates, recordings.append)), recordings


def event(name: str, start: float, duration: float, cat: str = "user_annotation", **more: Any) -> dict[str, Any]:
    full = PREFIX + name if cat == "user_annotation" else name
    return {"ph": "X", "cat": cat, "name": full, "tid": 1, "ts": start, "dur": duration, **more}


# -- what a trace says -------------------------------------------------------------------------------------------------


def nested(start: int, stop: int, draw: random.Random, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Random ranges inside one another, in no order."""
    while stop - start > 4 and depth < 4:
        first = draw.randint(start, stop - 2)
        last = draw.randint(first + 1, stop)
        yield from nested(first + 1, last, draw, depth + 1)  # shorter, so that the inner one is known
        yield event(draw.choice(PARTS[:8]), first, last - first)
        start = last


@pytest.mark.parametrize("seed", range(20))
def test_every_microsecond_belongs_to_the_innermost_range(seed: int) -> None:
    draw = random.Random(seed)
    events = [event("update", first, 90) for first in (100, 200, 300)]
    events += [inner for first in (100, 200, 300) for inner in nested(first, first + 90, draw, 1)]
    events += [event("waiting", 192, 5), event("exchange", 20, 30), event("exchange", 400, 30)]  # the last two: outside
    events += [event("drive", 100, 200) | {"tid": 2}, event("aten::mm", 100, 50, cat="cpu_op")]
    draw.shuffle(events)
    expected: Counter[str] = Counter()
    ours = [e for e in events if e["tid"] == 1 and e["cat"] == "user_annotation"]
    for moment in range(100, 390):
        around = [e for e in ours if e["ts"] <= moment < e["ts"] + e["dur"]]
        name = min(around, key=lambda e: e["dur"])["name"].removeprefix(PREFIX) if around else BETWEEN
        expected[REST if name == "update" else name] += 1
    found = time_per_part(events)
    assert tuple(found) == PARTS
    assert {name: round(1e6 * found[name].host_s) for name in PARTS} == {name: expected[name] for name in PARTS}
    assert sum(times.host_s for times in found.values()) == pytest.approx(290e-6, rel=1e-9)


def test_kernels_belong_to_the_part_that_started_them() -> None:
    """The device runs behind: kernels may end after the part, the update, even after the last range."""
    events = [
        event("update", 0, 100),
        event("drive", 10, 20),
        event("dynamics", 40, 50),
        event("cudaLaunchKernel", 12, 2, "cuda_runtime", args={"correlation": 1}),
        event("gemm", 60, 30, "kernel", args={"correlation": 1}) | {"tid": 7},
        event("cuLaunchKernelEx", 45, 2, "cuda_driver", args={"correlation": 2}),
        event("fused", 95, 40, "kernel", args={"correlation": 2}) | {"tid": 7},
        event("cudaMemcpyAsync", 32, 2, "cuda_runtime", args={"correlation": 3}),
        event("Memcpy HtoD", 33, 4, "gpu_memcpy", args={"correlation": 3}) | {"tid": 8},
        event("cudaStreamSynchronize", 50, 30, "cuda_runtime", args={"correlation": 4}),
        event("fused", 5, 1000, "kernel", args={"correlation": 99}) | {"tid": 7},  # started before the recording
        event("cudaLaunchKernel", 20, 1, "cuda_runtime", args={"correlation": 5}) | {"tid": 2},  # by another thread
        event("other", 21, 500, "kernel", args={"correlation": 5}) | {"tid": 7},
    ]
    found = time_per_part(events)
    host = {name: round(1e6 * times.host_s) for name, times in found.items() if times.host_s}
    device = {name: round(1e6 * times.device_s) for name, times in found.items() if times.device_s}
    assert host == {"drive": 20, "dynamics": 20, "waiting": 30, REST: 30}
    assert device == {"drive": 30, "dynamics": 40, REST: 4}
    name, calls, seconds = longest_kernels(events, most=1)[0]
    assert (name, calls, seconds) == ("fused", 2, pytest.approx(1040e-6))


def test_a_trace_without_updates_has_no_time() -> None:
    assert {(t.host_s, t.device_s, t.count) for t in time_per_part([event("drive", 0, 10)]).values()} == {(0, 0, 0)}


# -- a real training ---------------------------------------------------------------------------------------------------


class Timed(Profile):
    """Reads the clock as every update begins and ends."""

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        super().started(index, layer)
        self.began, self.ended = {}, {}

    @contextmanager
    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        number = int(layer.updates) + 1
        self.began[number] = time.perf_counter()
        with super().updating(index, layer):
            yield
        self.ended[number] = time.perf_counter()

    def updated(self, update: Update) -> None:
        time.sleep(0.002)
        super().updated(update)


def test_parts_add_up_to_the_time_of_the_updates() -> None:
    recordings: list[Recording] = []
    seconds: list[tuple[float, float]] = []

    def done(recorded: Recording) -> None:
        recordings.append(recorded)
        began, ended, numbers = observer.began, observer.ended, range(recorded.first, recorded.first + recorded.updates)
        gaps = sum(began[after] - ended[before] for before, after in pairwise(numbers))
        seconds.append((ended[numbers[-1]] - began[numbers[0]], gaps))

    observer = Timed(6, done)
    fit_stack(MODEL, images(), observer=observer)
    assert [(one.layer, one.first, one.updates) for one in recordings] == [(0, WARM_UP + 1, 6), (1, WARM_UP + 1, 6)]
    for recorded, (expected, gaps) in zip(recordings, seconds, strict=True):
        assert recorded.trace is not None
        parts = recorded.trace.parts
        assert sum(times.host_s for times in parts.values()) == pytest.approx(expected, rel=0.02, abs=2e-4)
        for name in ("input", "drive", "dynamics", "statistics", "plasticity", "bound", REST):
            # a batch is fetched, then prepared; of the bound, the first step also tells which channels are dead
            assert parts[name].count == 6 * (2 if name in ("input", "bound") else 1)
            assert parts[name].host_s > 0
        assert (parts["exchange"].count, parts["waiting"].count) == (0, 0)  # nothing to exchange
        assert parts[BETWEEN].host_s == pytest.approx(gaps, rel=0.02, abs=2e-4)
        assert all(times.device_s == 0 for times in parts.values())
        assert recorded.trace.kernels == []


def test_the_file_is_a_trace_of_the_updates() -> None:
    _, recordings = profiled(4)
    assert recordings[0].trace is not None
    trace = json.loads(gzip.decompress(recordings[0].trace.content))
    ranges = [e for e in trace["traceEvents"] if str(e.get("name")).startswith(PREFIX)]
    assert Counter(e["name"] for e in ranges)[f"{PREFIX}update"] == 4
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])
    updates = [(e["ts"], e["ts"] + e["dur"]) for e in ranges if e["name"] == f"{PREFIX}update"]
    for e in ranges:  # every part lies in an update
        assert any(start <= e["ts"] and e["ts"] + e["dur"] <= stop for start, stop in updates)


def test_layers_that_learn_together_are_recorded_one_after_the_other() -> None:
    """Of the other one, and of what is encoded for it, a trace tells the time only; what is learnt does not change."""
    together = MODEL.model_copy(update={"schedule": "together"})
    recordings: list[Recording] = []
    plain = fit_stack(together, images())
    stack = fit_stack(together, images(), observer=Profile(4, recordings.append))
    assert [(one.layer, one.first, one.updates) for one in recordings] == [(0, WARM_UP + 1, 4), (1, WARM_UP + 5, 4)]
    for recorded, others in zip(recordings, (3, 3), strict=True):
        assert recorded.trace is not None
        parts = recorded.trace.parts
        assert (parts["dynamics"].count, parts[OTHERS].count, parts[ENCODING].count) == (4, others, 3)
        assert min(parts[OTHERS].host_s, parts[ENCODING].host_s) > 0
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, stack.state_dict()[name]), name


def test_a_profile_does_not_change_what_is_learnt() -> None:
    plain, (stack, recordings) = fit_stack(MODEL, images()), profiled(5)
    assert len(recordings) == 2
    assert not recording()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, stack.state_dict()[name]), name


@pytest.mark.parametrize(
    ("asked", "found"), [(1, 1), (UPDATES - WARM_UP, UPDATES - WARM_UP), (1000, UPDATES - WARM_UP)]
)
def test_as_many_updates_as_there_are(asked: int, found: int) -> None:
    _, recordings = profiled(asked)
    assert [(one.first, one.updates) for one in recordings] == [(WARM_UP + 1, found)] * 2


@pytest.mark.parametrize(("epochs", "first", "found"), [(1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2)])
def test_a_short_layer_is_warmed_up_for_less(epochs: int, first: int, found: int) -> None:
    train = TrainConfig(epochs=epochs, batch_size=200)
    model = ModelConfig(layers=(LayerConfig(out_channels=8, kernel_size=3, train=train),))
    recordings: list[Recording] = []
    fit_stack(model, images(), observer=Profile(20, recordings.append))
    assert [(one.first, one.updates, one.trace is None) for one in recordings] == [(first, found, found == 0)]
    assert recordings[0].missing == ("" if found else "the layer had a single update left")


def test_an_error_ends_the_recording() -> None:
    class Failing(Profile):
        @contextmanager
        def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
            with super().updating(index, layer):
                yield
                if recording():
                    raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fit_stack(MODEL, images(), observer=Failing(5, pytest.fail))
    assert not recording()


def test_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    stack, recordings = profiled(5)
    assert [(one.updates, one.trace) for one in recordings] == [(0, None)] * 2
    assert recordings[0].missing.startswith("no temporary file: ")
    assert int(stack.layer(1).updates) == UPDATES


def test_at_least_one_update() -> None:
    with pytest.raises(ValueError, match="updates: expected at least 1, got 0"):
        Profile(0, print)


def test_a_range_costs_nothing_without_a_profiler() -> None:
    """The same object for all: nothing is made, and no operator of torch is called."""
    assert timed("drive") is timed("dynamics")
