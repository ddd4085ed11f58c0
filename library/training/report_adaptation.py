"""The part of `report.html` that shows what the optimizer has found: how importance went, which
parameters are partners, and how far lr_mask has moved the learning rates."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from library.training.charts import Bars, Line, histogram, line_chart
from library.training.parameter_names import kind, module
from library.training.snapshots import Snapshot

QUANTILES = {"largest": 1.0, "90 %": 0.9, "median": 0.5, "10 %": 0.1, "smallest": 0.0}
LEAST_SHOWN = 0.01  # of importances: one that never has a gradient falls without an end
STRONGEST = 12  # pairs in the list
MOST_KINDS = 8  # of pairs
MASK_HEIGHT = 130

Relation = Mapping[str, Any]


def adaptation(snapshots: Sequence[Snapshot]) -> str:
    """The section as HTML; empty text where nothing has been found."""
    if not snapshots:
        return ""
    names: list[str] = snapshots[0]["names"]
    relations: list[Relation] = snapshots[-1]["relations"]
    masks = mask_charts(snapshots)
    charts = [
        importance_chart(snapshots, height=max(250, MASK_HEIGHT * len(masks))),
        "".join(masks),
        relations_chart(snapshots),
        norm_chart(relations),
    ]
    if not any(charts):
        return ""
    cards = "".join(f'<div class="card">{chart}</div>' for chart in charts if chart)
    tables = _kinds(relations, names) + _strongest(relations, names) if relations else ""
    return (
        "<section><h2>What the optimizer found</h2>"
        f'<div class="charts">{cards}</div>{tables}</section>'
    )


def importance_chart(snapshots: Sequence[Snapshot], height: int) -> str:
    """Quantiles of the parameters' importances over the steps."""
    known = [snapshot for snapshot in snapshots if snapshot["importances"]]
    steps = [snapshot["step"] for snapshot in known]
    lines = [
        Line(label, steps, [quantile(each["importances"], share) for each in known], colour=colour)
        for colour, (label, share) in enumerate(QUANTILES.items())
    ]
    title = "Importance of the parameters, 1 on average"
    return line_chart(title, lines, height=height, y_log=True)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of all are not above, as it is drawn."""
    ordered = sorted(values)
    return max(ordered[round(share * (len(ordered) - 1))], LEAST_SHOWN)


def mask_charts(snapshots: Sequence[Snapshot]) -> list[str]:
    """lr_mask when it last moved, in the middle of the run and at its end: at the end of a schedule
    all factors may be 10, beside which one would not see the others."""
    moving = [k for k, snapshot in enumerate(snapshots) if snapshot["lr_mask"]["moves"]]
    chosen = sorted({*moving[-1:], (len(snapshots) - 1) // 2, len(snapshots) - 1})
    edges = snapshots[0]["lr_mask_edges"]
    counts = [snapshots[k]["lr_mask"]["counts"] for k in chosen]
    first = next((k for k, column in enumerate(zip(*counts, strict=True)) if any(column)), 0)
    first -= first % 40  # as many bins as a power of ten has
    title = "lr_mask: elements by factor on lr, {}"
    charts = [
        histogram(
            title.format(moment(snapshots[k])),
            edges[first:],
            [Bars("", own[first:], colour)],
            height=MASK_HEIGHT,
        )
        for colour, (k, own) in enumerate(zip(chosen, counts, strict=True))
    ]
    return [chart for chart in charts if chart]


def moment(snapshot: Snapshot) -> str:
    """When it was taken, and whether masks still moved then."""
    state = "moving" if snapshot["lr_mask"]["moves"] else "frozen"
    return f"step {snapshot['step']:,}, {state}"


def relations_chart(snapshots: Sequence[Snapshot]) -> str:
    """How many pairs of partners were known, over the steps."""
    known = [snapshot for snapshot in snapshots if snapshot["importances"]]
    pairs = [len(snapshot["relations"]) for snapshot in known]
    line = Line("", [snapshot["step"] for snapshot in known], pairs)
    return line_chart("Pairs of partners", [line], y_from_zero=True)


def norm_chart(relations: Sequence[Relation]) -> str:
    """How large the partners' products are."""
    norms = [relation["product_norm"] for relation in relations if relation["product_norm"] > 0]
    if not norms:
        return ""
    places = [math.floor(10 * math.log10(norm)) for norm in norms]  # tenths of a power of ten
    first, last = min(places) - 1, max(places) + 1
    counts = [places.count(place) for place in range(first, last + 1)]
    edges = [10 ** (place / 10) for place in range(first, last + 2)]
    return histogram("Partners by the norm of their product", edges, [Bars("", counts)])


def _kinds(relations: Sequence[Relation], names: Sequence[str]) -> str:
    """Which kinds of parameters are partners, how many, and how well they fit."""
    kinds: dict[str, list[Relation]] = defaultdict(list)
    for relation in relations:
        kinds[product(relation, names)].append(relation)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    shown, others = ordered[:MOST_KINDS], [each for _, own in ordered[MOST_KINDS:] for each in own]
    if others:
        shown.append(("others", others))
    rows = [
        (
            label,
            f"{len(own):,}",
            f"{statistics.median(each['compatibility'] for each in own):.3f}",
            f"{statistics.median(each['product_norm'] for each in own):.3g}",
        )
        for label, own in shown
    ]
    heads = ("product", "pairs", "compatibility (median)", "norm of the product (median)")
    return _table("Partners by kind", heads, rows)


def _strongest(relations: Sequence[Relation], names: Sequence[str]) -> str:
    """The partners whose product is largest."""
    ordered = sorted(relations, key=lambda relation: -relation["product_norm"])[:STRONGEST]
    rows = [
        (
            _modules(relation, names),
            product(relation, names),
            f"{relation['compatibility']:.3f}",
            f"{relation['product_norm']:.3g}",
        )
        for relation in ordered
    ]
    heads = ("modules", "product", "compatibility", "norm of the product")
    return _table("Partners with the largest products", heads, rows)


def product(relation: Relation, names: Sequence[str]) -> str:
    """The product with the factors' kinds for P and Q: `lora_b·lora_a`."""
    first, second = (kind(names[index]) or f"no. {index}" for index in relation["pair"])
    return "·".join(
        factor.replace("P", first) if "P" in factor else factor.replace("Q", second)
        for factor in relation["product"].split("·")
    )


def _modules(relation: Relation, names: Sequence[str]) -> str:
    """The module of both, or each one's."""
    modules = [module(names[index]) or f"no. {index}" for index in relation["pair"]]
    return " and ".join(dict.fromkeys(modules))


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="card listed"><table class="figures"><caption>{escape(title)}</caption>'
        f"<tr>{head}</tr>{body}</table></div>"
    )
