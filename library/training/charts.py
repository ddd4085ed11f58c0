"""Line charts and histograms as SVG text: small, without scripts, in the colours of the page
around them.

Colours are CSS variables (`--ink`, `--muted`, `--line`, `--c0` … `--c7`): a page defines them for
light and dark. `standalone` makes a file of its own out of charts, with such a definition in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

COLOURS = 8
FONT_SIZE = 12
LETTER_WIDTH = 6.7  # of the average letter at that size, to place labels
LINE_HEIGHT = 20

PALETTE = """
:root { color-scheme: light dark;
  --page: #f5f5f2; --card: #ffffff; --ink: #1d2023; --muted: #686d73; --line: #e3e3de;
  --c0: #2c66a8; --c1: #c2622a; --c2: #3a8757; --c3: #8a4f9f;
  --c4: #a8842a; --c5: #3f919e; --c6: #b2485d; --c7: #70757b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131517; --card: #1b1e21; --ink: #e7e5e1; --muted: #989da3; --line: #2d3135;
  --c0: #76a9e3; --c1: #e3955f; --c2: #73bd8f; --c3: #c08fd4;
  --c4: #d9b961; --c5: #74c3cf; --c6: #e58698; --c7: #a5aab0; } }
"""

CHART_STYLE = f"""
.chart text {{ font: {FONT_SIZE}px system-ui, -apple-system, "Segoe UI", sans-serif;
  fill: var(--muted); }}
.chart .title {{ fill: var(--ink); font-weight: 600; font-size: {FONT_SIZE + 1}px; }}
.chart .grid {{ stroke: var(--line); stroke-width: 1; }}
.chart .curve {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }}
.chart .faint {{ stroke-width: 1; opacity: 0.4; }}
.chart .filled {{ stroke-width: 1.4; stroke-linejoin: miter; fill-opacity: 0.22; }}
"""


@dataclass(frozen=True)
class Line:
    """One curve: `faint` for raw values behind a smoothed one, `dots` for few measurements."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: Literal["plain", "faint", "dots"] = "plain"
    colour: int = 0


@dataclass(frozen=True)
class Bars:
    """One distribution: how much lies in each bin."""

    label: str
    amounts: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """Where a value lies along an axis of the drawing, and which values get a label."""

    low: float
    high: float
    start: float  # pixels of `low` and `high`
    end: float
    logarithmic: bool = False
    whole: bool = False  # labels at whole numbers only

    def place(self, value: float) -> float:
        """The pixel of `value`."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, wanted: int) -> list[float]:
        """About as many round values as `wanted`."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            around = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            between = [10.0**power * factor for power in around for factor in (1, 2, 5)]
            between = [value for value in between if self.low <= value <= self.high]
            if len(powers) < 3 and 1 < len(between) <= 2 * wanted:
                return between
            if len(powers) > 1:
                stride = -(-len(powers) // wanted)
                return [10.0**power for power in powers[::stride]]
        step = _round_step((self.high - self.low) / wanted)
        step = max(1.0, step) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    width: int = 460,
    height: int = 250,
    y_from_zero: bool = False,
    y_log: bool = False,
) -> str:
    """A chart of `lines` over steps, as an `<svg>` element; empty text without any finite value.

    The y-axis is logarithmic where the lines lie more than two powers of ten apart, and where
    `y_log` says so of values that are all above zero. Single raw values far off are cut, so that
    they don't flatten the rest.
    """
    lines = [finite for line in lines if (finite := _finite(line)).xs]
    if not lines:
        return ""
    legend, legend_height = _legend(lines, width)
    top = 30 + legend_height
    y_axis = _y_axis(lines, height - 26, top, y_from_zero, y_log)
    labels = [(value, format_number(value)) for value in y_axis.ticks(4)]
    left = 14 + LETTER_WIDTH * max(len(text) for _, text in labels)
    x_axis = _x_axis(lines, left, width - 14)
    curves = [_draw(line, x_axis, y_axis) for line in lines]
    return _chart(title, width, height, [legend, *_grid(x_axis, y_axis, labels, width), *curves])


