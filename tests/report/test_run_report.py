"""The page of a run: all of it is there, nothing on it needs the network, and a page that fails costs the run nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from elite.report import chart, run_report
from elite.report.run_report import RunReport
from elite.runfolder import RunFolder
from tests.conftest import Trained


def words(html: str) -> str:
    """What a reader sees."""
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            seen.append(data)

    Reader().feed(html)
    return " ".join(" ".join(seen).split())


def test_a_run_leaves_its_report(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained("debug=tiny", "training.max_steps=32", "training.learning_rate=1e-2", "training.val_every=16")
    summary, plan = json.loads(folder.summary.read_text()), json.loads(folder.plan.read_text())
    html = (folder.path / "report.html").read_text()
    said = words(html)
    assert re.findall(r"(?:src|href)=|url\(|@import|<script", html) == []
    for title in ("training loss", "validation loss", "learning rate", "gradient norm", "throughput", "Peak of host memory"):
        assert title in said, title
    for expected in (
        f"{summary['train_loss_last']:.4f}",
        f"{summary['best_val_loss']:.4f} at step",
        f"acted on {summary['applied']['gradient_checkpointing']}",
        "memory_pool was requested and is inactive: ",
        *plan["not_modelled"],
    ):
        assert expected in said, expected
    assert json.loads((folder.path / "completion.json").read_text())["path"] in said
    found = summary["convergence"]
    assert found["words"] in said and found["words"] in " ".join(capsys.readouterr().out.split())
    assert found["limit"]["low"] <= found["limit"]["value"] <= found["limit"]["high"] < summary["train_loss_first"]
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)

    cut = RunFolder(tmp_path / "cut")
    shutil.copytree(folder.path, cut.path)
    cut.metrics.write_text("".join(cut.metrics.read_text().splitlines(keepends=True)[:12]))
    RunReport(cut, plan, Console()).end({})
    said = words((cut.path / "report.html").read_text())
    assert "has not ended well" in said and "too few steps" in said and f"of {plan['steps']}" in said


def test_a_report_that_fails_is_said_and_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunReport(RunFolder(tmp_path / "gone"), {}, Console()).end({})
    assert "the report could not be written: KeyError" in capsys.readouterr().out


def test_many_points_are_averaged_and_bad_ones_left_out() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)] + [(1e4, float("nan"))]
    made = run_report.thinned(points, 100)
    assert len(made) == 100 and all(y == 0.5 for _, y in made) and made[0][0] == 49.5
    assert run_report.thinned([(1.0, float("inf"))]) == []


@pytest.mark.parametrize("values", [(0.0, 0.0), (3.0, 3.0), (-2.0, 5.0), (1e-9, 2e-9), (6.01, 6.02), (1.0, 1e12)])
def test_an_axis_holds_its_values(values: tuple[float, float]) -> None:
    axis = chart.Axis.of(values)
    assert all(-1e-9 <= axis.part(value) <= 1 + 1e-9 for value in values) and 2 <= len(axis.ticks) <= 8
    assert chart.lines("t", "x", {"a": []}) == "" and "polyline" in chart.lines("t", "x", {"a": [(0, values[0]), (1, values[1])]})
