"""Compiled layers beside everything that stands in for a layer's parts; what is counted; where they cannot be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from elite.attention import generating
from elite.executor.whole import WholeExecutor
from elite.model import apply_stage
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.activation_quantization import ActivationQuantization
from elite.optimizations.contract import OptimizationConfig, Stage
from elite.optimizations.torch_compile import Backend, TorchCompile
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.test_attention import row

ROWS = (row(13, 24), row(7, 20, 10), row(37))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def on(backend: Backend, *names: str) -> OptimizationsConfig:
    changes: dict[str, Any] = {name: OptimizationConfig(True) for name in names if name != "activation_quantization"}
    if "activation_quantization" in names:
        changes["activation_quantization"] = ActivationQuantization.Config(True, width=8)
    return replace(OptimizationsConfig(), torch_compile=TorchCompile.Config(True, backend), **changes)


def made(kind: str, config: OptimizationsConfig) -> Any:
    """A model and what `config` makes of it, with adapters where it needs them; and what was applied."""
    model = tiny(kind)
    if config.fused_lora.enabled:
        model.requires_grad_(False)
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    return model, apply_stage(Stage.executor, decide(config, FACTS), model)


def gradients(model: Any, batch: Any) -> Tensor:
    model.zero_grad()
    WholeExecutor(model, torch.float32).loss_sum(batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("names", [(), ("gradient_checkpointing", "fused_lora"), ("activation_quantization",)], ids="+".join)
def test_gradients_stay_and_other_documents_compile_nothing(names: tuple[str, ...]) -> None:
    alone = [name for name in names if name == "fused_lora"]
    plain, _ = made("llama", replace(OptimizationsConfig(), **{name: OptimizationConfig(True) for name in alone}))  # type: ignore[arg-type]
    model, applied = made("llama", on(Backend.aot_eager, *names))
    told = []
    for batch in ROWS:
        exact, found = gradients(plain, batch), gradients(model, batch)
        if "activation_quantization" in names:
            assert torch.cosine_similarity(found, exact, dim=0) > 0.999 and not torch.equal(found, exact)
        else:
            assert torch.allclose(found, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
        told.append(applied["torch_compile"].words)
    assert told[0] == told[1] == told[2]
    assert told[0].startswith("2 decoder layers by aot_eager; ") and "; 0 graphs" not in told[0]


def test_a_recompilation_is_counted_and_generation_compiles_nothing() -> None:
    model, applied = made("llama", on(Backend.aot_eager))
    with torch.no_grad():
        WholeExecutor(model, torch.float32).loss_sum(ROWS[0])
    before = applied["torch_compile"].words
    assert before.endswith(" 0 recompilations")
    with generating(model):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    assert applied["torch_compile"].words == before
    with torch.no_grad():
        WholeExecutor(model, torch.float32).loss_sum(row(9))
    assert not applied["torch_compile"].words.endswith(" 0 recompilations")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_inductor_computes_the_same(kind: str) -> None:
    plain, _ = made(kind, OptimizationsConfig())
    model, _ = made(kind, on(Backend.inductor))
    exact, found = gradients(plain, ROWS[0]), gradients(model, ROWS[0])
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_it_says_where_it_cannot_act(monkeypatch: pytest.MonkeyPatch) -> None:
    part = TorchCompile(TorchCompile.Config(True))
    assert "streamed executor" in str(part.check(replace(FACTS, executor="streamed")))
    assert part.check(FACTS) is None
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert "no compiler on this machine (none of g++" in str(part.check(FACTS))
    assert part.check(replace(FACTS, device=replace(FACTS.device, present=False))) is None
    assert TorchCompile(TorchCompile.Config(True, Backend.aot_eager)).check(FACTS) is None
