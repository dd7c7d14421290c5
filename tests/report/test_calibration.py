"""Errors of plans, their tables and their drawing, from a sample with round figures."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from elite.facts import GIB
from elite.report import calibration, calibration_plot, tables
from tests.report import samples
from tests.report.test_plot import SVG, boxes
from tests.report.test_streamed import cells


def run(name: str, off: float, outcome: str = "ran", **changes: Any) -> dict[str, Any]:
    """A configuration of 4 GiB, 5 reserved, 6 on the device, 2 pinned and 3 s, all planned `off` too high."""
    real: dict[str, float] = {"allocated_bytes": 4 * GIB, "reserved_bytes": 5 * GIB, "device_bytes": 6 * GIB, "host_pinned_bytes": 2 * GIB}
    real |= {"host_rss_bytes": 2 * GIB, "step_s": 3.0}
    overrides = ["model=tiny", "model.num_hidden_layers=3", "hardware=auto", "adapter.method=lora", "tier.context=4096"]
    made: dict[str, Any] = {
        "name": name,
        "overrides": [*overrides, "training.micro_batch=2", "executor=streamed"],
        "outcome": outcome,
        "device": "Card 1",
        "active": ["qlora"],
        "predicted": {key: value * (1 + off) for key, value in (real | {"step_here_s": real["step_s"]}).items()},
    }
    return made | ({"measured": real} if outcome == "ran" else {}) | changes


def content() -> dict[str, Any]:
    """Eleven that ran, planned from 5 % too low to 5 % too high, one out of memory, one that failed before it was planned."""
    ran = [run(f"{i:02}", (i - 5) / 100) for i in range(11)]
    failed = run("12", 0, "error", predicted={}, active=[])
    del failed["device"]
    return {"environment": samples.ENVIRONMENT, "device": "Card 1", "runs": [*ran, run("11", 0, "oom"), failed]}


def test_errors_by_hand() -> None:
    found = calibration.errors(calibration.Row.of(run("00", 0.25)))
    assert found == pytest.approx(dict.fromkeys(calibration.QUANTITIES, 0.25))
    # A few libraries' pages are no error, but memory that nobody planned is.
    tiny = run("00", 0, measured={"host_pinned_bytes": 2**20, "host_rss_bytes": 2**29}, predicted={"host_pinned_bytes": 0.0})
    assert calibration.errors(calibration.Row.of(tiny)) == {}
    missed = run("00", 0, measured={"host_pinned_bytes": GIB}, predicted={"host_pinned_bytes": 0.0})
    assert calibration.errors(calibration.Row.of(missed)) == {"host, pinned": -1.0}


def test_spread_by_hand() -> None:
    found = calibration.spread(calibration.rows(content()))
    # 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5 hundredths.
    assert found["allocated"] == pytest.approx((11, 0.03, 0.05, 0.05)) and set(found) == set(calibration.QUANTITIES)
    assert calibration.spread([calibration.Row.of(run("00", 0.1))])["device"] == pytest.approx((1, 0.1, 0.1, 0.1))


def test_tables(tmp_path: Path) -> None:
    for made in (calibration.summary, calibration.every, tables.calibration_figure):
        assert made(tmp_path) == "Not measured yet: no `docs/measurements/calibration.json`."
    assert tables.CALIBRATION_PLOT not in tables.generated() or (tables.MEASUREMENTS / "calibration.json").exists()
    samples.write(tmp_path, "calibration", content())
    summary = calibration.summary(tmp_path)
    first = cells(summary)[0]
    assert (first["planned against measured"], first["configurations"]) == ("allocated", "11")
    assert (first["median error"], first["90 % are within"], first["largest"]) == ("3.0%", "5.0%", "5.0%")
    assert "13 configurations: 11 ran, 1 ran out of memory, 1 failed." in summary and "Card 1; torch 2.99.0" in summary
    assert "Under caps" not in summary
    samples.write(tmp_path, "calibration_caps", {"runs": [{"as_planned": True}] * 19 + [{"as_planned": False}]})
    assert "19 of 20 ran or ran out of memory as planned" in calibration.summary(tmp_path)


def test_every_configuration_has_its_line(tmp_path: Path) -> None:
    samples.write(tmp_path, "calibration", content())
    lines = cells(calibration.every(tmp_path))
    assert len(lines) == 13
    last = lines[10]
    assert (last["device"], last["model"], last["trained"], last["context"], last["batch"]) == ("Card 1", "tiny", "QLoRA", "4,096", "2")
    assert (last["allocated GiB"], last["step time s"], last["ended"]) == ("4.20 / 4.00", "3.15 / 3.00", "ran")
    assert (lines[11]["reserved GiB"], lines[11]["ended"]) == ("5.00 / –", "oom")
    assert (lines[12]["reserved GiB"], lines[12]["trained"], lines[12]["device"]) == ("– / –", "LoRA", "auto")


def test_the_drawing(tmp_path: Path) -> None:
    found = ElementTree.fromstring(calibration_plot.drawn(content()))
    marks = [element for element in found.iter() if element.attrib.get("class", "").startswith("mark ")]
    # Each configuration that ran, and the legend's one, for each quantity.
    assert len(marks) == 4 * (11 + 1)
    times = [mark for mark in marks if mark.attrib["class"] == "mark step-time"][1:]
    panel = calibration_plot.Panel(calibration_plot.LEFTS[1], "", {"step time": [(3.0, 3.15)]})
    assert (float(times[-1].attrib["cx"]), float(times[-1].attrib["cy"])) == pytest.approx(panel.place(3.0, 3.15), abs=0.06)
    # Right on the diagonal where the plan was right.
    even = next(mark for mark in times if float(mark.attrib["cy"]) == pytest.approx(panel.place(3.0, 3.0)[1], abs=0.06))
    from_left = float(even.attrib["cx"]) - calibration_plot.LEFTS[1]
    assert from_left == pytest.approx(calibration_plot.TOP + calibration_plot.SIDE - float(even.attrib["cy"]), abs=0.11)
    for left, top, right, bottom, said in boxes(found):
        assert left >= 0 and top >= 0 and right <= calibration_plot.WIDTH and bottom <= calibration_plot.HEIGHT, said
    assert found.findtext(f"{SVG}title")


def test_what_a_cpu_measures_is_drawn_too() -> None:
    bare = content()
    for one in bare["runs"]:
        for side in ("predicted", "measured"):
            for name in ("reserved_bytes", "device_bytes"):
                one.get(side, {}).pop(name, None)
    found = ElementTree.fromstring(calibration_plot.drawn(bare))
    assert not [element for element in found.iter() if "mark reserved" in element.attrib.get("class", "")]
    assert "reserved" not in calibration.spread(calibration.rows(bare))
    assert ElementTree.fromstring(calibration_plot.drawn(bare | {"runs": []})) is not None
