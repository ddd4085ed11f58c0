"""`report.html`: one page about a run, with everything in it, to keep beside the adapter.

No scripts and no other files: curves are inline SVG, pictures are data URIs.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from library.training.charts import CHART_STYLE, PALETTE, Line, line_chart, smooth, standalone
from library.training.files import write_atomically
from library.training.options import OPTIONS, Options
from library.training.report import Series
from library.training.report_adaptation import adaptation
from library.training.report_style import PAGE_STYLE
from library.training.sampling import Sample
from library.training.snapshots import Snapshot
from library.training.trackers import SECRETS

LARGEST_PICTURE = 512  # pixels; larger samples are shown smaller, the files stay as they are

# Titles of the curves' groups: all before the last slash of a scalar's name.
TITLES = {
    "lr": "Learning rate",
    "effective_lr": "Effective learning rate by role",
    "weight_decay": "Weight decay by role",
    "norm": "Norms",
    "max_norm": "Scaled weight norms",
    "tam": "Torque-aware momentum",
    "cautious": "Cautious updates",
    "spd": "Selective projection",
    "lr_mask": "Factor on the learning rate, of mask and adaptation",
    "importance": "What importance is measured by",
}


@dataclass
class Run:
    """What the page tells. `facts` are (name, value) pairs in words; `files` what was written;
    `snapshots` what the optimizer has found, oldest first."""

    name: str
    summary: str
    options: Options
    series: Mapping[str, Series]
    samples: Sequence[Sample] = ()
    facts: Sequence[tuple[str, str]] = ()
    files: Sequence[Path] = ()
    snapshots: Sequence[Snapshot] = ()
    finished: float = field(default_factory=time.time)  # seconds since 1970


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write `report.html` and `<name>_curves.svg` into `folder` and return their paths."""
    curves, page = folder / f"{run.name}_curves.svg", folder / "report.html"
    charts = [_loss_chart(run.series, 860), _lr_chart(run.series, 860)]
    written = []
    if any(charts):
        _write_text(curves, standalone(charts, 860, 300))
        written.append(curves)
    _write_text(page, render(run, [*run.files, *written], folder))
    return [page, *written]


def _write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def render(run: Run, files: Sequence[Path], folder: Path) -> str:
    """The page as HTML text; file names are shown as seen from `folder`."""
    sections = [
        _header(run),
        _facts(run.facts),
        _pictures(run.samples),
        _curves(run.series),
        adaptation(run.snapshots),
        _files(files, folder),
        _settings(run.options),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)} · training report</title>\n"
        f"<style>{PALETTE}{CHART_STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(run: Run) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.finished))
    return (
        f"<header><h1>{escape(run.name)}</h1>"
        f"<p>{escape(run.summary)} · <time>{moment}</time></p></header>"
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt>{_value(value)}</div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _value(text: str) -> str:
    """A fact's value; what follows a comma is a remark in small print."""
    value, _, remark = text.partition(", ")
    small = f"<small>{escape(remark)}</small>" if remark else ""
    return f"<dd>{escape(value)}{small}</dd>"


# Pictures


def _pictures(samples: Sequence[Sample]) -> str:
    """One card a prompt: the first and the last picture, those in between folded away."""
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.path.is_file():
            by_prompt.setdefault(sample.prompt.index, []).append(sample)
    if not by_prompt:
        return ""
    cards = "\n".join(_card(by_prompt[index]) for index in sorted(by_prompt))
    return f'<section><h2>Before and after</h2><div class="cards">{cards}</div></section>'


def _card(samples: Sequence[Sample]) -> str:
    first, last = samples[0], samples[-1]
    shown = [last] if last is first else [first, last]
    pair = "".join(_figure(s, f"after {s.step} steps" if s.step else "before") for s in shown)
    prompt = last.prompt
    negative = f"<small>without: {escape(prompt.negative)}</small>" if prompt.negative else ""
    between = ""
    if len(samples) > 2:
        steps = "".join(_figure(s, f"step {s.step}" if s.step else "before") for s in samples)
        between = (
            f"<details><summary>All {len(samples)} pictures</summary>"
            f'<div class="strip">{steps}</div></details>'
        )
    return (
        f'<article class="card"><div class="pair">{pair}</div>'
        f"<p>{escape(prompt.text) or '(no prompt)'}{negative}</p>{between}</article>"
    )


def _figure(sample: Sample, label: str) -> str:
    return (
        f'<figure><img src="{picture_uri(sample.path)}" alt="{escape(sample.prompt.text)}, '
        f'{label}"><figcaption>{label}</figcaption></figure>'
    )


def picture_uri(path: Path) -> str:
    """The picture as a data URI; larger ones smaller and as WebP, so that the page stays light."""
    with Image.open(path) as image:
        if max(image.size) <= LARGEST_PICTURE // 2:
            content, kind = path.read_bytes(), "png"
        else:
            image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=88)
            content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


