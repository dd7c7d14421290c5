"""Sliding windows against a dense mask: whole and streamed, fused and not, packed, in chosen layers, while generating."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elite import attention
from elite.attention import DOCUMENT_EAGER, DOCUMENT_SDPA, generating
from elite.compose import from_overrides
from elite.data.batches import IGNORE
from elite.errors import ConfigError, ModelError, PlanError
from elite.executor.streamed.attach import attach
from elite.executor.whole import WholeExecutor
from elite.facts import Facts
from elite.model import apply_stage
from elite.optimizations import OptimizationsConfig, decide, reshaped, sliding_window
from elite.optimizations.contract import OptimizationConfig, Stage
from elite.optimizations.sliding_window import SlidingWindow
from elite.plan.memory import folded, predict, unoptimized
from elite.plan.time import step_flops
from elite.streaming import Place, Streaming
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.plan import steps
from tests.plan.helpers import device, phi2, switches
from tests.plan.steps import Case
from tests.test_attention import row

WINDOW = 5
LENGTHS = (13, 47)
"""Documents of less and of more than a block."""


def windowed(kind: str, kernel: str, layers: tuple[int, ...] = (), window: int = WINDOW) -> Any:
    model = tiny(kind, kernel)
    applied = SlidingWindow(SlidingWindow.Config(True, window, list(layers))).apply(model)
    assert applied.count == (len(layers) or 2)
    return model


def dense(kind: str, *lengths: int, layers: tuple[int, ...] = (0, 1), window: int = WINDOW) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers' own eager attention under a written-out mask [1, 1, S, S] for each layer."""
    model, batch = tiny(kind, "eager"), row(*lengths)
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(total)[:, None], torch.arange(total)[None]
    causal = (j <= i) & (document[:, None] == document[None])
    masks = [causal & (i - j < window) if index in layers else causal for index in range(2)]
    for layer, mask in zip(model.get_decoder().layers, masks, strict=True):
        added = torch.zeros(1, 1, total, total).masked_fill(~mask, torch.finfo(torch.float32).min)
        layer.self_attn.register_forward_pre_hook(
            lambda _module, args, kwargs, added=added: (args, kwargs | {"attention_mask": added}), with_kwargs=True
        )
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(loss: float, model: Any, expected: tuple[float, dict[str, Tensor]]) -> None:
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        found = model.get_parameter(name).grad
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("layers", [(), (1,)])
@pytest.mark.parametrize("kernel", [DOCUMENT_SDPA, DOCUMENT_EAGER])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_it_is_attention_under_a_dense_mask(kind: str, kernel: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding_window, "LEAST_BLOCK", 4)
    model = windowed(kind, kernel, layers)
    loss = WholeExecutor(model, torch.float32).loss_sum(row(*LENGTHS))
    loss.backward()
    check(loss.item(), model, dense(kind, *LENGTHS, layers=layers or (0, 1)))


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_streamed_executor_keeps_to_it(kind: str, chunk: int) -> None:
    model = windowed(kind, DOCUMENT_SDPA, (1,))
    batch = row(13, 24)
    attached = attach(model, Streaming(chunk=chunk, block=8))
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "documents": batch.documents}
    loss = model(**given, shift_labels=batch.labels, num_items_in_batch=1).loss
    loss.backward()
    attached.undo()
    check(loss.item(), model, dense(kind, 13, 24, layers=(1,)))


def test_keys_in_host_memory_are_refused() -> None:
    with pytest.raises(ModelError, match="sliding window"):
        attach(windowed("llama", DOCUMENT_SDPA), Streaming(keys_values=Place.host))


def test_generation_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token with a cache, as without one over everything so far."""
    monkeypatch.setattr(sliding_window, "LEAST_BLOCK", 4)
    model = windowed("llama", DOCUMENT_SDPA)
    ids = torch.arange(20)[None]
    with generating(model), torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    found = ids
    with torch.no_grad():
        for _ in range(out.shape[1] - 20):
            logits = model(input_ids=found, documents=((found.shape[1],),), use_cache=False).logits
            found = torch.cat([found, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, found)
    assert model.config._attn_implementation == DOCUMENT_SDPA


def test_the_plan_counts_what_is_seen() -> None:
    context, window = 32768, 1024
    facts = Facts(phi2(), device("h100"), context, 1, phi2().lora_params(16), "lora")
    config = replace(switches("mixed_precision", "flash_attention"), sliding_window=SlidingWindow.Config(True, window))
    with_window = replace(facts, model=reshaped(config, facts.model))
    half = replace(config, sliding_window=SlidingWindow.Config(True, window, list(range(16))))
    seen = sum(min(i + 1, window) for i in range(context)) / context
    assert with_window.model.keys_seen(context) == pytest.approx(seen, rel=1e-3)
    assert reshaped(half, facts.model).keys_seen(context) == pytest.approx((seen + context / 2) / 2, rel=1e-3)
    attention_flops = 3.5 * 4 * 32 * 2560 * context * (context / 2 - seen)
    saved = step_flops(facts, (0, 0), 1) - step_flops(with_window, (0, 0), 1)
    assert saved == pytest.approx(attention_flops, rel=1e-3)
    assert with_window.model.as_loaded == facts.model
    assert predict(with_window, decide(config, with_window)).total == pytest.approx(predict(facts, decide(config, facts)).total, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_peak_is_as_planned(kind: str) -> None:
    case = Case(kind, ("flash_attention",), tokens=1024)
    changes: dict[str, Any] = {name: OptimizationConfig(True) for name in case.on}
    config = replace(OptimizationsConfig(), sliding_window=SlidingWindow.Config(True, 128), **changes)
    plain = steps.facts_of(case)
    facts = replace(plain, model=reshaped(config, plain.model))
    decisions = decide(config, facts)
    attention._bias.cache_clear()
    model = steps.built(case, decisions)
    apply_stage(Stage.geometry, decisions, model.get_base_model())
    mask = folded(facts, decisions).standing.batch - unoptimized(facts).standing.batch
    assert steps.passing(case, facts, decisions).total + mask == pytest.approx(steps.measured_peak(case, model), rel=0.03)


def test_values_and_models_of_their_own_window() -> None:
    for words, override in (("window=0: must be positive", "window=0"), ("different numbers", "layers=[1,1]")):
        with pytest.raises(ConfigError, match=words):
            from_overrides(f"optimizations.sliding_window.{override}")
    config = replace(OptimizationsConfig(), sliding_window=SlidingWindow.Config(True, 64, [7]))
    with pytest.raises(PlanError, match="names layer 7"):
        decide(config, FACTS)
    config = replace(config, sliding_window=SlidingWindow.Config(True, 64))
    own = replace(FACTS, model=replace(FACTS.model, sliding_window=32))
    assert "of its own" in {d.name: d for d in decide(config, own)}["sliding_window"].reason
    short = replace(FACTS, context=64)
    assert "sees the whole context" in {d.name: d for d in decide(config, short)}["sliding_window"].reason
