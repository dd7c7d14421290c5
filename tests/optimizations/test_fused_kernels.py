"""Fused kernels in whole models: what they replace, and that loss and gradients stay; on a CPU under Triton's interpreter."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from elite.bench.curves import differences
from elite.distributed.ranks import Ranks
from elite.executor.whole import WholeExecutor
from elite.optimizations import decide
from elite.optimizations.contract import OptimizationConfig
from elite.optimizations.fused_kernels import FusedKernels, _norm
from elite.streaming import Keep, Streaming
from elite.training.step import make_scaler, optimizer_step
from tests.executor.streamed import exactness
from tests.executor.streamed.exactness import assert_same, ordinary_loss, streamed, tokens, uneven
from tests.kernels.interpreter import run_interpreted
from tests.models import SIZES, tiny
from tests.optimizations.test_all import FACTS
from tests.test_attention import row

FUSED = FusedKernels(FusedKernels.Config(enabled=True))
GPU = replace(FACTS, device=replace(FACTS.device, kind="cuda", present=False))
OTHERS = {
    "olmo2": (0, 0),  # norms whole projections, and after its blocks
    "stablelm": (2, 0),  # hands on position ids by name; its layer has another dropout
    "gpt_oss": (0, 0),  # attention sinks; its MLP returns more than one thing
    "doge": (0, 0),  # makes a mask of its own
    "granite": (2, 2),
    "qwen3_moe": (2, 2),
}
"""Rotary embeddings and residual sums that are fused in two layers."""
PARTS = ("norms", "activations", "rotary", "residuals")
COUNTS = {
    "llama": 2 * 5 + 1,  # two norms, a gated MLP, an attention and a sum a layer, the last norm
    "qwen2": 2 * 5 + 1,
    "qwen3": 2 * 7 + 1,  # norms of queries and keys besides
    "mistral": 2 * 5 + 1,
    "phi": 2 * 4 + 1,  # a norm, an activation, an attention and a sum a layer
    "gpt_neox": 2 * 2 + 1,  # norms; its GELU is the exact one, its attention and its layers are of another form
    "starcoder2": 2 * 5 + 1,
    "phi3": 2 * 2 + 1,  # norms; gate and up, and queries, keys and values, are one map each
    "gemma": 2 * 2,  # activations and attentions; its norms scale by 1 + w
    "gemma3_text": 2 * 2,
}


def test_it_acts_on_gpus_alone() -> None:
    assert FUSED.check(FACTS) == "Triton kernels need a CUDA device"
    assert FUSED.check(GPU) is None


def test_it_takes_the_place_of_ligers_kernels() -> None:
    from elite.errors import PlanError
    from elite.optimizations import OptimizationsConfig

    on = OptimizationConfig(enabled=True)
    with pytest.raises(PlanError, match="fused_kernels.*liger_kernels|liger_kernels.*fused_kernels"):
        decide(replace(OptimizationsConfig(), fused_kernels=on, liger_kernels=on), GPU)


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = WholeExecutor(model, torch.float32).loss_sum(batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def check_models(device: str) -> None:
    for kind, count in COUNTS.items():
        model: Any = tiny(kind, hidden_size=64)
        model.to(device)
        batch = row(3, 8).to(device)
        plain, attributes = gradients(model, batch), {name: sorted(vars(module)) for name, module in model.named_modules()}
        applied = FUSED.apply(model)
        assert applied.count == count, (kind, applied.count)
        fused = gradients(model, batch)
        assert fused.keys() == plain.keys()
        for name, expected in plain.items():
            error = (fused[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
            assert error <= 1e-4, (kind, name, error)
        assert applied.undo is not None
        applied.undo()
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
        assert all(torch.equal(got, plain[name]) for name, got in gradients(model, batch).items()), kind


def check_parts(device: str) -> None:
    """Each part alone changes what it says, and leaves the gradients."""
    for kind, counts in {"llama": (5, 2, 2, 2), "phi": (3, 2, 2, 2)}.items():
        model: Any = tiny(kind, hidden_size=64)
        model.to(device)
        batch = row(3, 8).to(device)
        plain = gradients(model, batch)
        for name, count in zip(PARTS, counts, strict=True):
            fused = FusedKernels(FusedKernels.Config(True, **{part: part == name for part in PARTS}))
            applied = fused.apply(model)
            assert applied.count == count, (kind, name, applied.detail)
            for parameter, got in gradients(model, batch).items():
                torch.testing.assert_close(got, plain[parameter], rtol=1e-3, atol=1e-6, msg=f"{kind} {name} {parameter}")
            assert applied.undo is not None
            applied.undo()


def check_curves(device: str) -> None:
    """Fifty steps with each part alone, and with all, lose what they do without. In fp32: the interpreter cuts bf16 off where hardware
    rounds, and of so small a model bf16's own noise is what `EQUAL` allows (elite.bench.kernel_curves takes a real one)."""
    for kind in ("llama", "phi"):
        plain = losses(kind, (), device)
        assert plain[-1] < 0.5 * plain[0]
        for parts in (*((part,) for part in PARTS), PARTS):
            apart = differences(plain, losses(kind, parts, device), "float32")
            assert apart["within"], (kind, parts, apart)


