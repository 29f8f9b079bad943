"""What becomes of an image file: every mode, size and orientation against arithmetic on the same pixels in numpy."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import decode_jpeg

from simmatch.data.config import DataConfig
from simmatch.data.decoding import MAX_PIXELS, ImagePolicy, decode
from simmatch.data.formats import DataError

SHARED = Path(os.environ.get("SIMMATCH_SHARED", Path(__file__).parents[4] / "shared"))

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = rng.integers(0, 256, (5, 7, 1), dtype=np.uint8)
CMYK = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (5, 7), dtype=np.uint16)


def saved(values: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file with these pixels."""
    image = values if isinstance(values, Image.Image) else Image.fromarray(values, mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint(255 - (255 - values.astype(float)) * alpha / 255)


def luma(rgb: np.ndarray) -> np.ndarray:
    return np.rint(rgb.astype(float) @ [0.299, 0.587, 0.114])[..., None]


def with_palette() -> bytes:
    image = Image.fromarray(GREY)
    image.putpalette(np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 9)], 1).astype(np.uint8).tobytes())
    return saved(image)


PALETTE = np.stack([GREY, 255 - GREY, np.full_like(GREY, 9)], 2)

CASES: dict[str, tuple[bytes, int | None, np.ndarray]] = {
    "RGB": (saved(RGB), None, RGB),
    "RGB, one channel": (saved(RGB), 1, luma(RGB)),
    "grey": (saved(GREY), None, GREY[..., None]),
    "grey, three channels": (saved(GREY), 3, GREY[..., None].repeat(3, 2)),
    "one bit": (saved(Image.fromarray(GREY > 127)), None, 255.0 * (GREY > 127)[..., None]),
    "palette": (with_palette(), None, PALETTE),
    "palette, one channel": (with_palette(), 1, luma(PALETTE)),
    "alpha": (saved(np.concatenate([RGB, ALPHA], 2)), None, over_white(RGB, ALPHA)),
    "grey and alpha": (
        saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA[..., 0])])),
        None,
        over_white(GREY[..., None], ALPHA),
    ),
    "a transparent colour": (
        saved(GREY, transparency=int(GREY[2, 3])),
        None,
        np.where(GREY[2, 3] == GREY, 255, GREY)[..., None],
    ),
    "CMYK": (
        saved(Image.frombytes("CMYK", (7, 5), CMYK.tobytes()), kind="TIFF"),
        None,
        (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:].astype(float)) / 255,
    ),
    "16 bits, PNG": (saved(DEEP), None, DEEP[..., None] >> 8),
    "16 bits, PGM": (b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(), 3, (DEEP[..., None] >> 8).repeat(3, 2)),
    "animation": (
        saved(Image.fromarray(GREY), kind="GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
        1,
        GREY[..., None],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mode(case: str) -> None:
    data, channels, expected = CASES[case]
    pixels = decode(data, ImagePolicy(channels=channels))
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
    assert pixels.shape == np.moveaxis(expected, 2, 0).shape
    exact = not any(word in case for word in ("one channel", "alpha", "CMYK"))  # those round differently, by one
    np.testing.assert_allclose(pixels, np.moveaxis(expected, 2, 0), atol=0 if exact else 1)


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}
"""EXIF orientation → what turns the stored image upright, from the standard (JEITA CP-3451)."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    plain, turned = (saved(GREY, kind=kind, **options) for options in ({}, {"exif": exif}))
    assert np.array_equal(decode(turned, ImagePolicy())[0], TURNS[orientation](decode(plain, ImagePolicy())[0]))


@pytest.mark.parametrize(
    ("stored", "resized", "wanted"),
    [
        ((24, 48), (8, 16), (8, 16)),
        ((20, 20), (32, 32), (32, 32)),
        ((40, 120), (8, 24), (8, 8)),
        ((60, 20), (30, 10), (10, 10)),
        ((50, 100), (20, 40), (20, 30)),
    ],
)
def test_images_are_resized_and_cropped(
    stored: tuple[int, int], resized: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """Oracle: torch, in floating point, on the whole image; then the middle of it."""
    values = rng.integers(0, 256, (*stored, 3), dtype=np.uint8)
    x = torch.from_numpy(values).permute(2, 0, 1)[None].double()
    whole = F.interpolate(x, resized, mode="bilinear", antialias=True)[0].round()
    top, left = ((have - want) // 2 for have, want in zip(resized, wanted, strict=True))
    expected = whole[:, top : top + wanted[0], left : left + wanted[1]]
    np.testing.assert_allclose(decode(saved(values), ImagePolicy(size=wanted)), expected, atol=1)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_jpeg_is_decoded_as_by_torchvision() -> None:
    smooth = torch.nn.functional.interpolate(torch.from_numpy(RGB).permute(2, 0, 1)[None].float(), (61, 83))[0].byte()
    data = saved(smooth.permute(1, 2, 0).numpy(), kind="JPEG", quality=80)
    expected = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    np.testing.assert_array_equal(decode(data, ImagePolicy()), expected)


def test_all_photographs_are_decoded() -> None:
    if not (folder := SHARED / "data" / "photos").is_dir():
        pytest.skip(f"no photographs in {folder}; SIMMATCH_SHARED names the folder")
    policy = ImagePolicy.of(DataConfig(path=str(folder), size=32, channels=3))
    pixels = np.stack([decode(file.read_bytes(), policy) for file in sorted(folder.iterdir())])
    assert pixels.shape == (292, 3, 32, 32)
    assert pixels.std(axis=(1, 2, 3)).min() > 5  # none is blank


def png(width: int, height: int) -> bytes:
    """A file of a few kB that declares a black image of one bit a pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", r"cannot be decoded: empty"),
    "text": (b"not an image", r"cannot be decoded: not an image in one of the formats JPEG, PNG, .*"),
    "half a JPEG": (saved(RGB, kind="JPEG")[:400], r"cannot be decoded: .*(t|T)runcated.*"),
    "half a PNG": (saved(RGB)[:60], r"cannot be decoded: .+"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"cannot be decoded: not an image .*"),
    "larger than Pillow warns of": (png(9460, 9460), r"(cannot be decoded: .*89491600 pixels.*|expected at most .*)"),
    "larger than Pillow takes": (png(50_000, 50_000), r"expected at most .* pixels, got more than twice.*"),
    "floating point": (saved(GREY.astype(np.float32), kind="TIFF"), r"expected 8 or 16 bits .*, got floating.*"),
    "32 bits": (saved(DEEP.astype(np.int32) * 2, kind="TIFF"), r"expected 8 or 16 bits per channel, got 32"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_decoded_is_one_line(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(DataError, match=f"^{message}$") as caught:
        decode(data, ImagePolicy(size=(8, 8)))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_also_where_warnings_are_not_errors() -> None:
    with pytest.raises(DataError, match=f"expected at most {MAX_PIXELS:,} pixels, got 9460 × 9460"):
        decode(png(9460, 9460), ImagePolicy())


@settings(max_examples=200, deadline=None)
@given(
    data=st.sampled_from([saved(RGB), saved(RGB, kind="JPEG"), saved(RGB, kind="WEBP"), with_palette()]),
    at=st.integers(0, 1000),
    value=st.integers(0, 255),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_byte_gives_an_image_or_an_error_of_the_data(data: bytes, at: int, value: int) -> None:
    changed = bytearray(data)
    changed[at % len(data)] = value
    with suppress(DataError):
        assert decode(bytes(changed), ImagePolicy(size=(4, 4), channels=3)).shape == (3, 4, 4)
