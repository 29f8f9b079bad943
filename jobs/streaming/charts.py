"""Charts of a page without scripts: lines, marks and spans as inline SVG that stretches with the page.

Only shapes are in the SVG, whose axes stretch independently; all text is HTML beside it, so it has the same size on a
wide screen and on a telephone. Colours are CSS variables of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1000, 100
"""Units of the drawing, whatever its size on a screen."""

COLOURS = 7
"""Different ones; further lines are dashed."""

LEGEND = 12
"""Lines that are named."""


@dataclass(frozen=True)
class Line:
    """One line; None leaves a gap. `style`: classes of CSS, see `style_of`."""

    name: str
    ys: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Mark:
    """A vertical line at a place of the axis."""

    x: float
    style: str


@dataclass(frozen=True)
class Span:
    """A coloured part of the axis."""

    start: float
    stop: float
    name: str
    style: str


def text(value: object) -> str:
    """Text from outside, fit to stand in HTML: no markup, nothing that turns the text around it.

    >>> text('<script>"a" & \\u202eb')
    '<bdi>&lt;script&gt;&quot;a&quot; &amp; �b</bdi>'
    """
    shown = "".join(each if each.isprintable() or each == " " else "�" for each in str(value))
    return f"<bdi>{escape(shown)}</bdi>"


def style_of(index: int, *, thin: bool = False) -> str:
    """Classes of the line of candidate `index`."""
    dashed = " dashed" if index >= COLOURS else ""
    return f"c{index % COLOURS}{dashed}{' thin' if thin else ''}"


def number(value: float) -> str:
    """A number on an axis.

    >>> number(0.25), number(1_500_000), number(12_000)
    ('0.25', '1.5 M', '12 k')
    """
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == ' k' else limit):.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` or below to `high` or above.

    >>> ticks(0.62, 0.97), ticks(0, 0, whole=True)
    ([0.6, 0.7, 0.8, 0.9, 1.0], [0.0, 1.0])
    """
    if whole and low == high == 0:
        return [0.0, 1.0]
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = max((high - low) / most, 1.0 if whole else 0.0)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def chart(
    title: str,
    xs: Sequence[float],
    lines: Sequence[Line],
    marks: Iterable[Mark] = (),
    *,
    unit: str = "",
    most: float = math.inf,
    least_range: float = 0.0,
    whole: bool = False,
) -> str:
    """Lines over a common axis, which begins at 0; no value is below 0.

    Parameters
    ----------
    title: HTML.
    xs: places of the points, ascending.
    most: greatest value that there can be.
    least_range: least range of the axis.
    whole: values are counts.
    """
    known = [y for line in lines for y in line.ys if y is not None and math.isfinite(y)]
    if not known or not xs or xs[-1] <= 0:
        return f'<figure><figcaption>{title}</figcaption><p class="none">nothing yet</p></figure>'
    low, high = min(known), max(known)
    if high - low < least_range:
        high = min(most, (low + high + least_range) / 2)
        low = max(0.0, high - least_range)
    at = [tick for tick in ticks(low, high, whole=whole) if 0 <= tick <= most]
    low, high = at[0], at[-1]
    shapes = [f'<path class="grid" d="M0 {_y(tick, low, high)}H{WIDTH}"/>' for tick in at]
    shapes += [f'<path class="{mark.style}" d="M{_x(mark.x, xs[-1])} 0V{HEIGHT}"/>' for mark in marks]
    shapes += [f'<path class="line {line.style}" d="{_path(xs, line.ys, low, high)}"/>' for line in lines]
    names = "".join(_key(line.name, line.style) for line in lines[:LEGEND] if line.name)
    more = f"and {len(lines) - LEGEND} more" if len(lines) > LEGEND else ""
    labels = "".join(
        f'<span style="top:{100 - 100 * (tick - low) / (high - low):.4g}%">{number(tick)}{unit}</span>' for tick in at
    )
    return (
        f"<figure><figcaption>{title} <span>{names}{more}</span></figcaption>"
        f'<div class="plot"><div class="ys">{labels}</div>{_svg(shapes)}</div>{_axis(xs[-1])}</figure>'
    )


def band(title: str, end: float, spans: Sequence[Span], marks: Iterable[Mark] = ()) -> str:
    """Coloured parts of an axis from 0 to `end`; names of the styles in order of appearance."""
    if end <= 0:
        return f'<figure><figcaption>{title}</figcaption><p class="none">nothing yet</p></figure>'
    shapes = []
    for span in spans:
        left, right = _x(span.start, end), _x(span.stop, end)
        shapes.append(f'<path class="area {span.style}" d="M{left} 0H{right}V{HEIGHT}H{left}Z"/>')
    shapes += [f'<path class="{mark.style}" d="M{_x(mark.x, end)} 0V{HEIGHT}"/>' for mark in marks]
    named = list(dict.fromkeys((span.name, span.style) for span in spans))
    names = "".join(_key(name, style) for name, style in named[:LEGEND])
    return (
        f"<figure><figcaption>{title} <span>{names}</span></figcaption>"
        f'<div class="plot low"><div class="ys"></div>{_svg(shapes)}</div>{_axis(end)}</figure>'
    )


def _svg(shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'


def _key(name: str, style: str) -> str:
    return f'<span class="key {style}">{text(name)}</span>'


def _axis(end: float) -> str:
    labels = "".join(f"<span>{number(end * part / 4)}</span>" for part in range(5))
    return f'<div class="xs">{labels}</div>'


def _path(xs: Sequence[float], ys: Sequence[float | None], low: float, high: float) -> str:
    parts, pen_up, alone = [], True, False
    for x, y in zip(xs, ys, strict=True):
        if y is None or not math.isfinite(y):
            parts += ["h1"] if alone else []  # a single point would not be seen
            pen_up, alone = True, False
            continue
        parts.append(f"{'M' if pen_up else 'L'}{_x(x, xs[-1])} {_y(y, low, high)}")
        alone, pen_up = pen_up, False
    return "".join(parts) + ("h1" if alone else "")


def _x(value: float, end: float) -> str:
    return f"{min(max(WIDTH * value / end, 0), WIDTH):.5g}"


def _y(value: float, low: float, high: float) -> str:
    return f"{HEIGHT * (high - value) / (high - low):.4g}"