# Curves


def _curves(series: Mapping[str, Series]) -> str:
    if not series:
        return ""
    wide, narrow = _loss_chart(series, 940), _loss_chart(series, 400)
    groups = _groups(series)
    charts = [_lr_chart(series, 460), *(_group_chart(name, groups[name]) for name in groups)]
    small = "".join(f'<div class="card">{chart}</div>' for chart in charts if chart)
    return (
        "<section><h2>Curves <small>over training steps</small></h2>"
        f'<div class="card wide">{wide}</div><div class="card narrow">{narrow}</div>'
        f'<div class="charts">{small}</div></section>'
    )


def _loss_chart(series: Mapping[str, Series], width: int) -> str:
    lines = []
    if "loss/current" in series:
        loss = series["loss/current"]
        smoothed = smooth(loss.values, span=max(10, len(loss.values) / 20))
        lines += [
            Line("each step", loss.steps, loss.values, "faint"),
            Line("smoothed", loss.steps, smoothed),
        ]
    for kind in ("step", "epoch"):
        name = f"loss/validation/{kind}_average"
        if name in series:
            validation = series[name]
            label = "validation" if kind == "step" else "validation, by epoch"
            lines.append(Line(label, validation.steps, validation.values, "dots", len(lines) - 1))
    return line_chart("Loss", lines, width, 300)


def _lr_chart(series: Mapping[str, Series], width: int) -> str:
    group = {name: curve for name, curve in series.items() if name.startswith("lr/")}
    return _group_chart("lr", group, width, 300 if width > 460 else 250)


def _groups(series: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """Curves that belong in one chart: those that share all but the last part of their names."""
    groups: dict[str, dict[str, Series]] = {}
    for name, curve in series.items():
        group = name.rpartition("/")[0]
        if name.split("/")[0] not in ("loss", "lr"):
            groups.setdefault(group, {})[name] = curve
    return groups


def _group_chart(
    group: str, curves: Mapping[str, Series], width: int = 460, height: int = 250
) -> str:
    title = TITLES.get(group) or group.replace("/", ", ").replace("_", " ").capitalize()
    lines = _distinct(curves, f"{group}/")
    if len(lines) == 1:  # no legend then
        title = f"{title}: {lines[0].label}" if title else lines[0].label
    return line_chart(title, lines, width, height, y_from_zero=True)


def _distinct(curves: Mapping[str, Series], prefix: str) -> list[Line]:
    """One line for all curves that are equal, under their joined names."""
    equal: dict[tuple[tuple[int, ...], tuple[float, ...]], list[str]] = {}
    for name, curve in curves.items():
        label = name.removeprefix(prefix).replace("_", " ")
        equal.setdefault((tuple(curve.steps), tuple(curve.values)), []).append(label)
    return [
        Line(_joined(labels), steps, values, colour=index)
        for index, ((steps, values), labels) in enumerate(equal.items())
    ]


def _joined(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:3])
    return shown if len(labels) <= 3 else f"{shown} and {len(labels) - 3} more"


# Files and settings


def _files(files: Sequence[Path], folder: Path) -> str:
    rows = "".join(
        f"<tr><td>{escape(_shown_path(path, folder))}</td><td>{_size(path)}</td></tr>"
        for path in files
    )
    return f"<section><h2>Files</h2><table>{rows}</table></section>" if rows else ""


def _shown_path(path: Path, folder: Path) -> str:
    inside = path.resolve().is_relative_to(folder.resolve())
    return path.resolve().relative_to(folder.resolve()).as_posix() if inside else str(path)


def _size(path: Path) -> str:
    """The size of a file, of a folder's files together; nothing for one not written yet."""
    if path.is_dir():
        count = float(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    elif path.is_file():
        count = float(path.stat().st_size)
    else:
        return ""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _settings(options: Options) -> str:
    """All options as TOML that `--config_file` reads: those set for this run, then the others."""
    values = [(name, getattr(options, name)) for name in OPTIONS]
    values = [(name, value) for name, value in values if value is not None]
    others = [
        (name, value)
        for name, value in values
        if name not in options.given and value == OPTIONS[name].default
    ]
    chosen = [item for item in values if item not in others]
    return (
        "<section><h2>Settings</h2>"
        f"<pre>{escape(_toml(chosen)) or 'all as by default'}</pre>"
        f"<details><summary>{len(others)} settings left as they are by default</summary>"
        f"<pre>{escape(_toml(others))}</pre></details></section>"
    )


def _toml(items: Iterable[tuple[str, object]]) -> str:
    """Texts, numbers, truth values and lists of them look the same in TOML as in JSON."""
    return "\n".join(
        f"# {name} is not shown" if name in SECRETS
        else f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in items
    )  # fmt: skip
