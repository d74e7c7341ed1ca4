"""One panel of a coordinate check as inline SVG: colors from the page's style sheet, so that it is dark in the dark.

Every line has its name, slope and verdict as a tooltip.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from crystal.mup.coord_check import CoordCheck
from crystal.mup.coord_panels import Line, Panel, bundles, spread

WIDTH, HEIGHT = 360, 208  # of the drawing's own units; a page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 236, 8, 182  # of the axes
_LABELS, _LETTERS = 12, 19  # beside the axes, and of one of them


def svg(check: CoordCheck, panel: Panel, limits: tuple[float, float]) -> str:
    """limits: of the y axis."""
    scale = _Scale(check.sizes, limits)
    parts = [_grid(check, scale), *(_line(check, line, scale) for line in panel.lines)]
    for power in panel.expected:
        begin = panel.guide(power)
        end = begin * (check.sizes[-1] / check.sizes[0]) ** power
        parts.append(f'<path class="guide" d="{scale.path(check.sizes[:: len(check.sizes) - 1], (begin, end))}"/>')
    parts.append(_names(panel, scale))
    what = html.escape(f"{panel.statistic} against {check.along}: {panel.count()}".replace("\n", " "))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}">{"".join(parts)}</svg>'


class _Scale:
    """From sizes and values to the drawing's units."""

    def __init__(self, sizes: Sequence[int], limits: tuple[float, float]):
        self.left, self.right = math.log2(sizes[0]), math.log2(sizes[-1])
        self.bottom, self.top = map(math.log2, limits)

    def x(self, size: float) -> float:
        inner = (math.log2(size) - self.left) / (self.right - self.left)
        return _LEFT + 8 + inner * (_RIGHT - _LEFT - 16)

    def y(self, octave: float) -> float:
        return _BOTTOM - (octave - self.bottom) / (self.top - self.bottom) * (_BOTTOM - _TOP)

    def path(self, sizes: Sequence[int], values: Sequence[float]) -> str:
        places = zip(sizes, values, strict=True)
        return "M" + "L".join(f"{self.x(size):.1f} {self.y(math.log2(value)):.1f}" for size, value in places)


def _grid(check: CoordCheck, scale: _Scale) -> str:
    apart = math.ceil((scale.top - scale.bottom) / 6)
    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_RIGHT - _LEFT}" height="{_BOTTOM - _TOP}"/>']
    for octave in range(math.ceil(scale.bottom / apart) * apart, math.floor(scale.top) + 1, apart):
        y = scale.y(octave)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 4}" y="{y + 3:.1f}">2<tspan dy="-4">{octave}</tspan></text>')
    for size in check.sizes[:: math.ceil(len(check.sizes) / 6)]:
        parts.append(f'<path class="grid" d="M{scale.x(size):.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text class="mid" x="{scale.x(size):.1f}" y="{_BOTTOM + 12}">{size}</text>')
    parts.append(f'<text class="mid" x="{(_LEFT + _RIGHT) / 2}" y="{HEIGHT - 3}">{check.along}</text>')
    return "".join(parts)


def _line(check: CoordCheck, line: Line, scale: _Scale) -> str:
    row = line.row
    slope = "" if row.slope is None else f"slope {row.slope:+z.2f}, "
    expected = "" if row.expected is None else f"expected {row.expected:g}, "
    title = html.escape(f"{line.name}: {slope}{expected}{row.verdict}")
    along = scale.path(check.sizes, line.values)
    marks = ""
    for size, value in zip(check.sizes, line.values, strict=True):
        x, y = scale.x(size), scale.y(math.log2(value))
        if row.verdict == "FAIL":
            marks += f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
        else:
            marks += f"M{x:.1f} {y:.1f}h0"
    name = f"{line.kind.split()[0]} {row.verdict}"
    return (
        f'<g class="line {name}"><title>{title}</title><path class="near" d="{along}"/><path d="{along}"/>'
        f'<path class="mark" d="{marks}"/></g>'
    )


def _names(panel: Panel, scale: _Scale) -> str:
    """Labels beside the axes, pushed apart where they would touch."""
    octaves = scale.top - scale.bottom
    found = bundles(panel, octaves, _LABELS, _LETTERS)
    places = spread([bundle.end for bundle in found], octaves / _LABELS, scale.bottom)
    parts = []
    for bundle, place in zip(found, places, strict=True):
        y = scale.y(place)
        parts.append(
            f'<g class="line {bundle.kind.split()[0]} {bundle.verdict}"><path d="M{_RIGHT + 1} '
            f'{scale.y(bundle.end):.1f}L{_RIGHT + 8} {y:.1f}"/>'
            f'<text x="{_RIGHT + 10}" y="{y + 3:.1f}">{html.escape(bundle.label)}</text></g>'
        )
    return "".join(parts)
