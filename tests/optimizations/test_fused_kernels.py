"""Fused kernels in whole models: what they replace, and that loss and gradients stay; on a CPU under Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from elite.executor.whole import WholeExecutor
from elite.optimizations import decide
from elite.optimizations.contract import OptimizationConfig
from elite.optimizations.fused_kernels import FusedKernels
from tests.kernels.interpreter import run_interpreted
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.test_attention import row

FUSED = FusedKernels(FusedKernels.Config(enabled=True))
GPU = replace(FACTS, device=replace(FACTS.device, kind="cuda", present=False))
COUNTS = {
    "llama": 2 * 3 + 1,  # two norms and a gated MLP a layer, the last norm
    "qwen3": 2 * 5 + 1,  # norms of queries and keys besides
    "mistral": 2 * 3 + 1,
    "phi": 2 * 2 + 1,  # a norm and an activation a layer
    "gpt_neox": 2 * 2 + 1,  # its GELU is the exact one, which stays
    "starcoder2": 2 * 3 + 1,
    "gemma": 2,  # its gates' GELU; its norms scale by 1 + w
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
        batch = row(13, 24).to(device)
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


def test_models_in_the_interpreter() -> None:
    run_interpreted("tests.optimizations.test_fused_kernels", "check_models")


@pytest.mark.gpu
def test_models_on_a_gpu() -> None:
    check_models("cuda")
