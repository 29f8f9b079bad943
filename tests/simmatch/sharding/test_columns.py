"""Ranges of columns: how they split a batch, and that a range's part of a batch is enough for its drive and sums."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from simmatch.batch import Batch
from simmatch.geometry import PatchConfig, correlate, draw_positions, drive, prepare
from simmatch.sharding.columns import split_columns
from simmatch.sharding.covering import covering


@given(total=st.integers(1, 10_000), parts=st.integers(1, 40))
def test_ranges_cover_all_columns_evenly(total: int, parts: int) -> None:
    ranges = split_columns(total, parts)
    assert [ranges[0].start, ranges[-1].stop, len(ranges)] == [0, total, parts]
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    counts = {len(columns) for columns in ranges}
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        PatchConfig(2, 3, 1, 0),
        PatchConfig(2, 3, 1, 1, contrast=True),
        PatchConfig(2, 3, 1, 2),
        PatchConfig(2, 4, 2, 1, contrast=True),
        PatchConfig(2, 4, 3, 3),
        PatchConfig(2, 2, 3, 0),
        PatchConfig(2, 2, 1, 3),  # padding beyond the kernel
        PatchConfig(2, 7, 1, 0),  # the kernel covers the width
        PatchConfig(2, (4, 2), (2, 3), (1, 2), contrast=True),
        PatchConfig(2, (1, 3), (1, 2), (0, 1)),
    ],
)
def test_parts_give_the_drive_and_sums_of_the_whole(config: PatchConfig, images: int, parts: int) -> None:
    """Drives of all ranges side by side, and sums added up, against those of the whole batch."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(images, 2, 9, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 2, *config.kernel, generator=generator, dtype=torch.float64)
    patches = prepare(x, config)
    total = images * patches.positions
    y = torch.rand(5, total, generator=generator, dtype=torch.float64)
    drives, sums = [], torch.zeros_like(weight)
    for columns in split_columns(total, parts):
        part, inside = covering(columns, Batch(patches))
        drives.append(drive(part.patches, weight)[:, inside])
        own = F.pad(y[:, columns.start : columns.stop], (inside.start, part.columns - inside.stop))
        sums += correlate(part.patches, own)
    torch.testing.assert_close(torch.cat(drives, dim=1), drive(patches, weight), rtol=0, atol=1e-13)
    torch.testing.assert_close(sums, correlate(patches, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
@pytest.mark.parametrize("images", [1, 3])
def test_drawn_positions_split_alike(images: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(4)
    config = PatchConfig(2, 3, 1, 1, contrast=True)
    x = torch.rand(images, 2, 6, 6, generator=generator, dtype=torch.float64)
    patches = prepare(x, config, positions=draw_positions(5, images, (6, 6), 4))
    weight = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    parts_of_drive = []
    for columns in split_columns(images * 5, parts):
        part, inside = covering(columns, Batch(patches))
        parts_of_drive.append(drive(part.patches, weight)[:, inside])
    torch.testing.assert_close(torch.cat(parts_of_drive, dim=1), drive(patches, weight), rtol=0, atol=1e-13)


def test_a_range_of_one_image_needs_few_rows_of_it() -> None:
    """Eight owners of one image of 32 × 32 with a 5 × 5 kernel: 4 rows of the map, and padding's margin of 2 around."""
    config = PatchConfig(1, 5, 1, 2)
    patches = prepare(torch.rand(1, 1, 32, 32), config)
    computed = [covering(columns, Batch(patches))[0].patches.map_size for columns in split_columns(1024, 8)]
    assert computed == [(6, 32), *[(8, 32)] * 6, (6, 32)]