def losses(kind: str, parts: Iterable[str], device: str) -> list[float]:
    """Of each step of a tiny model, with these parts."""
    model: Any = tiny(kind, hidden_size=64)
    model.to(device)
    applied = FusedKernels(FusedKernels.Config(True, **{part: part in parts for part in PARTS})).apply(model)
    assert (applied.count > 0) == bool(parts)
    ranks, weights = Ranks(0, 1, torch.device(device)), list(model.parameters())
    executor, optimizer = WholeExecutor(model, torch.float32), torch.optim.AdamW(weights, 2e-3)
    windows, scaler = [[row(3, 8, seed=seed)] for seed in range(2)], make_scaler(ranks.device, torch.float32)
    return [optimizer_step(executor, optimizer, scaler, windows[step % 2], weights, 1.0, ranks).loss for step in range(50)]


def check_dropout(device: str) -> None:
    """Phi's dropouts: the masks of a recomputation are those of the forward, and evaluation drops nothing."""
    model: Any = tiny("phi", hidden_size=64, resid_pdrop=0.3)
    model.to(device)
    batch = row(3, 8).to(device)
    FUSED.apply(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(gradients(model, batch))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-6, msg=name)
    torch.manual_seed(4)
    assert not torch.equal(gradients(model, batch)["loss"], found[0]["loss"])
    model.eval()
    assert torch.equal(gradients(model, batch)["loss"], gradients(model, batch)["loss"])


def check_streamed(device: str, cases: Iterable[tuple[str, Keep]] = (("llama", Keep.layers), ("phi", Keep.attention))) -> None:
    """Under the streamed executor, chunk by chunk."""
    for kind, keep in cases:
        model: Any = uneven(kind, hidden_size=64)
        model.to(device)
        ids = tokens(1, 9).to(device)
        arguments = {"input_ids": ids, "labels": ids}
        model.zero_grad()
        ordinary_loss(model, ids, ids, [[9]]).backward()
        expected = exactness.gradients(model)
        applied = FUSED.apply(model)
        _, found = streamed(model, Streaming(chunk=4, block=4, keep=keep), arguments)
        assert_same(found, expected, 1e-4)
        assert applied.undo is not None
        applied.undo()


def check_more_streamed(device: str) -> None:
    check_streamed(device, itertools.product(("llama", "qwen3", "phi", "starcoder2"), (Keep.attention, Keep.layers)))


def check_others(device: str) -> None:
    """Architectures that look alike and are not: each loses no more than what computes the same."""
    for kind, (attentions, sums) in OTHERS.items():
        torch.manual_seed(0)
        sizes = SIZES | {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 16}
        config = AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.use_cache = False
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        exactness.spread(model, scale=0.05)
        model.to(device)
        ids = tokens(1, 12).to(device)

        def found(model: Any = model, ids: torch.Tensor = ids) -> dict[str, Any]:
            model(input_ids=ids, labels=ids).loss.backward()
            return exactness.gradients(model)

        expected = found()
        applied = FUSED.apply(model)
        assert f"{attentions} rotary embeddings, {sums} residual sums" in applied.detail, (kind, applied.detail)
        assert_same(found(), expected, 1e-4)


@pytest.mark.parametrize(
    "check",
    [
        *("check_models", "check_others", "check_parts", "check_dropout", "check_streamed"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("check_more_streamed", "check_curves")),
    ],
)
def test_models_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.optimizations.test_fused_kernels", check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_models, check_others, check_parts, check_dropout, check_more_streamed, check_curves])
def test_models_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


def test_scaled_residuals_keep_their_own_forward() -> None:
    """A layer is replaced by what it computes, not by its parts' names."""
    from elite.optimizations.functions.blocks import fused_layer

    model: Any = tiny("llama", hidden_size=64)
    layer = model.model.layers[0]
    norm = _norm(layer.post_attention_layernorm)
    assert norm is not None and fused_layer(layer, {norm.module: norm}) is not None

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            scaled: torch.Tensor = hidden_states + 0.9 * (super().forward(hidden_states, **kwargs) - hidden_states)
            return scaled

    layer.__class__ = Scaled
    assert fused_layer(layer, {norm.module: norm}) is None
