"""Recorded ablations as tables: differences, jobs that could not run, presets side by side, the losses of up-training."""

import json
from pathlib import Path
from typing import Any

import pytest

from elite.facts import GIB
from elite.jobs import Job, State
from elite.report import ablations, comparison, sweep
from elite.report.measurement import write
from tests.report import samples
from tests.report.test_sweep import job


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table, its head and rule left out."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]


def recorded(tmp_path: Path, name: str) -> Path:
    """The multirun in `tmp_path/sweep` kept as a measurement; the folder of measurements."""
    comparison.write(tmp_path / "sweep", sweep.gathered(tmp_path / "sweep"))
    write(name, [tmp_path / "sweep" / "ablation.json"], tmp_path)
    return tmp_path


def changed(folder: Path, **figures: float) -> None:
    """A job's summary with other figures."""
    file = folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | figures))


def test_a_part_is_held_against_all(tmp_path: Path) -> None:
    jobs = tmp_path / "sweep"
    job(jobs / "0", ("ablation.variant=all",), ("fused_loss",), [3.0, 2.0])
    job(jobs / "1", ("ablation.variant=without_fused_loss",), (), [3.0, 2.0005])
    changed(jobs / "1", measured_peak_bytes=1.5 * GIB, tokens_per_s=80.0)
    Job(("ablation.variant=without_flash_attention",), State.failed, "phi2 does not fit: it needs 9 GiB").write(jobs / "2")
    Job(("ablation.variant=without_qlora",), State.running).write(jobs / "3")
    rows = cells(ablations.table("kept", recorded(tmp_path, "kept")))
    assert [row[0] for row in rows] == ["all", "without fused_loss", "without flash_attention"], "one that still runs has no row"
    assert rows[1][1:3] == ["1.50", "+0.50"] and rows[1][4:6] == ["80", "-20 %"]
    assert rows[1][6].startswith("0.0005, EQUAL holds") and rows[2][1] == "not run: it needs 9 GiB"


def test_presets_side_by_side_and_a_plan_for_what_does_not_fit(tmp_path: Path) -> None:
    for number, (preset, context, gib, speed) in enumerate((("none", 512, 8, 50.0), ("none", 1024, 30, 50.0), ("extreme", 512, 4, 25.0))):
        folder = tmp_path / "sweep" / str(number)
        job(folder, (f"optimizations={preset}", f"tier.context={context}"), (), [3.0])
        changed(folder, measured_peak_bytes=gib * GIB, tokens_per_s=speed)
    folder = tmp_path / "sweep" / "3"
    job(folder, ("optimizations=extreme", "tier.context=1024"), (), [3.0])
    changed(folder, measured_peak_bytes=5 * GIB, tokens_per_s=75.0)
    plan: dict[str, Any] = {"context": 4096, "executor": "streamed"}
    plans = [
        plan | {"preset": "none", "total_bytes": 90 * GIB, "step_s": 8.0},
        plan | {"preset": "extreme", "total_bytes": 9 * GIB, "step_s": 4.0},
    ]
    samples.write(tmp_path, "claims", {"presets": plans})
    rows = cells(ablations.extremes(recorded(tmp_path, "none_extreme")))
    assert [row[:7] for row in rows] == [
        ["512", "8.00", "4.00", "2.0x", "50", "25", "-50 %"],
        ["1,024", "30.00", "5.00", "6.0x", "50", "75", "+50 %"],
        ["4,096", "90.00", "9.00", "10.0x", "512", "1,024", "+100 %"],
    ]
    assert [row[7].startswith("**extrapolated") for row in rows] == [False, False, True]


def test_a_conversion_by_the_tokens_it_was_trained_on(tmp_path: Path) -> None:
    pooling = {"kv_heads": 1, "init": "mean"}
    run = {
        "environment": samples.ENVIRONMENT | {"device": {"name": "Card 1"}},
        "config": {"model": {"name": "tiny", "num_key_value_heads": 3}, "optimizations": {"gqa_conversion": pooling}},
        "summary": {"conversion": {"before": _losses(2.0)}, "learning_rate": 1e-3, "tokens_per_s": 1e4},
        "metrics": [{"tokens": 0} | _losses(9.0), {"tokens": 5000, "loss": 3.0}, {"tokens": 5000} | _losses(2.1)],
    }
    samples.write(tmp_path, "gqa_uptraining", {"runs": [run]})
    rows = cells(ablations.conversion(tmp_path))
    assert [(row[1], row[3], row[4]) for row in rows] == [("3", "–", "2.0000"), ("3 → 1", "0", "9.0000"), ("3 → 1", "5,000", "2.1000")]


def _losses(loss: float) -> dict[str, float]:
    return {"val_loss": loss, "val_loss_alone": loss + 0.5}


@pytest.mark.parametrize("made", [ablations.leave_one_out, ablations.extremes, ablations.conversion])
def test_nothing_measured_is_said(made: Any, tmp_path: Path) -> None:
    assert "Not measured yet" in made(tmp_path)
