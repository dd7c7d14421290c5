from dataclasses import replace

import pytest

from elite.facts import Facts
from elite.optimizations import decide
from elite.plan.time import model_flops_per_token, recomputed, step_flops, step_seconds
from tests.plan.helpers import device, phi2, switches


def facts(context: int = 4096, adapter: str = "lora") -> Facts:
    shape = phi2()
    trainable = shape.lora_params(16) if adapter == "lora" else shape.total_params
    return Facts(shape, device("rtx3090"), context, 1, trainable, adapter)


def test_short_context_costs_six_operations_a_weight() -> None:
    short = facts(64, "full")
    weights = short.model.linear_params + short.model.hidden_size * short.model.vocab_size
    assert model_flops_per_token(short) == pytest.approx(6 * weights, rel=0.01)


def test_lora_needs_no_weight_gradients() -> None:
    assert model_flops_per_token(facts(64)) == pytest.approx(model_flops_per_token(facts(64, "full")) * 2 / 3, rel=0.02)


def test_attention_takes_over_with_the_context() -> None:
    # 7 operations a step for every 4 model ones of the forward pass: (1 + 2.5) and one recomputation.
    long = facts(1 << 20)
    attention = 4 * 32 * 80 * long.context**2 / 2 * 32
    done = step_flops(long, recomputed(decide(switches("gradient_checkpointing"), long)), 1)
    assert done == pytest.approx(attention * 4.5, rel=0.05)


def test_checkpointing_costs_one_forward_of_the_layers() -> None:
    short = facts(64)
    plain, checkpointed = (step_flops(short, recomputed(decide(switches(*on), short)), 1) for on in ((), ("gradient_checkpointing",)))
    assert checkpointed - plain == pytest.approx(2 * short.model.linear_params * 64, rel=0.02)


def test_time_follows_work_and_rate() -> None:
    one = facts()
    decisions = decide(switches("mixed_precision"), one)
    assert step_seconds(one, decisions, (0, 0), 4) == pytest.approx(4 * step_seconds(one, decisions, (0, 0), 1))
    faster = replace(one, device=replace(one.device, matmul_flops_per_s=2 * one.device.matmul_flops_per_s))
    assert step_seconds(faster, decisions, (0, 0), 1) == pytest.approx(step_seconds(one, decisions, (0, 0), 1) / 2)
    assert step_seconds(one, decide(switches(), one), (0, 0), 1) > step_seconds(one, decisions, (0, 0), 1)
