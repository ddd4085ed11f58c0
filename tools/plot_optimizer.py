"""Draws what AdaptiveHinaAdamW found in a run: importances, relations and lr_mask, as three PNGs.

    python tools/plot_optimizer.py output/my-style-optimizer.jsonl
    python tools/plot_optimizer.py output/my-style-optimizer.jsonl --out pictures

The file is written by every run with that optimizer. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # `library`, which is not installed

import numpy as np

try:
    import matplotlib as mpl
except ImportError:
    sys.exit("This tool draws with matplotlib: pip install matplotlib")

mpl.use("Agg")  # files only, also where there is no screen
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from library.training.errors import UserError
from library.training.parameter_names import blocks, kind
from library.training.report_adaptation import LEAST_SHOWN, QUANTILES, moment, quantile
from library.training.snapshots import Snapshot, read_snapshots

INK, MUTED, RULE = "#1d2023", "#686d73", "#e3e3de"
COLOURS = ("#2c66a8", "#c2622a", "#3a8757", "#8a4f9f", "#a8842a", "#3f919e")
OTHERS = "#9a9fa5"
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
MOMENTS = 6  # rows of the picture of lr_mask
GAP = 1.6  # degrees between two blocks on the circle
RING = 0.014  # from one circle to the next; the innermost has the radius 1
ALONE = "#d5d5d0"  # parameters without a partner


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="NAME-optimizer.jsonl, which a run has written")
    parser.add_argument("--out", type=Path, help="folder for the pictures; that of the file if not")
    arguments = parser.parse_args(words)
    if not arguments.file.is_file():
        parser.error(f"there is no file {arguments.file}")
    try:
        snapshots = read_snapshots(arguments.file)
    except UserError as error:
        parser.error(str(error))
    if not snapshots:
        parser.error(f"{arguments.file} has no whole line; the run was cut off at its beginning")
    folder = arguments.out or arguments.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"importance": draw_importance, "relations": draw_relations, "lr_mask": draw_mask}
    with plt.rc_context(STYLE):
        for name, draw in pictures.items():
            path = folder / f"{name}.png"
            figure = draw(snapshots)
            figure.savefig(path)
            plt.close(figure)
            print(path)
    return 0


def draw_importance(snapshots: Sequence[Snapshot]) -> Any:
    """A thin line for each parameter in its kind's colour, and quantiles over them."""
    figure, axes = _sheet(figsize=(9, 5))
    known = [snapshot for snapshot in snapshots if snapshot["importances"]]
    axes.set(title="Importance of the parameters", xlabel="step", ylabel="importance (mean 1)")
    axes.grid(axis="y")
    if not known:
        return _nothing(figure, axes, "Importance was not measured (use_dynamic_adaptation=False).")
    steps = np.array([snapshot["step"] for snapshot in known])
    values = np.maximum([snapshot["importances"] for snapshot in known], LEAST_SHOWN)
    kinds, colours = colours_by_kind(snapshots[0]["names"])
    count = values.shape[1]
    paths = np.stack(np.broadcast_arrays(steps[:, None], values), axis=2).swapaxes(0, 1)
    faint = min(0.5, 0.1 + 20 / count)
    axes.add_collection(LineCollection(list(paths), colors=colours, linewidths=0.5, alpha=faint))
    curves = {
        label: [quantile(row, share) for row in values.tolist()]
        for label, share in QUANTILES.items()
    }
    for label, curve in curves.items():
        width = 2.0 if label == "median" else 1.0
        axes.plot(steps, curve, color=INK, linewidth=width, marker="." if len(steps) == 1 else "")
    axes.set_yscale("log")
    _plain_logarithmic(axes.yaxis)
    axes.margins(x=0)
    axes.autoscale_view()
    low, high = np.log10(axes.get_ylim())
    ends = {label: (np.log10(curve[-1]) - low) / (high - low) for label, curve in curves.items()}
    for label, height in _apart(ends, 0.035).items():
        axes.text(1.01, height, label, transform=axes.transAxes, va="center")
    _legend(axes, kinds, (0, -0.12))
    return figure


