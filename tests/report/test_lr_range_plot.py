"""The drawing is an SVG that shows the curve and what it suggests."""

from dataclasses import replace
from xml.etree import ElementTree

from elite.report.lr_range_plot import BOTTOM, LEFT, RIGHT, TOP, drawn
from elite.training.lr_range import Sweep

FOUND = Sweep([1e-4, 1e-3, 1e-2, 1e-1], [3.0, 2.5, 2.0, 9.0], [3.0] * 4, [3.0, 2.5, 2.0, 9.0], [3.0, 2.7, 2.3, 4.0], "diverged")


def test_curve_and_suggestions() -> None:
    root = ElementTree.fromstring(drawn(FOUND, "tiny <model>"))
    lines = {line.get("class"): line for line in root.iter("{http://www.w3.org/2000/svg}polyline")}
    assert set(lines) == {"raw", "smooth"}
    places = [tuple(map(float, pair.split(","))) for pair in str(lines["smooth"].get("points")).split()]
    assert places[0][0] == LEFT and places[-1][0] == RIGHT
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in places)
    # Higher up is more; what diverges leaves by the top.
    assert places[0][1] < places[1][1] < places[2][1] and places[3][1] == TOP
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"valley {FOUND.valley:.2g}" in words and f"steepest {FOUND.steepest:.2g}" in words and "tiny <model>" in words


def test_a_flat_curve_can_be_drawn() -> None:
    flat = replace(FOUND, losses=[1.0] * 4, corrected=[1.0] * 4, smoothed=[1.0] * 4)
    assert "valley" not in "".join(str(e.text) for e in ElementTree.fromstring(drawn(flat, "")).iter() if "text" in e.tag)
