"""What generation takes a token, by hand and against a real prefill; and that a plan leaves room for it."""

from dataclasses import replace

import pytest
import torch

from elite.config import Executor
from elite.facts import GIB, NO_CORPUS, Facts
from elite.optimizations import decide
from elite.plan import make_plan
from elite.plan.generation import generation_tokens, token_bytes
from elite.plan.memory import predict
from tests.models import SIZES, tiny
from tests.plan.helpers import STANDARD, device, phi2, run_config, switches
from tests.plan.live_bytes import LiveBytes


def facts(adapter: str = "lora", context: int = 4096) -> Facts:
    shape = phi2()
    return Facts(shape, device("rtx3090"), context, 1, shape.lora_params(8) if adapter == "lora" else shape.total_params, adapter)


def test_bytes_of_a_token_by_hand() -> None:
    lora, full = facts(), facts("full")
    # Phi-2: 32 layers, 32 heads of 80 for queries, keys and values alike, hidden size 2,560, MLP 10,240.
    cache, work = 33 * 2 * 2560 * 2, (3 * 10240 + 7 * 2560) * 2
    half = decide(switches("mixed_precision"), lora)
    assert token_bytes(lora, half) == cache + work + 4 * 2560 * 2
    assert token_bytes(full, half) == cache + work + 4 * 2560 * 4
    assert token_bytes(lora, decide(switches(), lora)) == 2 * (cache + work + 4 * 2560 * 2)


def test_a_prefill_stays_within() -> None:
    """A real model's prompt, in fp32 on a CPU."""
    model = tiny("llama", attention="sdpa", num_hidden_layers=4).eval()
    shape = replace(
        phi2(),
        model_type="llama",
        num_hidden_layers=4,
        hidden_size=SIZES["hidden_size"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_key_value_heads=2,
        head_dim=8,
        layer_linears=tuple(replace(linear, inputs=SIZES["intermediate_size"]) for linear in phi2().layer_linears),
    )
    tokens = 512
    of = Facts(shape, device("cpu"), tokens, 1, 1, "lora")
    live = LiveBytes()
    live.ignore([*model.parameters(), *model.buffers()])
    with torch.no_grad(), live:
        model.generate(input_ids=torch.ones(1, tokens, dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)
    expected = tokens * token_bytes(of, decide(switches(), of))
    assert 0.5 * expected <= live.peak <= expected


@pytest.mark.parametrize("context", [4096, 131072, 2**20])
@pytest.mark.parametrize("card", ["rtx2060s", "rtx3090"])
def test_prompts_are_as_long_as_there_is_room_for(card: str, context: int) -> None:
    config, machine = (
        run_config(context, (*STANDARD, "fused_loss"), executor=Executor.auto),
        replace(device(card), host_ram_bytes=256 * GIB),
    )
    made = make_plan(config, machine, phi2(), NO_CORPUS)
    assert made.fits and 0 < made.generation_tokens <= context
    stays = sum(made.memory[name] for name in ("linear_weights", "other_weights", "keys_values", "staging", "optimizer_state"))
    needs = made.generation_tokens * token_bytes(facts(context=context), decide(config.optimizations, facts()))
    assert stays + needs <= made.usable_bytes - made.headroom_bytes
    if context > 4096:
        # All layers' keys and values of such a prompt would be 40 GiB and more.
        assert made.generation_tokens < context


def test_no_room_is_no_prompt() -> None:
    of = facts()
    estimate = predict(of, decide(switches(*STANDARD), of))
    assert generation_tokens(of, decide(switches(*STANDARD), of), estimate, estimate.linear_weights) == 0
