"""The bytes of the time model against what was measured of each operation."""

import json

import pytest

from elite.plan.traffic import EAGER, FUSED, PER_UNIT
from elite.report.measurement import MEASUREMENTS

TOKENS = 32768
HEADS = {"phi2": 2 * 32 * 80, "llama31_8b": (32 + 8) * 128, "qwen25_coder_1_5b": (12 + 2) * 128}
UNITS = {
    ("layer_norm", "norm", "phi2"): 2560,
    ("rms_norm", "norm", "llama31_8b"): 4096,
    ("rms_norm", "norm", "qwen25_coder_1_5b"): 1536,
    ("rotary", "rotary", "llama31_8b"): HEADS["llama31_8b"],
    ("rotary", "rotary", "qwen25_coder_1_5b"): HEADS["qwen25_coder_1_5b"],
    ("partial_rotary", "rotary", "phi2"): HEADS["phi2"],
    ("gated", "swiglu", "llama31_8b"): 14336,
    ("gated", "swiglu", "qwen25_coder_1_5b"): 8960,
    ("formula_gelu", "gelu", "phi2"): 10240,
    ("dropped_sums", "residual", "phi2"): 2560,
}
WITHIN = 0.15
"""Small tensors take a little longer a byte than large ones."""
AUTOCAST = frozenset({"layer_norm", "formula_gelu"})
"""Eager operations that training takes in fp32 and the measurement in bf16: they move more, but not more than thrice."""


@pytest.mark.parametrize(("kind", "op", "model"), list(UNITS), ids=lambda part: str(part))
@pytest.mark.parametrize("how", [EAGER, FUSED])
def test_bytes_are_those_measured(kind: str, op: str, model: str, how: str) -> None:
    found = json.loads((MEASUREMENTS / "kernels_h100.json").read_text())
    rows = [row for row in found["rows"] if (row["op"], row["model"], row["tokens"]) == (op, model, TOKENS) and not row["variant"]]
    provider = "eager" if how == EAGER else "elite"
    ms = {row["pass"]: row["providers"][provider]["ms"][1] for row in rows}
    cost, per = PER_UNIT[kind][how], found["copy_gb_s"] * 1e6 / TOKENS / UNITS[(kind, op, model)]
    both = ms["forward+backward"] * per
    if how == EAGER and kind in AUTOCAST:
        assert both < cost.forward + cost.backward < (4 if kind == "layer_norm" else 3) * both
        return
    assert cost.forward == pytest.approx(ms["forward"] * per, rel=WITHIN)
    assert cost.forward + cost.backward == pytest.approx(both, rel=WITHIN)
