"""Curves as SVG: a measure against the kept bytes, one line a policy, and the best at each size behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .numbers import Method, SettingResults, is_full, method_label, ranking

# Of page.css, for light and dark pages: Okabe and Ito's colours, which differ for every kind of colour blindness.
COLOURS = tuple(f"var(--line{number})" for number in range(8))
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "plus", "ring")
OTHERS = "var(--others)"
# Ticks of an axis within each power of ten, by the number of powers that it spans.
_STEPS = ((0.7, (1, 1.5, 2, 3, 4, 5, 7)), (1.7, (1, 2, 5)), (2.6, (1, 3)), (math.inf, (1,)))


@dataclass(frozen=True)
class ChartFrame:
    """Measures of a chart, in the units of its SVG.

    Attributes:
        width, height: of the whole chart.
        left, right, top, bottom: margins around the axes.
        kl_floor: a KL below it, in nats, is drawn there: the axis is logarithmic.
    """

    width: int = 460
    height: int = 320
    left: int = 46
    right: int = 14
    top: int = 26
    bottom: int = 42
    kl_floor: float = 1e-4

    @property
    def right_edge(self) -> int:
        """x of the axes' right end."""
        return self.width - self.right

    @property
    def lower_edge(self) -> int:
        """y of the axes' lower end."""
        return self.height - self.bottom


FRAME = ChartFrame()


@dataclass(frozen=True)
class LineStyle:
    """The look of a policy's line; without a marker it is thin and grey, one of the others."""

    colour: str
    marker: str | None
    dashes: str = ""


def styles(settings: Sequence[SettingResults]) -> dict[Method, LineStyle]:
    """The policies that are drawn in colour: as many as can be told apart, those of the highest mean accuracy."""
    ranked = [method for method in ranking(settings) if not is_full(method)]
    dashes = ("", "7 3") * 4  # so that of two lines that coincide both are seen
    chosen = {method: LineStyle(*look) for method, *look in zip(ranked, COLOURS, MARKERS, dashes, strict=False)}
    return {method: chosen.get(method, LineStyle(OTHERS, None)) for method in ranked}


def accuracy_chart(setting: SettingResults, drawn: dict[Method, LineStyle]) -> str:
    """Mean accuracy over the tasks against kept bytes; "" where bytes were not measured."""
    lines = {method: [(point.bytes, point.accuracy.value) for point in _points(setting, method)] for method in drawn}
    full = None if setting.full is None else setting.full.accuracy.value
    return _chart(lines, drawn, "accuracy, mean over tasks", _Linear(), full, best=max)


def kl_chart(setting: SettingResults, drawn: dict[Method, LineStyle]) -> str:
    """KL to the full cache against kept bytes, both logarithmic; "" where one of them was not measured."""
    lines = {
        method: [(point.bytes, max(point.kl.value, FRAME.kl_floor)) for point in _points(setting, method) if point.kl]
        for method in drawn
    }
    values = [value for line in lines.values() for _, value in line]
    return _chart(lines, drawn, "KL to the full cache, nats", _Log(values), None, best=min) if values else ""


def legend(drawn: dict[Method, LineStyle]) -> str:
    """The legend of the policies' lines, as HTML."""
    parts = []
    for method, style in drawn.items():
        if style.marker is not None:
            parts.append(f'<span class="key">{_swatch(style)}{escape(method_label(method))}</span>')
    grey = [method_label(method) for method, style in drawn.items() if style.marker is None]
    if grey:
        parts.append(f'<span class="key">{_swatch(LineStyle(OTHERS, None))}grey: {escape(", ".join(grey))}</span>')
    parts.append('<span class="key"><svg width="26" height="12" aria-hidden="true"><path d="M1 10H13V3H25" '
                 'class="front"/></svg>best at its size or below</span>')  # fmt: skip
    return f'<div class="legend">{"".join(parts)}</div>'


class _Linear:
    """0 to 1."""

    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __call__(self, value: float) -> float:
        return value

    def text(self, value: float) -> str:
        return f"{value:g}"


class _Log:
    """A logarithmic axis that holds all values, with ticks at 1, 2 and 5 times powers of ten, fewer on a long one."""

    def __init__(self, values: Sequence[float], spare: float = 1.15) -> None:
        low, high = min(values) / spare, max(values) * spare
        self._low, self._range = math.log10(low), max(math.log10(high) - math.log10(low), 1e-9)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = next(steps for span, steps in _STEPS if self._range < span)
        self.ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]

    def __call__(self, value: float) -> float:
        return (math.log10(value) - self._low) / self._range

    def text(self, value: float) -> str:
        return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _points(setting: SettingResults, method: Method) -> list:
    found = [point for (one, _), point in setting.points.items() if one == method and point.bytes > 0]
    return sorted(found, key=lambda point: point.bytes)


