"""The bytes of the time model against what was measured of each operation."""

import json
from dataclasses import replace

import pytest

from elite.facts import Facts
from elite.optimizations import decide
from elite.plan.traffic import EAGER, FP32_WIDTH, FUSED, PER_UNIT, adapters, layer
from elite.report.measurement import MEASUREMENTS
from tests.plan.helpers import device, phi2, switches

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


@pytest.mark.parametrize(
    ("on", "of_norm", "of_activation"),
    [((), 7, 1), (("fused_lora",), 1, 0), (("qlora",), 7, 1), (("qlora", "fused_lora"), 7, 1), (("fused_kernels",), 0, 0)],
    ids=lambda part: "+".join(part) if isinstance(part, tuple) else str(part),
)
def test_what_autocast_keeps_in_fp32_is_converted_by_every_reader(on: tuple[str, ...], of_norm: int, of_activation: int) -> None:
    """Beyond the first: four maps and their adapters read Phi's norm, two functions the activation. Under fp32 nobody converts."""
    model = phi2()
    facts = Facts(model, device("h100"), 4096, 1, model.lora_params(8), "lora")
    half, bare = (layer(facts, decide(switches(*on, *also), facts)) for also in (("mixed_precision",), ()))
    more = half + bare * (-1 / FP32_WIDTH)
    values = of_norm * model.hidden_size + of_activation * 10240
    assert (more.forward, more.backward) == pytest.approx((6 * values, 18 * values), abs=1)
    full = replace(facts, adapter="full", trainable_params=model.total_params)
    if not on:
        more = layer(full, decide(switches("mixed_precision"), full)) + layer(full, decide(switches(), full)) * (-1 / FP32_WIDTH)
        assert more.forward == pytest.approx(6 * 3 * model.hidden_size, abs=1)


def test_adapters_beside_packed_maps_move_more() -> None:
    """Fused or not: a further product adds to what the packed map gives. Nothing moves for adapters where there are none."""
    model = phi2()
    facts = Facts(model, device("h100"), 4096, 1, model.lora_params(8), "lora")
    for more in ((), ("fused_lora",)):
        plain, packed = (adapters(facts, decide(switches("mixed_precision", *more, *on), facts)) for on in ((), ("qlora",)))
        assert packed.forward > plain.forward > 0 and packed.backward > plain.backward
    full = replace(facts, adapter="full", trainable_params=model.total_params)
    assert adapters(full, decide(switches("mixed_precision"), full)).forward == 0


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
