"""The tables of agreement say what their files hold."""

import json
from pathlib import Path

from elite.report import agreement
from elite.report.measurement import MEASUREMENTS
from tests.report import samples
from tests.report.test_streamed import cells

PASS = {"median_error": 0.05, "worst_ratio": 1.5, "mean_ratio": 1.01, "tensors_above": 7, "tensors_below": 6}


def test_gradients(tmp_path: Path) -> None:
    layout = samples.LOSSY.to_dict()
    run = {
        "adapter": "full",
        "tensors": 272,
        "whole": {"median_error": 0.04},
        "repeated": PASS | {"worst_ratio": 1.02},
        "other_kernel": PASS,
        "streamed": [PASS | {"layout": layout}],
    }
    model = {"name": "tiny", "weights": "pretrained"}
    found = {"environment": samples.ENVIRONMENT, "device": "Card 1", "model": model, "dtype": "bfloat16", "rows": 3, "context": 16384}
    samples.write(tmp_path, agreement.GRADIENTS, found | {"runs": [run]})
    rows = cells(agreement.gradients(tmp_path))
    assert [row["pass"] for row in rows][:3] == ["ordinary", "ordinary, a second time", "ordinary, another attention kernel"]
    assert rows[0]["median error"] == "0.0400" and rows[1]["worst ratio"] == "1.02"
    last = rows[-1]
    assert last["pass"] == "streamed, chunks of 8,192, kept: multilevel, keys and values on the host"
    assert (last["mean ratio"], last["tensors above 1.1"], last["below 1 / 1.1"], last["of"]) == ("1.01", "7", "6", "272")


def test_curves() -> None:
    table = agreement.curves(MEASUREMENTS)
    found = json.loads((MEASUREMENTS / "streamed_curves.json").read_text())
    for row, run in zip(cells(table), found["runs"], strict=True):
        assert row["trained"] == run["adapter"] and float(row["largest difference of a loss"]) == round(run["max_difference"], 4)
        assert row["within"] == ("yes" if run["within"] else "no")
    assert "smollm2_135m, pretrained weights, bfloat16; 50 steps of 16,384 tokens" in table
