"""Windows of recordings: where they lie, what is in them, and that no more is read than needed.

Oracles: numpy's sliding windows, loops in plain Python, and arrays as numpy itself reads them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmatch.data.formats import DataError
from simmatch.data.series import OpenRecordings, Series, series_of_npy, series_of_npz
from simmatch.data.windows import Windows, WindowShape, filled, in_turn, runs, scaled, starts_in
from tests.open_files import open_files


def expected_runs(missing: list[bool], gaps: set[int], hold: int) -> list[list[int]]:
    """Sample by sample: a run ends at a gap, and at the first missing sample of a row of more than `hold`."""
    found: list[list[int]] = []
    begun: int | None = None
    for sample, lost in enumerate(missing):
        if sample in gaps and begun is not None:
            found.append([begun, sample])
            begun = None
        ahead = 0  # missing samples from here to the next finite one or gap
        while sample + ahead < len(missing) and missing[sample + ahead] and not (ahead and sample + ahead in gaps):
            ahead += 1
        before = sample > 0 and missing[sample - 1] and sample not in gaps
        if lost and not before and begun is not None and ahead > hold:
            found.append([begun, sample])
            begun = None
        if not lost and begun is None:
            begun = sample
    return found if begun is None else [*found, [begun, len(missing)]]


@given(
    missing=st.lists(st.booleans(), min_size=1, max_size=30), gaps=st.sets(st.integers(1, 29)), hold=st.integers(0, 4)
)
def test_runs_are_those_of_a_loop(missing: list[bool], gaps: set[int], hold: int) -> None:
    inside = sorted(gap for gap in gaps if gap < len(missing))
    assert runs(np.array(missing), inside, hold).tolist() == expected_runs(missing, set(inside), hold)


@pytest.mark.parametrize(("length", "hop"), [(4, 1), (4, 3), (5, 5), (7, 9), (20, 1)])
def test_windows_are_numpys_sliding_ones(length: int, hop: int) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    shape = WindowShape(length, hop, "none")
    starts = starts_in((0, 20), shape)
    windows = Windows([Series.of(values)], [np.array([0])], np.stack([0 * starts, starts], 1), shape, digest="")
    expected = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)[::hop]  # [N, C, T]
    assert windows.shape == (len(expected), 3, 1, length)
    assert torch.equal(windows[:].squeeze(2), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("scale", ["standard", "center", "none"])
def test_scales_are_their_formulas(scale: str) -> None:
    """Beside a constant channel, whose deviation is the floor, and one far from zero."""
    values = np.random.default_rng(1).normal(size=(2, 3, 50))
    values[:, 1], values[:, 2] = 3.0, values[:, 2] + 1e5
    result = scaled(values, WindowShape(50, 50, scale, floor=0.1))  # type: ignore[arg-type]
    assert result.dtype == np.float32
    for window in range(2):
        for channel in range(3):
            x = [float(value) for value in values[window, channel]]
            mean = sum(x) / 50
            deviation = (sum((value - mean) ** 2 for value in x) / 50) ** 0.5
            shift, factor = (0.0 if scale == "none" else mean), (max(deviation, 0.1) if scale == "standard" else 1.0)
            expected = [(value - shift) / factor for value in x]
            # float32 rounds to 6e-8 of values up to 5; of 1e5 without a shift, to 4e-3
            np.testing.assert_allclose(result[window, channel], expected, rtol=1e-6, atol=1e-6)


def test_a_window_does_not_depend_on_those_beside_it() -> None:
    values = np.random.default_rng(2).normal(size=(400, 2))
    shape = WindowShape(37, 5)
    starts = starts_in((0, 400), shape)
    windows = Windows([Series.of(values)], [np.array([0])], np.stack([0 * starts, starts], 1), shape, digest="")
    together = windows[torch.arange(len(windows)).flip(0)].flip(0)
    assert torch.equal(torch.cat([windows[torch.tensor([index])] for index in range(len(windows))]), together)
    assert torch.equal(windows[-3:], together[-3:])
    assert torch.equal(windows.take(torch.tensor([4, 1]))[:], together[[4, 1]])
    assert torch.equal(windows[torch.tensor([-1])], together[-1:])
    with pytest.raises(IndexError):
        windows[torch.tensor([len(windows)])]


def test_held_values_are_the_last_ones_of_the_run() -> None:
    """A window that begins with missing values takes what is before it; never from beyond a gap."""
    nan = np.nan
    values = np.array([[1.0, 10.0], [nan, 20.0], [nan, nan], [4.0, 40.0], [5.0, nan], [6.0, 60.0]])
    shape = WindowShape(2, 1, "none", hold=2)
    found = runs(~np.isfinite(values).all(axis=1), hold=2)
    assert found.tolist() == [[0, 6]]
    starts = starts_in(found[0], shape)
    windows = Windows([Series.of(values)], [found[:, 0]], np.stack([0 * starts, starts], 1), shape, digest="")
    expected = [[[1, 1], [10, 20]], [[1, 1], [20, 20]], [[1, 4], [20, 40]], [[4, 5], [40, 40]], [[5, 6], [40, 60]]]
    assert windows[:].squeeze(2).tolist() == expected
    behind = np.array([[7.0], [8.0], [nan], [9.0]])  # a gap before sample 2: nothing to hold there
    assert runs(~np.isfinite(behind).all(axis=1), [2], hold=2).tolist() == [[0, 2], [3, 4]]


def test_filled_leaves_what_is_there() -> None:
    whole = np.arange(6).reshape(3, 2)
    assert filled(whole) is whole


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=5), block=st.integers(1, 5))
def test_recordings_take_turns(counts: list[int], block: int) -> None:
    recording = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    waiting = [list(range(count)) for count in counts]
    expected = []
    while any(waiting):
        for index, windows in enumerate(waiting):
            expected += [(index, window) for window in windows[:block]]
            waiting[index] = windows[block:]
    order = in_turn(recording, number, block)
    assert list(zip(recording[order].tolist(), number[order].tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i2", "u1"])
@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_arrays_are_read_in_place(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = (np.random.default_rng(3).normal(size=shape) * 50).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", other=np.zeros(5), a=values)
    np.savez_compressed(tmp_path / "b.npz", a=values)
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    files = OpenRecordings()
    found = [
        series_of_npy(str(tmp_path / "a.npy"), "a.npy", files),
        dict(series_of_npz(str(tmp_path / "a.npz"), "a.npz", files))["a"],
        dict(series_of_npz(str(tmp_path / "b.npz"), "b.npz", files))["a"],
        series_of_npy(str(tmp_path / "f.npy"), "f.npy", files),
    ]
    expected = values.reshape(9, -1)
    for series in found:
        assert series.shape == expected.shape
        np.testing.assert_array_equal(series.read(2, 7), expected[2:7])
        np.testing.assert_array_equal(series.read(0, 0), expected[:0])
    assert [series.nbytes for series in found[:2]] == [0, 0]
    assert found[2].nbytes == values.nbytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array(["a"]), r"bad.npy: expected real numbers \[T\] or \[T, C\], got <U1 \[1\]"),
        (np.zeros((2, 2, 2)), r"bad.npy: expected real numbers .*got float64 \[2, 2, 2\]"),
        (np.zeros((0, 2)), r"bad.npy: expected real numbers .*got float64 \[0, 2\]"),
        (np.array([1j]), r"bad.npy: expected real numbers .*got complex128 \[1\]"),
        (np.array([object()]), r"bad.npy: expected real numbers .*got object \[1\]"),
        (b"no array", r"bad.npy: expected an array of numpy: .*magic"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)  # type: ignore[call-overload]
    with pytest.raises(DataError, match=message):
        series_of_npy(str(path), "bad.npy", OpenRecordings())


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    series = series_of_npy(str(path), "a.npy", OpenRecordings())
    os.truncate(path, 500)
    with pytest.raises(DataError, match=r"a.npy: expected .* bytes or more, got 500"):
        series.read(0, 1000)


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    files = OpenRecordings(most=2)
    for index in range(5):
        np.save(tmp_path / f"{index}.npy", np.full(4, index))
    all_series = [series_of_npy(str(tmp_path / f"{index}.npy"), f"{index}.npy", files) for index in range(5)]
    assert [int(series.read(1, 2)[0, 0]) for series in [*all_series, *all_series]] == [*range(5), *range(5)]
    assert open_files(tmp_path) == [str(tmp_path / f"{index}.npy") for index in (3, 4)]
