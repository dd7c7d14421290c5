"""Liger's kernels: why they are off where they cannot run; on a GPU, that they act and are undone."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from elite.executor.whole import WholeExecutor
from elite.optimizations.liger_kernels import LigerKernels
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.test_attention import row

LIGER = LigerKernels(LigerKernels.Config(enabled=True))
GPU = replace(FACTS, device=replace(FACTS.device, kind="cuda", present=False))


def test_it_says_why_it_cannot_act() -> None:
    assert LIGER.check(FACTS) == "Triton kernels need a CUDA device"
    assert LIGER.check(replace(GPU, model=replace(FACTS.model, model_type="phi"))) == "liger-kernel has no kernels for phi"
    assert LIGER.check(GPU) is None, "a card that is only planned for is taken to have the package"


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_missing_package_is_named() -> None:
    reason = LIGER.check(replace(GPU, device=replace(GPU.device, present=True)))
    assert reason == "liger-kernel is not installed: pip install liger-kernel"


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_it_acts_and_undoes(kind: str) -> None:
    model: Any = tiny(kind, hidden_size=64)
    model.cuda()
    executor, batch = WholeExecutor(model, torch.float32), row(13, 24).to("cuda")
    modeling = vars(sys.modules[type(model).__module__])
    names, attributes = dict(modeling), {name: sorted(vars(module)) for name, module in model.named_modules()}
    plain = executor.loss_sum(batch)
    applied = LIGER.apply(model)
    assert applied.count == 2 * 3 + 1 and applied.undo is not None
    assert executor.loss_sum(batch).item() == pytest.approx(plain.item(), rel=1e-4)
    assert [name for name in names if modeling[name] is not names[name]] == ["apply_rotary_pos_emb"]
    applied.undo()
    assert modeling == names
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(executor.loss_sum(batch), plain)
