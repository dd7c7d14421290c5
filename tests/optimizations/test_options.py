"""Options out of range are refused where they are composed, with the value, the rule and a remedy."""

import pytest

from elite import compose
from elite.errors import ConfigError, PlanError
from elite.optimizations.early_stopping import EarlyStopping
from tests.optimizations.test_all import Decision, Stage, apply_stage
from tests.training.rig import adapted, loop_build

BAD = (
    ("ema.decay=1.0", "must lie in (0, 1)"),
    ("ema.decay=nan", "must lie in (0, 1)"),
    ("swa.start=1.0", "must lie in [0, 1)"),
    ("swa.every=0", "must be at least 1"),
    ("swa.rate=-0.1", "must be positive and finite"),
    ("swa.anneal=0", "must be at least 1"),
    ("lookahead.k=0", "must be at least 1"),
    ("lookahead.alpha=1.5", "must lie in (0, 1]"),
    ("lora_plus.ratio=1.0", "must be finite and above 1"),
    ("label_smoothing.epsilon=0.0", "must lie in (0, 1)"),
    ("gradient_noise.eta=inf", "must be positive and finite"),
    ("gradient_noise.gamma=-1.0", "must not be negative, and finite"),
    ("adaptive_gradient_clipping.clipping=0.0", "must be positive and finite"),
    ("adaptive_gradient_clipping.eps=0.0", "must be positive and finite"),
    ("early_stopping.patience=0", "must be at least 1"),
    ("loss_spike_detection.minimum=2", "must be at least 3: fewer have no spread"),
    ("loss_spike_detection.window=15", "must be at least loss_spike_detection.minimum (16)"),
    ("loss_spike_detection.threshold=0.0", "must be positive and finite"),
    ("early_stopping.min_delta=-1.0", "must not be negative, and finite"),
    ("defragmentation.every=0", "must be at least 1"),
    ("activation_quantization.bits=5", "must be 8 or 4"),
    ("activation_quantization.width=0", "must be positive"),
    ("gqa_conversion.kv_heads=0", "must be positive"),
    ("sliding_window.window=0", "must be positive"),
    ("paged_attention.page=3", "must be at least 4"),
    ("paged_attention.piece=0", "must be at least 1"),
)


@pytest.mark.parametrize(("option", "rule"), BAD)
def test_values_out_of_range_are_refused(option: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose.from_overrides(f"optimizations.{option}")
    assert caught.value.problem == f"optimizations.{option}: {rule}"
    assert caught.value.remedy == f"leave optimizations.{option.split('=')[0]} out for its default"


def test_more_patience_than_validations_is_refused() -> None:
    decision = (Decision(EarlyStopping(EarlyStopping.Config(enabled=True, patience=4)), True, True, ""),)
    with pytest.raises(PlanError, match="of 4 validations may end the run, patience 4"):
        apply_stage(Stage.loop, decision, loop_build(adapted("llama"), None, 20, 4))