def _plain_logarithmic(axis: Any) -> None:
    """Labels as plain numbers, at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """The heights, from the highest on moved down to where they are `least` apart."""
    placed: dict[str, float] = {}
    for label, height in sorted(heights.items(), key=lambda item: -item[1]):
        placed[label] = min([height, *(above - least for above in placed.values())])
    return placed


def draw_relations(snapshots: Sequence[Snapshot]) -> Any:
    """The parameters on a circle, block by block, and partners joined by a line inside it. Partners
    that lie side by side are joined by a short spike."""
    names, relations = snapshots[0]["names"], snapshots[-1]["relations"]
    figure, axes = _sheet(figsize=(9, 9), subplot_kw={"aspect": "equal"})
    axes.set_axis_off()
    kinds, colours = colours_by_kind(names)
    angles = _place_blocks(axes, blocks(names), 1.03 + RING * (len(kinds) - 1))
    partnered = {index for relation in relations for index in relation["pair"]}
    shown = [colour if k in partnered else ALONE for k, colour in enumerate(colours)]
    rings = list(kinds.values())  # a circle for each kind: side by side, dots would hide each other
    radii = 1 + RING * np.array([rings.index(colour) for colour in colours])
    size = max(1.0, min(30.0, 2000 / len(names)))
    places = radii * np.cos(angles), radii * np.sin(angles)
    axes.scatter(*places, s=size, c=shown, linewidths=0, zorder=3)
    box = axes.get_tightbbox().transformed(figure.transFigure.inverted())  # the labels included
    title = f"{len(relations):,} pairs of partners among {len(names):,} parameters"
    at_step = f", step {snapshots[-1]['step']:,}"
    figure.text(box.x0, box.y1 + 0.07, title + at_step, fontsize=11, fontweight="bold")
    if len(partnered) < len(names):
        kinds["no partner"] = ALONE
    corner = (box.x0 - 0.01, box.y1 + 0.06)
    _legend(axes, kinds, corner, bbox_transform=figure.transFigure)
    if not relations:
        return figure
    worth = [relation["compatibility"] for relation in relations]
    chords = LineCollection(
        [_chord(*angles[relation["pair"]]) for relation in relations],
        array=np.array(worth),
        cmap=ListedColormap(mpl.colormaps["plasma"](np.linspace(0, 0.85, 256))),
        norm=Normalize(min(np.floor(min(worth) * 10) / 10, 0.9), 1.0),
        linewidths=min(1.5, max(0.6, 1600 / len(names))),  # side by side they just touch
    )
    axes.add_collection(chords)
    place = figure.add_axes((box.x1 + 0.03, 0.35, 0.018, 0.3))
    bar = figure.colorbar(chords, cax=place, label="compatibility of partners")
    bar.outline.set_visible(False)
    return figure


def _place_blocks(axes: Any, block_of: Sequence[str], radius: float) -> Any:
    """Draw an arc with a label for each block; the parameters' angles, clockwise from the top."""
    members: dict[str, list[int]] = {}
    for index, block in enumerate(block_of):
        members.setdefault(block, []).append(index)
    gap = min(GAP, 180 / len(members))
    each = (360 - gap * len(members)) / len(block_of)
    angles = np.empty(len(block_of))
    start, labelled = 90.0, 450.0
    for block, indices in members.items():
        end = start - each * len(indices)
        angles[indices] = np.deg2rad(start - each * (np.arange(len(indices)) + 0.5))
        arc = np.deg2rad(np.linspace(start, end, 2 + len(indices)))
        axes.plot(radius * np.cos(arc), radius * np.sin(arc), color=MUTED, linewidth=2)
        middle = (start + end) / 2
        if labelled - middle >= GAP:  # none over another
            _label_block(axes, block, middle, radius + 0.03)
            labelled = middle
        start = end - gap
    return angles


def _label_block(axes: Any, block: str, degrees: float, radius: float) -> None:
    turned = degrees % 360
    left = 90 < turned < 270
    axes.text(
        radius * np.cos(np.deg2rad(degrees)),
        radius * np.sin(np.deg2rad(degrees)),
        block.replace("_", " "),
        color=MUTED,
        fontsize=7.5,
        rotation=turned - 180 if left else turned,
        rotation_mode="anchor",
        ha="right" if left else "left",
        va="center",
    )


