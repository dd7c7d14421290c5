"""The tables of fused kernels say what their files hold."""

from pathlib import Path
from typing import Any

from elite.report import fused
from tests.report import samples
from tests.report.test_streamed import cells


def run(model: str, name: str, *seconds: float) -> dict[str, Any]:
    steps = [samples.step(value, 5) for value in seconds]
    return {"name": name, "model": samples.MODEL | {"name": model}, "device": "Card 1", "context": 1000, "steps": steps}


def test_steps(tmp_path: Path) -> None:
    runs = [run("phi2", "unfused", 9, 3, 2, 2), run("phi2", "fused", 9, 1), run("qwen", "unfused", 9, 4)]
    runs += [run("qwen", "fused", 9, 2), run("qwen", fused.BASES["against transformers with Liger"], 9, 3)]
    runs[1]["profile"] = samples.PROFILE
    samples.write(tmp_path, fused.STEPS, {"environment": samples.ENVIRONMENT, "runs": runs})
    rows = cells(fused.steps(tmp_path))
    assert [row["step s"] for row in rows] == ["2.000", "1.000", "4.000", "2.000", "3.000"]
    assert [row["speed against unfused"] for row in rows] == ["1.00×", "2.00×", "1.00×", "2.00×", "1.33×"]
    assert [row["against transformers with Liger"] for row in rows] == ["–", "–", "0.75×", "1.50×", "1.00×"]
    assert rows[1]["tokens/s"] == "1,000" and rows[1]["peak GiB allocated"] == "4.50"
    assert [row["waiting for the host"] for row in rows] == ["–", "3%", "–", "–", "–"]
    runs += [run("phi2", name, 9, seconds) | {"micro_batch": 4} for name, seconds in (("unfused", 6), ("fused", 2))]
    samples.write(tmp_path, fused.STEPS, {"environment": samples.ENVIRONMENT, "runs": runs})
    *_, fast = cells(fused.steps(tmp_path))
    assert (fast["context"], fast["tokens/s"], fast["speed against unfused"]) == ("4 × 1,000", "2,000", "3.00×")


def test_curves(tmp_path: Path) -> None:
    plain = {"model": {"weights": "pretrained"}, "device": "Card 1", "dtype": "bfloat16", "context": 4096}
    limits = {"max_difference": 1.5e-2, "mean_drift": 1e-3}
    one = {"model": "smollm2", "adapter": "lora", "parts": ["norms", "rotary"], "max_difference": 0.02, "mean_drift": 0.0004}
    found = {"environment": samples.ENVIRONMENT, "steps": 50, "runs": [one | {"within": False, "limits": limits, "plain": plain}]}
    samples.write(tmp_path, fused.CURVES, found)
    table = fused.curves(tmp_path)
    (row,) = cells(table)
    assert row["model"] == "smollm2 (pretrained)" and row["kernels"] == "norms, rotary" and row["within"] == "no"
    assert row["largest difference of a loss"] == "0.0200" and row["mean drift"] == "0.00040"
    assert "50 steps of 4,096 tokens" in table