def histogram(
    title: str, edges: Sequence[float], bars: Sequence[Bars], width: int = 460, height: int = 250
) -> str:
    """Distributions over the same bins as shares of their sums, as an `<svg>` element; empty text
    where nothing was counted.

    Args:
        edges: of the bins, all above zero; they are evenly wide on the logarithmic axis.
    """
    bars = [each for each in bars if sum(each.amounts) > 0]
    if not bars:
        return ""
    legend, legend_height = _legend(
        [Line(each.label, (), (), colour=each.colour) for each in bars], width
    )
    highest = max(max(each.amounts) / sum(each.amounts) for each in bars)
    y_axis = Axis(0.0, 105 * highest, height - 26, 30 + legend_height)
    labels = [(value, f"{format_number(value)} %") for value in y_axis.ticks(max(2, height // 60))]
    left = 14 + LETTER_WIDTH * max(len(text) for _, text in labels)
    x_axis = Axis(edges[0], edges[-1], left, width - 14, logarithmic=True)
    outlines = [_outline(each, edges, x_axis, y_axis) for each in bars]
    return _chart(title, width, height, [legend, *_grid(x_axis, y_axis, labels, width), *outlines])


def _chart(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )
    heading = f'<text class="title" x="0" y="14">{escape(title)}</text>'
    return "\n".join([head, heading, *(part for part in parts if part), "</svg>"])


def _outline(bars: Bars, edges: Sequence[float], x_axis: Axis, y_axis: Axis) -> str:
    """The bins' tops from left to right, closed along the axis."""
    total = sum(bars.amounts)
    path = f"M{x_axis.start:.1f} {y_axis.start:.1f}"
    for amount, right in zip(bars.amounts, edges[1:], strict=True):
        path += f"V{y_axis.place(100 * amount / total):.1f}H{x_axis.place(right):.1f}"
    colour = f"var(--c{bars.colour % COLOURS})"
    style = f"stroke: {colour}; fill: {colour}"
    return f'<path class="filled" style="{style}" d="{path}V{y_axis.start:.1f}Z"/>'


def standalone(charts: Sequence[str], width: int, height: int) -> str:
    """One SVG file with charts of the same size below one another."""
    charts = [chart for chart in charts if chart]
    total = (height + 24) * len(charts) + 24
    placed = []
    for row, chart in enumerate(charts):
        place = f'x="24" y="{24 + (height + 24) * row}" width="{width}" height="{height}"'
        placed.append(chart.replace("<svg ", f"<svg {place} ", 1))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 48}" height="{total}" '
            f'viewBox="0 0 {width + 48} {total}">',
            f"<style>{PALETTE}{CHART_STYLE}</style>",
            '<rect width="100%" height="100%" style="fill: var(--card)"/>',
            *placed,
            "</svg>",
        ]
    )


def smooth(values: Sequence[float], span: float) -> list[float]:
    """An exponential moving average over about `span` values, unbiased from the first on."""
    decay = 1 - 1 / max(span, 1.0)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


