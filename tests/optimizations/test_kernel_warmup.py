"""Kernel warm-up and defragmentation: what they leave as it was, and what they report."""

from dataclasses import replace

import pytest
import torch

from elite import checkpoint
from elite.errors import PlanError
from elite.model import apply_stage
from elite.optimizations.contract import Stage
from elite.optimizations.defragmentation import Defragmentation, Emptying
from elite.optimizations.kernel_warmup import KernelWarmup
from tests.optimizations.test_all import FACTS, Decision, only
from tests.training.rig import adapted, loop_build

GPU = replace(FACTS, device=replace(FACTS.device, kind="cuda"))


def test_a_warm_up_is_a_pass_that_leaves_no_trace() -> None:
    loaded = adapted("llama", dropout=0.1)
    build = loop_build(loaded, None, 4, 4)
    apply_stage(Stage.loop, only(KernelWarmup.name), build)
    passes: list[int] = []
    loaded.core.register_forward_hook(lambda *_: passes.append(1))
    kept = torch.ones_like(loaded.trainable[0])
    loaded.trainable[0].grad = kept
    before, weights = checkpoint.random_state(), [p.detach().clone() for p in loaded.trainable]
    build.hooks[0].begin()
    after = checkpoint.random_state()
    assert len(passes) == 1 and torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]
    assert loaded.trainable[0].grad is kept and bool((kept == 1).all()) and all(p.grad is None for p in loaded.trainable[1:])
    assert all(torch.equal(p, w) for p, w in zip(loaded.trainable, weights, strict=True))
    counts = build.hooks[0].counts()
    assert counts["passes"] == 1 and counts["pass_s"] > 0 and counts["kernels_compiled"] == 0


def test_defragmentation_is_for_gpus_and_must_come_to_pass() -> None:
    part = Defragmentation(Defragmentation.Config(enabled=True, every=5))
    assert "CPU" in str(part.check(FACTS)) and part.check(GPU) is None
    decision = (Decision(part, True, True, ""),)
    assert apply_stage(Stage.loop, decision, loop_build(adapted("llama"), None, 12, 1))[part.name].count == 2
    with pytest.raises(PlanError, match="found nothing to act on .times in 4 steps"):
        apply_stage(Stage.loop, decision, loop_build(adapted("llama"), None, 4, 1))


@pytest.mark.gpu
def test_defragmentation_gives_back_what_nothing_uses() -> None:
    hook = Emptying(2, torch.device("cuda"))
    torch.cuda.empty_cache()
    torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    hook.stepped(1)
    assert hook.metrics() == {}
    hook.stepped(2)
    said = hook.metrics()
    assert said["defragmentation_before_bytes"] - said["defragmentation_after_bytes"] >= 64 * 2**20
    assert said["defragmentation_allocated_bytes"] <= said["defragmentation_after_bytes"]
    assert hook.counts()["times"] == 1 and hook.counts()["released_bytes"] >= 64 * 2**20
