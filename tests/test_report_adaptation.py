"""The figures of report.html that show what the optimizer has found."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

from library.training.charts import Axis, Bars, Line, histogram, line_chart
from library.training.options import Options
from library.training.report_adaptation import adaptation, product, quantile
from library.training.report_html import Run, write_report

EDGES = [10 ** (k / 40) for k in range(-120, 41)]
NAMES = [f"lora_x{k}.{half}.weight" for k in range(20) for half in ("lora_down", "lora_up")]


def snapshot(step: int, pairs: int, middle: int, moves: bool) -> dict[str, Any]:
    """Of forty parameters; a hundred elements have the factors of one bin."""
    return {
        "step": step,
        "importances": [0.1 + k / 20 for k in range(40)],
        "relations": [
            {
                "pair": [2 * k, 2 * k + 1],
                "product": "Q·P",
                "compatibility": 0.5 + k / 100,
                "product_norm": 0.01 * (k + 1),
            }
            for k in range(pairs)
        ],
        "lr_mask": {"counts": [100 * (k == middle) for k in range(160)], "moves": moves},
    }


def run_of(steps: int) -> list[dict[str, Any]]:
    """Masks freeze and partners are found after half of them."""
    half = steps // 2
    found = [snapshot(k, 20 * (k > half), 100 + k, k <= half) for k in range(1, steps + 1)]
    return [
        {"names": NAMES, "shapes": [[4, 8]] * 40, "lr_mask_edges": EDGES, **found[0]},
        *found[1:],
    ]


def charts(html: str) -> dict[str, ET.Element]:
    """All SVGs by their titles; each must be well-formed, without a number that is none."""
    assert not re.search(r"\b(nan|inf)\b", html)
    found = [ET.fromstring(text) for text in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]
    return {chart.get("aria-label", ""): chart for chart in found}


def paths(chart: ET.Element) -> list[str]:
    return [each.get("d", "") for each in chart.iter() if each.tag.endswith("path")]


def test_the_page_shows_importances_masks_and_relations(tmp_path: Path) -> None:
    write_report(Run("x", "", Options(), {}, snapshots=run_of(10)), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert "What the optimizer found" in text
    found = charts(html)
    assert list(found) == [
        "Importance of the parameters, 1 on average",
        "lr_mask: elements by factor on lr, step 5, moving",
        "lr_mask: elements by factor on lr, step 10, frozen",
        "Pairs of partners",
        "Partners by the norm of their product",
    ]
    assert len(paths(found["Importance of the parameters, 1 on average"])) == 5
    for label in ("largest", "90 %", "median", "10 %", "smallest"):
        assert label in text


def test_the_list_of_partners_is_short_and_the_largest_products_come_first() -> None:
    html = adaptation(run_of(10))
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", html)
    cells = [row.split("</td><td>") for row in rows]
    assert cells[0] == ["lora_b·lora_a", "20", "0.595", "0.105"]  # by kind; medians
    assert cells[1] == ["lora_x19", "lora_b·lora_a", "0.690", "0.2"]
    assert cells[2] == ["lora_x18", "lora_b·lora_a", "0.680", "0.19"]
    assert len(cells) == 1 + 12


def test_hundreds_of_kinds_stay_readable() -> None:
    first, *others = run_of(4)
    first = first | {"names": [f"m{k}.w{k}.weight" for k in range(40)]}
    html = adaptation([first, *others])
    assert html.count("<tr><td>") == 8 + 1 + 12
    assert "<td>others</td><td>12</td>" in html
    assert "<td>m38.w38 and m39.w39</td><td>w39·w38</td>" in html


def test_a_run_that_found_nothing_has_no_section() -> None:
    assert adaptation([]) == ""
    nothing = snapshot(1, 0, -1, False) | {"importances": []}
    nothing |= {"names": NAMES, "shapes": [], "lr_mask_edges": EDGES}
    assert adaptation([nothing]) == ""


def test_a_run_of_one_step_and_names_that_are_markup() -> None:
    (one,) = run_of(1)
    one["names"] = ["<b>&"] * 40
    found = charts(adaptation([one]))
    assert "Pairs of partners" in found
    first, second = run_of(2)
    first["names"] = ["<b>&"] * 40
    html = adaptation([first, second])
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html


@pytest.mark.parametrize(
    ("formula", "shown"),
    [("P·Q", "a·b"), ("Q·P", "b·a"), ("P·Qᵀ", "a·bᵀ"), ("Pᵀ·Q", "aᵀ·b")],
)
def test_products_are_written_with_the_kinds(formula: str, shown: str) -> None:
    assert product({"pair": [0, 1], "product": formula}, ["a.weight", "b.weight"]) == shown
    unnamed = product({"pair": [7, 12], "product": formula}, [""] * 13)
    assert unnamed == shown.replace("a", "no. 7").replace("b", "no. 12")


def test_kinds_that_hold_the_letters_of_the_formula() -> None:
    assert product({"pair": [0, 1], "product": "P·Qᵀ"}, ["PQ.weight", "Q.weight"]) == "PQ·Qᵀ"


def test_quantiles() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 0.0]
    assert [quantile(values, share) for share in (1.0, 0.5, 0.25, 0.0)] == [4.0, 2.0, 1.0, 0.01]


# Charts


def test_bars_lie_between_their_edges_and_are_as_high_as_their_share() -> None:
    chart = histogram("x", [0.1, 1, 10], [Bars("a", [1, 3]), Bars("b", [0, 0])])
    (path,) = paths(ET.fromstring(chart))
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    left, bottom, low, middle, high, right, _ = numbers
    assert middle - left == pytest.approx(right - middle, abs=0.11)
    assert (bottom - high) == pytest.approx(3 * (bottom - low), abs=0.3)
    assert histogram("x", [0.1, 1, 10], [Bars("a", [0, 0])]) == ""
    assert histogram("x", [0.1, 1, 10], []) == ""


def test_a_logarithmic_chart_places_ratios_evenly() -> None:
    chart = line_chart("x", [Line("a", [1, 2, 3], [0.5, 1.0, 2.0])], y_log=True)
    (path,) = paths(ET.fromstring(chart))
    heights = [float(pair.split()[1]) for pair in path[1:].split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert math.isclose(heights[0] - heights[2], max(heights) - min(heights))
    ET.fromstring(line_chart("x", [Line("a", [1, 2], [0.0, 1.0])], y_log=True))  # not possible


def test_a_short_logarithmic_axis_has_more_than_powers_of_ten() -> None:
    assert Axis(0.3, 6.0, 0, 100, logarithmic=True).ticks(4) == pytest.approx([0.5, 1, 2, 5])
    assert Axis(0.011, 9.9, 0, 100, logarithmic=True).ticks(3) == pytest.approx([0.1, 1])