def format_number(value: float) -> str:
    """Short, with at most three significant digits: 0.05, 1.2k, 3e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1000:.3g}k"
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    return Line(line.label, [x for x, _ in points], [y for _, y in points], line.style, line.colour)


def _y_axis(
    lines: Sequence[Line], bottom: float, top: float, from_zero: bool, logarithmic: bool
) -> Axis:
    values: list[float] = []
    for line in lines:
        ordered = sorted(line.ys)
        cut = len(ordered) // 50 if line.style == "faint" else 0
        values += ordered[cut : len(ordered) - cut]
    low, high = min(values), max(values)
    medians = [sorted(line.ys)[len(line.ys) // 2] for line in lines]
    far_apart = low > 0 and max(medians) > 100 * min(medians)
    if far_apart or (logarithmic and 0 < low < high):
        return Axis(low, high, bottom, top, logarithmic=True)
    if from_zero:
        low = min(low, 0.0)
    if low == high:  # a constant: in the middle, with zero below it
        low, high = min(0.0, 2 * low), max(0.0, 2 * high)
        return Axis(low, high if high > low else 1.0, bottom, top)
    margin = 0.05 * (high - low)
    return Axis(low if low == 0 else low - margin, high + margin, bottom, top)


def _x_axis(lines: Sequence[Line], left: float, right: float) -> Axis:
    low = min(min(line.xs) for line in lines)
    high = max(max(line.xs) for line in lines)
    low = 0 if low < 0.1 * high else low
    return Axis(low, high if high > low else low + 1, left, right, whole=True)


def _grid(x_axis: Axis, y_axis: Axis, labels: Sequence[tuple[float, str]], width: int) -> list[str]:
    parts = []
    for value, text in labels:
        y = f"{y_axis.place(value):.1f}"
        parts.append(
            f'<line class="grid" x1="{x_axis.start:.1f}" x2="{width}" y1="{y}" y2="{y}"/>'
            f'<text x="{x_axis.start - 8:.1f}" y="{y}" dy="4" text-anchor="end">{text}</text>'
        )
    for value in x_axis.ticks(max(2, width // 120)):
        x = x_axis.place(value)
        anchor = "end" if x > width - 24 else "middle"
        parts.append(
            f'<text x="{min(x, width):.1f}" y="{y_axis.start + 20:.1f}" text-anchor="{anchor}">'
            f"{format_number(value)}</text>"
        )
    return parts


def _draw(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    low, high = sorted((y_axis.start, y_axis.end))
    points = [
        (x_axis.place(x), min(max(y_axis.place(y), low), high))
        for x, y in _thin(line, round(x_axis.end - x_axis.start) // 2)
    ]
    colour = f"var(--c{line.colour % COLOURS})"
    marks = ""
    if line.style == "dots" or len(points) == 1:
        marks = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: {colour}"/>' for x, y in points
        )
    # The ninth line and later have the colours again, dashed.
    dashes = "; stroke-dasharray: 5 4" if line.colour >= COLOURS else ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    kind = "curve faint" if line.style == "faint" else "curve"
    return f'<path class="{kind}" style="stroke: {colour}{dashes}" d="{path}"/>{marks}'


def _thin(line: Line, buckets: int) -> list[tuple[float, float]]:
    """The lowest and the highest point of each of `buckets` stretches: no peak is lost."""
    points = list(zip(line.xs, line.ys, strict=True))
    if len(points) <= 2 * buckets:
        return points
    value: Callable[[int], float] = lambda index: points[index][1]  # noqa: E731
    kept: list[int] = []
    for bucket in range(buckets):
        stretch = range(
            bucket * len(points) // buckets, max(1, (bucket + 1) * len(points) // buckets)
        )
        kept += sorted({min(stretch, key=value), max(stretch, key=value)})
    return [points[index] for index in kept]


def _legend(lines: Sequence[Line], width: int) -> tuple[str, int]:
    """Swatches and names under the title, in rows, and their height; nothing for a single line."""
    if len(lines) == 1:
        return "", 0
    parts, x, row = [], 0.0, 0
    for line in lines:
        room = 22 + LETTER_WIDTH * len(line.label) + 14
        if x and x + room > width:
            x, row = 0.0, row + 1
        y = 34 + LINE_HEIGHT * row
        kind = "curve faint" if line.style == "faint" else "curve"
        dashes = "; stroke-dasharray: 5 4" if line.colour >= COLOURS else ""
        parts.append(
            f'<line class="{kind}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="{y - 4}" y2="{y - 4}" '
            f'style="stroke: var(--c{line.colour % COLOURS}){dashes}"/>'
            f'<text x="{x + 22:.1f}" y="{y}">{escape(line.label)}</text>'
        )
        x += room
    return "\n".join(parts), LINE_HEIGHT * (row + 1)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
