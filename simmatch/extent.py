"""Sizes along the two axes of a map: one number for both, or (height, width). A signal is a map of height 1."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Extent = int | tuple[int, int]
"""One number for both axes, or (height, width)."""


def pair(extent: Extent) -> tuple[int, int]:
    """(height, width).

    >>> pair(5), pair((1, 32))
    ((5, 5), (1, 32))
    """
    return (extent, extent) if isinstance(extent, int) else extent


def pooled_size(size: tuple[int, int], pool: Extent | None) -> tuple[int, int]:
    """Height and width of a map after pooling to `pool`, along each axis; None: no pooling.

    >>> pooled_size((24, 24), 7), pooled_size((1, 29), (1, 4)), pooled_size((1, 29), None)
    ((7, 7), (1, 4), (1, 29))
    """
    return size if pool is None else pair(pool)


def at_most(size: tuple[int, int], pool: Extent | None) -> tuple[int, int]:
    """Height and width of a map after larger axes are pooled down to `pool`; None: no pooling.

    >>> at_most((24, 24), 7), at_most((1, 29), 4), at_most((2, 2), 4)
    ((7, 7), (1, 4), (2, 2))
    """
    if pool is None:
        return size
    height, width = pair(pool)
    return min(size[0], height), min(size[1], width)


def shown(extent: Extent) -> str:
    """An extent in a message.

    >>> shown(5), shown((1, 32))
    ('5', '1 × 32')
    """
    return str(extent) if isinstance(extent, int) else " × ".join(map(str, extent))


def _checked(least: int, *words: str) -> BeforeValidator:
    """A validator with messages of its own: those of a union would name every alternative."""

    def check(value: Any) -> Any:
        if value in words:
            return value
        if isinstance(value, (list, tuple)):
            if len(value) == 2 and all(type(side) is int and side >= least for side in value):
                return tuple(value)
            raise ValueError(f"expected [height, width] of at least {least} each, got {list(value)}")
        if type(value) is not int:
            alternatives = " or ".join(["[height, width]", *map(repr, words)])
            raise ValueError(f"expected an integer or {alternatives}, got {value!r}")
        if value < least:
            raise ValueError(f"expected greater than {'' if least else 'or equal to '}0, got {value}")
        return value

    return BeforeValidator(check)


PositiveExtent = Annotated[Extent, _checked(1)]
"""A field of a configuration: at least 1, or [height, width] of at least 1 each."""

NonNegativeExtent = Annotated[Extent, _checked(0)]
"""A field of a configuration: at least 0, or [height, width] of at least 0 each."""

KernelExtent = Annotated[Extent | Literal["full"], _checked(1, "full")]
"""A field of a configuration: as `PositiveExtent`, or `full`."""
