"""Jobs side by side: who is held against whom, by which class, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from elite.jobs import Job, State, read
from elite.optimizations import ALL
from elite.report import comparison, sweep

CLASS = {kind.name: kind.exactness.value for kind in ALL}


def job(folder: Path, overrides: tuple[str, ...], active: tuple[str, ...], losses: list[float], **config: Any) -> None:
    """What a finished job leaves, with these losses."""
    Job(overrides, State.finished).write(folder)
    decisions = [{"name": name, "active": name in active} for name in CLASS]
    summary = {
        "measured_peak_bytes": 2.0**30, "reserved_peak_bytes": 0.0, "host_rss_peak_bytes": 2.0**31, "tokens_per_s": 100.0, "step_s": 1.0,
        "train_loss_last": losses[-1], "val_last": {"val_loss": losses[-1]}, "errors_percent": {"peak": 1.0, "step": None},
    }  # fmt: skip
    versions = {"versions": {"torch": "2", "transformers": "5"}, "commit": "abc", "device": {"name": "card"}}
    files = {"plan": {"decisions": decisions, "executor": "whole"}, "summary": summary, "environment": versions}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text(json.dumps({"seed": 0, "output": {"folder": str(folder)}} | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses)))


def compared(tmp_path: Path, active: tuple[str, ...], shift: float, steps: int = 60, **config: Any) -> sweep.Against:
    base = [3.0] * steps
    job(tmp_path / "0", ("x=1",), ("gradient_checkpointing", *(n for n in active if n == "mixed_precision")), base)
    job(tmp_path / "1", ("x=2",), active, [loss + shift for loss in base], **config)
    against = sweep.gathered(tmp_path)[1].against
    assert against is not None
    return against


@pytest.mark.parametrize(
    ("active", "shift", "exactness", "holds"),
    [
        ((), 9e-6, "EXACT", True),
        ((), 9e-5, "EXACT", False),  # within the largest difference, but all on one side
        (("mixed_precision",), 9e-4, "EXACT", True),  # in bf16 another order rounds otherwise
        (("mixed_precision",), 2e-3, "EXACT", False),
        (("gradient_checkpointing", "fused_loss"), 9e-4, "EQUAL", True),
        (("gradient_checkpointing", "qlora"), 0.5, "APPROX", None),
        (("fused_loss", "qlora"), 0.5, "APPROX", None),
    ],
)
def test_the_weakest_class_that_differs_decides(
    tmp_path: Path, active: tuple[str, ...], shift: float, exactness: str, holds: bool | None
) -> None:
    found = compared(tmp_path, active, shift)
    assert found.exactness is not None and found.exactness.value == exactness and found.holds is holds
    assert found.largest == pytest.approx(shift) and found.drift == pytest.approx(shift)


def test_few_steps_are_judged_by_the_largest_difference_alone(tmp_path: Path) -> None:
    assert compared(tmp_path, (), 9e-5, steps=3).holds is True


def test_other_settings_promise_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, (), 1e-4, seed=1)
    assert found.exactness is None and found.holds is None and found.limit is None


def test_jobs_that_left_nothing_have_their_row(tmp_path: Path) -> None:
    fast = "ablation.variant"
    job(tmp_path / "0", (f"{fast}=all", "model=a"), ("gradient_checkpointing",), [3.0])
    Job((f"{fast}=without_qlora", "model=a"), State.inapplicable, "qlora does not act here").write(tmp_path / "1")
    Job((f"{fast}=without_fused_kernels", "model=a"), State.failed, "out | of memory\nmore").write(tmp_path / "2")
    job(tmp_path / "10", (f"{fast}=none", "model=a"), (), [3.0])
    Job((f"{fast}=only_qlora", "model=a")).write(tmp_path / "11")
    assert [folder.name for folder in read(tmp_path)] == ["0", "1", "2", "10", "11"]
    rows = sweep.gathered(tmp_path)
    assert [row.baseline for row in rows] == ["0", "0", "0", "10", "10"]
    comparison.write(tmp_path, rows)
    table = (tmp_path / "ablation.md").read_text()
    for said in (
        "**not run**: qlora does not act here",
        "**failed**: out \\| of memory |",
        "| only_qlora | **did not end**",
        "25 % faster",
    ):
        assert said in table, said
    assert table.count("## Against job") == 2 and "card; torch 2, transformers 5; commit abc" in table
    assert json.loads((tmp_path / "ablation.json").read_text())["jobs"][2]["values"]["peak_gib"] is None
