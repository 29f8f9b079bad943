"""From the bytes of an image file to uint8 [C, H, W], by one policy for every format, size and colour mode.

Pillow decodes. (torchvision's decoders are faster, 1.7 times on photographs and 3 times on JPEG of 32 × 32, but know
few modes, and are deprecated since version 0.29.) Only formats whose decoder is part of Pillow are read, so no content
of a file is ever executed. The arithmetic is in integers: with one version of Pillow every node gets the same pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.documents import shortened
from simmatch.extras import extra

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Of files that are taken for images, in lower case."""

READABLE = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of the formats that are read; others, such as EPS, would start another program."""

LEAVE_OUT = "data.damaged: skip leaves such images out"
"""Told with the image that ends a run."""

MAX_PIXELS = 89_478_485
"""Largest image; Pillow warns of anything larger, since a small file can declare a size that fills the memory."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [C, H, W]."""


@dataclass(frozen=True)
class ImagePolicy:
    """What every image is turned into; see `decode`.

    >>> ImagePolicy.of(DataConfig(path="photos", size=96, channels=3))
    ImagePolicy(size=(96, 96), channels=3)
    """

    size: tuple[int, int] | None = None
    """(H, W) of the result; None: as stored."""

    channels: int | None = None
    """1 (grey) or 3 (RGB); None: 1 for grey images, 3 for all others."""

    @classmethod
    def of(cls, config: DataConfig) -> ImagePolicy:
        """The policy of `data.size` and `data.channels`."""
        size = (config.size, config.size) if isinstance(config.size, int) else config.size
        return cls(size, config.channels)


def decode(data: bytes, policy: ImagePolicy) -> Pixels:
    """The pixels of an image file, uint8 [C, H, W].

    In this order:

    1. Of an animation, the first image is taken.
    2. The image is turned upright as its EXIF orientation says.
    3. 16-bit values are reduced to their upper 8 bits.
    4. Transparent parts show a white background.
    5. Palette, CMYK and other colours become RGB, without colour management. With one channel RGB becomes luma
       (0.299 R + 0.587 G + 0.114 B, ITU-R BT.601); with three, grey values are repeated.
    6. The image is resized (bilinear, antialiased) until the short side fits, and the long side is cropped around the
       centre.

    Raises
    ------
    DataError
        The image cannot be decoded, has more than `MAX_PIXELS`, or other than 8 or 16 bits per channel. The message
        does not name the image, which is unknown here.
    ImportError
        Pillow is not installed; it is part of the extra `images`.

    >>> decode(b"P5 2 1 255 " + bytes([7, 9]), ImagePolicy())
    array([[[7, 9]]], dtype=uint8)
    >>> decode(b"P5 2 1 255 " + bytes([7, 9]), ImagePolicy(size=(4, 4), channels=3)).shape
    (3, 4, 4)
    >>> decode(b"text", ImagePolicy())
    Traceback (most recent call last):
    simmatch.data.formats.DataError: cannot be decoded: not an image in one of the formats JPEG, PNG, WEBP, ...
    """
    with extra("images"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise DataError("cannot be decoded: empty")
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got {width} × {height}")
            ImageOps.exif_transpose(image, in_place=True)
            plain = _plain(image, policy.channels)
        if policy.size is not None:
            plain = ImageOps.fit(plain, policy.size[::-1], method=Image.Resampling.BILINEAR)
        values = np.asarray(plain)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own check, of the size that the file declares
        raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got more than twice as many") from None
    except UnidentifiedImageError:
        raise DataError(f"cannot be decoded: not an image in one of the formats {', '.join(READABLE)}") from None
    except Exception as error:  # a damaged image can raise almost any exception
        raise DataError(f"cannot be decoded: {shortened(str(error)) or type(error).__name__}") from None
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def _plain(image: Image.Image, channels: int | None) -> Image.Image:
    """The image in mode L or RGB."""
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DataError("expected 8 or 16 bits per channel, got 32")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("expected 8 or 16 bits per channel, got floating-point values")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return image.convert("L" if channels == 1 or (channels is None and grey) else "RGB")
