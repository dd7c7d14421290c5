"""What generation takes a token, by hand and against a real prefill; and that a plan leaves room for it."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import continuous_api

from elite.config import Executor
from elite.facts import GIB, NO_CORPUS, Facts
from elite.model import LoadedModel
from elite.optimizations import decide
from elite.optimizations.contract import Decision, Estimate
from elite.optimizations.paged_attention import PagedAttention
from elite.optimizations.targets import GenerationBuild
from elite.plan import make_plan
from elite.plan.generation import fixed_bytes, generation_tokens, token_bytes
from elite.plan.memory import predict
from elite.training.generation import Generator
from tests.models import SIZES, tiny
from tests.plan.helpers import STANDARD, device, phi2, run_config, switches
from tests.plan.live_bytes import LiveBytes


def facts(adapter: str = "lora", context: int = 4096) -> Facts:
    shape = phi2()
    return Facts(shape, device("rtx3090"), context, 1, shape.lora_params(8) if adapter == "lora" else shape.total_params, adapter)


def small(layers: int, tokens: int) -> tuple[PreTrainedModel, Facts]:
    """A real model, and what a plan knows of it."""
    model = tiny("llama", attention="sdpa", num_hidden_layers=layers, max_position_embeddings=2048).eval()
    shape = replace(
        phi2(),
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=SIZES["hidden_size"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_key_value_heads=2,
        head_dim=8,
        layer_linears=tuple(replace(linear, inputs=SIZES["intermediate_size"]) for linear in phi2().layer_linears),
    )
    return model, Facts(shape, device("cpu"), tokens, 1, 1, "lora")


def paged(page: int, piece: int) -> tuple[Decision, ...]:
    options = PagedAttention.Config(enabled=True, page=page, piece=piece)
    return decide(replace(switches(), paged_attention=options), small(2, 512)[1])


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
    tokens = 512
    model: Any
    model, of = small(4, tokens)
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


def test_bytes_with_pages_by_hand() -> None:
    lora, full = facts(), facts("full")
    half = decide(replace(switches("mixed_precision"), paged_attention=PagedAttention.Config(enabled=True)), lora)
    # 32 layers of 2,560 keys and values, bf16; one layer's gathered, and expanded to as many query heads; a mask of 1,024 queries.
    assert token_bytes(lora, half) == token_bytes(lora, half, count=8) == 32 * 2 * 2560 * 2 + 4 * 2560 * 2 + 1024 * 2
    # Pages have the dtype of the weights.
    assert token_bytes(full, half) == 2 * token_bytes(lora, half)
    work = (3 * 10240 + 7 * 2560) * 2 + 4 * 2560 * 2
    assert fixed_bytes(lora, half, count=8, new=44) == (8 * (44 + 256) + 512) * 32 * 2 * 2560 * 2 + 1024 * (work + 1024 * 2)


@pytest.mark.parametrize("count", [1, 6])
def test_generation_with_pages_stays_within(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the library's own thread, which holds the pages."""
    tokens, new, page, piece = 1500, 8, 16, 64
    model, of = small(8, tokens + new)
    live, decisions = LiveBytes(), paged(page, piece)
    live.ignore([*model.parameters(), *model.buffers()])

    class Watched(threading.Thread):
        def run(self) -> None:
            with live:
                super().run()

    monkeypatch.setattr(continuous_api.threading, "Thread", Watched)
    loaded, build, end = LoadedModel(model, model, {}), GenerationBuild(page, piece), SIZES["vocab_size"]
    found = Generator(loaded, torch.float32, torch.device("cpu"), build, end)(list(range(96)) * 16, new, count, temperature=1.0)
    assert [len(tokens) for tokens in found] == [new] * count
    expected = 1536 * token_bytes(of, decisions, count) + fixed_bytes(of, decisions, count, new)
    assert 0.6 * expected <= live.peak <= expected
    dense = decide(switches(), of)
    alone = [1536 * token_bytes(of, dense, n) + fixed_bytes(of, dense, n, new) for n in (1, count)]
    assert expected < alone[1] and alone[1] == count * alone[0]


def test_pages_leave_room_for_longer_prompts() -> None:
    of = facts(context=2**20)
    room = [
        generation_tokens(of, made, Estimate(), 24 * GIB, count=8, new=48)
        for made in (decide(switches("mixed_precision"), of), decide(switches("mixed_precision", "paged_attention"), of))
    ]
    assert 6 < room[1] / room[0] < 16