def _chord(one: float, other: float) -> Any:
    """A curve between two places on the circle, `[points, 2]`: the farther apart they are, the
    nearer it comes to the middle."""
    apart = abs((one - other + np.pi) % (2 * np.pi) - np.pi) / np.pi
    ends = np.array([[np.cos(one), np.sin(one)], [np.cos(other), np.sin(other)]])
    middle = ends.sum(0) / max(float(np.linalg.norm(ends.sum(0))), 1e-9)
    bend = middle * (1 - apart) * 0.76
    t = np.linspace(0, 1, 25)[:, None]
    return (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]


def draw_mask(snapshots: Sequence[Snapshot]) -> Any:
    """The factors of lr_mask at a few moments, one below the other."""
    chosen = [snapshots[k] for k in _moments(snapshots)]
    counts = np.array([snapshot["lr_mask"]["counts"] for snapshot in chosen], dtype=float)
    edges = np.array(snapshots[0]["lr_mask_edges"])
    figure, rows = _sheet(
        nrows=len(chosen), sharex=True, figsize=(9, 0.7 + 0.95 * len(chosen)), squeeze=False
    )
    rows[0, 0].set_title("lr_mask: elements by their factor on the learning rate")
    if not counts.any():
        return _nothing(figure, rows[0, 0], "There was no lr_mask (use_lr_mask=False).")
    for axes, snapshot, own in zip(rows[:, 0], chosen, counts, strict=True):
        colour = COLOURS[1] if snapshot["lr_mask"]["moves"] else COLOURS[0]
        shares = own / max(own.sum(), 1)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(shares, edges, color=colour, linewidth=1)
        axes.text(0.01, 0.9, moment(snapshot), transform=axes.transAxes, va="top", color=MUTED)
        axes.set(xscale="log", ylim=(0, 1.15 * shares.max()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.locator_params(axis="y", nbins=3)
        axes.grid(axis="x")
    seen = np.flatnonzero(counts.any(0))
    rows[-1, 0].set_xlim(edges[max(seen[0] - 3, 0)], edges[min(seen[-1] + 4, len(edges) - 1)])
    _plain_logarithmic(rows[-1, 0].xaxis)
    rows[-1, 0].set_xlabel("factor on the learning rate")
    figure.supylabel("share of all elements", x=0.03, color=MUTED, fontsize=9)
    figure.subplots_adjust(hspace=0.25)
    return figure


def _moments(snapshots: Sequence[Snapshot]) -> list[int]:
    """Which ones to show: evenly from the first to the last, and the last in which masks moved."""
    count = len(snapshots)
    evenly = {round(k * (count - 1) / (MOMENTS - 2)) for k in range(MOMENTS - 1)}
    moving = [k for k in range(count) if snapshots[k]["lr_mask"]["moves"]]
    return sorted({*evenly, *moving[-1:]})


def colours_by_kind(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A colour for each of the most frequent kinds, and for each parameter that of its kind."""
    of_each = [kind(name) or "no name" for name in names]
    frequent = [label for label, _ in Counter(of_each).most_common(len(COLOURS))]
    kinds = dict(zip(frequent, COLOURS, strict=False))
    colours = [kinds.get(label, OTHERS) for label in of_each]
    return kinds | ({"others": OTHERS} if OTHERS in colours else {}), colours


def _sheet(**layout: Any) -> tuple[Any, Any]:
    """A figure and what is drawn into; their types are matplotlib's."""
    return plt.subplots(**layout)


def _legend(axes: Any, kinds: dict[str, str], corner: tuple[float, float], **more: Any) -> None:
    """One row, whose upper left corner is given."""
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=label)
        for label, colour in kinds.items()
    ]
    place = {"loc": "upper left", "bbox_to_anchor": corner, "ncols": len(handles), **more}
    axes.legend(handles=handles, borderaxespad=0, handletextpad=0.2, **place)


def _nothing(figure: Any, axes: Any, why: str) -> Any:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=MUTED)
    return figure


if __name__ == "__main__":
    sys.exit(main())
