"""The kernels' tables and drawing say what the measurement holds, misses included."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from elite.bench import kernels as bench
from elite.report import kernels, kernels_plot, tables
from tests.report import samples
from tests.report.test_plot import SVG, boxes
from tests.report.test_streamed import cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the sample."""
    samples.write(tmp_path, "kernels", samples.kernels())
    return tmp_path


def test_names_are_those_of_the_bench() -> None:
    assert kernels.OURS == bench.OURS and kernels.LOSS in bench.OPS
    assert min(bench.TOKENS) == kernels.SUMMED_TOKENS
    assert sorted(name for names in kernels.COLUMNS.values() for name in names) == sorted(kernels.NAMES)
    assert set(kernels_plot.COLOURS) == set(kernels.COLUMNS)


def test_every_row(folder: Path) -> None:
    table = kernels.every(folder)
    rows = cells(table)
    assert [(row["operation"], row["tokens"], row["pass"]) for row in rows[:3]] == [
        ("norm", "8,192", "forward"),
        ("norm", "8,192", "forward+backward"),
        ("norm", "64", "forward"),
    ]
    miss, first, _, gelu, loss, lost = rows
    assert (miss["ours ms"], miss["eager"], miss["compile"], miss["Liger"], miss["CCE"]) == ("2.000", "4.00×", "1.10×", "0.93×", "–")
    assert (miss["of a copy’s bandwidth"], miss["result"]) == ("90%", "miss: Liger 0.93×")
    assert first["result"] == "fastest" and first["Liger"] == "1.25×"
    # Slower by less than two decimals show is no miss.
    assert (gelu["operation"], gelu["eager"], gelu["compile"], gelu["result"]) == ("GELU", "9.00× / 1.10×", "1.00×", "fastest")
    assert loss["operation"] == "linear cross entropy, trained head" and loss["of a copy’s bandwidth"] == "–"
    assert (loss["eager"], loss["Liger"], loss["CCE"], loss["result"]) == ("–", "1.20× / 1.50×", "0.95× / 2.00×", "miss: CCE 0.95×")
    assert (lost["ours ms"], lost["eager"], lost["result"]) == ("–", "–", "not measured")
    for said in ("Card 1", "torch 2.99.0", "commit abc1234", "liger-kernel 9.9", "3,000 GB/s"):
        assert table.count(said) == 1
    assert "gone" not in table


def test_summary(folder: Path) -> None:
    norm, gelu, loss = cells(kernels.summary(folder))
    # Of the two rows with many tokens: 4 and 6, 1.1 and 1.2, 0.93 and 1.25.
    assert (norm["operation"], norm["rows"], norm["fastest"]) == ("norm", "2", "1 of 2")
    assert (norm["against eager"], norm["against compile"], norm["against Liger"], norm["against CCE"]) == (
        "4.00× / 5.00×",
        "1.10× / 1.15×",
        "0.93× / 1.09×",
        "–",
    )
    assert norm["least of a copy’s bandwidth"] == "80%"
    # The faster of two forms counts.
    assert gelu["against eager"] == "1.10× / 1.10×" and gelu["fastest"] == "1 of 1"
    assert (loss["against Liger"], loss["against CCE"], loss["fastest"]) == ("1.20× / 1.20×", "0.95× / 0.95×", "0 of 1")
    assert loss["least of a copy’s bandwidth"] == "–"


def test_losses(folder: Path) -> None:
    table = kernels.losses(folder)
    (row,) = cells(table)
    assert row["head"] == "trained head, forward+backward" and list(row)[3:] == [
        *("ours", "eager", "Liger", "Liger, fp32 sums", "CCE", "CCE, exact")
    ]
    assert row["ours"] == "10.00 / 64 / 2.0e-03" and row["CCE"] == "9.50 / 320 / 2.0e-03" and row["eager"] == "–"
    assert table.endswith("Not measured: tiny, eager: too large.")


