"""The drawing: every point where its value is, no label on another."""

import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from elite.report import plot, streamed
from tests.report import samples

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawing(tmp_path: Path) -> Element:
    """Of the sample."""
    samples.write(tmp_path, "streamed_peers", samples.comparison())
    found = streamed.comparison(tmp_path)
    assert found is not None
    return ElementTree.fromstring(plot.drawn(found))


def places(drawing: Element, name: str) -> list[list[tuple[float, float]]]:
    """Points of both panels' lines."""
    lines = [line.attrib["points"] for line in drawing.iter(f"{SVG}polyline") if line.attrib["class"] == f"line {name}"]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def ticks(drawing: Element, panel: int) -> list[tuple[float, float]]:
    """Values of one panel's grid lines, and where they lie: labels are read back."""
    labels = [text for text in drawing.iter(f"{SVG}text") if "end" in text.attrib["class"].split()]
    left = [text for text in labels if (float(text.attrib["x"]) > plot.LEFTS[1] - 60) == bool(panel)]
    return [(float((text.text or "").replace(",", "")), float(text.attrib["y"]) - 4) for text in left]


@pytest.mark.parametrize(
    ("panel", "name", "values"),
    [
        (0, "recipe", (4, 16)),
        (0, "streamed", (3, 5)),
        (1, "recipe", (128, 128)),
        (1, "streamed", (128, 256)),
        (1, "floor", (256, 4096 / 12)),
    ],
)
def test_points_lie_at_their_values(drawing: Element, panel: int, name: str, values: tuple[float, float]) -> None:
    (zero, bottom), *_, (highest, top) = ticks(drawing, panel)
    assert zero == 0 and bottom > top and highest >= max(values)
    points = places(drawing, name)[panel if name != "floor" else 0]
    read = [(bottom - y) / (bottom - top) * highest for _, y in points]
    assert read == pytest.approx(values, rel=0.01, abs=0.1)
    named = {text.text: float(text.attrib["x"]) for text in drawing.iter(f"{SVG}text") if float(text.attrib["x"]) > plot.LEFTS[panel]}
    assert points[0][0] == named["1K"] if panel else points[0][0] < points[1][0]


def test_contexts_are_on_a_logarithm() -> None:
    panel = plot.Panel(0, "", [1024, 4096, 8192], {"recipe": [(1024, 1.0)]})
    first, second, third = (panel.x(tokens) for tokens in panel.contexts)
    assert second - first == pytest.approx(2 * (third - second))


@pytest.mark.parametrize("highest", [0.3, 1, 4.99, 7.01, 19.96, 35_398, 1_000_000])
def test_ticks_are_few_round_and_cover_the_values(highest: float) -> None:
    found = plot.Panel(0, "", [1024], {"recipe": [(1024, highest)]}).ticks
    assert found[0] == 0 and found[-2] < highest <= found[-1] * (1 + 1e-9) and 3 <= len(found) <= 7
    assert re.fullmatch(r"[125]0*", f"{found[1] * 1e6:.0f}")


def boxes(drawing: Element) -> list[tuple[float, float, float, float, str]]:
    """Generous rectangles around all labels: 0.62 em a letter is wider than usual fonts are on average."""
    found = []
    for text in drawing.iter(f"{SVG}text"):
        kinds, said = text.attrib["class"].split(), text.text or ""
        size = 11 if "small" in kinds else 13
        width, x, y = 0.62 * size * len(said), float(text.attrib["x"]), float(text.attrib["y"])
        left = x - (width if "end" in kinds else width / 2 if "middle" in kinds else 0)
        found.append((left, y - size, left + width, y + 0.3 * size, said))
    return found


@pytest.mark.parametrize("octaves", [1, 2, 8])
def test_labels_stay_inside_and_apart(octaves: int, tmp_path: Path) -> None:
    content = samples.comparison()
    recipe, small = content["runs"][0], content["runs"][2]
    contexts = [2**15 << i for i in range(octaves)]
    content["runs"] = [run | {"context": tokens} for run in (recipe, small) for tokens in contexts]
    content["floors"] = [{"context": tokens, "step_s": tokens / 40_000} for tokens in contexts]
    samples.write(tmp_path, "streamed_peers", content)
    found = streamed.comparison(tmp_path)
    assert found is not None
    labels = boxes(ElementTree.fromstring(plot.drawn(found)))
    assert len([label for label in labels if label[4] == "32K"]) == 2
    for left, top, right, bottom, said in labels:
        assert left >= 0 and top >= 0 and right <= plot.WIDTH and bottom <= plot.HEIGHT, said
    for one, other in combinations(labels, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one[4], other[4])


def test_both_schemes_colour_the_same(drawing: Element) -> None:
    style = drawing.findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for kind in ("text", ".page", ".grid", ".line.recipe", ".line.streamed", ".line.floor", ".mark.recipe", ".mark.streamed"):
        assert f"{kind} {{" in light and f"{kind} {{" in dark, kind