def _chart(
    lines: dict[Method, list[tuple[float, float]]], drawn: dict[Method, LineStyle], title: str, up: _Linear | _Log,
    full: float | None, best,
) -> str:  # fmt: skip
    sizes = [size / 1e6 for line in lines.values() for size, _ in line]
    if not sizes:
        return ""
    across = _Log(sizes)

    def x(size: float) -> float:
        return FRAME.left + (FRAME.right_edge - FRAME.left) * across(size)

    def y(value: float) -> float:
        return FRAME.lower_edge - (FRAME.lower_edge - FRAME.top) * up(value)

    parts = [f'<text x="{FRAME.left - 38}" y="14" class="title">{title}</text>']
    for value in up.ticks:
        parts.append(f'<path d="M{FRAME.left} {y(value):.1f}H{FRAME.right_edge}" class="grid"/>')
        parts.append(f'<text x="{FRAME.left - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{up.text(value)}</text>')
    for value in across.ticks:
        parts.append(f'<path d="M{x(value):.1f} {FRAME.lower_edge}v5" class="axis"/>')
        parts.append(
            f'<text x="{x(value):.1f}" y="{FRAME.lower_edge + 18}" text-anchor="middle">{across.text(value)}</text>'
        )
    parts.append(f'<path d="M{FRAME.left} {FRAME.lower_edge}H{FRAME.right_edge}" class="axis"/>')
    caption = "kept per case, MB (logarithmic)"
    parts.append(f'<text x="{FRAME.right_edge}" y="{FRAME.height - 6}" text-anchor="end">{caption}</text>')
    if full is not None:
        parts.append(f'<path d="M{FRAME.left} {y(full):.1f}H{FRAME.right_edge}" class="full"/>')
        # The label is above the line, or below it where there is no room.
        place = y(full) - 5 if y(full) > FRAME.top + 12 else y(full) + 14
        parts.append(f'<text x="{FRAME.left + 4}" y="{place:.1f}">full cache {full:.2f}</text>')
    parts.append(_front([(size / 1e6, value) for line in lines.values() for size, value in line], x, y, best))
    ordered = sorted(drawn, key=lambda method: drawn[method].marker is not None)
    for method in ordered:
        parts.append(_line(lines[method], method, drawn[method], x, y))
    label = f"{escape(title)} against kept megabytes"
    return f'<svg viewBox="0 0 {FRAME.width} {FRAME.height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _front(points: list[tuple[float, float]], x, y, best) -> str:
    """Steps through the best value at each size or below."""
    reached, path = None, ""
    for size, value in sorted(points, key=lambda point: (point[0], -point[1] if best is max else point[1])):
        if reached is None:
            reached, path = value, f"M{x(size):.1f} {y(value):.1f}"
        elif best(reached, value) != reached:
            reached, path = value, f"{path}H{x(size):.1f}V{y(value):.1f}"
    return f'<path d="{path}H{FRAME.right_edge}" class="front"/>' if path else ""


def _line(points: list[tuple[float, float]], method: Method, style: LineStyle, x, y) -> str:
    if not points:
        return ""
    places = [(x(size / 1e6), y(value)) for size, value in points]
    path = "M" + "L".join(f"{across:.1f} {up:.1f}" for across, up in places)
    width = 1.8 if style.marker else 1
    said = "; ".join(f"{size / 1e6:.3g} MB: {value:.3g}" for size, value in points)
    marks = "".join(_marker(style, *place) for place in places)
    return (
        f'<g><title>{escape(method_label(method))}: {said}</title><path d="{path}" fill="none" stroke="{style.colour}" '
        f'stroke-width="{width}"{_dashed(style)}/>{marks}</g>'
    )


def _dashed(style: LineStyle) -> str:
    return f' stroke-dasharray="{style.dashes}"' if style.dashes else ""


def _marker(style: LineStyle, x: float, y: float) -> str:
    at, fill = f"M{x:.1f} {y:.1f}", f'fill="{style.colour}" stroke="var(--card)" stroke-width="0.8"'
    stroke = f'fill="none" stroke="{style.colour}" stroke-width="2.2"'
    hollow = f'fill="var(--card)" stroke="{style.colour}" stroke-width="2"'
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" {fill}/>',
        "ring": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" {hollow}/>',
        "square": f'<path d="{at}m-4 -4h8v8h-8z" {fill}/>',
        "triangle": f'<path d="{at}m0 -5l5 9h-10z" {fill}/>',
        "down": f'<path d="{at}m0 5l5 -9h-10z" {fill}/>',
        "diamond": f'<path d="{at}m0 -5.4l5.4 5.4l-5.4 5.4l-5.4 -5.4z" {fill}/>',
        "cross": f'<path d="{at}m-3.6 -3.6l7.2 7.2m0 -7.2l-7.2 7.2" {stroke}/>',
        "plus": f'<path d="{at}m-4.4 0h8.8m-4.4 -4.4v8.8" {stroke}/>',
    }
    small = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{style.colour}"/>'
    return shapes[style.marker] if style.marker else small


def _swatch(style: LineStyle) -> str:
    line = f'<path d="M1 6.5H25" stroke="{style.colour}" stroke-width="1.8"{_dashed(style)}/>'
    return f'<svg width="26" height="13" aria-hidden="true">{line}{_marker(style, 13, 6.5)}</svg>'