def test_what_a_cpu_measures_has_neither_ours_nor_peaks(tmp_path: Path) -> None:
    content = samples.kernels()
    content["rows"] = [samples.kernel_row(kernels.LOSS, "forward", {"eager": 3.0, "reference": 2.0}, variant="no gradients")]
    del content["rows"][0]["providers"]["eager"]["peak_bytes"]
    content["rows"][0]["providers"]["eager"]["error"] = None
    samples.write(tmp_path, "kernels", content)
    assert cells(kernels.losses(tmp_path))[0]["eager"] == "3.00 / – / –"
    assert cells(kernels.every(tmp_path))[0]["result"] == "not measured" and cells(kernels.summary(tmp_path)) == []
    found = kernels.measured(tmp_path)
    assert found is not None and ElementTree.fromstring(kernels_plot.drawn(found)) is not None


def drawing(content: dict[str, Any], folder: Path) -> Element:
    samples.write(folder, "kernels", content)
    found = kernels.measured(folder)
    assert found is not None
    return ElementTree.fromstring(kernels_plot.drawn(found))


def ticks(found: Element) -> dict[float, float]:
    """Pixels of each ratio that has a label."""
    labels = {text.text or "": float(text.attrib["x"]) for text in found.iter(f"{SVG}text") if text.attrib["class"] == "middle small"}
    return {float(said.rstrip("×")): x for said, x in labels.items()}


def test_lines_reach_from_least_to_most(tmp_path: Path) -> None:
    found = drawing(samples.kernels(), tmp_path)
    places = ticks(found)
    assert list(places) == [0.5, 1, 2, 4, 8]
    lines = [line.attrib for line in found.iter(f"{SVG}line")]
    (eager,) = [line for line in lines if line["class"] == "line eager" and float(line["y1"]) > 95 and float(line["x1"]) > places[2]]
    assert float(eager["x1"]) == pytest.approx(places[4], abs=0.06) and places[4] < float(eager["x2"]) < places[8]
    liger = min((line for line in lines if line["class"] == "line Liger" and float(line["y1"]) > 95), key=lambda line: float(line["y1"]))
    assert places[0.5] < float(liger["x1"]) < places[1] < float(liger["x2"]) < places[2]
    (even,) = [line for line in lines if line["class"] == "even"]
    assert float(even["x1"]) == places[1]


def test_labels_stay_inside_and_apart(tmp_path: Path) -> None:
    content = samples.kernels()
    content["rows"] = [
        samples.kernel_row(op, which, {"elite": 1.0, "eager": 30.0, "compile": 0.3, "liger": 1.0, "cce": 2.0})
        for op in bench.OPS
        for which in ("forward", "forward+backward")
    ]
    content["device"] = "NVIDIA H100 80GB HBM3"
    content["environment"]["libraries"] = {"liger-kernel": "0.8.5", "cut-cross-entropy": "25.1.1", "triton": "3.7.1"}
    content["environment"]["versions"] = {"torch": "2.13.0+cu130", "transformers": "5.23.0"}
    found = drawing(content, tmp_path)
    labels = boxes(found)
    height = float(found.attrib["viewBox"].split()[3])
    assert {kernels.spoken(op) for op in bench.OPS} <= {label[4] for label in labels}
    for left, top, right, bottom, said in labels:
        assert left >= 0 and top >= 0 and right <= kernels_plot.WIDTH and bottom <= height, said
    for one, other in combinations(labels, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one[4], other[4])


def test_both_schemes_colour_the_same(tmp_path: Path) -> None:
    styles = drawing(samples.kernels(), tmp_path).findtext(f"{SVG}style") or ""
    light, dark = styles.split("@media (prefers-color-scheme: dark)")
    kinds = ["text", ".page", ".grid", ".even", *(f".{kind}.{name}" for kind in ("line", "mark") for name in kernels.COLUMNS)]
    for kind in kinds:
        assert f"{kind} {{" in light and f"{kind} {{" in dark, kind


def test_the_drawing_is_written_once_measured(folder: Path) -> None:
    for path in tables.MEASUREMENTS.glob("*.json"):
        if path.stem != "kernels":
            (folder / path.name).write_text(path.read_text())
    made = tables.generated(folder)
    assert made[tables.KERNELS_PLOT].startswith("<svg ") and "](docs/kernels.svg)" in tables.kernels_figure(folder)
    assert json.loads((folder / "kernels.json").read_text())["name"] == "kernels"
    (folder / "kernels.json").unlink()
    assert tables.KERNELS_PLOT not in tables.generated(folder)
