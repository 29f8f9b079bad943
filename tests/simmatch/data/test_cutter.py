"""Windows of a signal that is still arriving.

Oracle: the windows of the whole recording, as `simmatch.data.windows` cuts it.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simmatch.data.config import DataConfig
from simmatch.data.cutter import Cuts, Cutter
from simmatch.data.recordings import gaps_of
from simmatch.data.series import Array, Series
from simmatch.data.windows import Windows, WindowShape, runs, starts_in


def of_the_whole(values: Array, times: Array, shape: WindowShape) -> Cuts:
    gaps = gaps_of(times, DataConfig(path="a.csv", window=2, time_column="time", period=1.0), "a")
    found = runs(~np.isfinite(values).all(axis=1), gaps, shape.hold)
    starts = np.concatenate([np.empty(0, np.int64), *(starts_in(run, shape) for run in found)])
    places = np.stack([0 * starts, starts], axis=1)
    windows = Windows([Series.of(values)], [found[:, 0]], places, shape, digest="")[:]
    return list(zip(windows, (starts + shape.length - 1).tolist(), strict=True))


def assert_equal(found: Cuts, expected: Cuts) -> None:
    assert [last for _, last in found] == [last for _, last in expected]
    assert all(torch.equal(mine, other) for (mine, _), (other, _) in zip(found, expected, strict=True))


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Array, Array]:
    """Values [T, C] and times [T], with missing values and gaps."""
    length, channels = draw(st.integers(1, 60)), draw(st.integers(1, 2))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    values = generator.normal(size=(length, channels))
    often = draw(st.sampled_from([0.0, 0.1, 0.5]))
    lost = generator.random((length, channels)) < often
    values[lost] = generator.choice([np.nan, np.inf, -np.inf], size=int(lost.sum()))
    steps = np.where(generator.random(length) < draw(st.sampled_from([0.0, 0.1])), 1.6, 1.4)
    return values, np.cumsum(steps)


@given(
    recording=recordings(),
    length=st.integers(1, 9),
    hop=st.integers(1, 12),
    hold=st.integers(0, 3),
    scale=st.sampled_from(["standard", "center", "none"]),
    chunks=st.lists(st.integers(0, 20), max_size=10),
    restart=st.booleans(),
)
def test_windows_are_those_of_the_whole_recording(
    recording: tuple[Array, Array], length: int, hop: int, hold: int, scale: str, chunks: list[int], restart: bool
) -> None:
    """For any division into chunks, with a new cutter from the state of the one before at each of them, or not."""
    values, times = recording
    shape = WindowShape(length, hop, scale, hold=hold)  # type: ignore[arg-type]
    cutter, found = Cutter(shape, values.shape[1], period_s=1.0), Cuts()
    edges = np.minimum(np.cumsum([0, *chunks, len(values)]), len(values))
    for start, stop in itertools.pairwise(edges):
        if restart:
            state, cutter = cutter.state(), Cutter(shape, values.shape[1], period_s=1.0)
            cutter.restore(state)
        found += cutter.add(values[start:stop], times[start:stop])
    assert_equal(found + cutter.end(), of_the_whole(values, times, shape))
    assert cutter.samples == len(values)


def test_a_window_waits_only_for_values_that_may_be_missing() -> None:
    cutter = Cutter(WindowShape(3, 1, "none", hold=1), channels=1)
    counts = [len(cutter.add(np.array([[value]]), np.zeros(1))) for value in (1, 2, 3, np.nan, 4, np.nan, np.nan, 5)]
    assert counts == [0, 0, 1, 0, 2, 0, 0, 0]


def test_memory_is_that_of_a_window() -> None:
    """One sample at a time, far more than are kept; those of the state are no more than are used."""
    shape = WindowShape(64, 16)
    cutter, one = Cutter(shape, channels=2, period_s=1.0), np.zeros((1, 2))
    for number in range(5000):
        cutter.add(one, np.array([float(number)]))
    assert cutter._rows.nbytes <= 4 * 64 * 16
    assert len(cutter.state()["rows"]) <= 64


def test_an_end_begins_a_new_recording() -> None:
    """Whose windows are those of a cutter of its own, but for the numbers."""
    values, shape = np.random.default_rng(0).normal(size=(50, 2)), WindowShape(8, 3)
    cutter, own = Cutter(shape, channels=2, period_s=1.0), Cutter(shape, channels=2, period_s=1.0)
    cutter.add(values[:21], np.arange(21.0))
    assert cutter.end() == []
    found = cutter.add(values[21:], np.arange(21.0, 50.0))
    assert_equal(found, [(window, last + 21) for window, last in own.add(values[21:], np.arange(29.0))])


@pytest.mark.parametrize(("values", "times"), [((4, 3), 4), ((4, 2), 3), ((4,), 4)])
def test_what_does_not_fit_is_refused(values: tuple[int, ...], times: int) -> None:
    with pytest.raises(ValueError, match=r"expected values \[T, 2\] and times \[T\], got"):
        Cutter(WindowShape(4, 2), channels=2).add(np.zeros(values), np.zeros(times))


def test_a_state_of_other_channels_is_refused() -> None:
    state: dict[str, Tensor] = Cutter(WindowShape(4, 2), channels=3).state()
    with pytest.raises(ValueError, match=r"expected samples \[T, 2\], got \[0, 3\]"):
        Cutter(WindowShape(4, 2), channels=2).restore(state)
