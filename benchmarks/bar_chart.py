"""The comparison as a bar chart: an SVG file that follows the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from library.training.charts import LETTER_WIDTH, Axis, format_number, standalone

WIDTH = 780
TOP = 52  # title and legend
BAR, PITCH = 18, 28  # pixels of a bar, and from one to the next
OURS, OTHER = "var(--c1)", "var(--c7)"


@dataclass(frozen=True)
class Bar:
    label: str
    ratio: float  # times the reference
    state_bytes: float  # per parameter
    ours: bool


def bar_chart(title: str, reference: str, bars: Sequence[Bar]) -> str:
    """Time per step as multiples of `reference`, on a logarithmic axis, the shortest bar on top."""
    bars = sorted(bars, key=lambda bar: bar.ratio)
    ratios = [bar.ratio for bar in bars]
    height = TOP + PITCH * len(bars) + 30
    left = 12 + LETTER_WIDTH * max(len(bar.label) for bar in bars)
    right = WIDTH - LETTER_WIDTH * max(len(_value(bar)) for bar in bars) - 8
    axis = Axis(0.7 * min(1.0, *ratios), max(2.0, *ratios), left, right, logarithmic=True)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f'<text class="title" x="0" y="14">{escape(title)}</text>',
        _legend(),
        *_grid(axis, height, reference),
    ]
    for row, bar in enumerate(bars):
        parts.append(_draw(bar, axis, TOP + PITCH * row))
    return standalone(["\n".join([*parts, "</svg>"])], WIDTH, height)


def _value(bar: Bar) -> str:
    return f"{bar.ratio:.2f} × · {bar.state_bytes:.2f} bytes"


def _draw(bar: Bar, axis: Axis, top: float) -> str:
    end, middle = axis.place(bar.ratio), top + BAR / 2
    emphasis = ' style="fill: var(--ink); font-weight: 600"' if bar.ours else ""
    return (
        f'<rect x="{axis.start:.1f}" y="{top:.1f}" width="{end - axis.start:.1f}" height="{BAR}" '
        f'rx="2" style="fill: {OURS if bar.ours else OTHER}"/>'
        f'<text x="{axis.start - 8:.1f}" y="{middle:.1f}" dy="4" text-anchor="end"{emphasis}>'
        f"{escape(bar.label)}</text>"
        f'<text x="{end + 6:.1f}" y="{middle:.1f}" dy="4"{emphasis}>{_value(bar)}</text>'
    )


def _legend() -> str:
    parts, x = [], 0.0
    for colour, text in (
        (OURS, "this project"),
        (OTHER, "other optimizers"),
        ("none", "labels: time, and bytes of optimizer state per parameter"),
    ):
        swatch = 0 if colour == "none" else 20
        parts.append(f'<rect x="{x:.1f}" y="26" width="12" height="12" style="fill: {colour}"/>')
        parts.append(f'<text x="{x + swatch:.1f}" y="36">{text}</text>')
        x += swatch + LETTER_WIDTH * len(text) + 18
    return "\n".join(parts)


def _grid(axis: Axis, height: int, reference: str) -> list[str]:
    """Lines at powers of ten and their thirds, where there is room; the reference's is stronger."""
    parts = []
    bottom = height - 26
    marks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 3)]
    for mark in (mark for mark in marks if axis.low <= mark <= axis.high):
        x = f"{axis.place(mark):.1f}"
        stronger = ' style="stroke: var(--ink)"' if mark == 1 else ""
        label = f"1 × = {escape(reference)}" if mark == 1 else f"{format_number(mark)} ×"
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP - 6}" y2="{bottom}"{stronger}/>'
            f'<text x="{x}" y="{height - 8}" text-anchor="middle">{label}</text>'
        )
    return parts
